"""The tokenizer that a GGUF file describes, with the splitting of text that it names (``tokenizer.ggml.pre``).

A GGUF file holds vocabulary, merges and kinds of tokens, and of the pre-tokenizer only a name that llama.cpp knows.
transformers knows some of these names and takes plain GPT-2 splitting for the others without a word, so tokens are made
here: as llama.cpp does, for the names whose ids were compared with its own, and for no others.

Only byte-level BPE (``tokenizer.ggml.model`` is ``gpt2``) is read.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from memory_bench.errors import DataError

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # kinds of tokens that are matched whole in a text
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITS_APART = (r"\p{N}", _GPT2)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")


def _words(digits: str) -> str:
    """The splitting of Llama 3 and Qwen 2, with `digits` for a run of digits."""
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How a text is split before merging.

    Attributes:
        splits: regular expressions, each applied to the pieces of the one before; a match is a piece of its own.
        whole: a piece that is a token is taken whole, whatever the merges say.
        add_bos: whether texts begin with BOS where the file does not say.
    """

    splits: tuple[str, ...]
    whole: bool = False
    add_bos: bool = False


_LLAMA3 = PreTokenizer((_words(r"\p{N}{1,3}"),), whole=True, add_bos=True)
_KNOWN = {
    PreTokenizer((_GPT2,)): ("gpt-2", "phi-2", "mpt", "olmo"),
    PreTokenizer(_DIGITS_APART): ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    PreTokenizer((_words(r"\p{N}"),)): ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"),
    PreTokenizer((_words(r"\p{N}{1,3}"),)): ("dbrx", "smaug-bpe"),
    _LLAMA3: ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"),
    PreTokenizer(_DEFAULT): ("default",),
}
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {name: kind for kind, names in _KNOWN.items() for name in names}


def read_tokenizer(file: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer of a GGUF file, and what transformers wants to know besides.

    Returns:
        The tokenizer, and the keyword arguments of `PreTrainedTokenizerFast` (the names of special tokens, whether
        they are added, the chat template).

    Raises:
        DataError: another kind of tokenizer, or a pre-tokenizer that is not known here.
    """
    from gguf import GGUFReader

    fields = GGUFReader(file).fields

    def field(name: str, otherwise: Any = None) -> Any:
        return fields[f"tokenizer.{name}"].contents() if f"tokenizer.{name}" in fields else otherwise

    kind = field("ggml.model")
    if kind != "gpt2":
        raise DataError(
            f"{file.name}: its tokenizer is '{kind}', but of GGUF files only byte-level BPE ('gpt2') is read."
        )
    pre = _pre_tokenizer(file.name, field("ggml.pre"))
    names: list[str] = field("ggml.tokens")
    kinds: list[int] = field("ggml.token_type", [])
    merges = [(left, right) for left, right in (merge.split(" ") for merge in field("ggml.merges", []))]
    vocab = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.whole))
    splits: list[Any] = [pre_tokenizers.Split(Regex(split), "isolated") for split in pre.splits]
    byte_level: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    whole = [(name, k) for name, k in zip(names, kinds, strict=False) if k in (UNKNOWN, CONTROL, USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(n, normalized=False, special=True) for n, k in whole if k != USER_DEFINED])
    tokenizer.add_tokens([AddedToken(n, normalized=False, special=False) for n, k in whole if k == USER_DEFINED])
    ids = {
        "bos_token": "bos_token_id", "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id", "pad_token": "padding_token_id",
    }  # fmt: skip
    known = {name: names[number] for name, key in ids.items() if (number := field(f"ggml.{key}")) is not None}
    added = {
        "add_bos_token": bool(field("ggml.add_bos_token", pre.add_bos)) and "bos_token" in known,
        "add_eos_token": bool(field("ggml.add_eos_token", False)) and "eos_token" in known,
    }
    first = [known["bos_token"]] if added["add_bos_token"] else []
    last = [known["eos_token"]] if added["add_eos_token"] else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last], pair=[*first, "$A", *last, *first, "$B", *last],
        special_tokens=[(name, vocab[name]) for name in {*first, *last}],
    )  # fmt: skip
    template = field("chat_template")
    return tokenizer, {**known, **added, **({"chat_template": template} if template else {})}


def _pre_tokenizer(file: str, name: str | None) -> PreTokenizer:
    """The splitting of that name; llama.cpp takes ``default`` where a file names none.

    Raises:
        DataError: it is not known here.
    """
    found = PRE_TOKENIZERS.get(name or "default")
    if found is None:
        near = difflib.get_close_matches(str(name), PRE_TOKENIZERS, n=1)
        known = f"did you mean {near[0]}?" if near else f"known are {', '.join(PRE_TOKENIZERS)}."
        raise DataError(f"{file}: the pre-tokenizer '{name}' that it names is not known here; {known}")
    return found
