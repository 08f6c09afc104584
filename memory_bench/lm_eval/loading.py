"""Which model lm-eval reads with: one that needs no training, or one that `memory-bench run` has trained.

A memory that a budget would train is never read with untrained: it is refused with the command that trains it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from memory_bench import plugins
from memory_bench.budget import Budget, Usage, load_budget
from memory_bench.cell import Cell, Choice, Training
from memory_bench.driver.train import trained_parameters, untrained
from memory_bench.errors import UserError, unknown
from memory_bench.files.artefacts import Notice
from memory_bench.protocol import MemoryModel
from memory_bench.recipe import find_recipe
from memory_bench.record import Record
from memory_bench.report.grouping import as_asked
from memory_bench.report.scorers import is_installed
from memory_bench.running.building import Parts, gather
from memory_bench.running.recipes import choose_recipe, default_recipe
from memory_bench.store import Store
from memory_bench.zoo.compared import check_agreement
from memory_bench.zoo.named import Backbones, Loaded
from memory_bench.zoo.pretrained import match


@dataclass(frozen=True, slots=True)
class Chosen:
    """A model to read with, and what it is.

    Attributes:
        model: in evaluation mode.
        loaded: its backbone and tokenizer.
        training: what it is, as a cell would name it; its key is part of the hash of `MemoryLM`.
        trained: ``trained``, ``nothing to train``, ``untrained`` (the budget has no training) or ``pretrained``.
        scored_with: options that were changed after the training.
        read: of a run, task to label and revision of the data that it read.
    """

    model: MemoryModel[Any]
    loaded: Loaded
    training: Training
    trained: str
    scored_with: dict[str, Any] = field(default_factory=dict)
    read: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def from_names(
    name: str,
    backbone: str,
    budget: str,
    options: Mapping[str, Any],
    backbones: Backbones,
    *,
    seed: int,
    dtype: str,
    device: str,
) -> Chosen:
    """A model as `memory-bench run` would build it, if it can be read with as it is.

    Raises:
        UserError: an unknown name or option, a pairing that cannot work, or memories that the budget would train.
    """
    cls = plugins.load("models", name)
    limits = _budget(budget, backbone, device)
    card = backbones.card(backbones.resolve(backbone))
    if card.family not in cls.families:
        families = ", ".join(cls.families)
        raise UserError(f"{name} works on {families} backbones; {card.name} is of the {card.family} family.")
    revision = ""
    config = cls.fit(card, limits)
    if checkpoint := str(options.get("checkpoint") or ""):
        own = match(name, cls, checkpoint, card.name, backbones)
        config = own.config(name, config, options, dtype)
        revision = own.release.revision
    else:
        config = plugins.configure(name, config, options)
    usual = find_recipe(default_recipe(card))
    plain = {"lora_rank": 0} if usual.lora_rank and limits.trains else {}  # here nothing is trained: nor are adapters
    recipe, _ = choose_recipe(usual.name, plain, limits)
    training = Training(
        model=Choice(name, cls.version, plugins.plain(config), revision, *plugins.identity("models", name)),
        backbone=Choice(card.name, config={"dtype": dtype}, revision=card.revision),
        corpus=Choice("none"),
        recipe=recipe,
        budget=limits,
        seed=seed,
    )
    return _chosen(_parts(training, backbones, device), Path(), backbones.notice)


def from_run(folder: Path, name: str, backbones: Backbones, *, seed: int | None, task: str, device: str) -> Chosen:
    """A model as a finished run trained it.

    Args:
        folder: of the run.
        name: a model's label on the board, or its name.
        backbones: with the data that the run used.
        seed: of the training; None: the run's only one, or else 0.
        task: it was trained for, where there are several trainings.
        device: where it goes.

    Raises:
        UserError: there is no such result, several, no checkpoint, or the backbone is another one now.
    """
    store = Store.open(folder)
    roles = store.run().get("grid", {}).get("roles", {})
    records = [as_asked(record, roles) for record in store.records()]
    cell = one_cell(records, folder, name, seed, task)
    training, released = cell.training, cell.training.model.config.get("checkpoint")
    if training.model.name != name and not is_installed("models", training.model.name):
        raise UserError(
            f"{name} of the run in {folder} is the model {training.model.name}, which is not installed, and a record "
            f"does not have a file imported: name it yourself with model={training.model.name}."
        )
    if not released and backbones.card(training.backbone.name).revision != training.backbone.revision:
        raise UserError(
            f"The backbone {training.backbone.name} here is not that of the run in {folder}: give the same data folder "
            "(data=DIR, or MEMORY_BENCH_DATA), or run it again."
        )
    if plugins.identity("models", training.model.name) != training.model.identity:
        raise UserError(f"The source of {training.model.name} is not that of the run in {folder}: run it again.")
    parts = _parts(training, backbones, device)
    chosen = _chosen(parts, store.checkpoint_folder(training.key), backbones.notice)
    tasks = (record.cell.task for record in records if record.cell.training.key == training.key)
    read = {t.name: (str(t.config.get("data") or t.name), t.revision) for t in tasks}
    model = parts.scored(chosen.model, cell.scored_with)
    return replace(chosen, model=model, scored_with=cell.scored_with, read=read)


def _budget(name: str, backbone: str, device: str) -> Budget:
    """The budget called `name`; by default what `memory-bench run` takes."""
    small, cuda = backbone == "tiny", device.startswith("cuda")
    return load_budget(name or ("cpu-minutes" if small else "gpu-minutes" if cuda else "cpu-smol"))


def one_cell(records: list[Record], folder: Path, name: str, seed: int | None, task: str) -> Cell:
    """A cell of a model in a run's records, which says how it was trained; see `from_run`."""
    found = [r for r in records if r.status in ("ok", "over_budget")]
    labels = {r.cell.label or r.cell.training.model.name for r in found}
    own = [r for r in found if name in ((r.cell.label,) if name in labels else (r.cell.training.model.name,))]
    if not own:
        raise unknown(f"model in the run {folder}", name, labels)
    tasks = list(dict.fromkeys(r.cell.task.name for r in own))
    if task and task not in tasks:
        raise unknown(f"task of {name} in the run {folder}", task, tasks)
    own = [r for r in own if not task or r.cell.task.name == task]
    seeds = sorted({r.cell.training.seed for r in own})
    wanted = seed if seed is not None else seeds[0]
    if wanted not in seeds:
        raise UserError(f"{name} has no seed {wanted} in the run {folder}; there are {', '.join(map(str, seeds))}.")
    trainings = {(r.cell.training.key, str(r.cell.scored_with)): r.cell for r in own if r.cell.training.seed == wanted}
    if len(trainings) > 1:
        names = " or ".join(sorted({f"task={cell.task.name}" for cell in trainings.values()}))
        raise UserError(f"{name} was trained {len(trainings)} times in the run {folder}: say which with {names}.")
    return next(iter(trainings.values()))


