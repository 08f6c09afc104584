"""Memorizing Transformer: search, store, fusion, training regimes, reference cases that can fail, and real text."""

import gzip
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from platformdirs import user_cache_path
from safetensors.torch import load_file, save_file
from torch import Tensor

from memory_bench import plugins
from memory_bench.baselines import memorizing
from memory_bench.baselines.memorizing import Memorizing, MemorizingConfig
from memory_bench.baselines.parts import knn
from memory_bench.baselines.parts.ring import Ring
from memory_bench.baselines.xl_cache import XLCache, XLCacheConfig
from memory_bench.budget import PRESETS, Budget
from memory_bench.corpus import TextCorpus
from memory_bench.data import Library
from memory_bench.driver.meter import Meter
from memory_bench.driver.stream import line_nll
from memory_bench.driver.train import train
from memory_bench.errors import UserError
from memory_bench.parity.cases import Case, find_cases, verify
from memory_bench.protocol import Readout, Segment
from memory_bench.recipe import Recipe, Stage, find_recipe
from memory_bench.shipped import parity_folder
from memory_bench.testing import card_of, check_model, tiny_backbone
from memory_bench.testing.measures import random_text, read
from memory_bench.zoo.gguf import REVISION
from memory_bench.zoo.named import Backbones, Loaded

L = 8
RNG = torch.Generator()


def build(kind: str = "llama", **options: Any) -> Memorizing:
    config = MemorizingConfig(**{"segment": L, "slots": 64, "top_k": 4, **options})
    return Memorizing(tiny_backbone(kind), config, RNG).eval()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Search and attention.


def one_by_one(
    q: Tensor, keys: Tensor, values: Tensor, k: int, valid: Tensor | None, local: knn.Local | None, chunk: int = 1
) -> Tensor:
    """The definition: for one query after the other, sort, take the best chunks, one softmax."""
    out = torch.zeros_like(q)
    for r, h, t in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        head = h * keys.shape[1] // q.shape[1]
        own, stored = keys[r, head], values[r, head]
        means = own.unflatten(0, (-1, chunk)).mean(dim=1)
        usable = [i for i in range(len(means)) if valid is None or valid[r, i]]
        best = sorted(usable, key=lambda i: -float(means[i] @ q[r, h, t]))[:k]
        slots = [i * chunk + j for i in best for j in range(chunk)]
        logits, entries = own[slots] @ q[r, h, t], stored[slots]
        if local is not None:
            assert local.visible is not None
            seen = local.visible.expand(*q.shape[:3], -1)[r, h, t]
            logits = torch.cat([logits, local.keys[r, head][seen] @ local.q[r, h, t]])
            entries = torch.cat([entries, local.values[r, head][seen]])
        out[r, h, t] = logits.softmax(0) @ entries
    return out


@pytest.mark.parametrize("dense", [0, 64], ids=["gathered", "dense"])
@pytest.mark.parametrize("block", [200, 1 << 20], ids=["blocks", "whole"])
@pytest.mark.parametrize("joint", [False, True], ids=["own", "joint"])
def test_attention_to_the_best_entries(dense: int, block: int, joint: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "DENSE", dense)
    monkeypatch.setattr(knn, "BLOCK", block)
    q, keys, values = drawn(2, 4, 5, 8), drawn(2, 2, 24, 8, seed=1), drawn(2, 2, 24, 8, seed=2)
    valid = drawn(2, 24, seed=3) > 0
    visible = torch.ones(5, 9, dtype=torch.bool).tril(4)[None, None]
    local = knn.Local(drawn(2, 4, 5, 8, seed=4), drawn(2, 2, 9, 8, seed=5), drawn(2, 2, 9, 8, seed=6), visible)
    for k in (3, 24, 40):
        for mask in (None, valid):
            got = knn.retrieve_and_attend(q, keys, values, k, valid=mask, local=local if joint else None)
            torch.testing.assert_close(got, one_by_one(q, keys, values, k, mask, local if joint else None))
    index = knn.search(q, keys.unflatten(2, (-1, 4)).mean(dim=3), 2, valid[:, :6])
    got = knn.attend_retrieved(q, keys, values, index, chunk=4, valid=valid[:, :6])
    torch.testing.assert_close(got, one_by_one(q, keys, values, 2, valid[:, :6], None, chunk=4))


