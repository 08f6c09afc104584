"""The rows of data files and of the hub's data sets, as pydantic models, and what is made of them.

A field that is not named here is not read. The hub's rows carry other names for the same things; they are renamed and
go through the same models.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from memory_bench.data.documents import Document
from memory_bench.data.origins import Study
from memory_bench.data.passages import Passage
from memory_bench.files.inputs import Id, Line, Place, Row, Text, Texts, checked, json_lines, json_table, once, shown

Decision = Literal["yes", "no", "maybe"]


class Book(Row):
    """A book of PG-19."""

    pg_id: Id
    title: Line
    author: Line
    text: Text


class LabelledStudy(Row):
    """An item of PubMedQA; in its file the id is the key."""

    id: Id
    QUESTION: Text
    CONTEXTS: Texts
    final_decision: Decision
    LONG_ANSWER: Line


class Truth(Row):
    """The official answer to an item of PubMedQA's test split."""

    answer: Decision


class Answer(Row):
    """An answer of SQuAD, with its first character's place in the context where it is told."""

    text: Text
    answer_start: int | None = None


class Asked(Row):
    """A question of SQuAD 1.1 or 2.0."""

    id: Id
    question: Text
    answers: list[Answer]
    is_impossible: bool = False


class Paragraph(Row):
    """A passage of an article of SQuAD."""

    context: Text
    qas: list[Asked]


class Article(Row):
    """An article of SQuAD."""

    title: Line
    paragraphs: list[Paragraph]


class Squad(Row):
    """A file of SQuAD."""

    data: list[Article]


class SquadRow(Row):
    """A row of flattened SQuAD, of which only the passage is read."""

    context: Text


class Evidence(Row):
    """A passage of Wikipedia."""

    title: Line
    text: Text


class NQRow(Row):
    """A question of NQ-open with passages, the one that answers it first."""

    question: Text
    answers: Texts
    ctxs: list[Evidence] = Field(min_length=1)


class WikiLine(Row):
    """A line of WikiText, as the hub has it."""

    text: Line


def renamed(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The row with other names for its fields; fields that are not there stay out."""
    return {ours: row[theirs] for theirs, ours in names.items() if theirs in row}


def documents(rows: Sequence[tuple[Place, Book]]) -> list[Document]:
    """Books as documents.

    Raises:
        DataError: two have the same id.
    """
    once((place, book.pg_id) for place, book in rows)
    return [Document(b.pg_id, b.text, {"title": b.title, "author": b.author}) for _, b in rows]


def studies(rows: Iterable[tuple[Place, object, Mapping[str, Any]]]) -> list[Study]:
    """Items of PubMedQA: place, id and the rest.

    Raises:
        DataError: one is none, or two have the same id.
    """
    found = [(place, checked(LabelledStudy, {**row, "id": key}, place)) for place, key, row in rows]
    once((place, row.id) for place, row in found)
    return [Study(r.id, r.QUESTION, tuple(r.CONTEXTS), r.final_decision, r.LONG_ANSWER) for _, r in found]


def pubmedqa(data: bytes, file: object, truth: bytes, truth_file: object, split: str) -> list[Study]:
    """The studies of ``test`` (those that the file of answers names) or of ``train`` (all others).

    Raises:
        DataError: a file is something else, or the two contradict each other.
    """
    rows = [(Place.of(file, "study", key), key, row) for key, row in json_table(data, file).items()]
    for place, _, row in rows:
        if not isinstance(row, dict):
            raise place.fault(f"must be an object, not {shown(row)}")
    found = studies(rows)
    known = {study.id: study.answer for study in found}
    answers = json_table(truth, truth_file)
    for key, answer in answers.items():
        place = Place.of(truth_file, "study", key)
        said = checked(Truth, {"answer": answer}, place).answer
        if key not in known:
            raise place.fault(f"{file} has no such study")
        if known[key] != said:
            raise place.fault(f"the answer is {shown(said)} here and {shown(known[key])} in {file}")
    return of_split(found, split, answers)


def of_split(found: Iterable[Study], split: str, test: Iterable[str]) -> list[Study]:
    """The studies of ``test`` (the official ids) or of ``train`` (all others)."""
    ids = frozenset(test)
    return [s for s in found if (s.id in ids) == (split == "test")]


def squad(data: bytes, file: object) -> list[Passage]:
    """The answerable questions of a file of SQuAD 1.1 or 2.0, in its order.

    Raises:
        DataError: it is something else, an id is there twice, or an answer does not stand where it is said to.
    """
    whole = checked(Squad, json_table(data, file), Place(str(file)))
    asked = [
        (Place.of(file, "question", qa.id), article, paragraph, qa)
        for article in whole.data
        for paragraph in article.paragraphs
        for qa in paragraph.qas
    ]
    once((place, qa.id) for place, _, _, qa in asked)
    for place, _, paragraph, qa in asked:
        if problem := _contradiction(paragraph.context, qa):
            raise place.fault(problem)
    return [
        Passage(qa.id, article.title, paragraph.context, qa.question.strip(), _unlike(a.text for a in qa.answers))
        for _, article, paragraph, qa in asked
        if not qa.is_impossible
    ]


def _contradiction(context: str, asked: Asked) -> str:
    if asked.is_impossible == bool(asked.answers):
        return "it has answers and is marked impossible" if asked.answers else "it has no answer and is not impossible"
    for answer in asked.answers:
        start = answer.answer_start
        if answer.text not in context or (start is not None and not _stands(answer.text, context, start)):
            at = "" if start is None else f" at character {start}"
            return f"the answer {shown(answer.text)} does not stand{at} in the context"
    return ""


def _stands(text: str, context: str, start: int) -> bool:
    return start >= 0 and context.startswith(text, start)


def _unlike(texts: Iterable[str]) -> tuple[str, ...]:
    """Each text once, without blanks around it."""
    return tuple(dict.fromkeys(text.strip() for text in texts))


def squad_passages(data: bytes, file: object) -> list[Passage]:
    """Flattened SQuAD rows, each passage once; titles are unknown."""
    contexts = dict.fromkeys(row.context for _, row in json_lines(data, file, SquadRow))
    return [Passage(f"squad-{number:05d}", "", text) for number, text in enumerate(contexts)]


def nq(data: bytes, file: object) -> Iterator[Passage]:
    """NQ-open questions with the passage that answers them; the answer that stands in the passage comes first.

    Questions none of whose answers stands in the passage are left out.
    """
    for number, (_, row) in enumerate(json_lines(data, file, NQRow)):
        text = row.ctxs[0].text.strip()
        answers = tuple(sorted(_unlike(row.answers), key=lambda a: a not in text))
        if answers[0] in text:
            yield Passage(f"nq-{number:05d}", row.ctxs[0].title, text, row.question.strip(), answers)
