"""Boards: the cells of one task under one budget, aggregated over seeds, ranked and compared.

A row is a model with its options; the samples of its seeds are concatenated and given to the task's own `metrics`, so
a table can be made from the records' folder alone. A row that ran over budget, failed or was skipped stays.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

from memory_bench.budget import Budget, Usage
from memory_bench.cell import Cell, Choice, digest, limits
from memory_bench.recipe import RECIPES, fixed_steps
from memory_bench.record import Record
from memory_bench.report.rows import Row, Scorer, make_row, unanswered
from memory_bench.report.scorers import scorer_of
from memory_bench.statistics import pairing
from memory_bench.statistics.pairing import Difference
from memory_bench.statistics.stats import letters
from memory_bench.store import Store

WINDOW = "truncation"
"""The equally trained model without memory, to which every row is compared."""


TRAINING_LIMITS = ("train_tokens", "train_flops", "train_seconds")


@dataclass(frozen=True)
class Board:
    """One table: a task on a data set with a backbone under a budget.

    Attributes:
        cell: any of its cells, for what they share.
        metric: the headline.
        rows: ranked, then those with an unequal training, those over budget, those without a result; look-ahead rows
            are not among them.
        ahead: rows whose predictions could see the text they predict, which no table ranks.
        pretrained: rows that were loaded instead of trained under the budget; neither ranked nor paired.
        pairs: differences between all ranked rows.
    """

    cell: Cell
    metric: str
    rows: tuple[Row, ...]
    ahead: tuple[Row, ...] = ()
    pretrained: tuple[Row, ...] = ()
    pairs: tuple[Difference, ...] = ()
    levels: Mapping[str, float] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """The task's name."""
        return self.cell.task.name

    @property
    def data(self) -> str:
        """The label of the data; a stand-in is named in it."""
        return str(self.cell.task.config.get("data") or self.task)

    @property
    def backbone(self) -> str:
        """The backbone's name."""
        return self.cell.training.backbone.name

    @property
    def budget(self) -> Budget:
        """The limits all rows share."""
        return self.cell.training.budget

    @property
    def everything(self) -> tuple[Row, ...]:
        """All rows, the ranked ones first."""
        return (*self.rows, *self.ahead, *self.pretrained)

    @property
    def higher_is_better(self) -> bool:
        """Direction of the headline."""
        return next((r.headline.higher_is_better for r in self.everything if r.headline), True)

    @cached_property
    def ended_by(self) -> str:
        """What ended most of the trainings: a limit, ``steps`` (a curriculum that all models share), or ``none``."""
        ends = [r.usage.training_ended_by for row in self.rows for r in row.records if r.usage.train_tokens]
        limits = ["steps", *(n for n in TRAINING_LIMITS if getattr(self.budget, n) is not None)]
        return max(limits[1:] + limits[:1], key=ends.count) if ends else "none"

    @property
    def kind(self) -> str:
        """What is equal between the rows: one of `TRAINING_LIMITS`, or ``none`` where nothing was trained."""
        return "train_tokens" if self.ended_by == "steps" else self.ended_by

    @cached_property
    def unequal(self) -> Mapping[str, str]:
        """Rows whose training was not as long as the others', by label, with what ended it; they are ranked last.

        The clock ended it before the tokens, FLOPs or steps that the budget or the recipe gives to all, something else
        did than what ended most of the board's trainings, or its recipe has another number of steps than theirs.
        """
        found: dict[str, str] = {}
        for row in self.rows:
            ends = [end for record in row.records if (end := self._other_end(record))]
            if ends:
                found[row.label] = "; ".join(dict.fromkeys(ends))
        return found

    def _other_end(self, record: Record) -> str:
        end, used = record.usage.training_ended_by, record.usage
        steps = _steps(record)
        goal = steps or self.budget.train_tokens or self.budget.train_flops
        if not used.train_tokens or end in ("", "none", "pretrained"):
            return ""
        if end == "steps" == self.ended_by and steps != self._usual_steps:
            return f"training has {steps:,} steps, others' have {self._usual_steps:,}"
        if not (end == "train_seconds" and goal) and end == self.ended_by:
            return ""
        reached = f" after {used.train_steps:,} of {steps:,} steps" if steps else f" after {used.train_tokens:,} tokens"
        return f"training ended by {end}{reached}"

    @cached_property
    def _usual_steps(self) -> int:
        """Of the trainings that their recipe's steps ended, what most have."""
        ended = [_steps(r) for row in self.rows for r in row.records if r.usage.training_ended_by == "steps"]
        return max(ended, key=ended.count, default=0)

    @cached_property
    def letters(self) -> dict[str, str]:
        """Per ranked row, the letters it shares with the rows it cannot be told apart from."""
        named = {name for pair in self.pairs for name in (pair.a, pair.b)}
        order = [row.label for row in self.rows if row.label in named and row.label not in self.unequal]
        return letters(order, {(p.a, p.b): 0.0 if p.told_apart else 1.0 for p in self.pairs}, pairing.ALPHA)

    @property
    def window(self) -> Row | None:
        """The equally trained window without memory."""
        return next((row for row in self.rows if row.model == WINDOW and row.headline), None)

    def against_window(self, row: Row) -> Difference | None:
        """`row` - window, from the board's pairs; None where their trainings are not equal."""
        if self.window is None or {row.label, self.window.label} & self.unequal.keys():
            return None
        return self.pair(row.label, self.window.label)

    def pair(self, a: str, b: str) -> Difference | None:
        """The difference a - b; None where they were not compared."""
        for p in self.pairs:
            if (p.a, p.b) == (a, b):
                return p
            if (p.b, p.a) == (a, b):
                low, high = (None if x is None else -x for x in (p.high, p.low))
                return replace(p, a=a, b=b, value=-p.value, low=low, high=high)
        return None


