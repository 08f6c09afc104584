"""The curve acc(d) = c + (a - c) * 2^(-d / h), fitted to all bootstrap samples at once.

For every h of a grid the best a is a one-dimensional concave problem, solved for `[draws]` samples side by side; the
best h is the vertex of the parabola through the best point of the grid and its neighbours.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memory_bench.finite import checked

Floats = NDArray[np.float64]
Floor = float | tuple[ArrayLike, ArrayLike]
"""The floor c: a number, or scores of questions asked with memory wiped and their clusters."""

MOST = 24  # distances of a fit; more are joined with their neighbours
_STEPS = 3  # points of the grid in an octave of h
_BELOW, _ABOVE = 4.0, 2.0  # the grid goes from the shortest distance / 4 to the longest times 2
_NEWTON = 5  # steps of the inner search, each safe through bisection
_LAPSE = 0.02  # answers in a distance's questions that may go the other way by accident


@dataclass(frozen=True, slots=True)
class Table:
    """Scores by document and distance, what every bootstrap sample is a weighted sum of.

    Attributes:
        distances: ``[distances]``, rising.
        sums: ``[documents, distances]`` of scores.
        counts: ``[documents, distances]`` of questions.
        floor: a number, or None: that of `floor_sums` over `floor_counts`, both ``[documents]``.
    """

    distances: Floats
    sums: Floats
    counts: Floats
    floor: float | None
    floor_sums: Floats
    floor_counts: Floats

    @classmethod
    def of(cls, scores: ArrayLike, distances: ArrayLike, clusters: ArrayLike, floor: Floor = 0.0) -> "Table":
        """See `half_life` for the arguments.

        Raises:
            NotFinite: a score, a distance or the floor is not finite.
        """
        documents, rows = np.unique(np.asarray(clusters), return_inverse=True)
        columns, centers = _joined(checked(distances, "distances"))
        shape = (len(documents), len(centers))
        place = rows.ravel() * shape[1] + columns
        sums, counts = (
            np.bincount(place, weights=w, minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)
            for w in (checked(scores, "scores"), None)
        )
        if not isinstance(floor, tuple):
            return cls(centers, sums, counts, float(checked(floor, "floors")), np.zeros(shape[0]), np.zeros(shape[0]))
        wiped, theirs = checked(floor[0], "scores with memory wiped"), np.asarray(floor[1])
        known = np.isin(theirs, documents)
        row = np.searchsorted(documents, theirs[known])
        below, asked = (
            np.bincount(row, weights=w, minlength=shape[0]).astype(np.float64) for w in (wiped[known], None)
        )
        return cls(centers, sums, counts, None, below, asked)

    def weighted(self, weights: Floats) -> tuple[Floats, Floats, Floats]:
        """Sums and counts ``[draws, distances]`` and the floor ``[draws]`` for weights ``[draws, documents]``."""
        if self.floor is not None:
            floor = np.full(len(weights), self.floor)
        else:
            # Half a hit in one more question: a floor of exactly 0 would make every far hit impossible.
            floor = (weights @ self.floor_sums + 0.5) / (weights @ self.floor_counts + 1)
        return weights @ self.sums, weights @ self.counts, floor


def fit(table: Table, weights: Floats, graded: bool = False) -> tuple[Floats, Floats, Floats]:
    """Half-life, start and floor of every bootstrap sample, ``[draws]`` each.

    Half-lives that the distances cannot hold are 0 (below a quarter of the shortest) and infinite (beyond twice the
    longest).

    Args:
        table: of all documents.
        weights: ``[draws, documents]``, how often each document was drawn.
        graded: see `half_life`.
    """
    hits, asked, floor = table.weighted(weights)
    grid = grid_of(table.distances)
    inner = _least_squares if graded else _likelihood
    profile, height = np.empty((len(grid), len(floor))), np.empty((len(grid), len(floor)))
    near = np.maximum(1 - floor, 0.0) / 2
    for number, share in enumerate(np.exp2(-table.distances / grid[:, None])):
        # The best height changes little from one h to the next.
        profile[number], near = inner(hits, asked, floor, share, near)
        height[number] = near
    best = profile.argmax(axis=0)
    inside = np.clip(best, 1, len(grid) - 2)
    draws = np.arange(profile.shape[1])
    left, middle, right = (profile[inside + k, draws] for k in (-1, 0, 1))
    # The vertex of the parabola through the best point and its neighbours, in steps of the grid.
    bend = np.minimum(left - 2 * middle + right, -1e-12)
    offset = np.clip((left - right) / (2 * bend), -0.5, 0.5)
    found = grid[inside] * 2 ** (offset / _STEPS)
    found = np.where(best == 0, 0.0, np.where(best == len(grid) - 1, np.inf, found))
    return found, floor + height[best, draws], floor


def grid_of(distances: Floats) -> Floats:
    """Half-lives that are tried, from a quarter of the shortest distance to twice the longest."""
    first, last = shortest(distances) / _BELOW, float(distances[-1]) * _ABOVE
    return first * 2.0 ** (np.arange(math.ceil(_STEPS * math.log2(last / first)) + 1) / _STEPS)


def shortest(distances: Floats) -> float:
    """Above 0."""
    return float(distances[distances > 0][0])


def _likelihood(hits: Floats, asked: Floats, floor: Floats, share: Floats, near: Floats) -> tuple[Floats, Floats]:
    """Greatest log-likelihood for one h over a - c in [0, 1 - c], and where that is, ``[draws]`` each.

    It is searched from `near`, the place for another h.
    """
    # Every answer has a small chance of going the other way, or one lucky hit far from the evidence would outweigh all
    # others where the floor is 0.
    lapse = _LAPSE / (asked.sum(axis=1) / len(share) + 1)
    scale = (1 - 2 * lapse)[:, None]
    slope, base, misses = scale * share, lapse[:, None] + scale * floor[:, None], asked - hits
    low, high, height = np.zeros(len(floor)), np.maximum(1 - floor, 0.0), near
    for _ in range(_NEWTON):
        p = base + slope * height[:, None]
        right, wrong = hits / p, misses / (1 - p)
        gain = ((right - wrong) * slope).sum(axis=1)
        bend = ((right / p + wrong / (1 - p)) * slope**2).sum(axis=1)
        low, high = np.where(gain > 0, height, low), np.where(gain > 0, high, height)
        step = height + gain / np.maximum(bend, 1e-300)
        height = np.where((step >= low) & (step <= high), step, (low + high) / 2)
    p = base + slope * height[:, None]
    return (hits * np.log(p) + misses * np.log1p(-p)).sum(axis=1), height


def _least_squares(hits: Floats, asked: Floats, floor: Floats, share: Floats, near: Floats) -> tuple[Floats, Floats]:
    """As `_likelihood` for scores without bounds: minus the squared error of the means, weighted by questions."""
    del near
    mean = hits / np.maximum(asked, 1e-300)
    excess = mean - floor[:, None]
    height = np.maximum((asked * excess * share).sum(axis=1) / np.maximum((asked * share**2).sum(axis=1), 1e-300), 0.0)
    return -(asked * (excess - height[:, None] * share) ** 2).sum(axis=1), height


def _joined(distances: Floats) -> tuple[NDArray[np.intp], Floats]:
    """Column of every question and the distance of every column: each distance, or the mean of neighbours."""
    own, columns = np.unique(distances, return_inverse=True)
    if len(own) <= MOST:
        return columns.ravel(), own
    edges = np.quantile(distances, np.linspace(0, 1, MOST + 1)[1:-1])
    groups = np.unique(np.searchsorted(edges, distances, side="right"), return_inverse=True)[1].ravel()
    return groups, np.bincount(groups, weights=distances) / np.bincount(groups)


def log_ratio(tables: Sequence[Table], graded: bool = False) -> Callable[[Floats], Floats]:
    """log2(h of the first / h of the second) of weights ``[draws, documents]``, for documents that both have.

    Half-lives are held between the shortest and the longest distance asked: what lies beyond is not known to differ.
    """

    def statistic(weights: Floats) -> Floats:
        ends = []
        for table in tables:
            found = fit(table, weights, graded)[0]
            ends.append(np.log2(np.clip(found, shortest(table.distances), table.distances[-1])))
        difference: Floats = ends[0] - ends[1]
        return difference

    return statistic
