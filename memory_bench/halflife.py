"""How long a memory lasts: the half-life of accuracy over distance, with an interval that may be open.

The curve is acc(d) = c + (a - c) * 2^(-d / h): accuracy a right after the evidence, the floor c of a memory that holds
nothing, and the half-life h in the unit of the distances (tokens).

- The fit is maximum likelihood of hits (also of hits averaged over seeds: only the mean enters), or least squares for
  graded scores without bounds. It is profiled: for every h of a grid the best a is a one-dimensional concave problem,
  so all bootstrap samples are fitted at once.
- The bootstrap draws documents (clusters), never questions, and a floor that was measured is drawn with them.
- Nothing is claimed past the longest distance asked: a half-life beyond it is censored (``> 32,768``), and an upper end
  beyond it is open. A memory that is gone at the first distance has a lower end of 0.
- A model whose answers are not above the floor has no half-life; that is a verdict of its own.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memory_bench import stats
from memory_bench.episode import Estimate

Floats = NDArray[np.float64]
Floor = float | tuple[ArrayLike, ArrayLike]

MEASURED, NO_FALL, GONE, NO_MEMORY = "measured", "does not fall", "gone at once", "no memory"
MOST = 24  # distances of a fit; more are joined with their neighbours
_STEPS = 3  # points of the grid in an octave of h
_BELOW, _ABOVE = 4.0, 2.0  # the grid goes from the shortest distance / 4 to the longest times 2
_NEWTON = 5  # steps of the inner search, each safe through bisection
_LAPSE = 0.02  # answers in a distance's questions that may go the other way by accident


@dataclass(frozen=True, slots=True)
class HalfLife:
    """The result of a fit.

    Attributes:
        value: tokens; the longest distance asked where the curve does not fall by half within it, the shortest where it
            has fallen before it, NaN for ``no memory``.
        low, high: 95 % interval; high is None where it is open. Both are None for fewer than two documents.
        n: documents.
        verdict: ``measured``, ``does not fall`` (by half within what was asked), ``gone at once``, ``no memory``.
        start: a, the accuracy right after the evidence.
        floor: c.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    verdict: str
    start: float
    floor: float

    @property
    def censored(self) -> bool:
        """`value` is a bound and no estimate."""
        return self.verdict in (NO_FALL, GONE)

    def __str__(self) -> str:
        return half_life_text(self.estimate())

    def estimate(self, slice_: str = "") -> Estimate:
        """As a number of a result; a censored one says so in its `note`."""
        sign = {NO_FALL: "> ", GONE: "< "}.get(self.verdict)
        note = "" if self.verdict == MEASURED else self.verdict
        if sign:
            note = f"h {sign}{self.value:.0f}"
        return Estimate("half_life", self.value, self.low, self.high, self.n, slice_, "tokens", note=note)


def half_life_text(estimate: Estimate) -> str:
    """``5,100 [3,900, 7,200]``, ``> 32,768 [9,100, open)``, ``no memory``."""
    if not math.isfinite(estimate.value):
        return estimate.note or "–"
    sign = estimate.note[2:4] if estimate.note.startswith(("h > ", "h < ")) else ""
    text = f"{sign}{estimate.value:,.0f}"
    if estimate.low is None:
        return text
    return f"{text} [{estimate.low:,.0f}, {'open)' if estimate.high is None else f'{estimate.high:,.0f}]'}"


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
        """See `half_life` for the arguments."""
        documents, rows = np.unique(np.asarray(clusters), return_inverse=True)
        columns, centers = _joined(np.asarray(distances, dtype=np.float64))
        shape = (len(documents), len(centers))
        place = rows.ravel() * shape[1] + columns
        sums, counts = (
            np.bincount(place, weights=w, minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)
            for w in (np.asarray(scores, dtype=np.float64), None)
        )
        if not isinstance(floor, tuple):
            return cls(centers, sums, counts, float(floor), np.zeros(shape[0]), np.zeros(shape[0]))
        wiped, theirs = np.asarray(floor[0], dtype=np.float64), np.asarray(floor[1])
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


