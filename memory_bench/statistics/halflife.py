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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import ArrayLike

from memory_bench.episode import Estimate
from memory_bench.finite import checked
from memory_bench.statistics import stats
from memory_bench.statistics.decay import Floats, Floor, Table, fit, grid_of, shortest

MEASURED, NO_FALL, GONE, NO_MEMORY = "measured", "does not fall", "gone at once", "no memory"


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


def half_life_of(estimates: Sequence[Estimate]) -> Estimate | None:
    """The half-life among a row's numbers, also where it is none."""
    return next((e for e in estimates if e.metric == "half_life" and not e.slice), None)


def verdict_of(estimate: Estimate) -> str:
    """The verdict that an estimate of a half-life says in its note."""
    signs = {"h > ": NO_FALL, "h < ": GONE}
    return signs.get(estimate.note[:4], estimate.note or MEASURED)


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
        NotFinite: a score, a distance or the floor is not finite.
    """
    values = checked(scores, "scores")
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
    longest, first = float(table.distances[-1]), shortest(table.distances)
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
    grid = grid_of(distances)
    low, high = np.quantile(drawn, [tail, 1 - tail], method="inverted_cdf")  # some are 0 or infinite
    center, left, right = (min(max(float(h), grid[0]), grid[-1]) for h in (best, low, high))
    return min(float(low), center**2 / right), max(float(high), center**2 / left)
