"""A cell on another machine: what that machine must see before, and the worker process there.

Nodes read the job they are given and write into the run's folder, so that it, the cache, the data and plug-ins that are
files have to be where all machines see them, and the same version of the code on each. Every node is asked before it
runs anything. Loads no torch.
"""

import importlib.util
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memory_bench.errors import UserError
from memory_bench.files.content import digest_of
from memory_bench.record import versions
from memory_bench.running.apart import Event, prepare_apart, run_apart
from memory_bench.running.job import Job
from memory_bench.running.obituary import killed
from memory_bench.running.processes import WORKER, Worker
from memory_bench.store import Store

MARK = ".shared"  # a file in a shared folder, by whose content it is known
PACKAGES = ("memory_bench", "memory_bench.hmt", "memory_bench.baselines", "memory_bench.tasks")


def wanted(jobs: Sequence[Any]) -> dict[str, Any]:
    """What every node must see and have for these jobs; plain data.

    Returns:
        ``out`` and ``cache``, the folders; ``marks``, of each of them what its mark holds; ``there``, other paths;
        ``here``, the current folder; ``versions``.

    Raises:
        UserError: the run's folder cannot be written to.
    """
    first = jobs[0]
    folders = {"out": str(first.out.resolve()), "cache": str(first.cache.resolve())}
    there = {str(job.data.resolve()) for job in jobs if job.data is not None}
    for cell in (job.cell for job in jobs):
        names = (cell.training.model.name, cell.task.name, cell.training.backbone.name)
        files = [path for name in names if (path := Path(_file(name))).exists()]
        there |= {str(path.resolve()) for path in files}
        there |= {os.getcwd() for path in files if not path.is_absolute()}
    try:
        marks = {folders["out"]: _mark(Path(folders["out"]))}
    except OSError as error:
        raise UserError(f"The folder {first.out} cannot be written to: {error.strerror}.") from error
    with suppress(OSError):  # a complete cache may be read-only: it is there or not
        first.cache.mkdir(parents=True, exist_ok=True)
        marks[folders["cache"]] = _mark(Path(folders["cache"]))
    return {**folders, "marks": marks, "there": sorted(there), "here": os.getcwd(), "versions": own_versions()}


def _file(name: str) -> str:
    """Of ``file.py:Class`` and ``lm-eval:task.yaml`` the file; other names as they are."""
    head, _, tail = name.partition(":")
    return tail if tail.endswith((".yaml", ".yml")) else head


def _mark(folder: Path) -> str:
    """What the mark in a folder holds; it is made where there is none."""
    path = folder / MARK
    if not path.exists():
        new = folder / f"{MARK}-{secrets.token_hex(8)}"
        new.write_text(secrets.token_hex(16), encoding="ascii")
        try:
            os.link(new, path)  # whole, and never over another command's
        except FileExistsError:
            pass
        except OSError:  # no links here
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)
    return path.read_text(encoding="ascii", errors="replace")


def own_versions() -> dict[str, str]:
    """Of this machine's Python and packages, and of our sources their content."""
    places = [(name, importlib.util.find_spec(name)) for name in PACKAGES]
    folders = [(name, Path(spec.origin).parent) for name, spec in places if spec is not None and spec.origin]
    parts: list[str] = []
    for name, folder in folders:
        for file in sorted(folder.rglob("*.py")):
            parts += [f"{name}/{file.relative_to(folder).as_posix()}", file.read_text(encoding="utf-8")]
    return {**versions(), "sources of memory-bench": digest_of(parts)[:12]}


def refusal(asked: Mapping[str, Any]) -> str:
    """Why the machine that this runs on can run none of the jobs (`wanted`), in a sentence; empty: it can."""
    host = socket.gethostname()
    for folder, what, advice in (
        (asked["out"], "the run's folder", "results come back through it. Give one that all machines share with --out"),
        (asked["cache"], "the cache", "backbones and data are made ready there once for all. Name one that all "
         "machines share with MEMORY_BENCH_CACHE"),
    ):  # fmt: skip
        mark = asked["marks"].get(folder)
        seen = Path(folder).is_dir() if mark is None else _held(Path(folder) / MARK) == mark
        if not seen:
            return f"The machine {host} does not see {what} {folder}: {advice}."
    if not os.access(asked["out"], os.W_OK):
        return f"The machine {host} may not write into {asked['out']}, where results go."
    if gone := [path for path in asked["there"] if not Path(path).exists()]:
        return f"The machine {host} does not see {gone[0]}, which the run needs."
    own = own_versions()
    for name, version in asked["versions"].items():
        if own.get(name) != version:
            return f"The machine {host} has {name} {own.get(name)}, this one {version}: install the same there."
    return ""


def _held(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None


@dataclass(slots=True)
class Call:
    """What runs on a node; made of plain data, so that every engine can carry it there.

    Attributes:
        job: of `memory_bench.running.job.Job`.
        asked: see `wanted`.
        prepare: only its backbone.
        command: what runs a job file; default: a worker under the node's own Python.
        worker: that runs just now or ran last.
    """

    job: dict[str, Any]
    asked: dict[str, Any]
    prepare: bool = False
    command: Sequence[str] = ()
    worker: Worker | None = field(default=None, compare=False)

    def __call__(self) -> dict[str, str]:
        """Run it; the record of a cell is in the run's folder then.

        Returns:
            Of these what there is to say: ``refused``, why this machine can run nothing; ``failed``, why the backbone
            could not be prepared; ``lost``, that there is no result by no fault of the cell's; ``notices``, a line
            each. All are sentences.
        """
        if sentence := refusal(self.asked):
            return {"refused": sentence}
        told: list[Event] = []
        job = Job.from_json(self.job)
        with _folder() as folder, _from(self.asked["here"]):
            said = self._prepare(job, folder, told) if self.prepare else self._run(job, folder, told)
        if notices := [event.notice for event in told if event.notice]:
            said["notices"] = "\n".join(notices)
        return said

    def _prepare(self, job: Job, folder: Path, told: list[Event]) -> dict[str, str]:
        done = prepare_apart(job, folder, self.command or WORKER, told.append, self._keep)
        if isinstance(done, UserError):
            return {"failed": str(done)}
        return {"lost": done.notice} if done.phase == "unprepared" else {}

    def _run(self, job: Job, folder: Path, told: list[Event]) -> dict[str, str]:
        with _alone(job):
            if Store(job.out).stamp(job.cell.key) not in ("", job.before):
                return {}  # of an earlier attempt, whose machine was lost when it had written it
            end = run_apart(job, folder, self.command or WORKER, told.append, self._keep)
        return {"lost": end.notice} if end is not None and end.phase == "lost" else {}

    def _keep(self, worker: Worker) -> None:
        self.worker = worker

    def taken_away(self) -> bool:
        """Whether the worker was ended from outside, as by a scheduler that wants the machine."""
        return self.worker is not None and bool(killed(self.worker.process.poll() or 0))


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder on this machine for what is passed between processes."""
    with tempfile.TemporaryDirectory(prefix="memory-bench-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@contextmanager
def _from(here: str) -> Iterator[None]:
    """In the folder where the command was given, if there is one of that name."""
    before = os.getcwd()
    with suppress(OSError):
        os.chdir(here)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _alone(job: Job) -> Iterator[None]:
    """One attempt at a time: one that passes for lost may still be at work."""
    lock = Store(job.out).lock(f"{job.cell.key}-attempt")
    with suppress(OSError, NotImplementedError):  # of a file system without locks
        lock.acquire()
    try:
        yield
    finally:
        with suppress(OSError):
            lock.release()
