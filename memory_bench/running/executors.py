"""Runs jobs: `inline` one after the other from this process (tests), `local` a few at a time (default).

Files are the only channel for results; a worker tells of its progress. A crash, a kill by the system, a passed limit
or a hang of one cell is written down as that cell's record and never takes the run down.
"""

import json
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Queue
from tempfile import TemporaryDirectory
from typing import IO, Any, Protocol

from memory_bench.budget import Budget
from memory_bench.cell import Cell
from memory_bench.errors import UserError
from memory_bench.record import Record, now
from memory_bench.running.guard import Bounds, Guard
from memory_bench.running.obituary import obituary, settled
from memory_bench.running.processes import WORKER, Worker, start
from memory_bench.store import Store

SLACK_SECONDS = 3600.0  # of start-up, encoding and what has no limit, where nobody has predicted them


@dataclass(frozen=True, slots=True)
class Event:
    """Something happened to a cell: ``start``, progress (`phase` done of total), a ``notice``, or its `record`."""

    cell: Cell
    phase: str
    done: int = 0
    total: int = 1
    record: Record | None = None
    notice: str = ""


class Executor(Protocol):
    """Runs jobs and tells of them as they go; every job ends with an event that holds its record."""

    def run(self, jobs: Sequence[Any]) -> Generator[Event, None, None]:
        """Run `jobs` (`memory_bench.running.job.Job`)."""
        ...


class Inline:
    """One cell after the other; those without a limit on memory or time in this process, where a debugger sees them.

    A limit can only be kept from outside, so the others run in a fork of this process, with what is loaded and
    patched here, or in a fresh process where a fork could not compute: on a GPU, or with several threads.
    """

    def run(self, jobs: Sequence[Any]) -> Generator[Event, None, None]:
        """See `Executor.run`."""
        yield from _not_enforced(jobs)
        for job in jobs:
            yield Event(job.cell, "start")
            yield from self._here(job) if not _limited(job) else self._watched(job)

    @staticmethod
    def _here(job: Any) -> Generator[Event, None, None]:
        from memory_bench.running.worker import run_cell

        notices: list[str] = []
        record = run_cell(job, lambda phase, done, total: None, notices.append)
        yield from (Event(job.cell, "notice", notice=sentence) for sentence in notices)
        yield Event(job.cell, "record", record=record)

    @staticmethod
    def _watched(job: Any) -> Generator[Event, None, None]:
        store, started = Store(job.out), now()
        store.remove(job.cell.key)
        told: list[Event] = []
        with TemporaryDirectory() as folder:
            command = (*WORKER, str(_job_file(job, Path(folder))))
            forked = partial(_work_in_fork, job)
            log = store.log_path(job.cell.key)
            with start(forked if _forks(job) else command, log=log, inside=Path(folder)) as worker:
                code, guard = _overseen(worker, job, told.append)
                record = settled(job, store, worker, guard, code, started)
        yield from (event for event in told if event.notice)
        yield Event(job.cell, "record", record=record)


def _work_in_fork(job: Any, told: IO[str]) -> int:
    from memory_bench.running.worker import carry_out

    return carry_out(job, told)


def _forks(job: Any) -> bool:
    """Whether a fork of this process can compute a job: one thread of the CPU is all that a fork may safely use."""
    torch = sys.modules.get("torch")
    usable = sys.platform.startswith("linux") and job.device == "cpu" and job.threads == 1
    return usable and not (torch is not None and torch.cuda.is_initialized())


def _limited(job: Any) -> bool:
    """Whether something outside must watch a job."""
    b = job.cell.training.budget
    limits = (b.device_bytes, b.host_bytes, b.train_seconds, b.eval_seconds, job.deadline)
    return any(limit is not None for limit in limits)


def _not_enforced(jobs: Sequence[Any]) -> Generator[Event, None, None]:
    """Says, once a run, which limits nothing enforces here."""
    for job in jobs:
        if job.device != "cpu" and not job.device.startswith("cuda") and job.cell.training.budget.device_bytes:
            sentence = f"device_bytes is measured on {job.device}, but not enforced: nothing there can refuse memory."
            yield Event(job.cell, "notice", notice=sentence)
            return


