"""Statistics: coverage by simulation, hand-worked examples, and behaviour where nothing can be said."""

import time

import numpy as np
import pytest

from memory_bench.statistics import stats


def test_ratio_interval_covers_at_its_level() -> None:
    rng = np.random.default_rng(0)
    hits, runs, true = 0, 600, 2.0
    for run in range(runs):
        size = rng.gamma(4.0, size=25)
        _, low, high = stats.ratio_interval(size * rng.normal(true, 0.5, size=25), size, seed=run, draws=500)
        hits += low <= true <= high  # type: ignore[operator]
    assert 0.925 < hits / runs < 0.975


def test_mean_interval_covers_with_clusters() -> None:
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(30), 5)
    hits = alone = 0
    for run in range(500):
        values = rng.normal(0, 1, 30)[clusters] + rng.normal(0, 0.5, 150)
        _, low, high = stats.mean_interval(values, clusters, seed=run, draws=500)
        hits += low <= 0 <= high  # type: ignore[operator]
        _, low, high = stats.mean_interval(values, np.arange(150), seed=run, draws=500)
        alone += low <= 0 <= high  # type: ignore[operator]
    assert 0.92 < hits / 500 < 0.98
    assert alone / 500 < 0.75  # forgetting the clusters would promise too much


def test_interval_of_ten_units_is_wider_than_the_plain_percentiles() -> None:
    values = np.arange(10.0)
    _, low, high = stats.mean_interval(values, np.arange(10), seed=0)
    rng = np.random.default_rng(0)
    plain = np.quantile(values[rng.integers(10, size=(2000, 10))].mean(axis=1), [0.025, 0.975])
    assert low is not None
    assert high is not None
    assert low < plain[0]
    assert high > plain[1]


def test_p_value_is_uniform_when_nothing_differs() -> None:
    rng = np.random.default_rng(2)
    pairs = rng.normal(size=(600, 2, 60))
    p = [stats.paired_difference(a, b, np.arange(60), seed=i, draws=300)[3] for i, (a, b) in enumerate(pairs)]
    assert 0.03 < np.mean(np.array(p) < 0.05) < 0.075
    assert 0.45 < np.mean(p) < 0.55


def test_pairing_finds_what_unpaired_intervals_hide() -> None:
    rng = np.random.default_rng(3)
    documents = rng.normal(5, 1, size=40)
    bytes_ = np.full(40, 100.0)
    a, b = (documents - 0.05) * bytes_, (documents + rng.normal(0, 0.02, 40)) * bytes_
    difference, low, high, p = stats.paired_ratio_difference(a, b, bytes_, seed=0)
    assert difference == pytest.approx(-0.05, abs=0.01)
    assert low is not None
    assert high is not None
    assert low < difference < high < 0
    assert p < 1e-6
    assert stats.ratio_interval(a, bytes_, seed=0)[2] > stats.ratio_interval(b, bytes_, seed=0)[1]  # type: ignore[operator]
    flipped = stats.paired_ratio_difference(b, a, bytes_, seed=0)
    assert flipped[0] == pytest.approx(-difference)
    assert flipped[3] == pytest.approx(p)


def test_other_denominator() -> None:
    a, b = np.array([1.0, 2.0, 4.0]), np.array([2.0, 1.0, 3.0])
    got = stats.paired_ratio_difference(2 * a, b, 2 * np.ones(3), den_b=np.ones(3), seed=0)
    assert got == pytest.approx(stats.paired_ratio_difference(a, b, np.ones(3), seed=0))


def test_few_units_give_no_certainty() -> None:
    three = stats.paired_difference(np.ones(3), np.zeros(3), np.arange(3), seed=0)
    assert three[3] == 0.25  # three equal signs
    assert stats.paired_difference([1.0], [0.0], [0], seed=0) == (1.0, None, None, 1.0)
    assert stats.mean_interval([0.5, 1.0], ["x", "x"], seed=0) == (0.75, None, None)
    value, low, high = stats.ratio_interval([], [], seed=0)
    assert np.isnan(value)
    assert low is None
    assert high is None


def test_same_seed_same_interval_and_fast_enough() -> None:
    values = np.random.default_rng(4).normal(size=500)
    begin = time.process_time()
    one = stats.mean_interval(values, np.arange(500), seed=7)
    assert time.process_time() - begin < 1.0
    assert one == stats.mean_interval(values, np.arange(500), seed=7)
    assert one != stats.mean_interval(values, np.arange(500), seed=8)


