"""The same models under several budgets: boards that differ in a limit alone, as one table and one plot."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from textwrap import wrap
from typing import TYPE_CHECKING

from memory_bench.budget import Budget, amount
from memory_bench.cell import digest
from memory_bench.report import drawing
from memory_bench.report.board import Board
from memory_bench.report.costs import cost
from memory_bench.report.grouping import UNSHARED
from memory_bench.report.layout import NONE, Table
from memory_bench.report.limits import limit_names
from memory_bench.report.looks import Look, looks
from memory_bench.report.rows import OVER, Row
from memory_bench.report.scales import Scale
from memory_bench.report.tables import interval, short
from memory_bench.report.trade_offs import PRICES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Across budgets"
STATE = "state_bytes"
TOUCHING = 0.17
"""Share of the axis within which names of limits would touch."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """Boards of one task, data and backbone whose budgets differ in one limit; rows of different ones are not paired.

    Attributes:
        limit: the field of `Budget`.
        boards: by that limit, rising; one without it comes last.
    """

    limit: str
    boards: tuple[Board, ...]

    @property
    def labels(self) -> list[str]:
        """Of all rows, in the order of the boards."""
        return list(dict.fromkeys(row.label for board in self.boards for row in board.rows))

    @property
    def heading(self) -> str:
        """What stands over the table and the plot."""
        first = self.boards[0]
        return f"{short(first.metric)} of {first.data} on backbone {first.backbone_shown}, by {self.limit}"

    def bound(self, board: Board) -> float | None:
        """The limit of one of the boards."""
        value = getattr(board.budget, self.limit)
        return None if value is None else float(value)

    def table(self) -> Table:
        """One line a model, one column a budget; what has no number says why."""
        heads = [f"{b.budget.name}: {_said(self.limit, self.bound(b))}" for b in self.boards]
        found = [{row.label: row for row in board.rows} for board in self.boards]
        lines = [(label, *(_cell(rows.get(label)) for rows in found)) for label in self.labels]
        return Table(("model", *heads), tuple(lines))


def sweeps(boards: Sequence[Board]) -> list[Sweep]:
    """The sweeps among the boards of a report."""
    groups: dict[str, list[Board]] = {}
    for board in boards:
        cell = board.cell
        groups.setdefault(digest([asdict(cell.task), cell.limit, asdict(cell.training.backbone)]), []).append(board)
    found = []
    for same in groups.values():
        budgets = [board.budget for board in same]
        names = [f.name for f in fields(Budget) if f.name not in (*UNSHARED, "name")]
        differing = [name for name in names if len({getattr(budget, name) for budget in budgets}) > 1]
        if len(differing) == 1 and len({getattr(budget, differing[0]) for budget in budgets}) == len(budgets):
            limit = differing[0]
            ordered = sorted(same, key=lambda b: (getattr(b.budget, limit) is None, getattr(b.budget, limit) or 0))
            found.append(Sweep(limit, tuple(ordered)))
    return found


def draw(sweep: Sweep, labels: Sequence[str] = ()) -> "Figure":
    """The headline against the limit and against the bytes of state that were used, one line a model."""
    look = {label: style for board in sweep.boards for label, style in looks(board, [*labels, *sweep.labels]).items()}
    first = sweep.boards[0]
    factor = drawing.factor(first.metric)
    panels = drawing.canvas(11.0, 4.4, first, f"{short(first.metric)} under several limits", columns=2, share=False)
    budgets = wrap(f"budgets {', '.join(dict.fromkeys(b.budget.name for b in sweep.boards))}", 120)
    panels[0].set_title("\n".join([sweep.heading, *budgets]), pad=10)
    known = [bound for board in sweep.boards if (bound := sweep.bound(board)) is not None]
    free = 2.5 * max(known)  # where a board without the limit stands
    at = [free if (bound := sweep.bound(board)) is None else bound for board in sweep.boards]
    spent = [{row.label: PRICES[STATE].of(cost(row)) for row in board.rows} for board in sweep.boards]
    scales = Scale.of(at), Scale.of([x for costs in spent for x in costs.values() if x is not None] or [1.0])
    lost: dict[str, list[int]] = {}  # boards where a row has no number
    for label in sweep.labels:
        mine = [(i, row) for i, board in enumerate(sweep.boards) for row in board.rows if row.label == label]
        if gone := [i for i, row in mine if _is_lost(row)]:
            lost[label] = gone
        shown = [(i, row) for i, row in mine if row.headline]
        _line(panels[0], [(scales[0].at(at[i]), row) for i, row in shown], look[label], factor, label)
        states = [(scales[1].at(x), row) for i, row in shown if (x := spent[i][label]) is not None]
        _line(panels[1], states, look[label], factor, label)
    scales[0].apply(panels[0])
    scales[1].apply(panels[1])
    names = _stepped([_said(sweep.limit, sweep.bound(board)) for board in sweep.boards], scales[0].shares(at))
    panels[0].set_xticks(at, names)
    panels[0].minorticks_off()
    for i, x in enumerate(at):
        here = {n: (x, 0.0) for n, label in enumerate(lost, 1) if i in lost[label]}
        drawing.numbered(panels[0], here, ("data", "axes fraction"))
    panels[0].set_xlabel(sweep.limit)
    panels[1].set_xlabel(PRICES[STATE].axis)
    panels[0].set_ylabel(drawing.label(first.metric, first))
    panels[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    said = ["bars: 95 % intervals", "crossed: over budget", "budgets are not paired"]
    notes = [f"× {n} {label}: over budget, {_limits(sweep, label)}" for n, label in enumerate(lost, 1)]
    drawing.key(panels[0], first, said, wrap=150, lost=notes, down=52)
    return drawing.figure(panels[0])


def _limits(sweep: Sweep, label: str) -> str:
    """The limits that left a row without a number, of all boards."""
    rows = [row for board in sweep.boards for row in board.rows if row.label == label and _is_lost(row)]
    return ", ".join(dict.fromkeys(map(limit_names, rows)))


def _stepped(names: Sequence[str], shares: Sequence[float]) -> list[str]:
    """Names under an axis, one a line lower where it would touch the one before; `shares`: their places on it."""
    found: list[str] = []
    for i, name in enumerate(names):
        close = i > 0 and shares[i] - shares[i - 1] < TOUCHING and not found[-1].startswith("\n")
        found.append(f"\n{name}" if close else name)
    return found


def _line(axes: "Axes", points: Sequence[tuple[float, Row]], look: Look, factor: float, label: str) -> None:
    """The points of a model with their intervals, joined in the order of the budgets."""
    found = [(x, row, row.headline) for x, row in points if row.headline]
    axes.plot([x for x, _, _ in found], [factor * e.value for _, _, e in found], color=look.color, linewidth=1.4,
              linestyle=look.line, alpha=0.7, marker=look.marker, markersize=5, markerfacecolor=look.fill,
              label=label)  # fmt: skip
    for x, row, e in found:
        axes.plot([x, x], [factor * end for end in drawing.ends(e)], color=look.color, linewidth=1.4, alpha=0.4)
        drawing.point(axes, x, factor * e.value, row, look)


def _is_lost(row: Row) -> bool:
    return row.status == OVER and not row.headline


def _cell(row: Row | None) -> str:
    if row is None:
        return NONE
    said = f"over budget: {limit_names(row)}" if row.status == OVER else row.status.replace("_", " ")
    if row.headline is None:
        return said
    own = interval(row.headline.value, row.headline.low, row.headline.high, row.metric)
    return own if row.status == "ok" else f"{own} ({said})"


def _said(limit: str, bound: float | None) -> str:
    return "no limit" if bound is None else amount(limit, bound)
