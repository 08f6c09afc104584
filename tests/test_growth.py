"""How a state grows: exact curves, rings that fill, stores that cap, states that go up and down."""

import math

import pytest

from memory_bench.statistics.growth import Growth, fit_growth

TOKENS = [32 * n for n in (1, 2, 3, 4, 5, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128)]


@pytest.mark.parametrize("tokens", [TOKENS, [16 * n for n in range(1, 9)], [500, 1000, 1700, 2000]])
@pytest.mark.parametrize(("start", "rate"), [(0, 1), (4096, 1.5), (10**9, 0.25), (7, 3e6)])
def test_exact_curves_are_told_apart(tokens: list[int], start: float, rate: float) -> None:
    line = fit_growth([(t, start + rate * t) for t in tokens])  # type: ignore[misc]
    assert line is not None
    assert (line.kind, line.bytes_per_doubling) == ("linear", None)
    assert line.bytes_per_token == pytest.approx(rate, rel=1e-3)
    curve = fit_growth([(t, start + 100 * rate * math.log2(t)) for t in tokens])  # type: ignore[misc]
    assert curve is not None
    assert (curve.kind, curve.bytes_per_token) == ("logarithmic", None)
    assert curve.bytes_per_doubling == pytest.approx(100 * rate, rel=1e-3)
    flat = fit_growth([(t, round(start)) for t in tokens])
    assert flat is not None
    assert (flat.kind, flat.bytes_per_token, flat.bytes_per_doubling) == ("constant", None, None)


@pytest.mark.parametrize("full", [64, 500, 2048])
def test_a_ring_that_has_filled_is_constant(full: int) -> None:
    found = fit_growth([(t, 12 * min(t, full)) for t in reversed(TOKENS)])  # in any order
    assert found is not None
    assert found.kind == "constant"
    assert [t for t, _ in found.points] == TOKENS


def test_before_its_cap_a_store_is_linear() -> None:
    found = fit_growth([(t, 40 + 12 * min(t, 4096)) for t in TOKENS])
    assert found is not None
    assert (found.kind, round(found.bytes_per_token or 0)) == ("linear", 12)


def test_what_goes_up_and_down_without_growing_is_constant_and_what_grows_meanwhile_is_not() -> None:
    teeth = [(t, 10_000 + 300 * (n % 3)) for n, t in enumerate(TOKENS)]
    thinned = [(t, 100 * t - 500 * (n % 2)) for n, t in enumerate(TOKENS)]
    doubling = [(t, 2 ** math.ceil(math.log2(t))) for t in TOKENS]  # room that is doubled whenever it is full
    shrinking = [(t, 10**6 - t) for t in TOKENS]
    found = [fit_growth(points) for points in (teeth, thinned, doubling, shrinking)]
    assert [growth and growth.kind for growth in found] == ["constant", "linear", "linear", "constant"]


@pytest.mark.parametrize(("rise", "kind"), [(200, "constant"), (300, "constant"), (301, "linear")])
def test_a_new_highest_size_is_growth_only_beyond_what_the_state_shrank(rise: int, kind: str) -> None:
    """In the later half it shrinks once, by 300: a peak no higher than that above the earlier ones says nothing."""
    sizes = [10_000] * 13 + [10_000 + rise, 9_700 + rise]
    found = fit_growth(list(zip(TOKENS, sizes, strict=True)))
    assert found is not None
    assert found.kind == kind


@pytest.mark.parametrize("points", [[], [(32, 5)], [(32, 5), (64, 9), (96, 13)], [(1000 + n, n) for n in range(9)]])
def test_too_few_points_or_too_close_say_nothing(points: list[tuple[int, int]]) -> None:
    assert fit_growth(points) is None


def test_it_comes_back_from_json() -> None:
    found = fit_growth([(t, 3 * t) for t in TOKENS])
    assert found is not None
    assert Growth.from_json(found.to_json()) == found
    slower, none = fit_growth([(t, 2 * t) for t in TOKENS]), fit_growth([(t, 9) for t in TOKENS])
    assert slower is not None
    assert none is not None
    assert sorted([found, none, slower], key=lambda growth: growth.rank) == [none, slower, found]
