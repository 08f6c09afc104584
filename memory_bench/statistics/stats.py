"""Intervals, paired differences and multiplicity: the statistics behind every number of a report.

- All intervals are percentile bootstraps over *independent units* (documents, blocks of a document, clusters of
  questions), never over tokens. Resampling is a matrix of weights `[draws, units]`, so sums over resampled units are
  one matrix product.
- The percentiles are widened for few units ("expanded percentile interval", Hesterberg 2015, doi
  10.1080/00031305.2015.1089789): the plain interval of n units is too narrow by about sqrt((n-1)/n) z/t. For 500
  units nothing changes.
- P-values come from the bootstrap's standard error with Student's t, because counting draws cannot resolve the small
  values a Holm correction over many pairs needs. No p-value is below 2^(1-n): n units cannot give more evidence than
  n equal signs.
- Models are compared on identical units; differences below the noise between training seeds are ties whatever the
  documents say (`seed_floor`).
- What is not finite is refused (`NotFinite`), never left out. A bootstrap sample in which a statistic is not defined
  (0/0) counts as beyond both ends of its interval, which then has none where there are many of them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, stdtr, stdtrit

from memory_bench.errors import NotFinite
from memory_bench.finite import checked

Floats = NDArray[np.float64]
FEW = 20  # below so many documents, parts of them are the independent units
Interval = tuple[float, float | None, float | None]
"""Value, low, high. Low and high are None for fewer than two units; the value is NaN for none."""

LEVEL = 0.95
_CHUNK = 4_000_000  # entries of the weight matrix held at once: 32 MB
_KEPT = 8 * _CHUNK  # entries that are kept for further statistics


def ratio_interval(numerator: ArrayLike, denominator: ArrayLike, *, seed: int, draws: int = 2000) -> Interval:
    """sum(numerator) / sum(denominator) with its interval over units.

    Args:
        numerator: `[units]`, for example the nats of each document.
        denominator: `[units]`, for example its bytes.
        seed: of the resampling.
        draws: bootstrap samples.
    """
    top, bottom = _floats(numerator), _floats(denominator)
    value = float(ratio(top.sum(), bottom.sum()))
    drawn = bootstrap(len(top), seed, draws, lambda w: ratio(w @ top, w @ bottom))
    return value, *percentiles(drawn, len(top))


def mean_interval(values: ArrayLike, clusters: ArrayLike, *, seed: int, draws: int = 2000) -> Interval:
    """Mean of `values` `[n]` with an interval over `clusters` `[n]` (what the values share, for example a document)."""
    sums, counts = _by_cluster(_floats(values), clusters)
    return ratio_interval(sums, counts, seed=seed, draws=draws)


def statistic_interval(
    statistic: Callable[[NDArray[np.intp]], float], clusters: ArrayLike, *, seed: int, draws: int = 2000
) -> Interval:
    """Any statistic with an interval over clusters; slower than the functions for means and ratios.

    Args:
        statistic: of the rows whose indices it is given (rows may repeat), for example
            ``lambda rows: macro_f1(predicted[rows], answer[rows])``.
        clusters: `[n]`, what the rows share.
        seed: of the resampling.
        draws: bootstrap samples.
    """
    codes, units = _codes(clusters)
    if not units:
        return math.nan, None, None
    order = np.argsort(codes, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(codes))[:-1])
    value = float(statistic(np.arange(len(codes))))
    rng = np.random.default_rng(seed)
    picks = rng.integers(units, size=(draws if units > 1 else 0, units))
    drawn = np.array([statistic(np.concatenate([members[i] for i in pick])) for pick in picks], dtype=np.float64)
    return value, *percentiles(drawn, units)


def scored_units(clusters: ArrayLike, episodes: ArrayLike, starts: ArrayLike, tokens: ArrayLike) -> NDArray[np.intp]:
    """The independent unit of every scored stretch: its cluster; with few of them its episode, cut by `text_units`.

    Args:
        clusters: `[n]`, what episodes share (a work).
        episodes: `[n]`, the episode of each stretch.
        starts: `[n]`, token offset of the stretch in its episode.
        tokens: `[n]`, its length.

    Returns:
        `[n]`, numbers from 0.
    """
    many = _codes(clusters)[1] >= FEW
    return text_units(clusters if many else episodes, starts, tokens, at_least=FEW)


def text_units(documents: ArrayLike, starts: ArrayLike, tokens: ArrayLike, at_least: int = FEW) -> NDArray[np.intp]:
    """The independent unit of every scored stretch of text: its document, or a block of it where documents are few.

    With fewer than `at_least` documents each is cut into equally long blocks so that there are `at_least` units. A
    stretch belongs to the block its first token is in, so models with other segment lengths get the same blocks.

    Args:
        documents: `[n]`, the document of each stretch.
        starts: `[n]`, token offset of the stretch in its document.
        tokens: `[n]`, its length.
        at_least: how many units there shall be.

    Returns:
        `[n]`, numbers from 0.
    """
    codes, count = _codes(documents)
    if not count or count >= at_least:
        return codes
    first, size = np.asarray(starts), np.asarray(tokens)
    blocks = -(-at_least // count)
    lengths = np.zeros(count, dtype=np.int64)
    np.maximum.at(lengths, codes, first + size)
    block: NDArray[np.intp] = np.minimum(first * blocks // np.maximum(lengths[codes], 1), blocks - 1)
    return codes * blocks + block


def macro_f1(predicted: ArrayLike, answer: ArrayLike) -> float:
    """Unweighted mean of the F1 of every class that occurs in `predicted` or `answer` (both `[n]`); NaN for n = 0."""
    both = np.concatenate([np.asarray(predicted), np.asarray(answer)])
    if not len(both):
        return math.nan
    codes = np.unique(both, return_inverse=True)[1]
    guess, truth = np.split(codes, 2)
    size = int(codes.max()) + 1
    right = np.bincount(truth[guess == truth], minlength=size)
    # F1 = 2 TP / (2 TP + FP + FN), and 2 TP + FP + FN is the number of times a class was said plus that it was true.
    return float(np.mean(2 * right / np.bincount(codes, minlength=size)))


def paired_difference(
    a: ArrayLike, b: ArrayLike, clusters: ArrayLike, *, seed: int, draws: int = 2000
) -> tuple[float, float | None, float | None, float]:
    """mean(a) - mean(b) over the same items, with its interval over clusters and its two-sided p-value.

    Args:
        a: `[n]` scores of one model, for example 1.0 for a right answer.
        b: `[n]` scores of the other on the same items.
        clusters: `[n]`, what the items share.
        seed: of the resampling.
        draws: bootstrap samples.
    """
    sums, counts = _by_cluster(_floats(a) - _floats(b), clusters)
    return weighted_difference(len(sums), seed, draws, lambda w: ratio(w @ sums, w @ counts))


def paired_ratio_difference(
    num_a: ArrayLike, num_b: ArrayLike, den: ArrayLike, *, seed: int, draws: int = 2000, den_b: ArrayLike | None = None
) -> tuple[float, float | None, float | None, float]:
    """sum(num_a)/sum(den) - sum(num_b)/sum(den) over the same units, with interval and two-sided p-value.

    Args:
        num_a: `[units]`, for example one model's nats per document.
        num_b: `[units]`, the other's.
        den: `[units]`, for example bytes.
        seed: of the resampling.
        draws: bootstrap samples.
        den_b: the second model's denominators where they differ (another number of seeds).
    """
    top_a, top_b, bottom_a = _floats(num_a), _floats(num_b), _floats(den)
    bottom_b = bottom_a if den_b is None else _floats(den_b)
    return weighted_difference(
        len(top_a), seed, draws, lambda w: ratio(w @ top_a, w @ bottom_a) - ratio(w @ top_b, w @ bottom_b)
    )


def holm(p_values: ArrayLike) -> Floats:
    """Holm's step-down adjustment of p-values `[m]`; adjusted values keep their places and never exceed 1."""
    p = checked(p_values, "p-values")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def letters(names: Sequence[str], adjusted_p: Mapping[tuple[str, str], float], alpha: float = 0.05) -> dict[str, str]:
    """Compact letter display: two names share a letter exactly if they cannot be told apart.

    Insert and absorb (Piepho 2004, doi 10.1198/1061860043515): begin with one set of all names, split every set that
    holds a pair that differs, drop sets inside other sets. Letters follow the order of `names`.

    Args:
        names: in the order of the table, best first.
        adjusted_p: of pairs, in either order; a pair that is missing counts as not told apart.
        alpha: pairs with p below it differ.
    """
    place = {name: i for i, name in enumerate(names)}
    sets = [frozenset(names)] if names else []
    for (a, b), p in sorted(adjusted_p.items()):
        if not p < alpha or a not in place or b not in place:
            continue
        split: list[frozenset[str]] = []
        for group in sets:
            split += [group - {a}, group - {b}] if {a, b} <= group else [group]
        unique = list(dict.fromkeys(split))
        sets = [group for group in unique if not any(group < other for other in unique)]
    sets.sort(key=lambda group: sorted(place[name] for name in group))
    return {name: "".join(_letter(i) for i, group in enumerate(sets) if name in group) for name in names}


