"""Infini-attention: its equations by hand, what each option does, who looks ahead; every rule broken once."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memory_bench.backbone.model import Backbone
from memory_bench.baselines import infini_attention
from memory_bench.baselines.infini_attention import (
    CompressiveMemory,
    InfiniAttention,
    InfiniAttentionConfig,
    Memory,
    feature,
)
from memory_bench.baselines.official import replay_infini_attention
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.errors import UserError
from memory_bench.parity.cases import Case, verify
from memory_bench.protocol import Segment
from memory_bench.shipped import parity_folder, parity_text
from memory_bench.testing import measure_look_ahead

Make = Callable[..., Backbone]
L = 8


def build(backbone: Backbone, **options: Any) -> InfiniAttention:
    config = InfiniAttentionConfig(**{"segment": L, **options})
    return InfiniAttention(backbone, config, torch.Generator()).eval()


def ids_of(tokens: int, rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(2, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def read(model: InfiniAttention, *seeds: int) -> Any:
    state = model.open(2)
    for seed in seeds:
        state = model.absorb(state, Segment.full(ids_of(L, seed=seed)))
    return state


def layer_of(backbone: Backbone, **options: Any) -> CompressiveMemory:
    return CompressiveMemory(backbone, InfiniAttentionConfig(segment=L, **options))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_reading_and_writing_are_the_papers_equations(update: str, make_backbone: Make) -> None:
    layer = layer_of(make_backbone(), update=update).double()  # 4 heads of 8, 2 of keys and values
    layer.gate.data = drawn(4, seed=5)
    q, k, v, local = drawn(1, 4, 5, 8), drawn(1, 2, 5, 8, seed=1), drawn(1, 2, 5, 8, seed=2), drawn(1, 5, 32, seed=3)
    m, z = drawn(1, 2, 8, 8, seed=4), drawn(1, 2, 8, seed=6).exp()
    before = Memory(m, z, torch.tensor([True]))
    mask = torch.tensor([[True, True, False, True, True]])
    after, got = layer.write(k, v, before, mask), layer.read(q, local, before)
    for head in range(4):
        own = head // 2
        for t in range(5):
            s = F.elu(q[0, head, t]) + 1
            found, g = s @ m[0, own] / (s @ z[0, own]), layer.gate[head].sigmoid()
            expected = g * found + (1 - g) * local[0, t, 8 * head : 8 * head + 8]
            torch.testing.assert_close(got[0, t, 8 * head : 8 * head + 8], expected)
    for own in range(2):
        new, total = m[0, own].clone(), z[0, own].clone()
        for t in (0, 1, 3, 4):
            s = F.elu(k[0, own, t]) + 1
            known = s @ m[0, own] / (s @ z[0, own]) if update == "delta" else 0.0
            new, total = new + torch.outer(s, v[0, own, t] - known), total + s
        torch.testing.assert_close(after.matrix[0, own], new)
        torch.testing.assert_close(after.normaliser[0, own], total)


def test_the_delta_rule_adds_nothing_that_is_known(make_backbone: Make) -> None:
    layer, k, mask = layer_of(make_backbone(), update="delta"), drawn(1, 2, 1, 8), torch.ones(1, 1, dtype=torch.bool)
    empty = Memory(torch.zeros(1, 2, 8, 8).double(), torch.zeros(1, 2, 8).double(), torch.tensor([False]))
    once = layer.write(k, drawn(1, 2, 1, 8, seed=1), empty, mask)
    twice = layer.write(k, drawn(1, 2, 1, 8, seed=1), once, mask)
    torch.testing.assert_close(once.matrix, twice.matrix)
    assert bool((twice.normaliser > once.normaliser).all())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen3", "smollm3-window"])
def test_a_closed_gate_or_a_first_segment_is_the_backbone(kind: str, make_backbone: Make) -> None:
    last = Segment.full(ids_of(L, seed=9))
    opened, closed = build(make_backbone(kind)), build(make_backbone(kind), gate_init=-1e4)
    alone = opened.backbone.head(opened.backbone.run(opened.backbone.embed(last.ids), last.mask))
    torch.testing.assert_close(opened.step(opened.open(2), last)[0].logits(), alone)
    torch.testing.assert_close(closed.step(read(closed, 1, 2), last)[0].logits(), alone)
    first, second = (opened.step(read(opened, *s), last)[0].logits() for s in ((1, 2), (3, 2)))
    assert min((first - alone).abs().max(), (first - second).abs().max()) > 1e-3


@torch.no_grad()
def test_the_first_layers_additions_commute(make_backbone: Make) -> None:
    model = build(make_backbone())
    a, b = (read(model, *order).memories[0] for order in ((1, 2, 3), (3, 1, 2)))
    torch.testing.assert_close(a.matrix, b.matrix)
    torch.testing.assert_close(a.normaliser, b.normaliser)
    assert read(model, 1).size() == read(model, 1, 2, 3).size()


@pytest.mark.parametrize("options", [{}, {"update": "delta"}, {"epsilon": 0.0, "gate_empty": True}])
@torch.no_grad()
def test_rows_and_padding_do_not_matter(options: dict[str, Any], make_backbone: Make) -> None:
    model = build(make_backbone(), **options)
    for side in ("left", "right"):
        state, alone = model.open(3), [model.open(1) for _ in range(3)]
        for s, lengths in enumerate(([8, 3, 0], [8, 0, 5], [2, 8, 8])):
            ids, mask = ids_of(L, rows=3, seed=s), torch.zeros(3, L, dtype=torch.bool)
            places = [slice(0, n) if side == "right" else slice(L - n, L) for n in lengths]
            for row, place in enumerate(places):
                mask[row, place] = True
            readout, state = model.step(state, Segment(ids, mask))
            for row, place in enumerate(places):
                if lengths[row]:
                    single, alone[row] = model.step(alone[row], Segment.full(ids[row : row + 1, place]))
                    torch.testing.assert_close(
                        readout.logits()[row : row + 1, place], single.logits(), atol=1e-4, rtol=1e-3
                    )
                for (_, ours), (_, theirs) in zip(state.tensors(), alone[row].tensors(), strict=True):
                    torch.testing.assert_close(ours[row : row + 1], theirs, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_an_empty_memory_under_the_gate_scales_the_first_segment(make_backbone: Make) -> None:
    clean, gated = build(make_backbone()), build(make_backbone(), gate_empty=True)
    first = Segment.full(ids_of(L))
    a, b = (m.step(m.open(2), first)[0].logits() for m in (clean, gated))
    assert (a - b).abs().max() > 1e-2
    local = drawn(2, L, 32).float()
    q, memory = drawn(2, 4, L, 8).float(), gated.open(2).memories[0]
    torch.testing.assert_close(gated.layers[0].read(q, local, memory), 0.5 * local)  # type: ignore[operator]
    assert torch.equal(clean.layers[0].read(q, local, memory), local)  # type: ignore[operator]


@torch.no_grad()
def test_memories_are_float32_beside_a_bfloat16_backbone(make_backbone: Make) -> None:
    model = build(make_backbone().to(torch.bfloat16))
    readout, _ = model.step(read(model, 1, 2), Segment.full(ids_of(L)))
    assert readout.logits().dtype == torch.bfloat16
    assert {t.dtype for name, t in read(model, 1).tensors() if "written" not in name} == {torch.float32}


def test_gradients_reach_gates_and_empty_memories_give_none_that_is_not_finite(make_backbone: Make) -> None:
    for options in ({"update": "delta"}, {"epsilon": 0.0, "update": "delta"}):
        model, mask = build(make_backbone(), **options), torch.ones(2, L, dtype=torch.bool)
        mask[1] = False  # the second row stays empty for a segment
        state = model.absorb(model.open(2), Segment(ids_of(L), mask))
        state = model.absorb(state, Segment.full(ids_of(L, seed=1)))
        ids = ids_of(L, seed=2)
        model.step(state, Segment.full(ids))[0].logprobs(ids).sum().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.memory_parameters().values())
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


# Who looks ahead


def test_a_memory_handed_from_layer_to_layer_looks_ahead(make_backbone: Make) -> None:
    """MemLong's Gemma baseline (598fdf8): the next layer reads what the layer below has just written."""
    default, handed_on = build(make_backbone()), build(make_backbone(), handed_on=True)
    assert (default.traits.look_ahead, measure_look_ahead(default)) == (0, 0)
    assert handed_on.traits.look_ahead == measure_look_ahead(handed_on) == L - 1
    assert measure_look_ahead(build(make_backbone(), handed_on=True, gate_init=-100.0)) == 0  # as it is initialised
    assert len(handed_on.open(1).memories) == 1


