"""ARMT: its update rule recomputed by hand, padding, peeking, options; every rule broken once against its case."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from memory_bench.backbone.model import Backbone
from memory_bench.baselines import armt
from memory_bench.baselines.armt import ARMT, ARMTConfig, dpfp
from memory_bench.baselines.official import replay_armt
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.errors import UserError
from memory_bench.parity.cases import Case, verify
from memory_bench.protocol import DecodePlan, Segment
from memory_bench.shipped import parity_folder

Make = Callable[..., Backbone]
L, M = 8, 3


def build(backbone: Backbone, *, stores: bool = True, **options: Any) -> ARMT:
    """A model whose value projections are drawn, unless it shall store nothing (as at the start of training)."""
    config = ARMTConfig(**{"segment": L, "memory_tokens": M, "associative_size": 16, **options})
    model = ARMT(backbone, config, torch.Generator().manual_seed(1)).eval()
    rng = torch.Generator().manual_seed(2)
    for p in model.memory_parameters().values() if stores else ():
        p.data += 0.2 * torch.randn(p.shape, generator=rng).to(p)
    return model


def ids_of(tokens: int, rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(2, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["llama", "gpt2", "opt", "opt-post-norm", "qwen3"])
def backbone(request: pytest.FixtureRequest, make_backbone: Make) -> Backbone:
    if request.param == "opt-post-norm":
        return make_backbone("opt", do_layer_norm_before=False)
    return make_backbone(request.param)


@pytest.mark.parametrize("nu", [1, 3, 8])
def test_features_are_products_with_rolled_copies(nu: int) -> None:
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    u = torch.cat([x.relu(), (-x).relu()], dim=-1)
    assert torch.equal(dpfp(x, nu), torch.cat([u * u.roll(r, -1) for r in range(1, nu + 1)], dim=-1))


def by_hand(model: ARMT, segments: list[Tensor], *, detached: bool = True) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Logits, matrices and normalisers from Hugging Face's own layers and sums over single tokens."""
    hf: Any = model.backbone.model
    own: Any = model.layers
    llama = model.backbone.family == "llama"
    decoder = hf.model if llama else hf.transformer
    a: list[Any] = [None] * len(own)
    z: list[Any] = [None] * len(own)
    logits = []
    for ids in segments:
        length = ids.shape[1] + M
        h = torch.cat([hf.get_input_embeddings()(ids), model.memory_tokens.expand(len(ids), -1, -1)], dim=1)
        where = torch.arange(length)[None]
        extra: dict[str, Any] = {"position_embeddings": decoder.rotary_emb(h, where)} if llama else {}
        if not llama:
            own_rows = [model.position_embeddings] if model.extended else [decoder.wpe.weight[length - M : length]]
            h = h + torch.cat([decoder.wpe.weight[: length - M], *own_rows])
        unseen = torch.full((1, 1, length, length), -torch.inf, dtype=h.dtype).triu(1)
        for n, block in enumerate(decoder.layers if llama else decoder.h):
            if a[n] is not None:
                phi = features(own[n].query(h))
                h = h + torch.einsum("btk,bkd->btd", phi, a[n]) / (
                    torch.einsum("btk,bk->bt", phi, z[n])[..., None] + 1e-5
                )
            out = block(h, attention_mask=unseen, **extra)
            h = out[0] if isinstance(out, tuple) else out
            old_a = torch.zeros(len(ids), 96, 32, dtype=h.dtype) if a[n] is None else a[n]
            old_z = torch.zeros(len(ids), 96, dtype=h.dtype) if z[n] is None else z[n]
            new_a, new_z = old_a, old_z
            for y in h[:, -M:].unbind(1):
                k, v, b = features(own[n].key(y)), own[n].value(y), own[n].gate(y).sigmoid()
                known = (k * old_z).sum(-1, keepdim=True) + 1e-5
                found = torch.einsum("bk,bkd->bd", k, old_a) / known
                g = (1 - known / (k.square().sum(-1, keepdim=True) + 1e-5)).clamp(0, 1)
                g = torch.ones_like(g) if a[n] is None or not model.config.correction else g
                new_a = new_a + torch.einsum("bk,bd->bkd", k, b * (v - found))
                new_z = new_z + (g.detach() if detached else g) * k
            a[n], z[n] = new_a, new_z
        last = decoder.norm(h) if llama else decoder.ln_f(h)
        logits.append(hf.lm_head(last[:, :-M]))
    return torch.cat(logits, dim=1), a, z


