"""Runs jobs: `inline` in this process (tests, debuggers), `local` in one fresh process per cell (default).

Files are the only channel for results; a worker's standard output carries progress. A crash, a kill by the system or a
hang of one cell is written down as that cell's record and never takes the run down.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from tempfile import TemporaryDirectory
from typing import IO, Any, Protocol

from memory_bench.budget import Usage
from memory_bench.cell import Cell
from memory_bench.errors import UserError
from memory_bench.record import Record, now, provenance
from memory_bench.store import Store

SLACK_SECONDS = 600.0  # start-up, encoding and controls, which the budget does not count
SHARED = 10  # a budget's seconds are the CPU's; on a machine with other work as many times as long may pass


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
        """Run `jobs` (`memory_bench.running.worker.Job`)."""
        ...


class Inline:
    """One cell after the other, in this process."""

    def run(self, jobs: Sequence[Any]) -> Generator[Event, None, None]:
        """See `Executor.run`."""
        from memory_bench.running.worker import run_cell

        for job in jobs:
            yield Event(job.cell, "start")
            notices: list[str] = []
            record = run_cell(job, lambda phase, done, total: None, notices.append)
            yield from (Event(job.cell, "notice", notice=sentence) for sentence in notices)
            yield Event(job.cell, "record", record=record)


# -P: the current folder is not searched, for a checkout there has no memory_bench.hmt, baselines or tasks.
WORKER = (sys.executable, "-P", "-m", "memory_bench.running.worker")


class Local:
    """A fresh process per cell, a few at a time.

    Args:
        workers: how many cells run at once.
        command: what runs a job file.
    """

    def __init__(self, workers: int, *, command: Sequence[str] = WORKER) -> None:
        self.workers = max(1, workers)
        self.command = tuple(command)
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._stopping = False

    def run(self, jobs: Sequence[Any]) -> Generator[Event, None, None]:
        """See `Executor.run`.

        A backbone is trained or converted before its first cell; cells on other backbones go on meanwhile. Cells of a
        training that is under way wait, so that nothing is trained twice.
        """
        self._stopping = False
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
        for process in list(self._running.values()):
            _kill(process)
        self._running.clear()

    def _job_file(self, job: Any, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        path = folder / f"{job.cell.key}.json"
        path.write_text(json.dumps(job.to_json()), encoding="utf-8")
        return path

    def _prepare(self, job: Any, folder: Path, events: "Queue[Event | UserError]") -> None:
        """Train or convert a cell's backbone, in a thread that only waits."""
        name = _backbone(job)
        path = self._job_file(job, folder / "prepare")
        process = subprocess.Popen(
            [*self.command, "--prepare", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
        self._running[name] = process
        told, errors = process.communicate()
        self._running.pop(name, None)
        for event in filter(None, (_told(job.cell, line) for line in told.splitlines())):
            if event.notice:
                events.put(event)
        if process.returncode:
            last = (errors.strip().splitlines() or ["no message"])[-1]
            events.put(UserError(f"The backbone {name} could not be prepared: {last}"))
        else:
            events.put(Event(job.cell, "prepared"))

    def _work(self, job: Any, folder: Path, events: "Queue[Event | UserError]") -> None:
        """One cell from start to record, in a thread that only waits."""
        store, started = Store(job.out), now()
        try:
            store.remove(job.cell.key)  # a result of an earlier attempt must not pass for this one's
            with store.log_path(job.cell.key).open("w", encoding="utf-8") as log:
                code, late = self._watch(job, folder, log, events)
            if self._stopping:
                return
            record = store.record(job.cell.key)
            if record is None or code not in (0, 1):
                record = _obituary(job, code, late, started)
                store.write_record(record, None)
        except Exception as error:  # for example a full disk: the run goes on, the cell stays to be done
            record = _obituary(job, 1, False, started, f"{type(error).__name__}: {error}")
        events.put(Event(job.cell, "record", record=record))

    def _watch(self, job: Any, folder: Path, log: IO[str], events: "Queue[Event | UserError]") -> tuple[int, bool]:
        """Run a cell's process and pass its progress on; its exit code, and whether it was killed at its deadline."""
        process = subprocess.Popen(
            [*self.command, str(self._job_file(job, folder))], stdout=subprocess.PIPE, stderr=log, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
        self._running[job.cell.key] = process
        if self._stopping:
            _kill(process)
        late = threading.Event()

        def end() -> None:
            late.set()
            _kill(process)

        timer = threading.Timer(_deadline(job.cell), end)
        timer.daemon = True
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if (event := _told(job.cell, line)) is not None:
                    events.put(event)
            return process.wait(), late.is_set()
        finally:
            timer.cancel()
            self._running.pop(job.cell.key, None)


def _backbone(job: Any) -> str:
    return str(job.cell.training.backbone.name)


def _first_jobs(jobs: Sequence[Any]) -> dict[str, Any]:
    """The first job of every backbone, by its name."""
    first: dict[str, Any] = {}
    for job in jobs:
        first.setdefault(_backbone(job), job)
    return first


def _deadline(cell: Cell) -> float:
    budget = cell.training.budget
    return SHARED * ((budget.train_seconds or 86_400) + (budget.eval_seconds or 86_400)) + SLACK_SECONDS


def _told(cell: Cell, line: str) -> Event | None:
    """What a line of a worker's output says; None for what libraries print."""
    try:
        told = json.loads(line)
        if "notice" in told:
            return Event(cell, "notice", notice=str(told["notice"]))
        return Event(cell, str(told["phase"]), int(told["done"]), int(told["total"]))
    except (ValueError, KeyError, TypeError):
        return None


def _obituary(job: Any, code: int, late: bool, started: str, said: str = "") -> Record:
    """The record of a cell whose process died without writing one."""
    if late:
        status, detail = "over_budget", "wall_seconds@killed at its deadline"
    elif code == -signal.SIGKILL:
        status, detail = "failed", "the process was killed by the system (signal 9), most likely out of memory"
    elif code < 0:
        status, detail = "failed", f"the process died of signal {-code}"
    else:
        status, detail = "failed", said or f"the process ended with code {code} without a record; see its log.txt"
    facts = provenance(device=job.device, threads=job.threads, started=started)
    return Record(
        cell=job.cell,
        status=status,
        detail=detail,
        metrics=(),
        usage=Usage(),
        provenance=facts,
        learned=None,
        levels={},
    )


def _kill(process: "subprocess.Popen[str]") -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
