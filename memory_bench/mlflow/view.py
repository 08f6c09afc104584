"""What MLflow shows of a run: names, parameters, tags, points and files, worked out from records alone.

A cell becomes a run with metrics, the folder of results their parent without any, so that no average mixes the two.
Metrics of a slice with a number are curves: MLflow's step is the distance, the position, or the tokens trained on.

==================================  ====================  =================================================
metric                              step                  what
==================================  ====================  =================================================
``accuracy``, ``bits_per_byte`` …   0                     of the whole task
``by_distance/accuracy`` …          the distance          of a slice ``distance=256``; likewise other axes
``by_label/accuracy/maybe`` …       0                     of a slice that is no number
``control/accuracy/wiped`` …        0                     with memory wiped, foreign; evidence in the prompt
``ci95/accuracy_low``, ``_high``    0                     interval of the number of the whole task; ``_n``
``train/loss``                      tokens read           nats per token, of the batch
``cost/train_seconds`` …            0                     what was spent; the unit is in the name
==================================  ====================  =================================================

Numbers that are no headline stand under ``look_ahead/`` and ``pretrained/``. A cell without a result has costs and tags
only. No MLflow is needed here.
"""

import hashlib
import json
import math
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from memory_bench.cell import Choice
from memory_bench.episode import Estimate
from memory_bench.files.artefacts import sha256
from memory_bench.record import STATUSES, Record
from memory_bench.report.rows import PRETRAINED, plain
from memory_bench.store import Store

VERSION = 1  # of the mapping; another one replaces every run that was written before
AXES = ("distance", "delay", "position", "length")
POINTS = 1000  # of a training curve: MLflow takes that many at once, and no screen shows more
TABLE = "samples.parquet"


@dataclass(frozen=True, slots=True)
class Point:
    """A metric's value at a step."""

    name: str
    value: float
    step: int = 0


@dataclass(frozen=True, slots=True)
class Dataset:
    """Data that a cell read; `use` is ``eval`` or ``train``."""

    name: str
    revision: str
    use: str
    tags: Mapping[str, str]


@dataclass(frozen=True)
class View:
    """One MLflow run.

    Attributes:
        name: in MLflow's tables and legends.
        params: what was asked.
        tags: what a person filters by; ``mb.key`` names the cell.
        points: metrics.
        datasets: that were read.
        files: (file, folder among the artifacts).
        started, finished: UTC, milliseconds since 1970; None where it is not known.
    """

    name: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    points: tuple[Point, ...] = ()
    datasets: tuple[Dataset, ...] = ()
    files: tuple[tuple[Path, str], ...] = ()
    started: int | None = None
    finished: int | None = None

    @cached_property
    def mark(self) -> str:
        """64 hexadecimal digits of everything a reader of MLflow would see, contents of the files included."""
        seen = asdict(replace(self, files=()))
        seen["files"] = [(path.name, folder, sha256(path)) for path, folder in self.files]
        return hashlib.sha256(json.dumps([VERSION, seen], sort_keys=True).encode()).hexdigest()


def cell_view(record: Record, store: Store, run: str) -> View:
    """A cell's run.

    Args:
        record: of the cell.
        store: that holds its files and the grid, which says under what name and in what role the cell was asked for.
        run: name of the run, which the cell is tagged with.
    """
    grid, cell = store.run().get("grid", {}), record.cell
    role, label = grid.get("roles", {}).get(record.key, (cell.role, cell.label))
    cell = replace(cell, role=role, label=label)
    folder = store.cell_folder(record.key)
    files = [folder / name for name in ("record.json", TABLE) if (folder / name).is_file()]
    tags = {"mb.kind": "cell", "mb.run": run, "mb.key": record.key, "mb.role": role, **_outcome(record)}
    tags["mb.label"] = label or cell.training.model.name
    if folder / TABLE in files:
        tags["mb.samples_sha256"] = sha256(folder / TABLE)
        tags["mlflow.loggedArtifacts"] = json.dumps([{"path": TABLE, "type": "table"}])  # so `load_table` finds it
    return View(
        name=cell.title + (" (control)" if role == "control" else ""),
        params=_params(record),
        tags={name: value for name, value in tags.items() if value},
        points=tuple(_points(record)),
        datasets=tuple(_datasets(record, grid.get("data", {}))),
        files=tuple((path, "") for path in files),
        started=_milliseconds(record.provenance.get("started")),
        finished=_milliseconds(record.provenance.get("finished")),
    )


