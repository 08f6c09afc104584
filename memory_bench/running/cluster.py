"""What executors on other machines share: what a cell is given there, and how it is followed to its end.

A node runs the same worker process as `local` does, under the same watcher (`memory_bench.running.node`), and writes
into the run's folder; only sentences come back by another way. A node that is lost, or a task that is taken away, is no
result: the engine runs the task again, and a cell that could not be finished stays to be done. Loads no torch.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any

from memory_bench.errors import UserError
from memory_bench.running import node
from memory_bench.running.apart import Event, lost
from memory_bench.running.executors import Local

if TYPE_CHECKING:
    from memory_bench.record import Record

AT_ONCE = 1000  # cells that are handed in and not done
VISIBLE = 60.0  # seconds until a file that was written on one machine must be seen on another
CPUS_BESIDE_GPU = 4
PROCESS_BYTES = 1_500_000_000  # a process with its libraries, beside what the cell is charged with
CELL_BYTES = 4_000_000_000  # of a cell whose peak nobody has predicted or limited; beside a GPU of any
ABOVE = 1.25  # times what was predicted
UNKNOWN_MINUTES = 8 * 60  # of a cell whose seconds nobody has predicted or limited, and of a backbone
MINUTES = 15  # rounded to, so that alike cells have equal needs
Task = Any  # of an engine; may be a key


@dataclass(frozen=True, slots=True)
class Needs:
    """What a cell is given by a scheduler; cells with equal needs can be handed in as one array.

    Attributes:
        cpus: cores, of all processes of a cell.
        gpus: graphics processors, one for each of them.
        memory: bytes of main memory, whole gigabytes.
        minutes: until the scheduler takes it for lost.
    """

    cpus: int
    gpus: int
    memory: int
    minutes: int


def needs(job: Any, *, prepare: bool = False) -> Needs:
    """From a job's prediction where it has one, else from its limits, else by default; with `prepare`, its backbone's.

    Memory is that of the worker: what it is charged with and the process itself, never more than its limits allow.
    """
    processes = 1 if prepare else job.cell.training.processes
    gpus = processes * int(str(job.device).startswith("cuda"))
    cpus = processes * max(1, min(job.threads, CPUS_BESIDE_GPU) if gpus else job.threads)
    minutes = UNKNOWN_MINUTES if prepare else _minutes(job)
    memory = _memory(job, gpus, prepare) + (processes - 1) * PROCESS_BYTES
    return Needs(cpus, gpus, -(-memory // 10**9) * 10**9, -(-minutes // MINUTES) * MINUTES)


def _memory(job: Any, gpus: int, prepare: bool) -> int:
    budget, predicted = job.cell.training.budget, job.plan.get("peak_bytes")
    charged = None if gpus or prepare or predicted is None else int(ABOVE * predicted)
    if charged is None and not gpus and not prepare:
        charged = budget.device_bytes
    asked = PROCESS_BYTES + (CELL_BYTES if charged is None else charged)
    return asked if budget.host_bytes is None or prepare else min(asked, int(budget.host_bytes))


def _minutes(job: Any) -> int:
    """Three times what was predicted here: a node may be slower; else twice the limits, and an hour."""
    budget, predicted = job.cell.training.budget, job.plan.get("seconds")
    if predicted is not None:
        return int(3 * predicted / 60) + MINUTES
    bounds = [budget.seconds(phase) for phase in ("train", "eval", "control")]
    known = [bound[1] for bound in bounds if bound is not None]
    return int(2 * sum(known) / 60) + 60 if len(known) == len(bounds) else UNKNOWN_MINUTES


def absolute(job: Any) -> Any:
    """The job as another machine can run it.

    Its paths mean the same from any folder; its memory is what it is given. It has no deadline: that was foretold by
    this machine's speed.
    """
    wanted = needs(job)
    data = None if job.data is None else job.data.resolve()
    each = wanted.cpus // job.cell.training.processes
    return replace(
        job, out=job.out.resolve(), data=data, cache=job.cache.resolve(), threads=each, deadline=None,
        allotted=wanted.memory,
    )  # fmt: skip


class Cluster(Local):
    """Hands cells to an engine that runs them on machines which share the run's folder.

    An engine has `_submit`, `_ended`, `_cancel`; `_enter` and `_leave` may look at it before and tidy up after.

    Args:
        command: what runs a job file on a node; default: a worker under the node's own Python.
    """

    def __init__(self, command: Sequence[str] = ()) -> None:
        super().__init__(AT_ONCE, command=command)
        self._wanted: dict[str, Any] = {}
        self._tasks: dict[Task, tuple[Any, bool]] = {}  # job, and whether only its backbone is prepared
        self._lock, self._handing = threading.Lock(), threading.Lock()
        self._follower: threading.Thread | None = None

    def _enter(self, jobs: Sequence[Any]) -> None:
        """Raise `UserError` where it is plain that `jobs` cannot run."""

    def _submit(self, calls: Sequence["node.Call"], wanted: Needs) -> list[Task]:
        """Hand in calls of equal needs; a task for each."""
        raise NotImplementedError

    def _ended(self, tasks: Sequence[Task]) -> dict[Task, dict[str, str]]:
        """What came (see `outcome`) of the tasks that have ended; it may take a second until some have."""
        raise NotImplementedError

    def _cancel(self, tasks: Sequence[Task]) -> None:
        """End tasks with all that they started."""
        raise NotImplementedError

    def _leave(self) -> None:
        """Tidy up after a run; called more than once."""

    def run(self, jobs: Sequence[Any]) -> Generator[Event, None, None]:
        """See `Executor.run`."""
        try:
            if jobs:
                self._wanted = node.wanted(jobs)
                self._enter(jobs)
            yield from super().run([absolute(job) for job in jobs])
        finally:
            self._leave()

    def _prepare(self, job: Any, folder: Path, events: "Queue[Event | UserError]") -> None:
        """See `Local._prepare`."""
        self._hand_in([job], events, prepare=True)

    def _begin(self, jobs: Sequence[Any], folder: Path, events: "Queue[Event | UserError]") -> None:
        """See `Local._begin`; in a thread, so that no interruption can part a task from what is known of it."""
        self._start(self._hand_in, jobs, events)

    def _hand_in(self, jobs: Iterable[Any], events: "Queue[Event | UserError]", *, prepare: bool = False) -> None:
        groups: dict[Needs, list[Any]] = defaultdict(list)
        for job in jobs:
            groups[needs(job, prepare=prepare)].append(job)
        with self._handing:
            for wanted, group in groups.items():
                if self._stopping:
                    return
                try:
                    calls = [node.Call(job.to_json(), self._wanted, prepare, self.command) for job in group]
                    tasks = self._submit(calls, wanted)
                except Exception as error:  # nothing may wait for ever
                    events.put(error if isinstance(error, UserError) else _broken(error))
                    return
                with self._lock:
                    self._tasks |= {task: (job, prepare) for task, job in zip(tasks, group, strict=True)}
            if self._follower is None or not self._follower.is_alive():
                self._follower = threading.Thread(target=self._follow, args=(events,), daemon=True)
                self._follower.start()

    def _follow(self, events: "Queue[Event | UserError]") -> None:
        """All tasks until they have ended, in a thread of its own; what comes of each is looked for in another."""
        while not self._stopping:
            with self._lock:
                tasks = list(self._tasks)
            try:
                ended = self._ended(tasks) if tasks else {}
            except Exception as error:  # nothing may wait for ever
                events.put(_broken(error))
                return
            for task, said in ended.items():
                with self._lock:
                    known = self._tasks.pop(task, None)
                if known is not None:  # else all was stopped meanwhile
                    self._start(_tell, events, *known, said)
            if not tasks:
                time.sleep(0.05)

    def stop(self) -> None:
        """See `Local.stop`: tasks that wait or run are cancelled."""
        self._stopping = True
        with self._handing, self._lock:
            tasks = list(self._tasks)
            self._tasks.clear()
        if tasks:
            self._cancel(tasks)


def _broken(error: Exception) -> UserError:
    return UserError(f"The cluster cannot be asked any more: {type(error).__name__}: {error}")


def _tell(events: "Queue[Event | UserError]", job: Any, prepare: bool, said: dict[str, str]) -> None:
    for sentence in filter(None, said.get("notices", "").split("\n")):
        events.put(Event(job.cell, "notice", notice=sentence))
    events.put(outcome(job, prepare, said))


def outcome(job: Any, prepare: bool, said: dict[str, str]) -> Event | UserError:
    """What came of a task: of a cell the record in the run's folder, as this machine sees it.

    Args:
        job: the cell with its things.
        prepare: only its backbone was prepared.
        said: see `node.Call`; or ``taken``, why the engine gave it up, as the end of a sentence.
    """
    if said.get("refused"):
        return UserError(said["refused"])
    if prepare and said.get("failed"):
        return UserError(said["failed"])
    if prepare:
        trouble = said.get("lost") or said.get("taken")
        return Event(job.cell, "unprepared", notice=trouble) if trouble else Event(job.cell, "prepared")
    done = "lost" not in said and "taken" not in said
    if (record := _record(job, VISIBLE if done else 0.0)) is not None:
        return Event(job.cell, "record", record=record)
    if "lost" in said:
        return Event(job.cell, "lost", notice=said["lost"])
    return lost(job, said.get("taken") or "its node wrote a record, which is not in the run's folder")


def _record(job: Any, patience: float) -> "Record | None":
    """The record that a node wrote since the run was planned; network folders show it after a while."""
    from memory_bench.store import Store

    store, until = Store(job.out), time.monotonic() + patience
    while store.stamp(job.cell.key) in ("", job.before):
        if time.monotonic() >= until:
            return None
        time.sleep(0.5)
        with suppress(OSError):
            list(store.cell_folder(job.cell.key).iterdir())  # a look at the folder makes the system ask again
    return store.record(job.cell.key)
