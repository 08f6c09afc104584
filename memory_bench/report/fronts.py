"""Which rows of a board are dominated: as dear as another or dearer, and worse than it beyond the tie.

A row falls behind another only where the board tells the two apart (a paired difference on identical documents or
questions, corrected, and larger than the noise between seeds); a row that cannot be told apart from a cheaper one may
be as good, and stays. Where there is no paired test the two intervals must not touch. Rows over budget, and those whose
training was not as long as the others', neither dominate nor are judged: their numbers are of something else.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from memory_bench.report.board import Board
from memory_bench.report.rows import Row


@dataclass(frozen=True, slots=True)
class Front:
    """What a board's rows are in the plane of one cost and the headline.

    Attributes:
        dominated: label to the label of a row that costs no more and is better.
        steps: labels on the front, by rising cost: each better than all that cost no more.
    """

    dominated: Mapping[str, str]
    steps: tuple[str, ...]


def front(board: Board, costs: Mapping[str, float]) -> Front:
    """The front of the rows with a cost, see the top of this file."""
    judged = [row for row in board.rows if row.label in costs and is_judged(board, row)]
    dominated: dict[str, str] = {}
    for row in judged:
        better = [o for o in judged if costs[o.label] <= costs[row.label] and is_better(board, o, row)]
        if better:
            dominated[row.label] = better[0].label
    sign = 1 if board.higher_is_better else -1
    values = {row.label: sign * row.headline.value for row in judged if row.headline}
    steps: list[str] = []
    for label in sorted(values, key=lambda name: (costs[name], -values[name], name)):
        if label not in dominated and (not steps or values[label] > values[steps[-1]]):
            steps.append(label)
    return Front(dominated, tuple(steps))


def is_judged(board: Board, row: Row) -> bool:
    """It finished, trained as long as the others, and so may dominate and be dominated."""
    return row.headline is not None and row.status == "ok" and row.label not in board.unequal


def is_better(board: Board, a: Row, b: Row) -> bool:
    """Whether `a` beats `b` in the headline beyond the tie."""
    if a.label == b.label or a.headline is None or b.headline is None:
        return False
    sign = 1 if board.higher_is_better else -1
    pair = board.pair(a.label, b.label)
    if pair is not None:
        return pair.told_apart and sign * pair.value > 0
    ends = (a.headline.low, a.headline.high, b.headline.low, b.headline.high)
    if None in ends:
        return False
    low, high, other_low, other_high = (float(end) for end in ends if end is not None)
    return low > other_high if board.higher_is_better else high < other_low
