"""Tokenizers of GGUF files: ids as llama.cpp gives them, and a sentence for what is not known."""

import os
from pathlib import Path
from typing import Any

import gguf
import pytest
from platformdirs import user_cache_path
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from memory_bench.backbone.tokenizer import load_tokens
from memory_bench.errors import DataError
from memory_bench.zoo.gguf import REVISION
from memory_bench.zoo.gguf_tokenizer import PRE_TOKENIZERS, read_tokenizer

SMOLLM2_IDS: dict[str, str] = {
    "The end.\n\n12 men came.": "504 1112 30 1116 33 34 1800 2422 30",
    "In 1845 he paid $1,234.50 for 7 acres.": (
        "788 216 33 40 36 37 384 5940 1885 33 28 34 35 36 30 37 32 327 216 39 9590 30"
    ),
    "  two  blanks\n\n\tand a tab 3\t4\n": "216 827 216 45843 1116 197 397 253 10147 216 35 197 36 198",
    "It's 10:30, isn't it? IT'S 9!": "1589 506 216 33 32 42 35 32 28 3247 982 357 47 9627 23 67 216 41 17",
    "\xdcn\xefc\xf6d\xe9 \u2013 \u6771\u4eac 2024\u5e74 \U0001f40b\U0001f40b \xe9 \xbd \u0663": (
        "142 246 94 25972 83 7466 84 2756 816 17097 247 126 16736 122 216 34 32 34 36 32090 129 15107 234 229 "
        "10813 234 229 26411 216 16738 216 164 113"
    ),
    "x86_64 v2.0-rc1 0x1F": "104 40 38 79 38 36 386 34 30 32 29 6506 33 216 32 104 33 54",
    "<|im_start|>user\nHi 5<|im_end|>\n": "1 4093 198 26843 216 37 2 198",
    "\r\n1\r\n 22 333\xa04444": "2738 33 23799 34 34 216 35 35 35 15442 36 36 36 36",
}
"""What llama.cpp (build 11549) makes of these texts with the file in the wheel of smollm2-135m-q4."""

NUMBERS = "it's 1234 is 56\n\n 7.\n\nIT'S  x!\n"
SPLITS: dict[str, str] = {
    "none": "72 83 6 82 220 256 18 19 220 72 82 220 261 262 220 22 13 198 198 40 51 6 50 220 268 0 198",
    "default": "72 83 6 82 220 256 18 19 220 72 82 220 261 262 220 22 13 198 198 40 51 6 50 220 268 0 198",
    "gpt-2": "72 83 263 220 258 220 72 82 260 262 220 22 13 198 198 40 51 6 50 220 268 0 198",
    "smollm": "72 83 263 220 16 17 18 19 220 72 82 220 20 21 262 220 22 13 198 198 40 51 6 50 220 268 0 198",
    "qwen2": "72 83 263 220 16 17 18 19 220 72 82 220 20 21 262 220 22 266 40 51 264 220 268 270",
    "dbrx": "72 83 263 220 256 18 19 220 72 82 220 261 262 220 22 266 40 51 264 220 268 270",
    "llama-bpe": "72 83 263 220 256 18 19 271 220 261 262 220 22 266 40 51 264 220 268 270",
}
"""What llama.cpp (build 11549) makes of `NUMBERS` with `tiny_file`, by the pre-tokenizer that the file names."""


