"""Runs jobs: `inline` one after the other from this process (tests), `local` a few at a time (default).

Files are the only channel for results; a worker tells of its progress. A crash, a passed limit or a hang of one cell
is written down as that cell's record and never takes the run down. What is the machine's fault (a full disk, a worker
that somebody killed) is no result: such a cell is ``lost``, stays to be done, and the run goes on with the others.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from tempfile import TemporaryDirectory
from typing import IO, Any, Protocol

from memory_bench.budget import Budget
from memory_bench.cell import Cell
from memory_bench.errors import MachineError, UserError
from memory_bench.record import Record, now
from memory_bench.running.claims import Claims
from memory_bench.running.faults import fault
from memory_bench.running.guard import Bounds, Guard
from memory_bench.running.obituary import killed, settled
from memory_bench.running.orphans import watch
from memory_bench.running.processes import WORKER, Worker, start
from memory_bench.store import Store

AGAIN = 0.3  # seconds until a cell that another command is at is asked for again
SLACK_SECONDS = 3600.0  # of start-up, encoding and what has no limit, where nobody has predicted them


@dataclass(frozen=True, slots=True)
class Event:
    """Something happened to a cell: ``start``, progress (`phase` done of total), a ``notice``, or its end.

    It ends with its `record`, or is ``lost``: see `lost`.
    """

    cell: Cell
    phase: str
    done: int = 0
    total: int = 1
    record: Record | None = None
    notice: str = ""

    @property
    def ends(self) -> bool:
        """Nothing more is to come of this cell."""
        return self.record is not None or self.phase == "lost"


def lost(job: Any, why: str) -> Event:
    """The end of a cell without a record, by no fault of its own: it stays to be done.

    Args:
        job: the cell with its things.
        why: the end of a sentence.
    """
    says = f"{job.cell.title} has no result, by no fault of its own: {why.rstrip('.')}. The same command goes on."
    return Event(job.cell, "lost", notice=says)


class Executor(Protocol):
    """Runs jobs and tells of them as they go; every job ends with an event that holds its record, or is `lost`."""

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
        waiting = list(jobs)
        with Claims(jobs) as claims:
            while waiting:
                job = next((j for j in waiting if claims.take(j)), None)
                if job is None:
                    time.sleep(AGAIN)
                    continue
                waiting.remove(job)
                yield Event(job.cell, "start")
                if (made := claims.made(job)) is not None:
                    yield Event(job.cell, "record", record=made)
                else:
                    yield from self._here(job) if not _limited(job) else self._watched(job, claims.before(job))
                claims.give(job.cell.key)

    @staticmethod
    def _here(job: Any) -> Generator[Event, None, None]:
        from memory_bench.running.worker import run_cell

        notices: list[str] = []
        try:
            end = Event(job.cell, "record", record=run_cell(job, lambda phase, done, total: None, notices.append))
        except MachineError as trouble:
            end = lost(job, str(trouble))
        yield from (Event(job.cell, "notice", notice=sentence) for sentence in notices)
        yield end

    @staticmethod
    def _watched(job: Any, before: str) -> Generator[Event, None, None]:
        store, started = Store(job.out), now()
        told: list[Event] = []
        try:
            with TemporaryDirectory() as folder:
                command = (*WORKER, str(_job_file(job, Path(folder))))
                forked = partial(_work_in_fork, job)
                log = store.log_path(job.cell.key)
                with start(forked if _forks(job) else command, log=log, inside=Path(folder)) as worker:
                    code, guard = _overseen(worker, job, told.append)
                    end = Event(
                        job.cell, "record", record=settled(job, store, worker, guard, code, started, before=before)
                    )
        except (OSError, UserError) as trouble:
            end = lost(job, _why(trouble, job))
        yield from (event for event in told if event.notice)
        yield end


def _why(error: Exception, job: Any) -> str:
    """Why a cell could not be looked after: the machine's reason where it is one, else the error."""
    said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return fault(error, (job.out, job.cache)) or said


