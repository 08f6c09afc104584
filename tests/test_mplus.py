"""M+: the long-term store, retrieval and its training. What holds for any model is in the conformance suite."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from memory_bench.backbone.model import Backbone
from memory_bench.baselines.mplus import MPlus, MPlusConfig, MPlusState
from memory_bench.baselines.parts.long_term import Store, oldest_first, pick, relevance
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.errors import UserError
from memory_bench.protocol import DecodePlan, MemoryModel, Segment
from memory_bench.testing import measure_look_ahead
from memory_bench.testing.measures import measured_flops

Make = Callable[..., Backbone]
CONFIG = MPlusConfig(
    segment=8,
    tokens_per_block=4,
    blocks=3,
    retrieved_tokens=6,
    retriever_width=8,
    merge_every=2,
    initial_recall_frequency=3.0,
    pool_initialized=True,
)


def build(backbone: Backbone, **options: Any) -> MPlus:
    return MPlus(backbone, replace(CONFIG, **options), torch.Generator().manual_seed(1)).eval()


def text(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def after(model: MPlus, writes: int, rows: int = 1, seeds: Any = None) -> MPlusState:
    state = model.open(rows, seeds=seeds)
    for number in range(writes):
        state = model.absorb(state, Segment.full(text(rows, 8, seed=number)))
    return state


def entries(state: MPlusState) -> tuple[list[int], list[int]]:
    return [a.shape[1] for a in state.host_long_term.ages], [a.shape[1] for a in state.host_pending.ages]


def store(tokens: Tensor, keys: Tensor, ages: list[int], frequencies: list[float], layers: int = 2) -> Store:
    part = (tokens, keys, torch.tensor([ages]), torch.tensor([frequencies], dtype=torch.float64))
    return Store.of([part] * layers, 1)


def test_dropped_rows_wait_are_merged_decay_and_die(make_backbone: Make) -> None:
    model = build(make_backbone("llama"))
    sizes = [entries(after(model, n)) for n in range(8)]
    assert [pending[0] for _, pending in sizes] == [0, 4, 0, 4, 0, 4, 0, 4]
    assert [merged[0] for merged, _ in sizes] == [0, 0, 8, 8, 16, 16, 16, 16]  # the third cohort pushes out the first
    state = after(model, 4)
    assert state.host_long_term.frequencies[0][0].tolist() == [1.0] * 8 + [2.0] * 8


def test_nothing_dies_while_no_more_than_the_retrieved_would_survive(make_backbone: Make) -> None:
    model = build(make_backbone("llama"), retrieved_tokens=16)
    state = after(model, 4)
    assert entries(state)[0] == [16, 16]
    assert state.host_long_term.frequencies[0].unique().tolist() == [3.0]  # the decay was taken back
    assert entries(after(model, 6))[0] == [24, 24]


@torch.no_grad()
def test_every_row_is_in_the_pool_or_in_the_store(make_backbone: Make) -> None:
    model = build(make_backbone("llama"))
    state = model.open(2, seeds=[1, 2])
    written = [state.pool]
    for number in range(3):
        written.append(model.write_pass(state, text(2, 8, seed=number)).block)
        state = model.absorb(state, Segment.full(text(2, 8, seed=number)))
    for layer in range(2):
        kept = (state.pool[:, layer], state.host_long_term.tokens[layer], state.host_pending.tokens[layer])
        held = torch.cat(kept, dim=1).sum(-1).sort(dim=1).values
        assert held.equal(torch.cat(written, dim=2)[:, layer].sum(-1).sort(dim=1).values)
    keys = model.retriever.at(1).key(model.backbone.norm_input(1, state.host_long_term.tokens[1]))
    assert torch.allclose(keys, state.host_long_term.keys[1], atol=1e-6)


def test_rows_age_in_the_pool_where_asked(make_backbone: Make) -> None:
    growing, frozen = (after(build(make_backbone("llama"), grow_pool_ages=grow), 3) for grow in (True, False))
    assert growing.host_pool_ages[0, 0, -4:].tolist() == [3, 2, 1, 0]
    assert growing.host_pool_ages[0, :, :-4].min() >= 4
    assert frozen.host_pool_ages.max() == 3
    dropped_now = after(build(make_backbone("llama"), grow_pool_ages=False), 1).host_pending.ages[0]
    assert dropped_now.max() == 0  # the write that drops a row does not age it
    before = after(build(make_backbone("llama"), grow_pool_ages=True), 2).host_long_term.ages[0]
    assert growing.host_long_term.ages[0].equal(before + 4)


def test_order_is_by_age_and_of_equal_ages_the_later_first() -> None:
    assert oldest_first(torch.tensor([[1, 5, 1, 7, 5]])).tolist() == [[3, 4, 1, 2, 0]]


def test_pick_reads_two_stores_as_one() -> None:
    a, b = torch.arange(6.0).view(2, 3, 1), 10 + torch.arange(4.0).view(2, 2, 1)
    index = torch.tensor([[4, 0, 3], [2, 2, 4]])
    assert pick([a, b], index).equal(torch.cat([a, b], dim=1).gather(1, index[..., None]))
    assert pick([a[:, :0], b], index[:, :1] - index[:, :1]).equal(b[:, :1])


def test_relevance_is_the_mean_of_sigmoids_over_asking_tokens() -> None:
    q, k = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0)), torch.eye(4)[None]
    expected = torch.sigmoid(q[:, [0, 2]] @ k.transpose(1, 2)).mean(dim=1)
    assert torch.allclose(relevance(q, torch.tensor([[1.0, 0.0, 1.0]]), k), expected)


def planted(model: MPlus, state: MPlusState, queries: Tensor, count: int = 20) -> MPlusState:
    """A store whose entries 3 and 11 fit `queries` ``[tokens, S]`` of layer 0; tokens are the entries' numbers."""
    keys = -queries.mean(dim=0).expand(1, count, -1).clone()
    keys[0, [3, 11]] *= -1
    tokens = torch.arange(float(count)).view(1, count, 1).expand(-1, -1, 32)
    long_term = store(tokens, 10 * keys, list(range(count)), [1.0] * count)
    return replace(state, host_long_term=long_term, host_pending=model.open(1).host_pending)