@pytest.mark.parametrize("dense", [0, 64], ids=["gathered", "dense"])
def test_blocks_have_the_gradients_of_the_whole(dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "DENSE", dense)
    found = []
    for block in (200, 1 << 20):
        monkeypatch.setattr(knn, "BLOCK", block)
        q, near, values = (drawn(1, 2, 6, 4, seed=s).requires_grad_() for s in range(3))
        local = knn.Local(q, near, values)
        out = knn.retrieve_and_attend(q, drawn(1, 2, 20, 4, seed=7), drawn(1, 2, 20, 4, seed=8), 3, local=local)
        found.append(torch.autograd.grad(out.square().sum(), (q, near, values)))
    torch.testing.assert_close(found[0], found[1])
    assert all(bool(g.any()) for g in found[0])


def test_a_bucket_has_one_winner_and_ties_are_averaged() -> None:
    keys = torch.zeros(1, 1, 6, 2)
    keys[0, 0, :, 0] = torch.tensor([1.0, 5.0, 3.0, 4.0, 1.0, 2.0])  # buckets of k = 2: slots 0 2 4 and 1 3 5
    keys[0, 0, 4, 0] = 3.0  # ties with slot 2
    values, q = torch.arange(6.0)[None, None, :, None].expand(1, 1, 6, 2), torch.tensor([[[[1.0, 0.0]]]])
    shares = knn.bucket_shares(knn.products(q, keys), 2)[0, 0, 0]
    torch.testing.assert_close(shares, torch.tensor([[0, 1], [0.5, 0], [0.5, 0]]))
    got = knn.retrieve_and_attend(q, keys, values, 2, bucketed=True)[0, 0, 0, 0]
    weights = torch.tensor([3.0, 5.0]).softmax(0)
    torch.testing.assert_close(got, weights @ torch.tensor([3.0, 1.0]))


def test_a_query_that_sees_nothing_gets_nothing() -> None:
    q, keys, values = drawn(1, 2, 3, 4), drawn(1, 1, 3, 4, seed=1), drawn(1, 1, 3, 4, seed=2)
    strict = torch.ones(3, 3, dtype=torch.bool).tril(-1)[None, None]
    for visible in (strict, torch.zeros(3, 3).masked_fill(~strict, -torch.inf)):
        got = knn.window_attention(q, keys, values, visible)
        assert not got[:, :, 0].any()
        torch.testing.assert_close(got[:, :, 1], values[:, :, 0].expand(1, 2, 4))


# The store.


def test_the_ring_holds_the_newest_real_tokens() -> None:
    ring = Ring.empty(1, (2, 1, 1), 5, torch.zeros(1))
    said: list[list[float]] = [[], []]
    for step, lengths in enumerate(([3, 0], [3, 2], [1, 3], [3, 3], [0, 0])):
        mask = torch.arange(3) >= 3 - torch.tensor(lengths)[:, None]
        entries = (10.0 * step + torch.arange(6.0)).view(2, 1, 3, 1)
        before = [t.clone() for _, t in ring.tensors()]
        after = ring.write([entries], [-entries], mask)
        assert all(torch.equal(a, b) for a, (_, b) in zip(before, ring.tensors(), strict=True)), "changed in place"
        ring = after
        for row in range(2):
            said[row] += entries[row, 0, :, 0][mask[row]].tolist()
            held = {i % 5: x for i, x in enumerate(said[row])}  # token t is in slot t mod 5
            assert ring.keys[0][row, 0, :, 0].tolist() == [held.get(i, 0.0) for i in range(ring.slots)]
            newest = {i % 5: i >= len(said[row]) - 2 for i in range(len(said[row]))}
            wanted = [i in held and not newest[i] for i in range(ring.slots)]
            assert ring.valid(exclude=2)[row].tolist() == wanted
    torch.testing.assert_close(ring.values[0], -ring.keys[0])
    emptied = ring.reset(torch.tensor([True, False]))
    assert emptied.written.tolist() == [0, 8]
    assert not emptied.keys[0][0].any()
    assert torch.equal(emptied.keys[0][1], ring.keys[0][1])


def test_a_write_longer_than_the_ring_keeps_its_end() -> None:
    entries = torch.arange(7.0).view(1, 1, 7, 1)
    ring = Ring.empty(1, (1, 1, 1), 4, entries).write([entries], [entries], torch.ones(1, 7, dtype=torch.bool))
    assert ring.keys[0].flatten().tolist() == [4.0, 5.0, 6.0, 3.0]