def _work_in_fork(job: Any, told: IO[str]) -> int:
    from memory_bench.running.worker import carry_out

    watch()
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
        training that is under way wait, so that nothing is trained twice, and so do those that another command on the
        same folder is at: its results are taken.
        """
        self._stopping = False
        yield from _not_enforced(jobs)
        waiting = list(jobs)
        events: Queue[Event | UserError] = Queue()
        preparing = _first_jobs(waiting)
        busy: set[str] = set()  # training keys of cells, names of backbones
        ready: set[str] = set()
        with TemporaryDirectory() as folder, Claims(jobs) as claims:
            try:
                while waiting or busy:
                    free = len(busy) < self.workers
                    name = next(iter(preparing), None) if free else None
                    able = (j for j in waiting if _backbone(j) in ready and j.cell.training.key not in busy)
                    job = next((j for j in able if claims.take(j)), None) if free and name is None else None
                    if name is not None:
                        busy.add(name)
                        yield Event(preparing[name].cell, "backbone")
                        self._start(self._prepare, preparing.pop(name), Path(folder), events)
                    elif job is not None:
                        waiting.remove(job)
                        yield Event(job.cell, "start")
                        if (made := claims.made(job)) is not None:
                            claims.give(job.cell.key)
                            yield Event(job.cell, "record", record=made)
                            continue
                        busy.add(job.cell.training.key)
                        self._start(self._work, replace(job, before=claims.before(job)), Path(folder), events)
                    else:
                        try:
                            event = events.get(timeout=AGAIN if claims.elsewhere else None)
                        except Empty:
                            continue
                        if isinstance(event, UserError):
                            raise event
                        if event.phase == "unprepared":
                            name = _backbone(event)
                            busy.discard(name)
                            yield from (lost(j, event.notice) for j in waiting if _backbone(j) == name)
                            waiting = [j for j in waiting if _backbone(j) != name]
                            continue
                        if event.phase == "prepared":
                            busy.discard(event.cell.training.backbone.name)
                            ready.add(event.cell.training.backbone.name)
                            continue
                        if event.ends:
                            busy.discard(event.cell.training.key)
                            claims.give(event.cell.key)
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
            if killed(code):
                events.put(Event(job.cell, "unprepared", notice=f"the backbone's preparation {killed(code)}"))
            elif code:
                last = (worker.said() or ["no message"])[-1]
                events.put(UserError(f"The backbone {name} could not be prepared: {last}"))
            else:
                events.put(Event(job.cell, "prepared"))

    def _work(self, job: Any, folder: Path, events: "Queue[Event | UserError]") -> None:
        """One cell from start to record, in a thread that only waits."""
        store, started = Store(job.out), now()
        try:
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
                record = settled(job, store, worker, guard, code, started, before=job.before or "")
        except Exception as error:  # for example a full disk: the run goes on, the cell stays to be done
            events.put(lost(job, _why(error, job)))
            return
        events.put(Event(job.cell, "record", record=record))


def _overseen(worker: Worker, job: Any, tell: Callable[[Event], None]) -> tuple[int, Guard]:
    """A cell's process until its end, its progress passed on; its exit code and who watched it."""
    bounds = Bounds(job.cell.training.budget, job.device, _deadline(job), (job.out, job.cache))
    with Guard(worker, bounds) as guard:
        assert worker.process.stdout is not None
        for line in worker.process.stdout:
            if (event := _told(job.cell, line)) is None:
                continue
            if event.phase == "lost":
                worker.trouble = event.notice
            else:
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
        if "lost" in told:
            return Event(cell, "lost", notice=str(told["lost"]))
        if "notice" in told:
            return Event(cell, "notice", notice=str(told["notice"]))
        return Event(cell, str(told["phase"]), int(told["done"]), int(told["total"]))
    except (ValueError, KeyError, TypeError):
        return None
