"""Questions about passages (SQuAD, Natural Questions) and bAbI's stories: what they are, and the format of bAbI."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from memory_bench.files.inputs import lines_of, shown


@dataclass(frozen=True, slots=True)
class Passage:
    """A text, and a question that it answers.

    Attributes:
        id: of the passage and question.
        title: of the article; empty where unknown.
        text: the passage.
        question: empty for passages that are only read.
        answers: texts that count as right, the first one as it stands in the passage.
    """

    id: str
    title: str
    text: str
    question: str = ""
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Story:
    """Facts in order, and a question about them.

    Attributes:
        id: of task, story and question.
        task: bAbI's number, 1 to 5.
        facts: sentences.
        question: ends with a question mark.
        answer: one word.
        support: indices of the facts that give the answer.
    """

    id: str
    task: int
    facts: tuple[str, ...]
    question: str
    answer: str
    support: tuple[int, ...]


LINE = re.compile(r"(?P<number>[0-9]+) (?P<text>[^\t\r]*)(?:\t(?P<answer>[^\t\r]*)\t(?P<support>[0-9 ]*))?")


def stories(data: bytes, file: object, task: int) -> Iterator[Story]:
    """The questions of a bAbI file, each with all sentences of its story that come before it.

    Raises:
        DataError: a line is none of bAbI's, or does not follow the one before it.
    """
    facts: list[str] = []
    seen: dict[int, int] = {}
    story, asked, last = -1, 0, 0
    for place, line in lines_of(data, file):
        match = LINE.fullmatch(line.rstrip())
        if match is None:
            raise place.fault(f"no line of bAbI ({shown(line)})")
        number, text = int(match["number"]), match["text"].strip()
        if number == 1:
            facts, seen, story, asked = [], {}, story + 1, 0
        elif number != last + 1 or story < 0:
            raise place.fault(f"it has the number {number} and follows {last or 'no other line of a story'}")
        last = number
        if problem := _no_fact(text) if match["answer"] is None else _no_question(match, seen):
            raise place.fault(problem)
        if match["answer"] is None:
            seen[number] = len(facts)
            facts.append(text)
            continue
        support = tuple(seen[int(n)] for n in match["support"].split())
        yield Story(f"qa{task}-{story:04d}-{asked}", task, tuple(facts), text, match["answer"].strip(), support)
        asked += 1


def _no_fact(text: str) -> str:
    if not text:
        return "it says nothing"
    asks = text.endswith("?") or "? " in text
    return "it is a question without an answer and its support behind tabs" if asks else ""


def _no_question(match: re.Match[str], seen: Mapping[int, int]) -> str:
    if not match["text"].strip() or not match["answer"].strip():
        return "its question or its answer is empty"
    support = [int(n) for n in match["support"].split()]
    if not support:
        return "it names no line that gives the answer"
    wrong = [n for n in support if n not in seen]
    return f"it names line {wrong[0]}, which is no fact of its story before it" if wrong else ""
