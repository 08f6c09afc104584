"""Plots of what a task cuts its answers by (`cuts.py`): updates of a fact, distance, place in the context."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from memory_bench.episode import Estimate
from memory_bench.report import drawing
from memory_bench.report.board import Board
from memory_bench.report.cuts import RATES, guess, numbers
from memory_bench.report.looks import Look
from memory_bench.report.rows import Row
from memory_bench.report.tables import PERCENT, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def shown_cuts(board: Board) -> dict[str, str]:
    """Which of these plots a board has numbers for: kind to caption."""
    shown = {}
    if len(numbers(board, "updates")) > 1:
        shown["updates"] = "answers by number of updates"
    if any(len(numbers(board, "distance", f"{rate}_rate")) > 1 for rate in RATES):
        shown["rates"] = "wrong answers by distance"
    if len(numbers(board, "place")) > 1:
        shown["place"] = f"{short(board.metric)} by place in the context"
    return shown


def by_updates(board: Board, look: Mapping[str, Look]) -> "Figure":
    """The headline and both rates over the number of updates."""
    metrics = [board.metric, *(f"{rate}_rate" for rate in RATES)]
    return _panels(board, look, "updates", metrics, "answers by number of updates", "updates of what is asked for")


def rates_by_distance(board: Board, look: Mapping[str, Look]) -> "Figure":
    """Both rates over the distance from the newest statement."""
    metrics = [f"{rate}_rate" for rate in RATES]
    return _panels(board, look, "distance", metrics, "wrong answers by distance", "tokens since the newest statement")


def by_place(board: Board, look: Mapping[str, Look]) -> "Figure":
    """The headline over the place of what is asked for among the pairs of the context."""
    what = f"{short(board.metric)} by place in the context"
    return _panels(board, look, "place", [board.metric], what, "pairs before the one asked for")


def _panels(
    board: Board, look: Mapping[str, Look], kind: str, metrics: Sequence[str], what: str, across: str
) -> "Figure":
    """A panel a metric, a curve a row; what a guess has is dotted."""
    shown = [metric for metric in metrics if numbers(board, kind, metric)]
    panels = drawing.canvas(1.6 + 4.6 * len(shown), 4.2, board, what, columns=len(shown), share=False)
    drawn: list[str] = []
    for axes, metric in zip(panels, shown, strict=True):
        factor = drawing.factor(metric)
        places = numbers(board, kind, metric)
        for row in board.everything:
            points = _points(row, metric, kind, places)
            if points:
                drawn.append(row.label)
                spread = [(at, e.value, *drawing.ends(e)) for at, e in points]
                drawing.line(axes, spread, look[row.label], factor, drawing.name(row))
                drawing.ended(axes, [(at, factor * e.value) for at, e in points], row)
        _dotted(axes, board, metric, kind, places)
        if kind == "distance" and places[0] > 0:
            axes.set_xscale("log", base=2)
        axes.set_xticks(places, [f"{place:,}" for place in places])
        axes.minorticks_off()
        axes.set_xlabel(across)
        better = "higher" if metric == board.metric and board.higher_is_better else "lower"
        axes.set_ylabel(f"{short(metric)}{' (%)' if metric in PERCENT else ''}, {better} is better")
        axes.set_ylim(0, 1.04 * factor)
    lost = drawing.absent(panels[0], board.rows, drawn)
    panels[-1].legend(*panels[0].get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(1.01, 1.0))
    drawing.key(panels[0], board, ["bands: 95 % intervals", "dotted: a guess among the choices"], wrap=95, lost=lost)
    return drawing.figure(panels[0])


def _points(row: Row, metric: str, kind: str, places: Sequence[int]) -> list[tuple[float, Estimate]]:
    found = ((float(place), row.find(metric, f"{kind}={place}")) for place in places)
    return [(at, e) for at, e in found if e is not None and math.isfinite(e.value)]


def _dotted(axes: "Axes", board: Board, metric: str, kind: str, places: Sequence[int]) -> None:
    """What a guess has: of a rate by place, of the headline its level."""
    factor, rate = drawing.factor(metric), metric.removesuffix("_rate")
    if rate in RATES:
        found = [(place, e.value) for place in places if (e := guess(board, rate, f"{kind}={place}"))]
        axes.plot([at for at, _ in found], [factor * value for _, value in found], color=drawing.GREY, linewidth=1.2,
                  linestyle=":")  # fmt: skip
    elif (chance := board.levels.get("chance")) is not None:
        axes.axhline(factor * chance, color=drawing.GREY, linewidth=1.2, linestyle=":")


CUT = {"updates": by_updates, "rates": rates_by_distance, "place": by_place}
"""Kind of plot to what draws it."""
