"""Long conversations in several sessions with questions about them, and the public layout of their file (LoCoMo).

The file is a list of conversations; of each these fields are read::

    {"sample_id": "conv-26",
     "conversation": {"session_1_date_time": "1:56 pm on 8 May, 2023",
                      "session_1": [{"speaker": "…", "dia_id": "D1:1", "text": "…", "blip_caption": "…"}, …], …},
     "qa": [{"question": "…", "answer": "…", "evidence": ["D1:3"], "category": 2}, …]}

Questions without an answer (the adversarial ones, category 5) are left out. An answer may be a number. Places of
evidence that are written otherwise (``D8:6; D9:17``, ``D30:05``) are understood; those that name no turn are left out.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from memory_bench.files.inputs import Id, Line, Place, Row, Text, checked, once, parse, shown, text_of

CATEGORIES = {1: "several turns", 2: "time", 3: "common knowledge", 4: "one turn", 5: "adversarial"}


@dataclass(frozen=True, slots=True)
class Turn:
    """What one of the two says; `shows` describes a picture that goes with it."""

    id: str
    speaker: str
    text: str
    shows: str = ""


@dataclass(frozen=True, slots=True)
class Session:
    """Turns on one day; `date` as it is told."""

    date: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A question: its answer, the turns that give it (their ids, in order), and its category (`CATEGORIES`)."""

    question: str
    answer: str
    evidence: tuple[str, ...]
    category: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """Sessions in order, and questions about them."""

    id: str
    sessions: tuple[Session, ...]
    questions: tuple[Wanted, ...]


class TurnRow(Row):
    """A turn of the file."""

    speaker: Text
    dia_id: Text
    text: Line
    blip_caption: Line = ""


class AskedRow(Row):
    """A question of the file."""

    question: Text
    answer: Id | None = None
    evidence: list[Line] = []  # noqa: RUF012 (a field of a model)
    category: int


class ConversationRow(Row):
    """A conversation of the file."""

    sample_id: Id
    conversation: dict[str, Any]
    qa: list[AskedRow]


def conversations(data: bytes, file: object) -> Iterator[Conversation]:
    """The conversations of a file.

    Raises:
        DataError: it is none of this layout; the place is named.
    """
    found = parse(text_of(data, file), Place(str(file)))
    if not isinstance(found, list):
        raise Place(str(file)).fault(f"must be a list of conversations, not {shown(found)}")
    rows = [
        (place := Place(str(file), f"conversation {number}"), checked(ConversationRow, one, place))
        for number, one in enumerate(found, 1)
    ]
    once((place, row.sample_id) for place, row in rows)
    for place, row in rows:
        yield _conversation(row, place)


def _conversation(row: ConversationRow, place: Place) -> Conversation:
    named = {int(m[1]): name for name in row.conversation if (m := re.fullmatch(r"session_(\d+)", name))}
    sessions, ids = [], set[str]()
    for number in sorted(named):
        name = named[number]
        said, date = row.conversation[name], row.conversation.get(f"{name}_date_time")
        if not isinstance(said, list) or not isinstance(date, str) or not date.strip():
            raise place.fault(f"{name} must be a list of turns and have {name}_date_time")
        where = Place(place.file, f"{place.spot}, {name}")
        turns = [checked(TurnRow, turn, where) for turn in said]
        for turn in turns:
            if turn.dia_id in ids:
                raise where.fault(f"dia_id {turn.dia_id} is there twice")
            ids.add(turn.dia_id)
        kept = tuple(
            Turn(t.dia_id, t.speaker, t.text, t.blip_caption) for t in turns if t.text.strip() or t.blip_caption
        )
        if kept:
            sessions.append(Session(date.strip(), kept))
    if not sessions:
        raise place.fault("it has no session")
    order = {turn.id: at for at, turn in enumerate(t for s in sessions for t in s.turns)}
    asked = []
    for q in row.qa:
        if q.category not in CATEGORIES:
            raise place.fault(f"category {q.category} is none of {', '.join(map(str, CATEGORIES))}")
        if q.answer is not None and q.category != max(CATEGORIES):
            asked.append(Wanted(q.question, q.answer.strip(), _evidence(q.evidence, order), q.category))
    return Conversation(row.sample_id, tuple(sessions), tuple(asked))


def _evidence(places: list[str], order: dict[str, int]) -> tuple[str, ...]:
    """The ids of turns that there are, as they are named in `places`, in the order of the conversation."""
    named = {f"D{int(a)}:{int(b)}" for text in places for a, b in re.findall(r"D:?(\d+):(\d+)", text)}
    return tuple(sorted(named & order.keys(), key=order.__getitem__))
