"""Runs one cell in a process of its own: the only file that joins model, backbone, task and budget.

`python -m memory_bench.running.entry JOB.json` reads a job, writes the cell's record into the store, and prints
progress as JSON lines. Whatever a cell does is a record: a limit that was passed is ``over_budget``, an exception is
``failed``. What is the machine's fault is none.
"""

import json
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import pandas as pd
import torch

from memory_bench.budget import Budget, BudgetExceeded, Usage
from memory_bench.cell import Cell, Training
from memory_bench.data.library import Library
from memory_bench.driver.asking import Row
from memory_bench.driver.beacon import Beacon
from memory_bench.driver.meter import Meter
from memory_bench.driver.observe import observe
from memory_bench.driver.train import Trained, trained_parameters, untrained
from memory_bench.episode import Estimate
from memory_bench.errors import MachineError, NotFinite, UserError
from memory_bench.files.artefacts import Notice
from memory_bench.finite import unsound
from memory_bench.protocol import MemoryModel
from memory_bench.recipe import Recipe
from memory_bench.record import Record, now, provenance
from memory_bench.report.rows import marked
from memory_bench.running import blame
from memory_bench.running.beginning import Begun, Say, begin, device_name
from memory_bench.running.building import Parts, gather, over, window_training
from memory_bench.running.charging import metered, refusals
from memory_bench.running.faults import told_apart
from memory_bench.running.fence import Bound, FileLimit
from memory_bench.running.going_on import train_on
from memory_bench.running.job import Job
from memory_bench.running.measuring import Measured, measure
from memory_bench.running.orphans import leave
from memory_bench.running.processes import own_beacon
from memory_bench.running.recipes import trains
from memory_bench.running.refusals import refused
from memory_bench.running.starting import settle
from memory_bench.statistics.growth import fit_growth
from memory_bench.statistics.learned import judge
from memory_bench.statistics.pairing import judged
from memory_bench.statistics.retention import expected_shares
from memory_bench.store import Store
from memory_bench.zoo.named import Backbones, Loaded

LOST = 75
"""Exit code of a worker that leaves no record, as sysexits.h has it for what may go well another time."""


def run_cell(job: Job, say: Say, notice: Notice = lambda sentence: None, beacon: Beacon | None = None) -> Record:
    """Train (or load) the cell's model, evaluate it, write the record; one is written for what a cell does wrong too.

    Args:
        job: the cell with its things.
        say: told how far it is.
        notice: told of files that did not fit and were made again; the record's provenance names them too.
        beacon: where it says where it is, if this process is watched; it may be refused memory then, and die of it.

    Raises:
        MachineError: there is no record, by no fault of the cell's (`memory_bench.running.faults`).
    """
    cell, store = job.cell, Store(job.out, notice)
    torch.set_num_threads(job.threads)
    started, usage = now(), Usage()
    samples: pd.DataFrame | None = None
    counted: Meter | None = None
    result = Record(
        cell=cell, status="failed", detail="", metrics=(), usage=usage, provenance={}, learned=None, levels={}
    )
    try:
        with told_apart(job.out, job.cache):
            begun = begin(job, store, say)
            with begun.joined() as ranks, metered(cell.training.budget, job.device, beacon, ranks.held) as charged:
                counted, usage = charged[0], charged[0].usage
                work = _gathered(job, begun, *charged)
                seen = _observed(work, cell)
            result, samples = _judged(work, seen, result)
    except MachineError:
        raise
    except BudgetExceeded as error:
        result = replace(result, status="over_budget", detail=str(error))
    except UserError as error:
        result = replace(result, detail=str(error))
    except Exception as error:
        if refused(error):  # outside of what is metered: by the machine
            result = replace(result, status="over_budget", detail=str(BudgetExceeded("host_bytes", None, None, "")))
        else:
            result = replace(result, detail=blame.told(error, cell, store))
    facts = provenance(device=device_name(job.device), threads=torch.get_num_threads(), started=started)
    facts |= {"processes": cell.training.processes} if cell.training.processes > 1 else {}
    facts["vector_unit"] = torch.backends.cpu.get_cpu_capability()
    if job.plan:
        of_device = job.plan["seconds"] - (job.plan.get("start_seconds") or 0.0)  # what usage has beside it
        facts["plan"] = {"peak_bytes": job.plan["peak_bytes"], "seconds": of_device, "how": job.plan["how"]}
    notices = {"notices": list(store.warnings)} if store.warnings else {}
    grown = None if counted is None else fit_growth(counted.accounting.sizes())
    growth = {} if grown is None else {"state_growth": grown.to_json()}
    result = replace(result, usage=usage, provenance={**facts, **result.provenance, **growth, **notices})
    with told_apart(job.out, job.cache):
        store.write_record(result, samples)
    return result


