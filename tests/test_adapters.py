"""The same adapters for every model: counted, trained, saved, loaded, and never twice."""

import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_conformance import MODELS, build, cases, load
from test_grid import grid
from test_train import toy_corpus, weights
from torch import Tensor

from memory_bench.backbone.lora import adapter_size
from memory_bench.budget import PRESETS, Budget, Usage
from memory_bench.card import ADAPTED
from memory_bench.cell import Choice, Training
from memory_bench.driver.checkpoints import save_checkpoint
from memory_bench.driver.meter import Meter
from memory_bench.driver.train import Trained, adapts, train, trained_parameters
from memory_bench.errors import UserError
from memory_bench.protocol import MemoryModel
from memory_bench.recipe import RECIPES, find_recipe
from memory_bench.running.building import Parts, over
from memory_bench.store import Store
from memory_bench.testing import card_of, model_checks, tiny_backbone
from memory_bench.testing.measures import random_text, read
from memory_bench.zoo.named import Loaded

FAMILIES = ("llama", "qwen3", "mistral-window", "granite", "gpt2", "opt")
PROMISES = ("flops_are_counted", "absorbing_is_stepping", "decoding_is_rereading", "gradients_reach_the_parameters")
FROZEN = {"longmem", "memoryprompt"}  # their backbones train nothing, adapters neither
QUICK = {"lr": 1e-2, "warmup": 1, "lora_rank": 4}


def adapted(kind: type[MemoryModel[Any]], backbone: str, spread: float) -> MemoryModel[Any]:
    """A model whose backbone has adapters, with entries of `spread` in what begins as zero."""
    model = build(kind, backbone)
    model.backbone.adapt(4, 8.0, ADAPTED, torch.Generator().manual_seed(2))
    rng = torch.Generator().manual_seed(3)
    for name, p in model.adapter_parameters().items():
        if name.endswith("B"):
            p.data.copy_(spread * torch.randn(p.shape, generator=rng))
    return model


def kind_of(name: str) -> type[MemoryModel[Any]]:
    kind = load(MODELS[name])
    assert not isinstance(kind, Exception), kind
    return kind


@pytest.mark.parametrize("promise", PROMISES)
@pytest.mark.parametrize(("entry", "backbone"), cases())
def test_promises_hold_with_adapters(entry: Any, backbone: str, promise: str) -> None:
    check = next(check for check in model_checks() if check.__name__ == promise)
    check(lambda: adapted(kind_of(entry.name), backbone, 0.1))


@torch.no_grad()
@pytest.mark.parametrize(("entry", "backbone"), cases())
def test_fresh_adapters_change_nothing_and_others_something(entry: Any, backbone: str) -> None:
    plain = build(kind_of(entry.name), backbone).eval()
    text = random_text(plain, 2, 24)
    expected, _ = read(plain, plain.open(2, seeds=[1, 2]), text)
    for spread in (0.0, 0.1):
        model = adapted(kind_of(entry.name), backbone, spread).eval()
        logits, _ = read(model, model.open(2, seeds=[1, 2]), text)
        assert logits.equal(expected) == (not spread), "every model's passes go through the adapters"
        assert model.added_parameters() - plain.added_parameters() == sum(
            p.numel() for p in model.adapter_parameters().values()
        )


@pytest.mark.parametrize("kinds", [ADAPTED, ("q", "v"), ("k",), ("o", "down"), ("gate", "up")])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_counted_without_loading(family: str, kinds: tuple[str, ...]) -> None:
    backbone = tiny_backbone(family)
    backbone.adapt(3, 1.0, kinds, torch.Generator())
    assert backbone.adapter is not None
    found = sum(p.numel() for p in backbone.adapter.parameters())
    assert adapter_size(card_of(backbone), 3, kinds) == found == sum(map(backbone.adapter.size, range(2)))
    assert found
    backbone.adapt(0, 1.0, kinds, torch.Generator())
    assert backbone.adapter is None
    assert not any("adapter" in name for name in backbone.state_dict())


