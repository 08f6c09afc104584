"""Which cells of a run are this process's: several commands may work on one folder, and none does another's work.

A cell is locked from before it starts until its result is there; whoever comes later takes that result. Loads no torch.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from filelock import FileLock, Timeout

from memory_bench.errors import UserError
from memory_bench.record import Record
from memory_bench.store import Store


class Claims:
    """The claims of one run; for use in ``with``.

    Args:
        jobs: of the run; a record that a job knows nothing of (`Job.before`) was made meanwhile.

    Attributes:
        elsewhere: keys of cells that another process was at when they were last asked for.
    """

    def __init__(self, jobs: Sequence[Any]) -> None:
        self.elsewhere: set[str] = set()
        self._before = {job.cell.key: self._known(job) for job in jobs}
        self._locks: dict[str, FileLock | None] = {}

    @staticmethod
    def _known(job: Any) -> str:
        return Store(job.out).stamp(job.cell.key) if job.before is None else str(job.before)

    def before(self, job: Any) -> str:
        """The stamp of the record that was there before, which is none of this run's; empty: there was none."""
        return self._before[job.cell.key]

    def take(self, job: Any) -> bool:
        """Claim a cell; False: another process is at it."""
        key = job.cell.key
        if key in self._locks:
            return True
        try:
            lock: FileLock | None = Store(job.out).lock(key)
            assert lock is not None
            lock.acquire(timeout=0)
        except Timeout:
            self.elsewhere.add(key)
            return False
        except (OSError, NotImplementedError, UserError):  # of a file system without locks, or full: the cell will tell
            lock = None
        self.elsewhere.discard(key)
        self._locks[key] = lock
        return True

    def made(self, job: Any) -> Record | None:
        """The record of a claimed cell that another process has made since the run was planned."""
        store = Store(job.out)
        if store.stamp(job.cell.key) in ("", self.before(job)):
            return None
        return store.record(job.cell.key)

    def give(self, key: str) -> None:
        """Give a cell back: its result is there, or it will have none."""
        if (lock := self._locks.pop(key, None)) is not None:
            with suppress(OSError):
                lock.release()

    def close(self) -> None:
        """Give all back."""
        for key in list(self._locks):
            self.give(key)

    def __enter__(self) -> "Claims":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
