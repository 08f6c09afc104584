"""What the regression gate compares: a run as lines, one per model, backbone, task, budget, metric and slice.

A line holds a number of every seed, their mean and standard deviation (the between-run sigma), what may change without
being a regression (the declared tolerance), and everything that must be equal for two lines to be comparable: device,
data, budget, settings. Besides qualities there are lines for what else must not get worse, as numbers too:

- ``status``: 0 ok, 1 over budget, 2 failed;
- ``learned``: the share of seeds whose memory learned something;
- ``look_ahead``: tokens past the predicting position that a prediction may see;
- ``parity``: 1 where a certificate says that official numbers are met, else 0;
- ``added_parameters``, ``state_bytes``, ``eval_flops_per_token``: costs that a machine does not change.

Qualities come from the records' own metrics: the headline and every other metric that has a declared tolerance, with
all slices but the ceiling, which is a yardstick that no memory takes part in. Cells that are not ``ok`` have a status
and no numbers, for they did not see all there is.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from memory_bench.budget import Budget, Usage
from memory_bench.cell import limits
from memory_bench.record import Record
from memory_bench.report.rows import plain

SEVERITY = {"ok": 0, "over_budget": 1, "failed": 2}
LIMITS = {f.name for f in fields(Budget)} - {"name", "seeds", "tasks"}
CEILING = "control:ceiling"
FACTS = ("status", "look_ahead", "parity")
"""Lines whose worst seed counts, not the mean."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a mean may move before anything is said, where the seeds themselves do not spread as far.

    Attributes:
        absolute: in the metric's unit.
        reason: why that much.
        relative: in addition, as a share of the reference's mean.
    """

    absolute: float
    reason: str
    relative: float = 0.0

    def at(self, mean: float) -> float:
        """In the metric's unit, for a reference of that mean."""
        return self.absolute + self.relative * abs(mean)


_COUNTED = "counted, not measured: the same on every machine, up to the rounding of a sum"
TOLERANCES: Mapping[str, Tolerance] = {
    "bits_per_byte": Tolerance(0.01, "a training seed moves tiny by up to 0.007, a memory is worth 0.02 to 0.03"),
    "nll": Tolerance(0.02, "the tolerance of bits_per_byte for tokens of three bytes"),
    "accuracy": Tolerance(0.05, "one of three seeds may answer one question in seven otherwise, if only one does"),
    "macro_f1": Tolerance(0.03, "as accuracy, and a rare class weighs as much as a frequent one"),
    "surprisal_drop": Tolerance(0.05, "nats; one list of fifty turns on less"),
    "learned": Tolerance(0.34, "a share of seeds: one of three may fail to learn"),
    "status": Tolerance(0.0, "a result is a result"),
    "look_ahead": Tolerance(0.0, "a declaration, in tokens"),
    "parity": Tolerance(0.0, "a certificate is there or is not"),
    "added_parameters": Tolerance(0.0, _COUNTED, 1e-6),
    "state_bytes": Tolerance(0.0, _COUNTED, 1e-6),
    "eval_flops_per_token": Tolerance(0.0, _COUNTED, 1e-6),
}
UNDECLARED = Tolerance(0.0, "none was declared: only the spread between seeds counts")


@dataclass(frozen=True, slots=True)
class Setting:
    """What two lines must share to be comparable; the field names are those of a reference file.

    Attributes:
        data, data_revision: label and revision of what is evaluated.
        limits: of the budget, those that bind.
        options: of the task; how many documents or questions; whether controls were run.
        training: corpus and recipe with their versions and revisions.
        backbone_revision: of the backbone, with its number type.
        device: its class: ``cpu``, or the name of the GPU.
    """

    data: str
    data_revision: str
    limits: dict[str, Any]
    options: dict[str, Any]
    training: dict[str, Any]
    backbone_revision: str
    device: str


Board = tuple[str, str, str]
"""Task, backbone, budget."""


