"""Runs one cell in a process of its own: the only file that joins model, backbone, task and budget.

`python -m memory_bench.running.worker JOB.json` reads a job, writes the cell's record into the store, and prints
progress as JSON lines. Whatever happens is a record: a limit that was passed is ``over_budget``, an exception is
``failed``.
"""

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from memory_bench import plugins
from memory_bench.backbone.small import CLOSED
from memory_bench.budget import Budget, Usage
from memory_bench.cell import Cell, Choice, from_json, to_json
from memory_bench.data.library import Library
from memory_bench.driver.asking import Row
from memory_bench.driver.checkpoints import load_checkpoint, save_checkpoint
from memory_bench.driver.meter import Meter
from memory_bench.driver.observe import observe
from memory_bench.driver.train import Trained, train, trained_parameters, untrained
from memory_bench.episode import Estimate, Task
from memory_bench.errors import BudgetExceeded, UserError
from memory_bench.protocol import MemoryModel
from memory_bench.recipe import Recipe
from memory_bench.record import Record, now, provenance
from memory_bench.report.rows import marked
from memory_bench.running.grid import WINDOW, make_recipe, make_task
from memory_bench.statistics.learned import judge
from memory_bench.statistics.pairing import judged
from memory_bench.statistics.retention import expected_shares
from memory_bench.store import Store
from memory_bench.zoo.named import Backbones, Loaded
from memory_bench.zoo.pretrained import Pretrained, rematch

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


def run_cell(job: Job, say: Say) -> Record:
    """Train (or load) the cell's model, evaluate it, write the record. Never raises for what a cell can do wrong."""
    cell, store = job.cell, Store(job.out)
    started = now()
    meter = Meter(cell.training.budget, torch.device(job.device))
    samples: pd.DataFrame | None = None
    result = Record(
        cell=cell, status="failed", detail="", metrics=(), usage=meter.usage, provenance={}, learned=None, levels={}
    )
    try:
        result, samples = _evaluate(job, store, meter, say, result)
    except BudgetExceeded as error:
        result = replace(result, status="over_budget", detail=str(error))
    except (MemoryError, torch.OutOfMemoryError):
        meter.read_memory()
        result = replace(result, status="over_budget", detail=f"device_bytes@{meter.where} (out of memory)")
    except UserError as error:
        result = replace(result, detail=str(error))
    except Exception as error:
        traceback.print_exc()
        result = replace(result, detail=f"{type(error).__name__}: {error}")
    facts = provenance(device=_device_name(job.device), threads=job.threads, started=started)
    result = replace(result, usage=meter.usage, provenance={**facts, **result.provenance})
    store.write_record(result, samples)
    return result


