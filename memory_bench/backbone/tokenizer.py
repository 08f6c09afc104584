"""Tokenizers as one function: text to token ids and the UTF-8 bytes each of them covers.

Some tokenizers put a blank or a mark for one before every text that they encode (Llama 2, Mistral 7B). It belongs to
the beginning of a text only: what stands behind other text is encoded by `Tokens.within`, without it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from memory_bench.errors import DataError
from memory_bench.files.artefacts import Notice, kept


class Tokens:
    """A `tokenizers.Tokenizer` without special tokens, with bytes counted so that they add up to the text's.

    Args:
        tokenizer: of the backbone.
        cache: folder where `documents` keeps encoded corpora; None: nothing is kept.
        notice: told of damaged files there, which are made again.
    """

    def __init__(self, tokenizer: Tokenizer, cache: Path | None = None, notice: Notice = lambda sentence: None) -> None:
        self.tokenizer = tokenizer
        self.tokenizer.no_truncation()  # a tokenizer.json may carry a training run's settings
        self.tokenizer.no_padding()
        self.cache = cache
        self.notice = notice

    def documents(self, texts: Sequence[str]) -> list[Tensor]:
        """Token ids ``[tokens]`` of each text, from the cache where these texts were encoded before.

        Encoding the training books costs a fifth of a tiny training, and every cell of a grid needs them.
        """
        if self.cache is None:
            return [torch.tensor(self(text)[0], dtype=torch.long) for text in texts]
        key = hashlib.sha256(self.tokenizer.to_str().encode())
        for text in texts:
            key.update(hashlib.sha256(text.encode()).digest())

        def encode(path: Path) -> None:
            save_file({str(i): torch.tensor(self(text)[0], dtype=torch.int32) for i, text in enumerate(texts)}, path)

        name = key.hexdigest()
        found = load_file(kept(self.cache / f"{name[:16]}.safetensors", name, encode, self.notice))
        return [found[str(i)].long() for i in range(len(texts))]

    def __call__(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids, and for each the bytes from the end of the token before to its own end.

        Blanks that a tokenizer drops and bytes that share a character are counted with a neighbour; the sum is the
        text's length in bytes, whatever a normaliser makes of it. A blank that a tokenizer adds is no byte.
        """
        return _encode(self.tokenizer, text)

    def within(self, text: str) -> tuple[list[int], list[int]]:
        """As a call, of a text that stands behind other text: nothing is put before it, nor stripped off its ends.

        Behind a special token in it, the rest is encoded as the tokenizer encodes it there.
        """
        if self._unmarked is None:
            return self(text)
        found = self._unmarked.encode(text, add_special_tokens=False)
        at = next((n for n, token in enumerate(found.ids) if token in self._special), None)
        if at is None:
            return _encode(self._unmarked, text)
        start = found.offsets[at][0]
        before, behind = _encode(self._unmarked, text[:start]), self(text[start:])
        return before[0] + behind[0], before[1] + behind[1]

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self.tokenizer.get_added_tokens_decoder())

    @cached_property
    def _unmarked(self) -> Tokenizer | None:
        """The tokenizer of what stands behind other text; None: the same."""
        told = json.loads(self.tokenizer.to_str())
        normalizer, pre_tokenizer = _without_mark(told["normalizer"]), _without_mark(told["pre_tokenizer"])
        if (normalizer, pre_tokenizer) == (told["normalizer"], told["pre_tokenizer"]):
            return None
        made = Tokenizer.from_str(json.dumps({**told, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer}))
        return made

    @cached_property
    def beginning(self) -> tuple[int, ...]:
        """The special tokens that the tokenizer itself puts before a text (BOS); mostly none."""
        found = self.tokenizer.encode("a")
        return tuple(found.ids[: next((n for n, special in enumerate(found.special_tokens_mask) if not special), 0)])

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def _encode(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    found = tokenizer.encode(text, add_special_tokens=False)
    to_byte = [0, *accumulate(len(c.encode()) for c in text)]
    ends = list(accumulate((to_byte[end] for _, end in found.offsets), max))
    if ends:
        ends[-1] = to_byte[-1]
    return list(found.ids), [end - before for before, end in zip([0, *ends], ends, strict=False)]


def _without_mark(step: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A normaliser or pre-tokenizer as ``tokenizer.json`` has it, without what it does at the ends of a text.

    In a sequence of pre-tokenizers only the first sees a text's beginning; to the others every piece is one.
    """
    kind = None if step is None else step["type"]
    if step is None or kind == "Prepend":
        return None
    if kind == "Sequence" and "normalizers" in step:
        parts = [_without_mark(part) for part in step["normalizers"]]
        return {**step, "normalizers": [part for part in parts if part is not None]}
    if kind == "Sequence" and step["pretokenizers"]:
        first, *others = step["pretokenizers"]
        return {**step, "pretokenizers": [_without_mark(first), *others]}
    changed: dict[str, dict[str, Any]] = {
        "Metaspace": {"prepend_scheme": "never"},
        "ByteLevel": {"add_prefix_space": False},
        "Strip": {"strip_left": False, "strip_right": False},
    }
    return {**step, **changed.get(str(kind), {})}


def train_bpe(texts: Sequence[str], vocab: int, folder: Path) -> Tokens:
    """A byte-level BPE of `vocab` tokens trained on `texts`, saved to ``folder/tokenizer.json``."""
    tokenizer = Tokenizer(models.BPE())
    pre: Any = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return Tokens(tokenizer)


def word_level(words: Sequence[str]) -> Tokens:
    """One token a word, words separated by blanks; the id is the place in `words`."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokens(tokenizer)


def load_tokens(folder: Path, cache: Path | None = None, notice: Notice = lambda sentence: None) -> Tokens:
    """The tokenizer of a model folder; `cache` and `notice` as in `Tokens`.

    Raises:
        DataError: there is none.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return Tokens(_convert(folder), cache, notice)
    try:
        return Tokens(Tokenizer.from_file(str(path)), cache, notice)
    except Exception as error:  # the binding raises bare Exception
        raise DataError(f"Cannot read {path.name} of {folder.name}: {error}.") from error


def _convert(folder: Path) -> Tokenizer:
    """The fast tokenizer that transformers makes of older files (GPT-2 and OPT: vocab.json and merges.txt)."""
    from transformers import AutoTokenizer

    try:
        fast: Tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
    except Exception as error:
        said = " ".join(str(error).split())[:200].rstrip(" .")
        raise DataError(f"{folder.name} has no tokenizer that can be loaded (tokenizer.json): {said}.") from error
    return fast
