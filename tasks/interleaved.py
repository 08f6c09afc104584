"""PG-19 with two books at a time: their blocks alternate, so that what is needed lies a block back.

Unusual here: blocks are counted in words, not tokens, so that every tokenizer reads the same text.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest

from memory_bench.data import Library
from memory_bench.episode import Episode, Read
from memory_bench.errors import UserError

from .language_modeling import PG19, LanguageModeling, parse_extent


class InterleavedPG19(LanguageModeling):
    """Pairs of PG-19's test books whose blocks alternate (HMT's robustness test).

    The paper alternates blocks of 256 tokens and trains on such text; here 200 words are about as many tokens of a
    large vocabulary, and models are trained on books as they are.
    """

    @dataclass(frozen=True, slots=True)
    class Config:
        """Options of the task."""

        extent: str = "bytes:20000-25100"  # which part of every book is read, as in pg19
        words: int = 200  # in a block

        def __post_init__(self) -> None:
            parse_extent(self.extent)
            if self.words < 1:
                raise UserError("pg19-interleaved: words must be at least 1.")

    version = 1
    needs = "books"
    source = "He et al. 2025 (arXiv:2405.06067), PG-19 interleaved; Rae et al. 2020 (arXiv:1911.05507)"

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()

    def episodes(self, library: Library, limit: int | None) -> Iterator[Episode]:
        """One scored document per pair of books, neighbours in pg19's order; `limit` counts pairs."""
        books = list(PG19(PG19.Config(extent=self.config.extent)).episodes(library, None))
        pairs = list(zip(books[::2], books[1::2], strict=False))
        if not pairs:
            raise UserError("pg19-interleaved needs at least two books.")
        for first, second in pairs[:limit]:
            text = interleave(_text(first), _text(second), self.config.words)
            name = f"{first.id}+{second.id}"
            yield Episode(name, (Read(text, scored=True, tag="text"),), name)


def _text(episode: Episode) -> str:
    return "".join(event.text for event in episode.events if isinstance(event, Read))


def interleave(first: str, second: str, words: int) -> str:
    """Blocks of `words` words of both texts in turn, blanks between words; what is left of the longer follows."""
    blocks = ([" ".join(w[i : i + words]) for i in range(0, len(w), words)] for w in (first.split(), second.split()))
    return " ".join(filter(None, chain.from_iterable(zip_longest(*blocks))))
