"""Runs one cell in a process of its own: the only file that joins model, backbone, task and budget.

`python -m memory_bench.running.worker JOB.json` reads a job, writes the cell's record into the store, and prints
progress as JSON lines. Whatever happens is a record: a limit that was passed is ``over_budget``, an exception is
``failed``.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from memory_bench import plugins
from memory_bench.budget import BudgetExceeded, Usage
from memory_bench.cell import Cell, Choice, from_json, to_json
from memory_bench.data.library import Library
from memory_bench.driver.asking import Row
from memory_bench.driver.checkpoints import save_checkpoint
from memory_bench.driver.meter import Meter
from memory_bench.driver.observe import observe
from memory_bench.driver.train import Trained, train, trained_parameters, untrained
from memory_bench.episode import Estimate, Task
from memory_bench.errors import NotFinite, UserError
from memory_bench.files.artefacts import Notice
from memory_bench.finite import unsound
from memory_bench.protocol import MemoryModel
from memory_bench.recipe import Recipe
from memory_bench.record import Record, now, provenance
from memory_bench.report.rows import marked
from memory_bench.running import blame
from memory_bench.running.building import Parts, gather, over
from memory_bench.running.grid import WINDOW, make_task, refuse_changed
from memory_bench.statistics.growth import fit_growth
from memory_bench.statistics.learned import judge
from memory_bench.statistics.pairing import judged
from memory_bench.statistics.retention import expected_shares
from memory_bench.store import Store
from memory_bench.zoo.named import Backbones, Loaded

Say = Callable[[str, int, int], None]
"""Told (phase, done, total)."""


@dataclass(frozen=True, slots=True)
class Job:
    """A cell and where its things are.

    Attributes:
        cell: what to run.
        out: folder of the store.
        data: folder of real data, or None.
        cache: the user's cache folder.
        stand_ins, hub: what the library may use.
        device: ``cpu`` or ``cuda``.
        threads: of torch.
    """

    cell: Cell
    out: Path
    data: Path | None
    cache: Path
    stand_ins: bool
    hub: bool
    device: str
    threads: int

    def to_json(self) -> dict[str, Any]:
        """Plain data for the job file."""
        plain = {**asdict(self), "cell": to_json(self.cell)}
        return {k: str(v) if isinstance(v, Path) else v for k, v in plain.items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Job":
        """The job that `to_json` wrote."""
        folder = Path(data["data"]) if data["data"] else None
        paths = {"out": Path(data["out"]), "data": folder, "cache": Path(data["cache"])}
        return cls(**{**data, **paths, "cell": from_json(data["cell"])})


def run_cell(job: Job, say: Say, notice: Notice = lambda sentence: None) -> Record:
    """Train (or load) the cell's model, evaluate it, write the record. Never raises for what a cell can do wrong.

    Args:
        job: the cell with its things.
        say: told how far it is.
        notice: told of files that did not fit and were made again; the record's provenance names them too.
    """
    cell, store = job.cell, Store(job.out, notice)
    torch.set_num_threads(job.threads)
    started = now()
    meter = Meter(cell.training.budget, torch.device(job.device))
    samples: pd.DataFrame | None = None
    result = Record(
        cell=cell, status="failed", detail="", metrics=(), usage=meter.usage, provenance={}, learned=None, levels={}
    )
    try:
        result, samples = _evaluate(_begin(job, store, meter, say), result)
    except BudgetExceeded as error:
        result = replace(result, status="over_budget", detail=str(error))
    except (MemoryError, torch.OutOfMemoryError):
        meter.read_memory()
        result = replace(result, status="over_budget", detail=_refused(meter))
    except UserError as error:
        result = replace(result, detail=str(error))
    except Exception as error:
        result = replace(result, detail=blame.told(error, cell, store))
    facts = provenance(device=_device_name(job.device), threads=torch.get_num_threads(), started=started)
    facts["vector_unit"] = torch.backends.cpu.get_cpu_capability()
    notices = {"notices": list(store.warnings)} if store.warnings else {}
    grown = fit_growth(meter.accounting.sizes())
    growth = {} if grown is None else {"state_growth": grown.to_json()}
    result = replace(result, usage=meter.usage, provenance={**facts, **result.provenance, **growth, **notices})
    store.write_record(result, samples)
    return result


@dataclass(frozen=True, slots=True)
class _Work:
    """A cell at work: what its model is made of, its task and data, where results go, who counts and who is told."""

    parts: Parts
    task: Task
    library: Library
    backbones: Backbones
    store: Store
    meter: Meter
    say: Say


def _begin(job: Job, store: Store, meter: Meter, say: Say) -> _Work:
    library = Library(job.data, job.cache, stand_ins=job.stand_ins, hub=job.hub, notice=store.warn)
    backbones = Backbones(library, job.cache, hub=job.hub, notice=store.warn)
    parts, task = gather(job.cell.training, backbones, job.device), make_task(job.cell.task)
    refuse_changed(job.cell, task, parts.loaded.card, library)
    return _Work(parts, task, library, backbones, store, meter, say)


def _evaluate(work: _Work, blank: Record) -> tuple[Record, pd.DataFrame]:
    cell, parts, meter, task = blank.cell, work.parts, work.meter, work.task
    trained = _locked(work)
    model = parts.scored(trained.model, cell.scored_with)
    _count_parameters(model, parts.recipe, meter.usage)
    episodes = list(task.episodes(work.library, cell.limit))
    rows: list[Row] = []
    status, detail = "ok", ""
    encode = parts.loaded.encode
    try:
        with meter.phase("eval"):
            observe(
                model,
                episodes,
                encode,
                seed=cell.training.seed,
                controls=cell.controls,
                watcher=meter,
                progress=lambda done, total: work.say("eval", done, total),
                sink=rows,
                decode=encode.decode,
            )
    except BudgetExceeded as error:
        if not rows:
            raise
        status, detail = "over_budget", str(error)  # what was observed until then is kept
    samples = pd.DataFrame(rows)
    meter.usage.scored_tokens = int(samples.loc[samples["control"] == "", "tokens"].sum())
    released = parts.pretrained is not None
    metrics = tuple(_mark_look_ahead(e, model.traits.look_ahead, released) for e in task.metrics(judged(task, samples)))
    if fault := unsound(metrics):
        raise NotFinite(f"non-finite: {fault}")
    used = meter.usage
    learned = judge(
        task.headline_rows(judged(task, samples)),
        task.headline,
        trained=trained.ended_by != "none",
        has_memory=bool(used.state_bytes or used.state_host_bytes or used.state_disk_bytes),
        pretrained=released,
    )
    facts = {
        "curve": trained.curve[:: max(1, len(trained.curve) // 200)],
        "look_ahead": model.traits.look_ahead,
        "segment": model.traits.segment,
        "episodes": len(episodes),
        "expected_retention": expected_shares(model.expected_retention, samples),
        **({} if parts.pretrained is None else {"pretrained": parts.pretrained.release.hashes}),
    }
    levels = dict(task.levels(work.library))
    done = replace(
        blank, status=status, detail=detail, metrics=metrics, learned=learned, levels=levels, provenance=facts
    )
    return done, samples


def _locked(work: _Work) -> Trained:
    """The trained model; of several cells that need the same training one trains and the others wait."""
    with work.store.lock(work.parts.training.key):
        return _trained(work)


def _trained(work: _Work) -> Trained:
    """The model as released, from its checkpoint if another task has trained it, else trained now."""
    parts, meter = work.parts, work.meter
    folder = work.store.checkpoint_folder(parts.training.key)
    found = parts.released() or parts.kept(folder, meter.usage, work.store.warn)
    if found is not None:
        _check_added(found.model, meter)
        return found
    if untrained(parts.training.budget, parts.recipe):
        begun = parts.begun()
        _check_added(begun, meter)
        return Trained(begun, [], "none")
    _check_added(parts.build(parts.config), meter)
    if parts.cls.frozen_backbone and parts.whole:
        _train_backbone(work)
    plan = work.task.plan(work.library, pretrained=parts.loaded.card.pretrained)
    work.say("data", 0, 1)
    corpus = work.task.corpus(work.library, plan, parts.loaded.encode)
    with meter.phase("train"):
        trained = train(
            parts.build,
            parts.config,
            parts.recipe,
            corpus,
            meter,
            seed=parts.training.seed,
            progress=lambda done, total: work.say("train", done, total),
        )
    if trained.curve:
        save_checkpoint(folder, trained, parts.recipe, parts.training, meter.usage, whole=parts.whole)
    return trained


def load_trained(job: Job, notice: Notice) -> tuple[MemoryModel[Any], Loaded]:
    """The model of a cell as it is scored, from its checkpoint or trained now (`notice` as of `run_cell`).

    Raises:
        UserError, BudgetExceeded: as a cell's own evaluation would.
    """
    torch.set_num_threads(job.threads)
    meter = Meter(job.cell.training.budget, torch.device(job.device))
    work = _begin(job, Store(job.out, notice), meter, lambda *_: None)
    return work.parts.scored(_locked(work).model, job.cell.scored_with), work.parts.loaded


def _train_backbone(work: _Work) -> None:
    """Train a backbone that starts untrained before a method freezes it: as the window alone is, on the same data.

    It is charged to the method, and shared with the window's own cell where that has been trained already.
    """
    parts = work.parts
    window = plugins.load("models", WINDOW)
    config = asdict(window.fit(parts.loaded.card, parts.training.budget))
    first = replace(parts.training, model=Choice(WINDOW, window.version, config))
    spent = work.meter.another()
    _locked(replace(work, parts=over(first, parts.loaded, work.backbones, None, parts.device), meter=spent))
    work.meter.charge_training(spent.usage)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else device


def _count_parameters(model: MemoryModel[Any], recipe: Recipe, usage: Usage) -> None:
    usage.added_parameters = model.added_parameters()
    usage.adapter_parameters = sum(p.numel() for p in model.adapter_parameters().values())
    plain = sum(p.numel() for p in model.backbone.parameters()) - usage.adapter_parameters
    usage.parameters = plain + usage.added_parameters
    trained = trained_parameters(model, recipe) if usage.train_steps > 0 else {}
    usage.trained_parameters = sum(p.numel() for p in trained.values())


def _refused(meter: Meter) -> str:
    """The detail of a cell that was refused memory before it had it."""
    return str(BudgetExceeded("device_bytes", meter.budget.device_bytes, None, meter.where))


def _check_added(model: MemoryModel[Any], meter: Meter) -> None:
    """Refuse a method that adds too many parameters, whether it is still to be trained, was before or never is."""
    added, allowed = model.added_parameters(), meter.budget.added_parameters
    meter.usage.added_parameters = added
    if allowed is not None and added > allowed:
        raise BudgetExceeded("added_parameters", allowed, added, "the start")


def _mark_look_ahead(estimate: Estimate, look_ahead: int, pretrained: bool = False) -> Estimate:
    """Numbers of a model that looks ahead or came trained say so in their slice, so that they are no headline."""
    return replace(estimate, slice=marked(estimate.slice, look_ahead, pretrained))


def prepare(job: Job, say: Say, notice: Notice) -> None:
    """Train or convert the cell's backbone so that the cells themselves find it ready."""
    library = Library(job.data, job.cache, stand_ins=job.stand_ins, hub=job.hub, notice=notice)
    say("backbone", 0, 1)
    Backbones(library, job.cache, hub=job.hub, notice=notice).prepare(job.cell.training.backbone.name)
    say("backbone", 1, 1)


def main(arguments: list[str]) -> int:
    """Entry of the process: ``JOB.json`` or ``--prepare JOB.json``."""
    only_prepare, path = arguments[0] == "--prepare", Path(arguments[-1])
    job = Job.from_json(json.loads(path.read_text(encoding="utf-8")))
    torch.set_num_threads(job.threads)

    def write(**told: str | int) -> None:
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()

    def say(phase: str, done: int, total: int) -> None:
        write(phase=phase, done=done, total=total)

    def notice(sentence: str) -> None:
        write(notice=sentence)

    if only_prepare:
        try:
            prepare(job, say, notice)
        except UserError as error:  # its last line is shown to the user
            sys.stderr.write(f"{error}\n")
            return 1
        return 0
    return 0 if run_cell(job, say, notice).status in ("ok", "over_budget") else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