def run_view(store: Store, run: str, cells: Sequence[View], table: Path | None) -> View:
    """The parent of all cells: the grid as asked, the report, no metrics.

    Args:
        store: of the run.
        run: its name.
        cells: the views of its cells.
        table: the leaderboard's long form as Parquet.
    """
    found = store.run()
    grid = found.get("grid", {})
    request = grid.get("request", {})
    asked = {**request, "budget": request.get("budget", {}).get("name", "")}
    states = [cell.tags["mb.status"] for cell in cells]
    counts = ", ".join(f"{states.count(s)} {s}" for s in STATUSES if s in states)
    skipped = [f"{s.get('model')} on {s.get('task')}: {s.get('reason')}" for s in grid.get("skipped", [])]
    tags = {
        "mb.kind": "run", "mb.run": run, "mb.status": counts, "mb.skipped": "; ".join(skipped),
        "mlflow.source.name": "memory-bench",
        "mb.cells": hashlib.sha256("".join(cell.mark for cell in cells).encode()).hexdigest(),
        **{f"mb.version.{name}": str(version) for name, version in found.get("versions", {}).items()},
        "mlflow.note.content": f"{len(cells)} cells: {counts}. Numbers are on the child runs, tables and plots among "
        "the artifacts. This is a view of a folder of records; `memory-bench sync mlflow` writes it anew.",
    }  # fmt: skip
    pages = [store.folder / f"leaderboard.{suffix}" for suffix in ("md", "html", "csv")]
    plots = sorted((store.folder / "plots").glob("*.png"))
    files = [(page, "") for page in pages if page.is_file()] + [(plot, "plots") for plot in plots]
    return View(
        name=run,
        params={name: _text(value) for name, value in asked.items() if value not in ("", None, {}, [])},
        tags={name: value for name, value in tags.items() if value},
        files=(*files, *([(table, "")] if table else [])),
        started=min((c.started for c in cells if c.started is not None), default=None),
        finished=max((c.finished for c in cells if c.finished is not None), default=None),
    )


def _params(record: Record) -> dict[str, str]:
    """Everything that determines the numbers."""
    cell, training = record.cell, record.cell.training
    budget = {k: v for k, v in asdict(training.budget).items() if v is not None and k not in ("seeds", "tasks")}
    found: dict[str, Any] = {
        "model": training.model.name, "task": cell.task.name, "backbone": training.backbone.name,
        "seed": training.seed, "recipe": training.recipe.name, "corpus": training.corpus.name,
        "limit": cell.limit or "all", "controls": cell.controls, "budget": budget.pop("name"),
        "model.version": training.model.version,
        **({"processes": training.processes} if training.processes > 1 else {}),
        **{f"budget.{k}": v for k, v in budget.items()},
        **{f"model.{k}": v for k, v in {**training.model.config, **getattr(cell, "scored_with", {})}.items()},
        **{f"backbone.{k}": v for k, v in training.backbone.config.items()},
        **{f"task.{k}": v for k, v in cell.task.config.items()},
    }  # fmt: skip
    return {_clean(name): text for name, value in found.items() if (text := _text(value))}


def _outcome(record: Record) -> dict[str, str]:
    happened, learned = record.provenance, record.learned or {}
    units = {e.metric: e.unit for e in record.metrics if e.unit not in ("", "1")}
    tags = {
        "mb.status": record.status,
        "mb.detail": record.detail,
        "mb.learned": str(learned.get("verdict") or ""),
        "mb.look_ahead": str(record.look_ahead or ""),
        "mb.training_ended_by": record.usage.training_ended_by,
        "mb.device": str(happened.get("device") or ""),
        "mb.units": ", ".join(f"{metric}: {unit}" for metric, unit in units.items()) if record.status == "ok" else "",
        "mlflow.source.name": "memory-bench",
        "mlflow.source.git.commit": str(happened.get("commit") or ""),
        "mlflow.note.content": f"{record.status}: {record.detail}" if record.status != "ok" else "",
    }
    if record.status == "ok":
        tags |= {_clean(f"mb.{e.metric}"): e.note for e in record.metrics if e.note and not plain(e.slice)}
    return tags


