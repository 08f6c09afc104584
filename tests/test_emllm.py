"""EM-LLM: where events end, how ends are moved, how many are retrieved, and what the official code does otherwise."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from memory_bench import plugins
from memory_bench.backbone.model import Backbone
from memory_bench.baselines.emllm import EMLLM, EMLLMConfig
from memory_bench.baselines.parts import events
from memory_bench.corpus import Line
from memory_bench.driver.stream import walk
from memory_bench.errors import UserError
from memory_bench.protocol import Segment
from memory_bench.testing.measures import random_text, read

Make = Callable[..., Backbone]
CONFIG = EMLLMConfig(
    segment=8, execution_block=8, local_window=16, sink_tokens=2, min_block_size=2, max_block_size=6,
    retrieved_tokens=8, representative_tokens=2, threshold_gamma=0.5, refine_from_layer=1,
)  # fmt: skip


def build(backbone: Backbone, **options: Any) -> EMLLM:
    return EMLLM(backbone, replace(CONFIG, **options), torch.Generator()).eval()


# Rules on numbers.


@pytest.mark.parametrize(
    ("ends", "length", "sizes"),
    [
        ([], 5, []),  # no surprise: it may go on
        ([], 14, [6, 6]),  # but for so long
        ([3], 8, [3]),  # what follows the last end stays
        ([1, 4], 9, [4]),  # a short piece is joined to the next
        ([8], 9, [6, 2]),  # a long one is cut
        ([7], 9, [6]),  # and the rest of it is joined to the next
        ([0, 3], 5, [3]),
    ],
)
def test_pieces_become_blocks(ends: list[int], length: int, sizes: list[int]) -> None:
    assert events.blocks_of(ends, length, 2, 6) == sizes


def test_surprise_is_beyond_the_spread_of_what_came_before() -> None:
    values, before = torch.tensor([1.0, 3.1, 2.9, 9.0]), torch.tensor([1.0, 2.0, 3.0])  # mean 2, std 1
    assert events.surprising(values, before, 1.0) == [1, 3]
    assert events.surprising(values, before[:1], 1.0) == []  # one number has no spread
    assert events.surprising_so_far(torch.tensor([1.0, 2.0, 1.0, 9.0]), 1.0) == [3]
    assert events.surprising_so_far(torch.tensor([1.0, 9.0]), 1.0) == []


def measures(similarity: Tensor, at: int) -> tuple[float, float]:
    """Modularity and conductance of a split, entry by entry."""
    size, total = len(similarity), float(similarity.sum())
    parts = (range(at), range(at, size))
    rows, columns = similarity.sum(dim=1), similarity.sum(dim=0)
    modularity = sum(
        float(similarity[i, j]) - float(columns[i]) * float(rows[j]) / total for p in parts for i in p for j in p
    )
    found = []
    for part in parts:
        inside = sum(float(similarity[i, j]) for i in part for j in part)
        cut = sum(float(similarity[i, j]) for i in part for j in range(size) if j not in part)
        found.append(cut / (min(inside, total - inside) or 1e-15))
    return modularity / (2 * total), min(found)


def test_splits_are_measured_as_defined() -> None:
    keys = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)) + 0.5
    similarity = (keys @ keys.T).double()
    modularity, conductance = events.modularity(similarity), events.conductance(similarity)
    for at in range(10):
        assert modularity[at] == pytest.approx(measures(similarity, at)[0], abs=1e-9)
        if 0 < at < 9:
            assert conductance[at] == pytest.approx(measures(similarity, at)[1], rel=1e-9)


@pytest.mark.parametrize("metric", ["modularity", "conductance"])
def test_an_end_moves_to_where_keys_fall_apart(metric: str) -> None:
    topic = torch.tensor([0] * 5 + [1] * 7)
    similarity = (topic[:, None] == topic).double() + 0.01
    assert events.refined([8], similarity, 0, 2, metric) == [5]
    assert events.refined([2], similarity, 0, 2, metric) == [2]  # no room to move
    assert events.refined([], similarity, 0, 2, metric) == []


def test_events_fill_their_room_as_nearly_as_they_can() -> None:
    sizes = torch.tensor([[4, 4, 4, 0]])
    for room, count in ((0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (6, 1), (7, 2), (11, 3), (12, 3), (99, 3)):
        assert events.taken(sizes, torch.tensor([room])).tolist() == [count], room


def test_the_buffer_holds_neighbours() -> None:
    sizes = [3] * 10
    assert events.neighbours([4], sizes, [], 6) == [3, 5]
    assert events.neighbours([4], sizes, [], 3) == [5]
    assert events.neighbours([4, 0], sizes, [], 9) == [1, 3, 5]
    assert events.neighbours([4], sizes, [8], 99) == [8, 3, 5]
    assert events.neighbours([4], sizes, [7, 8], 9) == [8, 3, 5]  # the newest of the old ones fit
    assert events.neighbours(list(range(10)), sizes, [2], 6) == [2]  # nothing beside them: it stays


# In the model.


@torch.no_grad()
def test_surprisal_is_that_of_the_models_own_predictions(make_backbone: Make) -> None:
    model = build(make_backbone("llama"))
    text = random_text(model, 1, 32)
    _, state = read(model, model.open(1), text)
    nll = torch.cat([piece.nll for piece in walk(model, [Line(text[0], torch.arange(32) > 0)])], dim=1)
    torch.testing.assert_close(state.host_surprisal[:, -32:], nll.cpu(), atol=1e-5, rtol=1e-4)
    assert not state.host_surprisal[:, :-31].any()  # a text's first token has none


@torch.no_grad()
def test_official_events_begin_one_token_early(make_backbone: Make) -> None:
    found, whole = {}, slice(-32, -8)  # calls that are complete
    for shift in (0, 1):
        model = build(make_backbone("llama"), boundary_shift=shift, local_window=32, threshold_gamma=1.0)
        _, state = read(model, model.open(1), random_text(model, 1, 40))
        found[shift] = state.host_ends[0]
        surprisal = state.host_surprisal[0]
    early, late = found[0][whole], found[1][whole]
    behind = surprisal[slice(-31, -7)]
    assert int(late.sum()) > 2
    assert int((early[:-1] & late[1:]).sum()) >= int(late[1:].sum()) - 1  # thresholds are of other tokens by one
    assert not torch.equal(early, late)
    assert float(surprisal[whole][late].min()) > float(surprisal[whole][~late].mean())
    assert float(behind[early].min()) > float(behind[~early].mean())


@torch.no_grad()
def test_the_first_call_has_no_statistics_but_its_own(make_backbone: Make) -> None:
    text = random_text(build(make_backbone("llama")), 1, 8, seed=3)
    ends = {}
    for way, refined in (("running", False), ("official", False), ("official", True)):
        model = build(
            make_backbone("llama"), statistics=way, boundary_refinement=refined, min_block_size=1, threshold_gamma=0.2
        )
        model.refined_layers = range(0)  # type: ignore[assignment]  # no keys: what is found is not moved
        if refined:
            model._refined = lambda *given: given[-1]  # type: ignore[method-assign]
        _, state = read(model, model.open(1), text)
        ends[way, refined] = state.host_ends[0, -8:].nonzero()[:, 0].tolist()
        values = state.host_surprisal[0, -8:]
    assert ends["official", False] == events.surprising(values, values[:2], 0.2)  # up to as many as there are sinks
    assert ends["official", True] == events.surprising(values, values, 0.2)
    assert ends["running", False] == [n + 1 for n in events.surprising_so_far(values[1:], 0.2)]
    assert len({tuple(found) for found in ends.values()}) > 1


@torch.no_grad()
@pytest.mark.parametrize("metric", ["modularity", "conductance"])
def test_refinement_moves_ends(metric: str, make_backbone: Make) -> None:
    plain, refined = (
        build(make_backbone("llama"), boundary_refinement=on, similarity_metric=metric) for on in (False, True)
    )
    text = random_text(plain, 2, 96)
    sizes = [read(model, model.open(2), text)[1].store.host_sizes for model in (plain, refined)]
    assert sizes[0].tolist() != sizes[1].tolist()


@torch.no_grad()
def test_events_are_of_the_sizes_asked_for_and_fill_the_room(make_backbone: Make) -> None:
    model = build(make_backbone("llama"), retrieved_tokens=24)
    text = random_text(model, 1, 160)
    _, state = read(model, model.open(1), text)
    sizes = state.store.host_sizes[0]
    assert int(sizes.min()) >= 2
    assert int(sizes.max()) <= 6
    assert len(set(sizes.tolist())) > 2
    (done,), _ = model.read(state, Segment.full(text[:, :8]), write=False)
    overflow = int(state.store.host_read - state.store.pending_start) + 8 - 16
    room = 2 + 8 + 24 - overflow - 2
    for times in done.chosen:
        assert abs(int((times[0, 0, 0] * sizes).sum()) - room) <= 3


@torch.no_grad()
def test_the_buffer_and_attending_twice(make_backbone: Make) -> None:
    found = {}
    for name, options in (
        ("without", {}),
        ("once", {"contiguity_buffer": True, "contiguity_buffer_size": 0.5}),
        ("twice", {"contiguity_buffer": True, "contiguity_buffer_size": 0.5, "deduplicate": False}),
    ):
        model = build(make_backbone("llama"), retrieved_tokens=24, **options)
        text, state, most = random_text(model, 1, 240), model.open(1), 0
        logits = []
        for start in range(0, 240, 8):
            segment = Segment.full(text[:, start : start + 8])
            passes, state = model.read(state, segment)
            most = max([most, *(int(times.max()) for times in passes[0].chosen if times.numel())])
            logits.append(passes[0].hidden)
            if name != "without" and state.host_queue.shape[2]:
                queue = [b for b in state.host_queue[0, 0].tolist() if b >= 0]
                assert set(queue) <= set(passes[0].chosen[0][0, 0, 0].nonzero()[:, 0].tolist())
        found[name] = (most, torch.cat(logits, dim=1))
    assert found["without"][0] == found["once"][0] == 1
    assert found["twice"][0] > 1
    assert float((found["once"][1] - found["twice"][1]).abs().max()) > 1e-3
    assert float((found["once"][1] - found["without"][1]).abs().max()) > 1e-3


@torch.no_grad()
def test_ragged_rows_have_their_own_events(make_backbone: Make) -> None:
    options = {"boundary_refinement": True, "contiguity_buffer": True, "boundary_shift": 0}
    model = build(make_backbone("llama"), **options)
    text = random_text(model, 2, 96)
    mask = torch.ones(2, 96, dtype=torch.bool)
    mask[1, 29:32] = mask[1, 64:69] = False
    together, state = read(model, model.open(2), text, mask)
    for row in range(2):
        alone, logits = model.open(1), []
        for start in range(0, 96, 8):
            ids = text[row : row + 1, start : start + 8][:, mask[row, start : start + 8]]
            readout, alone = model.step(alone, Segment.full(ids))
            logits.append(readout.logits()[0])
        torch.testing.assert_close(together[row][mask[row]], torch.cat(logits), atol=1e-4, rtol=1e-3)
        own = state.store.host_sizes[row]
        assert own[own > 0].tolist() == alone.store.host_sizes[0].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_block_size": 7}, "min_block_size must not exceed max_block_size"),
        ({"contiguity_buffer": True, "selection": "token"}, "contiguity buffer"),
        ({"similarity_metric": "modular"}, "modularity"),
        ({"statistics": "oficial"}, "official"),
        ({"boundary_shift": 2}, "Unknown emllm.boundary_shift '2'. Valid: 0, 1"),
        ({"threshold_gamma": float("nan")}, "finite"),
        ({"execution_block": 32}, "must not exceed local_window"),
    ],
)
def test_mistakes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(CONFIG, **options)


def test_broken_events_move_the_numbers(make_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(make_backbone("llama"))
    text = random_text(model, 1, 96)
    with torch.no_grad():
        before, _ = read(model, model.open(1), text)
        monkeypatch.setattr(events, "surprising", lambda values, before, gamma: [])
        after, _ = read(model, model.open(1), text)
    assert float((after - before).abs().max()) > 1e-3
    assert plugins.load("models", "emllm") is EMLLM