def letters() -> list[str]:
    """The 256 letters by which byte-level BPE writes bytes, in the order of ids."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


MERGES = [
    "1 2",
    "3 4",
    "12 34",
    "Ġ 5",
    "Ġ5 6",
    "5 6",
    "Ċ Ċ",
    "' s",
    "' S",
    ". Ċ",
    ".Ċ Ċ",
    ". ĊĊ",
    "Ġ Ġ",
    "Ġ x",
    "Ċ Ġ",
    "! Ċ",
]


def tiny_file(folder: Path, pre: str | None, **more: Any) -> Path:
    """A GGUF file without weights: bytes, a few merges, a token that none makes, control tokens, one of the user's."""
    merged = [merge.replace(" ", "") for merge in MERGES]
    tokens = [*letters(), *dict.fromkeys(merged), "Ġis", "<s>", "</s>", "<think>"]
    kinds = [gguf.TokenType.NORMAL] * (len(tokens) - 3) + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.USER_DEFINED]
    writer = gguf.GGUFWriter(folder / f"{pre}.gguf", "llama")
    writer.add_tokenizer_model(more.get("model", "gpt2"))
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(len(tokens) - 3)
    writer.add_eos_token_id(len(tokens) - 2)
    if "add_bos" in more:
        writer.add_add_bos_token(more["add_bos"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return Path(folder / f"{pre}.gguf")


def ids(tokenizer: Tokenizer, text: str, *, special: bool = False) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=special).ids)


@pytest.mark.parametrize("pre", SPLITS)
def test_text_is_split_as_the_file_says(pre: str, tmp_path: Path) -> None:
    tokenizer, _ = read_tokenizer(tiny_file(tmp_path, None if pre == "none" else pre))
    assert ids(tokenizer, NUMBERS) == [int(n) for n in SPLITS[pre].split()]
    assert tokenizer.decode(ids(tokenizer, NUMBERS)) == NUMBERS


def test_every_known_splitting_is_recorded() -> None:
    assert {PRE_TOKENIZERS["default" if pre == "none" else pre] for pre in SPLITS} == set(PRE_TOKENIZERS.values())


@pytest.mark.parametrize(
    ("pre", "sentence"),
    [
        ("llama-bpf", r"'llama-bpf' that it names is not known here; did you mean llama-bpe\?"),
        ("tekken", "'tekken' that it names is not known here; known are gpt-2, "),
    ],
)
def test_an_unknown_splitting_is_a_sentence(pre: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=sentence):
        read_tokenizer(tiny_file(tmp_path, pre))


def test_another_kind_of_tokenizer_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="its tokenizer is 'llama', but of GGUF files only byte-level BPE"):
        read_tokenizer(tiny_file(tmp_path, "default", model="llama"))


def test_special_tokens_are_whole_and_named(tmp_path: Path) -> None:
    tokenizer, more = read_tokenizer(tiny_file(tmp_path, "gpt-2"))
    end = tokenizer.get_vocab_size() - 1
    assert ids(tokenizer, "x<think>x</s>") == [ids(tokenizer, "x")[0], end, ids(tokenizer, "x")[0], end - 1]
    assert tokenizer.decode([end, end - 1], skip_special_tokens=True) == "<think>"
    assert more == {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False, "add_eos_token": False}


@pytest.mark.parametrize(
    ("pre", "said", "begins"),
    [("gpt-2", None, False), ("gpt-2", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_texts_begin_as_the_file_says(pre: str, said: bool | None, begins: bool, tmp_path: Path) -> None:
    """Where it does not say, llama.cpp goes by the pre-tokenizer; saved and loaded, transformers does the same."""
    tokenizer, more = read_tokenizer(tiny_file(tmp_path, pre, **({} if said is None else {"add_bos": said})))
    expected = [tokenizer.token_to_id("<s>")] * begins + ids(tokenizer, "x 1")
    assert ids(tokenizer, "x 1", special=True) == expected
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **more).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text('{"model_type": "llama"}')
    assert AutoTokenizer.from_pretrained(tmp_path / "saved", local_files_only=True).encode("x 1") == expected


def test_the_wheels_ids_are_those_of_llama_cpp() -> None:
    named = os.environ.get("MEMORY_BENCH_CACHE")
    cache = Path(named) if named else Path(user_cache_path("memory-bench"))
    folder = cache / "backbones" / f"smollm2-135m-q4-{REVISION}"
    if not folder.is_dir():
        pytest.skip("smollm2-135m-q4 is not in the cache: `memory-bench fetch smollm2-135m-q4`")
    encode = load_tokens(folder)
    assert {text: encode(text)[0] for text in SMOLLM2_IDS} == {
        text: [int(n) for n in found.split()] for text, found in SMOLLM2_IDS.items()
    }
