"""Plots of retention: accuracy over distance, half-lives, depth by length, surprisal by delay.

What a reader needs to judge a curve is in its panel: chance, the same models with memory wiped, the ceiling with the
evidence in the prompt, and for pools that drop at random the accuracy that would follow from what is left of a block.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from memory_bench.episode import Estimate
from memory_bench.report import drawing
from memory_bench.report.board import Board
from memory_bench.report.looks import Look
from memory_bench.report.panels import Point, slices
from memory_bench.report.rows import OVER, Row
from memory_bench.report.tables import short
from memory_bench.statistics.halflife import GONE, NO_FALL, half_life_of, half_life_text, verdict_of
from memory_bench.statistics.retention import expected_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REFERENCES = (("ceiling", "evidence in the prompt"), ("wiped", "memory wiped"))
MANY = 8  # ticks with labels on an axis of distances


def retention(board: Board, look: Mapping[str, Look]) -> "Figure":
    """The headline over the evidence's distance, with references and expected curves."""
    drawn = slices(board, "distance")
    (axes,) = drawing.canvas(7.2, 4.4, board, f"{short(board.metric)} by distance of the evidence")
    factor = drawing.factor(board.metric)
    _references(axes, board, factor)
    faded = False
    for row, points in drawn:
        style, label = look[row.label], drawing.name(row)
        drawing.line(axes, [(at, e.value, *drawing.ends(e)) for at, e in points], style, factor, label)
        drawing.ended(axes, [(at, factor * e.value) for at, e in points], row)
        curve = _expected(row, points, board)
        if curve:
            axes.plot(*zip(*((at, factor * value) for at, value in curve), strict=True), color=style.color,
                      linestyle=(0, (5, 2.5)), linewidth=1.1, alpha=0.85)  # fmt: skip
            faded = True
    distance_axis(axes, sorted({at for _, points in drawn for at, _ in points}))
    axes.set_xlabel("tokens between evidence and question")
    axes.set_ylabel(drawing.label(board.metric, board))
    axes.set_ylim(0, 1.04 * factor)
    lost = drawing.absent(axes, board.rows, [row.label for row, _ in drawn])
    axes.legend(loc="upper left", bbox_to_anchor=(1.24, 1.0))
    said = ["bands: 95 % intervals"]
    said += ["thin dashes: accuracy if it faded with what is left in a pool that drops at random"] if faded else []
    drawing.key(axes, board, said, wrap=95, lost=lost)
    return drawing.figure(axes)


