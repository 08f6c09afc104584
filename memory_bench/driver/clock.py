"""Seconds of a cell: those that its process computes or idles, and not those in which others had the processor.

Of a CPU the larger counts of (a) the seconds that all threads computed and (b) the seconds that passed, less those that
the main thread was ready and waited for a core. So a sleeping or hanging step costs what it takes, two threads cost
two, and what else the machine is busy with costs nothing. Where the system does not say how long a thread waited, (b)
counts all seconds that passed. Of a GPU the seconds that pass count. Loads no torch.
"""

import os
import time
from pathlib import Path

import psutil

NANO = 1e-9


def waited(pid: int) -> float:
    """Seconds that the main thread of `pid` was ready to run and had no core; 0 where the system does not say."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()[1]) * NANO
    except (OSError, IndexError, ValueError):
        return 0.0


class Clock:
    """The clock of one process; `now` grows from 0.

    Args:
        pid: of the process; default: this one.
        wall: every second that passes counts (a GPU's process).
    """

    def __init__(self, pid: int | None = None, *, wall: bool = False) -> None:
        self.pid, self.wall = os.getpid() if pid is None else pid, wall
        self._process = psutil.Process(self.pid)
        self._computed, self._idle = 0.0, 0.0
        self._computed, self._idle = self._computing(), self._passing()

    def _computing(self) -> float:
        if self.pid == os.getpid():
            return time.process_time()
        times = self._process.cpu_times()
        return float(times.user + times.system)

    def _passing(self) -> float:
        return time.monotonic() - (0.0 if self.wall else waited(self.pid))

    def now(self) -> float:
        """Seconds of this process since the clock was made."""
        passed = self._passing() - self._idle
        return passed if self.wall else max(self._computing() - self._computed, passed)