@pytest.mark.parametrize("transposed", [True, False])
def test_heads_split_without_a_transpose_look_ahead(transposed: bool, make_backbone: Make) -> None:
    """dingo-actual's attention (08d0a12): `view` makes blocks of the sequence of what should be heads."""
    layer, heads, tokens = layer_of(make_backbone("llama", num_key_value_heads=4)), 4, 32

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2) if transposed else x.reshape(1, heads, tokens, -1)

    def output(x: Tensor) -> Tensor:
        memory = Memory(torch.zeros(1, 4, 8, 8).double(), torch.zeros(1, 4, 8).double(), torch.tensor([False]))
        q = k = v = split(x)
        parts = []
        for s in range(0, tokens, L):
            part = [t[:, :, s : s + L] for t in (q, k, v)]
            local = F.scaled_dot_product_attention(*part, is_causal=True).transpose(1, 2).flatten(2)
            mixed = layer.read(part[0], local, memory)
            joined = mixed.unflatten(-1, (heads, -1)).transpose(1, 2)
            parts.append(mixed if transposed else joined.reshape(1, L, -1))
            memory = layer.write(part[1], part[2], memory, torch.ones(1, L, dtype=torch.bool))
        return torch.cat(parts, dim=1)

    x, leaks = drawn(1, tokens, 32), 0
    with torch.no_grad():
        for t in range(1, tokens):
            other = x.clone()
            other[:, t] += 1
            leaks += bool((output(other) - output(x))[:, :t].abs().max() > 1e-6)
    assert (leaks == 0) == transposed


