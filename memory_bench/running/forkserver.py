"""A process that has imported what every worker imports, and forks one for each cell: imports are paid for once.

The server is a program of its own, so that the command stays without torch. It computes on one thread and opens no GPU,
for neither threads nor a driver survive a fork, and proves before its first cell that a fork of it can compute; else it
ends. A worker that it forks is what a fresh program would be: it has a session, a folder, an environment, standard
streams and an end of its own, imports plug-ins itself, and ends when its server does. The server ends with the command
that started it. A worker's exit code is told through a socket, and it is reaped when that has been read.
Loads no torch before `main`.
"""

import ctypes
import gc
import importlib
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn, Self

from memory_bench.running.fence import PAGE
from memory_bench.running.processes import BEACON, PARENT, WORKER

SERVER = (*WORKER[:-1], "memory_bench.running.forkserver")
MESSAGE = 4096  # bytes: a path, or two numbers
ROOM = 4096  # bytes in the server's environment, where a worker's mark is written
PATIENCE = 120.0  # seconds in which a fork must have computed a step
LEAVING = 5.0  # seconds in which a server ends by itself
POPULATE_READ = 22  # of madvise, since Linux 5.14


class ForkServer:
    """Begins workers; started by the first, and ended with the ``with`` block that it is used in."""

    def __init__(self) -> None:
        self._usable = sys.platform.startswith("linux") and hasattr(os, "pidfd_open")
        self._closed, self._served = False, False
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None

    def begin(self, command: Sequence[str], errors: IO[str], own: Mapping[str, str]) -> "Served | None":
        """A worker that runs `command`; None: it has to be a fresh program.

        Args:
            command: beginning with `memory_bench.running.processes.WORKER`; others are refused.
            errors: where its standard error goes.
            own: what its environment has beside this one's.

        Raises:
            ConnectionAbortedError: the server was closed meanwhile.
        """
        if tuple(command[: len(WORKER)]) != WORKER or not self._usable:
            return None
        order = Path(own[BEACON]).with_name("order.json")
        asked = {"arguments": command[len(WORKER) :], "environment": {**os.environ, **own}, "here": os.getcwd()}
        order.write_text(json.dumps(asked), encoding="utf-8")
        reading, writing = os.pipe()
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with self._lock:
                socket.send_fds(self._reached(), [os.fsencode(order)], [writing, errors.fileno(), theirs.fileno()])
            theirs.close()
            os.close(writing)
            writing = -1
            said = mine.recv(MESSAGE)
        except OSError:
            said = b""
        finally:
            theirs.close()
            if writing >= 0:
                os.close(writing)
        if said:
            self._served = True
            return Served(said, reading, mine)
        os.close(reading)
        mine.close()
        if self._closed:
            raise ConnectionAbortedError("the command is ending")
        self._usable = False  # it has ended, or cannot serve here
        return None

    def _reached(self) -> socket.socket:
        """The way to the server, which is started where it has not been."""
        if self._closed:
            raise ConnectionAbortedError
        if self._link is None:
            self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._process = subprocess.Popen(
                    [*SERVER, str(theirs.fileno())], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()], start_new_session=True, env={**os.environ, BEACON: " " * ROOM},
                )  # fmt: skip
        return self._link

    def close(self) -> None:
        """End it; workers that live still end as well."""
        self._closed = True
        with self._lock:
            if self._link is not None:
                self._link.close()  # it leaves when it hears that
            if self._process is not None:
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(LEAVING if self._served else 0.0)
                self._process.kill()
                self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Served:
    """A worker that the server has begun (`memory_bench.running.processes.Process`).

    Args:
        said: its id, and its exit code where it has ended already.
        reading: what it writes on standard output.
        link: tells of its end; when this is closed it is reaped.
    """

    def __init__(self, said: bytes, reading: int, link: socket.socket) -> None:
        pid, *code = map(int, said.split())
        self.pid = pid
        self.stdout: IO[str] | None = os.fdopen(reading, errors="replace")
        self._link, self._lock = link, threading.Lock()
        self._code: int | None = None
        link.setblocking(False)
        if code:
            self._ended(code[0])

    def poll(self) -> int | None:
        """Exit code, or None. Of one whose server is gone: killed, for it ends itself without a result."""
        with self._lock:
            if self._code is None:
                try:
                    said = self._link.recv(MESSAGE)
                except BlockingIOError:
                    return None
                except OSError:
                    said = b""
                self._ended(int(said.split()[1]) if said else -signal.SIGKILL)
            return self._code

    def wait(self, timeout: float | None = None) -> int:
        """Exit code, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: it lives still.
        """
        ends = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if ends is not None and time.monotonic() >= ends:
                raise subprocess.TimeoutExpired(WORKER, timeout or 0.0)
            threading.Event().wait(0.01)
        return code

    def _ended(self, code: int) -> None:
        self._code = code
        self._link.close()


# The server


def main() -> int:
    """The server's whole life, and, returning from it with the exit code of its work, that of every worker."""
    os.environ.pop(BEACON, None)
    server, link = os.getpid(), socket.socket(fileno=int(sys.argv[1]))
    held = _load()
    if not _computes():
        _leave()
    order = _serve(link)
    os.environ[PARENT] = str(server)
    _touch(held)
    with socket.socket(fileno=order["status"]) as status:
        status.send(str(os.getpid()).encode())
    from memory_bench.running import entry

    sys.argv = [str(entry.__file__), *order["arguments"]]
    return entry.main()


