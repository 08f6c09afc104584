"""What the operating system itself refuses a worker: bytes of its own, and of its whole group.

Two fences stand side by side. `DataLimit` is set by the worker on itself (``RLIMIT_DATA``): what asks for one large
tensor, array or private map is refused when it asks, as an exception, before a byte is touched. `Cgroup` is set from
outside around the worker and whatever it starts (also shared maps and child processes), where this user may make one;
the kernel kills what passes it, and counts that it did. Neither is needed: `memory_bench.running.guard` watches as
well. Loads no torch.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import psutil

from memory_bench.budget import Budget

if sys.platform != "win32":
    import resource

PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
STEP = 2**19  # bytes; a smaller change is not worth a call
STILL = 2**21  # bytes by which a group may grow while it is looked at; else what was counted is of two moments
ABOVE = 1.01  # of what is allowed, where the kernel kills: less than this is left to the worker's own check at a step
MOUNT = Path("/sys/fs/cgroup")
PREFIX = "memory-bench-"  # of a cgroup's name; the process that made it and a number follow
_numbers = count()


@dataclass(frozen=True, slots=True)
class Names:
    """What one version of cgroups calls its files."""

    limit: str
    swap: str  # of version 1 it counts memory too, and cannot be less than its limit: left alone
    events: str
    held: tuple[str, str, str]  # entries of memory.stat: of no file, shared, mapped (shared ones among them)


V1 = Names(
    "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.oom_control", ("rss", "shmem", "mapped_file")
)
V2 = Names("memory.max", "memory.swap.max", "memory.events", ("anon", "shmem", "file_mapped"))


@dataclass(frozen=True, slots=True)
class Bound:
    """The limit on memory that is passed first: its name, its bytes, and how many are `left` to a process."""

    name: str
    limit: int
    left: int


def next_limit(budget: Budget, device: str, held: int) -> Bound | None:
    """Of a process that held `held` bytes when its meter started; None: main memory has no limit.

    On a CPU ``device_bytes`` is main memory too.
    """
    found: list[Bound] = []
    if device == "cpu" and budget.device_bytes is not None:
        found.append(Bound("device_bytes", budget.device_bytes, budget.device_bytes))
    if budget.host_bytes is not None:
        found.append(Bound("host_bytes", budget.host_bytes, max(0, budget.host_bytes - held)))
    return min(found, key=lambda bound: bound.left, default=None)


class Cgroup:
    """A memory cgroup around one worker; made by `make`, gone with `remove`."""

    def __init__(self, folder: Path, names: Names) -> None:
        self.folder, self.names = folder, names
        self._limit = 0

    @classmethod
    def make(cls, pid: int) -> "Cgroup | None":
        """A new one with the process `pid` in it; None where this user cannot make one."""
        for base, names in _bases():
            _sweep(base)
            folder = base / f"{PREFIX}{os.getpid()}-{next(_numbers)}"
            try:
                folder.mkdir()
            except OSError:
                continue
            made = cls(folder, names)
            try:
                if (folder / names.limit).exists():
                    (folder / "cgroup.procs").write_text(str(pid), encoding="ascii")
                    return made
            except OSError:
                pass
            made.remove()
        return None

    def charged(self) -> int:
        """Bytes that the kernel counts for the group now, without its cache of files that nobody has mapped."""
        stat = self._entries("memory.stat")
        anonymous, shared, mapped = (stat.get(name, 0) for name in self.names.held)
        return anonymous + max(shared, mapped)

    def bound(self, limit: int) -> None:
        """From now on the kernel kills what takes the group above `limit` bytes of what it counts.

        To be said again at every look: pages that a fork copies when it writes, and libraries' pages, move between
        what is charged to this group and what is not, and are no memory of the model's.
        """
        if abs(limit - self._limit) < STEP:
            return
        self._limit = limit
        with contextlib.suppress(OSError):  # too much is held already: the watcher ends it
            (self.folder / self.names.limit).write_text(str(limit), encoding="ascii")
        if self.names is V2:
            with contextlib.suppress(OSError):  # not there without swap
                (self.folder / self.names.swap).write_text("0", encoding="ascii")

    def free(self) -> None:
        """No limit any more: what comes now is not charged."""
        self._limit = 0
        with contextlib.suppress(OSError):
            (self.folder / self.names.limit).write_text("max" if self.names is V2 else "-1", encoding="ascii")

    def killed(self) -> int:
        """How many processes of the group the kernel has killed for their memory."""
        return self._entries(self.names.events).get("oom_kill", 0)

    def pids(self) -> set[int]:
        """The processes in it, those of other sessions too."""
        try:
            return {int(line) for line in (self.folder / "cgroup.procs").read_text(encoding="ascii").split()}
        except (OSError, ValueError):
            return set()

    def remove(self) -> None:
        """Take it away; its processes have ended, or are ending."""
        for _ in range(100):
            try:
                self.folder.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:  # the last process is not reaped yet
                time.sleep(0.01)

    def _entries(self, name: str) -> Mapping[str, int]:
        try:
            lines = (self.folder / name).read_text(encoding="ascii").splitlines()
            return {key: int(value) for key, value in (line.split() for line in lines)}
        except (OSError, ValueError):
            return {}


def _sweep(base: Path) -> None:
    """Take away what runs that were killed have left; a group with processes stays, for the system refuses that."""
    for folder in base.glob(f"{PREFIX}*"):
        maker = folder.name.removeprefix(PREFIX).partition("-")[0]
        if maker.isdigit() and not psutil.pid_exists(int(maker)):
            with contextlib.suppress(OSError):
                folder.rmdir()


def _bases() -> list[tuple[Path, Names]]:
    """Folders in which this user may perhaps make a memory cgroup."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    found: list[tuple[Path, Names]] = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if "memory" in controllers.split(","):
            found += [(MOUNT / "memory" / path.lstrip("/"), V1), (MOUNT / "memory", V1)]
        elif not controllers:  # a group with processes passes no controller on: a neighbour of it may have one
            own = MOUNT / path.lstrip("/")
            found += [(own, V2), (own.parent, V2)] if path != "/" else [(own, V2)]
    return [(folder, names) for folder, names in found if folder.is_dir()]