# The model.

CONFIGS: dict[str, dict[str, Any]] = {
    "gate, window of all kinds": {"xl_cache": 8, "sinks": 2, "memory_position": "query"},
    "bucketed, normalised, without the recent": {
        "normalise": True,
        "search": "bucketed",
        "top_k": 8,
        "layers": (0, 1),
        "slots": 32,
        "xl_cache": 4,
        "exclude_recent": True,
    },
    "official": {"xl_cache": 8, "slots": 32, "top_k": 8},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_way_keeps_the_promises(name: str) -> None:
    start = MemorizingConfig.official() if name == "official" else MemorizingConfig(slots=64, top_k=4)
    config = replace(start, segment=L, **CONFIGS[name])
    check_model(lambda: Memorizing(tiny_backbone("llama"), config, RNG))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_memory_of_everything_is_the_full_context(kind: str) -> None:
    """Without positions, one softmax over window and all that was written is ordinary attention."""
    model = build(kind, fusion="joint", layers=(0, 1), top_k=64)
    model.backbone.rotary = False
    if kind == "qwen3":
        model.backbone.key_shift = torch.nn.ParameterList()  # would mix the keys across a segment border
    text = random_text(model, 2, 4 * L)
    logits, state = read(model, model.open(2), text)
    full = model.backbone.head(model.backbone.run(model.backbone.embed(text), torch.ones_like(text, dtype=torch.bool)))
    torch.testing.assert_close(logits, full)
    assert state.store.slots == 4 * L


@torch.no_grad()
def test_without_memory_it_is_the_window_or_the_cache() -> None:
    off, text = build(top_k=0), random_text(build(), 2, 3 * L)
    alone = [
        off.backbone.head(off.backbone.run(off.backbone.embed(t), torch.ones_like(t).bool())) for t in text.split(L, 1)
    ]
    torch.testing.assert_close(read(off, off.open(2), text)[0], torch.cat(alone, dim=1))
    assert not off.memory_parameters()
    assert not off.open(2).store.keys
    cached = XLCache(tiny_backbone("llama"), XLCacheConfig(segment=L), RNG).eval()
    expected, _ = read(cached, cached.open(2), text)
    for shut in (build(top_k=0, xl_cache=L), build(xl_cache=L, gate_init=-40.0)):
        torch.testing.assert_close(read(shut, shut.open(2), text)[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "opt"])
@pytest.mark.parametrize("fusion", ["gate", "joint"])
def test_memory_reaches_back_as_far_as_the_slots(kind: str, fusion: str) -> None:
    model = build(kind, fusion=fusion, slots=2 * L, layers=(1,))
    text = random_text(model, 1, 4 * L)
    expected = read(model, model.open(1), text)[0][:, -L:]
    for segment, matters in ((0, False), (1, True), (2, True)):  # the fourth sees the two before it
        other = text.clone()
        other[:, segment * L : (segment + 1) * L] = random_text(model, 1, L, seed=9)
        moved = (read(model, model.open(1), other)[0][:, -L:] - expected).abs().max()
        assert (moved > 1e-4) == matters


@torch.no_grad()
def test_sinks_stay_in_the_window() -> None:
    model = build(top_k=0, sinks=2)
    text = random_text(model, 1, 5 * L)
    _, state = read(model, model.open(1), text[:, :-L])
    assert state.window is not None
    ids = torch.cat([text[:, :2], text[:, -L:]], dim=1)
    hidden = model.backbone.run(model.backbone.embed(ids), torch.ones_like(ids, dtype=torch.bool))
    last = model.step(state, Segment.full(text[:, -L:]))
    torch.testing.assert_close(last[0].logits(), model.backbone.head(hidden)[:, 2:])
    assert last[1].window is state.window, "full sinks are shared, not copied"


def test_no_gradient_goes_into_the_store() -> None:
    model = build(layers=(0, 1), xl_cache=4).train()
    text = random_text(model, 1, 2 * L)
    _, state = model.step(model.open(1), Segment.full(text[:, :L]))
    assert not any(t.requires_grad for _, t in state.tensors())
    readout, _ = model.step(state, Segment.full(text[:, L:]))
    readout.logits().square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.memory_gate.values())