def _leave() -> NoReturn:
    """End the server; what its workers have computed is known to whoever waits for it."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    os._exit(0)


def _load() -> list[tuple[int, int]]:
    """Import what every worker imports, on one thread; where files are resident in memory then."""
    import torch

    torch.set_num_threads(1)  # no pool of threads is begun: it would be missing in forks
    from memory_bench.running.starting import settle, warm_up

    importlib.import_module("memory_bench.running.worker")
    warm_up()
    settle()
    gc.freeze()  # a collection in a fork would write to, and so copy, every page with objects
    return _resident_files()


def _computes() -> bool:
    """Whether a fork of this process can compute, also on two threads: one tries, and must end in time."""
    with _fork_warned():
        child = os.fork()
    if child == 0:
        with suppress(BaseException):
            import torch

            from memory_bench.running.starting import warm_up

            warm_up()
            torch.set_num_threads(2)
            big = torch.ones(512, 512)
            os._exit(0 if float((big @ big).exp().log().sum()) > 0 else 1)
        os._exit(1)
    handle = os.pidfd_open(child)
    if not select.select([handle], [], [], PATIENCE)[0]:
        os.kill(child, signal.SIGKILL)
    os.close(handle)
    return os.waitpid(child, 0)[1] == 0


def _serve(link: socket.socket) -> dict[str, Any]:
    """Fork workers as they are ordered; only they return from here, each with its own order."""
    command, waiting = os.getppid(), selectors.DefaultSelector()
    waiting.register(link, selectors.EVENT_READ)
    while True:
        for key, _ in waiting.select():
            if key.fileobj is not link:
                _end(waiting, key)
                continue
            message, handles, _, _ = socket.recv_fds(link, MESSAGE, 3)
            if not message or os.getppid() != command:
                _leave()  # the command is gone
            with _fork_warned():
                child = os.fork()
            if child == 0:
                for other in list(waiting.get_map().values()):
                    os.close(other.fd)
                waiting.close()
                link.detach()
                return _begun(Path(os.fsdecode(message)), *handles)
            told, errors, status = handles
            os.close(told)
            os.close(errors)
            waiting.register(os.pidfd_open(child), selectors.EVENT_READ, (child, socket.socket(fileno=status)))


def _end(waiting: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
    """A worker has ended, or its exit code has been read, until which nobody else can get its id."""
    child: int = key.data[0]
    status: socket.socket = key.data[1]
    waiting.unregister(key.fileobj)
    if key.fileobj is status:
        status.close()
        os.waitpid(child, 0)
        return
    os.close(key.fd)
    found = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert found is not None
    code = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
    with suppress(OSError):
        status.send(f"{child} {code}".encode())
    waiting.register(status, selectors.EVENT_READ, key.data)


def _begun(path: Path, told: int, errors: int, status: int) -> dict[str, Any]:
    """A fork becomes what a fresh program would be; its order."""
    os.setsid()
    for handle, number in ((told, 1), (errors, 2)):
        os.dup2(handle, number)
        os.close(handle)
    order: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    _mark(f"{BEACON}={order['environment'][BEACON]}")
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["here"])
    tempfile.tempdir = None  # it is asked for again
    import numpy as np

    np.random.seed()
    return {**order, "status": status}


def _mark(mark: str) -> None:
    """Write a worker's mark where the system shows its environment, into the room that the server was started with.

    Whatever it forks is known by that, as what a fresh program forks.
    """
    fields = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    start, end = int(fields[47]), int(fields[48])
    room, text = f"{BEACON}={' ' * ROOM}".encode(), os.fsencode(mark)
    place = ctypes.string_at(start, end - start).find(room)
    if place >= 0 and len(text) <= len(room):
        ctypes.memmove(start + place, text.ljust(len(room), b"\0"), len(room))


def _resident_files() -> list[tuple[int, int]]:
    """Start and length of what is resident of mapped files. A fork begins without them and would be charged for them.

    It has them as soon as it has looked at them (`_touch`).
    """
    import numpy as np

    found: list[tuple[int, int]] = []
    with open("/proc/self/pagemap", "rb", buffering=0) as pages:
        for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
            span, rights, _, _, inode, *_ = line.split()
            if inode == "0" or not rights.startswith("r"):
                continue
            start, end = (int(text, 16) for text in span.split("-"))
            pages.seek(start // PAGE * 8)
            there = np.frombuffer(pages.read((end - start) // PAGE * 8), np.uint64) >> np.uint64(63)
            edges = np.flatnonzero(np.diff(there.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
            found += [(start + int(first) * PAGE, int(last - first) * PAGE) for first, last in edges]
    return found


def _touch(spans: Sequence[tuple[int, int]]) -> None:
    system = ctypes.CDLL(None)
    for start, length in spans:
        if system.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), POPULATE_READ):
            for place in range(start, start + length, PAGE):
                ctypes.string_at(place, 1)


def _fork_warned() -> "warnings.catch_warnings[None]":
    return warnings.catch_warnings(action="ignore", category=DeprecationWarning)  # of threads of libraries


if __name__ == "__main__":
    raise SystemExit(main())
