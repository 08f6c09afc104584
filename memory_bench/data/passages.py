"""Questions about passages (SQuAD, Natural Questions) and bAbI's stories: what they are, and their files' formats."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


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


def squad(data: Mapping[str, Any]) -> Iterator[Passage]:
    """The answerable questions of a file of SQuAD 1.1 or 2.0, in its order."""
    for article in data["data"]:
        for paragraph in article["paragraphs"]:
            text = str(paragraph["context"])
            for qa in paragraph["qas"]:
                answers = tuple(dict.fromkeys(str(a["text"]).strip() for a in qa["answers"]))
                if answers and not qa.get("is_impossible", False):
                    yield Passage(str(qa["id"]), str(article["title"]), text, str(qa["question"]).strip(), answers)


def squad_rows(rows: Iterable[Mapping[str, Any]]) -> Iterator[Passage]:
    """Flattened SQuAD rows (context, question, answer), each passage once; titles are unknown."""
    contexts = dict.fromkeys(str(row["context"]) for row in rows)
    return (Passage(f"squad-{number:05d}", "", text) for number, text in enumerate(contexts))


def nq_rows(rows: Iterable[Mapping[str, Any]]) -> Iterator[Passage]:
    """NQ-open questions with the passage that answers them; the answer that stands in the passage comes first."""
    for number, row in enumerate(rows):
        passage = row["ctxs"][0]
        text = str(passage["text"]).strip()
        answers = sorted(dict.fromkeys(str(a).strip() for a in row["answers"]), key=lambda a: a not in text)
        if answers and answers[0] in text:
            yield Passage(f"nq-{number:05d}", str(passage["title"]), text, str(row["question"]).strip(), tuple(answers))


LINE = re.compile(r"(?P<number>\d+) (?P<text>[^\t]*)(?:\t(?P<answer>[^\t]*)\t(?P<support>[\d ]*))?")


def stories(text: str, task: int) -> Iterator[Story]:
    """The questions of a bAbI file, each with all sentences of its story that come before it.

    Raises:
        ValueError: a line is none of bAbI's.
    """
    facts: list[str] = []
    lines: dict[int, int] = {}
    story, asked = -1, 0
    for line in text.splitlines():
        match = LINE.fullmatch(line.rstrip())
        if match is None:
            raise ValueError(f"'{line}' is no line of bAbI")
        number = int(match["number"])
        if number == 1:
            facts, lines, story, asked = [], {}, story + 1, 0
        if match["answer"] is None:
            lines[number] = len(facts)
            facts.append(match["text"].strip())
            continue
        support = tuple(lines[int(n)] for n in match["support"].split())
        name = f"qa{task}-{story:04d}-{asked}"
        yield Story(name, task, tuple(facts), match["text"].strip(), match["answer"].strip(), support)
        asked += 1