def half_life(
    scores: ArrayLike,
    distances: ArrayLike,
    clusters: ArrayLike,
    *,
    floor: Floor = 0.0,
    seed: int = 0,
    draws: int = 2000,
    graded: bool = False,
) -> HalfLife:
    """Fit the curve to questions.

    Args:
        scores: ``[n]``, 1 for a hit and 0 for a miss (or hits averaged over seeds); with `graded` any number.
        distances: ``[n]`` tokens between evidence and question, 0 allowed.
        clusters: ``[n]``, what questions share (the document): the bootstrap draws these.
        floor: chance level; or scores ``[m]`` of questions asked with memory wiped, and their clusters ``[m]``.
        seed: of the bootstrap.
        draws: bootstrap samples.
        graded: least squares instead of the likelihood of hits.

    Raises:
        ValueError: fewer than two distances, or hits outside 0..1.
    """
    values = np.asarray(scores, dtype=np.float64)
    if len(values) and not graded and (values.min() < 0 or values.max() > 1):
        raise ValueError("hits must lie between 0 and 1; pass graded=True for other scores")
    table = Table.of(values, distances, clusters, floor)
    if len(table.distances) < 2:
        raise ValueError("a half-life needs questions at two distances or more")
    units = len(table.sums)
    whole = np.ones((1, units))
    best, start, level = (float(part[0]) for part in fit(table, whole, graded))
    if not _remembers(table, seed, draws):
        return HalfLife(math.nan, None, None, units, NO_MEMORY, start, level)
    drawn = stats.bootstrap(units, seed, draws, lambda w: fit(table, w, graded)[0])
    longest, first = float(table.distances[-1]), _shortest(table.distances)
    low: float | None = None
    high: float | None = None
    if units > 1:
        low, high = _ends(best, drawn, table.distances, stats.tail(units))
        low, high = min(low, longest), None if high > longest else high
    if best > longest:
        return HalfLife(longest, low, None, units, NO_FALL, start, level)
    if best <= 0:
        return HalfLife(first, low, None if high is None else max(high, first), units, GONE, start, level)
    return HalfLife(best, low, high, units, MEASURED, start, level)


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
    grid = _grid(table.distances)
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


def _grid(distances: Floats) -> Floats:
    first, last = _shortest(distances) / _BELOW, float(distances[-1]) * _ABOVE
    return first * 2.0 ** (np.arange(math.ceil(_STEPS * math.log2(last / first)) + 1) / _STEPS)


def _shortest(distances: Floats) -> float:
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


def _remembers(table: Table, seed: int, draws: int) -> bool:
    """Whether the nearest distance or all together are above the floor, beyond the interval of either."""
    units = len(table.sums)
    for columns in (slice(1), slice(None)):
        excess = partial(_excess, table, columns)
        if units < 2:
            low = float(excess(np.ones((1, units)))[0])
        else:
            low = float(stats.percentiles(stats.bootstrap(units, seed, draws, excess), units)[0] or 0.0)
        if low > 0:
            return True
    return False


def _excess(table: Table, columns: slice, weights: Floats) -> Floats:
    """How far the mean score at some distances is above the floor, ``[draws]``."""
    hits, asked, floor = table.weighted(weights)
    above: Floats = hits[:, columns].sum(axis=1) / np.maximum(asked[:, columns].sum(axis=1), 1e-300) - floor
    return above


def _ends(best: float, drawn: Floats, distances: Floats, tail: float) -> tuple[float, float]:
    """At either end the wider of the expanded percentile interval and its reflection in log h.

    The estimate's distribution is skewed one way for half-lives near the shortest distance and the other way near the
    longest; each of the two intervals alone is too short at one end (`benchmarks/coverage.py`).
    """
    grid = _grid(distances)
    low, high = np.quantile(drawn, [tail, 1 - tail], method="inverted_cdf")  # some are 0 or infinite
    center, left, right = (min(max(float(h), grid[0]), grid[-1]) for h in (best, low, high))
    return min(float(low), center**2 / right), max(float(high), center**2 / left)


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
            ends.append(np.log2(np.clip(found, _shortest(table.distances), table.distances[-1])))
        difference: Floats = ends[0] - ends[1]
        return difference

    return statistic
