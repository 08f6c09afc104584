"""A board's headline at every distance, and whether the models stand in another order at the largest.

A headline is one number; what a memory holds longest may be the reverse of what it holds best. Only slices that are a
distance and nothing else count (``distance=384``), on boards that have two or more of them.
"""

import re

from memory_bench.episode import Estimate
from memory_bench.report.board import Board
from memory_bench.report.layout import NONE, Table
from memory_bench.report.rows import Row
from memory_bench.report.tables import interval, number, short

_DISTANCE = re.compile(r"distance=(\d+)")


def distances(board: Board) -> list[int]:
    """The distances of a board's headline in tokens, rising; empty where there are fewer than two."""
    found = {
        int(match[1])
        for row in board.rows
        for e in row.estimates
        if e.metric == board.metric and (match := _DISTANCE.fullmatch(e.slice))
    }
    return sorted(found) if len(found) > 1 else []


def heading(board: Board) -> str:
    """What stands over the table."""
    return f"{short(board.metric).capitalize()} by distance, in tokens from what is asked for to its question:"


def table(board: Board) -> Table | None:
    """One line a row, one column a distance; None where there are fewer than two distances."""
    far = distances(board)
    if not far:
        return None
    lines = []
    for row in board.rows:
        own = [_at(row, distance) for distance in far]
        if any(own):
            cells = (NONE if e is None else interval(e.value, e.low, e.high, board.metric) for e in own)
            lines.append((row.label, *cells))
    return Table(("model", *(f"{distance:,}" for distance in far)), tuple(lines))


def other_order(board: Board) -> str:
    """A sentence where two ranked rows stand the other way round at the largest distance; else empty."""
    far = distances(board)
    if not far:
        return ""
    sign = 1 if board.higher_is_better else -1
    ranked = []
    for row in board.rows:
        own, there = row.headline, _at(row, far[-1])
        if row.status == "ok" and own is not None and there is not None:
            ranked.append((row.label, sign * own.value, sign * there.value))
    if not any(a[1] > b[1] and a[2] < b[2] for a in ranked for b in ranked):
        return ""
    order = sorted(ranked, key=lambda row: -row[2])
    named = ", ".join(f"{label} {number(sign * there, board.metric)}" for label, _, there in order)
    return (
        f"At the largest distance, {far[-1]:,} tokens, the order is another than the headline's: {named}. Their "
        "intervals are in the table."
    )


def _at(row: Row, distance: int) -> Estimate | None:
    return row.find(row.metric, f"distance={distance}")
