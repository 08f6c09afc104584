"""Plots of the headline against what a row cost, with the front of what nothing beats at its price."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memory_bench.report import drawing
from memory_bench.report.board import WINDOW, Board
from memory_bench.report.costs import Cost, cost
from memory_bench.report.fronts import Front, front
from memory_bench.report.limits import limit_names
from memory_bench.report.looks import Look
from memory_bench.report.naming import name_marks
from memory_bench.report.panels import gap_to_window
from memory_bench.report.rows import OVER, Row
from memory_bench.report.scales import Scale
from memory_bench.report.tables import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOMINATED = "#BDBDBD"
FRONT = "#444444"


@dataclass(frozen=True, slots=True)
class Price:
    """One way to count what a row cost: the axis' name, the plot's caption, and the number (None: not known)."""

    axis: str
    caption: str
    of: Callable[[Cost], float | None]


def _seconds(spent: Cost) -> float | None:
    return 1000 / spent.eval_tokens_per_second if spent.eval_tokens_per_second else None


PRICES: Mapping[str, Price] = {
    "train_flops": Price("training FLOPs", "training cost", lambda c: c.train_flops),
    "eval_flops_per_token": Price("evaluation FLOPs per token", "evaluation cost", lambda c: c.eval_flops_per_token),
    "state_bytes": Price("bytes of memory state", "memory state", lambda c: c.state_bytes),
    "peak_device_bytes": Price("peak bytes", "peak memory", lambda c: c.peak_device_bytes),
    "eval_seconds": Price("seconds per 1,000 tokens read", "evaluation time", _seconds),
}

Spot = tuple[float, float, float]
"""Value, low, high."""


def prices(board: Board, kind: str) -> dict[str, float]:
    """Label to cost, of the rows where it is known; empty where all that have a number cost the same."""
    known = {row.label: PRICES[kind].of(cost(row)) for row in board.rows}
    found = {label: float(value) for label, value in known.items() if value is not None}
    numbered = {found[row.label] for row in board.rows if row.label in found and row.headline}
    return found if len(numbered) > 1 else {}


def trade_off(board: Board, look: Mapping[str, Look], kind: str) -> "Figure":
    """The headline, and its paired difference to the window where there is one, against a cost of `PRICES`."""
    costs, factor = prices(board, kind), drawing.factor(board.metric)
    shown = [row for row in board.rows if row.label in costs and row.headline]
    gaps = {row.label: gap for row in shown if (gap := gap_to_window(board, row))}
    compared = len(gaps) > 1
    what = f"{short(board.metric)} against {PRICES[kind].axis}"
    panels = drawing.canvas(11.0 if compared else 6.8, 4.4, board, what, columns=2 if compared else 1, share=False)
    found = front(board, costs)
    scale = Scale.of([costs[row.label] for row in shown] + [costs[r.label] for r in _lost(board) if r.label in costs])
    own = {row.label: _spot(row.headline, factor) for row in shown if row.headline}
    unnamed = _panel(panels[0], board, look, shown, costs, scale, found, own, named=not compared)
    panels[0].set_ylabel(drawing.label(board.metric, board))
    if compared:
        paired = {label: _spot(gap, factor) for label, gap in gaps.items()}
        if board.window is not None and board.window.label in costs:
            paired[board.window.label] = (0.0, 0.0, 0.0)
        rest = [row for row in shown if row.label in paired]
        unnamed = _panel(panels[1], board, look, rest, costs, scale, found, paired, named=True)
        unnamed += [drawing.name(row) for row in shown if row.label not in paired]
        panels[1].axhline(0, color="black", linewidth=1, linestyle="--", zorder=1)
        panels[1].set_ylabel(f"paired difference to {WINDOW}{' (points)' if factor > 1 else ''}")
    for axes in panels:
        axes.set_xlabel(PRICES[kind].axis)
    lost = _missing(panels[0], board, costs, scale)
    handles, names = panels[0].get_legend_handles_labels()
    left = [(handle, name) for handle, name in zip(handles, names, strict=True) if name in unnamed]
    if left:
        panels[-1].legend(*zip(*left, strict=True), loc="center left", bbox_to_anchor=(1.07, 0.5))
    drawing.key(panels[0], board, _signs(board, found, scale), wrap=150 if compared else 95, lost=lost)
    return drawing.figure(panels[0])


def _panel(  # noqa: PLR0913
    axes: "Axes", board: Board, look: Mapping[str, Look], rows: Sequence[Row], costs: Mapping[str, float], scale: Scale,
    found: Front, spots: Mapping[str, Spot], *, named: bool,
) -> list[str]:  # fmt: skip
    """Points with intervals, the front and names; the names for which there was no room."""
    lines, marks, colors = [], [], []
    for row in rows:
        x, (value, low, high) = scale.at(costs[row.label]), spots[row.label]
        grey = row.label in found.dominated
        style = look[row.label]
        if grey:
            style = Look(DOMINATED, style.marker, "white" if style.fill == "white" else DOMINATED, style.line)
        axes.plot([x, x], [low, high], color=style.color, linewidth=1.4, alpha=0.45)
        drawing.point(axes, x, value, row, style, label=drawing.name(row))
        lines.append((x, low, x, high))
        marks.append((drawing.name(row), x, value))
        colors.append(drawing.GREY if grey else style.color)
    scale.apply(axes)
    ends = [end for row in rows for end in spots[row.label]]
    pad = 0.08 * (max(ends) - min(ends)) or 0.05 * abs(max(ends)) or 0.01
    axes.set_ylim(min(ends) - pad, max(ends) + pad)
    lines += _staircase(axes, [(scale.at(costs[s]), spots[s][0]) for s in found.steps if s in spots])
    return name_marks(axes, marks, lines, colors) if named else [name for name, _, _ in marks]


def _staircase(axes: "Axes", steps: Sequence[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    """Draw the front: what the best value at each price is, from the cheapest row to the end of the axis."""
    if not steps:
        return []
    right = axes.get_xlim()[1]
    x = [at for at, _ in steps] + [right]
    y = [value for _, value in steps] + [steps[-1][1]]
    axes.step(x, y, where="post", color=FRONT, linewidth=1.1, linestyle="-", alpha=0.7, zorder=1.5)
    level = [(x[i], y[i], x[i + 1], y[i]) for i in range(len(x) - 1)]
    return level + [(x[i + 1], y[i], x[i + 1], y[i + 1]) for i in range(len(x) - 1)]


def _missing(axes: "Axes", board: Board, costs: Mapping[str, float], scale: Scale) -> list[str]:
    """Rows over budget without a number: a cross on the axis at what they had cost; what the key says of them."""
    lost = _lost(board)
    known = {number: row for number, row in enumerate(lost, 1) if row.label in costs}
    drawing.numbered(
        axes, {n: (scale.at(costs[row.label]), 0.0) for n, row in known.items()}, ("data", "axes fraction")
    )
    rest = {number: (0.0, 0.0) for number in range(1, len(lost) + 1) if number not in known}
    drawing.numbered(axes, rest, "axes fraction")
    return [f"× {number} {row.label}: over budget, {limit_names(row)}" for number, row in enumerate(lost, 1)]


def _lost(board: Board) -> list[Row]:
    return [row for row in board.rows if row.status == OVER and not row.headline]


def _spot(found: "drawing.Found", factor: float) -> Spot:
    low, high = drawing.ends(found)
    return factor * found.value, factor * low, factor * high


def _signs(board: Board, found: Front, scale: Scale) -> list[str]:
    said = ["bars: 95 % intervals"]
    said += ["line: the best at each price or below"] if found.steps else []
    said += ["grey: another row costs no more and is better beyond the tie"] if found.dominated else []
    said += ["left of the break: 0"] if scale.zero is not None else []
    said += (
        ["not judged: rows over budget or with an unequal training"]
        if any(r.headline and (r.status != "ok" or r.label in board.unequal) for r in board.rows)
        else []
    )
    return said
