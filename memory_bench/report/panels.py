"""Plots of the headline with intervals, of loss over the stream and of accuracy over distance.

Documents differ much more than models do, so wherever there is an equally trained window a second panel shows the
*paired* difference to it: that is where models part.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from memory_bench.episode import Estimate
from memory_bench.report import drawing
from memory_bench.report.board import WINDOW, Board
from memory_bench.report.limits import limit_names
from memory_bench.report.looks import Look
from memory_bench.report.naming import name_ends
from memory_bench.report.rows import OVER, Row
from memory_bench.report.tables import short
from memory_bench.statistics import pairing
from memory_bench.statistics.pairing import Difference
from memory_bench.statistics.shared import RATIOS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, Estimate]
FEW = 6
"""Rows up to which bands of the loss are drawn: documents differ more than models, so more bands hide the curves."""


def forest(board: Board, look: Mapping[str, Look]) -> "Figure":
    """The headline of every row and its difference to the window; rows without a number keep their line."""
    rows = [*board.rows, *board.ahead][::-1]
    gaps = {row.label: gap_to_window(board, row) for row in rows}
    compared = any(gaps.values())
    what = f"{short(board.metric)} with 95 % intervals"
    panels = drawing.canvas(9.0 if compared else 6.4, 1.0 + 0.36 * len(rows), board, what, columns=2 if compared else 1)
    main, factor = panels[0], drawing.factor(board.metric)
    for y, row in enumerate(rows):
        own, gap = row.headline, gaps[row.label]
        if own is None:
            why = row.status.replace("_", " ")
            if row.status == OVER:
                drawing.cross(main, 0.0, y, transform=main.get_yaxis_transform())
                why = f"{why}: {drawing.places(row)}"
            main.text(0.03, y, why, transform=main.get_yaxis_transform(), va="center", color=drawing.GREY,
                      style="italic", fontsize=9)  # fmt: skip
            continue
        drawing.whisker(main, y, own.value, drawing.ends(own), row, look[row.label], factor)
        if row.status == OVER:
            drawing.beside(main, limit_names(row), (factor * own.value, y), up=11)
        if gap is not None:
            drawing.whisker(panels[-1], y, gap.value, drawing.ends(gap), row, look[row.label], factor)
    for i, (name, value) in enumerate(sorted(board.levels.items(), key=lambda level: level[1])):
        main.axvline(factor * value, color=drawing.GREY, linewidth=1, linestyle=":")
        main.annotate(name, (factor * value, 1), xycoords=("data", "axes fraction"), xytext=(2 if i else -2, 0),
                      textcoords="offset points", rotation=90, va="top", ha="left" if i else "right", fontsize=8,
                      color=drawing.GREY)  # fmt: skip
    if board.window is not None and board.window.headline is not None:
        main.axvline(factor * board.window.headline.value, color="black", linewidth=1, linestyle="--", zorder=1)
    if compared:
        panels[1].axvline(0, color="black", linewidth=1, linestyle="--", zorder=1)
        panels[1].set_xlabel(f"paired difference to {WINDOW}{' (points)' if factor > 1 else ''}")
    main.set_yticks(range(len(rows)), [drawing.tick(row, board) for row in rows])
    main.set_ylim(-0.6, len(rows) - 0.4)
    for axes in panels:
        axes.grid(axis="y", visible=False)
        axes.locator_params(axis="x", nbins=6)
    main.set_xlabel(drawing.label(board.metric, board))
    trained = board.window is not None and any(r.usage.train_tokens for r in board.window.records)
    said = [f"dashed: {WINDOW}{', equally trained' if trained else ''}"] if board.window else []
    drawing.key(main, board, [*said, "rows that share a letter cannot be told apart"] if board.letters else said)
    return drawing.figure(main)


def curves(board: Board, look: Mapping[str, Look], kind: str) -> "Figure":
    """Loss over the stream (``position``) or the headline over the evidence's ``distance``, with bands."""
    drawn = slices(board, kind)
    metric = drawn[0][1][0][1].metric
    gaps = {row.label: _gaps_by_position(board, row, points) for row, points in drawn} if kind == "position" else {}
    compared = any(gaps.values())
    what = "loss by position in the stream" if kind == "position" else f"{short(metric)} by distance of the evidence"
    panels = drawing.canvas(10.5 if compared else 6.4, 4.0, board, what, columns=2 if compared else 1, share=False)
    main, factor = panels[0], drawing.factor(metric)
    bands = not compared or len(drawn) <= FEW
    for row, points in drawn:
        style, label = look[row.label], drawing.name(row)
        drawing.line(main, [(at, e.value, *drawing.ends(e)) for at, e in points], style, factor, label, band=bands)
        drawing.ended(main, [(at, factor * e.value) for at, e in points], row)
        if paired := gaps.get(row.label):
            drawing.line(panels[-1], [(at, d.value, *drawing.ends(d)) for at, d in paired], style, factor, label)
            drawing.ended(panels[-1], [(at, factor * d.value) for at, d in paired], row)
    if compared:
        panels[1].axhline(0, color="black", linewidth=1, linestyle="--")
        panels[1].set_ylabel(f"paired difference to {WINDOW}")
    _places(panels, board, drawn, factor, kind)
    main.set_ylabel(drawing.label(metric, board))
    lost = drawing.absent(main, board.rows, [row.label for row, _ in drawn])
    _name_curves(panels, drawn, gaps if compared else None, look, factor)
    drawing.key(main, board, ["bands: 95 % intervals" if bands else "bands: 95 % intervals, at the left in "
                              "leaderboard.csv"], lost=lost)  # fmt: skip
    return drawing.figure(main)


