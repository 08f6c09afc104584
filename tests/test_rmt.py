"""RMT: recurrence, padding, peeking, generation. Parity with the official code is tested elsewhere."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from memory_bench.backbone.model import Backbone
from memory_bench.baselines.rmt import RMT, RMTConfig
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.errors import UserError
from memory_bench.parity.replaying import segment_lengths, shifted_loss, tail_loss
from memory_bench.protocol import DecodePlan, Segment

Make = Callable[..., Backbone]
L = 8


def build(backbone: Backbone, **options: Any) -> RMT:
    return RMT(backbone, RMTConfig(**{"segment": L, "memory_tokens": 3, **options}), torch.Generator().manual_seed(1))


def ids_of(tokens: int, rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(2, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["llama", "gpt2", "opt", "opt-350m", "qwen3"])
def backbone(request: pytest.FixtureRequest, make_backbone: Make) -> Backbone:
    if request.param == "opt-350m":
        return make_backbone("opt", word_embed_proj_dim=24, do_layer_norm_before=False)
    return make_backbone(request.param)


@torch.no_grad()
def test_segments_are_linked_by_memory_alone(backbone: Backbone) -> None:
    model, second = build(backbone), Segment.full(ids_of(L, seed=1))
    after = [model.absorb(model.open(2), Segment.full(ids_of(L, seed=s))) for s in (2, 3)]
    a, b = (model.step(state, second)[0].logits() for state in after)
    assert (a - b).abs().max() > 1e-3
    none = build(backbone, memory_tokens=0)
    independent, _ = none.step(none.absorb(none.open(2), Segment.full(ids_of(L))), second)
    alone = backbone.head(backbone.run(backbone.embed(second.ids), second.mask))
    torch.testing.assert_close(independent.logits(), alone)


@torch.no_grad()
def test_rows_and_padding_do_not_matter(backbone: Backbone) -> None:
    model = build(backbone)
    for side in ("left", "right"):
        state = model.open(3)
        alone = [model.open(1) for _ in range(3)]
        for s, lengths in enumerate(([8, 3, 0], [8, 0, 5])):
            ids, mask = ids_of(L, rows=3, seed=s), torch.zeros(3, L, dtype=torch.bool)
            places = [slice(0, n) if side == "right" else slice(L - n, L) for n in lengths]
            for row, place in enumerate(places):
                mask[row, place] = True
            readout, state = model.step(state, Segment(ids, mask))
            for row, place in enumerate(places):
                if lengths[row]:
                    single, alone[row] = model.step(alone[row], Segment.full(ids[row : row + 1, place]))
                    torch.testing.assert_close(readout.logits()[row : row + 1, place], single.logits())
                torch.testing.assert_close(state.memory[row : row + 1], alone[row].memory)


@torch.no_grad()
def test_a_look_leaves_no_trace_and_sees_the_same(backbone: Backbone) -> None:
    model = build(backbone)
    state = model.absorb(model.open(2), Segment.full(ids_of(L)))
    segment = Segment.full(ids_of(L, seed=1))
    looked, after = model.step(state, segment, write=False)
    assert after is state
    torch.testing.assert_close(looked.hidden, model.step(state, segment)[0].hidden)


@torch.no_grad()
def test_legacy_generation_continues_after_the_write_slot(make_backbone: Make) -> None:
    for family in ("llama", "gpt2"):
        backbone = make_backbone(family)
        model = build(backbone, legacy_write_slot=True)
        state, prompt = model.absorb(model.open(2), Segment.full(ids_of(L))), ids_of(5, seed=1)
        new = model.decode(state, Segment.full(prompt), DecodePlan(4, fold=False))
        embeds = torch.cat([state.memory, backbone.embed(prompt), state.memory], 1)
        generate: Any = backbone.model
        wanted = generate.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert torch.equal(new, wanted)
        clean = build(backbone).decode(state, Segment.full(prompt), DecodePlan(4, fold=False))
        assert not torch.equal(new, clean)


def test_normalised_memory_has_unit_size_and_gradients_flow_back(make_backbone: Make) -> None:
    model = build(make_backbone(), normalise_memory=True)
    state = model.open(2)
    for s in range(3):
        state = model.absorb(state, Segment.full(ids_of(L, seed=s)))
    torch.testing.assert_close(state.memory.square().mean(-1), torch.ones(2, 3))
    ids = ids_of(L, seed=3)
    loss = model.step(state, Segment.full(ids))[0].logprobs(ids).sum()
    (grad,) = torch.autograd.grad(loss, [model.initial_memory], retain_graph=True)
    assert grad.abs().max() > 0
    (cut,) = torch.autograd.grad(
        model.step(state.detach(), Segment.full(ids))[0].logprobs(ids).sum(), [model.initial_memory], allow_unused=True
    )
    assert cut is None


@torch.no_grad()
def test_bfloat16_backbone(make_backbone: Make) -> None:
    model = build(make_backbone().to(torch.bfloat16), normalise_memory=True)
    readout, state = model.step(model.absorb(model.open(2), Segment.full(ids_of(L))), Segment.full(ids_of(L)))
    assert readout.logits().isfinite().all()
    assert state.memory.dtype == torch.bfloat16


def test_config_and_fit(make_backbone: Make, make_card: Callable[..., BackboneCard]) -> None:
    with pytest.raises(UserError):
        RMTConfig(memory_tokens=-1)
    backbone = make_backbone("gpt2")
    with pytest.raises(UserError, match="positions"):
        build(backbone, segment=500)
    small = RMT.fit(make_card(backbone, window=1000), Budget("x"))
    assert (small.memory_tokens, small.normalise_memory) == (4, True)
    assert small.segment + 2 * small.memory_tokens == backbone.max_positions
    large = RMT.fit(replace(make_card(backbone), width=576, max_positions=None), Budget("x"))
    assert (large.memory_tokens, large.normalise_memory) == (10, False)
    assert not RMTConfig().legacy_write_slot
    assert RMTConfig.official().legacy_write_slot


def test_segment_alignments() -> None:
    assert segment_lengths(47, 20) == [20, 20, 7]
    assert segment_lengths(40, 20, "right") == [20, 20]
    assert segment_lengths(47, 20, "right") == [7, 20, 20]
    assert segment_lengths(47, 20, "center") == [16, 16, 15]
    with pytest.raises(UserError):
        segment_lengths(47, 20, "middle")


def test_losses_score_the_right_tokens() -> None:
    labels = torch.tensor([[3, 1, 2, 0]])
    logits = torch.full((1, 4, 5), -50.0)
    logits[0, torch.arange(3), labels[0, 1:]] = 50.0  # position t predicts token t + 1
    assert shifted_loss(logits, labels) < 1e-6
    assert tail_loss(logits, labels, 9) < 1e-6
    logits[0, 0] = 0.0
    assert tail_loss(logits, labels, 2) < 1e-6 < tail_loss(logits, labels, 3)
    assert shifted_loss(logits, labels, torch.tensor([[0, 1, 1, 1]])) < 1e-6
    assert shifted_loss(logits, torch.tensor([[3, -100, 2, 0]])) < 1e-6