def seed_floor(values: Sequence[Sequence[float]], trained: Sequence[bool] | None = None) -> Callable[[int, int], float]:
    """How large a difference must be to exceed the noise between training seeds, as a function of the seed counts.

    The variance between seeds is pooled over models (each has too few seeds of its own); the floor is Student's
    quantile times the standard error of a difference of two means. It is 0 where no model has two seeds: then the
    noise between runs is unknown. A model that nothing has trained and that computes the same with every seed has no
    such noise: it neither thins that of the others nor has a share in a difference (a count of 0).

    Args:
        values: per model, the headline of each seed.
        trained: per model, whether seeds trained it; None: all of them.
    """
    flags = [True] * len(values) if trained is None else list(trained)
    noisy = [v for v, flag in zip(values, flags, strict=True) if has_seed_noise(v, trained=flag)]
    repeated = [checked(v, "the seeds' values") for v in noisy if len(v) > 1]
    freedom = sum(len(v) - 1 for v in repeated)
    if not freedom:
        return lambda _a, _b: 0.0
    variance = sum(float(((v - v.mean()) ** 2).sum()) for v in repeated) / freedom
    reach = float(stdtrit(freedom, (1 + LEVEL) / 2)) * math.sqrt(variance)
    return lambda a, b: reach * math.sqrt(sum(1 / count for count in (a, b) if count))


