"""Seconds of a cell: those that its process computes or idles, and not those in which others had the processor.

Of a CPU the larger counts of (a) the seconds that all threads computed and (b) the seconds that passed, less those that
the main thread was ready and waited for a core. What child processes compute is added by whoever watches from outside
(`Lent`). So a sleeping or hanging step costs what it takes, two threads cost
two, and what else the machine is busy with costs nothing. Where the system does not say how long a thread waited, (b)
counts all seconds that passed. Of a GPU the seconds that pass count. Loads no torch.

Both counts are the system's own, so a process and its watcher read the same: what one told of its clock (`Reading`),
the other can count from. The larger is taken of what both grew by since a reading, never of the counts themselves: a
phase that computed on many threads leaves no seconds in which a later one could idle for nothing.
"""

import os
import time
from collections.abc import Collection
from typing import NamedTuple

import psutil

NANO = 1e-9


class Reading(NamedTuple):
    """What the clock showed: seconds computed since the process began, and seconds that passed since the machine did.

    Seconds in which the process waited for a core are left out of the latter.
    """

    computed: float = 0.0
    passed: float = 0.0

    def before(self, seconds: float) -> "Reading":
        """The reading `seconds` earlier, as if the process had computed all the time."""
        return Reading(self.computed - seconds, self.passed - seconds)


def waited(pid: int) -> float:
    """Seconds that the main thread of `pid` was ready to run and had no core; 0 where the system does not say."""
    try:
        file = os.open(f"/proc/{pid}/schedstat", os.O_RDONLY)  # read at every step: a `Path` takes five times as long
        try:
            return int(os.read(file, 100).split()[1]) * NANO
        finally:
            os.close(file)
    except (OSError, IndexError, ValueError):
        return 0.0


class Clock:
    """The clock of one process.

    Args:
        pid: of the process; default: this one.
        wall: every second that passes counts (a GPU's process).
    """

    def __init__(self, pid: int | None = None, *, wall: bool = False) -> None:
        self.pid, self.wall = os.getpid() if pid is None else pid, wall
        self._process = psutil.Process(self.pid)
        self._made = self.reading()

    def reading(self) -> Reading:
        """What the clock shows."""
        return Reading(self._computing(), time.monotonic() - (0.0 if self.wall else waited(self.pid)))

    def between(self, first: Reading, last: Reading, lent: float = 0.0) -> float:
        """Seconds of this process between two readings, `lent` of them computed by its children."""
        passed = last.passed - first.passed
        return max(0.0, passed if self.wall else max(last.computed - first.computed + lent, passed))

    def since(self, first: Reading, lent: float = 0.0) -> float:
        """Seconds of this process from `first` on (see `between`)."""
        return self.between(first, self.reading(), lent)

    def now(self) -> float:
        """Seconds of this process since the clock was made."""
        return self.since(self._made)

    def _computing(self) -> float:
        if self.pid == os.getpid():
            return time.process_time()
        times = self._process.cpu_times()
        return float(times.user + times.system)


class Lent:
    """Seconds that the children of a process computed, living ones and those that have ended, by phase.

    Args:
        pid: of the process.
    """

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._phase, self._began = "", 0.0
        self._spent: dict[str, float] = {}

    def look(self, phase: str, children: Collection[int]) -> float:
        """Seconds of `phase`, which is now, with these `children` alive."""
        total = _of_children(self._process) + sum(map(_of_child, children))
        if phase != self._phase:
            self._spent[self._phase] = self._spent.get(self._phase, 0.0) + total - self._began
            self._phase, self._began = phase, total
        return max(0.0, self._spent.get(phase, 0.0) + total - self._began)


def _of_children(process: psutil.Process) -> float:
    """Of those that have ended."""
    times = process.cpu_times()
    return float(getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0))


def _of_child(pid: int) -> float:
    try:
        times = (process := psutil.Process(pid)).cpu_times()
        return float(times.user + times.system) + _of_children(process)
    except psutil.Error:
        return 0.0
