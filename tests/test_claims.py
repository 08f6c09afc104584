"""Laws of memories, counted: pools decay as their rule says, stores hold what they have room for; with each law broken
once."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from test_benchmarks import SCRIPTS
from torch import Tensor

from memory_bench.baselines import armt, memoryllm, mplus
from memory_bench.baselines.parts import pool
from memory_bench.baselines.parts.long_term import Store
from memory_bench.baselines.parts.ring import Ring

Draw = Callable[..., Tensor]


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module(name)


@pytest.fixture
def decay(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("decay", monkeypatch)


@pytest.fixture
def capacity(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("capacity", monkeypatch)


def faults(decay: ModuleType, name: str, *, initialized: bool = True) -> set[str]:
    """What of the law of random drops does not hold; chance alone does that once in 10 000 seeds."""
    setting = decay.Setting("test", name, 4, 16, 250, 8, initialized)
    counted = decay.forget(setting)
    lines = decay.compare(setting, counted)
    correlation, error = decay.between_layers(counted, 2)
    wrong = {
        "exactly K rows": not counted.replaced,
        "uniform": initialized and decay.uniformity(setting, counted) < 1e-5,
        "law": any(abs(line["z"]) > 4.5 for line in lines),
        "distribution": any((line["p_distribution"] or 1) < 1e-5 for line in lines),
        "layers": initialized and abs(correlation) > 4.5 * error,
        "expected_retention": any(abs(line["expected_retention"] - line["law"]) > 1e-9 for line in lines),
    }
    return {fault for fault, found in wrong.items() if found}


@pytest.mark.parametrize("name", ["memoryllm", "mplus"])
@pytest.mark.parametrize("initialized", [True, False], ids=["noise", "first-fill"])
def test_pools_decay_as_random_drops_do(decay: ModuleType, name: str, initialized: bool) -> None:
    assert not faults(decay, name, initialized=initialized)


def test_distinct_rows_of_a_first_block_outlive_the_law(decay: ModuleType) -> None:
    setting = decay.Setting("test", "memoryllm", 4, 16, 100, 4, initialized=False)
    last = decay.compare(setting, decay.forget(setting))[-1]
    assert last["distinct"] > 2 * last["law"]


def oldest(state: Any, layers: int, draw: Draw) -> Tensor:
    return torch.arange(state.pool.shape[2]).flip(0).expand(len(state.pool), layers, -1)


def older_half(state: Any, layers: int, draw: Draw) -> Tensor:
    """The dropped rows are the last of a permutation: here those of the older half are likelier there."""
    size = state.pool.shape[2]
    weights = torch.rand(len(state.pool), layers, size, generator=pool_rng(state))
    return (weights + 0.1 * (torch.arange(size) < size // 2)).argsort(dim=-1)


def same_in_all_layers(state: Any, layers: int, draw: Draw) -> Tensor:
    return draw(state, 1).expand(-1, layers, -1)


def pool_rng(state: Any) -> torch.Generator:
    return torch.Generator().manual_seed(int(state.host_writes[0]))


@pytest.mark.parametrize(
    ("flaw", "noticed"),
    [
        (oldest, {"uniform", "law", "distribution"}),
        (older_half, {"uniform"}),
        (same_in_all_layers, {"layers"}),
    ],
)
def test_drops_that_are_not_random_are_noticed(
    decay: ModuleType, monkeypatch: pytest.MonkeyPatch, flaw: Callable[..., Tensor], noticed: set[str]
) -> None:
    draw = pool.draw_permutations
    monkeypatch.setattr(pool, "draw_permutations", lambda state, layers: flaw(state, layers, draw))
    assert noticed <= faults(decay, "memoryllm")


def test_a_row_too_many_is_noticed(decay: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    merge = memoryllm.merge_pool

    def one_more(rows: Tensor, block: Tensor, permutations: Tensor) -> Tensor:
        merged = merge(rows, block, permutations)
        merged[:, :, 0] = merged[:, :, 1]
        return merged

    monkeypatch.setattr(memoryllm, "merge_pool", one_more)
    assert "exactly K rows" in faults(decay, "memoryllm")


# M+'s store: small here, so that its limit comes soon.


def kept(decay: ModuleType) -> Any:
    options = {"merge_every": 3, "initial_recall_frequency": 5.0}
    model = decay.build(decay.Setting("test", "mplus", 4, 16, 0, 0), **options)
    return decay.keep(model, 40, 20), decay.store_law(model.config, range(20))


def test_the_store_loses_nothing_before_its_limit_and_then_the_oldest(decay: ModuleType) -> None:
    found, law = kept(decay)
    assert found.in_order
    assert found.first_loss == 15  # the fifth cohort of three writes pushes out the first
    assert found.held[:14] == [1.0] * 14
    assert max(found.store) == 4 * 3 * 4 + 2 * 4
    assert found.held == pytest.approx(law, abs=0.1)  # 320 rows
    assert found.pool == pytest.approx([0.75**t for t in range(20)], abs=0.1)


def test_a_store_that_loses_others_is_noticed(decay: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    decayed = Store.decayed

    def newest(store: Store, decay: float, at_least: int) -> Store:
        after, count = decayed(store, decay, at_least), store.ages[0].shape[1]
        size = after.ages[0].shape[1]
        if size == count:
            return after
        return Store.of([tuple(t[:, :size] for t in store.layer(i)) for i in range(2)], len(store.counts))

    monkeypatch.setattr(Store, "decayed", newest)
    assert not kept(decay)[0].in_order


def test_rows_that_never_reach_the_store_are_noticed(decay: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    split = mplus.split_permutation

    def other_rows(permutations: Tensor, new: int) -> tuple[Tensor, Tensor]:
        stay, drop = split(permutations, new)
        return stay, stay[..., : drop.shape[-1]]

    monkeypatch.setattr(mplus, "split_permutation", other_rows)
    assert kept(decay)[0].first_loss == 1


# Capacity.


@pytest.mark.parametrize("store", ["ring", "bank"])
@pytest.mark.parametrize("seed", [0, 1])
def test_stores_find_every_item_up_to_their_capacity(capacity: ModuleType, store: str, seed: int) -> None:
    size = {"slots": 64} if store == "ring" else {"size": 64}
    half, full, double = (getattr(capacity, store)(load, seed=seed, **size) for load in (0.5, 1.0, 2.0))
    assert half["recall"] == full["recall"] == 1
    assert (double["older"], double["newer"]) == (0, 1)


def test_a_ring_that_overwrites_the_newest_is_noticed(capacity: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Ring.write

    def stuck(ring: Ring, keys: Any, values: Any, mask: Tensor) -> Ring:
        full = ring.slots == ring.capacity
        after = write(ring, keys, values, mask)
        return Ring(after.keys, after.values, ring.written, ring.capacity) if full else after

    monkeypatch.setattr(Ring, "write", stuck)
    assert capacity.ring(1.0, slots=64)["recall"] == 1
    assert capacity.ring(2.0, slots=64)["newer"] < 0.6


def test_pools_are_soft(capacity: ModuleType) -> None:
    lines = [capacity.pool(load) for load in (0.5, 1.0, 2.0)]
    assert [line["recall"] for line in lines] == pytest.approx([line["law"] for line in lines], abs=0.03)
    assert lines[1]["recall"] < 0.7  # not a memory that holds all it has room for


def test_associations_replace_what_a_key_meant(capacity: ModuleType) -> None:
    memory = capacity.Pairs(16, 3, 4)
    keys, values = torch.randn(4, 1, 16, generator=torch.Generator().manual_seed(0)), capacity.drawn(4, 2, 64, seed=1)
    memory.write(keys, values[:, :1])
    assert torch.allclose(memory.read(keys), values[:, :1], atol=1e-3)
    memory.write(keys, values[:, 1:])
    assert torch.allclose(memory.read(keys), values[:, 1:], atol=1e-3)


def test_associations_lose_facts_as_they_fill(capacity: ModuleType) -> None:
    few, many = capacity.association(0.03), capacity.association(1.0)
    assert few["recall"] > 0.9
    assert many["recall"] < few["recall"] - 0.3


def test_adding_without_the_delta_rule_is_noticed(capacity: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def adds(self: armt.Association, outputs: Tensor, state: Any, first: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        keys = armt.dpfp(self.key(outputs), self.nu)
        return state[0] + keys.transpose(1, 2) @ self.value(outputs), state[1] + keys.sum(dim=1)

    monkeypatch.setattr(armt.Association, "write", adds)
    with pytest.raises(AssertionError):
        test_associations_replace_what_a_key_meant(capacity)
