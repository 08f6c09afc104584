"""LoCoMo: its file is read strictly, the stand-in answers its own questions, and answers are scored without a judge."""

import gzip
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from memory_bench.data import Library
from memory_bench.data.conversations import conversations
from memory_bench.data.talks import COUNT, talks
from memory_bench.episode import Ask, Episode, Read
from memory_bench.errors import DataError, UserError
from memory_bench.tasks.locomo import Locomo, f1
from memory_bench.testing import check_task

ONE: dict[str, Any] = {
    "sample_id": "conv-1",
    "speaker": "unread",
    "conversation": {
        "speaker_a": "Ada",
        "session_2": [{"speaker": "Bob", "dia_id": "D2:1", "text": "I bought a boat.", "blip_caption": "a red boat"}],
        "session_10": [{"speaker": "Ada", "dia_id": "D10:1", "text": "It sank."}],
        "session_2_date_time": "1:56 pm on 8 May, 2023",
        "session_10_date_time": "9:00 am on 9 May, 2023",
        "session_11_date_time": "no session",
    },
    "qa": [
        {"question": "What did Bob buy?", "answer": "a boat", "evidence": ["D2:1"], "category": 4},
        {"question": "When did it sink?", "answer": 2023, "evidence": ["D10:01 D2:1", "D"], "category": 2},
        {"question": "Is it deep?", "answer": "maybe", "evidence": ["D9:9"], "category": 3},
        {"question": "What did Ada buy?", "adversarial_answer": "a boat", "evidence": ["D2:1"], "category": 5},
    ],
}


def file_of(*found: dict[str, Any]) -> bytes:
    return json.dumps(list(found)).encode()


def changed(**values: Any) -> dict[str, Any]:
    return {**ONE, **values}


def data(folder: Path, *found: dict[str, Any]) -> Library:
    (folder / "locomo").mkdir()
    (folder / "locomo/locomo10.json.gz").write_bytes(gzip.compress(file_of(*found)))
    return Library(folder, folder / "cache", hub=False)


def test_the_public_layout_is_read() -> None:
    (one,) = conversations(file_of(ONE), "f")
    assert [session.date for session in one.sessions] == ["1:56 pm on 8 May, 2023", "9:00 am on 9 May, 2023"]
    assert [(t.id, t.speaker, t.shows) for s in one.sessions for t in s.turns] == [
        ("D2:1", "Bob", "a red boat"), ("D10:1", "Ada", ""),
    ]  # fmt: skip
    assert [(q.answer, q.evidence, q.category) for q in one.questions] == [
        ("a boat", ("D2:1",), 4), ("2023", ("D2:1", "D10:1"), 2), ("maybe", (), 3),
    ]  # fmt: skip


