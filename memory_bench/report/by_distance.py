"""The part of `compare` that is about retention: differences at every distance and of half-lives, in one table."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from memory_bench.report.board import Board
from memory_bench.report.layout import NONE, Table
from memory_bench.report.rows import OVER, Row, plain
from memory_bench.report.tables import delta, interval, number, short
from memory_bench.statistics import retention
from memory_bench.statistics.halflife import NO_FALL, NO_MEMORY, half_life_of, half_life_text, verdict_of
from memory_bench.statistics.pairing import Difference
from memory_bench.statistics.retention import HALF_LIFE

Found = Sequence[tuple[str, Difference]]


def compared(models: Mapping[str, Row], board: Board) -> list[tuple[str, Difference]]:
    """(slice, difference) of all pairs of `models`, Holm-corrected together; empty where no half-life is known."""
    samples = {label: row.samples for label, row in models.items() if row.samples is not None}
    if board.metric != "accuracy" or not any(half_life_of(row.estimates) for row in models.values()):
        return []
    forgetful = [label for label, row in models.items() if _forgets(row)]
    seeds = {label: _seed_values(row, board.metric) for label, row in models.items()}
    untrained = [label for label, row in models.items() if not row.trained]
    return retention.differences(samples, seeds, forgetful, board.levels.get("chance", 0.0), untrained)


def table(found: Found, models: Mapping[str, Row], metric: str, verdict: Callable[[Difference], str]) -> Table:
    """One line a pair and slice; half-lives are compared as a ratio."""
    columns = ("at", "A", "B", "A: value [95 %]", "B: value [95 %]", "A − B, or A / B [95 %]", "p (Holm)", "seed noise",
               "n", "verdict")  # fmt: skip
    lines = []
    for name, pair in found:
        life = name == HALF_LIFE
        noise = NONE
        if pair.floor:
            noise = f"×{2**pair.floor:.2f}" if life else f"±{number(pair.floor, metric, spread=True)}"
        lines.append((
            short(HALF_LIFE) if life else name.removeprefix("distance="),
            pair.a, pair.b, _value(models[pair.a], name, metric), _value(models[pair.b], name, metric),
            _ratio(pair, models) if life else delta(pair, metric),
            "<0.001" if pair.adjusted < 0.001 else f"{pair.adjusted:.3f}", noise, f"{pair.n:,}", verdict(pair),
        ))  # fmt: skip
    return Table(columns, tuple(lines)).without_empty_columns()


def rows(found: Found, metric: str, verdict: Callable[[Difference], str]) -> list[dict[str, Any]]:
    """One entry a pair and slice, as plain data; differences of half-lives are log2 of their ratio."""
    return [
        {
            "metric": HALF_LIFE if name == HALF_LIFE else metric,
            "slice": "" if name == HALF_LIFE else name,
            "a": pair.a,
            "b": pair.b,
            "difference": pair.value,
            "unit": "log2 ratio" if name == HALF_LIFE else "",
            "ci_low": pair.low,
            "ci_high": pair.high,
            "p": pair.p,
            "p_holm": pair.adjusted,
            "seed_noise": pair.floor,
            "n": pair.n,
            "verdict": verdict(pair),
        }
        for name, pair in found
    ]


def _value(row: Row, name: str, metric: str) -> str:
    own = half_life_of(row.estimates) if name == HALF_LIFE else row.find(metric, name)
    if own is None:
        return NONE
    return half_life_text(own) if name == HALF_LIFE else interval(own.value, own.low, own.high, metric)


def _ratio(pair: Difference, models: Mapping[str, Row]) -> str:
    """A bound where one of the two outlasts the longest distance asked."""
    both = [half_life_of(models[label].estimates) for label in (pair.a, pair.b)]
    first, second = (own is not None and verdict_of(own) == NO_FALL for own in both)
    sign = "> " if first and not second else "< " if second and not first else ""
    ends = "" if pair.low is None or pair.high is None else f" [{2**pair.low:.2f}, {2**pair.high:.2f}]"
    return f"{sign}×{2**pair.value:.2f}{ends}"


def _forgets(row: Row) -> bool:
    """Without a half-life, over all seeds or in one of them."""
    each = [half_life_of(record.metrics) for record in row.records if record.metrics]
    own = half_life_of(row.estimates)
    return (own is not None and own.note == NO_MEMORY) or any(one and not math.isfinite(one.value) for one in each)


def _seed_values(row: Row, metric: str) -> dict[str, list[float]]:
    """What every seed that finished has at each distance, and the log2 of its half-life."""
    found: dict[str, list[float]] = {}
    whole = [record for record in row.records if record.status != OVER]
    for m in (m for record in whole for m in record.metrics if math.isfinite(m.value)):
        at = plain(m.slice)
        if m.metric == metric and at.startswith("distance="):
            found.setdefault(at, []).append(m.value)
        elif m.metric == HALF_LIFE and not at and m.value > 0:
            found.setdefault(HALF_LIFE, []).append(math.log2(m.value))
    return found
