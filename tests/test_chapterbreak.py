"""ChapterBreak: where chapters begin, what is read before a break, and which beginnings are its choices."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from memory_bench.backbone.tokenizer import word_level
from memory_bench.data import Library
from memory_bench.driver.encoding import encode_episode
from memory_bench.episode import Ask, Episode, Read
from memory_bench.errors import UserError
from memory_bench.tasks.chapterbreak import ChapterBreak, chapters_of
from memory_bench.testing import check_task

Config = ChapterBreak.Config
SMALL = Config(prefixes=(4, 16), breaks=2, words=5)


def chapter(number: int) -> str:
    """Text that stands in no other chapter."""
    return " ".join(
        f"{word}{number}" for word in ("alpha", "beta", "gamma", "delta", "eps", "zeta", "eta", "theta") * 3
    )


def book(chapters: int) -> str:
    contents = "CONTENTS\n\nChapter I. One\nChapter II. Two\n"
    return contents + "".join(f"\n\n  CHAPTER {n}. A title\n\n{chapter(n)}" for n in range(1, chapters + 1))


def library(folder: Path, *texts: str) -> Library:
    rows = [{"pg_id": n, "title": "T", "author": "A", "text": text} for n, text in enumerate(texts)]
    (folder / "pg19").mkdir()
    lines = "\n".join(map(json.dumps, rows))
    (folder / "pg19/books_test.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return Library(folder, folder / "cache", hub=False)


def parts(episode: Episode) -> tuple[Read, Ask]:
    read, ask = episode.events
    assert isinstance(read, Read)
    assert isinstance(ask, Ask)
    return read, ask


@pytest.mark.parametrize(
    ("line", "heads"),
    [("CHAPTER IV", True), ("  Chapter 12. The end", True), ("ACT III", True), ("Scene ii. A street", True),
     ("Book the first", False), ("A chapter I like", False), ("CHAPTERS I and II", False), ("chapter", False),
     ("Chapter I was the longest of all that she had ever read to him, and she had read him many of them", False)],
)  # fmt: skip
def test_a_heading_is_a_line_of_its_own(line: str, heads: bool) -> None:
    found = chapters_of(f"before\n{line}\nbelow\nit")
    assert [c.text.strip() for c in found] == (["below\nit"] if heads else [])
    assert all(c.start == len("before\n") for c in found)


def test_the_answer_is_what_stands_below_the_next_heading(tmp_path: Path) -> None:
    episodes = list(ChapterBreak(SMALL).episodes(library(tmp_path, book(12), "no chapters", book(9)), None))
    assert len(episodes) == 2 * 2 * 2  # books with chapters, breaks, prefixes
    assert [e.cluster for e in episodes] == ["0", "2"] * 4
    for episode in episodes:
        read, ask = parts(episode)
        number = int(ask.label.split("chapter=")[1]) + 1
        assert ask.answer == " ".join(chapter(number).split()[:5])
        assert len(set(ask.choices)) == 6
        assert {len(choice.split()) for choice in ask.choices} == {5}
        assert chapter(number - 1).endswith(read.lead[-60:])
        just_read = " ".join(chapter(number - 1).split()[:5])
        assert just_read not in ask.choices
        words = sorted({*read.lead.split(), *(word for choice in ask.choices for word in choice.split())})
        stream = encode_episode(episode, word_level(words), 0)
        assert len(stream.line) == int(ask.label.split(",")[0].removeprefix("prefix="))
        assert stream.questions[0].distance_tokens == 0
    same = [parts(e)[1] for e in episodes if e.id.startswith("0,chapter=")]
    assert len({(ask.answer, ask.choices) for ask in same}) == 2  # the same items at all lengths


def test_right_answers_are_at_all_places(tmp_path: Path) -> None:
    task = ChapterBreak(Config(prefixes=(4,), breaks=12, words=5))
    asked = [parts(e)[1] for e in task.episodes(library(tmp_path, *[book(16)] * 6), None)]
    assert {ask.choices.index(ask.answer) for ask in asked} == set(range(6))


def test_books_that_are_too_short_are_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"chapterbreak: no book has 7 chapters of 5 words"):
        list(ChapterBreak(SMALL).episodes(library(tmp_path, book(6)), None))


@pytest.mark.parametrize("wrong", [{"prefixes": ()}, {"prefixes": (8, 8)}, {"breaks": 0}, {"words": 0}], ids=str)
def test_impossible_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="chapterbreak"):
        Config(**wrong)


def test_the_task_keeps_its_promises(tmp_path: Path) -> None:
    check_task(ChapterBreak(SMALL), library(tmp_path, book(12), book(9)), limit=4)