TURN = {"speaker": "Ada", "dia_id": "D1:1", "text": "Hi."}
SPOKEN = {"session_1": [TURN], "session_1_date_time": "today"}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (ONE, "must be a list of conversations"),
        ([ONE, ONE], 'conversation 2: has the id "conv-1" of conversation 1 again'),
        ([changed(conversation={})], "conversation 1: it has no session"),
        ([changed(conversation={"session_1": [TURN]})], "session_1 must be a list of turns and have session_1_date"),
        ([changed(conversation={**SPOKEN, "session_1": "Hi."})], "session_1 must be a list of turns"),
        ([changed(conversation={**SPOKEN, "session_1": [TURN, TURN]})], "session_1: dia_id D1:1 is there twice"),
        (
            [changed(conversation={**SPOKEN, "session_1": [{"speaker": "Ada"}]})],
            "conversation 1, session_1: lacks 'dia_id'",
        ),
        ([changed(qa=[{"question": "?", "answer": "a", "category": 6}])], "category 6 is none of 1, 2, 3, 4, 5"),
        ([changed(qa=[{"question": "?", "answer": ["a"], "category": 1}])], "answer"),
        ([changed(qa=None)], "conversation 1: 'qa' must be a list, not null"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_named_with_its_place(found: Any, said: str) -> None:
    with pytest.raises(DataError) as refused:
        list(conversations(json.dumps(found).encode(), "locomo10.json"))
    assert said in str(refused.value)
    assert str(refused.value).startswith("locomo10.json")


def asks_of(episode: Episode) -> list[Ask]:
    return [event for event in episode.events if isinstance(event, Ask)]


def test_a_conversation_is_read_as_the_original_writes_it(tmp_path: Path) -> None:
    (episode,) = Locomo().episodes(data(tmp_path, ONE), None)
    assert "".join(event.text for event in episode.events if isinstance(event, Read)) == (
        'DATE: 1:56 pm on 8 May, 2023\nCONVERSATION:\nBob said, "I bought a boat." and shared a red boat.\n'
        '\nDATE: 9:00 am on 9 May, 2023\nCONVERSATION:\nAda said, "It sank."\n'
    )
    assert [(ask.evidence, ask.label, ask.accepted) for ask in asks_of(episode)] == [
        ("turn D2:1", "category=4,turns=1", ("a boat",)), ("turn D10:1", "category=2,turns=2", ("2023",)),
        ("", "category=3,turns=0", ("maybe",)),
    ]  # fmt: skip
    (fewer,) = Locomo(Locomo.Config(categories=(2, 4), questions=1, wording="official")).episodes(
        Library(tmp_path, tmp_path / "cache", hub=False), None
    )
    (ask,) = asks_of(fewer)
    assert ask.prompt.endswith("Short answer:")


def test_the_stand_in_is_named_and_answers_its_questions(tmp_path: Path) -> None:
    library = Library(None, tmp_path, hub=False)
    assert Locomo().data(library).label == "locomo (stand-in: invented conversations)"
    found = library.conversations()
    assert found == talks()
    assert len({c.id for c in found}) == len(found) == COUNT
    assert talks(2) == found[:2]
    for conversation in found:
        said = {turn.id: (turn, session.date) for session in conversation.sessions for turn in session.turns}
        assert {q.category for q in conversation.questions} == {1, 2, 4}
        assert len({q.question for q in conversation.questions}) == len(conversation.questions)
        for q in conversation.questions:
            turns = [said[place] for place in q.evidence]
            assert all(turn.speaker in q.question for turn, _ in turns)
            if q.category == 2:
                assert turns[0][1].endswith(f" on {q.answer}")
            else:
                answers = q.answer.split(", ")
                assert [answer in turn.text for answer, (turn, _) in zip(answers, turns, strict=True)] == [True] * len(
                    turns
                )
                told = [
                    text for turn, _ in said.values() if turn.speaker == turns[0][0].speaker for text in [turn.text]
                ]
                assert all(told.count(turn.text) == 1 for turn, _ in turns)


@pytest.mark.parametrize(
    ("said", "answer", "value"),
    [
        ("The boat.", "a boat", 1.0), ("on 8 May 2023, I think", "8 May, 2023", 2 * 3 / 9), ("", "a boat", 0.0),
        ("a car", "a boat", 0.0), ("boat boat", "boat", 2 / 3), ("red boat", "boat red", 1.0),
    ],
)  # fmt: skip
def test_f1_is_the_overlap_of_words(said: str, answer: str, value: float) -> None:
    assert f1(said, answer) == pytest.approx(value)


def answered(task: Locomo, library: Library, generated: dict[int, str]) -> pd.DataFrame:
    """Rows as the driver writes them, of somebody who writes `generated` for each category, else the answer."""
    rows = []
    for episode in task.episodes(library, None):
        for event, ask in enumerate(asks_of(episode)):
            category = int(ask.label.split(",")[0].removeprefix("category="))
            said = generated.get(category, ask.answer)
            rows.append(
                {"seed": 0, "episode": episode.id, "cluster": episode.id, "event": event, "kind": "ask", "control": "",
                 "start": 9, "tokens": 2, "nll": 1.0, "distance_tokens": 100 * category if ask.evidence else -1,
                 "choice_nll": [1.0], "predicted": said, "answer": ask.answer, "label": ask.label, "generated": said,
                 "accepted": list(ask.accepted)}
            )  # fmt: skip
    return pd.DataFrame(rows)


def test_containment_and_f1_by_category_and_distance(tmp_path: Path) -> None:
    task = Locomo()
    samples = answered(task, data(tmp_path, ONE), {2: "It was in 2023 or so.\nQuestion: What else?", 3: "no"})
    found = {(e.metric, e.slice): e.value for e in task.metrics(samples)}
    assert found["accuracy", ""] == pytest.approx(2 / 3)
    assert [found["accuracy", f"category={n}"] for n in (2, 3, 4)] == [1, 0, 1]
    assert found["f1", "category=2"] == pytest.approx(2 / 7)  # of the first line
    assert found["f1", ""] == pytest.approx((2 / 7 + 0 + 1) / 3)
    assert (found["f1", "distance=256"], found["f1", "distance=512"]) == (pytest.approx(2 / 7), 1)
    assert ("half_life", "") not in found
    samples.loc[0, ["predicted", "generated", "nll"]] = ["", "", float("nan")]
    samples["choice_nll"] = samples["choice_nll"].where(samples.index != 0, None)
    found = {(e.metric, e.slice): e.value for e in task.metrics(samples)}
    assert found["accuracy", ""] == pytest.approx(1 / 3)
    assert ("f1", "") not in found


@pytest.mark.parametrize(
    "wrong", [{"categories": ()}, {"categories": (5,)}, {"questions": -1}, {"max_tokens": 0}], ids=str
)
def test_impossible_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="locomo"):
        Locomo.Config(**wrong)


def test_the_task_keeps_its_promises(tmp_path: Path) -> None:
    check_task(Locomo(Locomo.Config(questions=3)), Library(None, tmp_path, hub=False), limit=2)