def _parts(training: Training, backbones: Backbones, device: str) -> Parts:
    """What the model is made of; its backbone computes here what it computes elsewhere."""
    check_agreement(backbones, training.backbone.name, training.backbone.config["dtype"])
    return gather(training, backbones, device)


def _chosen(parts: Parts, folder: Path, notice: Notice) -> Chosen:
    """The model of a training: as released, from the checkpoint in `folder`, or as it begins."""
    training, loaded = parts.training, parts.loaded
    released = parts.released()
    if released is not None:
        return Chosen(released.model, loaded, training, "pretrained")
    if folder.name and folder.exists():
        why: list[str] = []
        found = parts.kept(folder, Usage(), why.append)
        if found is None:
            raise UserError(f"In {folder.parent.parent}: {why[0]} Run it again with --force.")
        for sentence in why:
            notice(sentence)
        return Chosen(found.model, loaded, training, "trained")
    model = parts.begun()
    if not trained_parameters(model, parts.recipe):
        return Chosen(model, loaded, training, "nothing to train")
    if not untrained(training.budget, parts.recipe):
        raise UserError(_refusal(training, folder))
    return Chosen(model, loaded, training, "untrained")


def _refusal(training: Training, folder: Path) -> str:
    name, backbone, budget = training.model.name, training.backbone.name, training.budget.name
    if folder.name:
        return f"{name} was to be trained in this run, but its checkpoint {folder} is not there: run it with --force."
    return (
        f"{name} is trained under budget {budget}, and lm-eval trains nothing: first `memory-bench run --models {name} "
        f"--tasks pg19 --backbone {backbone} --budget {budget}`, then run=results/runs/latest,model={name} here."
    )
