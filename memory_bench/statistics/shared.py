"""What the pairs of a table share: the sums of every row and every resampling are worked out once, not for each pair.

The numbers are those of a pair alone, to the bit: the same seed, the same draws, the same sums. A table of n rows has
n (n - 1) / 2 pairs, so what is done for each of them is a subtraction and a pair of percentiles.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from memory_bench.statistics import stats

if TYPE_CHECKING:
    import pandas as pd

RATIOS = {"bits_per_byte": ("nbytes", math.log(2)), "nll": ("tokens", 1.0)}
"""Metrics that are sums of nats over sums of a column (times a constant)."""
DRAWS = 2000
Found = tuple[float, float | None, float | None, float, int]
"""Value, low, high, p-value, number of units."""


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


def text_pair(a: TextRow, b: TextRow) -> Found | None:
    """Of a - b, over the documents that both have finished; None without any."""
    shared = tuple(episode for episode, size in a.sizes.items() if b.sizes.get(episode) == size)
    if not shared:
        return None
    (first, drawn_a, units), (second, drawn_b, others) = a.rate(shared), b.rate(shared)
    if units != others:  # a block in which a model with long segments has none
        return None
    return *stats.judged_difference(first - second, drawn_a - drawn_b, units), units


class QuestionRow:
    """Answers of one row: the share of right ones for every question, over seeds.

    Args:
        asked: its questions.
        right: 1.0 for each of them that was answered rightly.
    """

    def __init__(self, asked: "pd.DataFrame", right: "pd.Series[float]") -> None:
        self.scores = right.groupby([asked["cluster"], asked["episode"], asked["event"]]).mean()
        self._codes: NDArray[np.intp] | None = None

    @property
    def codes(self) -> NDArray[np.intp]:
        """The number of the cluster of each of its questions."""
        if self._codes is None:
            self._codes = _numbered(self.scores)
        return self._codes


def question_pair(a: QuestionRow, b: QuestionRow, draws: stats.Draws) -> Found | None:
    """Of a - b, over the questions that both were asked; None without any."""
    if a.scores.index.equals(b.scores.index):
        first, second, clusters = a.scores, b.scores, a.codes
    else:
        shared = a.scores.index.intersection(b.scores.index)
        first, second = a.scores.loc[shared], b.scores.loc[shared]
        clusters = _numbered(first)
    if not len(clusters):
        return None
    units = int(clusters.max()) + 1
    sums = np.bincount(clusters, weights=first.to_numpy() - second.to_numpy(), minlength=units)
    value, drawn = draws.rates(sums, np.bincount(clusters, minlength=units))
    return *stats.judged_difference(value, drawn, units), units


def _numbered(scores: "pd.Series[float]") -> NDArray[np.intp]:
    clusters = scores.index.get_level_values(0).to_numpy()
    return np.unique(clusters, return_inverse=True)[1].ravel()