class DataLimit:
    """``RLIMIT_DATA`` of this process, above what it has; `lift` takes it away again.

    It counts private writable memory when it is reserved, and an allocator reserves more than is touched: up to 8 % (11
    of 143 MB) in trainings of `tiny`. `slack` is let pass for that; what is touched of it the other fences see.
    """

    def __init__(self, allowed: int) -> None:
        self._before: tuple[int, int] | None = None
        if (held := _data_bytes()) is None:
            return
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = held + int(allowed) + slack(allowed)
        if hard != resource.RLIM_INFINITY and limit > hard:
            return  # the user's own is tighter
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
            self._before = (soft, hard)

    @property
    def stands(self) -> bool:
        """Whether the system took it."""
        return self._before is not None

    def lift(self) -> None:
        """Back to what was before."""
        if self._before is not None:
            resource.setrlimit(resource.RLIMIT_DATA, self._before)
            self._before = None


class FileLimit:
    """``RLIMIT_FSIZE`` of this process and its children: no file of theirs grows beyond what main memory may hold.

    One large write is over before anybody could look. `lift` takes it away again.
    """

    def __init__(self, allowed: int) -> None:
        self._before: tuple[int, int] | None = None
        if sys.platform == "win32":
            return
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if soft != resource.RLIM_INFINITY and soft <= allowed:
            return  # the user's own is tighter
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_FSIZE, (max(1, int(allowed)), hard))
            self._before = (soft, hard)

    def lift(self) -> None:
        """Back to what was before."""
        if self._before is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, self._before)
            self._before = None

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Inside, files are the harness's, which what main memory may hold does not bound."""
        before, now = self._before, resource.getrlimit(resource.RLIMIT_FSIZE) if self._before is not None else None
        self.lift()
        try:
            yield
        finally:
            if now is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, now)
                self._before = before


def slack(allowed: int) -> int:
    """Bytes that may be reserved beyond what is `allowed` to be touched."""
    return 16 * 2**20 + allowed // 20


def free_child(pid: int) -> None:
    """A child does not inherit its parent's `DataLimit`: it would be refused what nobody is told of.

    What it takes counts for the group.
    """
    if hasattr(resource, "prlimit"):
        with contextlib.suppress(OSError, ValueError):
            _, hard = resource.prlimit(pid, resource.RLIMIT_DATA)
            resource.prlimit(pid, resource.RLIMIT_DATA, (hard, hard))


def _data_bytes() -> int | None:
    """Private writable memory of this process as ``RLIMIT_DATA`` counts it; None where the system does not say."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData:"))
    except (OSError, StopIteration):
        return None