def test_it_sizes_itself() -> None:
    tiny = card_of(tiny_backbone("llama"), window=32)
    large = replace(tiny, width=576, layers=30, window=512)
    small = Memorizing.fit(tiny, PRESETS["cpu-minutes"])
    assert (small.layers, small.gate_init, small.memory_position, small.xl_cache) == (None, -4.0, "constant", 0)
    scratch = Memorizing.fit(replace(tiny, rotary=False), PRESETS["cpu-minutes"])
    assert (scratch.layers, scratch.fusion, scratch.memory_position, scratch.slots) == ((0, 1), "joint", "none", 4096)
    paper = Memorizing.fit(replace(large, pretrained=True), PRESETS["gpu-24g-hour"])
    assert (paper.layers, paper.fusion, paper.gate_init, paper.xl_cache) == (None, "gate", -4.0, 512)
    assert Memorizing.fit(large, PRESETS["gpu-24g-hour"]).gate_init == 0.0
    free = Memorizing.fit(replace(large, pretrained=True), PRESETS["cpu-smol"])
    assert (free.layers, free.fusion, free.memory_position) == (tuple(range(15, 30)), "joint", "constant")
    assert (free.sinks, free.top_k, free.xl_cache) == (4, 32, 0)
    learned = Memorizing.fit(replace(large, pretrained=True, max_positions=512), PRESETS["cpu-smol"])
    assert learned.segment + learned.sinks == 512
    cramped = Memorizing.fit(replace(large, pretrained=True), Budget("cramped", train_tokens=0, device_bytes=10**7))
    assert 15 * 2 * 4 * cramped.slots * large.kv_heads * large.head_width <= 10**6


