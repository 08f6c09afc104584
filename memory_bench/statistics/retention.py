"""Retention from samples: half-life, lift by distance, and paired differences by distance, for any task that asks.

The distance of a question is the nominal one that its label names (``distance=4096``), else the tokens that were read
between evidence and question. Questions without evidence in their stream have none and do not count.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from memory_bench.episode import Estimate
from memory_bench.errors import NotFinite
from memory_bench.finite import check_samples
from memory_bench.statistics import pairing, stats
from memory_bench.statistics.decay import Floor, Table, log_ratio
from memory_bench.statistics.halflife import half_life
from memory_bench.statistics.pairing import Difference, correct

if TYPE_CHECKING:
    import pandas as pd

HALF_LIFE = "half_life"
KNOWN = 0.1
"""Share of what is above chance that a model may answer with its memory wiped before a report warns of it."""


def distances(samples: "pd.DataFrame") -> NDArray[np.int64]:
    """Tokens between evidence and question, ``[rows]``; -1 where there are none."""
    named = samples["label"].astype(str).str.extract(r"(?:^|[,;])distance=(\d+)", expand=False)
    return np.asarray(named.fillna(samples["distance_tokens"]).astype(np.int64))


def half_life_estimates(samples: "pd.DataFrame", chance: float = 0.0, seed: int = 0) -> list[Estimate]:
    """The half-life of a task's answers, for its `metrics`; empty where fewer than two distances were asked.

    The floor is the same questions with memory wiped where they were asked, else `chance`.

    Args:
        samples: rows as the driver writes them, controls included; right answers are those of `pairing.correct`.
        chance: what guessing gives.
        seed: of the bootstrap.
    """
    asked = _asked(samples)
    if asked["distance"].nunique() < 2:
        return []
    main = asked[asked["control"] == ""]
    scores, far, clusters = (main[c].to_numpy() for c in ("correct", "distance", "cluster"))
    return [half_life(scores, far, clusters.astype(str), floor=_floor(asked, chance), seed=seed).estimate()]


def lifts(samples: "pd.DataFrame") -> list[Estimate]:
    """Memory lift at every distance, ``memory_lift`` with slice ``distance=…``; see `pairing.lift`."""
    asked = _asked(samples)
    found = []
    for far, part in asked.groupby("distance"):
        lift = pairing.lift(part)
        if lift is not None:
            found.append(Estimate("memory_lift", *lift, f"distance={far}", "share"))
    return found


def differences(
    samples: Mapping[str, "pd.DataFrame"],
    seed_values: Mapping[str, Mapping[str, Sequence[float]]],
    forgetful: Sequence[str] = (),
    chance: float = 0.0,
    untrained: Collection[str] = (),
) -> list[tuple[str, Difference]]:
    """(slice, difference) of all pairs at every distance and of their half-lives, Holm-corrected together.

    Half-lives are compared as log2 of their ratio, on the questions both were asked, with one bootstrap for both; half-
    lives past the longest distance count as that distance.

    Args:
        samples: label to samples, in the table's order.
        seed_values: label to slice to the values of its seeds, for the noise between them; half-lives as log2.
        forgetful: labels without memory, which have no half-life to compare.
        chance: floor where memory was not wiped.
        untrained: labels that no seed has trained, see `stats.seed_floor`.
    """
    asked = {label: _asked(frame) for label, frame in samples.items()}
    names = list(asked)
    found: list[tuple[str, Difference]] = []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            shared = sorted(set(asked[a]["distance"]) & set(asked[b]["distance"]))
            for far in shared if len(shared) > 1 else []:
                first, second = (asked[n][asked[n]["distance"] == far] for n in (a, b))
                pair = pairing.difference((a, first), (b, second), "accuracy")
                found += [] if pair is None else [(f"distance={far}", pair)]
            if len(shared) > 1 and not {a, b} & set(forgetful):
                found += [(HALF_LIFE, pair) for pair in _half_lives((a, asked[a]), (b, asked[b]), chance)]
    adjusted = stats.holm([pair.p for _, pair in found])
    result = []
    for (name, pair), p in zip(found, adjusted, strict=True):
        noise = pairing.seed_noise({label: values.get(name, ()) for label, values in seed_values.items()}, untrained)
        result.append((name, replace(pair, adjusted=float(p), floor=noise(pair.a, pair.b))))
    return result


def expected_shares(
    rule: Callable[[int], float | None], samples: "pd.DataFrame", points: int = 48
) -> list[tuple[int, float]]:
    """(tokens, share left) of `MemoryModel.expected_retention` up to the longest distance asked, for the record."""
    asked = check_samples(samples)[samples["kind"] == "ask"] if len(samples) else samples
    longest = int(asked["distance_tokens"].max()) if len(asked) else 0
    if longest < 1:
        return []
    places = {round(place) for place in np.geomspace(1, longest, points)}
    places |= {0, *(int(d) for d in asked["distance_tokens"].unique()[:points] if d > 0)}
    found = [(d, rule(d)) for d in sorted(places)]
    for d, share in found:
        if share is not None and not math.isfinite(share):
            raise NotFinite(f"non-finite: the model's own expected_retention after {d:,} tokens is {share}")
    return [(d, float(share)) for d, share in found if share is not None]


def known_without_memory(wiped: float, chance: float) -> float:
    """The share of what is above chance that is answered with memory wiped."""
    return (wiped - chance) / (1 - chance) if chance < 1 else 0.0


def expected_curve(
    points: Sequence[tuple[float, float]], shares: Mapping[float, float], floor: float
) -> list[tuple[float, float]]:
    """Accuracy if it faded with the share of an evidence's memory that is left: floor + (a - floor) share(d)/share(d0).

    A guide, no bound: an answer needs few of the memory tokens that hold it.

    Args:
        points: measured (distance, accuracy), nearest first; the curve goes through the first.
        shares: distance to share that is left, as a model says (`MemoryModel.expected_retention`).
        floor: accuracy without memory.
    """
    if not points or len(shares) < 2:
        return []
    places = sorted(shares)
    nearest, start = points[0]
    logs = np.log(np.maximum([shares[d] for d in places], 1e-300))
    at_start = float(np.exp(np.interp(nearest, places, logs)))
    inside = [d for d in places if nearest <= d <= points[-1][0]]
    return [(d, floor + (start - floor) * shares[d] / at_start) for d in inside]


def _asked(samples: "pd.DataFrame") -> "pd.DataFrame":
    """Questions with evidence, with columns ``distance`` and ``correct``."""
    part = check_samples(samples)[samples["kind"] == "ask"]
    part = part.assign(distance=distances(part), correct=correct(part))
    return part[part["distance"] >= 0]


def _floor(asked: "pd.DataFrame", chance: float) -> Floor:
    wiped = asked[asked["control"] == "wiped"]
    return (wiped["correct"].to_numpy(), wiped["cluster"].to_numpy(dtype=str)) if len(wiped) else chance


def _half_lives(
    a: tuple[str, "pd.DataFrame"], b: tuple[str, "pd.DataFrame"], chance: float, seed: int = 0
) -> list[Difference]:
    keys = ["episode", "event"]
    main = [part[part["control"] == ""].set_index(keys) for _, part in (a, b)]
    shared = main[0].index.unique().intersection(main[1].index.unique())
    tables = []
    for own, (_, part) in zip(main, (a, b), strict=True):
        own = own[own.index.isin(shared)]
        clusters = own["cluster"].to_numpy(dtype=str)
        tables.append(Table.of(own["correct"].to_numpy(), own["distance"].to_numpy(), clusters, _floor(part, chance)))
    if min(len(table.distances) for table in tables) < 2:
        return []
    units = len(tables[0].sums)
    value, low, high, p = stats.weighted_difference(units, seed, 2000, log_ratio(tables))
    return [Difference(a[0], b[0], value, low, high, p, units)] if math.isfinite(value) else []
