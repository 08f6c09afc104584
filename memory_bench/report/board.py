"""Boards: the cells of one task under one budget, aggregated over seeds, ranked and compared.

A row is a model with its options; the samples of its seeds are concatenated and given to the task's own `metrics`, so
a table can be made from the records' folder alone. A row that ran over budget, failed or was skipped stays.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

from memory_bench.budget import Budget
from memory_bench.cell import Cell, digest
from memory_bench.recipe import RECIPES, fixed_steps
from memory_bench.record import Record
from memory_bench.report.grouping import apart, grouped, labels, left_out
from memory_bench.report.rows import OVER, Row, Scorer, make_row, unanswered
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
        levels: of the headline, for example chance.
        apart: what tells its backbone and its budget from others' of the same names in this report; see `apart`.
    """

    cell: Cell
    metric: str
    rows: tuple[Row, ...]
    ahead: tuple[Row, ...] = ()
    pretrained: tuple[Row, ...] = ()
    pairs: tuple[Difference, ...] = ()
    levels: Mapping[str, float] = field(default_factory=dict)
    apart: tuple[str, str] = ("", "")

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
    def backbone_shown(self) -> str:
        """The backbone's name, with its revision where the report has two."""
        return f"{self.backbone} ({self.apart[0]})" if self.apart[0] else self.backbone

    @property
    def budget_shown(self) -> str:
        """The budget's name, with its limits where the report has two of that name."""
        return f"{self.budget.name} ({self.apart[1]})" if self.apart[1] else self.budget.name

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
        """Per ranked row (none is over budget), the letters it shares with those it cannot be told apart from."""
        named = {name for pair in self.pairs for name in (pair.a, pair.b)} - self.unequal.keys()
        order = [row.label for row in self.rows if row.label in named and row.status != OVER]
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
    boards = [_board(store, tasks, members + left_out(members, skipped)) for members in grouped(store, keys)]
    cells = [board.cell for board in boards]
    boards = [replace(board, apart=apart(board.cell, cells)) for board in boards]

    def place(board: Board) -> tuple[object, ...]:
        named = (board.task, board.backbone, board.budget.name, board.data)
        return (*named, digest(asdict(board.cell.task)), board.apart)

    return sorted(boards, key=place)


def _board(store: Store, tasks: Mapping[str, Scorer], groups: Sequence[Sequence[Record]]) -> Board:
    cell = groups[0][0].cell
    task = scorer_of(tasks, cell.task)
    first = next((r.metrics[0].metric for records in groups for r in records if r.metrics), "")
    metric = task.headline if task is not None else first
    loaded = {r.key: store.samples(r.key) for records in groups for r in records}
    questions = unanswered([r for records in groups for r in records], loaded)
    rows = [
        make_row(label, records, loaded, task, metric, questions, store.warnings)
        for label, records in zip(labels(groups), groups, strict=True)
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
    seeds = {r.label: r.seed_values for r in causal if r.label in samples}
    pairs = pairing.differences(samples, metric, seeds, [r.label for r in causal if not r.trained])
    levels: dict[str, float] = {}
    for row in rows:
        for record in row.records:
            levels.update(record.levels)
    levels = dict(sorted(levels.items()))
    return replace(board, rows=causal, ahead=ahead, pretrained=pretrained, pairs=tuple(pairs), levels=levels)
