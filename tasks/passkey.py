"""Passkey: five digits are hidden in irrelevant text and asked for at its end.

After Mohtashami and Jaggi 2023 (arXiv:2305.16300). Unusual here: `length` counts the tokens of irrelevant text, exactly
and for every tokenizer, and `depth` is the share of it that stands before the key.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Literal

import pandas as pd

from memory_bench.data import Library
from memory_bench.data.needles import INTRODUCTION, NEEDLE, NOISE, PROMPT
from memory_bench.episode import Ask, Document, Episode, Read
from memory_bench.errors import UserError

from .answers import BYTES_PER_TOKEN, Retention


class Passkey(Retention):
    """A number hidden in irrelevant text, at several depths and lengths."""

    @dataclass(frozen=True, slots=True)
    class Config:
        """Options of the task."""

        # Tokens of irrelevant text.
        lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
        # Share of them before the key.
        depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
        # Episodes for every length and depth.
        repeats: int = 5
        # Digits of the key.
        digits: int = 5
        # classic: five short sentences again and again; books: excerpts of the test books.
        noise: Literal["classic", "books"] = "classic"
        # Tokens of an answer.
        max_tokens: int = 8
        # Of the keys and excerpts.
        seed: int = 0

        def __post_init__(self) -> None:
            if not self.lengths or not self.depths or min(self.lengths) < 1:
                raise UserError("passkey: lengths must be numbers of tokens from 1, and there must be depths.")
            if not all(0 <= depth <= 1 for depth in self.depths):
                raise UserError(f"passkey: depths lie between 0 and 1, not {self.depths}.")
            if min(self.repeats, self.digits, self.max_tokens) < 1:
                raise UserError("passkey: repeats, digits and max_tokens must be at least 1.")

    version = 1
    needs = "passkey"
    source = "Mohtashami and Jaggi 2023 (arXiv:2305.16300)"

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()
        self.beside = ("books",) if self.config.noise == "books" else ()

    def episodes(self, library: Library, limit: int | None) -> Iterator[Episode]:
        """One episode a key; `limit` counts them. All lengths and depths come once before any comes again."""
        config = self.config
        books = library.books("test") if config.noise == "books" else []
        cases = [(r, d, n) for r in range(config.repeats) for d in config.depths for n in config.lengths]
        for repeat, depth, length in cases[:limit]:
            name = f"length={length},depth={depth:g},{repeat}"
            rng = Random(f"passkey {config.seed} {name}")
            yield self._episode(name, length, depth, rng, books)

    def _episode(self, name: str, length: int, depth: float, rng: Random, books: list[Document]) -> Episode:
        key = str(rng.randrange(10 ** (self.config.digits - 1), 10**self.config.digits))
        before = round(depth * length)
        noise = [irrelevant(tokens, rng, books) for tokens in (before, length - before)]
        label = f"depth={depth:g},length={length},distance={length - before}"
        events: list[Read | Ask] = [Read(INTRODUCTION)]
        events += [Read(noise[0], tokens=before)] if before else []
        events.append(Read(NEEDLE.format(key=key), tag="key"))
        events += [Read(noise[1], tokens=length - before)] if length > before else []
        events.append(Ask(PROMPT, (), f" {key}", "key", label, self.config.max_tokens, (key,)))
        return Episode(name, tuple(events))

    def parts(self, asks: pd.DataFrame) -> Mapping[str, pd.DataFrame]:
        """By distance, and by depth and length."""
        both = asks["label"].str.extract(r"(depth=[^,]+,length=\d+)", expand=False)
        order = sorted(both.unique(), key=lambda name: [float(part.split("=")[1]) for part in name.split(",")])
        return {**super().parts(asks), **{name: asks[both == name] for name in order}}


def irrelevant(tokens: int, rng: Random, books: list[Document]) -> str:
    """More text than `tokens` tokens need: a piece of a book, or else the classic sentences."""
    size = tokens * BYTES_PER_TOKEN
    if not books:
        return NOISE * (size // len(NOISE) + 1)
    text = rng.choice(books).text
    start = rng.randrange(max(1, len(text) - size))
    piece = text[start : start + size]
    while len(piece) < size:  # a book that is too short goes on with another one
        piece += "\n\n" + rng.choice(books).text[: size - len(piece)]
    return piece[piece.find(" ") + 1 :] + "\n"