def parts_of(name: str, *, recipe: dict[str, Any] | None = None, budget: Budget | None = None) -> Parts:
    """What the worker builds of `name` on a pretrained backbone under `adapt`; always over the same weights."""
    backbone = tiny_backbone("llama")
    card = replace(card_of(backbone), pretrained=True)
    changes = QUICK if recipe is None else recipe
    budget = budget or Budget("few", train_tokens=64 * 4 * 6)
    kind = kind_of(name)
    config = kind.fit(card, budget)
    config = kind.unadapted(config) if adapts(budget, replace(find_recipe("adapt"), **changes), kind) else config
    training = Training(
        Choice(name, config=asdict(config)), Choice("somewhere", config={"dtype": "float32"}), Choice("toy"),
        Choice("adapt", 2, changes), budget, seed=1,
    )  # fmt: skip
    nobody: Any = SimpleNamespace(equip=lambda loaded, helpers: None)
    nothing: Any = None
    return over(training, Loaded(backbone, nothing, card), nobody, None, "cpu")


def trained(parts: Parts) -> tuple[Trained, Meter]:
    meter = Meter(parts.training.budget, torch.device("cpu"))
    with meter.phase("train"):
        return train(parts.build, parts.config, parts.recipe, toy_corpus(), meter, seed=1), meter


def adapters(model: MemoryModel[Any]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.adapter_parameters().items()}


@pytest.mark.parametrize("name", sorted(set(MODELS) - FROZEN))
def test_every_model_trains_saves_and_loads_the_same_adapters(name: str, tmp_path: Path) -> None:
    window, parts = adapters(parts_of("truncation").begun()), parts_of(name)
    fresh, backbone = adapters(parts.begun()), weights(parts.loaded.backbone.model)
    assert fresh.keys() == window.keys()
    assert all(fresh[key].equal(window[key]) for key in fresh), "they begin alike, whatever a model draws itself"
    assert len(fresh) == 2 * 2 * 7
    done, meter = trained(parts)
    after = adapters(done.model)
    assert not [key for key in after if after[key].equal(fresh[key])]
    assert all(tensor.equal(backbone[key]) for key, tensor in parts.loaded.backbone.model.state_dict().items())
    assert set(trained_parameters(done.model, parts.recipe)) >= set(fresh)

    save_checkpoint(tmp_path / "c", done, parts.recipe, parts.training, meter.usage)
    other = parts_of(name)
    loaded = other.kept(tmp_path / "c", Usage(), lambda sentence: pytest.fail(sentence))
    assert loaded is not None
    again = adapters(loaded.model)
    assert all(again[key].equal(tensor) for key, tensor in after.items())
    text = random_text(done.model, 2, 24)
    with torch.no_grad():
        ours, _ = read(done.model, done.model.open(2, seeds=[1, 2]), text)
        theirs, _ = read(loaded.model, loaded.model.open(2, seeds=[1, 2]), text)
        scored = other.scored(loaded.model, {"segment": 4} if "segment" in asdict(other.config) else {})
        read(scored, scored.open(2, seeds=[1, 2]), text)
    assert ours.equal(theirs)
    assert adapters(scored).keys() == after.keys()


@pytest.mark.parametrize("name", ["truncation", "full-context", "retrieval"])
def test_a_window_adapts(name: str) -> None:
    done, meter = trained(parts_of(name, budget=Budget("some", train_tokens=64 * 4 * 40)))
    losses = [loss for _, loss in done.curve]
    assert sum(losses[-5:]) / 5 < losses[0] - 1
    assert meter.usage.train_tokens > 0
    assert done.ended_by == "train_tokens"


def test_methods_with_a_frozen_backbone_and_untrained_ones_have_none() -> None:
    assert not adapters(parts_of("longmem").begun())
    assert not adapters(parts_of("rmt", budget=Budget("free", train_tokens=0)).begun())
    assert not adapters(parts_of("rmt", recipe={"lora_rank": 0}).begun())


@pytest.mark.parametrize("name", ["memoryllm", "mplus"])
def test_a_method_with_adapters_of_its_own_has_the_recipes(name: str) -> None:
    found = parts_of(name).begun()
    assert not [n for n in found.memory_parameters() if "lora" in n]
    assert adapters(found).keys() == adapters(parts_of("truncation").begun()).keys()


def test_adapters_have_a_rate_of_their_own() -> None:
    still = parts_of("rmt", recipe={**QUICK, "lora_lr": 0.0})
    fresh = adapters(still.begun())
    done, _ = trained(still)
    assert all(tensor.equal(fresh[key]) for key, tensor in adapters(done.model).items())
    assert not done.model.memory_parameters()["initial_memory"].equal(
        still.begun().memory_parameters()["initial_memory"]
    )