@pytest.mark.parametrize(("layers", "chosen"), [(12, 8), (24, 17), (32, 23), (2, 1), (1, 0)])
def test_the_paper_s_layer(layers: int, chosen: int) -> None:
    assert memorizing.memory_layers(MemorizingConfig(), layers) == (chosen,)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"fusion": "gates"}, "Did you mean gate"),
        ({"search": "bucketed", "top_k": 5}, "multiple of top_k"),
        ({"layers": (7,)}, "layers 0 to 1"),
        ({"exclude_recent": True, "xl_cache": 64}, "nothing to retrieve"),
        ({"slots": 0}, "at least 1"),
        ({"memory_distance": -5}, "cannot be negative"),
    ],
)
def test_mistakes_are_sentences(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build(**options)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [("gate_init", math.nan, "give a finite number"), ("layers", 99, r"give a list, such as \[99\]")],
)
def test_values_of_no_use_are_sentences(name: str, value: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        plugins.configure("memorizing", MemorizingConfig(), {name: value})


def test_learned_positions_cannot_be_moved() -> None:
    with pytest.raises(UserError, match="xl_cache = 0"):
        build("gpt2", xl_cache=8)
    with pytest.raises(UserError, match="at most 190"):
        build("opt", sinks=2, segment=192)


# Training.


def moved(recipe: Recipe) -> tuple[float, float]:
    """How far one optimiser step took the gate, and a weight of the backbone."""
    backbone = tiny_backbone("llama")
    config = MemorizingConfig(segment=L, slots=64, top_k=4)
    before = backbone.model.model.norm.weight.detach().clone()
    meter = Meter(Budget("steps", train_tokens=10**6), torch.device("cpu"))
    corpus = TextCorpus([torch.randint(64, (400,), generator=torch.Generator().manual_seed(0))])
    with meter.phase("train"):
        trained = train(lambda c: Memorizing(backbone, c, RNG), config, recipe, corpus, meter, seed=0)
    assert isinstance(trained.model, Memorizing)
    gate = trained.model.memory_gate["1"].detach().abs().max()
    return float(gate), float((backbone.model.model.norm.weight.detach() - before).abs().max())


def test_the_gate_learns_at_its_own_rate() -> None:
    once = Recipe("once", (Stage(segments=3, rows=2, steps=1),), lr=1e-4, warmup=1)
    gate, weight = moved(once)
    assert (gate, weight) == (pytest.approx(1e-4, rel=0.02), pytest.approx(1e-4, rel=0.02))
    gate, weight = moved(replace(once, memory_lr=30.0))
    assert (gate, weight) == (pytest.approx(3e-3, rel=0.02), pytest.approx(1e-4, rel=0.02))
    gate, weight = moved(replace(once, memory_lr=30.0, trains="memory"))
    assert (gate, weight) == (pytest.approx(3e-3, rel=0.02), 0.0)


def test_both_regimes_have_a_recipe() -> None:
    assert find_recipe("adapt").trains == "memory"
    full = find_recipe("finetune")
    assert (full.trains, 10 <= full.memory_lr <= 100) == ("all", True)
    assert Budget("b").trains
    assert not any(Budget("b", **{limit: 0}).trains for limit in ("train_tokens", "train_flops", "train_seconds"))


# Reference cases.

CASES = sorted(parity_folder().glob("memorizing_transformer-*"))


def replayed(folder: Path) -> Any:
    case = Case(folder)
    return verify(case, plugins.load("parity", case.model))


def surprisal() -> list[float]:
    """What `run` sees of the official preset."""
    from memory_bench.corpus import Line

    config = replace(
        MemorizingConfig.official(), segment=L, slots=16, top_k=8, xl_cache=8, gate_init=1.0, layers=(0, 1)
    )
    model = Memorizing(tiny_backbone("llama"), config, RNG).eval()
    ids = torch.randint(64, (60,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return line_nll(model, [Line(ids, torch.arange(60) > 0, seed=0)])


def wrong_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ring writes one slot too far."""
    write = Ring.write
    monkeypatch.setattr(
        Ring, "write", lambda s, *a: replace(write(replace(s, written=s.written + 1), *a), written=write(s, *a).written)
    )


def wrong_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate is the other way round."""
    mix = knn.mix_by_gate
    monkeypatch.setattr(knn, "mix_by_gate", lambda local, memory, *rest: mix(memory, local, *rest))


def wrong_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket is a stretch of neighbouring slots."""
    shares = knn.bucket_shares

    def wrong(scores: Tensor, k: int, valid: Tensor | None = None) -> Tensor:
        order = torch.arange(scores.shape[-1]).view(k, -1).T.flatten()
        back = order.argsort()
        found = shares(scores[..., order], k, None if valid is None else valid[:, order])
        return found.flatten(-2)[..., back].unflatten(-1, (-1, k))

    monkeypatch.setattr(knn, "bucket_shares", wrong)


def wrong_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and queries come out a little too long."""
    normalise = knn.normalise
    monkeypatch.setattr(knn, "normalise", lambda *given: normalise(*given) * 1.1)


@pytest.mark.parametrize("spoil", [wrong_position, wrong_gate, wrong_buckets, wrong_length], ids=lambda f: f.__name__)
def test_breaking_the_memory_breaks_verify_and_run(
    spoil: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = surprisal()
    assert [v.detail for v in map(replayed, CASES) if not v.ok] == []
    spoil(monkeypatch)
    assert not all(replayed(folder).ok for folder in CASES)
    assert surprisal() != pytest.approx(before, abs=1e-4)


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name.removeprefix("memorizing_transformer-"))
def test_a_case_that_is_not_understood_is_an_error(folder: Path, tmp_path: Path) -> None:
    def changed(**parts: Any) -> Path:
        copy = tmp_path / "case"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        info = json.loads((copy / "case.json").read_text())
        info["memory"] |= parts.get("memory", {})
        (copy / "case.json").write_text(json.dumps(info))
        for part in ("weights", "expected"):
            tensors = load_file(copy / f"{part}.safetensors") | parts.get(part, {})
            save_file(tensors, copy / f"{part}.safetensors")
        return copy

    with pytest.raises(UserError, match=r"unknown memory setting.*fancy_setting"):
        replayed(changed(memory={"fancy_setting": 3}))
    with pytest.raises(UserError, match="fusion = 'sum' is not known"):
        replayed(changed(memory={"fusion": "sum"}))
    with pytest.raises(UserError, match="weights do not fit"):
        replayed(changed(weights={"memory.of_another_model": torch.ones(1)}))
    name, tensor = next(iter(load_file(folder / "weights.safetensors").items()))
    with pytest.raises(UserError, match="weights do not fit"):
        replayed(changed(weights={name: torch.cat([tensor, tensor])}))
    verdict = replayed(changed(expected={"new.kind.of.output": torch.ones(2)}))
    assert (verdict.ok, verdict.skipped) == (False, ("new.kind.of.output",))


def test_the_cases_are_this_model_s() -> None:
    assert len(CASES) == 6
    assert {case.model for case in find_cases(CASES)} == {"memorizing"}


# Real text, without training.


@pytest.fixture(scope="module")
def smollm() -> Loaded:
    named = os.environ.get("MEMORY_BENCH_CACHE")
    cache = Path(named) if named else Path(user_cache_path("memory-bench"))
    if not (cache / "backbones" / f"smollm2-135m-q4-{REVISION}").is_dir():
        pytest.skip("smollm2-135m-q4 is not in the cache: `memory-bench fetch smollm2-135m-q4`")
    return Backbones(Library(None, cache, stand_ins=True, hub=False), cache, hub=False).load("smollm2-135m-q4")


def untrained(loaded: Loaded, **options: Any) -> Memorizing:
    config = replace(Memorizing.fit(loaded.card, PRESETS["cpu-smol"]), **options)
    return Memorizing(loaded.backbone, config, RNG).eval()


@pytest.mark.slow
@torch.no_grad()
def test_memory_without_training_helps_on_a_book(smollm: Loaded) -> None:
    folder = os.environ.get("MEMORY_BENCH_DATA")
    if not folder:
        pytest.skip("MEMORY_BENCH_DATA names no data folder")
    with gzip.open(Path(folder) / "pg19" / "books_test.jsonl.gz", "rt", encoding="utf-8") as lines:
        book = json.loads(next(lines))["text"]
    ids = torch.tensor(smollm.encode(book.encode()[20_000:40_000].decode(errors="ignore"))[0])[None, :4096]

    def nll(model: Memorizing) -> float:
        state, losses = model.open(1), []
        for start in range(0, 4096, 512):
            readout, state = model.step(state, Segment.full(ids[:, start : start + 512]))
            targets = ids[:, start + 1 : start + 513]
            losses.append(-Readout(readout.hidden[:, : targets.shape[1]], readout.head).logprobs(targets))
        return float(torch.cat(losses[1:], dim=1).mean())

    gain = nll(untrained(smollm, top_k=0)) - nll(untrained(smollm))
    assert gain > 0.04, f"{gain:.3f} nats per token"


@pytest.mark.slow
@torch.no_grad()
def test_a_passkey_is_recalled_from_beyond_the_window(smollm: Loaded) -> None:
    filler = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
    key = "47281"
    text = f"The pass key is {key}. Remember it. {key} is the pass key. " + filler * 40
    read_before = smollm.encode(text)[0][:700]
    question, answer = smollm.encode(" What is the pass key? The pass key is")[0], smollm.encode(f" {key}")[0]
    ids = torch.tensor(read_before + question + answer)[None]
    digits = torch.tensor(answer[1:])  # behind a token for the blank
    assert len(digits) == len(key)

    def recalled(model: Memorizing) -> int:
        """How many digits come first, each after the right ones before it."""
        *history, last = ids.split(256, dim=1)
        state = model.open(1)
        for part in history:
            state = model.absorb(state, Segment.full(part))
        readout, _ = model.step(state, Segment.full(last), write=False)
        return int((readout.logits()[0, -len(key) - 1 : -1].argmax(dim=-1) == digits).sum())

    assert recalled(untrained(smollm, segment=256)) == len(key)
    assert recalled(untrained(smollm, segment=256, top_k=0)) <= 1


# The control


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"fusion": "joint", "layers": (0, 1)}])
def test_a_random_selection_reads_as_many_entries_whichever_they_are(options: dict[str, Any]) -> None:
    best, random = build(**options), build(selection="random", **options)
    text = random_text(best, 2, 7 * L)

    def last(model: Memorizing, *seeds: int) -> Tensor:
        return read(model, model.open(2, seeds=seeds), text)[0][:, -L:]

    one = last(random, 1, 7)
    assert torch.equal(one, last(random, 1, 7))
    other = last(random, 2, 7)
    assert not torch.allclose(one[0], other[0], atol=1e-4)
    torch.testing.assert_close(one[1], other[1])  # a row draws by its own seed
    assert not torch.allclose(one, last(best, 1, 7), atol=1e-4)
    # Where all entries are read there is nothing to choose.
    torch.testing.assert_close(
        last(build(top_k=64, **options), 0, 0), last(build(top_k=64, selection="random", **options), 0, 0)
    )


def test_keys_of_cells_without_the_control_are_what_they_were() -> None:
    assert "selection" not in plugins.plain(MemorizingConfig())
    check_model(lambda: build(selection="random", slots=24))