def half_lives(board: Board, look: Mapping[str, Look]) -> "Figure":
    """Half-life of every row with its interval; an arrow where an end is open or the half-life itself a bound."""
    rows = board.everything[::-1]
    (axes,) = drawing.canvas(6.8, 1.0 + 0.4 * len(rows), board, "half-life of what was read")
    asked = [at for _, points in slices(board, "distance") for at, _ in points if at > 0]
    longest = max(asked, default=1.0)
    lowest = _lowest(rows, min(asked, default=1.0))
    for y, row in enumerate(rows):
        own = half_life_of(row.estimates)
        if own is None or not math.isfinite(own.value):
            said = row.status.replace("_", " ") if own is None else own.note
            if row.status == OVER:
                drawing.cross(axes, 0.0, y, transform=axes.get_yaxis_transform())
                said = "; ".join(filter(None, (f"over budget: {drawing.places(row)}", own.note if own else "")))
            axes.text(0.03, y, said, transform=axes.get_yaxis_transform(), va="center", color=drawing.GREY,
                      style="italic", fontsize=9)  # fmt: skip
            continue
        style = look[row.label]
        low = lowest if own.low is None or own.low < lowest else own.low
        high = longest if own.high is None else max(own.high, lowest)
        if own.low is not None:
            axes.plot([low, high], [y, y], color=style.color, linewidth=2, solid_capstyle="butt")
            if own.high is None:
                drawing.arrow(axes, (high, y), style, right=True)
            if own.low < lowest:
                drawing.arrow(axes, (low, y), style, right=False)
        drawing.point(axes, max(own.value, lowest), y, row, style)
        axes.annotate(half_life_text(own), (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8.5,
                      color=drawing.GREY)  # fmt: skip
    axes.axvline(longest, color=drawing.GREY, linewidth=1, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xlim(lowest / 1.25, 1.4 * longest)
    ticks = sorted({at for at in asked if lowest <= at})
    _label_ticks(axes, ticks)
    axes.set_yticks(range(len(rows)), [drawing.name(row) for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("half-life (tokens), higher is better")
    shown = {verdict_of(own) for row in rows if (own := half_life_of(row.estimates))}
    signs = ["bars: 95 % intervals", "arrows: open ends", "dotted: longest distance asked"]
    signs += ["markers on it: the fitted curve does not fall by half within it"] if NO_FALL in shown else []
    signs += ["markers at the shortest distance: half is gone before it"] if GONE in shown else []
    drawing.key(axes, board, signs, wrap=95)
    return drawing.figure(axes)


def depth_by_length(board: Board, look: Mapping[str, Look]) -> "Figure":
    """One panel a row: the headline for every depth of the needle and length of the text."""
    del look
    found = [(row, grid) for row in board.everything if (grid := depths(row, board.metric))]
    lengths = sorted({length for _, grid in found for _, length in grid})
    places = sorted({depth for _, grid in found for depth, _ in grid})
    columns = min(len(found), 3)
    panels = drawing.grid(len(found), columns, board, f"{short(board.metric)} by depth and length",
                          size=(1.2 + 0.62 * len(lengths), 0.9 + 0.36 * len(places)))  # fmt: skip
    top = 1.0 if drawing.factor(board.metric) > 1 else max(e.value for _, grid in found for e in grid.values())
    for place, (axes, (row, grid)) in enumerate(zip(panels, found, strict=True)):
        values = [[grid[d, n].value if (d, n) in grid else math.nan for n in lengths] for d in places]
        axes.imshow(values, vmin=0.0, vmax=top, cmap="cividis", aspect="auto", origin="upper")
        for (depth, length), e in grid.items():
            text = f"{drawing.factor(board.metric) * e.value:.0f}"
            axes.text(lengths.index(length), places.index(depth), text, ha="center", va="center", fontsize=8,
                      color="black" if e.value > 0.55 * top else "white")  # fmt: skip
        axes.set_xticks(range(len(lengths)), [f"{n:,g}" for n in lengths])
        axes.set_yticks(range(len(places)), [f"{d:g}" for d in places])
        axes.grid(visible=False)
        axes.set_title(drawing.name(row), fontsize=9.5, loc="center")
        axes.set_xlabel("tokens of text")
        if place % columns == 0:
            axes.set_ylabel("depth (0: start)")
    return drawing.figure(panels[0])


def by_delay(board: Board, look: Mapping[str, Look]) -> "Figure":
    """What a list still does for a reader after a delay: the measure that the task cuts by ``delay``."""
    metric, drawn = delays(board)
    (axes,) = drawing.canvas(7.2, 4.2, board, f"{short(metric)} by delay")
    factor = drawing.factor(metric)
    for row, points in drawn:
        points_ = [(at, e.value, *drawing.ends(e)) for at, e in points]
        drawing.line(axes, points_, look[row.label], factor, drawing.name(row))
        drawing.ended(axes, [(at, factor * e.value) for at, e in points], row)
    lost = drawing.absent(axes, board.rows, [row.label for row, _ in drawn])
    one = drawn[0][1][0][1]
    if min(e.value for _, points in drawn for _, e in points) <= 0.25 * max(e.value for _, p in drawn for _, e in p):
        axes.axhline(0, color=drawing.GREY, linewidth=1, linestyle=":")
    distance_axis(axes, sorted({at for _, points in drawn for at, _ in points}))
    axes.set_xlabel("tokens between the two readings")
    better = "higher" if one.higher_is_better else "lower"
    axes.set_ylabel(f"{short(metric)}{f' ({one.unit})' if one.unit else ''}, {better} is better")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
    drawing.key(axes, board, ["bands: 95 % intervals"], lost=lost)
    return drawing.figure(axes)


def depths(row: Row, metric: str) -> dict[tuple[float, float], Estimate]:
    """(depth, length) to the estimate of slices ``depth=…,length=…``."""
    found = {}
    for e in row.estimates:
        match = re.fullmatch(r"depth=([\d.]+),length=(\d+)", e.slice)
        if match and e.metric == metric and math.isfinite(e.value):
            found[float(match[1]), float(match[2])] = e
    return found


def delays(board: Board) -> tuple[str, list[tuple[Row, list[Point]]]]:
    """The metric that is cut by ``delay=…`` (the headline, if it is) and per row its points."""
    cut = [e.metric for row in board.rows for e in row.estimates if re.fullmatch(r"delay=\d+", e.slice)]
    metric = board.metric if board.metric in cut or not cut else cut[0]
    result = []
    for row in board.everything:
        points = [
            (float(match[1]), e)
            for e in row.estimates
            if e.metric == metric and math.isfinite(e.value) and (match := re.fullmatch(r"delay=(\d+)", e.slice))
        ]
        if points:
            result.append((row, sorted(points, key=lambda point: point[0])))
    return metric, result


def distance_axis(axes: "Axes", places: Sequence[float]) -> None:
    """A logarithmic axis with a tick at every place; 0 has a place before the first of the others."""
    positive = [at for at in places if at > 0]
    if not positive or positive[-1] == positive[0]:
        return
    if places[0] <= 0:
        axes.set_xscale("symlog", base=2, linthresh=positive[0], linscale=0.7)
    else:
        axes.set_xscale("log", base=2)
    _label_ticks(axes, places)


def _label_ticks(axes: "Axes", places: Sequence[float]) -> None:
    """Ticks at all places; names at so many of them that they do not touch, the last one among these."""
    step = -(-len(places) // MANY)
    named = {at for i, at in enumerate(reversed(places)) if i % step == 0}
    axes.set_xticks(list(places), [f"{at:,g}" if at in named else "" for at in places])
    axes.minorticks_off()


def _references(axes: "Axes", board: Board, factor: float) -> None:
    """Chance and other levels as lines; ceiling and wiped memory as the span of all rows; named at the right."""
    names = [(factor * value, name) for name, value in board.levels.items()]
    for value, _ in names:
        axes.axhline(value, color=drawing.GREY, linewidth=1, linestyle=":")
    for control, name in REFERENCES:
        found = [row.find(board.metric, f"control:{control}") for row in board.everything]
        values = [factor * e.value for e in found if e is not None]
        if values:
            low, high, edge = min(values), max(values), 0.003 * factor
            axes.axhspan(low - edge, high + edge, color=drawing.GREY, alpha=0.16, linewidth=0, zorder=0)
            names.append(((low + high) / 2, name))
    place = -1.0
    for value, name in sorted(names):
        place = max(value, place + 0.05 * factor)  # names do not touch
        axes.annotate(name, (1.01, place), xycoords=("axes fraction", "data"), fontsize=8, va="center",
                      color=drawing.GREY, annotation_clip=False)  # fmt: skip


def _expected(row: Row, points: Sequence[Point], board: Board) -> list[tuple[float, float]]:
    """Of the first record that has the model's rule."""
    rules = [r.provenance.get("expected_retention") for r in row.records]
    shares = {float(d): float(share) for d, share in next(filter(None, rules), [])}
    wiped = row.find(board.metric, "control:wiped")
    floor = board.levels.get("chance", 0.0) if wiped is None else wiped.value
    return expected_curve([(at, e.value) for at, e in points], shares, floor)


def _lowest(rows: Sequence[Row], shortest: float) -> float:
    """Left end of the axis of half-lives."""
    lows = [own.low for row in rows if (own := half_life_of(row.estimates)) and own.low]
    return max(min([*lows, shortest]), shortest / 4)
