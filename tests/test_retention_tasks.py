"""Tasks about retention: texts and places, unrelated passages, hits, an oracle and the blind, numbers by hand."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from test_observe import words

from memory_bench.data import Library, Passage
from memory_bench.data.entities import passages
from memory_bench.data.passages import stories
from memory_bench.data.rows import nq, squad
from memory_bench.data.worlds import TASKS
from memory_bench.data.worlds import stories as made_stories
from memory_bench.driver.encoding import encode_episode
from memory_bench.driver.observe import observe
from memory_bench.episode import Ask, Document, Episode, Read
from memory_bench.errors import UserError
from memory_bench.protocol import MemoryModel, Readout, Segment, State, Traits
from memory_bench.tasks.answers import hit, normalise, raw_hit
from memory_bench.tasks.babi import Babi, scattered
from memory_bench.tasks.passkey import Passkey
from memory_bench.tasks.retention import NQRetention, Others, RetentionConfig, SquadRetention, usable
from memory_bench.testing import tiny_backbone
from memory_bench.testing.tasks import as_bytes, from_bytes


def offline(tmp_path: Path) -> Library:
    return Library(None, tmp_path, hub=False)


# models that know everything or nothing


class Parrot(MemoryModel[Any]):
    """Remembers all bytes and continues the last key that it has read before."""

    Config = RetentionConfig
    source = "none"

    def __init__(self, *, remembers: bool) -> None:
        super().__init__()
        self.backbone, self.remembers = tiny_backbone("llama", vocab_size=256), remembers
        self.traits = Traits(segment=64, bounded=False)

    def open(self, rows: int, *, seeds: Any = None) -> Any:
        return Seen(torch.zeros(rows, 0, dtype=torch.long))

    def step(self, state: Any, segment: Segment, *, write: bool = True) -> tuple[Readout, Any]:
        told = torch.cat([state.ids, segment.ids * segment.mask], dim=1)
        hidden = torch.zeros(*segment.ids.shape, 256)
        for row in range(len(told)):
            text = bytes(told[row].tolist()).replace(b"\0", b"")
            hidden[row, -1, self._next(text)] = 9.0
        return Readout(hidden, lambda h: h), Seen(told) if write else state

    def _next(self, text: bytes) -> int:
        before, _, said = text.rpartition(b"Answer:")
        question = before.rpartition(b"Question: ")[2].strip()
        answers = {b"Who is Ada?": b" Byron", b"Who is Bob?": b" Dylan"}
        wanted = answers.get(question, b"?")
        known = self.remembers and wanted.strip() in before
        return [*(wanted if known else b""), *b"-" * 999][min(len(said), 900)]

    def flops(self, tokens: int, remembered: int) -> int:
        return 0


class Seen(State):
    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def rows(self, index: torch.Tensor) -> "Seen":
        return Seen(self.ids[index])

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        return [("ids", self.ids)]


def small_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    """Two questions, and other passages of which one names an answer."""
    filler = "nothing of interest was ever said here by anybody about this "
    asked = [
        Passage("a", "Ada", f"Ada is Byron, the first of all. {filler * 3}", "Who is Ada?", ("Byron",)),
        Passage("b", "Bob", f"Bob is Dylan, the voice of all. {filler * 3}", "Who is Bob?", ("Dylan",)),
    ]
    others = [Passage(f"o{n}", f"T{n}", f"Text {n}. {words(n, 90)}") for n in range(30)]
    others.append(Passage("o", "T", "byron again " + words(3, 90)))
    monkeypatch.setattr(Library, "passages", lambda self, need, split: asked if split == "test" else others)
    return offline(tmp_path)


@pytest.mark.parametrize("carry_over", [False, True])
def test_an_oracle_is_right_and_the_blind_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, carry_over: bool
) -> None:
    library = small_world(tmp_path, monkeypatch)
    task = SquadRetention(RetentionConfig(steps=(0, 1, 3), chunk=70, carry_over=carry_over))
    episodes = list(task.episodes(library, None))
    for remembers, wanted in ((True, 1.0), (False, 0.0)):
        rows = observe(Parrot(remembers=remembers), episodes, as_bytes, seed=0, decode=from_bytes)
        found = {(e.metric, e.slice): e.value for e in task.metrics(pd.DataFrame(rows))}
        assert found["accuracy", ""] == found["raw_hit", ""] == wanted
        assert [found["accuracy", f"distance={d}"] for d in (0, 70, 210)] == [wanted] * 3
        assert found["accuracy", "control:wiped"] == 0.0
        assert found["accuracy", "control:ceiling"] == wanted
        if not carry_over:
            assert found["accuracy", "control:foreign"] == 0.0


# texts and places


def test_distances_are_exact_whatever_the_tokenizer(tmp_path: Path) -> None:
    def pairs(text: str) -> tuple[list[int], list[int]]:
        data = text.encode()
        return [0] * ((len(data) + 1) // 2), [len(data[i : i + 2]) for i in range(0, len(data), 2)]

    task = SquadRetention(RetentionConfig(steps=(0, 1, 4), chunk=200, questions=3))
    for episode in task.episodes(offline(tmp_path), None):
        for tokenizer, size in ((as_bytes, 1), (pairs, 2)):
            stream = encode_episode(episode, tokenizer, 0)
            assert [q.distance_tokens for q in stream.questions] == [0, 200, 800]
            assert [q.distance_bytes for q in stream.questions] == [0, 200 * size, 800 * size]
            assert [q.at for q in stream.questions] in (
                [200, 400, 1000],
                [len(stream.line) - 800 + d for d in (0, 200, 800)],
            )
        evidence = bytes(encode_episode(episode, as_bytes, 0).questions[0].evidence.tolist()).decode()
        passage = episode.events[0]
        assert isinstance(passage, Read)
        assert passage.text.startswith(evidence[:100])


def test_a_lead_fills_the_chunk_in_front_of_a_passage() -> None:
    read = Read("abc", tag="t", tokens=8, lead="one two three")
    stream = encode_episode(Episode("e", (read, Ask("?", (), " a", "t", max_tokens=1))), as_bytes, 0)
    assert bytes(stream.line.ids.tolist()) == b"threeabc"
    assert stream.words.sum() == 2
    assert bytes(stream.questions[0].evidence.tolist()) == b"abc"
    assert len(stream.nbytes) == len(stream.words) == len(stream.events) == 8
    long = encode_episode(Episode("e", (Read("abcdefghij", tokens=4, lead="xyz"),)), as_bytes, 0)
    assert bytes(long.line.ids.tolist()) == b"abcd"


@pytest.mark.parametrize("task", [SquadRetention, NQRetention])
@pytest.mark.parametrize("origin", ["stand-in", "data folder"])
def test_unrelated_passages_are_unrelated_and_nested(task: Any, origin: str, request: Any, tmp_path: Path) -> None:
    library = offline(tmp_path) if origin == "stand-in" else request.getfixturevalue("data")
    few, more, again, other = (
        list(task(RetentionConfig(steps=steps, questions=6, seed=seed)).episodes(library, None))
        for steps, seed in (((0, 2), 0), ((0, 2, 9), 0), ((0, 2, 9), 0), ((0, 2, 9), 1))
    )
    assert more == again
    assert more != other
    titles = {p.text: p.title for split in ("train", "test") for p in library.passages(task.needs, split)}
    answers = {p.id: p for p in library.passages(task.needs, "test")}
    assert len(few) == 6
    for short, long in zip(few, more, strict=True):
        assert short.events == long.events[: len(short.events)]
        reads = [e for e in long.events if isinstance(e, Read)]
        item = answers[long.id]
        assert item.answers[0] in reads[0].text
        assert len(reads) == 10
        seen = [p for r in reads[1:] for p in r.text.strip().split("\n") if p in titles]
        assert len(seen) == len(set(seen))
        assert not [p for p in seen if item.title and titles[p] == item.title]
        texts = "\n".join([reads[0].lead, *(r.text for r in reads[1:])]).lower()
        assert not [a for a in item.answers if a.lower() in texts]
        ask = [e for e in long.events if isinstance(e, Ask)]
        assert [a.label for a in ask] == ["distance=0", "distance=1024", "distance=4608"]
        assert all(a.accepted == item.answers and a.answer == f" {item.answers[0]}" for a in ask)
    assert len({e.id for e in more}) == 6


def test_too_many_steps_are_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = small_world(tmp_path, monkeypatch)
    with pytest.raises(UserError, match="unrelated"):
        list(SquadRetention(RetentionConfig(steps=(0, 300))).episodes(library, None))
    for steps in ((), (1, 0), (0, 313), (-1,)):
        with pytest.raises(UserError, match="312"):
            RetentionConfig(steps=steps)


def test_carry_over_is_one_stream_and_wording_the_originals(tmp_path: Path) -> None:
    library = offline(tmp_path)
    alone, joined = (
        list(SquadRetention(RetentionConfig(steps=(0, 1), carry_over=c, wording="official")).episodes(library, 3))
        for c in (False, True)
    )
    assert [len(alone), len(joined)] == [3, 1]
    assert joined[0].events == tuple(event for episode in alone for event in episode.events)
    reads, asks = ([e for e in joined[0].events if isinstance(e, kind)] for kind in (Read, Ask))
    assert len({r.tag for r in reads if r.tag}) == 3
    assert reads[0].text.startswith("\n\nContext: ")
    assert asks[0].prompt.startswith(" Questions: ")
    assert asks[0].prompt.endswith(" Answer:")
    stream = encode_episode(joined[0], as_bytes, 0)
    assert [q.distance_tokens for q in stream.questions] == [0, 512] * 3


def test_usable_answers_are_short_and_in_the_passage() -> None:
    text = "x" * 90 + " Denver Broncos won in 1998 by far too many points"
    assert usable(Passage("a", "", text, "q", ("Denver Broncos",)))
    for answers in ((), ("Chicago",), ("won",), ("won in 1998 by",), ("1998", "far")):
        assert not usable(Passage("a", "", text, "q", answers))
    assert not usable(Passage("a", "", text * 99, "q", ("1998",)))
    assert Others([Passage("a", "", "x" * 50)], 100).chunks(Passage("b", "", "y"), 1, _rng()) is None


def test_an_answer_its_article_and_its_passage_are_never_read_in_between() -> None:
    item = Passage("a", "Rome", "Rome is here", "q", ("Tiber",))
    bad = [Passage(f"b{n}", "T", f"{n} the TIBER again " + "x" * 90) for n in range(20)]
    bad += [Passage(f"c{n}", "Rome", f"{n} of the same article " + "x" * 90) for n in range(20)]
    bad.append(Passage("d", "", item.text))
    good = [Passage(f"e{n}", "T", f"good {n} " + "x" * 92) for n in range(4)]
    texts = Others([*bad, *good], 200).chunks(item, 2, _rng())
    assert texts is not None
    assert sorted(line[:6] for text in texts for line in text.split("\n")) == ["good 0", "good 1", "good 2", "good 3"]
    assert Others([*bad, *good], 200).chunks(item, 3, _rng()) is None


def _rng() -> Any:
    from random import Random

    return Random(0)


def test_passkeys_stand_where_they_should(tmp_path: Path) -> None:
    task = Passkey(Passkey.Config(lengths=(64, 300), depths=(0.0, 0.5, 1.0), repeats=2))
    episodes = list(task.episodes(offline(tmp_path), None))
    assert len({e.id for e in episodes}) == 12
    assert task.beside == ()
    for episode in episodes:
        stream = encode_episode(episode, as_bytes, 0)
        (asked,) = stream.questions
        text = bytes(stream.line.ids.tolist()).decode()
        key = asked.ask.answer.strip()
        assert (len(key), text.count(key)) == (5, 2)
        parts = dict(part.split("=") for part in asked.ask.label.split(","))
        length, depth = int(parts["length"]), float(parts["depth"])
        assert asked.distance_tokens == int(parts["distance"]) == round((1 - depth) * length)
        noise = len(text) - sum(len(e.text) for e in episode.events if isinstance(e, Read) and not e.tokens)
        assert noise == length
    rows = observe(Parrot(remembers=False), episodes[:3], as_bytes, seed=0, decode=from_bytes)
    known = pd.DataFrame([{**r, "generated": r["answer"] if r["label"].startswith("depth=0,") else "7"} for r in rows])
    found = {(e.metric, e.slice): e.value for e in task.metrics(known)}
    assert found["accuracy", "depth=0,length=64"] == 1.0
    assert found["accuracy", "depth=0.5,length=64"] == 0.0


def test_facts_are_scattered_in_order_and_distances_are_to_the_last_that_is_needed() -> None:
    (story,) = stories(b"1 A b.\n2 C d.\n3 E f.\n4 Q?\td\t2 1\n", "qa2.txt", 2)
    assert (story.facts, story.support, story.answer) == (("A b.", "C d.", "E f."), (1, 0), "d")
    book = Document("b", "Lorem ipsum dolor sit amet. " * 400)
    for seed in range(5):
        rng = _rng()
        rng.seed(seed)
        episode = scattered(story, 100, (" b", " d"), rng, [book])
        stream = encode_episode(episode, as_bytes, 0)
        text = bytes(stream.line.ids.tolist()).decode()
        assert len(text) == 100 + sum(len(fact) + 2 for fact in story.facts)
        assert text.index("A b.") < text.index("C d.") < text.index("E f.")
        (asked,) = stream.questions
        assert asked.distance_tokens == len(text) - text.index("C d.") - len("C d.\n")
        assert bytes(asked.evidence.tolist()) == b"\nA b.\n\nC d.\n"  # the ceiling has all that is needed
    with pytest.raises(UserError, match="bAbI"):
        list(stories(b"no number", "qa1.txt", 1))


def test_the_simulated_world_is_consistent() -> None:
    for task in TASKS:
        for story in made_stories(task, 60):
            assert story.support
            assert max(story.support) < len(story.facts)
            assert story.answer in " ".join(story.facts[n] for n in story.support)
            assert len(story.answer.split()) == 1
        assert made_stories(task, 3) == made_stories(task, 60)[:3]
    for story in made_stories(1, 60):
        who = story.question.removeprefix("Where is ").removesuffix("?")
        last = [fact for fact in story.facts if fact.startswith(who)][-1]
        assert last.endswith(f"the {story.answer}.")


def test_babi_chooses_among_the_answers_of_the_task(data: Library) -> None:
    task = Babi(Babi.Config(lengths=(0, 256), questions=2))
    episodes = list(task.episodes(data, None))
    assert len(episodes) == 20
    assert {e.cluster for e in episodes} == {e.id.split(",")[0] for e in episodes}
    assert task.levels(data)["chance"] == pytest.approx((4 / 6 + 1 / 7) / 5)


def test_invented_passages_answer_their_questions_and_nothing_else_does() -> None:
    test, train = passages("squad", "test", 200), passages("squad", "train", 400)
    assert passages("squad", "test", 5) == test[:5]
    everything = " ".join(p.text for p in (*test, *train))
    for p in test:
        assert p.title in p.question
        assert p.text.count(p.answers[0]) == everything.count(f" {p.answers[0]}") == 1
    assert not {p.title for p in test} & {p.title for p in train}


def test_files_of_passages() -> None:
    qa = {"id": "1", "question": " Q? ", "answers": [{"text": "b"}, {"text": "b"}, {"text": "c"}]}
    none = {"id": "2", "question": "R?", "answers": [], "is_impossible": True}
    file = {"data": [{"title": "T", "paragraphs": [{"context": "a b c", "qas": [qa, none]}]}]}
    (found,) = squad(json.dumps(file).encode(), "x.json")
    assert found == Passage("1", "T", "a b c", "Q?", ("b", "c"))
    row = {"question": "q", "answers": ["no", "here"], "ctxs": [{"title": "T", "text": "it is here"}]}
    lines = [json.dumps(r) for r in (row, {**row, "answers": ["x"]})]
    assert [p.answers for p in nq("\n".join(lines).encode(), "x.jsonl")] == [("here", "no")]


# hits and numbers


def test_hits_are_whole_words_after_normalisation() -> None:
    assert normalise("The  Denver-Broncos, an A!") == "denverbroncos"
    assert hit(" the Denver Broncos.\n", ["denver broncos"])
    assert hit(" It was A. Byron", ["Ada", "Byron"])
    assert not hit(" 15", ["5"])
    assert not hit("Bron cos", ["Broncos"])
    assert not hit("anything", ["the", ""])
    assert raw_hit(" won by Broncos", " Broncos")
    assert raw_hit("15", " 5")
    assert not raw_hit(" broncos", " Broncos")


def test_numbers_by_hand() -> None:
    base = {"seed": 0, "kind": "ask", "control": "", "event": 1, "start": 5, "tokens": 2, "nbytes": 5, "words": 1,
            "distance_tokens": 0, "distance_bytes": 0, "choice_nll": [4.0], "nll": 4.0, "answer": " Rome",
            "predicted": "", "accepted": ["Rome", "Roma"]}  # fmt: skip
    said = {("a", 0): " Rome.", ("a", 512): " roma", ("b", 0): " ROME", ("b", 512): " Paris"}
    rows = [
        {**base, "episode": e, "cluster": e, "event": d, "label": f"distance={d}", "distance_tokens": d, "generated": s}
        for (e, d), s in said.items()
    ]
    rows += [{**row, "control": "wiped", "generated": "x", "nll": 9.0} for row in rows]
    rows += [{**row, "control": "ceiling", "generated": "Rome"} for row in rows[:4]]
    task = SquadRetention()
    samples = pd.DataFrame(rows)
    found = {(e.metric, e.slice): e for e in task.metrics(samples)}
    assert next(iter(found)) == ("accuracy", "")
    assert found["accuracy", ""].value == 0.75
    assert found["accuracy", ""].n == 2
    assert found["raw_hit", ""].value == 0.25
    assert found["accuracy", "distance=0"].value == 1.0
    assert found["accuracy", "distance=512"].value == 0.5
    assert found["answer_logprob", ""].value == -4.0
    assert found["answer_logprob_token", "distance=512"].value == -2.0
    assert found["accuracy", "control:wiped"].value == 0.0
    assert found["accuracy", "control:ceiling"].value == 1.0
    assert found["memory_lift", "distance=512"].value == 0.5
    assert ("half_life", "") in found
    assert task.correct(samples).tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1]
