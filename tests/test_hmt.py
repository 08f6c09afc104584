"""HMT: equivalences, causality, independence of rows and padding. Parity with the official code is tested elsewhere."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memory_bench.backbone.model import Backbone
from memory_bench.baselines.rmt import RMT, RMTConfig
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.errors import UserError
from memory_bench.hmt.model import HMT, HMTConfig, HMTState, take
from memory_bench.hmt.replay import read_config
from memory_bench.parity.cases import Case, Settings
from memory_bench.protocol import DecodePlan, MemoryModel, Segment

Make = Callable[..., Backbone]
L, K = 8, 3
SMALL = HMTConfig(segment=L, sensory_tokens=K, recall_width=16, cache=3)


def build(backbone: Backbone, **options: Any) -> HMT:
    model = HMT(backbone, replace(SMALL, **options), torch.Generator().manual_seed(1)).eval()
    with torch.no_grad():  # sharper than the initial values, so that a wrong memory shows
        for name, p in model.memory_parameters().items():
            p.mul_(8.0 if name.startswith("recall") else 3.0)
    return model


def ids_of(tokens: int, rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(2, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def stream(model: MemoryModel[Any], ids: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Any]:
    """Logits of a text read segment by segment, and the state after it."""
    state = model.open(len(ids))
    masks = torch.ones_like(ids, dtype=torch.bool) if masks is None else masks
    out = []
    for part, mask in zip(ids.split(L, 1), masks.split(L, 1), strict=True):
        readout, state = model.step(state, Segment(part, mask))
        out.append(readout.logits())
    return torch.cat(out, 1), state


@pytest.fixture(params=["llama", "gpt2", "opt", "opt-350m", "qwen3"])
def backbone(request: pytest.FixtureRequest, make_backbone: Make) -> Backbone:
    if request.param == "opt-350m":
        return make_backbone("opt", word_embed_proj_dim=24, do_layer_norm_before=False)
    return make_backbone(request.param)


def test_recall_from_one_memory_is_the_recurrence(backbone: Backbone) -> None:
    recalled, recurrent = build(backbone, cache=1), build(backbone, recall=False)
    recurrent.initial_memory = recalled.initial_memory
    ids = ids_of(4 * L)
    torch.testing.assert_close(stream(recalled, ids)[0], stream(recurrent, ids)[0])


def test_without_recall_and_sensory_tokens_it_is_rmt(backbone: Backbone) -> None:
    for m in (1, 3):
        hmt = build(backbone, recall=False, sensory_tokens=0, memory_tokens=m)
        rmt = RMT(backbone, RMTConfig(segment=L, memory_tokens=m), torch.Generator())
        rmt.initial_memory = hmt.initial_memory
        torch.testing.assert_close(stream(hmt, ids_of(3 * L))[0], stream(rmt, ids_of(3 * L))[0])


def test_cache_length_matters_only_when_it_binds(make_backbone: Make) -> None:
    ids = ids_of(5 * L)
    long, fits, short = (build(make_backbone(), cache=n) for n in (100, 4, 2))
    assert torch.equal(stream(long, ids)[0], stream(fits, ids)[0])
    difference = (stream(short, ids)[0] - stream(long, ids)[0]).abs().amax(dim=(0, 2))
    assert difference[: 3 * L].max() < 1e-5 < difference[3 * L :].max()


def test_without_sensory_tokens_the_past_comes_through_memory_alone(make_backbone: Make) -> None:
    model = build(make_backbone(), sensory_tokens=0)
    state = stream(model, ids_of(2 * L))[1]
    other = stream(model, ids_of(2 * L, seed=1))[1]
    swapped = replace(other, memory=state.memory, cache=state.cache, tail=state.tail)
    segment = Segment.full(ids_of(L, seed=2))
    assert torch.equal(model.step(state, segment)[0].hidden, model.step(swapped, segment)[0].hidden)


def look_ahead(model: HMT, tokens: int = L) -> int:
    """The farthest that a changed token of the third segment reaches back."""
    ids = ids_of(3 * L)
    before, farthest = stream(model, ids)[0], 0
    for t in range(tokens):
        changed = ids.clone()
        changed[:, 2 * L + t] = (ids[:, 2 * L + t] + 7) % 60 + 2
        moved = (stream(model, changed)[0] - before).abs().amax(dim=(0, 2)) > 1e-5
        farthest = max(farthest, 2 * L + t - int(moved.long().argmax()))
    return farthest


def test_previous_half_is_causal_and_current_half_looks_ahead(make_backbone: Make) -> None:
    for query, fraction in (("previous-half", 0.5), ("current-half", 0.5), ("current-half", 0.75)):
        model = build(make_backbone(), recall_query=query, summary_fraction=fraction)
        expected = 0 if query == "previous-half" else model.config.summary_tokens - 1
        assert model.traits.look_ahead == expected
        assert look_ahead(model) == expected
    assert build(make_backbone(), recall=False, recall_query="current-half").traits.look_ahead == 0


def test_query_is_the_end_of_the_previous_segment_or_of_what_is_given(make_backbone: Make) -> None:
    model = build(make_backbone())
    past, now = ids_of(L), ids_of(6, seed=3)
    state = stream(model, past)[1]
    assert torch.equal(model.query_tokens(state, Segment.full(now))[0], past[:, L // 2 :])
    given = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    ids, mask = model.query_tokens(state, Segment.full(now, given))
    assert torch.equal(ids, torch.stack([now[0, 1:5], past[1, L // 2 :]]))
    assert mask.all()
    official = build(make_backbone(), recall_query="current-half", generation_summary="half", summary_fraction=0.75)
    assert torch.equal(official.query_tokens(state, Segment.full(now))[0], now)
    assert torch.equal(official.query_tokens(state, Segment.full(now, given | True))[0], now[:, :4])


@pytest.mark.parametrize("query", ["previous-half", "current-half"])
def test_rows_and_padding_do_not_matter(backbone: Backbone, query: str) -> None:
    model = build(backbone, recall_query=query)
    lengths = [[8, 8, 5], [8, 3, 0], [2, 8, 8], [0, 8, 6]]
    texts = [ids_of(sum(row), rows=1, seed=i) for i, row in enumerate(lengths)]
    for side in ("left", "right"):
        state = model.open(len(texts))
        alone = [model.open(1) for _ in texts]
        for s in range(3):
            ids, mask = torch.ones(len(texts), L, dtype=torch.long), torch.zeros(len(texts), L, dtype=torch.bool)
            places: list[slice] = []
            for row, text in enumerate(texts):
                start, n = sum(lengths[row][:s]), lengths[row][s]
                places.append(slice(0, n) if side == "right" else slice(L - n, L))
                ids[row, places[row]], mask[row, places[row]] = text[0, start : start + n], True
            with torch.no_grad():
                readout, state = model.step(state, Segment(ids, mask))
            for row, place in enumerate(places):
                if lengths[row][s]:
                    with torch.no_grad():
                        single, alone[row] = model.step(alone[row], Segment.full(ids[row : row + 1, place]))
                    torch.testing.assert_close(readout.logits()[row : row + 1, place], single.logits())
                assert_same_memory(state.rows(torch.tensor([row])), alone[row])


def assert_same_memory(got: HMTState, wanted: HMTState) -> None:
    torch.testing.assert_close(got.memory, wanted.memory)
    torch.testing.assert_close(got.cache.entries[got.cache.filled], wanted.cache.entries[wanted.cache.filled])
    assert torch.equal(got.tail[got.tail_mask], wanted.tail[wanted.tail_mask])


def test_a_look_leaves_no_trace_and_sees_the_same(backbone: Backbone) -> None:
    model = build(backbone)
    state = stream(model, ids_of(2 * L))[1]
    before = [(name, t.clone()) for name, t in state.tensors()]
    segment = Segment.full(ids_of(L, seed=4))
    looked, after = model.step(state, segment, write=False)
    assert after is state
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(before, after.tensors(), strict=True))
    torch.testing.assert_close(looked.hidden, model.step(state, segment)[0].hidden)


def test_bfloat16_backbone_and_bfloat16_recall(make_backbone: Make) -> None:
    half = make_backbone().to(torch.bfloat16)
    logits, state = stream(build(half), ids_of(3 * L))
    assert logits.dtype == state.memory.dtype == state.cache.keys.dtype == torch.bfloat16
    assert logits.isfinite().all()
    exact, rounded = (build(make_backbone(), recall_dtype=name) for name in ("float32", "bfloat16"))
    ids = ids_of(4 * L)
    (a, _), (b, state) = stream(exact, ids), stream(rounded, ids)
    assert state.cache.entries.dtype == torch.bfloat16
    assert b.dtype == torch.float32
    assert 0 < (a - b).abs().max() < 0.5


def test_gradients_reach_everything_through_the_cache_unless_detached(make_backbone: Make) -> None:
    model = build(make_backbone())
    ids = ids_of(4 * L)
    for detached in (False, True):
        state = model.open(2)
        for part in ids[:, : 3 * L].split(L, 1):
            state = model.absorb(state, Segment.full(part))
        state = state.detach() if detached else state
        loss = model.step(state, Segment.full(ids[:, 3 * L :]))[0].logprobs(ids[:, 3 * L :]).sum()
        grads = torch.autograd.grad(loss, list(model.memory_parameters().values()), allow_unused=True)
        reached = {n for n, g in zip(model.memory_parameters(), grads, strict=True) if g is not None and g.any()}
        everything = {"initial_memory", "summary_prompt", "recall_query.weight", "recall_key.weight"}
        assert reached == ({"summary_prompt", "recall_query.weight"} if detached else everything)


def test_generation_is_what_reading_would_predict(make_backbone: Make) -> None:
    model = build(make_backbone())
    past, prompt = ids_of(2 * L), ids_of(5, seed=5)
    state = stream(model, past)[1]
    new = model.decode(state, Segment.full(prompt), DecodePlan(7))
    whole = torch.cat([prompt, new], 1)
    given = torch.arange(whole.shape[1]).lt(5).expand(whole.shape)
    with torch.no_grad():
        first, state = model.step(state, Segment.full(whole[:, :L], given[:, :L]))
        second, _ = model.step(state, Segment.full(whole[:, L:]), write=False)
    predicted = torch.cat([first.logits(), second.logits()], 1).argmax(-1)
    assert torch.equal(predicted[:, 4:-1], new)


def test_state_is_bounded_and_constructor_draws_only_from_its_generator(make_backbone: Make) -> None:
    backbone = make_backbone()
    global_state = torch.get_rng_state()
    a, b = build(backbone), build(backbone)
    assert torch.equal(torch.get_rng_state(), global_state)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert stream(a, ids_of(4 * L))[1].size() == stream(a, ids_of(7 * L))[1].size()


def test_config_is_checked(make_backbone: Make) -> None:
    refused: Sequence[dict[str, Any]] = (
        {"memory_tokens": 2},
        {"cache": 0},
        {"summary_fraction": 1.5},
        {"recall_query": "next-half"},
    )
    for options in refused:
        with pytest.raises(UserError):
            replace(SMALL, **options)
    with pytest.raises(UserError, match="positions"):
        HMT(make_backbone("gpt2"), replace(SMALL, segment=500), torch.Generator())
    official = HMTConfig.official()
    assert (official.recall_query, official.recall_dtype, official.cache) == ("current-half", "bfloat16", 100)


def test_fit_follows_backbone_and_budget(make_backbone: Make, make_card: Callable[..., BackboneCard]) -> None:
    backbone = make_backbone("gpt2")
    small = HMT.fit(make_card(backbone, window=1000), Budget("x"))
    assert small.recall_width == backbone.width
    assert small.segment + small.sensory_tokens + 2 == backbone.max_positions
    large = replace(make_card(backbone), width=576, mlp_width=1536, max_positions=None, window=512)
    assert HMT.fit(large, Budget("x")).recall_width == 1536
    limited = HMT.fit(large, Budget("x", added_parameters=500_000))
    assert 2 * 576 * limited.recall_width + 2 * 576 <= 500_000


def test_flops_grow_with_what_is_recalled(make_backbone: Make) -> None:
    model, plain = build(make_backbone()), build(make_backbone(), recall=False)
    assert plain.flops(L, 0) < plain.flops(L, L) == plain.flops(L, 9 * L)
    assert model.flops(L, L) > plain.flops(L, L) + model.backbone.flops(L // 2, L // 2, predicted=0)
    assert model.flops(L, L) < model.flops(L, 3 * L) == model.flops(L, 9 * L)


def test_take_is_in_order_and_right_aligned() -> None:
    eligible = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    counts = torch.tensor([[2], [2]])
    index, there = take(eligible, counts, 3, last=True)
    assert there.tolist() == [[False, True, True], [False, False, True]]
    assert index[there].tolist() == [2, 3, 4]
    index, there = take(eligible, counts, 3, last=False)
    assert index[there].tolist() == [0, 2, 4]


def test_replay_refuses_unknown_settings() -> None:
    known = {"segment_length": 8, "memory_tokens": 1, "sensory_tokens": 2, "recall": True}
    case = Case(Path("made-up"))
    settings = Settings({**known, "recall_scale": "1/recall_hidden_size", "surprise": 1}, case.name)
    assert read_config(case, settings).recall_scale == "1/h"
    with pytest.raises(UserError, match="surprise"):
        settings.finish()
    with pytest.raises(UserError, match="recall_scale"):
        read_config(case, Settings({**known, "recall_scale": "1"}, case.name))
