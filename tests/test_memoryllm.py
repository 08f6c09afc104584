"""MemoryLLM: what a write keeps and drops, the first fill, and where gradients go."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from memory_bench.backbone.lora import Adapter
from memory_bench.backbone.model import Backbone
from memory_bench.baselines.memoryllm import MemoryLLM, MemoryLLMConfig
from memory_bench.baselines.parts.pool import Written
from memory_bench.baselines.parts.pool_state import draw_permutations, fill_pool, merge_pool
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.errors import UserError
from memory_bench.protocol import DecodePlan, MemoryModel, Segment

Make = Callable[..., Backbone]
CONFIG = MemoryLLMConfig(segment=8, tokens_per_block=4, blocks=4, pool_initialized=True)


def build(backbone: Backbone, **options: Any) -> MemoryLLM:
    model = MemoryLLM(backbone, replace(CONFIG, **options), torch.Generator().manual_seed(1))
    with torch.no_grad():  # the offset starts at zero, where forgetting it would not show
        model.new_memory_positional_embedding.normal_(std=0.5, generator=torch.Generator().manual_seed(2))
    return model.eval()


def text(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def test_merge_keeps_the_order_and_appends() -> None:
    pool = torch.arange(6.0).view(1, 1, 6, 1).repeat(2, 2, 1, 1)
    permutations = torch.tensor([[[5, 0, 3, 1, 2, 4]], [[0, 1, 2, 3, 4, 5]]])  # one draw a row, shared by the layers
    merged = merge_pool(pool, torch.full((2, 2, 2, 1), 9.0), permutations)
    assert merged[0, :, :, 0].tolist() == [[0, 1, 3, 5, 9, 9]] * 2
    assert merged[1, :, :, 0].tolist() == [[0, 1, 2, 3, 9, 9]] * 2


def test_a_block_of_the_pools_size_replaces_it() -> None:
    pool, block = torch.zeros(1, 1, 2, 1), torch.ones(1, 1, 3, 1)
    assert merge_pool(pool, block, torch.tensor([[[1, 0]]]))[0, 0, :, 0].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("new", "filled"), [(3, [0, 1, 2, 0, 1, 2, 1, 2]), (4, [0, 1, 2, 3] * 2), (9, list(range(1, 9)))]
)
def test_first_fill_repeats_the_block_and_ends_with_its_last_rows(new: int, filled: list[int]) -> None:
    block = torch.arange(float(new)).view(1, 1, new, 1)
    assert fill_pool(block, 8)[0, 0, :, 0].tolist() == filled


def test_rows_of_a_block_survive_as_often_as_drawn_at_random(make_backbone: Make) -> None:
    model, rows, later = build(make_backbone("llama")), 400, 6
    state = model.open(rows, seeds=range(rows))
    for mark in [1.0] + [0.0] * later:
        block = torch.full((rows, 2, 4, 32), mark)
        state = model.store(state, Written(block, block[:, 0], ()))
    left = (state.pool[..., 0] == 1).sum(dim=2).double()  # [rows, layers] rows of the first block
    assert left.mean().item() == pytest.approx(4 * (1 - 4 / 16) ** later, abs=0.12)
    assert torch.corrcoef(left.T)[0, 1].abs() < 0.2  # layers draw independently
    assert left.std() > 0.3


def test_draws_depend_on_seed_writes_and_layer_only(make_backbone: Make) -> None:
    model = build(make_backbone("llama"))
    state = model.open(3, seeds=[7, 8, 7])
    first = draw_permutations(state, 2)
    assert first.sort(dim=-1).values.eq(torch.arange(16)).all()
    assert first[0].equal(first[2])
    assert not first[0].equal(first[1])
    assert not first[0, 0].equal(first[0, 1])
    assert draw_permutations(model.open(1, seeds=[8]), 2)[0].equal(first[1])
    later = draw_permutations(replace(state, host_writes=state.host_writes + 1), 2)
    assert not later[0].equal(first[0])


@torch.no_grad()
def test_shared_drops_are_the_same_in_every_layer(make_backbone: Make) -> None:
    for shared in (False, True):
        model = build(make_backbone("llama"), drop_per_layer=not shared)
        before = model.open(1)
        after = model.absorb(before, Segment.full(text(1, 8)))
        kept = [(after.pool[0, layer, :12, None] == before.pool[0, layer]).all(-1).nonzero()[:, 1] for layer in (0, 1)]
        assert kept[0].equal(kept[1]) == shared


@torch.no_grad()
def test_writing_changes_later_predictions_and_only_through_the_pool(make_backbone: Make) -> None:
    model = build(make_backbone("llama"))
    start, question = model.open(1), Segment.full(text(1, 8, seed=5))
    a, b = (model.absorb(start, Segment.full(text(1, 8, seed=s))) for s in (1, 2))
    read = [model.step(s, question, write=False)[0].logits() for s in (start, a, b)]
    assert not torch.allclose(read[1], read[2], atol=1e-2)
    assert not torch.allclose(read[0], read[1], atol=1e-2)
    moved = replace(b, pool=a.pool)
    assert model.step(moved, question, write=False)[0].logits().equal(read[1])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_without_memory_it_is_the_plain_backbone(make_backbone: Make, kind: str) -> None:
    backbone = make_backbone(kind)
    model = build(backbone, pool_initialized=False)
    segment = Segment.full(text(2, 8))
    readout, state = model.step(model.open(2), segment)
    plain = backbone.run(backbone.embed(segment.ids), segment.mask)
    assert torch.allclose(readout.hidden, plain, atol=1e-5)
    block = state.pool[:, :, -4:]
    assert state.pool.equal(block.repeat(1, 1, 4, 1))
    assert state.host_filled.all()


@torch.no_grad()
def test_the_official_first_fill_leaks_the_next_layers_offset(make_backbone: Make) -> None:
    clean, leaky = (build(make_backbone("llama"), pool_initialized=False, leak_first_offset=o) for o in (False, True))
    pools = [m.absorb(m.open(1), Segment.full(text(1, 8))).pool for m in (clean, leaky)]
    assert torch.allclose(pools[1][:, 0], pools[0][:, 0] + clean.new_memory_positional_embedding)
    assert pools[1][:, 1].equal(pools[0][:, 1])


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 2, 4, 5])
def test_texts_shorter_than_a_block_carry_old_rows_over(make_backbone: Make, tokens: int) -> None:
    model = build(make_backbone("qwen3"))
    state = model.open(2)
    written = model.write_pass(state, text(2, tokens))
    assert written.block.shape == (2, 2, 4, 32)
    assert written.hidden.shape == (2, tokens, 32)
    other = replace(state, pool=torch.cat([state.pool[:, :, :-4], state.pool[:, :, -4:] + 1], dim=2))
    change = (model.write_pass(other, text(2, tokens)).block - written.block).abs().amax(dim=(0, 1, 3))
    assert (change > 1e-3).all()
    older = replace(state, pool=torch.cat([state.pool[:, :, :-4] + 1, state.pool[:, :, -4:]], dim=2))
    assert model.write_pass(older, text(2, tokens)).block.equal(written.block)  # only the newest block is read


def test_gradients_reach_adapters_offset_and_backbone_but_not_the_pool(make_backbone: Make) -> None:
    model = build(make_backbone("llama"), lora_rank=2, add_read_lora=True).train()
    with torch.no_grad():
        for name, parameter in model.lora.named_parameters():
            parameter.fill_(0.1) if name.endswith("B") else None
    state = model.open(2, seeds=[1, 2])
    for start in (0, 8):
        readout, state = model.step(state, Segment.full(text(2, 24)[:, start : start + 8]))
    assert state.pool.grad_fn is not None
    readout, _ = model.step(state, Segment.full(text(2, 24)[:, 16:]), write=False)
    readout.hidden.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None or "lm_head" in name, name
    assert model.lora["write"].layers[0]["self_attn"]["q_proj"].A.grad.abs().sum() > 0
    assert model.new_memory_positional_embedding.grad.abs().sum() > 0
    assert not model.pool.requires_grad
    assert "pool" in model.state_dict()
    assert "pool" not in model.memory_parameters()


def test_a_learned_start_trains(make_backbone: Make) -> None:
    model = build(make_backbone("llama"), learned_start=True, pool_initialized=False).train()
    readout, _ = model.step(model.open(2), Segment.full(text(2, 8)))
    readout.hidden.sum().backward()
    assert "pool" in model.memory_parameters()
    assert model.pool.grad is not None
    assert model.pool.grad.abs().sum() > 0


@torch.no_grad()
def test_an_adapter_adds_its_scaled_product(make_backbone: Make) -> None:
    adapter = Adapter(make_backbone("llama"), 2, 6.0, ("up_proj",), torch.Generator().manual_seed(0))
    pair, x = adapter.layers[1]["mlp"]["up_proj"], torch.ones(1, 32)
    module = torch.nn.Linear(32, 48, bias=False, device="meta").to_empty(device="cpu")
    module.weight.fill_(0.5)
    pair.B.fill_(0.25)
    assert torch.allclose(adapter.linear(1)("mlp.up_proj", module, x), module(x) + 3 * x @ (pair.B @ pair.A).T)
    assert adapter.linear(1)("self_attn.q_proj", module, x).equal(module(x))


@torch.no_grad()
def test_adapters_change_only_what_they_are_for(make_backbone: Make) -> None:
    model = build(make_backbone("llama"), lora_rank=2, add_read_lora=True)
    segment = Segment.full(text(1, 8))
    first, wrote = model.step(model.open(1), segment)
    model.lora["read"].layers[1]["mlp"]["up_proj"].B.fill_(0.5)
    second, wrote_again = model.step(model.open(1), segment)
    assert not torch.allclose(first.hidden, second.hidden, atol=1e-3)
    assert wrote.pool.equal(wrote_again.pool)
    model.lora["write"].layers[1]["mlp"]["up_proj"].B.fill_(0.5)
    third, wrote_otherwise = model.step(model.open(1), segment)
    assert third.hidden.equal(second.hidden)
    assert not torch.allclose(wrote.pool, wrote_otherwise.pool, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("fold", [True, False])
def test_cached_decoding_is_uncached_decoding(make_backbone: Make, fold: bool) -> None:
    model = build(make_backbone("qwen3"))
    state = model.absorb(model.open(2, seeds=[1, 2]), Segment.full(text(2, 8)))
    prompt, plan = Segment.full(text(2, 5, seed=3)), DecodePlan(new_tokens=12, fold=fold)
    assert model.decode(state, prompt, plan).equal(MemoryModel.decode(model, state, prompt, plan))


@torch.no_grad()
def test_streams_out_of_step_can_share_a_batch(make_backbone: Make) -> None:
    model = build(make_backbone("qwen3"), pool_initialized=False)
    ids, mask = text(3, 24), torch.ones(3, 24, dtype=torch.bool)
    mask[0, :8] = mask[1, 8:16] = mask[2, 10:16] = False
    together, states = model.open(3, seeds=[1, 2, 3]), [model.open(1, seeds=[s]) for s in (1, 2, 3)]
    for start in (0, 8, 16):
        piece = Segment(ids[:, start : start + 8], mask[:, start : start + 8])
        readout, together = model.step(together, piece)
        for row in range(3):
            real = piece.mask[row]
            alone, states[row] = model.step(states[row], Segment.full(piece.ids[row : row + 1, real]))
            assert torch.allclose(readout.hidden[row, real], alone.hidden[0], atol=1e-4)
            assert torch.allclose(together.pool[row], states[row].pool[0], atol=1e-4)
    assert together.host_writes.tolist() == [2, 2, 3]
    out = model.decode(together, Segment.full(ids[:, :3]), DecodePlan(4))
    single = model.decode(states[0], Segment.full(ids[:1, :3]), DecodePlan(4))
    assert out[:1].equal(single)


def test_fit_and_official_sizes(make_backbone: Make, make_card: Callable[..., BackboneCard]) -> None:
    small = MemoryLLM.fit(make_card(make_backbone("llama"), window=32), Budget("b"))
    assert (small.segment, small.tokens_per_block, small.pool_tokens, small.lora_rank) == (32, 4, 32, 0)
    card = replace(make_card(make_backbone("llama"), window=512, pretrained=True), width=576)
    large = MemoryLLM.fit(card, Budget("b"))
    assert (large.tokens_per_block, large.blocks, large.lora_rank) == (16, 20, 8)
    assert MemoryLLM.fit(card, Budget("b", added_parameters=50_000)).lora_rank < 8
    assert MemoryLLMConfig.official().pool_tokens == 12800


def test_wrong_options_are_sentences(make_backbone: Make) -> None:
    with pytest.raises(UserError, match="Llama-family"):
        build(make_backbone("gpt2"))
    with pytest.raises(UserError, match="blocks = 0"):
        replace(CONFIG, blocks=0)
    with pytest.raises(UserError, match="Did you mean q_proj"):
        build(make_backbone("llama"), lora_rank=2, lora_targets=("q_prj",))