def has_seed_noise(values: Sequence[float], *, trained: bool) -> bool:
    """Whether another seed would give another value: of what was trained, and of what draws while it is evaluated."""
    return trained or len(set(values)) > 1


def weighted_difference(
    units: int, seed: int, draws: int, statistic: Callable[[Floats], Any]
) -> tuple[float, float | None, float | None, float]:
    """Value at weight one, interval and p-value of a difference that is a function of weights `[draws, units]`."""
    if not units:
        return math.nan, None, None, 1.0
    value = float(np.ravel(statistic(np.ones((1, units))))[0])
    return judged_difference(value, bootstrap(units, seed, draws, statistic), units)


def judged_difference(value: float, drawn: Floats, units: int) -> tuple[float, float | None, float | None, float]:
    """A difference with its interval and p-value, from that of bootstrap samples over `units` units."""
    return judged_differences([value], drawn[None], units)[0]


def judged_differences(
    values: Sequence[float], drawn: Floats, units: int
) -> list[tuple[float, float | None, float | None, float]]:
    """Differences with their intervals and p-values, from those of bootstrap samples over the same number of units.

    Args:
        values: `[pairs]`.
        drawn: `[pairs, draws]`.
        units: that were resampled.
    """
    if units < 2:
        return [(value, None, None, 1.0) for value in values]
    judged: dict[int, tuple[float, float | None, float | None, float]] = {}
    found = np.isfinite(drawn).all(axis=1)
    for place in np.flatnonzero(~found).tolist():  # not defined in every sample: no evidence of a difference
        judged[place] = (values[place], *percentiles(drawn[place], units), 1.0)
    if found.any():
        known, size = drawn[found], np.abs(np.asarray(values, dtype=np.float64)[found])
        low, high = np.quantile(known, [tail(units), 1 - tail(units)], axis=1)
        error, tiny = np.std(known, axis=1), 1e-12 * np.maximum(1.0, size)
        with np.errstate(divide="ignore", invalid="ignore"):
            p = np.where(error > tiny, 2 * stdtr(units - 1, -size / error), np.where(size <= tiny, 1.0, 0.0))
        p = np.minimum(1.0, np.maximum(p, 2.0 ** (1 - units)))
        for place, *ends, p_value in zip(*(x.tolist() for x in (np.flatnonzero(found), low, high, p)), strict=True):
            judged[place] = (values[place], ends[0], ends[1], p_value)
    return [judged[place] for place in range(len(values))]


def bootstrap(units: int, seed: int, draws: int, statistic: Callable[[Floats], Any]) -> Floats:
    """`statistic` of `draws` bootstrap samples, `[draws]`; empty for fewer than two units."""
    if units < 2:
        return np.empty(0)
    return np.concatenate([np.ravel(statistic(w)) for w in _weights(units, seed, draws)])


