"""The one way in which a worker process is started: a fresh program, a fork server's fork, or a fork of this process.

A worker has a session of its own, so that it can be ended with all that it started; a beacon in which it says where it
is; a private folder for temporary files, whose size its watcher knows; and a memory cgroup where one can be made.
Loads no torch.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol, Self

import psutil

from memory_bench.driver.beacon import Beacon
from memory_bench.running.fence import Cgroup

# -P: the current folder is not searched, for a checkout there has no memory_bench.hmt, baselines or tasks.
WORKER = (sys.executable, "-P", "-m", "memory_bench.running.entry")
BEACON = "MEMORY_BENCH_BEACON"  # names a worker's beacon to it, and marks whatever it starts
PARENT = "MEMORY_BENCH_PARENT"  # names to a worker the process that started it, without which it ends
Work = Sequence[str] | Callable[[IO[str]], int]


class Process(Protocol):
    """What this file needs of `subprocess.Popen`."""

    pid: int
    stdout: IO[str] | None

    def poll(self) -> int | None:
        """Exit code, or None."""

    def wait(self, timeout: float | None = None) -> int:
        """Exit code, negative for a signal."""


class Server(Protocol):
    """What this file needs of `memory_bench.running.forkserver.ForkServer`."""

    def begin(self, command: Sequence[str], errors: IO[str], own: Mapping[str, str]) -> Process | None:
        """A worker that runs `command`, with `own` in its environment; None: start a fresh program."""


class Worker:
    """A started worker.

    Attributes:
        process: the process itself.
        beacon: where it says where it is.
        folder: its own; ``temporary`` in it is its folder for temporary files.
        log: what it says on standard error.
        cgroup: around it; None where none can be made.
        trouble: of the machine, that it has told of; empty: none.
    """

    def __init__(self, process: Process, folder: Path, log: Path, cgroup: Cgroup | None) -> None:
        self.process, self.folder, self.log, self.cgroup = process, folder, log, cgroup
        self.beacon = Beacon(folder / "beacon")
        self.trouble = ""
        self._known: dict[int, float] = {}
        self._gone = False
        self._lock = threading.Lock()

    @property
    def pid(self) -> int:
        """Of the worker; also of its session."""
        return self.process.pid

    @property
    def temporary(self) -> Path:
        """Its folder for temporary files."""
        return self.folder / "temporary"

    def members(self) -> set[int]:
        """The worker and what it started, in whatever session, as far as they live."""
        if self.cgroup is not None and (found := self.cgroup.pids()):
            return found
        with self._lock:
            found = descendants(self.pid, self._known)
            for pid in found - self._known.keys():
                with suppress(psutil.Error):
                    self._known[pid] = psutil.Process(pid).create_time()
            return found

    def kill(self) -> None:
        """End it with all that it started; what it starts meanwhile is ended as well."""
        if self._gone:
            return
        for _ in range(50):
            living = self.members() | {self.pid}
            if living == {self.pid} and self.process.poll() is not None:
                break
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            for pid in living:
                if pid != self.pid or self.process.poll() is None:
                    with suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signal.SIGKILL)
            if not {pid for pid in self.members() - {self.pid} if _lives(pid)}:
                break
        else:
            end_marked(self.folder / "beacon")
            return
        # Where nothing is left that could start something, nothing will be: looking costs a pass over all processes.
        self._gone = not end_marked(self.folder / "beacon") and self.process.poll() is not None

    def said(self) -> list[str]:
        """The lines on its standard error."""
        return self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, negative for a signal."""
        return self.process.wait(timeout)

    def close(self) -> None:
        """End what is left of it, and take its folder and cgroup away."""
        self.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        if self.cgroup is not None:
            self.cgroup.remove()
        self.beacon.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start(work: Work, *, log: Path | None = None, inside: Path | None = None, server: Server | None = None) -> Worker:
    """Start a worker.

    Args:
        work: a command, or a function that a fork of this process runs: it is given the stream on which it tells of
            its progress, and returns an exit code.
        log: where its standard error goes; default: a file in its folder.
        inside: the folder in which its own is made; default: that for temporary files.
        server: begins a command where it can; None: a fresh program does.
    """
    folder = Path(tempfile.mkdtemp(prefix="worker-", dir=inside)).resolve()
    (folder / "temporary").mkdir()
    Beacon(folder / "beacon").close()
    own = {BEACON: str(folder / "beacon"), PARENT: str(os.getpid()), "TMPDIR": str(folder / "temporary")}
    log = log or folder / "log.txt"
    process: Process | None
    with log.open("w", encoding="utf-8") as errors:
        if callable(work):
            process = _Fork(work, errors, own)
        elif server is None or (process := server.begin(work, errors, own)) is None:
            process = subprocess.Popen(
                list(work), stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace", start_new_session=True,
                env={**os.environ, **own},
            )  # fmt: skip
    return Worker(process, folder, log, Cgroup.make(process.pid))