def _steps(record: Record) -> int:
    """The number of steps of a training whose recipe has one, else 0."""
    recipe = RECIPES.get(record.cell.training.recipe.name)
    return fixed_steps(recipe) if recipe is not None else 0


def training_goal(record: Record) -> tuple[str, float] | None:
    """What a training was to reach: the steps of its recipe, else the first limit of its budget; None without any."""
    if steps := _steps(record):
        return "steps", steps
    limits = ((name, getattr(record.cell.training.budget, name)) for name in TRAINING_LIMITS)
    return next(((name, float(limit)) for name, limit in limits if limit is not None), None)


def collect(store: Store, tasks: Mapping[str, Scorer], keys: Collection[str] | None = None) -> list[Board]:
    """The boards of a store; what cannot be used is added to ``store.warnings``.

    Args:
        store: with its samples.
        tasks: by name; for a task that is missing the records' own metrics are averaged over seeds.
        keys: cells to show; None: all.
    """
    skipped = store.run().get("grid", {}).get("skipped", [])
    boards = []
    for members in grouped(store, keys):
        boards.append(_board(store, tasks, members + _skipped(members, skipped)))
    return sorted(boards, key=lambda b: (b.task, b.backbone, b.budget.name, b.data, digest(asdict(b.cell.task))))


def grouped(store: Store, keys: Collection[str] | None = None) -> list[list[list[Record]]]:
    """The records of a store by board, then by row, then by seed.

    Args:
        store: what it cannot read is added to its warnings.
        keys: cells to show; None: all.
    """
    roles = store.run().get("grid", {}).get("roles", {})
    groups: dict[str, dict[str, dict[int, Record]]] = {}
    for record in store.records():
        if keys is None or record.key in keys:
            record = as_asked(record, roles)
            board, row = _identity(record.cell)
            same = groups.setdefault(board, {}).setdefault(row, {})
            seed = record.cell.training.seed
            # Two records of one seed differ in a revision (another copy of the backbone); the later one counts.
            if seed not in same or _finished(record) >= _finished(same[seed]):
                same[seed] = record
    return [[[r for _, r in sorted(seeds.items())] for seeds in rows.values()] for rows in groups.values()]