@torch.no_grad()
def test_given_tokens_ask_for_memories_and_else_the_previous_segment(make_backbone: Make) -> None:
    model = build(make_backbone("llama"), retrieved_tokens=2)
    state = after(model, 1)
    ids, given = text(1, 8, seed=9), torch.arange(8)[None] < 3
    embeds = model.backbone.norm_input(0, model.backbone.embed(ids))
    by_given = planted(model, state, model.retriever.at(0).query(embeds)[0, :3])
    found = model.read(by_given, ids, given).recalled[0][0, :, 0]
    assert found.tolist() == [11, 3]  # oldest first
    by_previous = planted(model, state, state.query[0, 0])
    assert model.read(by_previous, ids).recalled[0][0, :, 0].tolist() == [11, 3]
    fresh = replace(by_previous, query=state.query[:, :, :0])
    assert model.read(fresh, ids).recalled[0][0, :, 0].tolist() == [1, 0]  # no query: the most recent
    everything = build(make_backbone("llama"), retrieved_tokens=2, retrieval_query="all")
    by_all = planted(everything, state, everything.retriever.at(0).query(embeds)[0])
    assert everything.read(by_all, ids).recalled[0][0, :, 0].tolist() == [11, 3]


@torch.no_grad()
def test_short_stores_are_given_whole_or_repeated(make_backbone: Make) -> None:
    clean, official = (build(make_backbone("llama"), repeat_short_store=o) for o in (False, True))
    ids, tokens = text(1, 8), torch.arange(4.0).view(1, 4, 1).expand(-1, -1, 32)
    keys = torch.zeros(1, 4, 8)
    state = replace(
        clean.open(1),
        host_long_term=store(tokens, keys, [5, 9, 1, 1], [1.0] * 4),
        host_pending=store(tokens[:, :1] + 7, keys[:, :1], [0], [3.0]),
    )
    assert clean.read(state, ids).recalled[0][0, :, 0].tolist() == [1, 0, 3, 2, 7]
    # 0 1 2 3 repeated, the last six: 2 3 0 1 2 3
    assert official.read(state, ids).recalled[0][0, :, 0].tolist() == [1, 0, 3, 2, 3, 2]
    assert clean.read(clean.open(1), ids).recalled[0].shape == (1, 0, 32)
    assert official.read(clean.open(1), ids).recalled[0].shape == (1, 0, 32)


