"""MemoryPrompt: the pass behind a prompt, the net as torch's own, what is written, sizes, the loss of the vectors."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memory_bench.backbone.model import Backbone
from memory_bench.baselines.memoryprompt import MemoryPrompt, MemoryPromptConfig, added
from memory_bench.baselines.truncation import Truncation
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.errors import UserError
from memory_bench.protocol import Segment
from memory_bench.recipe import find_recipe
from memory_bench.testing.measures import measured_flops

Make = Callable[..., Backbone]
L, P, M, D = 8, 3, 6, 32


def build(backbone: Backbone, **options: Any) -> MemoryPrompt:
    config = MemoryPromptConfig(**{"segment": L, "prompt_tokens": P, "width": M, **options})
    model = MemoryPrompt(backbone, config, torch.Generator().manual_seed(1)).eval()
    with torch.no_grad():  # the first weights of the layers hide what goes through them
        for number, (name, p) in enumerate(sorted(model.layers.items())):
            p.copy_(
                torch.randn(p.shape, generator=torch.Generator().manual_seed(number)) * (0.5 if "w" in name else 0.1)
            )
    return model


def ids_of(tokens: int, rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(2, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def own_net(model: MemoryPrompt) -> tuple[nn.Sequential, nn.LSTMCell]:
    """The same weights in torch's own modules."""
    assert model.cell is not None
    layers = nn.Sequential(nn.Linear(D, M), nn.ReLU(), nn.Linear(M, M))
    names = {"0.weight": "weight_1", "0.bias": "bias_1", "2.weight": "weight_2", "2.bias": "bias_2"}
    layers.load_state_dict({ours: model.layers[theirs].detach() for ours, theirs in names.items()})
    cell = nn.LSTMCell(M, P * D)
    cell.load_state_dict({name: p.detach() for name, p in model.cell.named_parameters()})
    return layers, cell


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_turns_are_read_as_the_backbone_and_torchs_own_modules_would(kind: str, make_backbone: Make) -> None:
    model = build(make_backbone(kind))
    layers, cell = own_net(model)
    hf: Any = model.backbone.model
    inner = {"llama": "model", "gpt2": "transformer", "opt": "model"}[kind]
    state, h, c = model.open(2), torch.zeros(2, P * D), torch.zeros(2, P * D)
    for turn, tokens in enumerate((8, 5, 8, 2)):
        ids = ids_of(tokens, seed=turn)
        prompt = h.view(2, P, D)[:, : P if turn else 0]
        embeds = torch.cat([prompt, model.backbone.embed(ids)], dim=1)
        expected = getattr(hf, inner)(inputs_embeds=embeds).last_hidden_state[:, -tokens:]
        readout, state = model.step(state, Segment.full(ids))
        torch.testing.assert_close(readout.hidden, expected, atol=2e-5, rtol=1e-4)
        h, c = cell(layers(expected[:, -1]), (h, c))
        torch.testing.assert_close(state.shown, h, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(state.kept, c, atol=1e-5, rtol=1e-4)
        looked, same = model.step(state, Segment.full(ids), write=False)
        assert same is state
        assert not torch.equal(looked.hidden, readout.hidden)


@torch.no_grad()
def test_what_is_written_is_the_last_real_token_whichever_side_is_padded(make_backbone: Make) -> None:
    model = build(make_backbone())
    ids = ids_of(5, rows=1, seed=3)
    alone = model.absorb(model.open(1), Segment.full(ids))
    other = ids_of(L, rows=1, seed=4)
    for place in (slice(0, 5), slice(3, 8)):
        padded, mask = other.clone(), torch.zeros(1, L, dtype=torch.bool)
        padded[:, place], mask[:, place] = ids, True
        torch.testing.assert_close(model.absorb(model.open(1), Segment(padded, mask)).shown, alone.shown)
    nothing = model.absorb(alone, Segment(other, torch.zeros(1, L, dtype=torch.bool)))
    assert torch.equal(nothing.shown, alone.shown)
    assert torch.equal(nothing.kept, alone.kept)


@torch.no_grad()
def test_without_vectors_it_is_the_window_and_adds_nothing(make_backbone: Make) -> None:
    backbone = make_backbone()
    model, plain = build(backbone, prompt_tokens=0), Truncation(backbone, Truncation.Config(L), torch.Generator())
    ids, state = ids_of(L, seed=5), model.open(2)
    for _ in range(2):
        readout, state = model.step(state, Segment.full(ids))
        assert torch.equal(readout.logits(), plain.step(plain.open(2), Segment.full(ids))[0].logits())
    assert model.added_parameters() == 0
    assert model.flops(L, 64) == plain.flops(L, 64)
    remembering, state = build(backbone), build(backbone).open(2)
    first, state = remembering.step(state, Segment.full(ids))
    assert torch.equal(first.logits(), plain.step(plain.open(2), Segment.full(ids))[0].logits())
    second, _ = remembering.step(state, Segment.full(ids))
    assert (second.logits() - first.logits()).abs().max() > 1e-3


@torch.no_grad()
def test_operations_are_counted_exactly(make_backbone: Make) -> None:
    for kind in ("llama", "gpt2", "opt"):
        model = build(make_backbone(kind))
        state = model.open(1)
        for before in (0, L):
            segment = Segment.full(ids_of(L, rows=1, seed=before))
            assert measured_flops(lambda m=model, s=state, t=segment: m.step(s, t)[0].logits()) == model.flops(
                L, before
            )
            state = model.absorb(state, segment)
        matrices = sum(p.numel() for p in model.memory_parameters().values() if p.dim() == 2)
        assert model.flops(L, L) == model.backbone.flops(L + P, L + P, predicted=L) + 2 * matrices


def test_the_length_of_the_vectors_is_a_loss_in_training_alone(make_backbone: Make) -> None:
    model = build(make_backbone(), norm_penalty=0.5).train()
    segment = Segment(ids_of(L), torch.tensor([[True] * L, [False] * L]))
    readout, state = model.step(model.open(2), segment)
    assert readout.aux_loss is not None
    expected = 0.5 * state.shown[0].view(P, D).norm(dim=-1).mean()  # rows without text do not count
    torch.testing.assert_close(readout.aux_loss, expected)
    (grad,) = torch.autograd.grad(readout.aux_loss, [model.layers["weight_1"]])
    assert bool(grad.any())
    for silent in (build(make_backbone(), norm_penalty=0.0).train(), build(make_backbone())):
        assert silent.step(silent.open(2), segment)[0].aux_loss is None
    assert model.step(state, segment, write=False)[0].aux_loss is None
    assert find_recipe("memoryprompt").aux_from == 0.0  # it is part of the loss from the start


def test_gradients_flow_through_turns_into_the_net_and_never_reach_the_backbone(make_backbone: Make) -> None:
    from memory_bench.driver.train import trained_parameters

    model = build(make_backbone()).train()
    trained = trained_parameters(model, find_recipe("tiny"))
    assert set(trained) == set(model.memory_parameters())
    state = model.open(2)
    for seed in range(3):
        readout, state = model.step(state, Segment.full(ids_of(L, seed=seed)))
        if not seed:
            first = state
    kept = torch.autograd.grad(readout.hidden.sum(), [first.kept])[0]
    assert bool(kept.any())


def test_a_text_of_one_segment_can_be_trained_on_and_teaches_nothing(make_backbone: Make) -> None:
    model = build(make_backbone()).train()
    model.backbone.requires_grad_(False)
    readout, _ = model.step(model.open(2), Segment.full(ids_of(L)))
    readout.logprobs(ids_of(L)).sum().backward()
    assert not any(bool(p.grad.any()) for p in model.parameters() if p.grad is not None)


def test_first_weights_are_those_of_the_official_initialiser(make_backbone: Make) -> None:
    model = MemoryPrompt(make_backbone(), MemoryPromptConfig(L, P, 64), torch.Generator().manual_seed(0))
    assert model.cell is not None
    assert float(model.layers["weight_1"].detach().abs().max()) <= 1e-4 * (6 / (D + 64)) ** 0.5
    assert float(model.layers["weight_1"].detach().std()) == pytest.approx(1e-4 * (2 / (D + 64)) ** 0.5, rel=0.1)
    assert not model.layers["bias_2"].detach().any()
    for p in model.cell.parameters():
        assert float(p.detach().abs().max()) == pytest.approx((P * D) ** -0.5, rel=0.05)


@pytest.mark.parametrize("allowed", [None, 10**9, 50_000_000, 5_000_000, 342_144, 342_143, 60_000, 4_000, 100, 0])
def test_fit_keeps_within_added_parameters(allowed: int | None, make_backbone: Make, make_card: Any) -> None:
    backbone = make_backbone()
    small: BackboneCard = make_card(backbone)
    for card in (small, replace(small, width=128), replace(small, width=576), replace(small, width=768)):
        config = MemoryPrompt.fit(card, Budget("x", added_parameters=allowed))
        size = added(card.width, config.prompt_tokens, config.width) if config.prompt_tokens else 0
        assert size <= (10**12 if allowed is None else allowed)
        if card is small:
            model = MemoryPrompt(backbone, config, torch.Generator().manual_seed(0))
            assert model.added_parameters() == size
    if allowed is None:
        assert (config.prompt_tokens, config.width) == (5, 1024)
        assert size == 76_578_816
    if allowed == 5_000_000:  # the most vectors come first, then the widest layers
        assert (config.prompt_tokens, config.width) == (1, 512)


def test_sizes_that_do_not_fit_are_refused(make_backbone: Make, make_card: Any) -> None:
    wrong: dict[str, Any]
    for wrong in ({"segment": 0}, {"prompt_tokens": -1}, {"width": 0}, {"norm_penalty": -0.1}):
        with pytest.raises(UserError, match="memoryprompt: "):
            MemoryPromptConfig(**wrong)
    backbone = make_backbone("gpt2")
    with pytest.raises(UserError, match="use segment = 189 or less"):
        build(backbone, segment=190)
    fitted = MemoryPrompt.fit(make_card(backbone, window=1000), Budget("x"))
    assert (fitted.segment or 0) + fitted.prompt_tokens == 192
    anything = build(backbone, segment=None)
    assert anything.traits.segment is None
    assert MemoryPromptConfig.official() == MemoryPromptConfig()
