"""What may be compared with what: identical episodes, paired, with ties where the evidence does not suffice.

Text is paired over documents (their excerpts, or blocks of them, where there are few), questions over questions with
the documents they share as clusters. Scores of several seeds are pooled within a unit: the spread between seeds is a
second variance, which enters as the smallest difference that counts (`stats.seed_floor`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from memory_bench.finite import check_samples, unanswered
from memory_bench.statistics import stats

if TYPE_CHECKING:
    import pandas as pd

ALPHA = 0.05
RATIOS = {"bits_per_byte": ("nbytes", math.log(2)), "nll": ("tokens", 1.0)}
"""Metrics that are sums of nats over sums of a column (times a constant)."""


@dataclass(frozen=True, slots=True)
class Difference:
    """a - b on what both have scored.

    Attributes:
        a, b: labels of the two rows.
        value, low, high: the difference with its 95 % interval over documents or questions.
        p: two-sided, not corrected; `adjusted` is Holm's within the table.
        n: units that were paired.
        floor: the smallest difference that exceeds the noise between seeds; 0 where that noise is unknown.
    """

    a: str
    b: str
    value: float
    low: float | None
    high: float | None
    p: float
    n: int
    adjusted: float = 1.0
    floor: float = 0.0

    @property
    def told_apart(self) -> bool:
        """Significant after the correction, and larger than what another seed would change."""
        return self.adjusted < ALPHA and abs(self.value) > self.floor


def difference(
    a: tuple[str, "pd.DataFrame"], b: tuple[str, "pd.DataFrame"], metric: str, seed: int = 0
) -> Difference | None:
    """The paired difference of a headline metric between two (label, samples).

    None where nothing is shared or the metric is none that can be paired (`RATIOS` and accuracy).

    Raises:
        NotFinite: see `check_samples`.
    """
    for part in (a[1], b[1]):
        check_samples(part)
    if metric in RATIOS:
        found = _text(a[1], b[1], metric, seed)
    elif metric == "accuracy":
        found = _questions(a[1], b[1], seed)
    else:
        return None
    return None if found is None else Difference(a[0], b[0], *found)


def differences(
    samples: Mapping[str, "pd.DataFrame"], metric: str, seed_values: Mapping[str, Sequence[float]]
) -> list[Difference]:
    """All pairs of a table, Holm-corrected together.

    Args:
        samples: label to samples, in the table's order.
        metric: the headline.
        seed_values: label to the headline of each of its seeds.
    """
    names = list(samples)
    pairs = [
        found
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        if (found := difference((a, samples[a]), (b, samples[b]), metric)) is not None
    ]
    return corrected(pairs, seed_values)


def corrected(pairs: Sequence[Difference], seed_values: Mapping[str, Sequence[float]]) -> list[Difference]:
    """`pairs` with their Holm-adjusted p-values and the noise between seeds filled in."""
    floor = stats.seed_floor(list(seed_values.values()))
    adjusted = stats.holm([pair.p for pair in pairs])
    return [
        replace(pair, adjusted=float(p), floor=floor(len(seed_values[pair.a]), len(seed_values[pair.b])))
        for pair, p in zip(pairs, adjusted, strict=True)
    ]


def judged(task: object, samples: "pd.DataFrame") -> "pd.DataFrame":
    """`samples` with the task's own judgement (`Task.correct`) as a column, where there are questions."""
    own = getattr(task, "correct", None)
    if own is None or not (samples["kind"] == "ask").any():
        return samples
    return samples.assign(correct=own(samples))


def correct(samples: "pd.DataFrame") -> "pd.Series[float]":
    """1.0 for a right answer: the task's own judgement (column ``correct``) where it has one, else equality."""
    if "correct" in samples.columns:
        return samples["correct"].astype(float)
    return (samples["predicted"] == samples["answer"]).astype(float)


def lift(samples: "pd.DataFrame", seed: int = 0) -> tuple[float, float | None, float | None, int] | None:
    """Memory lift of questions, (score - floor) / (ceiling - floor), with its interval over clusters and their number.

    The floor is the same model with its memory wiped, the ceiling has the evidence in the prompt. None where a control
    is missing or the ceiling is not above the floor: then there is nothing that memory could have lifted. None also
    where questions are unanswered, of which there are no controls.

    Raises:
        NotFinite: see `check_samples`.
    """
    asked = check_samples(samples)[samples["kind"] == "ask"]
    if unanswered(asked).any():
        return None
    right = correct(asked)
    by = right.groupby([asked["cluster"], asked["control"]]).agg(["sum", "count"]).unstack(fill_value=0.0)
    names = ["", "wiped", "ceiling"]
    if not {("sum", name) for name in names} <= set(by.columns):
        return None
    # [controls, clusters]
    sums, counts = (np.array([by[(kind, name)] for name in names], dtype=np.float64) for kind in ("sum", "count"))
    whole = sums.sum(axis=1) / counts.sum(axis=1)
    if not whole[2] > whole[1]:
        return None

    def statistic(weights: stats.Floats) -> stats.Floats:
        """``[draws]`` from how often each cluster was drawn."""
        score, floor, ceiling = ((weights @ s) / np.maximum(weights @ c, 1) for s, c in zip(sums, counts, strict=True))
        room = np.where(ceiling > floor, ceiling - floor, np.nan)
        found: stats.Floats = (score - floor) / room
        return found

    units = sums.shape[1]
    value = float(statistic(np.ones((1, units)))[0])
    return value, *stats.percentiles(stats.bootstrap(units, seed, 2000, statistic), units), units


def _text(
    a: "pd.DataFrame", b: "pd.DataFrame", metric: str, seed: int
) -> tuple[float, float | None, float | None, float, int] | None:
    by, constant = RATIOS[metric]
    both = [part[(part["control"] == "") & (part["kind"] == "read")] for part in (a, b)]
    # A document that one of them did not finish is left out for both.
    sizes = [part.groupby("episode")["nbytes"].sum() / part.groupby("episode")["seed"].nunique() for part in both]
    shared = [e for e in sizes[0].index if e in sizes[1].index and sizes[0][e] == sizes[1][e]]
    if not shared:
        return None
    sums = []
    for part in both:
        part = part[part["episode"].isin(shared)]
        # Seeds are averaged within a document, as one of them may have been stopped before it.
        share = 1 / part.groupby("episode")["seed"].transform("nunique")
        units = stats.scored_units(*(part[column] for column in ("cluster", "episode", "start", "tokens")))
        sums.append([np.bincount(units, weights=part[column] * share) for column in ("nll", by)])
    (top_a, bottom_a), (top_b, bottom_b) = sums
    if len(top_a) != len(top_b):  # a block in which a model with long segments has none
        return None
    result = stats.paired_ratio_difference(top_a / constant, top_b / constant, bottom_a, den_b=bottom_b, seed=seed)
    return *result, len(top_a)


def _questions(
    a: "pd.DataFrame", b: "pd.DataFrame", seed: int
) -> tuple[float, float | None, float | None, float, int] | None:
    scores = []
    for part in (a, b):
        part = part[(part["control"] == "") & (part["kind"] == "ask")]
        scores.append(correct(part).groupby([part["cluster"], part["episode"], part["event"]]).mean())
    shared = scores[0].index.intersection(scores[1].index)
    if not len(shared):
        return None
    first, second = (part.loc[shared].to_numpy() for part in scores)
    clusters = shared.get_level_values(0).to_numpy()
    return *stats.paired_difference(first, second, clusters, seed=seed), len(np.unique(clusters))
