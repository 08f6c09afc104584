"""How rows are drawn, the same in all plots: markers, curves, and the crosses of rows that did not finish.

A row over budget is in every plot: its marks are crossed, its curve ends in a cross, and where it has no number at all
a numbered cross on the axis stands for it; names and keys say which limit ended it.
"""

from collections.abc import Mapping, Sequence
from textwrap import wrap as wrapped
from typing import TYPE_CHECKING, Any

from memory_bench.episode import Estimate
from memory_bench.report import words
from memory_bench.report.board import Board
from memory_bench.report.limits import limit_names, struck
from memory_bench.report.looks import Look
from memory_bench.report.rows import OVER, Row
from memory_bench.report.tables import PERCENT, short
from memory_bench.statistics.pairing import Difference

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "#666666"
STYLE: dict[Any, Any] = {
    "font.size": 10, "axes.titlesize": 10.5, "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#E6E6E6", "grid.linewidth": 0.8,
    "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 9, "svg.hashsalt": "memory-bench",
    "svg.fonttype": "path",
}  # fmt: skip


Found = Estimate | Difference
"""A number with an interval."""


def canvas(
    width: float, height: float, board: Board, what: str, *, columns: int = 1, share: bool = True
) -> "list[Axes]":
    """Panels side by side under one title that names data, backbone and budget; `share`: they have the same rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    # Two panels of one plot share the rows; two curves have their own scales.
    space = {"wspace": 0.08 if share else 0.28}
    panels = figure.subplots(1, columns, squeeze=False, sharey=share and columns > 1, gridspec_kw=space)[0]
    panels[0].set_title(f"{what}{words.equal_short(board)}\n{words.title(board)}", pad=10)
    return list(panels)


def grid(count: int, columns: int, board: Board, what: str, *, size: tuple[float, float]) -> "list[Axes]":
    """`count` panels of `size` (inches) in rows of `columns` under one title."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = -(-count // columns)
    # Room for tick labels and panel titles, which do not shrink with the panels.
    width, height = columns * (size[0] + 0.35), lines * (size[1] + 0.85) + 0.6
    figure = Figure(figsize=(max(width, 4.5), height))
    FigureCanvasAgg(figure)
    room = {"wspace": 0.35 / size[0] + 0.12, "hspace": 0.85 / size[1], "top": 1 - 0.8 / height, "bottom": 0.5 / height}
    panels = figure.subplots(lines, columns, squeeze=False, gridspec_kw=room).ravel()
    figure.suptitle(f"{what}{words.equal_short(board)}\n{words.title(board)}", x=0.02, y=1.0, ha="left", fontsize=10.5)
    for unused in panels[count:]:
        unused.set_visible(False)
    return list(panels[:count])


def figure(axes: "Axes") -> "Figure":
    """The figure a panel is part of."""
    from matplotlib.figure import Figure

    whole = axes.figure
    assert isinstance(whole, Figure)
    return whole


def whisker(
    axes: "Axes", y: float, value: float, ends: tuple[float, float], row: Row, look: Look, factor: float
) -> None:
    """A value with its interval, lying."""
    axes.plot([factor * v for v in ends], [y, y], color=look.color, linewidth=2, solid_capstyle="butt")
    point(axes, factor * value, y, row, look)


def line(
    axes: "Axes", points: Sequence[tuple[float, float, float, float]], look: Look, factor: float, label: str, *,
    band: bool = True,
) -> None:  # fmt: skip
    """A curve with its band (if it is to have one) from (x, value, low, high)."""
    x, value, low, high = ([p[i] * (factor if i else 1) for p in points] for i in range(4))
    axes.plot(x, value, color=look.color, linestyle=look.line, linewidth=1.6, marker=look.marker, markersize=5.5,
              markerfacecolor=look.fill, label=label)  # fmt: skip
    if band:
        axes.fill_between(x, low, high, color=look.color, alpha=0.1, linewidth=0)


def point(axes: "Axes", x: float, y: float, row: Row, look: Look, label: str | None = None) -> None:
    """The marker of a row, with a cross where not every seed is ok."""
    axes.plot(x, y, marker=look.marker, markersize=8, markeredgecolor=look.color, markerfacecolor=look.fill,
              markeredgewidth=1.6, linestyle="", label=label, zorder=3)  # fmt: skip
    if row.status != "ok":
        axes.plot(x, y, marker="x", markersize=12, color="black", markeredgewidth=1.4, linestyle="", zorder=4)


def cross(axes: "Axes", x: float, y: float, **more: Any) -> None:
    """The mark of what did not finish."""
    axes.plot([x], [y], marker="x", markersize=11, color="black", markeredgewidth=1.6, linestyle="", zorder=5,
              clip_on=False, **more)  # fmt: skip


