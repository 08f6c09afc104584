"""What a task cuts its answers by beside distance: the number of updates of a fact, its place among others.

Where a task says what kind of wrong its answers are (`stale_rate`, `alien_rate`), those rates have tables of their own,
with the rate of a guess among the same choices (`stale_chance`, `alien_chance`) as the last line.
"""

import re
from collections.abc import Mapping, Sequence

from memory_bench.episode import Estimate
from memory_bench.report.board import Board
from memory_bench.report.layout import NONE, Table
from memory_bench.report.tables import interval, number, short

CUTS = {"updates": "number of updates", "place": "place in the context, in pairs before the one asked for"}
RATES = {
    "stale": "Stale rate (an older value of the same key)",
    "alien": "Alien rate (a value of another key, or one never stated)",
}


def numbers(board: Board, kind: str, metric: str = "") -> list[int]:
    """Where a metric (the headline) has slices ``kind=…``, rising."""
    wanted = metric or board.metric
    found = (
        re.fullmatch(rf"{kind}=(\d+)", e.slice) for r in board.everything for e in r.estimates if e.metric == wanted
    )
    return sorted({int(match[1]) for match in found if match})


def tables(board: Board) -> list[tuple[str, Table]]:
    """(Heading, table) of everything that is cut: the headline, and each rate by updates and by distance."""
    found = []
    for kind, what in CUTS.items():
        if places := numbers(board, kind):
            found.append(
                (f"{short(board.metric).capitalize()} by {what}:", _table(board, board.metric, {kind: places}))
            )
    for rate, what in RATES.items():
        metric = f"{rate}_rate"
        cuts = {kind: places for kind in ("updates", "distance") if (places := numbers(board, kind, metric))}
        if cuts:
            where = " and ".join("distance in tokens" if kind == "distance" else CUTS[kind] for kind in cuts)
            found.append((f"{what} by {where}, the last line that of a guess:", _table(board, metric, cuts, rate)))
    return found


def _table(board: Board, metric: str, cuts: Mapping[str, Sequence[int]], rate: str = "") -> Table:
    """One line a row, one column a slice; of a rate, also what a guess has."""
    columns = [(f"{kind}={place}", _column(kind, place, cuts)) for kind, places in cuts.items() for place in places]
    lines = []
    for row in board.everything:
        own = [row.find(metric, name) for name, _ in columns]
        if any(own):
            cells = (NONE if e is None else interval(e.value, e.low, e.high, metric) for e in own)
            lines.append((row.label, *cells))
    if rate:
        guesses = [guess(board, rate, name) for name, _ in columns]
        lines.append(("(a guess)", *(NONE if e is None else number(e.value, metric) for e in guesses)))
    return Table(("model", *(title for _, title in columns)), tuple(lines))


def _column(kind: str, place: int, cuts: Mapping[str, Sequence[int]]) -> str:
    """A column's title: the number alone where there is one kind only."""
    if len(cuts) == 1:
        return f"{place:,}"
    return f"{place:,} tokens" if kind == "distance" else f"{place} update{'' if place == 1 else 's'}"


def guess(board: Board, rate: str, name: str) -> Estimate | None:
    """The rate of a guess in a slice, the same for all rows."""
    return next((e for row in board.everything if (e := row.find(f"{rate}_chance", name))), None)
