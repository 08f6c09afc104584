"""Half-lives: coverage by simulation, verdicts where there is no number, and how they read."""

import math
import time
from typing import Any

import numpy as np
import pytest
from scipy.special import ndtri

from memory_bench.statistics.decay import Table, log_ratio
from memory_bench.statistics.halflife import GONE, MEASURED, NO_FALL, NO_MEMORY, half_life, half_life_text
from memory_bench.statistics.stats import weighted_difference

DISTANCES = np.array([0, 500, 1000, 2000, 4000, 8000, 16000])


def hits(
    rng: np.random.Generator, half: float, documents: int, *, rho: float = 0.5, floor: float = 0.0, each: int = 1
) -> tuple[Any, Any, Any]:
    """Hits, distances and documents; `each` questions of a document at every distance, correlated within it."""
    asked = np.repeat(DISTANCES, each)
    p = floor + (0.9 - floor) * 2.0 ** (-asked / half)
    latent = np.sqrt(rho) * rng.normal(size=(documents, 1)) + np.sqrt(1 - rho) * rng.normal(size=(documents, len(p)))
    right = (latent < ndtri(p)).astype(float)
    return right.ravel(), np.tile(asked, documents), np.repeat(np.arange(documents), len(asked))


def test_interval_covers_the_true_half_life_and_forgetting_documents_does_not() -> None:
    rng = np.random.default_rng(0)
    runs, inside, alone = 120, 0, 0
    for run in range(runs):
        right, asked, documents = hits(rng, 2000, 20, each=3)
        found = half_life(right, asked, documents, seed=run, draws=200)
        inside += found.low <= 2000 <= (found.high or np.inf)  # type: ignore[operator]
        if run < 60:
            one = half_life(right, asked, np.arange(len(right)), seed=run, draws=200)
            alone += one.low <= 2000 <= (one.high or np.inf)  # type: ignore[operator]
    assert 0.91 < inside / runs < 0.99
    assert alone / 60 < 0.85  # questions instead of documents would promise too much


def test_measured_floor_and_chance_give_the_same_half_life() -> None:
    rng = np.random.default_rng(1)
    right, asked, documents = hits(rng, 2000, 300, floor=0.25)
    wiped = (rng.random(len(right)) < 0.25).astype(float)
    known = half_life(right, asked, documents, floor=0.25, draws=200)
    measured = half_life(right, asked, documents, floor=(wiped, documents), draws=200)
    assert known.verdict == measured.verdict == MEASURED
    assert known.value == pytest.approx(2000, rel=0.25)
    assert measured.value == pytest.approx(known.value, rel=0.1)
    assert measured.floor == pytest.approx(0.25, abs=0.03)
    assert known.start == pytest.approx(0.9, abs=0.05)
    # Without the floor the tail of lucky guesses would look like memory.
    assert half_life(right, asked, documents, draws=200).value > 1.5 * known.value


def test_the_floor_is_drawn_with_the_documents() -> None:
    rng = np.random.default_rng(2)
    right, asked, documents = hits(rng, 4000, 20, floor=0.3)
    wiped = np.repeat((rng.random(20) < 0.3).astype(float), len(DISTANCES))  # known or not, document by document
    level = (wiped.sum() + 0.5) / (len(wiped) + 1)
    fixed = half_life(right, asked, documents, floor=level, draws=400)
    drawn = half_life(right, asked, documents, floor=(wiped, documents), draws=400)
    assert fixed.value == pytest.approx(drawn.value)
    assert (fixed.low, fixed.high) != pytest.approx((drawn.low, drawn.high), rel=1e-3)


def test_exact_curve_is_found_exactly() -> None:
    documents = np.repeat(np.arange(5), len(DISTANCES))
    shares = np.tile(0.1 + 0.7 * 2.0 ** (-DISTANCES / 3000), 5)  # hits averaged over very many seeds
    for graded in (False, True):
        found = half_life(shares, np.tile(DISTANCES, 5), documents, floor=0.1, draws=50, graded=graded)
        assert found.value == pytest.approx(3000, rel=0.04)
        assert found.start == pytest.approx(0.8, abs=0.01)
    shifted = half_life(shares * 10 - 3, np.tile(DISTANCES, 5), documents, floor=-2.0, draws=50, graded=True)
    assert shifted.value == pytest.approx(3000, rel=0.04)


def test_a_curve_that_does_not_fall_is_censored() -> None:
    right, asked, documents = hits(np.random.default_rng(3), 1e9, 40)
    found = half_life(right, asked, documents, draws=200)
    assert (found.verdict, found.value, found.high, found.censored) == (NO_FALL, 16000, None, True)
    assert found.estimate().note == "h > 16000"
    assert str(found).startswith("> 16,000 [")
    assert str(found).endswith(", open)")


