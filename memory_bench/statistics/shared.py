"""What the pairs of a table share: the sums of every row and every resampling are worked out once, not for each pair.

The numbers are those of a pair alone, to the bit: the same seed, the same draws, the same sums. A table of n rows has
n (n - 1) / 2 pairs, so what is done for each of them is a subtraction; percentiles are found for many of them at once.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from memory_bench.statistics import stats

if TYPE_CHECKING:
    import pandas as pd

RATIOS = {"bits_per_byte": ("nbytes", math.log(2)), "nll": ("tokens", 1.0)}
"""Metrics that are sums of nats over sums of a column (times a constant)."""
DRAWS = 2000
WHOLE = 2.0**16
"""Sums of multiples of its inverse (of answers averaged over 1, 2 or 4 seeds) are exact in whatever order."""
Paired = tuple[float, stats.Floats, int]
"""A difference, that of every bootstrap sample, number of units."""
Found = tuple[float, float | None, float | None, float, int]
"""Value, low, high, p-value, number of units."""


def judge(pairs: Sequence[Paired]) -> list[Found]:
    """The intervals and p-values of differences."""
    places: dict[int, list[int]] = {}
    for place, (_, _, units) in enumerate(pairs):
        places.setdefault(units, []).append(place)
    found: dict[int, Found] = {}
    for units, same in places.items():
        judged = stats.judged_differences([pairs[p][0] for p in same], np.stack([pairs[p][1] for p in same]), units)
        found |= {place: (*numbers, units) for place, numbers in zip(same, judged, strict=True)}
    return [found[place] for place in range(len(pairs))]


class TextRow:
    """Scored text of one row: its rate over documents, whole and resampled.

    Args:
        samples: of the row.
        metric: one of `RATIOS`.
        draws: that the rows of a table share.
    """

    def __init__(self, samples: "pd.DataFrame", metric: str, draws: stats.Draws) -> None:
        self._part = samples[(samples["control"] == "") & (samples["kind"] == "read")]
        self._by, self._constant = RATIOS[metric]
        self._draws = draws
        by_episode = self._part.groupby("episode")
        sizes = by_episode["nbytes"].sum() / by_episode["seed"].nunique()
        self.sizes: Mapping[str, float] = {str(episode): float(size) for episode, size in sizes.items()}
        self._rates: dict[tuple[str, ...], tuple[float, stats.Floats, int]] = {}

    def rate(self, shared: tuple[str, ...]) -> tuple[float, stats.Floats, int]:
        """The rate over `shared` episodes, that of every bootstrap sample, and the number of units."""
        if shared not in self._rates:
            part = self._part[self._part["episode"].isin(shared)]
            # Seeds are averaged within a document, as one of them may have been stopped before it.
            share = 1 / part.groupby("episode")["seed"].transform("nunique")
            units = stats.scored_units(*(part[column] for column in ("cluster", "episode", "start", "tokens")))
            top, bottom = (np.bincount(units, weights=part[column] * share) for column in ("nll", self._by))
            self._rates[shared] = *self._draws.rates(top / self._constant, bottom), len(top)
        return self._rates[shared]


def text_pair(a: TextRow, b: TextRow) -> Paired | None:
    """Of a - b, over the documents that both have finished; None without any."""
    shared = tuple(episode for episode, size in a.sizes.items() if b.sizes.get(episode) == size)
    if not shared:
        return None
    (first, drawn_a, units), (second, drawn_b, others) = a.rate(shared), b.rate(shared)
    if units != others:  # a block in which a model with long segments has none
        return None
    return first - second, drawn_a - drawn_b, units


class Questions:
    """What rows that were asked the same share.

    Args:
        index: of the questions, their clusters first.
        draws: that the rows of a table share.
    """

    def __init__(self, index: "pd.Index[Any]", draws: stats.Draws) -> None:
        self.index, self._draws = index, draws
        clusters = index.get_level_values(0).to_numpy()
        self._codes = np.unique(clusters, return_inverse=True)[1].ravel()
        self.units = int(self._codes.max()) + 1 if len(self._codes) else 0

    @cached_property
    def counts(self) -> tuple[float, stats.Floats]:
        """How many there are, whole and resampled."""
        return self._draws.sums(np.bincount(self._codes, minlength=self.units))

    def by_cluster(self, scores: ArrayLike) -> stats.Floats:
        """Sums of the scores of every cluster, `[units]`."""
        return np.bincount(self._codes, np.asarray(scores, dtype=np.float64), self.units).astype(np.float64, copy=False)

    def rate(self, top: tuple[float, stats.Floats]) -> Paired:
        """A sum of scores, whole and resampled, as a rate."""
        value, drawn = stats.ratio(top[0], self.counts[0]), stats.ratio(top[1], self.counts[1])
        return float(value), drawn, self.units


class QuestionRow:
    """Answers of one row: the share of right ones for every question, over seeds.

    Args:
        asked: its questions.
        right: 1.0 for each of them that was answered rightly.
        draws: that the rows of a table share.
        others: of the same table; with those that were asked the same it shares what depends on the questions alone.
    """

    def __init__(
        self, asked: "pd.DataFrame", right: "pd.Series[float]", draws: stats.Draws, others: "Sequence[QuestionRow]" = ()
    ) -> None:
        self.scores = right.groupby([asked["cluster"], asked["episode"], asked["event"]]).mean()
        same: Iterator[Questions] = (row.questions for row in others if row.scores.index.equals(self.scores.index))
        self._draws = draws
        self.questions: Questions = next(same, None) or Questions(self.scores.index, draws)

    @cached_property
    def exact(self) -> tuple[float, stats.Floats] | None:
        """The sum of its scores, whole and resampled, where no order of summing could round them; else None."""
        scores = self.scores.to_numpy(dtype=np.float64)
        sums = self.questions.by_cluster(scores)
        return self._draws.sums(sums) if (scores * WHOLE % 1 == 0).all() and (abs(sums) < WHOLE).all() else None


def question_pair(a: QuestionRow, b: QuestionRow, draws: stats.Draws) -> Paired | None:
    """Of a - b, over the questions that both were asked; None without any."""
    same = a.questions is b.questions
    if same and (own := a.exact) is not None and (other := b.exact) is not None:
        return a.questions.rate((own[0] - other[0], own[1] - other[1])) if a.questions.units else None
    shared = a.questions if same else Questions(a.scores.index.intersection(b.scores.index), draws)
    if not shared.units:
        return None
    first, second = (row.scores if same else row.scores.loc[shared.index] for row in (a, b))
    return shared.rate(draws.sums(shared.by_cluster(first.to_numpy() - second.to_numpy())))