class Local:
    """A fresh process per cell, a few at a time.

    Args:
        workers: how many cells run at once.
        command: what runs a job file.
    """

    def __init__(self, workers: int, *, command: Sequence[str] = WORKER) -> None:
        self.workers = max(1, workers)
        self.command = tuple(command)
        self._running: dict[str, Worker] = {}
        self._stopping = False

    def run(self, jobs: Sequence[Any]) -> Generator[Event, None, None]:
        """See `Executor.run`.

        A backbone is trained or converted before its first cell; cells on other backbones go on meanwhile. Cells of a
        training that is under way wait, so that nothing is trained twice.
        """
        self._stopping = False
        yield from _not_enforced(jobs)
        waiting = list(jobs)
        events: Queue[Event | UserError] = Queue()
        preparing = _first_jobs(waiting)
        busy: set[str] = set()  # training keys of cells, names of backbones
        ready: set[str] = set()
        with TemporaryDirectory() as folder:
            try:
                while waiting or busy:
                    name = next(iter(preparing), None)
                    job = next((j for j in waiting if _backbone(j) in ready and j.cell.training.key not in busy), None)
                    if len(busy) < self.workers and name is not None:
                        busy.add(name)
                        yield Event(preparing[name].cell, "backbone")
                        self._start(self._prepare, preparing.pop(name), Path(folder), events)
                    elif len(busy) < self.workers and job is not None:
                        waiting.remove(job)
                        busy.add(job.cell.training.key)
                        yield Event(job.cell, "start")
                        self._start(self._work, job, Path(folder), events)
                    else:
                        event = events.get()
                        if isinstance(event, UserError):
                            raise event
                        if event.phase == "prepared":
                            busy.discard(event.cell.training.backbone.name)
                            ready.add(event.cell.training.backbone.name)
                            continue
                        if event.record is not None:
                            busy.discard(event.cell.training.key)
                        yield event
            finally:
                self.stop()

    @staticmethod
    def _start(work: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=work, args=arguments, daemon=True).start()

    def stop(self) -> None:
        """Kill what still runs, with its children; those cells get no record and are run again another time."""
        self._stopping = True
        for worker in list(self._running.values()):
            worker.kill()
        self._running.clear()

    def _prepare(self, job: Any, folder: Path, events: "Queue[Event | UserError]") -> None:
        """Train or convert a cell's backbone, in a thread that only waits."""
        name = _backbone(job)
        with start([*self.command, "--prepare", str(_job_file(job, folder / "prepare"))], inside=folder) as worker:
            self._running[name] = worker
            assert worker.process.stdout is not None
            for event in filter(None, (_told(job.cell, line) for line in worker.process.stdout)):
                if event.notice:
                    events.put(event)
            code = worker.wait()
            self._running.pop(name, None)
            if code:
                last = (worker.said() or ["no message"])[-1]
                events.put(UserError(f"The backbone {name} could not be prepared: {last}"))
            else:
                events.put(Event(job.cell, "prepared"))

    def _work(self, job: Any, folder: Path, events: "Queue[Event | UserError]") -> None:
        """One cell from start to record, in a thread that only waits."""
        store, started = Store(job.out), now()
        try:
            store.remove(job.cell.key)  # a result of an earlier attempt must not pass for this one's
            command = [*self.command, str(_job_file(job, folder))]
            with start(command, log=store.log_path(job.cell.key), inside=folder) as worker:
                self._running[job.cell.key] = worker
                if self._stopping:
                    worker.kill()
                try:
                    code, guard = _overseen(worker, job, events.put)
                finally:
                    self._running.pop(job.cell.key, None)
                if self._stopping:
                    return
                record = settled(job, store, worker, guard, code, started)
        except Exception as error:  # for example a full disk: the run goes on, the cell stays to be done
            record = obituary(job, started, "failed", f"{type(error).__name__}: {error}")
        events.put(Event(job.cell, "record", record=record))


def _overseen(worker: Worker, job: Any, tell: Callable[[Event], None]) -> tuple[int, Guard]:
    """A cell's process until its end, its progress passed on; its exit code and who watched it."""
    bounds = Bounds(job.cell.training.budget, job.device, _deadline(job), (job.out, job.cache))
    with Guard(worker, bounds) as guard:
        assert worker.process.stdout is not None
        for line in worker.process.stdout:
            if (event := _told(job.cell, line)) is not None:
                tell(event)
        return worker.wait(), guard


def _job_file(job: Any, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{job.cell.key}.json"
    path.write_text(json.dumps(job.to_json()), encoding="utf-8")
    return path


def _backbone(job: Any) -> str:
    return str(job.cell.training.backbone.name)


def _first_jobs(jobs: Sequence[Any]) -> dict[str, Any]:
    """The first job of every backbone, by its name."""
    first: dict[str, Any] = {}
    for job in jobs:
        first.setdefault(_backbone(job), job)
    return first


def _deadline(job: Any) -> float:
    """Seconds of a job's clock until it is ended; where nobody has predicted them, far more than its limits."""
    if job.deadline is not None:
        return float(job.deadline)
    budget: Budget = job.cell.training.budget
    found = [bound for phase in ("train", "eval", "control") if (bound := budget.seconds(phase))]
    return 2 * sum(limit for _, limit in found) + (3 - len(found)) * 86_400 + SLACK_SECONDS


def _told(cell: Cell, line: str) -> Event | None:
    """What a line of a worker's output says; None for what libraries print."""
    try:
        told = json.loads(line)
        if "notice" in told:
            return Event(cell, "notice", notice=str(told["notice"]))
        return Event(cell, str(told["phase"]), int(told["done"]), int(told["total"]))
    except (ValueError, KeyError, TypeError):
        return None
