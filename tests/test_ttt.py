"""Test-time training: one step by hand, rows apart, what is not learned, the way that looks ahead, what is counted."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memory_bench.backbone.model import Backbone
from memory_bench.baselines.parts.learning import Learned
from memory_bench.baselines.truncation import Truncation
from memory_bench.baselines.ttt import TTT, TTTConfig
from memory_bench.budget import Budget
from memory_bench.errors import UserError
from memory_bench.protocol import Segment
from memory_bench.testing import measure_look_ahead
from memory_bench.testing.measures import measured_flops

Make = Callable[..., Backbone]
L, R = 8, 3
ALL = ("q", "k", "v", "o", "gate", "up", "down")


def build(backbone: Backbone, **options: Any) -> TTT:
    config = TTTConfig(**{"segment": L, "rank": R, "lr": 0.05, **options})
    return TTT(backbone, config, torch.Generator().manual_seed(1)).eval()


def ids_of(number: int, tokens: int = L, rows: int = 2) -> Tensor:
    return torch.randint(2, 64, (rows, tokens), generator=torch.Generator().manual_seed(number))


def loss_of(model: TTT, state: Any, ids: Tensor) -> Tensor:
    """Mean nats per token within a segment, ``[rows]``."""
    logits = model.step(state, Segment.full(ids), write=False)[0].logits()[:, :-1]
    return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(dim=1)


def moved(a: Any, b: Any) -> float:
    return max(float((x.b - y.b).abs().max()) for x, y in zip(a.weights, b.weights, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("options", [{"lr": 0.0}, {"decay": 1.0}], ids=str)
def test_without_learning_it_is_the_window(kind: str, options: dict[str, Any], make_backbone: Make) -> None:
    backbone = make_backbone(kind)
    model, plain = build(backbone, **options), Truncation(backbone, Truncation.Config(L), torch.Generator())
    if options.get("decay"):  # what was learned is taken back at once
        model = build(backbone, optimiser="sgd", lr=0.0, **options)
    state = model.open(2)
    for number in range(3):
        readout, state = model.step(state, Segment.full(ids_of(number)))
        expected = plain.step(plain.open(2), Segment.full(ids_of(number)))[0].logits()
        torch.testing.assert_close(readout.logits(), expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_step_goes_down_the_slope_found_by_small_differences(make_backbone: Make) -> None:
    model = build(make_backbone("gpt2").double(), optimiser="sgd", lr=0.5)  # its norms stay in double
    state = model.open(2)
    state = model.absorb(state, Segment.full(ids_of(0)))  # away from the start, where A has no slope
    ids, small = ids_of(1), 1e-6
    after = model.absorb(state, Segment.full(ids))
    for number in range(len(state.weights)):
        for name in ("a", "b"):
            before, then = (getattr(s.weights[number], name) for s in (state, after))
            for place in ((0, 1, 2), (1, 2, 1)):
                slopes = []
                for sign in (1, -1):
                    changed = before.clone()
                    changed[place] += sign * small
                    one = replace(state.weights[number], **{name: changed})
                    weights = (*state.weights[:number], one, *state.weights[number + 1 :])
                    slopes.append(loss_of(model, type(state)(weights, state.steps), ids)[place[0]])
                slope = float(slopes[0] - slopes[1]) / (2 * small)
                assert float(then[place] - before[place]) == pytest.approx(-0.5 * slope, rel=1e-4, abs=1e-9)


@torch.no_grad()
def test_adam_is_torchs_own(make_backbone: Make) -> None:
    model = build(make_backbone(), steps=2)
    state, ours = model.open(1), [model.open(1)]
    leaves = [nn.Parameter(t[0].clone()) for w in state.weights for t in (w.a, w.b)]
    optimiser = torch.optim.Adam(leaves, lr=0.05)
    for number in range(3):
        ours.append(model.absorb(ours[-1], Segment.full(ids_of(number, rows=1))))
        for _ in range(2):
            with torch.enable_grad():
                pairs = zip(leaves[::2], leaves[1::2], strict=True)
                weights = tuple(Learned(a[None], b[None]) for a, b in pairs)
                loss = loss_of(model, type(state)(weights, state.steps), ids_of(number, rows=1)).sum()
                optimiser.zero_grad()
                for leaf, slope in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
                    leaf.grad = slope
            optimiser.step()
    for w, a, b in zip(ours[-1].weights, leaves[::2], leaves[1::2], strict=True):
        torch.testing.assert_close(w.a[0], a.detach(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(w.b[0], b.detach(), atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_what_is_read_again_surprises_less_and_text_without_pairs_teaches_nothing(
    optimiser: str, make_backbone: Make
) -> None:
    model = build(make_backbone(), optimiser=optimiser, lr=0.3 if optimiser == "sgd" else 0.03, steps=2)
    state = model.open(2)
    first = loss_of(model, state, ids_of(0)).mean()
    for _ in range(8):
        state = model.absorb(state, Segment.full(ids_of(0)))
    assert loss_of(model, state, ids_of(0)).mean() < 0.9 * first
    mask = torch.tensor([[True] * L, [True] + [False] * (L - 1)])
    after = model.absorb(state, Segment(ids_of(1), mask))
    assert moved(after.rows(torch.tensor([1])), state.rows(torch.tensor([1]))) == 0.0
    assert moved(after, state) > 0
    assert (after.steps - state.steps).tolist() == [2, 0]


def test_gradients_stay_inside_and_callers_have_theirs(make_backbone: Make) -> None:
    model = build(make_backbone()).train()
    state = model.open(2)
    for number in range(3):
        readout, state = model.step(state, Segment.full(ids_of(number)))
        assert readout.hidden.requires_grad
        assert not any(t.requires_grad for _, t in state.tensors())
    assert all(p.grad is None for p in model.parameters())
    readout.logprobs(ids_of(9)).sum().backward()
    reached = dict(model.backbone.named_parameters())
    assert all(p.grad is not None and bool(p.grad.any()) for p in reached.values())
    with torch.no_grad():
        quiet, after = model.step(state, Segment.full(ids_of(3)))
    assert not quiet.hidden.requires_grad
    assert not any(t.requires_grad for _, t in after.tensors())
    assert model.added_parameters() == 0


@torch.no_grad()
@pytest.mark.parametrize("change", [
    {"optimiser": "sgd"}, {"steps": 2}, {"decay": 0.1}, {"targets": ALL}, {"rank": 2}, {"lr": 0.1}, {"learn": "before"},
], ids=str)  # fmt: skip
def test_every_option_changes_numbers(change: dict[str, Any], make_backbone: Make) -> None:
    found = []
    for options in ({}, change):
        model = build(make_backbone(), **options)
        state = model.open(2)
        for number in range(2):
            state = model.absorb(state, Segment.full(ids_of(number)))
        found.append(model.step(state, Segment.full(ids_of(2)), write=False)[0].logits())
    assert float((found[0] - found[1]).abs().max()) > 1e-4


def test_learning_before_predicting_looks_ahead(make_backbone: Make) -> None:
    after, before = build(make_backbone()), build(make_backbone(), learn="before")
    assert (after.traits.look_ahead, measure_look_ahead(after)) == (0, 0)
    assert before.traits.look_ahead == measure_look_ahead(before) == L - 1


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("options", [
    {}, {"steps": 3}, {"targets": ALL}, {"targets": ("gate", "up")}, {"targets": ("down",)}, {"targets": ("o",)},
    {"learn": "before", "steps": 2}, {"rank": 5, "optimiser": "sgd"},
], ids=str)  # fmt: skip
def test_operations_are_counted_exactly(kind: str, options: dict[str, Any], make_backbone: Make) -> None:
    if kind != "llama" and options.get("targets") == ("gate", "up"):
        options = {"targets": ("up",)}
    for rank in (0, 2):
        backbone = make_backbone(kind)
        backbone.adapt(rank, 4.0, ALL, torch.Generator().manual_seed(0))
        model = build(backbone, **options)
        state = model.absorb(model.open(1), Segment.full(ids_of(0, rows=1)))
        for tokens in (L, 5, 1):
            segment = Segment.full(ids_of(1, tokens, rows=1))
            counted = measured_flops(lambda m=model, s=state, t=segment: m.step(s, t)[0].logits())
            assert counted == model.flops(tokens, L), tokens
        assert model.detached_flops(L, L) < model.flops(L, L)


def test_config_and_fit(make_backbone: Make, make_card: Any) -> None:
    wrong: dict[str, Any]
    for wrong in (
        {"segment": 0}, {"rank": 0}, {"steps": 0}, {"lr": -1.0}, {"decay": 1.5}, {"targets": ()}, {"targets": ("w",)},
        {"optimiser": "adma"}, {"learn": "befor"},
    ):  # fmt: skip
        with pytest.raises(UserError, match="ttt"):
            TTTConfig(**wrong)
    with pytest.raises(UserError, match="at most 192"):
        build(make_backbone("opt"), segment=193)
    assert TTT.fit(make_card(make_backbone("gpt2"), window=1000), Budget("x")) == TTTConfig(
        segment=192, rank=4, lr=0.01
    )
    model = build(make_backbone(), targets=("v", "o"))
    assert [name for layer, name in model.places if not layer] == ["self_attn.v_proj", "self_attn.o_proj"]
