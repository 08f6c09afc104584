"""How large an effect is, how sure of it one can be, and whether a test holds.

An effect has two intervals, which answer two questions: over documents (would other texts show it?) and over seeds
(would another training?). A test holds where both say so.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import t as student

from memory_bench.finite import check_samples, checked
from memory_bench.statistics import pairing, stats

if TYPE_CHECKING:
    import pandas as pd

    from memory_bench.published.claims import Test

LEAST_SEEDS = 5  # a sign test over fewer cannot reach p < 0.05
HOLDS, FAILS, OPEN, MEASURED, NOT_RUN = "holds", "does not hold", "cannot be told", "measured", "not run"

Bounds = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Effect:
    """A number with its two 95 % intervals.

    Attributes:
        value: in percent.
        documents: interval over documents (or streams), seeds averaged; a bootstrap.
        seeds: interval over seeds, documents averaged; Student's t.
        n: documents.
        count: seeds.
        unit: what the percentage is of.
    """

    value: float
    documents: Bounds
    seeds: Bounds
    n: int
    count: int
    unit: str

    @property
    def low(self) -> float:
        """The lower end of both intervals together."""
        return min(self.documents[0], self.seeds[0])

    @property
    def high(self) -> float:
        """The upper end of both."""
        return max(self.documents[1], self.seeds[1])

    @property
    def text(self) -> str:
        """For a table."""
        d, s = self.documents, self.seeds
        return f"{self.value:+.2f} % (documents {d[0]:+.2f} to {d[1]:+.2f}, seeds {s[0]:+.2f} to {s[1]:+.2f})"


def perplexity_effect(
    left: Mapping[int, "pd.DataFrame"], right: Mapping[int, "pd.DataFrame"], length: int | None = None
) -> Effect | None:
    """How much higher the token perplexity of `left` is than that of `right`, in percent, on the same texts.

    Args:
        left: samples by seed.
        right: of the other row, for the same seeds.
        length: only the first so many tokens of documents that have them; None: all.

    Returns:
        None where a seed has no partner or nothing is shared.
    """
    import pandas as pd

    seeds = sorted(left)
    if seeds != sorted(right) or not seeds:
        return None
    cut = [{s: _first(frames[s], length) for s in seeds} for frames in (left, right)]
    both = [("", pd.concat(list(frames.values()))) for frames in cut]
    whole = pairing.difference(both[0], both[1], "nll")
    if whole is None or whole.low is None or whole.high is None:
        return None
    each = [pairing.difference(("", cut[0][s]), ("", cut[1][s]), "nll") for s in seeds]
    values = [one.value for one in each if one is not None]
    percent = [100 * math.expm1(x) for x in (whole.value, whole.low, whole.high, *seed_interval(values))]
    return Effect(percent[0], (percent[1], percent[2]), (percent[3], percent[4]), whole.n, len(values), "perplexity")


def share_effect(
    left: Mapping[int, "pd.DataFrame"], right: Mapping[int, "pd.DataFrame"], base: Mapping[int, "pd.DataFrame"]
) -> Effect | None:
    """How much of what `left` gains over `base` in nats is lost with `right`, in percent; None as of the others."""
    import pandas as pd

    rows, seeds = (left, right, base), sorted(left)
    if not seeds or any(sorted(row) != seeds for row in rows):
        return None
    by_seed = [{s: _first(row[s], None).groupby("episode")["nll"].sum() for s in seeds} for row in rows]
    # Documents that every seed of every row has read.
    shared = sorted(set.intersection(*(set(one.index) for row in by_seed for one in row.values())))
    if not shared:
        return None
    first, second, ground = (pd.DataFrame({s: one[shared] for s, one in row.items()}).to_numpy() for row in by_seed)
    gained, kept = ground - first, ground - second
    value, low, high = stats.ratio_interval(kept.mean(axis=1), gained.mean(axis=1), seed=0)
    if value is None or low is None or high is None:
        return None
    each = 100 * (1 - kept.sum(axis=0) / gained.sum(axis=0))
    documents = (100 * (1 - high), 100 * (1 - low))
    return Effect(100 * (1 - value), documents, seed_interval(each.tolist()), len(shared), len(seeds), "the gain")


def _first(samples: "pd.DataFrame", length: int | None) -> "pd.DataFrame":
    """The main readings' stretches that begin within the first `length` tokens of documents that are long enough."""
    reads = check_samples(samples)[(samples["control"] == "") & (samples["kind"] == "read")]
    if length is None:
        return reads
    ends = (reads["start"] + reads["tokens"]).groupby(reads["episode"]).transform("max")
    return reads[(reads["start"] < length) & (ends >= length)]


def seed_interval(values: Sequence[float]) -> Bounds:
    """Student's 95 % interval of the mean; without bounds for fewer than two."""
    if len(values) < 2:
        return -math.inf, math.inf
    checked(values, "the seeds' values")
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    reach = float(student.ppf(0.975, len(values) - 1)) * error
    return mean - reach, mean + reach


def mean_effect(values: "np.ndarray", unit: str) -> Effect:
    """The mean of shares ``[seeds, documents]``, as an effect in percent; of a single one, which is exact, itself."""
    found = 100 * checked(values, "shares")
    by_document = found.mean(axis=0)
    _, low, high = stats.mean_interval(by_document, np.arange(len(by_document)), seed=0)
    value = float(found.mean())
    documents = (value if low is None else low, value if high is None else high)
    seeds = seed_interval(found.mean(axis=1).tolist()) if len(found) > 1 else (value, value)
    return Effect(value, documents, seeds, found.shape[1], len(found), unit)


def decide(test: "Test", effect: Effect | None) -> str:
    """Whether a test holds beyond both intervals of its effect.

    `FAILS` means that both intervals lie on the wrong side, `OPEN` that they do not decide.
    """
    if effect is None:
        return NOT_RUN
    if test.kind == "parameters":  # exact, whatever the seed
        return HOLDS if test.low <= effect.value / 100 <= test.high else FAILS
    if effect.count < LEAST_SEEDS:
        return NOT_RUN
    if test.kind in ("measure", "share"):
        return MEASURED
    low, high = -math.inf, 100 * test.tolerance  # lower, no worse, recall: anything up to a bound
    if test.kind in ("equal", "pool"):
        low = -high
    if low < effect.low and effect.high < high:
        return HOLDS
    both = (effect.documents, effect.seeds)
    return FAILS if all(b[0] > high for b in both) or all(b[1] < low for b in both) else OPEN


def together(verdicts: Sequence[str]) -> str:
    """The verdict on a claim from those on its tests: it holds where all do."""
    for verdict in (NOT_RUN, FAILS, OPEN):
        if verdict in verdicts:
            return verdict
    return HOLDS if HOLDS in verdicts else MEASURED if verdicts else NOT_RUN
