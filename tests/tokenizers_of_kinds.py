"""Small tokenizers of the kinds that people's backbones bring."""

from random import Random
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

WORDS = "whale sea captain the of and ship harpoon über white sail storm yes no maybe".split()  # noqa: SIM905
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MARKED = ("prepend", "metaspace", "first", "prefix")
KINDS = (*MARKED, "bytes", "llama3", "nfc")


def prose(words: int, seed: int = 0) -> str:
    rng = Random(f"{seed} {words}")
    return " ".join(rng.choice(WORDS) for _ in range(words))


def small_tokenizer(kind: str) -> Tokenizer:
    """A BPE of 420 tokens trained on prose, with ``<unk>``, ``<s>`` and ``</s>``.

    Args:
        kind: ``prepend`` (Llama 2: a normaliser puts a mark before every text), ``metaspace`` and ``first`` (a
            pre-tokenizer does), ``prefix`` (byte-level with a blank before every text), ``bytes`` (GPT-2), ``llama3``
            (punctuation takes the line breaks after it), ``nfc`` (GPT-2 behind a normaliser that composes).
    """
    special = ["<unk>", "<s>", "</s>"]
    texts = [prose(40, n) + f".\n{'' if n % 2 else prose(5, n)}\nQuestion: is it?\nAnswer: yes" for n in range(30)]
    texts += [f"{prose(9, n)}.\nQuestion: is it?" for n in range(30)]
    tokenizer: Any
    if kind in ("prepend", "metaspace", "first"):
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        scheme = "first" if kind == "first" else "always"
        marks = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=True)
        apart = pre_tokenizers.Split(Regex(r"[.\n]"), "isolated")  # while merges are learnt, as sentencepiece does
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([marks, apart])
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        blanks = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(blanks)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix")
        tokenizer.decoder = decoders.ByteLevel()
        if kind == "llama3":
            plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
        if kind == "nfc":
            tokenizer.normalizer = normalizers.NFC()
    alphabet = [] if kind in ("prepend", "metaspace", "first") else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if kind in ("metaspace", "first"):
        tokenizer.pre_tokenizer = marks
    if kind == "prepend":
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer
