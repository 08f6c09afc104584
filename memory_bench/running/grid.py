"""From names to cells: what is to be run, what is skipped and why. Every mistake is found before anything trains."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from memory_bench import plugins
from memory_bench.backbone.outline import outline
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.cell import Cell, Choice, Training, digest
from memory_bench.data.library import Library
from memory_bench.driver.train import adapts
from memory_bench.episode import Task
from memory_bench.errors import UserError, unknown
from memory_bench.recipe import Recipe, find_recipe
from memory_bench.running.recipes import (
    beside_adapters,
    check_adapters,
    check_ends,
    choose_recipe,
    together,
    usual_recipe,
)
from memory_bench.zoo.compared import check_agreement
from memory_bench.zoo.named import Backbones
from memory_bench.zoo.pretrained import match

WINDOW = "truncation"
BACKBONE = "backbone"  # whose settings are the backbone's
# What every comparison needs: the window, and the cheapest memory, trained equally.
CONTROLS = (WINDOW, "xl-cache")
TRAIN, TEST = "train.", "test."
BRACKETS = re.compile(r"([^\[\]]+?)(?:\[(.*)\])?")  # a name, and what is in the brackets behind it


@dataclass(frozen=True, slots=True)
class Request:
    """A run as asked for.

    Attributes:
        models: names, each possibly with options: ``hmt[recall_query=current-half]``. Options ``train.…`` change the
            recipe for this model (``rmt[train.bptt=1]``), options ``test.…`` the model once it is trained
            (``memorizing[slots=256,test.slots=1024]``).
        tasks: names.
        backbone: name, folder or hub id.
        budget: limits.
        seeds: of the trainings.
        limits: documents or questions by task; ``""`` is for those that are not named. None of either: all.
        settings: options by plug-in name (``--set hmt.segment=64``).
        controls: also run the models a comparison needs, and the controls inside each cell.
        processes: that train each model together.
    """

    models: tuple[str, ...]
    tasks: tuple[str, ...]
    backbone: str
    budget: Budget
    seeds: tuple[int, ...]
    limits: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    controls: bool = True
    processes: int = 1


@dataclass(frozen=True, slots=True)
class Loading:
    """How models on the backbone are loaded and trained: ``--set backbone.dtype=bfloat16``.

    Attributes:
        dtype: of weights, training and evaluation.
        recipe: instead of the backbone's own (`memory_bench.recipe`), for every model alike; a task's own curriculum
            gives way only to another that has its own number of steps.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    recipe: str = ""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A pair that cannot work, with the reason in a sentence."""

    model: str
    task: str
    reason: str


@dataclass(frozen=True, slots=True)
class Grid:
    """All cells of a run, asked ones first, and the pairs that are skipped."""

    cells: tuple[Cell, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A model as asked for; of its options, ``train.…`` change its recipe and ``test.…`` the trained model."""

    name: str
    options: Mapping[str, Any]
    role: str
    label: str

    def part(self, prefix: str) -> dict[str, Any]:
        """The options that begin with `prefix`, without it; those with neither prefix for the empty one."""
        if prefix:
            return {k.removeprefix(prefix): v for k, v in self.options.items() if k.startswith(prefix)}
        return {k: v for k, v in self.options.items() if not k.startswith((TRAIN, TEST))}


def split_names(text: str) -> tuple[str, ...]:
    """Comma-separated names; commas inside brackets belong to a name's options."""
    return tuple(part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip())


def _parse_model(text: str) -> tuple[str, dict[str, Any]]:
    match = BRACKETS.fullmatch(text)
    if match is None:
        raise UserError(f"Cannot read the model '{text}'; options go into brackets: hmt[recall=false].")
    options: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in (match[2] or "").split(","))):
        if "=" not in part:
            raise UserError(f"Cannot read the option '{part}' of {match[1]}; write option=value.")
        key, value = part.split("=", 1)
        options[key.strip()] = plugins.parse_value(value.strip())
    return match[1], options


def _short(name: str) -> str:
    """A model's name in tables and settings; of ``file.py:Class`` the class in lower case.

    Where the class is called like something that is installed, the file is named too: ``rmt@my-file``.
    """
    if ".py:" not in name:
        return name
    path, _, attribute = name.rpartition(":")
    short = attribute.lower()
    taken = {other.partition("@")[0] for kind in ("models", "tasks") for other in plugins.installed(kind)}
    return f"{short}@{Path(path).stem}" if short in taken | {BACKBONE} else short


def _names(models: Iterable[str]) -> dict[str, str]:
    """The short name of every model asked for; of two files with a class of the same name, with the file's.

    Raises:
        UserError: two would still be called the same.
    """
    own = {name: _short(name) for name in models}
    files = {name: (Path(name.rpartition(":")[0]).resolve(), name.rpartition(":")[2]) for name in own if ".py:" in name}
    for name, place in files.items():
        if any(own[other].partition("@")[0] == own[name] and files[other] != place for other in files):
            own = {n: f"{s}@{files[n][0].stem}" if n in files and s == own[name] else s for n, s in own.items()}
    for name, place in files.items():
        for other in own:
            if own[other] == own[name] and files.get(other) != place:
                raise UserError(
                    f"{name} and {other} would both be called {own[name]}: give a file or class another name."
                )
    return own


def _plain(value: Any) -> str:
    """An option's value as it is written in a command."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _wanted(request: Request) -> list[_Wanted]:
    """The models asked for, then the controls that are not among them."""
    wanted: list[_Wanted] = []
    parsed = [_parse_model(text) for text in request.models]
    shorts = _names(name for name, _ in parsed)
    for name, options in parsed:
        cls, short = plugins.load("models", name), shorts[name]
        label = short if not options else f"{short}[{','.join(f'{k}={_plain(v)}' for k, v in options.items())}]"
        wanted.append(_Wanted(name, {**request.settings.get(short, {}), **options}, "asked", label))
        if request.controls:
            # A part of a pretrained model cannot be taken away: it was trained with it.
            ablations = {} if wanted[-1].options.get("checkpoint") else cls.ablations
            for title, change in ablations.items():
                ablated = {**request.settings.get(short, {}), **options, **change}
                wanted.append(_Wanted(name, ablated, "control", f"{label} ({title})"))
    if request.controls:
        installed = plugins.installed("models")
        wanted += [_Wanted(n, request.settings.get(n, {}), "control", n) for n in CONTROLS if n in installed]
    unique: dict[str, _Wanted] = {}
    for w in wanted:
        same = unique.setdefault(w.label, w)
        if dict(same.options) != dict(w.options):
            raise UserError(f"{w.label} would stand for two rows, with {same.options} and {w.options}: ask for one.")
    return sorted(unique.values(), key=lambda w: w.role)


def plan_grid(request: Request, library: Library, backbones: Backbones) -> Grid:
    """The cells of a request.

    Raises:
        UserError: an unknown name or option, data or a backbone that cannot be had, or nothing left to run.
    """
    _check_settings(request)
    wanted = _wanted(request)
    identities = {w.name: plugins.identity("models", w.name) for w in wanted}
    resolved = backbones.resolve(request.backbone)
    loading: Loading = plugins.configure(BACKBONE, Loading(), request.settings.get(BACKBONE, {}))
    cells: list[Cell] = []
    skipped: list[Skipped] = []
    pretrained: dict[str, str] = {}
    for task_name in request.tasks:
        task, options = _make_task(task_name, request)
        limit = request.limits.get(task_name, request.limits.get(""))
        chosen = backbones.card(resolved)
        plan = plugins.asked(task_name, task.plan, library, pretrained=chosen.pretrained)
        card = backbones.card(plan.backbone) if plan.backbone else chosen
        usual = usual_recipe(plan.recipe, loading.recipe, card)
        check_ends(find_recipe(usual), request.budget)
        label, revision = plugins.asked(task_name, evaluated, task, library)
        code = plugins.identity("tasks", task_name)  # a task makes its training data, too
        task_choice = Choice(task_name, task.version, {**options, "data": label}, revision, *code)
        corpus = Choice(plan.corpus, plan.version, {}, trained_on(plan.corpus, task, library), *code)
        for w in wanted:
            cls = plugins.load("models", w.name)
            if card.family not in cls.families:
                families = ", ".join(cls.families)
                reason = f"{w.label} works on {families} backbones; {card.name} is of the {card.family} family"
                skipped.append(Skipped(w.label, task_name, reason))
                continue
            recipe, way = _recipe(w, usual, request.budget)
            revision, own = "", w.part("")
            adapted = adapts(request.budget, way, cls) and not own.get("checkpoint")
            left = beside_adapters(request.budget, way, card) if adapted else request.budget
            fitted = plugins.asked(w.label, cls.fit, card, left)
            if checkpoint := str(own.get("checkpoint") or ""):
                found = match(w.label, cls, checkpoint, card.name, backbones)
                config = found.config(w.label, fitted, own, loading.dtype)
                plugins.configure(w.label, config, w.part(TEST))
                revision = found.release.revision
                pretrained[w.label] = checkpoint
                backbones.check(card.name, filled=False)
            elif backbones.holds_release(card.name):
                reason = f"{card.name} is a released memory model, which is no plain backbone for {w.label}"
                skipped.append(Skipped(w.label, task_name, reason))
                continue
            else:
                backbones.check(card.name)
                config = plugins.configure(w.label, cls.unadapted(fitted) if adapted else fitted, own)
                if adapted:
                    check_adapters(w.label, cls, config, way)
                _check_options(w, cls, config, card)
            _check_helpers(w.label, plugins.asked(w.label, cls.helpers, config), backbones)
            for seed in request.seeds:
                training = Training(
                    model=Choice(w.name, cls.version, plugins.plain(config), revision, *identities[w.name]),
                    backbone=Choice(card.name, config={"dtype": loading.dtype}, revision=card.revision),
                    corpus=corpus,
                    recipe=recipe,
                    budget=request.budget,
                    seed=seed,
                )
                training = together(training, request.processes)
                cells.append(
                    Cell(training, task_choice, limit, request.controls, w.role, w.label, scored_with=w.part(TEST))
                )
    if not any(cell.role == "asked" for cell in cells):
        reasons = "; ".join(dict.fromkeys(s.reason for s in skipped)) or "no models or tasks were given"
        raise UserError(f"Nothing to run: {reasons}.")
    _check_backbones(cells, backbones, loading.dtype)
    for label, checkpoint in pretrained.items():
        backbones.report(
            f"{label} is loaded from {checkpoint} with its own weights (pretrained): it is not trained under this "
            "budget, not ranked and not compared."
        )
    once = {cell.key: cell for cell in reversed(cells)}  # the first of those that are the same
    return Grid(tuple(cell for cell in cells if once[cell.key] is cell), tuple(skipped))


def evaluated(task: Task, library: Library) -> tuple[str, str]:
    """Label and revision of everything that a task evaluates on."""
    sources = [task.data(library), *(library.source(need) for need in task.beside)]
    if len(sources) == 1:
        return sources[0].label, sources[0].revision
    return " in ".join(s.label for s in sources), digest([s.revision for s in sources])


def trained_on(corpus: str, task: Task, library: Library) -> str:
    """Revision of the data that a training corpus is made of."""
    return (library.source("books") if corpus == "books" else task.data(library)).revision


def refuse_changed(cell: Cell, task: Task, card: BackboneCard, library: Library) -> None:
    """Refuse to run a cell whose things are no longer what they were when it was planned.

    Raises:
        UserError: naming what has changed.
    """
    training = cell.training
    for what, same in (
        (f"backbone {card.name}", card.revision == training.backbone.revision),
        (f"model {training.model.name}", plugins.identity("models", training.model.name) == training.model.identity),
        (f"task {cell.task.name}", plugins.identity("tasks", cell.task.name) == cell.task.identity),
        (f"data of {cell.task.name}", evaluated(task, library)[1] == cell.task.revision),
        ("training data", trained_on(training.corpus.name, task, library) == training.corpus.revision),
    ):
        if not same:
            raise UserError(f"The files of the {what} have changed since the run was planned: run the command again.")


def _check_backbones(cells: Sequence[Cell], backbones: Backbones, dtype: str) -> None:
    """Every backbone computes here what it computes elsewhere, for inputs twice as long as a step at least."""
    for name in dict.fromkeys(cell.training.backbone.name for cell in cells):
        options = [cell.training.model.config for cell in cells if cell.training.backbone.name == name]
        check_agreement(backbones, name, dtype, 2 * max(int(o.get("segment") or 0) for o in options))


def _check_settings(request: Request) -> None:
    """Every ``--set`` and ``--limit`` must concern something that runs, a budget's options some task that there is."""
    for task in request.budget.tasks:
        if ":" not in task and task not in (tasks := {*request.tasks, *plugins.installed("tasks")}):
            raise unknown(f"task in the budget '{request.budget.name}'", task, tasks)
    for task in request.limits:
        if task and task not in request.tasks:
            raise unknown("task in --limit", task, request.tasks)
    models = set(_names(_parse_model(m)[0] for m in request.models).values())
    models |= set(CONTROLS) if request.controls else set()
    for owner in request.settings:
        if owner not in models | set(request.tasks) | {BACKBONE}:
            known = ", ".join([*sorted(models | set(request.tasks)), BACKBONE])
            raise UserError(f"--set {owner}.…: '{owner}' is no model or task of this run ({known}).")
        if owner in models & {*request.tasks, BACKBONE}:
            raise UserError(f"--set {owner}.…: '{owner}' is a model and also a task or the backbone of this run.")


def _check_options(wanted: _Wanted, cls: Any, config: Any, card: BackboneCard) -> None:
    """Options that a backbone of this shape cannot have are refused now, not by every cell; what `fit` says fits."""
    changes = wanted.part(TEST)
    scored = plugins.configure(wanted.label, config, changes)
    if not wanted.options or cls.helpers(config):
        return
    try:
        built = [cls(outline(card), c, torch.Generator()) for c in ((config, scored) if changes else (config,))]
    except UserError as error:
        raise UserError(f"{wanted.label} on {card.name}: {error}") from error
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in built]
    if shapes[0] != shapes[-1]:
        raise UserError(
            f"{wanted.label}: {', '.join(changes)} changes the weights, so it cannot change after the training."
        )


def _recipe(wanted: _Wanted, usual: str, budget: Budget) -> tuple[Choice, Recipe]:
    """The recipe of one model: the usual one with its ``train.`` options, which the choice then holds."""
    changes = wanted.part(TRAIN)
    return choose_recipe(changes.pop("recipe", usual), changes, budget)


def _check_helpers(label: str, helpers: Mapping[str, str], backbones: Backbones) -> None:
    """What a model needs beside its backbone must be here, or be had now."""
    for name, instead in helpers.items():
        try:
            backbones.helper_folder(name)
        except UserError as error:
            raise UserError(f"{label} needs {name}, or else choose {instead}: {error}") from error


def _make_task(name: str, request: Request) -> tuple[Task, dict[str, Any]]:
    cls = plugins.load("tasks", name)
    changes = {**request.budget.tasks.get(name, {}), **request.settings.get(name, {})}
    config = plugins.configure(name, plugins.asked(name, cls.Config), changes)
    return plugins.asked(name, cls, config), asdict(config)


def make_task(choice: Choice) -> Task:
    """The task of a cell."""
    cls = plugins.load("tasks", choice.name)
    options = {k: v for k, v in choice.config.items() if k != "data"}
    task: Task = cls(plugins.configure(choice.name, cls.Config(), options))
    return task