@torch.no_grad()
def test_what_is_retrieved_reaches_the_predictions(make_backbone: Make) -> None:
    model = build(make_backbone("llama"))
    state, segment = after(model, 5), Segment.full(text(1, 8, seed=9))
    logits = model.step(state, segment, write=False)[0].logits()
    zeroed = replace(
        state, host_long_term=replace(state.host_long_term, tokens=tuple(0 * t for t in state.host_long_term.tokens))
    )
    assert not torch.allclose(model.step(zeroed, segment, write=False)[0].logits(), logits, atol=1e-2)


@pytest.mark.parametrize("query", ["given", "all"])
def test_look_ahead_is_none_by_default_and_a_segment_as_in_the_official_code(make_backbone: Make, query: str) -> None:
    model = build(make_backbone("llama"), retrieval_query=query, merge_every=1, retrieved_tokens=2)
    stocked = after(model, 8)  # the two segments that the measurement reads first would not fill a store

    def open_stocked(rows: int, seeds: Any = None) -> MPlusState:
        return stocked.rows(torch.zeros(rows, dtype=torch.int64))

    model.open = open_stocked
    assert measure_look_ahead(model) == model.traits.look_ahead == {"given": 0, "all": 7}[query]


@torch.no_grad()
@pytest.mark.parametrize("writes", [1, 5])
def test_rows_search_their_own_stores_even_out_of_step(make_backbone: Make, writes: int) -> None:
    model = build(make_backbone("qwen3"))
    seeds = [1, 2, 3]
    together, states = after(model, writes, 3, seeds), []
    for row, seed in enumerate(seeds):
        state = model.open(1, seeds=[seed])
        for number in range(writes):
            state = model.absorb(state, Segment.full(text(3, 8, seed=number)[row : row + 1]))
        states.append(state)
    ids, mask = text(3, 32, seed=99), torch.ones(3, 32, dtype=torch.bool)
    mask[1, :8] = mask[2, 5:8] = mask[0, 16:24] = mask[1, 17:24] = False
    given = torch.zeros_like(mask)
    given[2, 24:27] = True
    for start in range(0, 32, 8):
        span = slice(start, start + 8)
        readout, together = model.step(together, Segment(ids[:, span], mask[:, span], given[:, span]))
        for row in range(3):
            real = mask[row, span]
            own = Segment.full(ids[row : row + 1, span][:, real], given[row : row + 1, span][:, real])
            alone, states[row] = model.step(states[row], own)
            assert torch.allclose(readout.hidden[row, real], alone.hidden[0], atol=1e-3)
    merged = together.host_long_term.counts
    assert merged.tolist() == [s.host_long_term.counts[0].tolist() for s in states]
    assert len(merged.unique()) > 1 or len(together.host_pending.counts.unique()) > 1
    for row, state in enumerate(states):
        n = int(merged[row, 0])
        assert torch.allclose(together.host_long_term.tokens[0][row, :n], state.host_long_term.tokens[0][0], atol=1e-3)
    out = model.decode(together, Segment.full(ids[:, :3]), DecodePlan(4))
    assert out.equal(
        torch.cat([model.decode(s, Segment.full(ids[r : r + 1, :3]), DecodePlan(4)) for r, s in enumerate(states)])
    )


@torch.no_grad()
def test_absorbing_and_peeking_agree_with_stepping_once_the_store_is_searched(make_backbone: Make) -> None:
    model = build(make_backbone("llama"))
    state, segment = after(model, 5, 2, [1, 2]), Segment.full(text(2, 8, seed=50))
    readout, stepped = model.step(state, segment)
    peeked, same = model.step(state, segment, write=False)
    assert same is state
    assert peeked.hidden.equal(readout.hidden)
    for (name, a), (_, b) in zip(stepped.tensors(), model.absorb(state, segment).tensors(), strict=True):
        assert a.equal(b), name


@torch.no_grad()
@pytest.mark.parametrize("fold", [True, False])
def test_cached_decoding_is_uncached_decoding(make_backbone: Make, fold: bool) -> None:
    model = build(make_backbone("qwen3"))
    state, prompt = after(model, 5, 2, [1, 2]), Segment.full(text(2, 5, seed=3))
    plan = DecodePlan(new_tokens=12, fold=fold)
    assert model.decode(state, prompt, plan).equal(MemoryModel.decode(model, state, prompt, plan))