def test_what_is_for_pretrained_backbones_has_adapters_of_one_rank() -> None:
    assert {r.name: r.lora_rank for r in RECIPES.values() if r.lora_rank} == {"adapt": 16, "infini-attention-adapt": 16}
    assert {r.name: r.version for r in RECIPES.values() if r.version != 1} == {"adapt": 2}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora_rank": -1}, "must not be negative"),
        ({"lora_alpha": 0.0}, "above zero"),
        ({"lora_targets": ("query",)}, "Unknown target in lora_targets 'query'"),
        ({"lora_targets": ()}, "names nothing"),
        ({"trains": "all"}, "all weights train anyway"),
    ],
)
def test_a_recipe_says_what_it_cannot_do(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        replace(find_recipe("adapt"), **changes)


def test_the_grid_gives_every_model_the_recipes_adapters_and_none_its_own(world: Any) -> None:
    found = {c.label: c.training for c in grid(world, "memoryllm,rmt,longmem").cells}
    assert all(t.recipe == Choice("adapt", 2, {}) for t in found.values())
    assert found["memoryllm"].model.config["lora_rank"] == 0
    wide = {"memoryllm": {"train.lora_rank": 0, "lora_rank": 2}}
    alone = next(c for c in grid(world, "memoryllm", settings=wide, controls=False).cells).training
    assert (alone.model.config["lora_rank"], alone.recipe) == (2, Choice("adapt", 2, {"lora_rank": 0}))
    with pytest.raises(UserError, match=r"memoryllm would have adapters twice.*Leave out lora_rank"):
        grid(world, "memoryllm", settings={"memoryllm": {"lora_rank": 2}})
    other = next(c for c in grid(world, "rmt[train.lora_rank=8]", controls=False).cells).training
    assert other.recipe == Choice("adapt", 2, {"lora_rank": 8})
    assert other.key != found["rmt"].key


def test_where_nothing_is_trained_keys_stay_and_methods_keep_their_adapters(world: Any) -> None:
    free = {c.label: c.training for c in grid(world, "memoryllm", budget=PRESETS["cpu-smol"]).cells}
    assert free["memoryllm"].recipe == free["truncation"].recipe == Choice("adapt", 1, {})


def test_what_a_method_adds_is_sized_beside_the_adapters(world: Any) -> None:
    taken = adapter_size(card_of(tiny_backbone("llama", vocab_size=300)), 16, ADAPTED)
    tight = Budget("tight", train_tokens=1000, added_parameters=taken + 3 * 32)
    found = next(c for c in grid(world, "rmt", budget=tight, controls=False).cells).training
    assert found.model.config["memory_tokens"] == 3


def test_a_run_gives_the_window_the_same(
    world: Any, invoke: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    tasks = ("--models", "memoryllm,rmt,longmem,retrieval", "--out", str(out))
    code, _, err = invoke("run", *world.arguments(*tasks, "--tasks", "pg19"))
    assert code == 0, err
    code, _, err = invoke("run", *world.arguments(*tasks, "--tasks", "pg19,pubmedqa"))
    assert code == 0, err
    records = {(r.cell.label, r.cell.task.name): r for r in Store.open(out).records()}
    taken = adapter_size(card_of(tiny_backbone("llama", vocab_size=300)), 16, ADAPTED)
    for (label, _), record in records.items():
        usage = record.usage
        assert usage.adapter_parameters == (0 if label == "longmem" else taken), label
        assert usage.train_tokens >= 1000
        assert usage.trained_parameters >= usage.adapter_parameters
        assert usage.parameters - usage.added_parameters == records["truncation", "pg19"].usage.parameters - taken
    window = records["truncation", "pg19"]
    assert window.usage.added_parameters == window.usage.trained_parameters == taken
    assert window.learned is not None
    assert window.learned["verdict"] == "no memory"
    board = (out / "leaderboard.md").read_text(encoding="utf-8")
    said = [
        line
        for line in board.splitlines()
        if f"trained with no adapters on its backbone, others with {taken:,}" in line
    ]
    assert len(said) == 2, board
    assert all("longmem" in line for line in said)
    assert len(list((out / "checkpoints").iterdir())) == 6
