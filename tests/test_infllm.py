"""InfLLM: who chooses, what is far, blocks and their representatives, the control by chance."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from memory_bench import plugins
from memory_bench.backbone.model import Backbone
from memory_bench.baselines.emllm import EMLLM, EMLLMConfig
from memory_bench.baselines.infllm import InfLLM, InfLLMConfig
from memory_bench.baselines.parts.block_attention import Side, joint_attention
from memory_bench.baselines.parts.block_model import BlockModel
from memory_bench.baselines.parts.block_sight import Sight
from memory_bench.baselines.parts.block_store import BlockStore, spans
from memory_bench.baselines.parts.execution import executions
from memory_bench.errors import UserError
from memory_bench.protocol import DecodePlan, Segment
from memory_bench.testing import measure_look_ahead
from memory_bench.testing.measures import measured_flops, random_text, read

Make = Callable[..., Backbone]
CONFIG = InfLLMConfig(
    segment=8, execution_block=4, local_window=8, sink_tokens=2, block_size=3, selected_blocks=2,
    representative_tokens=2,
)  # fmt: skip
EVENTS = EMLLMConfig(
    segment=8, execution_block=4, local_window=8, sink_tokens=2, min_block_size=2, max_block_size=5,
    retrieved_tokens=6, representative_tokens=2, threshold_gamma=0.3, refine_from_layer=0,
)  # fmt: skip
BOTH = pytest.mark.parametrize("kind", ["infllm", "emllm"])


def build(backbone: Backbone, kind: str = "infllm", **options: Any) -> BlockModel[Any]:
    if kind == "infllm":
        return InfLLM(backbone, replace(CONFIG, **options), torch.Generator()).eval()
    return EMLLM(backbone, replace(EVENTS, **options), torch.Generator()).eval()


def numbers(model: BlockModel[Any], passes: list[Any], layer: int = 0) -> list[list[int]]:
    """The blocks attended to by the first row, execution block after execution block."""
    return [done.chosen[layer][0, 0, 0].nonzero()[:, 0].tolist() for done in passes]


@BOTH
@pytest.mark.parametrize("odd", ["mistral-window", "ministral", "smollm3-window", "ministral3", "granite"])
@torch.no_grad()
def test_a_window_is_read_as_the_backbone_itself_reads_it(kind: str, odd: str, make_backbone: Make) -> None:
    model = build(make_backbone(odd), kind, segment=24, execution_block=24, local_window=24)
    text = random_text(model, 2, 24)
    expected = model.backbone.model(text).logits  # type: ignore[operator]
    readout, _ = model.step(model.open(2), Segment.full(text))
    torch.testing.assert_close(readout.logits(), expected, atol=2e-5, rtol=1e-4)


# Who chooses.


@BOTH
def test_only_the_official_choice_looks_ahead(kind: str, make_backbone: Make) -> None:
    for selection, ahead in (("causal", 0), ("token", 0), ("random", 0), ("official", 3)):
        model = build(make_backbone("llama"), kind, selection=selection)
        assert model.traits.look_ahead == ahead
        assert measure_look_ahead(model) == ahead, selection
    nothing = {"selected_blocks": 0} if kind == "infllm" else {"retrieved_tokens": 0}
    model = build(make_backbone("llama"), kind, selection="official", **nothing)
    assert model.traits.look_ahead == 0
    assert measure_look_ahead(model) == 0


@BOTH
@pytest.mark.parametrize("selection", ["causal", "token", "random"])
@torch.no_grad()
def test_what_follows_in_a_segment_changes_nothing(kind: str, selection: str, make_backbone: Make) -> None:
    model = build(make_backbone("llama"), kind, selection=selection)
    text = random_text(model, 2, 80)
    _, state = read(model, model.open(2, seeds=[1, 2]), text[:, :72])
    whole = model.step(state, Segment.full(text[:, 72:]), write=False)[0].logits()
    for tokens in range(1, 8):
        part = model.step(state, Segment.full(text[:, 72 : 72 + tokens]), write=False)[0].logits()
        torch.testing.assert_close(part, whole[:, :tokens], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_block_is_answered_with_the_choice_of_the_one_before(make_backbone: Make) -> None:
    """The official choice, one execution block later."""
    text = random_text(build(make_backbone("llama")), 1, 64)
    chosen = {}
    for selection in ("causal", "official"):
        model, seen = build(make_backbone("llama"), selection=selection), []
        state = model.open(1)
        for start in range(0, 64, 8):
            passes, state = model.read(state, Segment.full(text[:, start : start + 8]))
            seen += passes
        chosen[selection] = seen
    # In layer 0 queries do not depend on what was chosen: only who asks differs, and which blocks there are by then.
    model = build(make_backbone("llama"))
    state = model.open(1)
    checked = 0
    for start in range(0, 64, 4):
        segment = Segment.full(text[:, start : start + 4])
        query = state.query[:, 0, :, None]
        passes, after = model.read(state, segment)
        if state.store.host_sizes.shape[1] > 2:
            scores = (query @ state.store.representatives[0].transpose(2, 3)).sum(dim=1)[0, 0]
            assert numbers(model, passes) == [sorted(scores.topk(2).indices.tolist())]
            checked += 1
        state = after
    assert checked > 8
    official, causal = (numbers(model, chosen[name]) for name in ("official", "causal"))
    assert official != causal


@torch.no_grad()
def test_a_question_chooses_for_itself_and_for_its_answer(make_backbone: Make) -> None:
    model, official = (build(make_backbone("llama"), selection=s) for s in ("causal", "official"))
    text = random_text(model, 1, 72)
    _, state = read(model, model.open(1), text[:, :64])
    given = torch.tensor([[False] * 2 + [True] * 3 + [False] * 3])
    passes, _ = model.read(state, Segment.full(text[:, 64:], given))
    assert [p.part.columns[0].tolist() for p in passes] == [[0, 1], [2, 3, 4], [5, 6, 7]]
    alone, _ = official.read(model.read(state, Segment.full(text[:, 64:66]))[1], Segment.full(text[:, 66:69]))
    assert numbers(model, passes)[1:] == numbers(official, alone) * 2


@torch.no_grad()
def test_with_blocks_of_one_token_all_choices_are_the_same(make_backbone: Make) -> None:
    logits = []
    for selection, far in (("official", "none"), ("causal", "exact"), ("token", "exact")):
        model = build(make_backbone("llama"), selection=selection, far_mask=far, execution_block=1)
        assert model.traits.chunk_invariant
        for cut in (8, 5):
            logits.append(read(model, model.open(2), random_text(model, 2, 48), cut=cut)[0])
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_every_token_chooses_by_its_own_query(make_backbone: Make) -> None:
    model = build(make_backbone("llama"), selection="token")
    text = random_text(model, 1, 72)
    _, state = read(model, model.open(1), text[:, :64])
    (done, *_), _ = model.read(state, Segment.full(text[:, 64:]))
    times = done.chosen[0][0, 0]  # [tokens, blocks]
    assert times.sum(dim=1).tolist() == [2] * 4
    backbone = model.backbone
    q, _, _ = backbone.project(0, backbone.norm_input(0, done.inputs[0]))
    far = backbone.rotate(q, backbone.rotation(torch.full((1, 1), 7), queries=True)[0])
    scores = (far @ state.store.representatives[0].transpose(2, 3)).sum(dim=1)[0]
    assert torch.equal(times, torch.zeros_like(times).scatter(1, scores.topk(2).indices, 1))


# The control by chance.


@BOTH
@torch.no_grad()
def test_chance_takes_as_many_and_is_the_rows_own(kind: str, make_backbone: Make) -> None:
    more = {} if kind == "infllm" else {"retrieved_tokens": 24}  # so that one event more or less is little
    model = build(make_backbone("llama"), kind, selection="random")
    assert {"selection": "random"} in type(model).ablations.values()
    text = random_text(model, 1, 96)

    def picks(seed: int, selection: str = "random") -> list[Any]:
        chosen = build(make_backbone("llama"), kind, selection=selection, **more)
        state, found = chosen.open(1, seeds=[seed]), []
        for start in range(0, 96, 8):
            passes, after = chosen.read(state, Segment.full(text[:, start : start + 8]))
            found += [
                (numbers(chosen, [done], layer), sizes)
                for done in passes
                for layer in range(2)
                for sizes in [state.store.host_sizes[0].tolist()]
            ]
            state = after
        return found

    assert picks(1) == picks(1)
    assert picks(1) != picks(2)
    first, causal = picks(1), picks(1, "causal")
    assert [n for n, _ in first] != [n for n, _ in causal]
    assert [n for n, _ in first[::2]] != [n for n, _ in first[1::2]]  # layers draw apart
    if kind == "infllm":
        assert [len(*n) for n, _ in first] == [len(*n) for n, _ in causal]
    else:
        tokens = [[sum(sizes[b] for b in n[0] if b < len(sizes)) for n, sizes in found] for found in (first, causal)]
        assert abs(sum(tokens[0]) - sum(tokens[1])) < 0.15 * sum(tokens[1])
    drawn = [block for n, sizes in first for block in n[0] if len(sizes) > 12]
    assert min(drawn) < 3
    assert max(drawn) > 8


# What is far.


@torch.no_grad()
@pytest.mark.parametrize("far", ["exact", "none"])
def test_every_token_is_attended_to_once_unless_nothing_is_masked(far: str, make_backbone: Make) -> None:
    model = build(make_backbone("llama"), far_mask=far, selected_blocks=99)
    text = random_text(model, 1, 76)
    state, twice = model.open(1), 0
    for start in range(0, 76, 4):
        segment = Segment.full(text[:, start : start + 4])
        (part,) = executions(segment, 4, at_conditions=False)
        sight = Sight.of(model.backbone, model.config, state.store, part, model.widths(start, 4)[1])
        assert sight.near_seen[0] is not None
        seen = sight.near_seen[0][0, 0].sum(dim=1) + sight.fixed_seen[0, 0].sum(dim=1)
        seen = seen + int(state.store.host_sizes.sum())
        extra = (seen - torch.arange(start + 1, start + 5)).tolist()
        assert min(extra) >= 0
        twice += sum(extra)
        _, state = model.read(state, segment)
    assert (twice == 0) == (far == "exact")


@BOTH
@torch.no_grad()
def test_the_official_far_mask_moves_the_numbers(kind: str, make_backbone: Make) -> None:
    exact, official = (build(make_backbone("llama"), kind, far_mask=far) for far in ("exact", "none"))
    text = random_text(exact, 1, 64)
    ours, theirs = (read(model, model.open(1), text)[0] for model in (exact, official))
    torch.testing.assert_close(ours[:, :8], theirs[:, :8])  # nothing is far yet
    assert float((ours - theirs).abs().max()) > 0.05


@torch.no_grad()
def test_heads_may_choose_alone(make_backbone: Make) -> None:
    together, alone = (build(make_backbone("llama"), select_per_head=per) for per in (False, True))
    text = random_text(together, 1, 64)
    ours, theirs = (read(model, model.open(1), text)[0] for model in (together, alone))
    assert float((ours - theirs).abs().max()) > 1e-3
    _, state = read(alone, alone.open(1), text)
    (done, *_), _ = alone.read(state, Segment.full(text[:, :8]))
    assert done.chosen[0].shape[1] == 4
    assert (done.chosen[0].sum(dim=-1) == 2).all()


# The store.


@torch.no_grad()
def test_blocks_are_the_tokens_that_left_and_are_found_by_their_most_attended_keys(make_backbone: Make) -> None:
    model = build(make_backbone("llama"))
    text = random_text(model, 1, 40)
    _, state = read(model, model.open(1), text)
    store: BlockStore = state.store
    assert store.host_sinks.tolist() == [2]
    assert store.host_starts.tolist() == [list(range(2, 32, 3))]
    assert int(store.host_read - store.pending_start) == 8 == store.received[0].shape[2]
    member = [float((store.representatives[0][0, 0, 4] - pair).norm()) for pair in pairs(store.keys[0][0, 0, 14:17])]
    assert min(member) < 1e-5


def pairs(keys: Tensor) -> list[Tensor]:
    """Means of two of three keys."""
    return [(keys[a] + keys[b]) / 2 for a, b in ((0, 1), (0, 2), (1, 2))]


def test_spans_list_blocks_as_often_as_they_are_taken() -> None:
    starts, sizes = torch.tensor([[2, 5, 9]]), torch.tensor([[3, 4, 2]])
    token, block, there = spans(starts, sizes, torch.tensor([[2, 0, 1]]), 10)
    assert token[0, :8].tolist() == [2, 3, 4, 2, 3, 4, 9, 10]
    assert block[0, :8].tolist() == [0, 0, 0, 0, 0, 0, 2, 2]
    assert there[0].tolist() == [True] * 8 + [False] * 2


def test_one_softmax_over_both_sides_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    from memory_bench.baselines.parts import block_attention

    rng = torch.Generator().manual_seed(0)

    def side(keys: int, heads: int) -> Side:
        q, k, v = (torch.randn(2, h, n, 8, generator=rng) for h, n in ((4, 5), (heads, keys), (heads, keys)))
        return Side(q, k, v, torch.rand(2, 1, 5, keys, generator=rng) < 0.7)

    local, far, real = side(6, 2), side(7, 4), torch.ones(2, 5, dtype=torch.bool)
    logits = []
    for part in (local, far):
        keys = part.keys.repeat_interleave(4 // part.keys.shape[1], dim=1)
        logits.append((part.q @ keys.transpose(2, 3)).masked_fill(~part.seen, -torch.inf))
    weights = torch.cat(logits, dim=3).softmax(dim=-1)
    values = torch.cat([p.values.repeat_interleave(4 // p.values.shape[1], dim=1) for p in (local, far)], dim=2)
    for floats in (1 << 24, 2 * 4 * 13 * 2):
        monkeypatch.setattr(block_attention, "FLOATS", floats)
        out, received = joint_attention(local, far, real)
        torch.testing.assert_close(out, weights @ values)
        torch.testing.assert_close(received, weights[..., :6].sum(dim=2))


# Counts, decoding, mistakes.


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *(("infllm", {"selection": s}) for s in ("official", "token", "random")),
    ("infllm", {"select_per_head": True, "selected_blocks": 3}),
    ("infllm", {"selected_blocks": 0}),
    ("infllm", {"far_mask": "none", "sink_tokens": 0, "execution_block": 3}),
    *(("emllm", {"selection": s}) for s in ("official", "token", "random")),
    ("emllm", {"contiguity_buffer": True, "contiguity_buffer_size": 0.4}),
    ("emllm", {"contiguity_buffer": True, "contiguity_buffer_size": 3, "deduplicate": False}),
    ("emllm", {"retrieved_tokens": 0}),
    ("emllm", {"far_mask": "none", "boundary_shift": 0, "statistics": "official"}),
]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_every_way_is_counted_exactly(kind: str, options: dict[str, Any], make_backbone: Make) -> None:
    model = build(make_backbone("llama"), kind, **options)
    text = random_text(model, 1, 96)
    state = model.open(1)
    for start in range(0, 96, 8):
        segment = Segment.full(text[:, start : start + 8])
        assert measured_flops(partial(model.absorb, state, segment)) == model.absorb_flops(8, start)
        state = model.absorb(state, segment)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "options"), [("infllm", {}), ("emllm", {}), *OPTIONS])
def test_ragged_rows_are_read_as_alone(kind: str, options: dict[str, Any], make_backbone: Make) -> None:
    model = build(make_backbone("llama"), kind, **options)
    text = random_text(model, 3, 48)
    rng = torch.Generator().manual_seed(3)
    mask = torch.rand(3, 48, generator=rng) < torch.tensor([1.0, 0.7, 0.4])[:, None]
    together, state = read(model, model.open(3, seeds=[4, 5, 6]), text, mask)
    for row in range(3):
        alone, logits = model.open(1, seeds=[4 + row]), []
        for start in range(0, 48, 8):
            own = mask[row, start : start + 8]
            ids = text[row : row + 1, start : start + 8][:, own]
            if ids.shape[1]:
                readout, alone = model.step(alone, Segment.full(ids))
                logits.append(readout.logits()[0])
        torch.testing.assert_close(together[row][mask[row]], torch.cat(logits), atol=1e-4, rtol=1e-3)
        assert int(state.store.counts[row]) == int(alone.store.counts[0])
    nothing, same = model.step(state, Segment(text[:, :4], torch.zeros(3, 4, dtype=torch.bool)))
    assert not nothing.hidden.any()
    assert same is state


@BOTH
@torch.no_grad()
def test_an_answer_is_written_with_the_choice_of_its_question(kind: str, make_backbone: Make) -> None:
    model = build(make_backbone("llama"), kind)
    text = random_text(model, 2, 69)
    _, state = read(model, model.open(2), text[:, :64])
    plan = DecodePlan(new_tokens=7)
    wanted = super(BlockModel, model)._continue(state, Segment.full(text[:, 64:], torch.ones(2, 5) > 0), plan)
    assert torch.equal(model.decode(state, Segment.full(text[:, 64:]), plan), wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"execution_block": 16}, "execution_block = 16 must not exceed local_window = 8"),
        ({"selection": "casual"}, "causal"),
        ({"far_mask": "precise"}, "exact"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"selected_blocks": -1}, "selected_blocks cannot be negative"),
        ({"sink_tokens": -1}, "sink_tokens cannot be negative"),
    ],
)
def test_mistakes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(CONFIG, **options)


def test_a_broken_choice_moves_the_numbers(make_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = plugins.load("models", "infllm")
    model = build(make_backbone("llama"))
    text = random_text(model, 1, 64)
    with torch.no_grad():
        before, _ = read(model, model.open(1), text)
        scores = cls._scores
        monkeypatch.setattr(cls, "_scores", lambda *given: -scores(*given))
        after, _ = read(model, model.open(1), text)
    assert float((after - before).abs().max()) > 1e-3