def beside(
    axes: "Axes", text: str, at: tuple[float, float], coords: Any = "data", *, up: float = 8, right: bool = True
) -> None:
    """A name beside a cross, readable over lines."""
    axes.annotate(text, at, xycoords=coords, xytext=(6 if right else -6, up), textcoords="offset points", va="center",
                  ha="left" if right else "right", fontsize=8, color="black", annotation_clip=False, zorder=6,
                  bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8})  # fmt: skip


def ended(axes: "Axes", points: Sequence[tuple[float, float]], row: Row) -> None:
    """The marked end of a curve whose row is not ok in every seed; its name says which limit ended it."""
    if row.status != "ok" and points:
        cross(axes, *points[-1])


def absent(axes: "Axes", rows: Sequence[Row], drawn: Sequence[str]) -> list[str]:
    """A cross where the axes begin, for rows over budget that have no point; what the key says of them.

    Args:
        axes: of the plot.
        rows: of the board.
        drawn: labels of those that have a point.
    """
    lost = [row for row in rows if row.status == OVER and row.label not in drawn]
    numbered(axes, dict.fromkeys(range(1, len(lost) + 1), (0.0, 0.0)), "axes fraction")
    return [f"× {number} {row.label}: over budget, {places(row)}" for number, row in enumerate(lost, 1)]


def numbered(axes: "Axes", at: Mapping[int, tuple[float, float]], coords: Any) -> None:
    """Crosses with small numbers, which the key explains: there is no room for names where points are."""
    together: dict[tuple[float, float], list[int]] = {}
    for number, place in at.items():
        together.setdefault(place, []).append(number)
    for (x, y), numbers in together.items():
        cross(axes, x, y, transform=axes.transAxes if coords == "axes fraction" else axes.get_xaxis_transform())
        axes.annotate(",".join(map(str, numbers)), (x, y), xycoords=coords, xytext=(0, 8), textcoords="offset points",
                      ha="center", va="bottom", fontsize=7.5, annotation_clip=False, zorder=6)  # fmt: skip


def places(row: Row) -> str:
    """The limits that ended a row, and where: ``device_bytes 150 MB at segment 0/8``."""
    return ", ".join(f"{each.name} at {each.where}" if each.where else each.name for each in struck(row))


def arrow(axes: "Axes", at: tuple[float, float], look: Look, *, right: bool) -> None:
    """An open end of an interval."""
    axes.annotate("", at, xytext=(18 if right else -18, 0), textcoords="offset points", annotation_clip=False,
                  arrowprops={"arrowstyle": "<|-", "color": look.color, "linewidth": 2, "shrinkA": 0, "shrinkB": 0,
                              "mutation_scale": 11})  # fmt: skip


def ends(found: Found) -> tuple[float, float]:
    """The interval, or the value twice where there is none."""
    low, high = (found.value if x is None else x for x in (found.low, found.high))
    return low, high


def tick(row: Row, board: Board) -> str:
    """A row's name with its letters."""
    letter = board.letters.get(row.label, "")
    return f"{row.label}{flag(row)}{f'  {letter}' if letter else ''}"


def flag(row: Row) -> str:
    """What a reader must know of a row that is no plain result."""
    said = [row.status.replace("_", " ")] if row.status != "ok" and row.headline else []
    said += [f"look-ahead {row.look_ahead}"] if row.look_ahead else []
    said += ["pretrained"] if row.pretrained else []
    return f" ({', '.join(said)})" if said else ""


def name(row: Row) -> str:
    """A row's name in a plot: with its flag, and with the limit that ended some of its seeds."""
    said = flag(row)
    return row.label + (said.replace("over budget", f"over budget: {limit_names(row)}") if row.status == OVER else said)


def key(
    axes: "Axes", board: Board, said: Sequence[str], wrap: int = 1000, lost: Sequence[str] = (), down: float = 40
) -> None:
    """The lines under a plot that explain its signs.

    Args:
        axes: of the plot.
        board: that is drawn.
        said: of its signs.
        wrap: characters after which a line is broken at most.
        lost: of the numbered crosses, a line each.
        down: points below the axes.
    """
    said = list(said)
    said += ["hollow: controls"] if any(row.role == "control" for row in board.rows) else []
    said += ["crossed: not every seed is ok"] if any(r.status != "ok" and r.headline for r in board.rows) else []
    text = "\n".join([*wrapped(" · ".join(said), wrap), *lost])
    axes.annotate(text, (0, 0), xycoords="axes fraction", xytext=(0, -down), textcoords="offset points",
                  fontsize=8, color=GREY, va="top", annotation_clip=False)  # fmt: skip


def factor(metric: str) -> float:
    """Shares are drawn in percent."""
    return 100.0 if metric in PERCENT else 1.0


def label(metric: str, board: Board) -> str:
    """An axis' name: metric and direction."""
    name = {"bits_per_byte": "bits per byte", "nll": "nats per token"}.get(metric, short(metric))
    better = "higher" if board.higher_is_better else "lower"
    return f"{name}{' (%)' if metric in PERCENT else ''}, {better} is better"
