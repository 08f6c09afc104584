"""SirLLM: scores, what is kept, room, and that a broken class fails its reference cases."""

from typing import Any

import pytest
import torch
from torch import Tensor

from memory_bench import plugins
from memory_bench.baselines import sirllm
from memory_bench.baselines.sirllm import SirLLM, SirLLMConfig
from memory_bench.errors import UserError
from memory_bench.parity.cases import Case, verify
from memory_bench.protocol import Segment
from memory_bench.shipped import parity_folder
from memory_bench.testing import measured_flops, tiny_backbone

SIZES = {"segment": 8, "sinks": 2, "recent": 4, "scored": 14}


def build(kind: str = "llama", **options: Any) -> SirLLM:
    return SirLLM(tiny_backbone(kind), SirLLMConfig(**{**SIZES, **options}), torch.Generator()).eval()


def text(tokens: int, seed: int = 0, rows: int = 1) -> Tensor:
    return torch.randint(64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def read(model: SirLLM, ids: Tensor, cut: int = 8) -> tuple[Tensor, Any]:
    state, logits = model.open(len(ids)), []
    for part in ids.split(cut, dim=1):
        readout, state = model.step(state, Segment.full(part))
        logits.append(readout.logits())
    return torch.cat(logits, dim=1), state


@torch.no_grad()
@pytest.mark.parametrize("cut", [8, 5])
def test_a_score_is_the_surprisal_of_its_token(cut: int) -> None:
    model, ids = build(decay=1.0, scored=30), text(16)
    logits, state = read(model, ids, cut)
    own = -logits.log_softmax(dim=-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(state.scores[:, 1:16], own, atol=1e-4, rtol=1e-4)
    assert float(state.scores[0, 0]) == 0  # nothing predicted the first token


@torch.no_grad()
def test_the_official_score_is_that_of_seeing_the_token_before_once_more() -> None:
    model, ids = build(token_score="repeat"), text(16)
    logits, state = read(model, ids)
    again = -logits.log_softmax(dim=-1).gather(2, ids[..., None])[..., 0]
    torch.testing.assert_close(state.scores[:, 9:16], again[:, 8:15], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(state.scores[:, 8], again[:, 8:].amax(dim=1), atol=1e-4, rtol=1e-4)
    ids = text(64)
    clean, official = (read(m, ids)[0][:, -8:] for m in (build(), model))
    assert not torch.allclose(clean, official, atol=1e-2)


@torch.no_grad()
def test_sinks_the_best_scored_and_the_newest_are_kept() -> None:
    model = build()
    _, state = read(model, text(16))
    scores = torch.tensor([[0.0, 0, 9, 1, 8, 1, 7, 1, 6, 1, 5, 1, 4, 1, 3, 1, 0, 0, 0, 0]])
    state = sirllm.SirLLMState(state.cache, scores, state.places, state.read, state.last)
    kept = model.with_room(state, Segment.full(text(8)))
    # Room for 12: six by score (14 less the segment), the sinks, and the newest four of the others.
    assert kept.places[kept.cache.mask].tolist() == [0, 1, 2, 4, 6, 8, 10, 11, 12, 13, 14, 15]
    few = model.with_room(state, Segment.full(text(3)))
    assert few.places[few.cache.mask].tolist() == kept.places[kept.cache.mask].tolist()
    official = build(room="tokens")
    assert int(official.with_room(state, Segment.full(text(3))).cache.mask.sum()) == 16  # 16 and 3 are no more than 20


@torch.no_grad()
def test_scores_decay_with_every_segment() -> None:
    one, half = build(decay=1.0), build(decay=0.5)
    ids = text(12)
    whole, less = (read(m, ids, cut=4)[1].scores[0, :12] for m in (one, half))
    torch.testing.assert_close(less, whole * torch.tensor([0.25] * 4 + [0.5] * 4 + [1.0] * 4))


@torch.no_grad()
def test_official_room_depends_on_how_much_follows() -> None:
    ids, more = text(40), text(8, seed=1)
    for room, moves in (("segment", False), ("tokens", True)):
        model = build(room=room)
        _, state = read(model, ids)
        short, long = (model.step(state, Segment.full(more[:, :n]), write=False)[0].logits() for n in (3, 8))
        assert (float((long[:, :3] - short).abs().max()) > 1e-3) == moves


@torch.no_grad()
def test_a_long_text_is_read_in_pieces() -> None:
    model, ids = build(), text(30, rows=2)
    expected, state = read(model, ids)
    readout, after = model.step(model.open(2), Segment.full(ids))
    torch.testing.assert_close(readout.logits(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(after.scores, state.scores, atol=1e-4, rtol=1e-4)
    assert torch.equal(after.places, state.places)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"room": "tokens"}, {"token_score": "repeat"}])
def test_operations_are_counted_for_every_option(options: dict[str, Any]) -> None:
    model = build(**options)
    _, state = read(model, text(40))
    for tokens in (8, 5):
        segment = Segment.full(text(tokens))
        counted = measured_flops(lambda segment=segment: model.step(state, segment)[0].logits())  # type: ignore[misc]
        assert model.flops(tokens, 40) == counted


@torch.no_grad()
@pytest.mark.parametrize("odd", ["mistral-window", "ministral", "smollm3-window", "ministral3", "granite"])
def test_a_first_segment_is_read_as_the_backbone_itself_reads_it(odd: str) -> None:
    model, ids = build(odd, segment=24, scored=40), text(24, rows=2)
    logits = model.step(model.open(2), Segment.full(ids))[0].logits()
    torch.testing.assert_close(logits, model.backbone.model(ids).logits, atol=2e-5, rtol=1e-4)  # type: ignore[operator]


def test_sizes_that_leave_no_room_are_refused() -> None:
    with pytest.raises(UserError, match="a segment of 8 tokens needs recent"):
        build(recent=1, scored=6)
    with pytest.raises(UserError, match="surprisal"):
        build(token_score="entropy")


def test_a_broken_class_fails_its_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(parity_folder() / "sirllm-stream")
    replay = plugins.load("parity", "sirllm")
    assert verify(case, replay).ok
    clean = SirLLM.__init__

    def other(self: Any, backbone: Any, config: Any, rng: Any) -> None:
        clean(self, backbone, SirLLMConfig(**{**{f: getattr(config, f) for f in SIZES}, "decay": config.decay}), rng)

    monkeypatch.setattr(SirLLM, "__init__", other)  # the clean scores and room
    assert not verify(Case(case.folder), replay).ok
