"""Watches a worker from outside, more than ten times a second, and ends it where a limit of its budget is passed.

A worker stops itself between two steps (`memory_bench.driver.meter`) and keeps what it has observed. This is for what
does not come back to it: a step that hangs or asks for far too much, a child process, a state on disk. So a little
more is let pass here: of memory `ABOVE` times as much, and less than that for a second; of time `LATE`.

What counts as memory: what the worker has resident (``VmRSS``) and what its children have for themselves (what they
share with it counts once), above what it held when its meter started; against ``host_bytes`` the whole of it, and the
files it keeps (`memory_bench.running.stored`). Loads no torch.
"""

import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from memory_bench.budget import Budget, BudgetExceeded, Usage
from memory_bench.driver.beacon import Place
from memory_bench.driver.clock import Clock, Lent
from memory_bench.running.fence import ABOVE as FENCE
from memory_bench.running.fence import STILL, Bound, free_child, next_limit
from memory_bench.running.held import children_bytes, resident_bytes
from memory_bench.running.processes import Worker
from memory_bench.running.refusals import oom_kills
from memory_bench.running.stored import Files

PERIOD = 0.02  # seconds between two looks
EVERY = 2  # looks between two searches for children, which cost more
FILES = 6  # looks between two searches for mapped files, which cost more than those for open ones
ABOVE = 1.02  # of a limit on memory, where it ends the worker at once
GRACE = 1.0  # seconds in which the worker may notice itself that it is a little above its memory
LATE = 1.12  # of a phase's seconds, until which the worker may notice itself


@dataclass(frozen=True, slots=True)
class Bounds:
    """What is watched of a cell.

    Attributes:
        budget: its limits.
        device: where it runs; of ``device_bytes`` the CPU's are watched from here, a GPU's by its allocator.
        deadline: seconds of the cell's clock, start-up included.
        beside: folders whose files are not the model's: results, the cache.
    """

    budget: Budget
    device: str
    deadline: float
    beside: tuple[Path, ...] = ()

    @property
    def device_bytes(self) -> int | None:
        """The limit on device memory, where it is main memory."""
        return self.budget.device_bytes if self.device == "cpu" else None


class Guard:
    """Watches one worker in a thread of its own; for use in ``with``.

    Attributes:
        verdict: the limit that was passed; None: none was seen to be.
        usage: what was seen from outside: peaks, seconds.
        others: something besides the worker's own memory counted: children, files.
        children: the worker was seen to have some.
        looks: how often it has looked.
        oom_kills: of the system, when it began.
    """

    def __init__(self, worker: Worker, bounds: Bounds) -> None:
        self.worker, self.bounds = worker, bounds
        self.verdict: BudgetExceeded | None = None
        self.usage = Usage()
        self.others, self.children = False, False
        self.looks = 0
        self.oom_kills = oom_kills()
        self._clock = Clock(worker.pid, wall=bounds.device != "cpu")
        self._lent = Lent(worker.pid)
        self._place = Place()
        self._over_since: float | None = None
        self._bound: Bound | None = None
        self._freed = False
        self._children: set[int] = set()
        self._files = Files(worker, bounds.beside)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="guard")

    def __enter__(self) -> "Guard":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def judged(self) -> BudgetExceeded | None:
        """The verdict after the worker's end: also that of the kernel, which kills without asking."""
        if self.verdict is None and (cgroup := self.worker.cgroup) is not None and cgroup.killed():
            self.condemn_memory()
        return self.verdict

    def _watch(self) -> None:
        while not self._ended.wait(PERIOD):
            try:
                if self.worker.process.poll() is not None:
                    self.worker.kill()  # what it left behind holds its pipes open
                    return
                self._look()
            except (psutil.Error, OSError):  # it has just ended
                continue
            if self.judged() is not None:
                self.worker.kill()
                return

    def _look(self) -> None:
        told = self._place = self.worker.beacon.read() or self._place
        if told.held and self._bound is None:
            self._bound = next_limit(self.bounds.budget, self.bounds.device, told.held)
        charged = 0 if self.worker.cgroup is None else self.worker.cgroup.charged()
        if self.looks % EVERY == 0 or self.worker.cgroup is not None:
            self._children = self.worker.members() - {self.worker.pid}
            self.children |= bool(self._children)
            for child in self._children:
                free_child(child)
        self._files.find(self._children, begun=bool(told.held), maps=self.looks % FILES == 0)
        self._files.measure()
        self.looks += 1
        self._check_memory(told, charged)
        if told.held:
            self.worker.beacon.acknowledge()
        self._check_seconds(told)

    def _check_memory(self, place: Place, charged: int) -> None:
        cgroup = self.worker.cgroup
        if place.phase == "end" and cgroup is not None and not self._freed:
            cgroup.free()
            self._freed = True
        if not place.held or place.phase == "end":
            return
        resident, of_files = resident_bytes(self.worker.pid)
        if not self._files.base:
            self._files.base = max(1, of_files)
        children, shared = children_bytes(self.worker.pid, resident, self._children)
        stored = self._files.bytes
        mapped = min(stored, max(0, of_files - self._files.base) + shared)  # resident pages of files that count already
        self.others |= bool(children or stored)
        device, host = max(0, resident + children - place.held), resident + children + stored - mapped
        usage = self.usage
        usage.peak_host_bytes = max(usage.peak_host_bytes, host)
        if self.bounds.device == "cpu":
            usage.peak_device_bytes = max(usage.peak_device_bytes, device)
        asked = (
            ("device_bytes", self.bounds.device_bytes, device),
            ("host_bytes", self.bounds.budget.host_bytes, host),
        )
        bounds = [(name, limit, used) for name, limit, used in asked if limit is not None]
        if bounds and cgroup is not None and abs(cgroup.charged() - charged) < STILL:
            cgroup.bound(charged + max(0, min(int(FENCE * limit) - used for _, limit, used in bounds)))
        above = [(name, limit, used) for name, limit, used in bounds if used > limit]
        if not above:
            self._over_since = None
            return
        self._over_since = self._over_since or time.monotonic()
        own = not (children or stored)  # the worker's own check cannot see others
        for name, limit, used in above:
            if used > ABOVE * limit or not own or time.monotonic() - self._over_since > GRACE:
                self._condemn(name, limit, used)
                return

    def _check_seconds(self, place: Place) -> None:
        lent = self._lent.look(place.phase, self._children)
        if bound := self.bounds.budget.seconds(place.phase):
            name, limit = bound
            spent = self._clock.since(place.began, lent)
            if hasattr(self.usage, name):
                setattr(self.usage, name, spent)
            if limit and spent > LATE * limit:  # 0: there is no such phase
                self._condemn(name, limit, spent)
        if place.phase != "end" and (now := self._clock.now()) > self.bounds.deadline:
            self._condemn("wall_seconds", self.bounds.deadline, now)

    def condemn_memory(self) -> None:
        """The system refused memory to the worker, or to a child of it: that is the limit that was next."""
        if (bound := self._bound) is None:
            self._condemn("host_bytes", None, None)
            return
        seen = self.usage.peak_device_bytes if bound.name == "device_bytes" else self.usage.peak_host_bytes
        self._condemn(bound.name, bound.limit, seen if seen > bound.limit else None)

    def _condemn(self, limit: str, allowed: float | None, used: float | None) -> None:
        place = self.worker.beacon.read() or self._place
        if self.verdict is None:
            self.verdict = BudgetExceeded(limit, allowed, used, place.where)
