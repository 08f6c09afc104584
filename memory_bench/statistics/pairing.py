"""What may be compared with what: identical episodes, paired, with ties where the evidence does not suffice.

Text is paired over documents (their excerpts, or blocks of them, where there are few), questions over questions with
the documents they share as clusters. Scores of several seeds are pooled within a unit: the spread between seeds is a
second variance, which enters as the smallest difference that counts (`stats.seed_floor`).
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice
from typing import TYPE_CHECKING

import numpy as np

from memory_bench.finite import check_samples, unanswered
from memory_bench.statistics import shared, stats
from memory_bench.statistics.shared import RATIOS

if TYPE_CHECKING:
    import pandas as pd

ALPHA = 0.05
TOGETHER = 500  # pairs whose intervals are found at once: 8 MB of bootstrap samples


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
    found = list(_pairs([a, b], metric, seed))
    return found[0] if found else None


def differences(
    samples: Mapping[str, "pd.DataFrame"],
    metric: str,
    seed_values: Mapping[str, Sequence[float]],
    untrained: Collection[str] = (),
) -> list[Difference]:
    """All pairs of a table, Holm-corrected together.

    Args:
        samples: label to samples, in the table's order.
        metric: the headline.
        seed_values: label to the headline of each of its seeds.
        untrained: labels that no seed has trained, see `stats.seed_floor`.
    """
    return corrected(list(_pairs(list(samples.items()), metric, 0)), seed_values, untrained)


def _pairs(rows: Sequence[tuple[str, "pd.DataFrame"]], metric: str, seed: int) -> Iterator[Difference]:
    """The differences of all pairs of (label, samples) that have one, in their order."""
    for _, samples in rows:
        check_samples(samples)
    paired = _paired(rows, metric, stats.Draws(seed))
    while some := list(islice(paired, TOGETHER)):
        for (a, b, _), found in zip(some, shared.judge([pair for _, _, pair in some]), strict=True):
            yield Difference(a, b, *found)


def _paired(
    rows: Sequence[tuple[str, "pd.DataFrame"]], metric: str, draws: stats.Draws
) -> Iterator[tuple[str, str, shared.Paired]]:
    """The labels and the resampled difference of every pair that has one."""
    pair: shared.Paired | None
    if metric in RATIOS:
        texts = [(label, shared.TextRow(samples, metric, draws)) for label, samples in rows]
        for (a, first), (b, second) in combinations(texts, 2):
            if (pair := shared.text_pair(first, second)) is not None:
                yield a, b, pair
    elif metric == "accuracy":
        answers: list[shared.QuestionRow] = []
        for _, samples in rows:
            asked = samples[(samples["control"] == "") & (samples["kind"] == "ask")]
            answers.append(shared.QuestionRow(asked, correct(asked), draws, answers))
        for (a, own), (b, other) in combinations(zip((label for label, _ in rows), answers, strict=True), 2):
            if (pair := shared.question_pair(own, other, draws)) is not None:
                yield a, b, pair


def corrected(
    pairs: Sequence[Difference], seed_values: Mapping[str, Sequence[float]], untrained: Collection[str] = ()
) -> list[Difference]:
    """`pairs` with their Holm-adjusted p-values and the noise between seeds filled in; arguments as `differences`."""
    floors = seed_noise(seed_values, untrained)
    adjusted = stats.holm([pair.p for pair in pairs])
    return [
        replace(pair, adjusted=float(p), floor=floors(pair.a, pair.b)) for pair, p in zip(pairs, adjusted, strict=True)
    ]


def seed_noise(
    seed_values: Mapping[str, Sequence[float]], untrained: Collection[str] = ()
) -> Callable[[str, str], float]:
    """The smallest difference of two labels that exceeds the noise between seeds; see `stats.seed_floor`."""
    floor = stats.seed_floor(list(seed_values.values()), [label not in untrained for label in seed_values])

    def count(label: str) -> int:
        own = seed_values.get(label, ())
        return max(len(own), 1) if stats.has_seed_noise(own, trained=label not in untrained) else 0

    return lambda a, b: floor(count(a), count(b))


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
    asked = _with_control(asked, "wiped")
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


def _with_control(asked: "pd.DataFrame", control: str) -> "pd.DataFrame":
    """The questions for which there is that control: a cell that was cut short has answers that it lacks."""
    names = [name for name in ("seed", "episode", "event") if name in asked]
    places = asked.groupby(names, sort=False).ngroup().to_numpy()
    return asked[np.isin(places, places[(asked["control"] == control).to_numpy()])]