def end_marked(beacon: Path) -> int:
    """End what the marks in their environments show to be of a worker: nobody's children, in new sessions; how many."""
    mark, found = f"{BEACON}={beacon}".encode(), 0
    for pid in _pids():
        with suppress(OSError):
            if pid != os.getpid() and mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                os.kill(pid, signal.SIGKILL)
                found += 1
    return found


def own_beacon() -> Beacon | None:
    """Of the worker that this process is; None: it is none."""
    path = os.environ.get(BEACON)
    return Beacon(Path(path)) if path else None


class _Fork:
    """A child that goes on from here, with what is loaded and patched."""

    def __init__(self, work: Callable[[IO[str]], int], errors: IO[str], own: Mapping[str, str]) -> None:
        reading, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the child computes in one of its own
            self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            _run_and_leave(work, writing, errors.fileno(), own)
        os.close(writing)
        self.stdout: IO[str] | None = os.fdopen(reading, encoding="utf-8", errors="replace")
        self._code: int | None = None
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """See `Process`."""
        return self._reap(os.WNOHANG)

    def wait(self, timeout: float | None = None) -> int:
        """See `Process`."""
        if timeout is not None:
            psutil.wait_procs([psutil.Process(self.pid)] if self._code is None else [], timeout)
        while (code := self._reap(os.WNOHANG)) is None:
            threading.Event().wait(0.01)
        return code

    def _reap(self, options: int) -> int | None:
        with self._lock:
            if self._code is None:
                pid, status = os.waitpid(self.pid, options)
                if pid:
                    self._code = os.waitstatus_to_exitcode(status)
            return self._code


def _run_and_leave(work: Callable[[IO[str]], int], writing: int, errors: int, own: Mapping[str, str]) -> None:
    """The whole life of a forked child."""
    code = 1
    try:
        os.setsid()
        os.dup2(errors, 2)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="replace", closefd=False)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ.update({**own, "TOKENIZERS_PARALLELISM": "false"})
        tempfile.tempdir = None  # it is asked for again
        with os.fdopen(writing, "w", encoding="utf-8") as told:
            code = work(told)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # nothing of this process may go on in its child
        traceback.print_exc()
    finally:
        os._exit(code)


def _pids() -> list[int]:
    try:
        return [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()]
    except OSError:
        return []


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def descendants(root: int, known: Mapping[int, float]) -> set[int]:
    """`root`, its session, its descendants and those of processes `known` (pid to when it began), as far as they live.

    One that is nobody's child any more is known from before.
    """
    parents: dict[int, int] = {}
    found = {root}
    for pid in _pids():
        with suppress(OSError, ValueError, IndexError):
            text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
            fields = text.rpartition(")")[2].split()
            parents[pid] = int(fields[1])
            if int(fields[3]) == root:
                found.add(pid)
    if not parents:  # no /proc
        with suppress(psutil.Error):
            found |= {child.pid for child in psutil.Process(root).children(recursive=True)}
        return found
    for pid, began in known.items():
        with suppress(psutil.Error):
            if pid in parents and psutil.Process(pid).create_time() == began:
                found.add(pid)
    grown = True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in found and pid not in found}
        found |= more
        grown = bool(more)
    return {pid for pid in found if pid in parents}