@dataclass(frozen=True, slots=True)
class _Work:
    """A cell at work: what its model is made of, what it is asked, who counts, which limits are next."""

    parts: Parts
    begun: Begun
    meter: Meter
    bound: Bound | None = None
    files: FileLimit | None = None


def _gathered(job: Job, begun: Begun, meter: Meter, *limits: Any) -> _Work:
    return _Work(gather(job.cell.training, begun.backbones, job.device, begun.encode), begun, meter, *limits)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What was observed of a model; `over` is the limit that cut it short, or empty."""

    trained: Trained
    model: MemoryModel[Any]
    rows: list[Row]
    over: str


def _observed(work: _Work, cell: Cell) -> _Seen:
    parts, meter, begun = work.parts, work.meter, work.begun
    trained = _locked(work)
    begun.ranks.close()
    meter.others.left()
    model = parts.scored(trained.model, cell.scored_with)
    _count_parameters(model, parts.recipe, meter.usage)
    rows: list[Row] = []
    over = ""
    try:
        with meter.phase("eval"), refusals(meter, work.bound):
            observe(
                model,
                begun.episodes,
                begun.encode,
                seed=cell.training.seed,
                controls=cell.controls,
                watcher=meter,
                progress=lambda done, total: begun.say("eval", done, total),
                sink=rows,
                decode=begun.encode.decode,
            )
    except BudgetExceeded as error:
        if not rows:
            raise
        over = str(error)  # what was observed until then is kept
    return _Seen(trained, model, rows, over)


def _judged(work: _Work, seen: _Seen, blank: Record) -> tuple[Record, pd.DataFrame]:
    """The record of what was seen, and its samples; outside of what is charged."""
    parts, meter, task, model = work.parts, work.meter, work.begun.task, seen.model
    samples = pd.DataFrame(seen.rows)
    meter.usage.scored_tokens = int(samples.loc[samples["control"] == "", "tokens"].sum())
    released = parts.pretrained is not None
    metrics = tuple(_mark_look_ahead(e, model.traits.look_ahead, released) for e in task.metrics(judged(task, samples)))
    if fault := unsound(metrics):
        raise NotFinite(f"non-finite: {fault}")
    used = meter.usage
    learned = judge(
        task.headline_rows(judged(task, samples)),
        task.headline,
        trained=seen.trained.ended_by != "none",
        has_memory=bool(used.state_bytes or used.state_host_bytes or used.state_disk_bytes),
        pretrained=released,
    )
    facts = {
        "curve": seen.trained.curve[:: max(1, len(seen.trained.curve) // 200)],
        "look_ahead": model.traits.look_ahead,
        "axes": None if model.axes is None else asdict(model.axes),
        "segment": model.traits.segment,
        "episodes": len(work.begun.episodes),
        "expected_retention": expected_shares(model.expected_retention, samples),
        **({} if parts.pretrained is None else {"pretrained": parts.pretrained.release.hashes}),
    }
    levels = dict(task.levels(work.begun.library))
    status = "over_budget" if seen.over else "ok"
    done = replace(
        blank, status=status, detail=seen.over, metrics=metrics, learned=learned, levels=levels, provenance=facts
    )
    return done, samples


def _locked(work: _Work) -> Trained:
    """The trained model; of several cells that need the same training one trains and the others wait."""
    with work.begun.store.lock(work.parts.training.key):
        return _trained(work)


def _trained(work: _Work) -> Trained:
    """The model as released, from its checkpoint if another task has trained it, else trained now."""
    parts, meter, store = work.parts, work.meter, work.begun.store
    keeper = work.begun.keeping.keeper(parts.training.key, work.files)
    found = parts.released()
    if found is None and work.begun.has_checkpoint(parts.training.key):
        found = parts.kept(store.checkpoint_folder(parts.training.key), meter.usage, store.warn)
    if found is not None:
        meter.count_added(found.model)
        keeper.forget()
        return found
    if untrained(parts.training.budget, parts.recipe):
        begun = parts.begun()
        meter.count_added(begun)
        return Trained(begun, [], "none")
    meter.count_added(parts.build(parts.config))
    if (first := window_training(parts.training, work.begun.backbones)) is not None:
        _train_backbone(work, first)
    progress = partial(work.begun.say, "train")
    return train_on(parts, store, keeper, work.begun.corpus, meter, progress, work.begun.ranks)


def load_trained(job: Job, notice: Notice) -> tuple[MemoryModel[Any], Loaded]:
    """The model of a cell as it is scored, from its checkpoint or trained now (`notice` as of `run_cell`).

    Raises:
        UserError, BudgetExceeded: as a cell's own evaluation would.
    """
    torch.set_num_threads(job.threads)
    begun = begin(job, Store(job.out, notice), lambda *_: None)
    work = _gathered(job, begun, Meter(job.cell.training.budget, torch.device(job.device)))
    with begun.ranks:
        return work.parts.scored(_locked(work).model, job.cell.scored_with), work.parts.loaded


def calibrate(job: Job) -> Measured:
    """Measure a few steps of a cell, from the same start as `run_cell` (see `memory_bench.running.measuring`).

    Raises:
        UserError, BudgetExceeded: as the cell itself would.
    """
    begun = begin(job, Store(job.out), lambda *_: None)
    settle()
    meter = Meter(Budget("calibration"), torch.device(job.device))
    parts = _gathered(job, begun, meter).parts
    corpus = begun.corpus() if trains(job.cell.training) else None
    return measure(job.cell, parts, corpus, begun.episodes, meter, begun.encode.decode)


def _train_backbone(work: _Work, first: Training) -> None:
    """Train a backbone that starts untrained before a method freezes it: as the window alone is, on the same data.

    It is charged to the method, and shared with the window's own cell where that has been trained already.
    """
    parts = work.parts
    spent = work.meter.another()
    _locked(replace(work, parts=over(first, parts.loaded, work.begun.backbones, None, parts.device), meter=spent))
    work.meter.charge_training(spent.usage, spent.others)


def _count_parameters(model: MemoryModel[Any], recipe: Recipe, usage: Usage) -> None:
    usage.added_parameters = model.added_parameters()
    usage.adapter_parameters = sum(p.numel() for p in model.adapter_parameters().values())
    plain = sum(p.numel() for p in model.backbone.parameters()) - usage.adapter_parameters
    usage.parameters = plain + usage.added_parameters
    trained = trained_parameters(model, recipe) if usage.train_steps > 0 else {}
    usage.trained_parameters = sum(p.numel() for p in trained.values())


def _mark_look_ahead(estimate: Estimate, look_ahead: int, pretrained: bool = False) -> Estimate:
    """Numbers of a model that looks ahead or came trained say so in their slice, so that they are no headline."""
    return replace(estimate, slice=marked(estimate.slice, look_ahead, pretrained))


def prepare(job: Job, say: Say, notice: Notice) -> None:
    """Train or convert the cell's backbone so that the cells themselves find it ready."""
    library = Library(job.data, job.cache, stand_ins=job.stand_ins, hub=job.hub, notice=notice)
    say("backbone", 0, 1)
    with told_apart(job.cache):
        Backbones(library, job.cache, hub=job.hub, notice=notice).prepare(job.cell.training.backbone.name)
    say("backbone", 1, 1)