class Draws:
    """Bootstrap samples that many statistics over the same number of units share: drawn once, as each alone would.

    Args:
        seed: of the resampling.
        draws: bootstrap samples.
    """

    def __init__(self, seed: int, draws: int = 2000) -> None:
        self._seed, self._number = seed, draws
        self._kept: dict[int, list[Floats]] = {}

    def rates(self, numerator: ArrayLike, denominator: ArrayLike) -> tuple[float, Floats]:
        """sum(numerator) / sum(denominator) of `[units]`, and that of every sample, `[draws]` (none below 2 units).

        Raises:
            NotFinite: there is such a number among them.
        """
        top, bottom = self.sums(numerator), self.sums(denominator)
        return float(ratio(top[0], bottom[0])), ratio(top[1], bottom[1])

    def sums(self, values: ArrayLike) -> tuple[float, Floats]:
        """Sum of `[units]`, and that of every sample, `[draws]` (none below 2 units).

        Raises:
            NotFinite: there is such a number among them.
        """
        own = _floats(values)
        value = float((np.ones((1, len(own))) @ own)[0])
        if len(own) < 2:
            return value, np.empty(0)
        return value, np.concatenate([w @ own for w in self._weights(len(own))])

    def _weights(self, units: int) -> Iterable[Floats]:
        """As `_weights`; kept for the number of units that was asked for last, if there is room."""
        if units * self._number > _KEPT:
            return _weights(units, self._seed, self._number)
        if units not in self._kept:
            self._kept = {units: list(_weights(units, self._seed, self._number))}
        return self._kept[units]


def _weights(units: int, seed: int, draws: int) -> Iterator[Floats]:
    """How often each unit was drawn, in chunks `[some draws, units]`."""
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK // units)
    for first in range(0, draws, step):
        rows = min(step, draws - first)
        picks = rng.integers(units, size=(rows, units)) + np.arange(rows)[:, None] * units
        yield np.bincount(picks.ravel(), minlength=rows * units).reshape(rows, units).astype(np.float64)


def percentiles(drawn: Floats, units: int) -> tuple[float | None, float | None]:
    """The expanded percentile interval of bootstrap statistics over `units` units.

    What is not finite in them could be anything, and so counts as beyond either end; None where an end is among those.
    """
    if units < 2 or not len(drawn):
        return None, None
    known, outside = np.isfinite(drawn), tail(units)
    if known.all():
        low, high = np.quantile(drawn, [outside, 1 - outside])
    else:
        low = np.quantile(np.where(known, drawn, -np.inf), outside, method="lower")
        high = np.quantile(np.where(known, drawn, np.inf), 1 - outside, method="higher")
    return (float(low), float(high)) if np.isfinite([low, high]).all() else (None, None)


def tail(units: int) -> float:
    """The share of bootstrap samples beyond either end of the expanded percentile interval; `units` above 1."""
    return float(ndtr(math.sqrt(units / (units - 1)) * stdtrit(units - 1, (1 - LEVEL) / 2)))


def _by_cluster(values: Floats, clusters: ArrayLike) -> tuple[Floats, Floats]:
    """Sum and number of values in every cluster, `[clusters]` each."""
    codes, units = _codes(clusters)
    return _floats(np.bincount(codes, weights=values, minlength=units)), _floats(np.bincount(codes, minlength=units))


def _codes(clusters: ArrayLike) -> tuple[NDArray[np.intp], int]:
    """Clusters as numbers 0, 1, … in sorted order, and how many there are."""
    given = np.asarray(clusters)
    if given.dtype.kind in "fO" and any(c is None or c != c for c in given.ravel().tolist()):
        raise NotFinite("Nothing is computed from values without a cluster (None or NaN).")
    unique, codes = np.unique(np.asarray(clusters), return_inverse=True)
    return codes.ravel(), len(unique)


def ratio(top: Any, bottom: Any) -> Any:
    """Division that gives NaN for 0/0 without a warning."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.float64(1) * top / bottom


def _floats(values: ArrayLike) -> Floats:
    return checked(values)


def _letter(index: int) -> str:
    """One character per set of models; after 52 of them numbers in brackets, as "aa" would read as two sets."""
    if index < 26:
        return chr(ord("a") + index)
    return chr(ord("A") + index - 26) if index < 52 else f"({index})"
