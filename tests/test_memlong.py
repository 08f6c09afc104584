"""MemLong: chunks, what is searched for, gates, positions, frozen layers, and that a broken class fails its cases."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from memory_bench import plugins
from memory_bench.backbone.embedder import Embedder
from memory_bench.baselines import memlong
from memory_bench.baselines.memlong import MemLong, MemLongConfig
from memory_bench.baselines.official.replay_memlong import TableEmbedder
from memory_bench.baselines.parts.text_memory import chunks_held
from memory_bench.errors import UserError
from memory_bench.parity.cases import Case, verify
from memory_bench.protocol import DecodePlan, Segment
from memory_bench.shipped import parity_folder
from memory_bench.testing import measured_flops, tiny_backbone

SIZES = {"segment": 8, "window": 4, "memory_layer": 1, "retrieval_layers": (1, 2), "memory_tokens": 64, "chunk": 4}


def build(**options: Any) -> MemLong:
    backbone = tiny_backbone("llama", num_hidden_layers=3)
    table = torch.randn(64, 12, generator=torch.Generator().manual_seed(2))
    backbone.embedder = cast(Embedder, TableEmbedder(table))
    return MemLong(backbone, MemLongConfig(**{**SIZES, "retrieved_chunks": 2, **options}), torch.Generator()).eval()


def text(tokens: int, seed: int = 0, rows: int = 1) -> Tensor:
    return torch.randint(64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def remember(model: MemLong, ids: Tensor, cut: int = 8, seeds: list[int] | None = None) -> Any:
    state = model.open(len(ids), seeds=seeds)
    for part in ids.split(cut, dim=1):
        state = model.absorb(state, Segment.full(part))
    return state


def peek(model: MemLong, state: Any, ids: Tensor, given: Tensor | None = None) -> Tensor:
    return model.step(state, Segment.full(ids, given), write=False)[0].logits()


@torch.no_grad()
@pytest.mark.parametrize("cut", [1, 3, 8])
def test_chunks_do_not_depend_on_where_the_text_is_cut(cut: int) -> None:
    state = remember(build(), text(30), cut)
    assert torch.equal(state.memory.ids.flatten(1), text(30)[:, :28].int())
    assert state.memory.waiting_ids.tolist() == [[-1, *text(30)[0, 28:].tolist()]]
    # The first two chunks are older than the window wherever the text was cut; the last 4 tokens reach into a chunk.
    assert state.memory.older_than(4).tolist() == [[True] * 6 + [False]]


@torch.no_grad()
def test_official_chunks_begin_with_every_piece() -> None:
    state = remember(build(short_chunks=True), text(12), cut=6)
    assert (state.memory.ids >= 0).sum(dim=2).tolist() == [[4, 2, 4, 2]]


@torch.no_grad()
def test_the_oldest_chunk_gives_way_and_officially_the_older_half() -> None:
    held: dict[str, list[int]] = {}
    for eviction in ("oldest", "halve"):
        model = build(eviction=eviction, memory_tokens=24, window=0)
        state, held[eviction] = model.open(1), []
        for number, part in enumerate(text(80).split(4, dim=1)):
            state = model.absorb(state, Segment.full(part))
            held[eviction].append(int(state.memory.real.sum()))
            said = chunks_held(4 * number + 4, 4, 24, None, halve=eviction == "halve", hidden=0)
            assert said == (held[eviction][-1],) * 2
        assert torch.equal(
            state.memory.ids[0, : held[eviction][-1]].flatten(), text(80)[0, -4 * held[eviction][-1] :].int()
        )
    assert held["oldest"][5:] == [6] * 15
    assert held["halve"][:10] == [1, 2, 3, 4, 5, 6, 4, 5, 6, 4]


@torch.no_grad()
def test_a_segment_is_searched_for_by_the_text_before_or_by_its_question() -> None:
    ids, more, other = text(48), text(8, seed=1), text(8, seed=3)
    for search in ("keys", "text"):
        model = build(search=search)
        states = [remember(model, torch.cat([ids, last], dim=1)) for last in (other, text(8, seed=4))]
        for state in states:  # what is predicted plays no part
            segments = [Segment.full(more), Segment.full(other)]
            found = [_chunks(model, state, s) for s in segments]
            assert torch.equal(*found)
        given = torch.arange(8) < 6
        asked = [
            _chunks(model, states[0], Segment.full(question, given[None])) for question in (ids[:, :8], ids[:, 24:32])
        ]
        if search == "text":
            assert 0 in asked[0][0].tolist()  # the very words asked for
            assert 6 in asked[1][0].tolist()


def _chunks(model: MemLong, state: Any, segment: Segment) -> Tensor:
    """The chunks that a segment retrieves."""
    seen: list[Tensor] = []
    find = model.find

    def noting(*inputs: Any) -> Any:
        found = find(*inputs)
        seen.append(found.chunks)
        return found

    model.find = noting  # type: ignore[method-assign]
    model.step(state, segment, write=False)
    del model.find
    assert len(seen) == 1
    return seen[0]


@torch.no_grad()
def test_officially_the_text_that_is_predicted_chooses() -> None:
    ids, more = text(48), text(8, seed=1)
    for search in ("keys", "text"):
        moved = {}
        for query in ("previous-piece", "current-piece"):
            model = build(search=search, retrieval_query=query)
            state, moved[query] = remember(model, ids), 0.0
            for seed in range(5, 11):
                other = torch.cat([more[:, :5], text(3, seed=seed)], dim=1)
                change = (peek(model, state, more) - peek(model, state, other))[:, :5]
                moved[query] = max(moved[query], float(change.abs().max()))
            assert model.traits.look_ahead == (7 if query == "current-piece" else 0)
        assert moved["previous-piece"] < 1e-5 < 1e-3 < moved["current-piece"]


@torch.no_grad()
def test_where_all_chunks_are_read_nothing_chooses() -> None:
    ids, more = text(48), text(8, seed=1)
    ways = ({}, {"search": "text"}, {"retrieval_query": "current-piece"}, {"selection": "random"})
    logits = []
    for way in ways:
        model = build(retrieved_chunks=99, **way)
        logits.append(peek(model, remember(model, ids), more))
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_random_selection_reads_as_many_chunks_whichever_they_are() -> None:
    ids, more = text(48, rows=2), text(8, seed=1, rows=2)
    drawn = build(selection="random")
    found = [_chunks(drawn, remember(drawn, ids, seeds=[s, 7]), Segment.full(more)) for s in range(6)]
    assert all(torch.equal(f[1], found[0][1]) for f in found)  # a row draws by its own seed
    assert len({tuple(f[0].tolist()) for f in found}) > 1
    assert all(len(set(row)) == 2 for f in found for row in f.tolist())


@torch.no_grad()
def test_officially_the_gate_makes_all_logits_smaller_at_the_start() -> None:
    ids, more = text(48), text(8, seed=1)
    none, bias, scale = (peek(m, remember(m, ids), more) for m in (build(gate=g) for g in ("none", "bias", "scale")))
    torch.testing.assert_close(bias, none, atol=1e-5, rtol=1e-4)  # as much is added to both
    assert float((scale - none).abs().max()) > 0.05
    fresh = build(gate="scale")
    torch.testing.assert_close(peek(fresh, fresh.open(1), more), peek(build(), build().open(1), more))


@torch.no_grad()
def test_officially_every_retrieval_layer_turns_the_keys_again() -> None:
    ids, more = text(48), text(8, seed=1)

    def logits(layers: tuple[int, ...], way: str) -> Tensor:
        model = build(retrieval_layers=layers, memory_position=way)
        return peek(model, remember(model, ids), more)

    torch.testing.assert_close(logits((2,), "repeated"), logits((2,), "continual"))
    assert not torch.allclose(logits((1, 2), "repeated"), logits((1, 2), "continual"), atol=1e-4)
    assert not torch.allclose(logits((1, 2), "zero"), logits((1, 2), "continual"), atol=1e-4)


def test_frozen_layers_get_no_gradient_and_what_is_stored_never_has_one() -> None:
    for frozen in (False, True):
        model, ids = build(freeze_below=frozen).train(), text(48)
        state = remember(model, ids)
        assert not state.memory.keys.requires_grad
        peek(model, state, text(8, seed=1)).square().mean().backward()
        inner: Any = model.backbone.model
        reached = [block.self_attn.q_proj.weight.grad is not None for block in inner.model.layers]
        assert reached == [not frozen, not frozen, True]
        assert (model.detached_flops(8, 48) > 0) == frozen


@torch.no_grad()
def test_the_official_continuation_retrieves_for_every_token() -> None:
    model = build(search="text", retrieval_query="current-piece", window=0)
    state, prompt = remember(model, text(48)), Segment.full(text(8, seed=1))
    found: list[Any] = []
    ids, _ = model.continued(state, prompt, 6, lambda query, chunks: found.append(chunks.chunks.tolist()))
    assert len(found) == 6
    assert model.decode(state, prompt, DecodePlan(6)).tolist() == ids.tolist()
    stopped = model.decode(state, prompt, DecodePlan(6, stop_ids=(int(ids[0, 1]),)))
    assert set(stopped[0, 1:].tolist()) == {int(ids[0, 1])}


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"selection": "random"},
        {"search": "text"},
        {"gate": "scale"},
        {"short_chunks": True, "window": 0},
        {"window": 7},
    ],
)
def test_operations_are_counted_for_every_option(options: dict[str, Any]) -> None:
    model = build(**options)
    state = model.open(1)
    for before, part in enumerate(text(48).split(8, dim=1)):
        segment = Segment.full(part)
        counted = measured_flops(lambda state=state, segment=segment: model.step(state, segment)[0].logits())  # type: ignore[misc]
        assert model.flops(8, before * 8) == counted
        state = model.absorb(state, segment)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"retrieval_layers": (0,)}, "needs retrieval layers from memory_layer on"),
        ({"memory_layer": 3}, "layers 0 to 2"),
        ({"memory_tokens": 3}, "at least a chunk"),
        ({"gate": "scales"}, "scale"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        build(**options)


def test_a_broken_class_fails_its_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(parity_folder() / "memlong-llama-continual")
    replay = plugins.load("parity", "memlong")
    assert verify(case, replay).ok
    right = memlong.chunk_positions
    monkeypatch.setattr(memlong, "chunk_positions", lambda found, way, number: right(found, "continual", number))
    assert not verify(Case(case.folder), replay).ok


def test_the_official_preset_is_what_the_cases_run() -> None:
    official = MemLongConfig.official()
    assert replace(official, search="keys", store="backbone") != MemLongConfig()
    with pytest.raises(UserError, match="search = text needs an embedder"):
        MemLong(tiny_backbone("llama"), official, torch.Generator())
