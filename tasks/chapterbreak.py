"""ChapterBreak: which of six beginnings of chapters follows what was read? Items are cut from books with headings.

After Sun et al. 2022 (arXiv:2204.10878), whose own items are not needed. Unusual here:

- A chapter begins below a line that is a heading (`HEADING`) and has `words` words or more, so that tables of contents
  are none. Of every book with enough chapters, some breaks are taken, spread evenly; the five wrong beginnings are of
  other chapters of the same book, drawn among those that were not just read.
- All six are as many words long, and the likeliest is chosen; a tokenizer may still cut them into different numbers of
  tokens. Nothing but the heading is taken out of them: a title below it stays.
- `prefixes` count the tokens before the break exactly, for every tokenizer; the same items are asked at all of them.
- The ceiling has the end of what was read in its prompt.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from random import Random

import pandas as pd

from memory_bench.data import Library
from memory_bench.episode import Ask, Document, Episode, Read
from memory_bench.errors import UserError

from .answers import BYTES_PER_TOKEN, Retention

CHOICES = 6
HEADING = re.compile(r"^[ \t]*(?:chapter|book|canto|act|scene) (?:[ivxlc]+|[0-9]+)\b.{0,60}$", re.I | re.M)


class ChapterBreak(Retention):
    """The beginning of the next chapter among those of others."""

    @dataclass(frozen=True, slots=True)
    class Config:
        """Options of the task."""

        # Tokens that are read before the break.
        prefixes: tuple[int, ...] = (512, 2048)
        # Breaks of every book.
        breaks: int = 3
        # Words of every beginning.
        words: int = 96
        # Of the wrong beginnings.
        seed: int = 0

        def __post_init__(self) -> None:
            if not self.prefixes or min(self.prefixes) < 1 or len(set(self.prefixes)) < len(self.prefixes):
                raise UserError(f"chapterbreak: prefixes must be different numbers of tokens, not {self.prefixes}.")
            if min(self.breaks, self.words) < 1:
                raise UserError("chapterbreak: breaks and words must be at least 1.")

    version = 1
    needs = "books"
    chance = 1 / CHOICES
    source = "items cut from books, after Sun et al. 2022 (arXiv:2204.10878)"

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()

    def episodes(self, library: Library, limit: int | None) -> Iterator[Episode]:
        """One episode a break and prefix; `limit` counts them. Books come in turn, then prefixes."""
        own = self.config
        books = [found for book in library.books("test") if (found := list(self._breaks(book)))]
        if not books:
            raise UserError(
                f"chapterbreak: no book has {CHOICES + 1} chapters of {own.words} words, and one of them behind "
                f"{max(own.prefixes)} tokens."
            )
        turns = [
            (found[number], prefix)
            for number in range(own.breaks)
            for prefix in own.prefixes
            for found in books
            if number < len(found)
        ]
        for item, prefix in turns[:limit]:
            yield item.episode(prefix)

    def _breaks(self, book: Document) -> Iterator["Item"]:
        """The items of a book; none where it has too few chapters."""
        own = self.config
        chapters = [c for c in chapters_of(book.text) if len(c.text.split()) >= own.words]
        room = max(own.prefixes) * BYTES_PER_TOKEN
        late = [n for n, c in enumerate(chapters) if n and len(book.text[: c.start].encode()) >= room]
        if len(chapters) < CHOICES + 1 or not late:
            return
        count = min(own.breaks, len(late))
        for number in range(count):
            at = late[number * len(late) // count]
            rng = Random(f"chapterbreak {own.seed} {book.id} {at}")
            # The chapter that was read last has been seen, and is no candidate.
            others = rng.sample([n for n in range(len(chapters)) if n not in (at, at - 1)], CHOICES - 1)
            choices = [" ".join(chapters[n].text.split()[: own.words]) for n in rng.sample([at, *others], CHOICES)]
            answer = " ".join(chapters[at].text.split()[: own.words])
            if len(set(choices)) == CHOICES:
                before = book.text[: chapters[at].start].rstrip()
                yield Item(book.id, at, before[-room:], answer, tuple(choices))

    def levels(self, library: Library) -> Mapping[str, float]:
        """A guess among six."""
        return {"chance": self.chance}

    def parts(self, asks: pd.DataFrame) -> Mapping[str, pd.DataFrame]:
        """By what was read before."""
        prefix = asks["label"].str.extract(r"prefix=(\d+)", expand=False).astype(int)
        return {f"prefix={n}": asks[prefix == n] for n in sorted(prefix.unique())}


@dataclass(frozen=True, slots=True)
class Chapter:
    """A chapter: where its heading begins, and what is below it."""

    start: int
    text: str


@dataclass(frozen=True, slots=True)
class Item:
    """A break: of which book and chapter, what stands before it, and what may follow."""

    book: str
    chapter: int
    before: str
    answer: str
    choices: tuple[str, ...]

    def episode(self, prefix: int) -> Episode:
        """`prefix` tokens are read, then the question; blanks and line ends of the beginnings are single blanks."""
        read = Read("", tag="before", tokens=prefix, lead=self.before)
        ask = Ask("\n\n", self.choices, self.answer, "before", f"prefix={prefix},chapter={self.chapter}")
        return Episode(f"{self.book},chapter={self.chapter},prefix={prefix}", (read, ask), self.book)


def chapters_of(text: str) -> list[Chapter]:
    """What stands below each heading of a book, up to the next one."""
    found = list(HEADING.finditer(text))
    ends = [*(m.start() for m in found), len(text)]
    return [Chapter(m.start(), text[m.end() : end]) for m, (_, end) in zip(found, pairwise(ends), strict=True)]