def test_config_and_fit(make_backbone: Make, make_card: Callable[..., BackboneCard]) -> None:
    wrong: dict[str, Any]
    for wrong in ({"segment": 0}, {"epsilon": -1.0}, {"update": "dleta"}):
        with pytest.raises(UserError):
            InfiniAttentionConfig(**wrong)
    card = make_card(make_backbone())
    assert InfiniAttention.fit(card, Budget("x")) == InfiniAttentionConfig(segment=8)
    assert InfiniAttention.fit(replace(card, pretrained=True), Budget("x")).gate_init == -3.0
    model = build(make_backbone())
    assert model.added_parameters() == 2 * 4
    assert torch.equal(feature(torch.tensor([0.0, 2.0])), torch.tensor([1.0, 3.0]))


def test_there_is_no_official_code_and_the_certificate_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    from memory_bench.command import commands
    from memory_bench.parity.cases import certificates

    folder = parity_folder() / "infini-attention-llama-empty-gated"
    if not folder.is_dir():
        pytest.skip("the case is not shipped here")
    case = Case(folder)
    verdict = verify(case, replay_infini_attention.replay)
    assert case.third_party
    assert case.source == "Beomi/InfiniTransformer@045f4eb (third party)"
    assert parity_text(certificates([verdict], {case.name: case.source})["infini-attention"]).endswith("(third party)")
    assert commands.verify([folder], write=False, as_json=False) == 0
    assert "(infini-attention, third party): largest" in capsys.readouterr().out
    mixed = {"cases": 1, "agree": 1, "max_abs": 0.0, "sources": [case.source, "them/selves@1234567"]}
    assert parity_text(mixed) == "exact"


MUTANTS = {
    "the gate weighs local attention": ("share * found + (1 - share) * local", "(1 - share) * found + share * local"),
    "written before it is read": ("local, before)", "local, memory.write(k, v, before, mask))"),
    "rotated queries": ("memory.read(q, local", "memory.read(backbone.rotate(q, turn[layer]), local"),
    "rotated keys": ("write(k, v, before", "write(backbone.rotate(k, turn_keys[layer]), v, before"),
    "no normaliser": ("torch.where(weight == 0, 1.0, weight)", "1.0"),
    "other features": ("F.elu(x) + 1", "F.relu(x) + 1"),
    "heads of a group apart": ("reshape(shared)", "unflatten(1, (-1, shared[1])).transpose(1, 2).reshape(shared)"),
    "no gradient through memory": ("memory.matrix + keys", "memory.matrix.detach() + keys"),
    "one normaliser a segment": ("memory.normaliser + keys.sum(dim=2)", "keys.sum(dim=2)"),
}  # fmt: skip


@pytest.mark.parametrize("flaw", ["", *MUTANTS])
def test_every_rule_that_is_broken_fails_a_case(flaw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(parity_folder() / "infini-attention-llama-linear")
    if not case.folder.is_dir():
        pytest.skip("the case is not shipped here")
    source, (old, new) = inspect.getsource(infini_attention), MUTANTS.get(flaw, ("", ""))
    assert not old or source.count(old) == 1, old
    mutant = ModuleType("mutant")
    monkeypatch.setitem(sys.modules, "mutant", mutant)
    exec(compile(source.replace(old, new) if old else source, "mutant.py", "exec"), mutant.__dict__)
    monkeypatch.setattr(replay_infini_attention, "InfiniAttention", mutant.InfiniAttention)
    verdict = verify(case, replay_infini_attention.replay)
    assert verdict.ok == (flaw == ""), verdict.detail
    assert not verdict.skipped  # it ran to its end
