"""The largest of many scores: what `torch.topk` finds, entry by entry, where entries are equal too; and who uses it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from memory_bench.baselines.parts import knn, largest

LENGTH = 2048


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(x: Tensor) -> Tensor:
    return (x * 300).round() / 300


def duplicated(x: Tensor) -> Tensor:
    """The best entry of every other row stands there twice, in the border of the chosen ones in some."""
    best = x.topk(9, dim=-1).indices
    x[::2, 7] = x[::2].gather(-1, best[::2, :1])[:, 0]
    x[1::4, 7] = x[1::4].gather(-1, best[1::4, 7:8])[:, 0]  # the 8th of 8, once more behind it
    x[1::4, 2040] = x[1::4, 7]
    return x


def filled(x: Tensor, value: float, count: int) -> Tensor:
    x[::3, :count] = value
    return x


MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda x: x,
    "rising": lambda x: x + torch.linspace(0, 9, x.shape[-1]),
    "falling": lambda x: x - torch.linspace(0, 9, x.shape[-1]),
    "one group": lambda x: x + 50 * (torch.arange(x.shape[-1]) % (x.shape[-1] // largest.GROUP) == 3),
    "rounded": rounded,
    "duplicated": duplicated,
    "all equal": torch.zeros_like,
    "signs of zero": lambda x: torch.where(x > 0, 0.0, -0.0),
    "few": lambda x: filled(x, torch.finfo(x.dtype).min, LENGTH - 3),
    "crowded rows": lambda x: filled(x, 7.0, 500),
    "no numbers": lambda x: filled(x, torch.nan, 4),
    "infinite": lambda x: filled(x, torch.inf, 4),
    "minus infinite": lambda x: filled(x, -torch.inf, LENGTH - 3),
}


@pytest.mark.parametrize("length", [LENGTH, LENGTH + 5])
@pytest.mark.parametrize("made", MADE)
def test_the_largest_are_those_of_topk(made: str, length: int) -> None:
    scores = MADE[made](drawn(61, length)).view(1, 1, 61, length)
    for k in (1, 8, 33):
        (values, index), (expected, places) = largest.largest(scores, k), scores.topk(k, dim=-1)
        assert torch.equal(index, places), k
        assert torch.equal(values.nan_to_num(nan=5.0), expected.nan_to_num(nan=5.0)), k


def test_rows_of_unequal_numbers_are_found_without_sorting_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = drawn(3, LENGTH)
    expected = scores.topk(8, dim=-1).indices
    monkeypatch.setattr(Tensor, "topk", lambda *_, **__: pytest.fail("sorted"))
    assert torch.equal(largest.largest(scores, 8)[1], expected)


@pytest.mark.parametrize(
    "other", [drawn(2, 40), drawn(2, LENGTH).double(), drawn(2, LENGTH).bfloat16(), drawn(0, LENGTH)]
)
def test_others_are_sorted(other: Tensor) -> None:
    for got, expected in zip(largest.largest(other, 8), other.topk(8, dim=-1), strict=True):
        assert torch.equal(got, expected)


def test_the_gradient_goes_into_the_chosen() -> None:
    found = []
    for search in (largest.largest, Tensor.topk):
        scores = drawn(2, 3, LENGTH).requires_grad_()
        found.append(torch.autograd.grad(search(scores, 8)[0].sin().sum(), scores)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("block", [1 << 15, 1 << 22])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("repeated", [False, True], ids=["all differ", "keys come again"])
def test_retrieval_is_that_of_the_plain_search_to_the_bit(
    block: int, joint: bool, repeated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over full and half-filled stores, with several heads to a key and a buffer that blocks share."""
    monkeypatch.setattr(knn, "BLOCK", block)
    q, keys, values = drawn(2, 6, 23, 16), drawn(2, 2, LENGTH, 16, seed=1), drawn(2, 2, LENGTH, 16, seed=2)
    if repeated:  # as a token's keys of the first layer do, wherever it stands
        keys = keys[:, :, torch.randint(300, (LENGTH,), generator=torch.Generator().manual_seed(3))]
    local = knn.Local(drawn(2, 6, 23, 16, seed=4), drawn(2, 2, 23, 16, seed=5), drawn(2, 2, 23, 16, seed=6))
    for valid in (None, torch.arange(LENGTH).expand(2, -1) < torch.tensor([[LENGTH], [9]])):
        found: list[tuple[Tensor, ...]] = []
        for plain in (True, False):
            with monkeypatch.context() as patch:
                if plain:
                    patch.setattr(knn, "largest", lambda scores, k: scores.topk(k, dim=-1))
                    patch.setattr(knn, "_Products", lambda keys: lambda q: knn.products(q, keys))
                with torch.no_grad():
                    got = knn.retrieve_and_attend(q, keys, values, 8, valid=valid, local=local if joint else None)
                    found.append((got, knn.search(q, keys, 8, valid), *knn.search_cosine(q, keys, 8, valid)))
        for before, after in zip(*found, strict=True):
            assert torch.equal(before, after)