def _points(record: Record) -> Iterator[Point]:
    """Quality first, as MLflow's plots begin with the first metric; quality only where there is a result."""
    if record.status == "ok":
        mark = "look_ahead/" if record.look_ahead else ""
        mark += "pretrained/" if (record.learned or {}).get("verdict") == PRETRAINED else ""
        quality = [point for estimate in record.metrics for point in _of(estimate) if math.isfinite(point.value)]
        quality.sort(key=lambda point: ("/" in point.name, point.name.startswith("ci95/")))
        yield from (replace(point, name=_clean(mark + point.name)) for point in quality)
        yield from (Point(_clean(f"reference/{k}"), v) for k, v in record.levels.items() if math.isfinite(v))
    yield from (Point("train/loss", loss, tokens) for tokens, loss in _thinned(record.provenance.get("curve") or []))
    usage = {k: v for k, v in asdict(record.usage).items() if isinstance(v, int | float)}
    if usage["eval_tokens"]:
        usage["eval_flops_per_token"] = usage["eval_flops"] / usage["eval_tokens"]
    yield from (Point(f"cost/{name}", float(value)) for name, value in usage.items() if value or record.status == "ok")


def _of(estimate: Estimate) -> Iterator[Point]:
    """A number as points; a bound (``h > 512``) is called one, and what is no number at all is only a tag."""
    slice_, metric = plain(estimate.slice), estimate.metric
    if estimate.note:
        sign = re.match(r"\w+ ([<>]) ", estimate.note)
        if sign is None:
            return
        metric += "_at_least" if sign[1] == ">" else "_at_most"
    if slice_:
        yield _sliced(metric, slice_, estimate.value)
        return
    yield Point(metric, estimate.value)
    if not estimate.note:
        ends = {"low": estimate.low, "high": estimate.high, "n": estimate.n}
        yield from (Point(f"ci95/{metric}_{k}", float(v)) for k, v in ends.items() if v is not None)


def _sliced(metric: str, slice_: str, value: float) -> Point:
    """``distance=256`` is a step of ``by_distance/…``, ``position=256-512`` its middle; ``control:wiped`` is a name."""
    if slice_.startswith("control:"):
        return Point(f"control/{metric}/{slice_.removeprefix('control:').replace('/', '_')}", value)
    parts = [part.partition("=")[::2] for part in slice_.replace("/", "_").split(",")]
    axis = next((k for k in AXES for name, at in parts if name == k and re.fullmatch(r"\d+(-\d+)?", at)), "")
    family = axis or parts[0][0]
    step = [int(x) for name, at in parts if name == axis for x in at.split("-")]
    rest = [at if name == family else f"{name} {at}".strip() for name, at in parts if name != axis]
    return Point("/".join([f"by_{family}", metric, *rest]), value, sum(step) // len(step) if step else 0)


def _thinned(curve: Sequence[Sequence[float]]) -> Iterator[tuple[int, float]]:
    """(tokens read, mean loss) of at most `POINTS` blocks of steps, each at its last step."""
    size = math.ceil(len(curve) / POINTS)
    for first in range(0, len(curve), max(1, size)):
        block = list(curve[first : first + size])
        if all(loss is not None and math.isfinite(loss) for _, loss in block):  # of others there is no mean
            yield int(block[-1][0]), sum(loss for _, loss in block) / len(block)


def _datasets(record: Record, sources: Mapping[str, Mapping[str, Any]]) -> Iterator[Dataset]:
    """What was scored and, if it was trained on other data, those; MLflow knows a data set by label and revision."""
    cell, corpus = record.cell, record.cell.training.corpus
    label = str(cell.task.config.get("data") or cell.task.name)
    yield _dataset(label, cell.task, "eval", sources)
    named = [str(s.get("label", "")) for s in sources.values() if s.get("revision") == corpus.revision]
    if record.usage.train_tokens and corpus.revision != cell.task.revision:
        yield _dataset(next(iter(named), corpus.name), corpus, "train", sources)


def _dataset(label: str, choice: Choice, use: str, sources: Mapping[str, Mapping[str, Any]]) -> Dataset:
    """A revision is the beginning of a SHA-256 of the data or of the program that makes them; on the hub, a commit."""
    pinned = any(s.get("origin") == "hub" and s.get("revision") == choice.revision for s in sources.values())
    stand_in = "(stand-in" in label
    tags = {"mb.label": label, "mb.revision": choice.revision, "mb.stand_in": str(stand_in).lower()}
    tags["mb.commit" if pinned else "mb.sha256"] = choice.revision
    return Dataset(label[:500], choice.revision, use, {name: value[:500] for name, value in tags.items() if value})


def _clean(name: str) -> str:
    """`name` in MLflow's alphabet, and a plain path, as it asks for."""
    allowed = re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)
    return posixpath.normpath(re.sub(r"(^|/)\.+(?=/|$)", r"\1_", allowed)).lstrip("/")[:250].rstrip("/")


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def _milliseconds(time: Any) -> int | None:
    return round(datetime.fromisoformat(time).timestamp() * 1000) if time else None