def test_an_upper_end_past_the_longest_distance_is_open() -> None:
    right, asked, documents = hits(np.random.default_rng(4), 12000, 15)
    found = half_life(right, asked, documents, draws=200)
    assert found.verdict == MEASURED
    assert found.high is None
    assert found.low is not None
    assert found.low < found.value < 16000
    assert str(found).endswith(", open)")


def test_no_memory_is_a_verdict_and_no_number() -> None:
    rng = np.random.default_rng(5)
    verdicts = []
    for run in range(40):
        right, asked, documents = hits(rng, 1e-9, 40, floor=0.33)
        right[asked == 0] = rng.random(40) < 0.33
        verdicts.append(half_life(right, asked, documents, floor=0.33, seed=run, draws=100))
    nothing = [found for found in verdicts if found.verdict == NO_MEMORY]
    assert len(nothing) >= 36
    assert math.isnan(nothing[0].value)
    assert not nothing[0].censored
    assert nothing[0].estimate().note == str(nothing[0]) == "no memory"
    assert half_life(np.zeros(14), np.tile(DISTANCES, 2), np.repeat([0, 1], 7)).verdict == NO_MEMORY


def test_memory_that_is_gone_at_once() -> None:
    right, asked, documents = hits(np.random.default_rng(6), 30, 60)
    found = half_life(right, asked, documents, draws=200)
    assert (found.verdict, found.value, found.low) == (GONE, 500, 0.0)
    assert found.high == 500
    assert str(found) == "< 500 [0, 500]"


def test_one_lucky_hit_far_away_is_no_memory_of_it() -> None:
    right, asked, documents = hits(np.random.default_rng(7), 500, 40)
    before = half_life(right, asked, documents, draws=50).value
    right[np.flatnonzero(asked == 16000)[0]] = 1.0
    assert half_life(right, asked, documents, draws=50).value < 1.05 * before


def test_unequal_numbers_of_questions_and_very_many_distances() -> None:
    rng = np.random.default_rng(8)
    asked = rng.integers(1, 16000, size=900)
    right = (rng.random(900) < 0.9 * 2.0 ** (-asked / 3000)).astype(float)
    table = Table.of(right, asked, np.arange(900) // 9)
    assert len(table.distances) == 24
    assert table.counts.sum() == 900
    assert np.all(np.diff(table.distances) > 0)
    found = half_life(right, asked, np.arange(900) // 9, draws=200)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 3000 < found.high


def test_paired_ratio_sees_what_single_intervals_hide() -> None:
    rng = np.random.default_rng(9)
    latent = np.sqrt(0.8) * rng.normal(size=(60, 1)) + np.sqrt(0.2) * rng.normal(size=(60, len(DISTANCES)))
    documents = np.repeat(np.arange(60), len(DISTANCES))
    tables, singles = [], []
    for half in (2600, 2000):
        right = (latent < ndtri(0.9 * 2.0 ** (-DISTANCES / half))).astype(float).ravel()
        tables.append(Table.of(right, np.tile(DISTANCES, 60), documents))
        singles.append(half_life(right, np.tile(DISTANCES, 60), documents, draws=300))
    assert singles[0].low < singles[1].high  # type: ignore[operator]
    value, low, _, p = weighted_difference(60, 0, 300, log_ratio(tables))
    assert value == pytest.approx(math.log2(1.3), abs=0.3)
    assert low is not None
    assert low > 0
    assert p < 0.01
    assert weighted_difference(60, 0, 100, log_ratio([tables[0], tables[0]]))[3] == 1.0


def test_few_documents_and_mistakes() -> None:
    one = half_life([1.0, 1.0, 0.0], [0, 100, 200], ["x"] * 3)
    assert (one.low, one.high, one.n) == (None, None, 1)
    with pytest.raises(ValueError, match="two distances"):
        half_life([1.0, 0.0], [5, 5], ["x", "y"])
    with pytest.raises(ValueError, match="between 0 and 1"):
        half_life([-1.0, 0.0], [5, 7], ["x", "y"])


def test_same_seed_same_interval_and_fast_enough() -> None:
    right, asked, documents = hits(np.random.default_rng(10), 2000, 100)
    begin = time.process_time()
    found = half_life(right, asked, documents, seed=3)
    assert time.process_time() - begin < 1.5
    assert found == half_life(right, asked, documents, seed=3)
    assert found != half_life(right, asked, documents, seed=4)


def test_text_of_an_estimate() -> None:
    right, asked, documents = hits(np.random.default_rng(11), 2000, 100)
    estimate = half_life(right, asked, documents, draws=100).estimate()
    assert (estimate.metric, estimate.unit, estimate.note) == ("half_life", "tokens", "")
    assert half_life_text(estimate).count(",") >= 2
    assert half_life_text(estimate).endswith("]")