def test_chunks_do_not_change_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stats.ratio_interval(np.arange(9.0), np.ones(9), seed=0)
    monkeypatch.setattr(stats, "_CHUNK", 90)
    assert stats.ratio_interval(np.arange(9.0), np.ones(9), seed=0) == pytest.approx(whole)


def test_statistic_interval_agrees_with_the_mean() -> None:
    rng = np.random.default_rng(5)
    values, clusters = rng.normal(size=120), np.repeat(np.arange(40), 3)
    slow = stats.statistic_interval(lambda rows: float(values[rows].mean()), clusters, seed=0)
    fast = stats.mean_interval(values, clusters, seed=0)
    assert slow == pytest.approx(fast, abs=0.03)


def test_macro_f1_by_hand() -> None:
    predicted = ["yes", "yes", "no", "maybe"]
    answer = ["yes", "no", "no", "no"]
    # yes: P 1/2 R 1 -> 2/3; no: P 1 R 1/3 -> 1/2; maybe: never true -> 0
    assert stats.macro_f1(predicted, answer) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert stats.macro_f1(answer, answer) == 1.0
    assert np.isnan(stats.macro_f1([], []))


def test_holm_by_hand() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert list(stats.holm([])) == []


def test_letters_by_hand() -> None:
    # a line of four where only neighbours are alike, the classic case of overlapping letters
    p = {("A", "C"): 0.01, ("A", "D"): 0.001, ("D", "B"): 0.02, ("A", "B"): 0.2, ("B", "C"): 0.3, ("C", "D"): 0.4}
    assert stats.letters(["A", "B", "C", "D"], p) == {"A": "a", "B": "ab", "C": "bc", "D": "c"}
    assert stats.letters(["A", "B"], {}) == {"A": "a", "B": "a"}
    assert stats.letters([], {}) == {}


def test_letters_mean_what_they_say() -> None:
    rng = np.random.default_rng(6)
    for _ in range(30):
        names = [f"m{i}" for i in range(7)]
        pairs = {(a, b): float(rng.random() < 0.6) for i, a in enumerate(names) for b in names[:i]}
        shown = stats.letters(names, pairs)
        for (a, b), p in pairs.items():
            assert bool(set(shown[a]) & set(shown[b])) == (p >= 0.05)


def test_seed_floor_pools_models_and_needs_two_seeds() -> None:
    floor = stats.seed_floor([[1.0, 1.2], [3.0, 3.2], [7.0]])
    # pooled variance 0.02 with 2 degrees of freedom, t = 4.303
    assert floor(2, 2) == pytest.approx(4.3027 * 0.02**0.5, rel=1e-4)
    assert floor(1, 1) > floor(2, 2)
    assert stats.seed_floor([[1.0], [2.0]])(1, 1) == 0.0


def test_what_no_seed_trained_does_not_thin_the_noise_between_seeds() -> None:
    trained = [[1.0, 1.2], [3.0, 3.2]]
    alone = stats.seed_floor(trained)
    still = [[5.0, 5.0], [6.0, 6.0], [7.0, 7.0]]  # computes the same with every seed
    among = stats.seed_floor(trained + still, [True, True, False, False, False])
    assert among(2, 2) == alone(2, 2)
    assert stats.seed_floor(trained + still)(2, 2) < alone(2, 2)  # as it was
    assert among(2, 0) == pytest.approx(alone(2, 2) / 2**0.5)  # only one of the two moves with the seed
    assert among(0, 0) == 0.0
    draws = stats.seed_floor([*trained, [4.0, 4.2]], [True, True, False])  # untrained, but it draws while it reads
    assert draws(2, 2) == stats.seed_floor([*trained, [4.0, 4.2]])(2, 2)


def test_text_units_cut_few_documents_alike_for_all_segment_lengths() -> None:
    documents, starts, tokens = ["x"] * 8 + ["y"] * 4, [*range(0, 80, 10), *range(0, 40, 10)], [10] * 12
    units = stats.text_units(documents, starts, tokens, at_least=4)
    assert list(units) == [0] * 4 + [1] * 4 + [2] * 2 + [3] * 2
    coarse = stats.text_units(["x"] * 4 + ["y"] * 2, [0, 20, 40, 60, 0, 20], [20] * 6, at_least=4)
    assert list(coarse) == [0, 0, 1, 1, 2, 3]
    assert list(stats.text_units(documents, starts, tokens, at_least=2)) == [0] * 8 + [1] * 4