def test_the_retriever_learns_from_its_own_loss_alone(make_backbone: Make) -> None:
    model = build(make_backbone("llama"), pool_initialized=False).train()
    ids = text(3, 24)
    readout, state = model.step(model.open(3, seeds=[1, 2, 3]), Segment.full(ids[:, :8]))
    assert readout.aux_loss is None  # nothing has been written
    readout, state = model.step(state, Segment.full(ids[:, 8:16]))
    loss = readout.aux_loss
    assert loss is not None
    assert loss.shape == ()
    loss.backward(retain_graph=True)
    for name, parameter in model.named_parameters():
        learns = name.startswith("retriever.")
        assert (parameter.grad is not None and bool(parameter.grad.any())) == learns, name
    readout.hidden.sum().backward()
    assert model.bos_embedding.grad is not None
    model.eval()
    assert model.step(state, Segment.full(ids[:, 16:]))[0].aux_loss is None


def test_training_the_retriever_tells_own_memories_from_foreign_ones(make_backbone: Make) -> None:
    model = build(make_backbone("llama"), pool_initialized=False).train()
    optimizer = torch.optim.Adam(model.retriever.parameters(), lr=1e-2)
    losses = []
    ids = torch.stack(
        [torch.randint(16 * r, 16 * r + 16, (16,), generator=torch.Generator().manual_seed(r)) for r in range(4)]
    )
    for _ in range(40):
        _, state = model.step(model.open(4), Segment.full(ids[:, :8]))
        loss = model.step(state, Segment.full(ids[:, 8:]), write=False)[0].aux_loss
        assert loss is not None
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"retrieval_query": "all", "repeat_short_store": True}, {"lora_rank": 2}])
def test_operations_are_counted_while_the_store_fills(make_backbone: Make, options: dict[str, Any]) -> None:
    model = build(make_backbone("llama"), pool_initialized=False, **options)
    state = model.open(1)
    for number in range(9):
        segment = Segment.full(text(1, 8, seed=number))
        counted = measured_flops(lambda now=state, piece=segment: model.step(now, piece)[0].logits())  # type: ignore[misc]
        assert model.flops(8, 8 * number) == pytest.approx(counted, rel=0.005)
        state = model.absorb(state, segment)


def test_the_store_is_counted_on_the_host(make_backbone: Make) -> None:
    state = after(build(make_backbone("llama")), 5, 2)
    size = state.size()
    assert size.device == state.pool.nbytes + state.query.nbytes
    assert size.host > sum(t.nbytes for t in (*state.host_long_term.tokens, *state.host_pending.tokens))


@torch.no_grad()
def test_a_loaded_store_may_differ_between_layers(make_backbone: Make) -> None:
    model = build(make_backbone("llama"), long_term_sizes=(9, 3))
    assert "long_term.layers.1.recall_frequencies" in model.state_dict()
    state = model.open(2)
    assert state.host_long_term.counts.tolist() == [[9, 3]] * 2
    readout, _ = model.step(state, Segment.full(text(2, 8)))
    assert readout.hidden.isfinite().all()
    with pytest.raises(UserError, match="one size per layer"):
        build(make_backbone("llama"), long_term_sizes=(9,))


@torch.no_grad()
def test_bfloat16_retrieves(make_backbone: Make) -> None:
    model = build(make_backbone("llama")).to(torch.bfloat16)
    state = after(model, 6)
    readout, _ = model.step(state, Segment.full(text(1, 8)))
    assert readout.hidden.dtype == state.host_long_term.keys[0].dtype == torch.bfloat16
    assert readout.hidden.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize(("block", "retrieved"), [(1, 6), (4, 1), (1, 1)])
def test_single_rows_work(make_backbone: Make, block: int, retrieved: int) -> None:
    model = build(make_backbone("llama"), tokens_per_block=block, retrieved_tokens=retrieved, retriever_layers=1)
    reading = model.read(after(model, 8), text(1, 8))
    assert reading.recalled[1].shape == (1, retrieved, 32)


def test_fit_and_wrong_options(make_backbone: Make, make_card: Callable[..., BackboneCard]) -> None:
    small = MPlus.fit(make_card(make_backbone("llama"), window=32), Budget("b"))
    assert (small.pool_tokens, small.tokens_per_block, small.retrieved_tokens, small.retriever_width) == (24, 4, 8, 16)
    most = small.initial_recall_frequency / small.recall_decay * small.merge_every * small.tokens_per_block
    assert most == 512
    with pytest.raises(UserError, match="Did you mean given"):
        replace(CONFIG, retrieval_query="givn")
    with pytest.raises(UserError, match="retriever_layers = 3"):
        replace(CONFIG, retriever_layers=3)
