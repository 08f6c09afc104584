"""Tokenizers: bytes that add up, whatever the tokenizer drops or splits; cached corpora; files of many ages."""

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from memory_bench.backbone.tokenizer import Tokens, load_tokens, train_bpe, word_level
from memory_bench.errors import DataError

TEXTS = [
    "the whale and the sea",
    "  two  blanks\n\nand lines\t",
    "Ünïcödé – 東京 🐋🐋 é",
    "a",
    " ",
    "",
    "\r\n",
    "e\u0301",
]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    return train_bpe(["the whale and the sea " * 50], 300, tmp_path_factory.mktemp("bpe"))


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_add_up(text: str, bpe: Tokens) -> None:
    ids, sizes = bpe(text)
    assert len(ids) == len(sizes)
    assert sum(sizes) == len(text.encode())
    assert all(size >= 0 for size in sizes)


def test_bytes_add_up_on_random_text(bpe: Tokens) -> None:
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice("ab \n\té東🐋\u0301\u200b") for _ in range(rng.randrange(1, 40)))
        ids, sizes = bpe(text)
        assert sum(sizes) == len(text.encode())
        assert bpe.tokenizer.decode(ids) == text


def test_each_token_has_its_own_bytes(bpe: Tokens) -> None:
    ids, sizes = bpe("whale über")
    pieces = [bpe.tokenizer.id_to_token(i) for i in ids]
    assert [len(piece) for piece in pieces if piece.isascii()] == [
        s for p, s in zip(pieces, sizes, strict=True) if p.isascii()
    ]


def test_blanks_that_are_dropped_are_counted_with_a_neighbour() -> None:
    tokens = word_level(["[unk]", "one", "two"])
    assert tokens("  one   two ") == ([1, 2], [5, 7])
    assert tokens("one three") == ([1, 0], [3, 6])


def test_a_normaliser_changes_no_bytes() -> None:
    tokenizer = Tokenizer(models.WordLevel({"[unk]": 0, "the": 1}, unk_token="[unk]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    text = "THE ﬁsh the ½ Ünder THE"
    ids, sizes = Tokens(tokenizer)(text)
    assert ids.count(1) == 3
    assert sum(sizes) == len(text.encode())


def test_no_special_tokens_no_truncation_no_padding(bpe: Tokens) -> None:
    """A `tokenizer.json` may carry the settings of a training run."""
    tokenizer = Tokenizer.from_str(bpe.tokenizer.to_str())
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 300)])  # type: ignore[assignment]
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    text = "the whale and the sea the whale and the sea"
    assert Tokens(tokenizer)(text) == bpe(text)


def test_encoding_does_not_depend_on_the_text_beside_it(bpe: Tokens) -> None:
    assert bpe("whale")[0] == bpe("whale")[0]
    assert bpe(" whale")[0] != bpe("whale")[0]


def test_a_saved_tokenizer_is_the_same(bpe: Tokens, tmp_path: Path) -> None:
    made = train_bpe(["the whale and the sea " * 50], 300, tmp_path)
    loaded = load_tokens(tmp_path)
    for text in TEXTS:
        assert made(text) == loaded(text) == bpe(text)


@pytest.mark.parametrize("content", ["", "{", '{"model": 3}'])
def test_a_broken_tokenizer_is_a_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"Cannot read tokenizer\.json"):
        load_tokens(tmp_path)


def test_no_tokenizer_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(DataError, match="no tokenizer that can be loaded"):
        load_tokens(tmp_path)


def test_documents_come_from_the_cache_and_are_the_same(bpe: Tokens, tmp_path: Path) -> None:
    cached = Tokens(Tokenizer.from_str(bpe.tokenizer.to_str()), tmp_path)
    texts = [text for text in TEXTS if text]
    first = cached.documents(texts)
    (file,) = tmp_path.glob("*.safetensors")
    when = file.stat().st_mtime_ns
    again = cached.documents(texts)
    plain = bpe.documents(texts)
    for one, other, expected in zip(first, again, plain, strict=True):
        assert torch.equal(one, expected)
        assert torch.equal(other, expected)
        assert one.dtype == torch.long
    assert file.stat().st_mtime_ns == when
    cached.documents([*texts, "more"])
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