def _evaluate(job: Job, store: Store, meter: Meter, say: Say, blank: Record) -> tuple[Record, pd.DataFrame]:
    cell, training = job.cell, job.cell.training
    ready = _make_ready(job, store, meter, say)
    library, loaded, task, pretrained = ready.library, ready.loaded, ready.task, ready.pretrained
    trained, model, recipe = ready.trained, ready.model, make_recipe(training.recipe)
    _count_parameters(model, recipe, meter.usage)
    episodes = list(task.episodes(library, cell.limit))
    rows: list[Row] = []
    status, detail = "ok", ""
    try:
        with meter.phase("eval"):
            observe(
                model,
                episodes,
                loaded.encode,
                seed=training.seed,
                controls=cell.controls,
                watcher=meter,
                progress=lambda done, total: say("eval", done, total),
                sink=rows,
                decode=loaded.encode.decode,
            )
    except BudgetExceeded as error:
        if not rows:
            raise
        status, detail = "over_budget", str(error)  # what was observed until then is kept
    samples = pd.DataFrame(rows)
    meter.usage.scored_tokens = int(samples.loc[samples["control"] == "", "tokens"].sum())
    released = pretrained is not None
    metrics = tuple(_mark_look_ahead(e, model.traits.look_ahead, released) for e in task.metrics(judged(task, samples)))
    learned = judge(
        task.headline_rows(judged(task, samples)),
        task.headline,
        trained=trained.ended_by != "none",
        has_memory=bool(meter.usage.state_bytes),
        pretrained=released,
    )
    facts = {
        "curve": trained.curve[:: max(1, len(trained.curve) // 200)],
        "look_ahead": model.traits.look_ahead,
        "segment": model.traits.segment,
        "episodes": len(episodes),
        "expected_retention": expected_shares(model.expected_retention, samples),
        **({} if pretrained is None else {"pretrained": pretrained.release.hashes}),
    }
    levels = dict(task.levels(library))
    done = replace(
        blank, status=status, detail=detail, metrics=metrics, learned=learned, levels=levels, provenance=facts
    )
    return done, samples


def _trained_model(
    job: Job,
    store: Store,
    meter: Meter,
    say: Say,
    library: Library,
    loaded: Loaded,
    task: Task,
    pretrained: Pretrained | None,
) -> Trained:
    """The cell's model: as released, from its checkpoint if another task has trained it, else trained now."""
    training, recipe = job.cell.training, make_recipe(job.cell.training.recipe)
    cls = plugins.load("models", training.model.name)
    base = plugins.configure(training.model.name, cls.fit(loaded.card, training.budget), training.model.config)
    Backbones(library, job.cache, hub=job.hub).equip(loaded, cls.helpers(base))

    def build(config: Any) -> MemoryModel[Any]:
        rng = torch.Generator().manual_seed(training.seed + 1)
        model: MemoryModel[Any] = cls(loaded.backbone, config, rng).to(job.device)
        return model

    if pretrained is not None:
        model = build(base)
        pretrained.load_into(model, base)
        return Trained(model.eval().requires_grad_(False), [], "pretrained")
    folder, fresh = store.checkpoint_folder(training.key), loaded.card.name in CLOSED
    found = load_checkpoint(folder, build, base, meter.usage, whole=fresh)
    if found is not None:
        return found
    if untrained(training.budget, recipe):
        return Trained(build(base).eval().requires_grad_(False), [], "none")
    _check_added(build(base), meter.budget)
    if cls.frozen_backbone and fresh:
        _train_backbone(job, store, meter, say, library, loaded, task)
    plan = task.plan(library, pretrained=loaded.card.pretrained)
    say("data", 0, 1)
    corpus = task.corpus(library, plan, loaded.encode)
    with meter.phase("train"):
        trained = train(
            build,
            base,
            recipe,
            corpus,
            meter,
            seed=training.seed,
            progress=lambda done, total: say("train", done, total),
        )
    if trained.curve:
        save_checkpoint(folder, trained, recipe, training, meter.usage, whole=fresh)
    return trained


def load_trained(job: Job) -> tuple[MemoryModel[Any], Loaded]:
    """The model of a cell as it is scored, from its checkpoint or trained now, with its backbone.

    Raises:
        UserError, BudgetExceeded: as a cell's own evaluation would.
    """
    meter = Meter(job.cell.training.budget, torch.device(job.device))
    ready = _make_ready(job, Store(job.out), meter, lambda *_: None)
    return ready.model, ready.loaded


@dataclass(frozen=True, slots=True)
class _Ready:
    """What a cell's evaluation starts from; `trained` is how the training ended, `model` what is scored."""

    library: Library
    loaded: Loaded
    task: Task
    pretrained: Pretrained | None
    trained: Trained
    model: MemoryModel[Any]


def _make_ready(job: Job, store: Store, meter: Meter, say: Say) -> _Ready:
    cell, training = job.cell, job.cell.training
    library = Library(job.data, job.cache, stand_ins=job.stand_ins, hub=job.hub)
    backbones = Backbones(library, job.cache, hub=job.hub)
    pretrained = rematch(training, backbones)
    loaded = backbones.load(
        training.backbone.name,
        seed=training.seed,
        device=job.device,
        dtype=getattr(torch, training.backbone.config["dtype"]),
        brought=None if pretrained is None else pretrained.own,
    )
    task = make_task(cell.task)
    with store.lock(training.key):
        trained = _trained_model(job, store, meter, say, library, loaded, task, pretrained)
    return _Ready(library, loaded, task, pretrained, trained, as_scored(trained.model, cell, loaded))


def as_scored(model: MemoryModel[Any], cell: Cell, loaded: Loaded) -> MemoryModel[Any]:
    """The trained model with the options the cell changes after training; the weights are the same."""
    if not cell.scored_with:
        return model
    cls, asked = type(model), cell.training.model
    base = cls.fit(loaded.card, cell.training.budget)
    config = plugins.configure(asked.name, base, {**asked.config, **cell.scored_with})
    scored: MemoryModel[Any] = cls(loaded.backbone, config, torch.Generator().manual_seed(0))
    scored.to(loaded.backbone.device).load_state_dict(model.state_dict())
    return scored.eval().requires_grad_(False)


def _train_backbone(
    job: Job, store: Store, meter: Meter, say: Say, library: Library, loaded: Loaded, task: Task
) -> None:
    """Train a backbone that starts untrained before a method freezes it: as the window alone is, on the same data.

    It is charged to the method, and shared with the window's own cell where that has been trained already.
    """
    training = job.cell.training
    window = plugins.load("models", WINDOW)
    config = asdict(window.fit(loaded.card, training.budget))
    first = replace(training, model=Choice(WINDOW, window.version, config, plugins.revision(WINDOW)))
    spent = Meter(training.budget, torch.device(job.device))
    window_job = replace(job, cell=replace(job.cell, training=first))
    with store.lock(first.key):
        _trained_model(window_job, store, spent, say, library, loaded, task, None)
    meter.charge_training(spent.usage)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else device


def _count_parameters(model: MemoryModel[Any], recipe: Recipe, usage: Usage) -> None:
    usage.added_parameters = model.added_parameters()
    usage.parameters = sum(p.numel() for p in model.backbone.parameters()) + usage.added_parameters
    trained = trained_parameters(model, recipe) if usage.train_steps > 0 else {}
    usage.trained_parameters = sum(p.numel() for p in trained.values())


def _check_added(model: MemoryModel[Any], budget: Budget) -> None:
    """Refuse a method that adds too many parameters before it is trained."""
    added = model.added_parameters()
    if budget.added_parameters is not None and added > budget.added_parameters:
        raise BudgetExceeded("added_parameters", f"{added} added")


def _mark_look_ahead(estimate: Estimate, look_ahead: int, pretrained: bool = False) -> Estimate:
    """Numbers of a model that looks ahead or came trained say so in their slice, so that they are no headline."""
    return replace(estimate, slice=marked(estimate.slice, look_ahead, pretrained))


def prepare(job: Job, say: Say) -> None:
    """Train or convert the cell's backbone so that the cells themselves find it ready."""
    library = Library(job.data, job.cache, stand_ins=job.stand_ins, hub=job.hub)
    say("backbone", 0, 1)
    Backbones(library, job.cache, hub=job.hub).prepare(job.cell.training.backbone.name)
    say("backbone", 1, 1)


def main(arguments: list[str]) -> int:
    """Entry of the process: ``JOB.json`` or ``--prepare JOB.json``."""
    only_prepare, path = arguments[0] == "--prepare", Path(arguments[-1])
    job = Job.from_json(json.loads(path.read_text(encoding="utf-8")))
    torch.set_num_threads(job.threads)

    def say(phase: str, done: int, total: int) -> None:
        sys.stdout.write(json.dumps({"phase": phase, "done": done, "total": total}) + "\n")
        sys.stdout.flush()

    if only_prepare:
        try:
            prepare(job, say)
        except UserError as error:  # its last line is shown to the user
            sys.stderr.write(f"{error}\n")
            return 1
        return 0
    return 0 if run_cell(job, say).status in ("ok", "over_budget") else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
