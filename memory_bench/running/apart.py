"""One cell, or one backbone, in a process of its own: started, watched, followed to its end, and its events.

This is what executors have in common, on this machine and on others. Loads no torch.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memory_bench.budget import Budget
from memory_bench.cell import Cell
from memory_bench.errors import UserError
from memory_bench.record import Record, now
from memory_bench.running.faults import fault
from memory_bench.running.guard import Bounds, Guard
from memory_bench.running.obituary import killed, settled
from memory_bench.running.processes import Server, Worker, start
from memory_bench.store import Store

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


def prepare_apart(
    job: Any,
    folder: Path,
    command: Sequence[str],
    tell: Callable[[Event], None],
    keep: Callable[[Worker], None],
    server: Server | None = None,
) -> Event | UserError:
    """Train or convert a job's backbone in a process of its own.

    Args:
        job: of a cell on it.
        folder: for what is passed between processes.
        command: what runs a job file.
        tell: told of notices.
        keep: told of the worker as soon as it runs.
        server: begins it where it can (`memory_bench.running.processes.start`).

    Returns:
        The event ``prepared`` or, where the machine was in the way, ``unprepared``; else why it could not be.
    """
    try:
        asked = [*command, "--prepare", str(job_file(job, folder / "prepare"))]
        with start(asked, inside=folder, server=server) as worker:
            keep(worker)
            assert worker.process.stdout is not None
            for event in filter(None, (told(job.cell, line) for line in worker.process.stdout)):
                if event.notice:
                    tell(event)
            code, said = worker.wait(), worker.said()
    except OSError as error:  # for example a full disk
        return Event(job.cell, "unprepared", notice=why_not(error, job))
    if killed(code):
        return Event(job.cell, "unprepared", notice=f"the backbone's preparation {killed(code)}")
    if code:
        return UserError(f"The backbone {backbone_of(job)} could not be prepared: {(said or ['no message'])[-1]}")
    return Event(job.cell, "prepared")


def run_apart(
    job: Any,
    folder: Path,
    command: Sequence[str],
    tell: Callable[[Event], None],
    keep: Callable[[Worker], None],
    stopped: Callable[[], bool] = lambda: False,
    server: Server | None = None,
) -> Event | None:
    """One cell in a process of its own, watched from start to record; arguments as of `prepare_apart`.

    Returns:
        Its end; None: it was `stopped`.
    """
    store, started = Store(job.out), now()
    try:
        asked, log = [*command, str(job_file(job, folder))], store.log_path(job.cell.key)
        with start(asked, log=log, inside=folder, server=server) as worker:
            keep(worker)
            code, guard = overseen(worker, job, tell)
            if stopped():
                return None
            record = settled(job, store, worker, guard, code, started, before=job.before or "")
    except Exception as error:  # for example a full disk: the run goes on, the cell stays to be done
        return lost(job, why_not(error, job))
    return Event(job.cell, "record", record=record)


def overseen(worker: Worker, job: Any, tell: Callable[[Event], None]) -> tuple[int, Guard]:
    """A cell's process until its end, its progress passed on; its exit code and who watched it."""
    bounds = Bounds(job.cell.training.budget, job.device, deadline(job), (job.out, job.cache))
    with Guard(worker, bounds) as guard:
        assert worker.process.stdout is not None
        for line in worker.process.stdout:
            if (event := told(job.cell, line)) is None:
                continue
            if event.phase == "lost":
                worker.trouble = event.notice
            else:
                tell(event)
        return worker.wait(), guard


def job_file(job: Any, folder: Path) -> Path:
    """The job as a file in `folder`, for its worker."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{job.cell.key}.json"
    path.write_text(json.dumps(job.to_json()), encoding="utf-8")
    return path


def backbone_of(job: Any) -> str:
    """The name of a job's, or an event's, backbone."""
    return str(job.cell.training.backbone.name)


def why_not(error: Exception, job: Any) -> str:
    """Why a cell could not be looked after: the machine's reason where it is one, else the error."""
    said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return fault(error, (job.out, job.cache)) or said


def deadline(job: Any) -> float:
    """Seconds of a job's clock until it is ended; where nobody has predicted them, far more than its limits."""
    if job.deadline is not None:
        return float(job.deadline)
    budget: Budget = job.cell.training.budget
    found = [bound for phase in ("train", "eval", "control") if (bound := budget.seconds(phase))]
    return 2 * sum(limit for _, limit in found) + (3 - len(found)) * 86_400 + SLACK_SECONDS


def told(cell: Cell, line: str) -> Event | None:
    """What a line of a worker's output says; None for what libraries print."""
    try:
        said = json.loads(line)
        if "lost" in said:
            return Event(cell, "lost", notice=str(said["lost"]))
        if "notice" in said:
            return Event(cell, "notice", notice=str(said["notice"]))
        return Event(cell, str(said["phase"]), int(said["done"]), int(said["total"]))
    except (ValueError, KeyError, TypeError):
        return None
