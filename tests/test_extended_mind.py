"""Extended Mind: entries, windows, what is retrieved, and that a broken class fails its reference cases."""

from typing import Any

import pytest
import torch
from torch import Tensor

from memory_bench import plugins
from memory_bench.baselines.extended_mind import ExtendedMind, ExtendedMindConfig
from memory_bench.baselines.parts import knn
from memory_bench.errors import UserError
from memory_bench.parity.cases import Case, verify
from memory_bench.protocol import Segment
from memory_bench.shipped import parity_folder
from memory_bench.testing import measured_flops, tiny_backbone

SIZES = {"segment": 8, "history": 4, "top_k": 3, "slots": 64, "memory_stride": 4, "memory_context": 12}


def build(kind: str = "llama", **options: Any) -> ExtendedMind:
    config = ExtendedMindConfig(**{**SIZES, **options})
    return ExtendedMind(tiny_backbone(kind), config, torch.Generator()).eval()


def text(tokens: int, seed: int = 0, rows: int = 1) -> Tensor:
    return torch.randint(3, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def remember(model: ExtendedMind, ids: Tensor, cut: int = 8, seeds: list[int] | None = None) -> Any:
    state = model.open(len(ids), seeds=seeds)
    for part in ids.split(cut, dim=1):
        state = model.absorb(state, Segment.full(part))
    return state


def peek(model: ExtendedMind, state: Any, ids: Tensor) -> Tensor:
    return model.step(state, Segment.full(ids), write=False)[0].logits()


@torch.no_grad()
def test_entries_are_those_of_the_first_window_that_covers_a_token() -> None:
    model, ids = build(), text(30)
    keys = remember(model, ids).store.keys[1][:, :, :30]
    seen = 0
    for start in range(0, 30, 4):
        part = ids[:, start : start + 12]
        past = model.backbone.run_cached(model.backbone.embed(part), torch.ones_like(part, dtype=torch.bool))[1]
        assert past is not None
        torch.testing.assert_close(keys[:, :, seen : start + 12], past.keys[1][:, :, seen - start :])
        seen = min(30, start + 12)


@torch.no_grad()
@pytest.mark.parametrize("cut", [1, 5, 30])
def test_entries_depend_neither_on_cuts_nor_on_later_text(cut: int) -> None:
    model, ids = build(), text(30)
    whole, parts = remember(model, ids), remember(model, ids[:, :20], cut)
    for one, other in zip(whole.store.keys, parts.store.keys, strict=True):
        torch.testing.assert_close(other[:, :, :20], one[:, :, :20])


@torch.no_grad()
def test_only_what_the_window_does_not_show_is_memory() -> None:
    model, ids = build(), text(30)
    segment = Segment.full(text(8, seed=1))
    assert model.memories(remember(model, ids), segment)[0].nonzero()[:, 0].tolist() == list(range(26))
    short = Segment.full(text(3, seed=1))
    assert int(model.memories(remember(model, ids), short).sum()) == 26
    official = build(window_start="end")
    assert int(official.memories(remember(official, ids), short).sum()) == 30 + 3 - 12


@torch.no_grad()
def test_a_window_measured_from_its_end_moves_with_what_follows() -> None:
    ids, more = text(30), text(8, seed=1)
    for start, moves in (("segment", False), ("end", True)):
        model = build(window_start=start)
        state = remember(model, ids)
        change = (peek(model, state, more)[:, :5] - peek(model, state, more[:, :5])).abs().max()
        assert (float(change) > 1e-3) == moves


@torch.no_grad()
def test_special_tokens_leave_no_entry() -> None:
    ids = text(20)
    ids[0, [3, 7]] = torch.tensor([1, 2])
    model = build(special_ids=(0, 1, 2))
    state = remember(model, ids)
    assert state.store.written.tolist() == [18]
    every = remember(build(), ids)
    kept = [t for t in range(20) if t not in (3, 7)]
    torch.testing.assert_close(state.store.keys[0][:, :, :18], every.store.keys[0][:, :, kept])


@torch.no_grad()
def test_a_threshold_hides_what_is_not_alike() -> None:
    ids, more = text(30), text(8, seed=1)
    logits = [peek(m, remember(m, ids), more) for m in (build(), build(similarity_threshold=0.5), build(top_k=0))]
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)
    nothing = build(similarity_threshold=1.0)
    torch.testing.assert_close(peek(nothing, remember(nothing, ids), more), logits[2], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_random_selection_retrieves_as_many_entries_whichever_they_are() -> None:
    ids, more = text(30, rows=2), text(8, seed=1, rows=2)
    alike, drawn = build(), build(selection="random")
    logits = [peek(drawn, remember(drawn, ids, seeds=[s, 7]), more) for s in (1, 1, 2)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0][1], logits[2][1])  # a row draws by its own seed
    assert not torch.allclose(logits[0][0], logits[2][0], atol=1e-3)
    assert not torch.allclose(logits[0], peek(alike, remember(alike, ids), more), atol=1e-3)
    # Where all are retrieved there is nothing to choose.
    everything = [build(top_k=64, selection=way) for way in ("similarity", "random")]
    one, other = (peek(m, remember(m, ids), more) for m in everything)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{"memory_pass": "reading"}, {"selection": "random"}, {"window_start": "end"}, {"layers": (1,)}, {"top_k": 0}],
)
def test_operations_are_counted_for_every_option(options: dict[str, Any]) -> None:
    model, ids = build(**options), text(40)
    state = model.open(1)
    for before, part in enumerate(ids.split(8, dim=1)):
        segment = Segment.full(part)
        counted = measured_flops(lambda state=state, segment=segment: model.step(state, segment)[0].logits())  # type: ignore[misc]
        assert model.flops(8, before * 8) == counted
        state = model.absorb(state, segment)


@torch.no_grad()
def test_entries_of_the_reading_pass_are_others() -> None:
    ids = text(30)
    plain, reading = (remember(build(memory_pass=way), ids) for way in ("plain", "reading"))
    torch.testing.assert_close(plain.store.keys[0], reading.store.keys[0])  # the first layer knows no context
    assert not torch.allclose(plain.store.keys[1], reading.store.keys[1], atol=1e-3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"history": -1}, "history cannot be negative"),
        ({"memory_context": 3}, "memory_context must be at least memory_stride"),
        ({"selection": "best"}, "similarity"),
        ({"layers": (5,)}, "layers 0 to 1"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        build(**options)


def test_a_broken_class_fails_its_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(parity_folder() / "extended-mind-document-generate")
    replay = plugins.load("parity", "extended-mind")
    assert verify(case, replay).ok
    monkeypatch.setattr(knn, "normalise", lambda x: x)  # retrieves by the product instead
    assert not verify(Case(case.folder), replay).ok