@dataclass(frozen=True, slots=True)
class Line:
    """One number of a run over its seeds.

    Attributes:
        model: the label of the row.
        backbone, task, budget: names.
        metric, slice: as in ``leaderboard.csv``.
        values: of each seed.
        higher_is_better: direction.
        tolerance: declared, in the metric's unit.
        setting: see `Setting`.
        version: of the model.
        commit: of the checkout it was measured with; None for an installed package.
        versions: of Python and the packages that decide numbers.
    """

    model: str
    backbone: str
    task: str
    budget: str
    metric: str
    slice: str
    values: dict[int, float]
    higher_is_better: bool
    tolerance: float
    setting: Setting
    version: int = 1
    commit: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def board(self) -> Board:
        """Task, backbone, budget."""
        return self.task, self.backbone, self.budget

    @property
    def identity(self) -> tuple[str, ...]:
        """What a line of another run must share to be this one."""
        return (*self.board, self.model, self.metric, self.slice)

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.values.values())

    @property
    def sigma(self) -> float:
        """Standard deviation between seeds (n - 1); 0 for fewer than two."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else 0.0


def lines(
    rows: Sequence[Sequence[Record]],
    certified: Mapping[str, bool],
    tolerances: Mapping[str, Tolerance] = TOLERANCES,
) -> list[Line]:
    """The lines of a run, sorted by identity.

    Where a folder holds the same line twice (a scratch model that was edited and run again), the later one counts.

    Args:
        rows: the records of each model's seeds, as `memory_bench.report.board.grouped` gives them; skipped ones have
            no line.
        certified: model name to whether official numbers are met.
        tolerances: by metric.
    """
    found: dict[str, Line] = {}
    for records in sorted(rows, key=lambda row: max(str(r.provenance.get("finished", "")) for r in row)):
        for line in _row(records, certified, tolerances):
            found[json.dumps([line.identity, asdict(line.setting)], sort_keys=True)] = line
    return sorted(found.values(), key=lambda line: line.identity)


def _row(records: Sequence[Record], certified: Mapping[str, bool], tolerances: Mapping[str, Tolerance]) -> list[Line]:
    """The lines of one model."""
    ran = [r for r in records if r.status in SEVERITY]
    numbers: dict[tuple[str, str], dict[int, float]] = {}
    better: dict[str, bool] = {}

    def put(record: Record, metric: str, slice_: str, value: float | None, *, higher: bool) -> None:
        if value is not None:
            numbers.setdefault((metric, slice_), {})[record.cell.training.seed] = float(value)
            better[metric] = higher

    for record in ran:
        put(record, "status", "", SEVERITY[record.status], higher=False)
        put(record, "look_ahead", "", record.look_ahead, higher=False)
        put(record, "parity", "", float(certified.get(record.cell.training.model.name, False)), higher=True)
        if record.status != "ok":
            continue
        headline = record.metrics[0].metric if record.metrics else ""
        for m in record.metrics:
            if plain(m.slice) != CEILING and (m.metric == headline or m.metric in tolerances):
                put(record, m.metric, plain(m.slice), m.value, higher=m.higher_is_better)
        if record.learned is not None and record.learned["lift"] is not None:
            put(record, "learned", "", float(record.learned["verdict"] == "learned"), higher=True)
        for metric, spent in _costs(record.usage).items():
            put(record, metric, "", spent, higher=False)
    result = []
    for (metric, slice_), values in numbers.items():
        first = next(r for r in ran if r.cell.training.seed in values)
        cell = first.cell
        line = Line(
            model=cell.label or cell.training.model.name, backbone=cell.training.backbone.name, task=cell.task.name,
            budget=cell.training.budget.name, metric=metric, slice=slice_, values=dict(sorted(values.items())),
            higher_is_better=better[metric], tolerance=0.0, setting=setting(first), version=cell.training.model.version,
            commit=first.provenance.get("commit"), versions=dict(first.provenance.get("versions", {})),
        )  # fmt: skip
        result.append(with_tolerance(line, tolerances))
    # A mean over the other seeds would hide a number that is none: then there is no such line.
    return [line for line in result if all(map(math.isfinite, line.values.values()))]


def with_tolerance(line: Line, tolerances: Mapping[str, Tolerance]) -> Line:
    """The line with its metric's declared tolerance; unchanged where none is declared."""
    return replace(line, tolerance=tolerances.get(line.metric, UNDECLARED).at(line.mean))


def _costs(used: Usage) -> dict[str, float | None]:
    return {
        "added_parameters": used.added_parameters,
        "state_bytes": used.state_bytes + used.state_host_bytes + (used.state_disk_bytes or 0),
        "eval_flops_per_token": used.eval_flops / used.eval_tokens if used.eval_tokens else None,
    }


def setting(record: Record) -> Setting:
    """What another record must share to be comparable, as plain data."""
    cell = record.cell
    training, task = cell.training, cell.task
    recipe, corpus = training.recipe, training.corpus
    number_type = str(training.backbone.config.get("dtype", ""))
    found = Setting(
        data=str(task.config.get("data") or task.name),
        data_revision=task.revision,
        limits={k: v for k, v in limits(training).items() if k in LIMITS and v is not None},
        options={
            **{k: v for k, v in task.config.items() if k != "data"},
            "version": task.version,
            "limit": cell.limit,
            "controls": cell.controls,
        },
        training={
            **recipe.config,
            **({} if training.processes == 1 else {"processes": training.processes}),
            "recipe": f"{recipe.name}, version {recipe.version}",
            "corpus": f"{corpus.name}, version {corpus.version}, revision {corpus.revision}",
        },
        backbone_revision=" ".join(filter(None, (training.backbone.revision, number_type))),
        device=str(record.provenance.get("device", "")),
    )
    return Setting(**json.loads(json.dumps(asdict(found))))  # lists, as a file has them, not tuples