def _identity(cell: Cell) -> tuple[str, str]:
    """What the cells of a board share, and what those of a row share beyond it."""
    budget = {k: v for k, v in limits(cell.training).items() if k not in ("seeds", "tasks")}
    board = {"task": asdict(cell.task), "limit": cell.limit, "backbone": cell.training.backbone.name, "budget": budget}
    model = {"model": asdict(cell.training.model), "recipe": asdict(cell.training.recipe), "controls": cell.controls}
    model["scored_with"] = cell.scored_with
    return digest(board), digest(model)


def as_asked(record: Record, roles: Mapping[str, Sequence[str]]) -> Record:
    """The record with role and label of the run's last command; they are no part of a cell's identity."""
    if record.key not in roles:
        return record
    role, label = roles[record.key]
    return replace(record, cell=replace(record.cell, role=role, label=label))


def _skipped(members: Sequence[Sequence[Record]], pairs: Sequence[Mapping[str, str]]) -> list[list[Record]]:
    """Rows for the pairs of model and task that the run's grid left out, as ``run.json`` lists them."""
    known = {_name(records[0].cell) for records in members}
    cell = members[0][0].cell
    result = []
    for pair in pairs:
        if pair.get("task") == cell.task.name and pair.get("model") not in known:
            name = str(pair["model"])
            training = replace(cell.training, model=Choice(name.split()[0]))
            other = replace(cell, training=training, role="asked", label=name)
            result.append([Record(other, "skipped", str(pair.get("reason", "")), (), Usage(), {}, None, {})])
    return result


def _name(cell: Cell) -> str:
    return cell.label or cell.training.model.name


def _finished(record: Record) -> str:
    return str(record.provenance.get("finished", ""))


def _board(store: Store, tasks: Mapping[str, Scorer], groups: Sequence[Sequence[Record]]) -> Board:
    cell = groups[0][0].cell
    task = scorer_of(tasks, cell.task)
    first = next((r.metrics[0].metric for records in groups for r in records if r.metrics), "")
    metric = task.headline if task is not None else first
    loaded = {r.key: store.samples(r.key) for records in groups for r in records}
    questions = unanswered([r for records in groups for r in records], loaded)
    labels = _labels(groups)
    rows = [
        make_row(label, records, loaded, task, metric, questions, store.warnings)
        for label, records in zip(labels, groups, strict=True)
    ]
    board = Board(cell, metric, tuple(rows))
    sign = -1 if board.higher_is_better else 1

    def rank(row: Row) -> tuple[bool, int, bool, float, str]:
        value = row.headline.value if row.headline else 0.0
        return (
            row.headline is None,
            ("ok", "over_budget", "failed", "skipped").index(row.status),
            row.label in board.unequal,
            sign * value,
            row.label,
        )

    ordered = sorted(rows, key=rank)
    causal = tuple(r for r in ordered if not r.look_ahead and not r.pretrained)
    ahead = tuple(r for r in ordered if r.look_ahead and not r.pretrained)
    pretrained = tuple(r for r in ordered if r.pretrained)
    samples = {r.label: r.samples for r in causal if r.headline and r.samples is not None}
    pairs = pairing.differences(samples, metric, {r.label: r.seed_values for r in causal if r.label in samples})
    levels: dict[str, float] = {}
    for row in rows:
        for record in row.records:
            levels.update(record.levels)
    levels = dict(sorted(levels.items()))
    return replace(board, rows=causal, ahead=ahead, pretrained=pretrained, pairs=tuple(pairs), levels=levels)


def _labels(groups: Sequence[Sequence[Record]]) -> list[str]:
    """A name for every row; where two would share one, the version and then the key tells them apart."""
    names = [_name(records[0].cell) for records in groups]
    result = []
    for name, records in zip(names, groups, strict=True):
        model = records[0].cell.training.model
        rivals = [g[0].cell.training.model.version for n, g in zip(names, groups, strict=True) if n == name]
        if len(rivals) > 1:
            unique = rivals.count(model.version) == 1
            name = f"{name} (version {model.version})" if unique else f"{name} ({records[0].cell.training.key[:4]})"
        result.append(name)
    return result