def features(x: Tensor) -> Tensor:
    u = torch.cat([x.relu(), (-x).relu()], dim=-1)
    return torch.cat([u * u.roll(r, -1) for r in (1, 2, 3)], dim=-1)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("llama", {"correction": False}),
        ("gpt2", {}),
        ("gpt2", {"extended_positions": True}),
    ],
)
def test_the_update_rule_recomputed_in_float64(kind: str, options: dict[str, Any], make_backbone: Make) -> None:
    model = build(make_backbone(kind), **options).double()
    segments = [ids_of(length, seed=s) for s, length in enumerate((L, L, L, 5))]
    state, parts = model.open(2), []
    for ids in segments:
        readout, state = model.step(state, Segment.full(ids))
        parts.append(readout.logits())
    got = torch.cat(parts, dim=1)
    expected, matrices, normalisers = by_hand(model, segments)
    for ours, theirs in zip(
        (got, *state.matrices, *state.normalisers), (expected, *matrices, *normalisers), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    own = [p for n, p in model.memory_parameters().items()]
    ours, theirs = (torch.autograd.grad(x.square().mean(), own, retain_graph=True) for x in (got, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)
    if not options:
        through = torch.autograd.grad(by_hand(model, segments, detached=False)[0].square().mean(), own)
        assert any((a - b).abs().max() > 0.01 * b.abs().max() for a, b in zip(through, theirs, strict=True))


READ = "            hidden = memory.read(hidden, *own) if reads else hidden\n"
CLOSE = "            hidden = backbone.close(layer, hidden, attended)\n"
WRITE = "memory.write(hidden[:, tokens:], own, ~state.written, real)"
MUTANTS = {
    "no delta rule": [("- stored)", "- 0 * stored)")],
    "gamma not detached": [(".clamp(0, 1).detach()", ".clamp(0, 1)")],
    "gate in the normaliser": [("(new * keys)", "(new * strength * keys)")],
    "no correction": [("if self.correction:", "if False:")],
    "rolled the other way": [("wrapped[..., nu - r : nu - r + size]", "u.roll(-r, -1)")],
    "no gate": [(".sigmoid()", ".sigmoid().clamp(1, 1)")],
    "read after the layer": [(READ, ""), (CLOSE, CLOSE + READ)],
    "written from the layer's input": [
        (CLOSE, f"            before = hidden\n{CLOSE}"),
        ("write(hidden", "write(before"),
    ],
    "written before it is read": [(READ, f"            own = {WRITE}\n{READ}")],
}


@pytest.mark.parametrize("flaw", ["", *MUTANTS])
def test_every_rule_that_is_broken_fails_the_case(flaw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(parity_folder() / "armt-gpt2")
    if not case.folder.is_dir():
        pytest.skip("the case is not shipped here")
    source = inspect.getsource(armt)
    for old, new in MUTANTS.get(flaw, []):
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    mutant = ModuleType("mutant")
    monkeypatch.setitem(sys.modules, "mutant", mutant)
    exec(compile(source, "mutant.py", "exec"), mutant.__dict__)
    monkeypatch.setattr(replay_armt, "ARMT", mutant.ARMT)
    verdict = verify(case, replay_armt.replay)
    assert verdict.ok == (flaw == ""), verdict.detail
    assert not verdict.skipped  # it ran to its end


@torch.no_grad()
def test_a_model_that_stores_nothing_is_the_backbone_on_segments(backbone: Backbone) -> None:
    model, state = build(backbone, stores=False), None
    stored, other = build(backbone), None
    for s in range(3):
        segment = Segment.full(ids_of(L, seed=s))
        alone = backbone.head(backbone.run(backbone.embed(segment.ids), segment.mask))
        readout, state = model.step(state or model.open(2), segment)
        torch.testing.assert_close(readout.logits(), alone)
        readout, other = stored.step(other or stored.open(2), segment)
        assert bool((readout.logits() - alone).abs().max() > 1e-2) == (s > 0)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_rows_and_padding_do_not_matter(side: str, backbone: Backbone) -> None:
    model = build(backbone)
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
                    readout.logits()[row : row + 1, place], single.logits(), rtol=1e-3, atol=1e-3
                )
            for (_, ours), (_, theirs) in zip(state.tensors(), alone[row].tensors(), strict=True):
                torch.testing.assert_close(ours[row : row + 1], theirs, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_official_padding_takes_positions_and_is_written(make_backbone: Make) -> None:
    ids, empty = ids_of(L), torch.zeros(2, L, dtype=torch.bool)
    for official in (False, True):
        model = build(make_backbone(), count_padding=official)
        _, state = model.step(model.open(2), Segment(ids, empty))
        assert bool(state.written.all()) == official
        assert bool(state.normalisers[0].any()) == official


@torch.no_grad()
def test_a_look_sees_the_same_without_memory_tokens(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(backbone)
    state = model.absorb(model.open(2), Segment.full(ids_of(L)))
    segment = Segment.full(ids_of(L, seed=1))
    expected = model.step(state, segment)[0].hidden
    lengths, attend = [], Backbone.attend

    def watched(self: Backbone, q: Tensor, *rest: Any) -> Tensor:
        lengths.append(q.shape[2])
        return attend(self, q, *rest)

    monkeypatch.setattr(Backbone, "attend", watched)
    looked, after = model.step(state, segment, write=False)
    assert after is state
    assert set(lengths) == {L}
    torch.testing.assert_close(looked.hidden, expected)


def test_gradients_flow_through_segments_unless_detached(make_backbone: Make) -> None:
    model = build(make_backbone())
    state = model.open(2)
    for s in range(3):
        state = model.absorb(state, Segment.full(ids_of(L, seed=s)))
    ids = ids_of(L, seed=3)
    for given, flows in ((state, True), (state.detach(), False)):
        loss = model.step(given, Segment.full(ids), write=False)[0].logprobs(ids).sum()
        grads = torch.autograd.grad(loss, [model.memory_tokens], allow_unused=True, retain_graph=True)
        assert (grads[0] is not None and bool(grads[0].any())) == flows


@torch.no_grad()
def test_associations_are_float32_beside_a_bfloat16_backbone(make_backbone: Make) -> None:
    model = build(make_backbone().to(torch.bfloat16))
    readout, state = model.step(model.absorb(model.open(2), Segment.full(ids_of(L))), Segment.full(ids_of(L)))
    assert readout.logits().dtype == torch.bfloat16
    assert {t.dtype for t in (*state.matrices, *state.normalisers)} == {torch.float32}
    assert state.size() == model.absorb(model.open(2), Segment.full(ids_of(L))).size()


@torch.no_grad()
def test_positions_of_their_own_leave_the_whole_table_to_the_text(make_backbone: Make) -> None:
    backbone = make_backbone("gpt2", n_positions=L)
    with pytest.raises(UserError, match="use segment = 5 or less"):
        build(backbone)
    model = build(backbone, extended_positions=True)
    state = model.absorb(model.open(1), Segment.full(ids_of(L, rows=1)))
    assert model.decode(state, Segment.full(ids_of(3, rows=1)), DecodePlan(L)).shape == (1, L)
    with pytest.raises(UserError, match="for GPT-2 only"):
        build(make_backbone(), extended_positions=True)
    config = replace(ARMTConfig.official(), segment=4, memory_tokens=M)
    assert [ARMT(make_backbone(f), config, torch.Generator()).extended for f in ("gpt2", "opt", "llama")] == [
        True,
        False,
        False,
    ]


def test_layers_wider_than_the_embedding_are_refused(make_backbone: Make) -> None:
    with pytest.raises(UserError, match="embeddings as wide as the layers"):
        build(make_backbone("opt", word_embed_proj_dim=24, do_layer_norm_before=False))


def test_config_and_fit(make_backbone: Make, make_card: Callable[..., BackboneCard]) -> None:
    for wrong in ({"segment": 0}, {"memory_tokens": -1}, {"associative_size": 0}, {"nu": 0}):
        with pytest.raises(UserError):
            ARMTConfig(**wrong)
    backbone = make_backbone("gpt2")
    small = ARMT.fit(make_card(backbone, window=1000), Budget("x"))
    assert (small.memory_tokens, small.associative_size) == (4, 32)
    assert small.segment + small.memory_tokens == backbone.max_positions
    large = replace(make_card(backbone), width=576, layers=30, max_positions=None)
    assert ARMT.fit(large, Budget("x")) == ARMTConfig(segment=8)
    for limit in (11_000_000, 10_500_000):
        config = ARMT.fit(large, Budget("x", added_parameters=limit))
        added = 10 * 576 + 30 * (2 * 576 * config.associative_size + 576**2 + 576 + 1)
        assert added <= limit < added + 30 * 2 * 576 or config.associative_size == 16
    built = build(make_backbone(), stores=False, associative_size=20)
    added = sum(p.numel() for p in built.memory_parameters().values())
    assert added == M * 32 + 2 * (2 * 32 * 20 + 32**2 + 32 + 1)


@torch.no_grad()
def test_without_memory_tokens_nothing_is_remembered(make_backbone: Make) -> None:
    model = build(make_backbone(), memory_tokens=0)
    readout, state = model.step(model.open(2), Segment.full(ids_of(L)))
    assert not state.written.any()
    assert readout.logits().isfinite().all()