def _places(
    panels: "Sequence[Axes]", board: Board, drawn: Sequence[tuple[Row, list[Point]]], factor: float, kind: str
) -> None:
    """The axes of places in the text; over distances also the levels of the headline."""
    places = sorted({at for _, points in drawn for at, _ in points})
    for axes in panels:
        axes.set_xlabel("tokens read before" if kind == "position" else "tokens between evidence and question")
        if kind == "position" and places[-1] > 16 * places[0]:  # slices that double in length
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if kind == "distance":
        for name, value in board.levels.items():
            panels[0].axhline(factor * value, color=drawing.GREY, linewidth=1, linestyle=":")
            panels[0].annotate(name, (0.03, factor * value), xycoords=("axes fraction", "data"), xytext=(0, 2),
                               textcoords="offset points", fontsize=8, va="bottom", color=drawing.GREY)  # fmt: skip
        panels[0].set_xscale("log", base=2)
        panels[0].set_xticks(places, [f"{place:g}" for place in places])
        panels[0].minorticks_off()


def _name_curves(
    panels: "Sequence[Axes]", drawn: Sequence[tuple[Row, list[Point]]],
    gaps: Mapping[str, Sequence[tuple[float, Difference]]] | None, look: Mapping[str, Look], factor: float,
) -> None:  # fmt: skip
    """Names at the ends of the curves in the last panel; a legend for rows that have no curve there."""
    ends = []
    for row, points in drawn:
        last = (points[-1][0], factor * points[-1][1].value)
        if gaps is not None:
            paired = gaps[row.label]
            if not paired and row.label != WINDOW:
                continue
            last = (paired[-1][0], factor * paired[-1][1].value) if paired else (points[-1][0], 0.0)
        ends.append((drawing.name(row), *last, look[row.label].color))
    name_ends(panels[-1], ends)
    named = {name for name, *_ in ends}
    alone = [(handle, label) for handle, label in zip(*panels[0].get_legend_handles_labels(), strict=True)
             if label not in named]  # fmt: skip
    if alone:
        panels[0].legend(*zip(*alone, strict=True), title="not paired", loc="best")


def slices(board: Board, kind: str) -> list[tuple[Row, list[Point]]]:
    """Per row the points of a curve, (place, estimate), for ``position=a-b`` (its middle) or ``distance=d``.

    For positions the loss in nats per token is taken where the task gives it, else the headline.
    """
    result = []
    for row in (*board.rows, *board.ahead):
        cut = [e for e in row.estimates if e.slice.startswith(f"{kind}=")]
        wanted = "nll" if kind == "position" and any(e.metric == "nll" for e in cut) else board.metric
        points = []
        for e in cut:
            # A place within an episode (`position=3`) is no stretch of the stream.
            if (
                e.metric == wanted
                and len(ends := _bounds(e)) == (2 if kind == "position" else 1)
                and e.value == e.value
            ):
                points.append((sum(ends) / len(ends), e))
        if points:
            result.append((row, sorted(points, key=lambda point: point[0])))
    return result


def _bounds(estimate: Estimate) -> list[float]:
    return [float(x) for x in re.findall(r"\d+(?:\.\d+)?", estimate.slice)]


def gap_to_window(board: Board, row: Row) -> Difference | None:
    """A row's difference to the window; look-ahead rows are in no table's pairs and are compared here."""
    window = board.window
    if window is None or window.samples is None or row.samples is None or row.headline is None:
        return None
    found = board.against_window(row)
    if found is None and row.look_ahead:
        found = pairing.difference((row.label, row.samples), (window.label, window.samples), board.metric)
    return found


def _gaps_by_position(board: Board, row: Row, points: Sequence[Point]) -> list[tuple[float, Difference]]:
    """Paired differences to the window in each stretch of the stream."""
    window = board.window
    if window is None or window.samples is None or row.samples is None or row.label == window.label:
        return []
    result = []
    for at, estimate in points:
        ends = _bounds(estimate)
        if len(ends) != 2 or estimate.metric not in RATIOS:
            continue
        first, second = (f[(f["start"] >= ends[0]) & (f["start"] < ends[1])] for f in (row.samples, window.samples))
        found = pairing.difference((row.label, first), (window.label, second), estimate.metric)
        if found is not None:
            result.append((at, found))
    return result
