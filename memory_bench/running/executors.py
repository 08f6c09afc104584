"""Runs jobs: `inline` one after the other from this process (tests), `local` a few at a time (default).

Files are the only channel for results; a worker tells of its progress. A crash, a passed limit or a hang of one cell
is written down as that cell's record and never takes the run down. What is the machine's fault (a full disk, a worker
that somebody killed) is no result: such a cell is ``lost``, stays to be done, and the run goes on with the others.
"""

import sys
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from tempfile import TemporaryDirectory
from typing import IO, Any, Protocol

from memory_bench.errors import MachineError, UserError
from memory_bench.record import now
from memory_bench.running.apart import (
    Event,
    backbone_of,
    job_file,
    lost,
    overseen,
    prepare_apart,
    run_apart,
    why_not,
)
from memory_bench.running.claims import Claims
from memory_bench.running.forkserver import ForkServer
from memory_bench.running.obituary import settled
from memory_bench.running.orphans import watch
from memory_bench.running.processes import WORKER, Worker, start
from memory_bench.store import Store

AGAIN = 0.3  # seconds until a cell that another command is at is asked for again


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
                command = (*WORKER, str(job_file(job, Path(folder))))
                forked = partial(_work_in_fork, job)
                log = store.log_path(job.cell.key)
                with start(forked if _forks(job) else command, log=log, inside=Path(folder)) as worker:
                    code, guard = overseen(worker, job, told.append)
                    end = Event(
                        job.cell, "record", record=settled(job, store, worker, guard, code, started, before=before)
                    )
        except (OSError, UserError) as trouble:
            end = lost(job, why_not(trouble, job))
        yield from (event for event in told if event.notice)
        yield end


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
    """A process of its own per cell, a few at a time: on a CPU the fork of a server, else a fresh program.

    Args:
        workers: how many cells run at once.
        command: what runs a job file.
    """

    def __init__(self, workers: int, *, command: Sequence[str] = WORKER) -> None:
        self.workers = max(1, workers)
        self.command = tuple(command)
        self._running: dict[str, Worker] = {}
        self._server: ForkServer | None = None
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
        with TemporaryDirectory() as folder, Claims(jobs) as claims, ForkServer() as self._server:
            try:
                while waiting or busy:
                    free = self.workers - len(busy)
                    name = next(iter(preparing), None) if free > 0 else None
                    able = (j for j in waiting if backbone_of(j) in ready) if name is None else ()
                    if name is not None:
                        busy.add(name)
                        yield Event(preparing[name].cell, "backbone")
                        self._start(self._prepare, preparing.pop(name), Path(folder), events)
                    elif chosen := _choose(able, busy, claims, free):
                        for job in chosen:
                            waiting.remove(job)
                        begun = yield from _begun(chosen, claims)
                        busy |= {job.cell.training.key for job in begun}
                        self._begin(begun, Path(folder), events)
                    else:
                        try:
                            event = events.get(timeout=AGAIN if claims.elsewhere else None)
                        except Empty:
                            continue
                        if isinstance(event, UserError):
                            raise event
                        if event.phase == "unprepared":
                            name = backbone_of(event)
                            busy.discard(name)
                            yield from (lost(j, event.notice) for j in waiting if backbone_of(j) == name)
                            waiting = [j for j in waiting if backbone_of(j) != name]
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

    def _begin(self, jobs: Sequence[Any], folder: Path, events: "Queue[Event | UserError]") -> None:
        """Start cells that can run at once; what comes of them goes into `events`."""
        for job in jobs:
            self._start(self._work, job, folder, events)

    def _kept(self, name: str) -> Callable[[Worker], None]:
        """Remembers a worker under a name, so that `stop` ends it."""

        def keep(worker: Worker) -> None:
            self._running[name] = worker
            if self._stopping:
                worker.kill()

        return keep

    def _serving(self, job: Any) -> ForkServer | None:
        """The server for a job; None: a GPU's driver does not survive a fork."""
        return self._server if job.device == "cpu" else None

    def _prepare(self, job: Any, folder: Path, events: "Queue[Event | UserError]") -> None:
        """Train or convert a cell's backbone, in a thread that only waits."""
        name = backbone_of(job)
        events.put(prepare_apart(job, folder, self.command, events.put, self._kept(name), self._serving(job)))
        self._running.pop(name, None)

    def _work(self, job: Any, folder: Path, events: "Queue[Event | UserError]") -> None:
        """One cell from start to record, in a thread that only waits."""
        end = run_apart(
            job, folder, self.command, events.put, self._kept(job.cell.key), lambda: self._stopping, self._serving(job)
        )
        self._running.pop(job.cell.key, None)
        if end is not None:
            events.put(end)


def _choose(able: Iterable[Any], busy: Collection[str], claims: Claims, most: int) -> list[Any]:
    """Jobs of different trainings, none of them `busy`, at most so many; they are claimed."""
    found: dict[str, Any] = {}
    for job in able:
        if len(found) >= most:
            break
        if (key := job.cell.training.key) not in busy and key not in found and claims.take(job):
            found[key] = job
    return list(found.values())


def _begun(chosen: Sequence[Any], claims: Claims) -> Generator[Event, None, list[Any]]:
    """Those of claimed jobs that are still to be done; of the others the record is told."""
    begun = []
    for job in chosen:
        yield Event(job.cell, "start")
        if (made := claims.made(job)) is None:
            begun.append(replace(job, before=claims.before(job)))
        else:
            claims.give(job.cell.key)
            yield Event(job.cell, "record", record=made)
    return begun


def _first_jobs(jobs: Sequence[Any]) -> dict[str, Any]:
    """The first job of every backbone, by its name."""
    first: dict[str, Any] = {}
    for job in jobs:
        first.setdefault(backbone_of(job), job)
    return first
