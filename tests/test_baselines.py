"""What each plain baseline sees of the text, against naive computations with the whole backbone."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from memory_bench.backbone.model import Backbone
from memory_bench.baselines.full_context import FullContext, FullContextConfig
from memory_bench.baselines.sliding_window import SlidingWindow, SlidingWindowConfig
from memory_bench.baselines.truncation import Truncation, TruncationConfig
from memory_bench.baselines.xl_cache import XLCache, XLCacheConfig
from memory_bench.card import BackboneCard
from memory_bench.errors import UserError
from memory_bench.protocol import MemoryModel, Segment
from memory_bench.testing.measures import random_text, read

SEGMENT = 8
Make = Callable[..., Backbone]


def build(kind: type[MemoryModel[Any]], backbone: Backbone, config: Any) -> MemoryModel[Any]:
    return kind(backbone, config, torch.Generator()).eval()


def logits(model: MemoryModel[Any], ids: Tensor) -> Tensor:
    with torch.no_grad():
        return read(model, model.open(len(ids)), ids)[0]


def forward(backbone: Backbone, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return backbone.model(ids, use_cache=False).logits


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", Truncation.families)
def test_truncation_is_the_backbone_on_every_segment(make_backbone: Make, family: str) -> None:
    model = build(Truncation, make_backbone(family), TruncationConfig(SEGMENT))
    ids = random_text(model, 2, 20)
    close(logits(model, ids), torch.cat([forward(model.backbone, part) for part in ids.split(SEGMENT, dim=1)], dim=1))


@pytest.mark.parametrize("family", FullContext.families)
@pytest.mark.parametrize("segment", [3, 8, 50])
def test_full_context_is_the_backbone_on_everything(make_backbone: Make, family: str, segment: int) -> None:
    model = build(FullContext, make_backbone(family), FullContextConfig(segment))
    ids = random_text(model, 2, 30)
    close(logits(model, ids), forward(model.backbone, ids))


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_full_context_says_when_positions_end(make_backbone: Make, family: str) -> None:
    model = build(FullContext, make_backbone(family, max_position_embeddings=20), FullContextConfig(5))
    full = read(model, model.open(2), random_text(model, 2, 20))[1]
    mask = torch.zeros(2, 5, dtype=torch.bool)
    padding, _ = model.step(full, Segment(torch.zeros(2, 5, dtype=torch.long), mask))
    assert bool(padding.logits().isfinite().all())
    with pytest.raises(UserError, match=f"more than 20 tokens with this {family} backbone"):
        model.step(full, Segment.full(random_text(model, 2, 1)))


def test_full_context_shares_what_it_has_read(make_backbone: Make) -> None:
    model = build(FullContext, make_backbone("llama"), FullContextConfig(SEGMENT))
    _, first = read(model, model.open(1), random_text(model, 1, 16))
    _, second = read(model, first, random_text(model, 1, 8))
    before, after = dict(first.tensors()), dict(second.tensors())
    assert all(after[name] is tensor for name, tensor in before.items() if name.startswith("parts"))
    assert not build(FullContext, make_backbone("llama", key_shift=True), FullContextConfig(8)).traits.chunk_invariant


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_xl_cache_sees_the_previous_segment(make_backbone: Make, kind: str) -> None:
    model = build(XLCache, make_backbone(kind, num_hidden_layers=1, key_shift=False), XLCacheConfig(SEGMENT))
    ids = random_text(model, 2, 32)
    got = logits(model, ids)
    for start in range(SEGMENT, 32, SEGMENT):  # with one layer, a cached key knows its own token only
        window = ids[:, start - SEGMENT : start + SEGMENT]
        close(got[:, start : start + SEGMENT], forward(model.backbone, window)[:, SEGMENT:])


@pytest.mark.parametrize(
    ("kind", "config"),
    [(XLCache, XLCacheConfig(SEGMENT, memory=40)), (SlidingWindow, SlidingWindowConfig(SEGMENT, window=40))],
)
def test_a_cache_with_room_for_everything_is_full_context(make_backbone: Make, kind: type[Any], config: Any) -> None:
    model = build(kind, make_backbone("llama"), config)
    ids = random_text(model, 2, 30)
    close(logits(model, ids), forward(model.backbone, ids))


def test_xl_cache_reaches_back_a_segment_per_layer(make_backbone: Make) -> None:
    model = build(XLCache, make_backbone("llama"), XLCacheConfig(SEGMENT))
    ids = random_text(model, 1, 32)
    other = ids.clone()
    other[:, 0] = (ids[:, 0] + 1) % model.backbone.vocab
    changed = (logits(model, ids) - logits(model, other)).abs().amax(dim=2)[0] > 1e-5
    assert changed.view(4, SEGMENT).any(dim=1).tolist() == [True, True, True, False]  # 2 layers: 2 segments on


@pytest.mark.parametrize("detached", [False, True])
def test_xl_cache_passes_gradients_unless_told_not_to(make_backbone: Make, detached: bool) -> None:
    config = XLCacheConfig.official() if detached else XLCacheConfig()
    model = build(XLCache, make_backbone("llama"), replace(config, segment=SEGMENT))
    _, state = model.step(model.open(1), Segment.full(random_text(model, 1, SEGMENT)))
    assert all(k.requires_grad is not detached for k in state.keys)


def test_sliding_window_sees_sinks_and_recent_tokens(make_backbone: Make) -> None:
    config = SlidingWindowConfig(segment=SEGMENT, sinks=3, window=5)
    model = build(SlidingWindow, make_backbone("llama", num_hidden_layers=1), config)
    ids = random_text(model, 2, 32)
    got = logits(model, ids)
    close(got[:, :SEGMENT], forward(model.backbone, ids[:, :SEGMENT]))
    for start in range(SEGMENT, 32, SEGMENT):  # sinks, window, segment: as if they followed one another
        seen = torch.cat([ids[:, :3], ids[:, start - 5 : start + SEGMENT]], dim=1)
        close(got[:, start : start + SEGMENT], forward(model.backbone, seen)[:, 8:])


def test_sliding_window_keeps_real_tokens_of_every_row(make_backbone: Make) -> None:
    model = build(SlidingWindow, make_backbone("llama"), SlidingWindowConfig(segment=4, sinks=2, window=3))
    ids = random_text(model, 1, 12)
    mask = torch.tensor([[1, 0, 0, 1, 0, 1, 1, 0, 0, 0, 0, 1]]).bool()
    with torch.no_grad():
        _, padded = read(model, model.open(1), ids, mask)
        embeds = model.backbone._blocks[0].self_attn.v_proj(
            model.backbone.norm_input(0, model.backbone.embed(ids[mask][None]))
        )
    values = padded.values[0].transpose(1, 2).flatten(2)  # [rows, slots, kv_heads * head]
    assert padded.mask.tolist() == [[True] * 5]  # of five real tokens, two sinks and three recent ones
    torch.testing.assert_close(values, embeds)
    assert padded.positions.tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("kind", [Truncation, SlidingWindow, XLCache, FullContext])
def test_models_size_themselves_to_the_window(
    make_backbone: Make, make_card: Callable[..., BackboneCard], kind: type[Any]
) -> None:
    from memory_bench.budget import Budget

    card = make_card(make_backbone("llama"), window=24)
    assert kind.fit(card, Budget("tests")).segment == 24