def carry_out(job: Job, told: IO[str], asked: str = "") -> int:
    """Run a job in a worker process, which tells of its progress in JSON lines; an exit code.

    Args:
        job: the cell with its things.
        told: where it tells.
        asked: ``--prepare`` or ``--calibrate``; empty: the cell itself.
    """
    torch.set_num_threads(job.threads)

    def write(**fields: Any) -> None:
        try:
            told.write(json.dumps(fields) + "\n")
            told.flush()
        except OSError:  # nobody listens any more
            leave()

    def say(phase: str, done: int, total: int) -> None:
        write(phase=phase, done=done, total=total)

    def notice(sentence: str) -> None:
        write(notice=sentence)

    if asked == "--calibrate":
        write(calibration=asdict(calibrate(job)))
        return 0
    if asked == "--prepare":
        try:
            prepare(job, say, notice)
        except UserError as error:  # its last line is shown to the user
            sys.stderr.write(f"{error}\n")
            return 1
        return 0
    try:
        return 0 if run_cell(job, say, notice, own_beacon()).status in ("ok", "over_budget") else 1
    except MachineError as trouble:
        write(lost=str(trouble))
        return LOST


def main(arguments: list[str]) -> int:
    """Entry of the process: ``JOB.json``, ``--prepare JOB.json`` or ``--calibrate JOB.json``."""
    *asked, path = arguments
    job = Job.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
    return carry_out(job, sys.stdout, *asked)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
