"""The cache of `xl-cache` chosen from a longer pool: scores by hand, what is attended to, its controls."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from memory_bench.backbone.model import Backbone
from memory_bench.baselines.xl_cache import XLCache, XLCacheConfig
from memory_bench.errors import UserError
from memory_bench.plugins import load
from memory_bench.protocol import Segment
from memory_bench.testing import Check, model_checks, tiny_backbone
from memory_bench.testing.measures import measured_flops

Make = Callable[..., Backbone]
L, POOL, MEMORY, TOP = 8, 20, 9, 5
KINDS = ("trams", "norm", "recent", "random")
CONFIG = XLCacheConfig(segment=L, memory=MEMORY, select="trams", pool=POOL, top_k=TOP)


def build(backbone: Backbone, **options: Any) -> XLCache:
    return XLCache(backbone, replace(CONFIG, **options), torch.Generator()).eval()


def plain(backbone: Backbone, memory: int = MEMORY) -> XLCache:
    return XLCache(backbone, XLCacheConfig(L, memory), torch.Generator()).eval()


def ids_of(number: int, tokens: int = L, rows: int = 2) -> Tensor:
    return torch.randint(2, 64, (rows, tokens), generator=torch.Generator().manual_seed(number))


def read(model: XLCache, segments: int = 5) -> tuple[list[Tensor], Any]:
    state, found = model.open(2, seeds=[3, 4]), []
    for number in range(segments):
        readout, state = model.step(state, Segment.full(ids_of(number)))
        found.append(readout.hidden)
    return found, state


@pytest.mark.parametrize("check", model_checks(), ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", ["trams", "random"])
def test_it_keeps_every_promise(kind: str, check: Check) -> None:
    check(lambda: build(tiny_backbone("qwen3"), select=kind))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["trams", "norm"])
def test_scores_and_choice_by_hand(kind: str, make_backbone: Make) -> None:
    backbone = make_backbone()
    model = build(backbone, select=kind)
    state, keys = model.open(2), [[[] for _ in range(2)] for _ in range(2)]  # keys of layer and row
    for number, tokens in enumerate((8, 8, 3, 8, 8)):
        segment = Segment.full(ids_of(number, tokens))
        chosen = state.chosen
        where = chosen.mask.sum(dim=1, keepdim=True) + torch.arange(tokens)
        embeds = backbone.embed(segment.ids)
        _, own = backbone.run_cached(embeds, segment.mask, chosen, positions=where)
        assert own is not None
        _, state = model.step(state, segment)
        for layer in range(2):
            weight = backbone._blocks[layer].self_attn.q_proj.weight.view(4, 8, 32)
            for row in range(2):
                keys[layer][row] = [*keys[layer][row], *own.keys[layer][row].unbind(dim=1)][-POOL:]
                held = keys[layer][row]
                for group in range(2):
                    scores = []
                    for key in held:
                        us = [weight[2 * group + h].T @ key[group] for h in range(2)]
                        scores.append(sum(float(u.norm() * (u.sum().abs() if kind == "trams" else 1)) for u in us))
                    newest = min(len(held), MEMORY - TOP)
                    old = sorted(range(len(held) - newest), key=lambda j: -scores[j])[:TOP]
                    kept = [*sorted(old), *range(len(held) - newest, len(held))]
                    expected = torch.stack([held[j][group] for j in kept])
                    assert int(state.chosen.mask[row].sum()) == len(kept)
                    assert torch.equal(state.chosen.positions[row], torch.arange(MEMORY))
                    torch.testing.assert_close(state.chosen.keys[layer][row, group, : len(kept)], expected)


@torch.no_grad()
def test_the_newest_are_what_the_cache_without_a_choice_holds(make_backbone: Make) -> None:
    backbone = make_backbone("qwen3")
    for ours, own in zip(read(build(backbone, select="recent"))[0], read(plain(backbone))[0], strict=True):
        torch.testing.assert_close(ours, own, atol=1e-5, rtol=1e-4)
    whole = {"pool": 16, "memory": 16, "top_k": 4}  # there is nothing to choose
    for kind in KINDS:
        for ours, own in zip(read(build(backbone, select=kind, **whole))[0], read(plain(backbone, 16))[0], strict=True):
            torch.testing.assert_close(ours, own, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_every_score_chooses_otherwise(make_backbone: Make) -> None:
    backbone = make_backbone()
    found = {kind: read(build(backbone, select=kind))[0] for kind in KINDS}
    for kind in KINDS:
        for other in KINDS:
            moved = float((found[kind][-1] - found[other][-1]).abs().max())
            assert (moved > 1e-4) == (kind != other), (kind, other)
    model = build(backbone, select="random")
    states = [model.open(2, seeds=seeds) for seeds in ([3, 4], [3, 5])]
    for number in range(5):
        states = [model.absorb(state, Segment.full(ids_of(number))) for state in states]
    assert torch.equal(states[0].chosen.keys[1][0], states[1].chosen.keys[1][0])
    assert not torch.equal(states[0].chosen.keys[1][1], states[1].chosen.keys[1][1])


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_operations_are_counted_exactly(kind: str, make_backbone: Make) -> None:
    for rank in (0, 3):
        backbone = make_backbone()
        backbone.adapt(rank, 6.0, ("q", "v"), torch.Generator().manual_seed(0))
        model = build(backbone, select=kind)
        state = model.open(1)
        for number in range(3):
            segment = Segment.full(ids_of(number, rows=1))
            counted = measured_flops(lambda m=model, s=state, t=segment: m.step(s, t)[0].logits())
            assert counted == model.flops(L, L * number)
            state = model.absorb(state, segment)
        scored = 2 * 2 * 32 * 32 * L if kind in ("trams", "norm") else 0  # both layers
        assert model.detached_flops(L, 0) == scored + (2 * 2 * 3 * 32 * 32 if rank and scored else 0)


@torch.no_grad()
def test_queries_come_from_the_weights_with_their_adapter(make_backbone: Make) -> None:
    backbone, x = make_backbone(), torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    for rank in (0, 2):
        backbone.adapt(rank, 3.0, ("q",), torch.Generator().manual_seed(0))
        if backbone.adapter is not None:
            for p in backbone.adapter.parameters():
                p.normal_(generator=torch.Generator().manual_seed(1))
        q = backbone.project(1, x)[0]
        torch.testing.assert_close(torch.einsum("hed,rtd->rhte", backbone.query_weight(1), x), q, atol=1e-4, rtol=1e-4)


def test_options_that_do_not_fit_are_refused() -> None:
    for wrong, said in (
        ({"select": "tram"}, "xl-cache.select"),
        ({"pool": 8}, "use 1 <= top_k <= memory <= pool"),
        ({"top_k": 0}, "use 1 <= top_k"),
        ({"top_k": 10}, "use 1 <= top_k"),
        ({"select": "all"}, "set select = trams too"),
    ):
        with pytest.raises(UserError, match=said):
            replace(CONFIG, **wrong)  # type: ignore[arg-type]
    usual = XLCacheConfig(segment=L, select="trams")
    assert (usual.slots, usual.attended, usual.chosen) == (64, 8, 4)
    assert load("models", "xl-cache") is XLCache
