"""AutoCompressors: what a step feeds, padding, quirks as options, uneven segments; every rule broken once."""

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
from memory_bench.baselines import autocompressor
from memory_bench.baselines.autocompressor import AutoCompressor, AutoCompressorConfig
from memory_bench.baselines.official import replay_autocompressor
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.corpus import Line
from memory_bench.driver.stream import Watcher, walk
from memory_bench.errors import UserError
from memory_bench.parity.cases import Case, verify
from memory_bench.protocol import DecodePlan, Segment
from memory_bench.recipe import RECIPES, Recipe, Stage, find_recipe
from memory_bench.shipped import parity_folder

Make = Callable[..., Backbone]
L, K = 8, 3


def build(backbone: Backbone, **options: Any) -> AutoCompressor:
    config = AutoCompressorConfig(**{"segment": L, "summary_tokens": K, **options})
    return AutoCompressor(backbone, config, torch.Generator().manual_seed(1)).eval()


def ids_of(tokens: int, rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(2, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def read(model: AutoCompressor, *seeds: int, rows: int = 2) -> Any:
    state = model.open(rows)
    for seed in seeds:
        state = model.absorb(state, Segment.full(ids_of(L, rows, seed)))
    return state


@pytest.fixture(params=["llama", "gpt2", "opt", "opt-350m", "qwen3"])
def backbone(request: pytest.FixtureRequest, make_backbone: Make) -> Backbone:
    if request.param == "opt-350m":
        return make_backbone("opt", word_embed_proj_dim=24, do_layer_norm_before=False)
    return make_backbone(request.param)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_a_step_is_the_backbones_own_pass_over_summaries_text_and_prompts(kind: str, make_backbone: Make) -> None:
    model = build(make_backbone(kind))
    hf: Any = model.backbone.model
    state, ids = read(model, 1, 2), ids_of(L, seed=3)
    embeds = torch.cat([state.summaries, model.backbone.embed(ids), model.summary_embeddings.expand(2, -1, -1)], dim=1)
    places: dict[str, Any] = {}
    if kind != "llama":  # what has no position stands at one whose vector is zero
        table = hf.transformer.wpe.weight if kind == "gpt2" else hf.model.decoder.embed_positions.weight
        table[-1] = 0.0
        where = torch.cat([torch.full((2 * K,), 191), torch.arange(L), torch.full((K,), 191)])
        places = {"position_ids": where.expand(2, -1)}
    inner = hf.transformer if kind == "gpt2" else hf.model
    expected = inner(inputs_embeds=embeds, **places).last_hidden_state
    readout, after = model.step(state, Segment.full(ids))
    torch.testing.assert_close(readout.hidden, expected[:, 2 * K : 2 * K + L], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(after.summaries[:, -K:], expected[:, -K:], atol=1e-5, rtol=1e-4)
    assert torch.equal(after.summaries[:, : 2 * K], state.summaries)
    looked, same = model.step(state, Segment.full(ids), write=False)
    assert same is state
    torch.testing.assert_close(looked.hidden, readout.hidden)


@torch.no_grad()
def test_summaries_alone_link_segments(backbone: Backbone) -> None:
    last = Segment.full(ids_of(L, seed=9))
    alone = backbone.head(backbone.run(backbone.embed(last.ids), last.mask))
    model, plain, replaced = build(backbone), build(backbone, summary_tokens=0), build(backbone, accumulate=False)
    torch.testing.assert_close(plain.step(read(plain, 1, 2), last)[0].logits(), alone)
    first, second, both = (model.step(read(model, *s), last)[0].logits() for s in ((1, 2), (3, 2), (1, 2)))
    assert (first - second).abs().max() > 1e-3
    assert torch.equal(first, both)
    one, two = (replaced.step(read(replaced, *s), last)[0].logits() for s in ((2,), (1, 2)))
    torch.testing.assert_close(one, model.step(read(model, 2), last)[0].logits())
    assert (two - first).abs().max() > 1e-3
    assert read(replaced, 1, 2, 3).summaries.shape[1] == K


@pytest.mark.parametrize("accumulate", [True, False])
@torch.no_grad()
def test_rows_and_padding_do_not_matter(accumulate: bool, backbone: Backbone) -> None:
    model = build(backbone, accumulate=accumulate)
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
                ours = state.summaries[row][state.mask[row]]
                torch.testing.assert_close(ours, alone[row].summaries[0], atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_official_padding_is_summarised_and_read_with_a_cache(make_backbone: Make) -> None:
    empty = Segment(ids_of(L), torch.zeros(2, L, dtype=torch.bool))
    ragged = Segment(ids_of(L, seed=1), torch.arange(L).expand(2, -1) >= 3)
    for name, changes in (("write_padding", (0, K)), ("read_padding", (0, 0))):
        for official in (False, True):
            model = build(make_backbone(), **{name: official})
            assert model.absorb(model.open(2), empty).summaries.shape[1] == changes[official]
    clean, official = (build(make_backbone(), read_padding=on) for on in (False, True))
    a, b = (m.step(m.open(2), ragged)[0].logits()[:, 3:] for m in (clean, official))
    assert (a - b).abs().max() > 1e-2
    torch.testing.assert_close(b, official.step(official.open(2), Segment.full(ragged.ids))[0].logits()[:, 3:])


def test_the_first_summary_embeddings(make_backbone: Make) -> None:
    backbone = make_backbone("llama", eos_token_id=[5, 6])
    made = {
        name: build(backbone, summary_init=name, summary_tokens=40).summary_embeddings.detach()
        for name in ("random", "eos", "overwritten")
    }
    assert torch.equal(made["eos"], backbone.embed(torch.tensor([5])).expand(40, -1))
    assert float(made["random"].std()) == pytest.approx(backbone.embedding_scale(), rel=0.1)
    assert float(made["overwritten"].std()) == pytest.approx(0.02, rel=0.1)  # the configuration's initializer_range
    assert float(made["overwritten"].std(dim=0).min()) > 0  # not the rows that were meant to be alike
    assert AutoCompressorConfig.official().summary_init == "overwritten"
    with pytest.raises(UserError, match="names no end-of-text token"):
        build(make_backbone("llama", eos_token_id=None), summary_init="eos")
    assert build(make_backbone("opt"), summary_init="overwritten").summary_embeddings.shape == (K, 32)


@torch.no_grad()
def test_at_most_so_many_summaries_are_kept(make_backbone: Make) -> None:
    model, whole = build(make_backbone(), max_summaries=2 * K), build(make_backbone())
    assert model.traits.bounded
    assert not whole.traits.bounded
    state = read(model, 1, 2, 3)
    assert torch.equal(state.summaries[:, :K], read(model, 1, 2).summaries[:, K:])
    assert state.size() == read(model, 1, 2).size()
    assert model.flops(L, 9 * L) == model.flops(L, 2 * L) < whole.flops(L, 9 * L)


@torch.no_grad()
def test_generated_text_is_folded_and_summaries_are_read(make_backbone: Make) -> None:
    model = build(make_backbone("opt"))
    state, prompt = read(model, 1), Segment.full(ids_of(5, seed=2))
    folded, open_ended = (model.decode(state, prompt, DecodePlan(7, fold=fold)) for fold in (True, False))
    assert torch.equal(folded[:, :4], open_ended[:, :4])  # the token after the border comes from the text before it
    text = torch.cat([prompt.ids, folded[:, :3]], dim=1)
    again = model.decode(model.absorb(state, Segment.full(text)), Segment.full(folded[:, 3:4]), DecodePlan(3))
    assert torch.equal(folded[:, 4:], again)
    assert not torch.equal(folded, model.decode(model.open(2), prompt, DecodePlan(7)))


def test_config_and_fit(make_backbone: Make, make_card: Callable[..., BackboneCard]) -> None:
    wrong: dict[str, Any]
    for wrong in ({"segment": 0}, {"summary_tokens": -1}, {"max_summaries": 9}, {"summary_init": "eso"}):
        with pytest.raises(UserError):
            AutoCompressorConfig(**wrong)
    backbone = make_backbone("gpt2")
    with pytest.raises(UserError, match="use segment = 192 or less"):
        build(backbone, segment=193)
    assert AutoCompressor.fit(make_card(backbone, window=1000), Budget("x")).segment == 192
    large = replace(make_card(backbone), width=2560, window=1536, max_positions=2048)
    assert AutoCompressor.fit(large, Budget("x")).summary_tokens == 50
    few = AutoCompressor.fit(large, Budget("x", added_parameters=30_000))
    assert (few.summary_tokens, few.max_summaries) == (11, 220)
    assert not build(make_backbone()).config.max_summaries  # as the paper has it, unless a backbone sizes it


# Uneven segments


def test_lengths_are_drawn_for_every_step_alike_for_all_models() -> None:
    recipe = find_recipe("autocompressor")
    drawn = [[next(lengths) for _ in range(200)] for lengths in (recipe.lengths(64, 0, s) for s in (0, 1)) if lengths]
    assert {*drawn[0]} <= set(range(32, 65))
    assert (min(drawn[0]), max(drawn[0])) == (32, 64)
    assert drawn[0] != drawn[1]
    again, other = recipe.lengths(64, 0, 1), recipe.lengths(64, 1, 1)
    assert again is not None
    assert other is not None
    assert [next(again) for _ in range(200)] == drawn[1] != [next(other) for _ in range(200)]
    assert all(r.lengths(64, 0, 0) is None for r in RECIPES.values() if "autocompressor" not in r.name)
    official = replace(recipe, shortest=0.0).lengths(64, 0, 0)
    assert official is not None
    assert min(next(official) for _ in range(2000)) == 2
    with pytest.raises(UserError, match="shortest must be a share from 0 to 1"):
        Recipe("odd", (Stage(1, 1),), lr=1.0, shortest=2.0)


class Lengths(Watcher):
    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def stepped(self, model: Any, rows: int, tokens: int, before: int, real: int, *, absorbed: bool = False) -> None:
        self.seen.append((before, tokens))


def test_uneven_segments_score_every_token_once_and_cut_gradients_where_the_recipe_says(make_backbone: Make) -> None:
    model, watcher = build(make_backbone()).train(), Lengths()
    lines = [Line(ids_of(n, rows=1, seed=n)[0], torch.arange(n) > 0) for n in (20, 13)]
    pieces = list(walk(model, lines, lengths=iter([7, 3, 5, 2, 8]), watcher=watcher))
    assert watcher.seen == [(0, 7), (7, 3), (10, 5), (15, 2), (17, 3)]
    assert sum(int(p.scored.sum()) for p in pieces) == 19 + 12
    by_hand, state = [], model.open(1)
    for start, end in ((0, 7), (7, 10), (10, 15), (15, 17), (17, 20)):
        readout, state = model.step(state, Segment.full(lines[0].ids[None, start:end]))
        by_hand.append(readout.logits())
    expected = torch.cat(by_hand, dim=1)[0, :-1].log_softmax(dim=-1).gather(1, lines[0].ids[1:, None]).sum()
    ours = torch.stack([p.nll[p.lines.index(0)].sum() for p in pieces]).sum()
    torch.testing.assert_close(-ours, expected, atol=1e-3, rtol=1e-4)
    for every, flows in ((2, False), (3, True)):
        pieces = list(walk(model, lines[:1], lengths=iter([7, 3, 5, 2, 8]), detach_every=every))
        (grad,) = torch.autograd.grad(pieces[2].nll[:, 1:].sum(), [model.summary_embeddings], allow_unused=True)
        assert (grad is not None and bool(grad.any())) == flows


RUN = "hidden = backbone.run(embeds, seen, positions=self._positions(seen, text), text=text)"
MUTANTS = {
    "summaries in front of the newest": (
        "[state.summaries, written]",
        "[written, state.summaries]",
        "llama-accumulate",
    ),
    "only the last stay": ("state.mask if self.config.accumulate else", "", "llama-accumulate"),
    "all stay": ("if self.config.accumulate else", "if True else", "opt-replace-generate"),
    "summaries have positions": (".masked_fill(~text, NOWHERE)", "", "opt-substeps"),
    "positions count text alone": ("self.backbone.positions(seen)", "self.backbone.positions(text)", "llama-gqa"),
    "summaries are detached": ("hidden[:, slots + tokens :]", "hidden[:, slots + tokens :].detach()", "llama-gqa"),
    "summaries of the text": ("hidden[:, slots + tokens :]", "hidden[:, slots + tokens - 1 : -1]", "llama-gqa"),
    "before the final norm": (RUN, RUN.replace("text=text)", "text=text) * 1.02"), "opt-replace-generate"),
}


@pytest.mark.parametrize("flaw", ["", *MUTANTS])
def test_every_rule_that_is_broken_fails_a_case(flaw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, name = MUTANTS.get(flaw, ("", "", "llama-accumulate"))
    case = Case(parity_folder() / f"autocompressor-{name}")
    if not case.folder.is_dir():
        pytest.skip("the case is not shipped here")
    source = inspect.getsource(autocompressor)
    assert not old or source.count(old) == 1, old
    mutant = ModuleType("mutant")
    monkeypatch.setitem(sys.modules, "mutant", mutant)
    exec(compile(source.replace(old, new) if old else source, "mutant.py", "exec"), mutant.__dict__)
    monkeypatch.setattr(replay_autocompressor, "AutoCompressor", mutant.AutoCompressor)
    verdict = verify(case, replay_autocompressor.replay)
    assert verdict.ok == (flaw == ""), verdict.detail
    assert not verdict.skipped  # it ran to its end
