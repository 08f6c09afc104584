"""Key-value and noun recall: what is made and trained on; perfect and empty memories get what they should."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
import pytest
import torch

from memory_bench.backbone.small import CLOSED
from memory_bench.data import Library
from memory_bench.data.facts import SEGMENT, VALUES, Setting, fact_episodes, make_facts
from memory_bench.data.nouns import make_nouns, noun_episodes
from memory_bench.driver.encoding import encode_episode
from memory_bench.episode import Ask, Episode
from memory_bench.errors import UserError
from memory_bench.tasks.key_value import FactsCorpus, KeyValue
from memory_bench.tasks.noun_recall import NounCorpus, NounRecall, drops
from memory_bench.zoo.named import Backbones, Loaded

HARD = Setting(load=3, asked=2, distractors=3, outdated=1)


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(None, tmp_path, hub=False)


def loaded(name: str, library: Library) -> Loaded:
    return Backbones(library, library.cache, hub=False).load(name)


def answered(task: Any, episodes: list[Episode], answer: Callable[[Ask], str], encode: Any) -> pd.DataFrame:
    """Rows as the driver writes them, of somebody who answers as `answer` does and is blind when wiped."""
    rows = []
    for episode in episodes:
        for q in encode_episode(episode, encode, 0).questions:
            for control in ("", "wiped"):
                said = answer(q.ask) if not control else VALUES[0]
                nll = 0.1 if said == q.ask.answer else 3.0
                rows.append(
                    {"seed": 0, "episode": episode.id, "cluster": episode.id, "event": q.event, "kind": "ask",
                     "control": control, "tokens": 1, "nll": nll, "distance_tokens": q.distance_tokens,
                     "choice_nll": [nll] * len(q.ask.choices), "predicted": said, "answer": q.ask.answer,
                     "label": q.ask.label, "generated": "" if q.ask.choices else said, "accepted": [q.ask.answer]}
                )  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize("setting", [Setting(), HARD, Setting(load=1, asked=1)], ids=["default", "hard", "one"])
@pytest.mark.parametrize("distance", [0, 1, 5])
def test_the_last_statement_about_a_key_is_the_answer(setting: Setting, distance: int) -> None:
    made = make_facts(Random(f"{distance}"), setting, distance)
    words = (made.evidence + made.filler).split()
    assert len(words) == SEGMENT * distance + SEGMENT - 3 * setting.asked
    facts = made.evidence.split()
    assert len(facts) == 2 * (setting.load + setting.outdated) <= SEGMENT
    last = dict(zip(facts[::2], facts[1::2], strict=True))
    for question, answer in made.questions:
        key = question.split()[-1]
        assert last[key] == answer.strip()
        assert key not in words[len(facts) :]  # nothing later contradicts it or gives it away


def test_distractors_stand_in_every_segment_between_and_nowhere_else() -> None:
    made = make_facts(Random("d"), HARD, 4)
    words = (made.evidence + made.filler).split()
    counts = [sum(w in VALUES for w in words[s * SEGMENT : (s + 1) * SEGMENT]) for s in range(5)]
    assert counts[1:4] == [3, 3, 3]
    assert counts[4] == 0


def test_splits_and_distances_have_their_own_facts() -> None:
    seen = [tuple(e.evidence for e in fact_episodes(s, 20, Setting(), d)) for s in ("train", "test") for d in (1, 2)]
    assert len(set(seen)) == 4
    assert fact_episodes("test", 3, Setting(), 1) == fact_episodes("test", 5, Setting(), 1)[:3]


@pytest.mark.parametrize(
    "wrong", [{"asked": 3}, {"outdated": 3}, {"load": 6, "asked": 2}, {"distractors": 9}, {"distances": (1, 1)}]
)
def test_impossible_facts_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="key-value"):
        KeyValue.Config(**wrong)


def test_training_lines_are_whole_segments_and_score_only_answers(library: Library) -> None:
    own = loaded("key-value", library)
    for line in FactsCorpus(own.encode, HARD).batch(3, 4, 16, torch.Generator().manual_seed(0)):
        assert len(line) == 4 * SEGMENT
        said = [CLOSED["key-value"].words[i] for i in line.ids[line.scored].tolist()]
        assert len(said) == HARD.asked
        assert set(said) <= set(VALUES)
        assert line.given is not None
        assert not bool((line.given & line.scored).any())


def test_what_changes_the_facts_changes_the_training(library: Library) -> None:
    plain, hard = KeyValue(), KeyValue(KeyValue.Config(distractors=2, load=3))
    names = [task.plan(library, pretrained=False).corpus for task in (plain, hard)]
    assert names == ["key-value", "key-value,load=3,distractors=2"]
    assert KeyValue(KeyValue.Config(episodes=3)).plan(library, pretrained=True).corpus == "key-value"


def test_perfect_memory_is_1_and_none_is_the_floor(library: Library) -> None:
    task = KeyValue(KeyValue.Config(episodes=8))
    episodes = list(task.episodes(library, None))
    encode = loaded("key-value", library).encode
    for answer, value in ((lambda ask: ask.answer, 1.0), (lambda ask: "nothing", 0.0)):
        found = task.metrics(answered(task, episodes, answer, encode))
        assert (found[0].metric, found[0].slice, found[0].value) == ("accuracy", "", value)
        slices = [e.slice for e in found if e.metric == "accuracy" and e.slice.startswith("distance=")]
        assert slices == [f"distance={SEGMENT * d}" for d in task.config.distances]


@pytest.mark.parametrize("delays", [(1,), (1, 3, 4)], ids=str)
def test_the_second_list_ends_a_segment(delays: tuple[int, ...]) -> None:
    made = make_nouns(Random("n"), "words", 5, delays)
    words = len((made.first.opening + "".join(made.first.nouns)).split())
    for delay, filler in zip(delays, made.fillers, strict=True):
        words += len(filler.split())
        assert words + 1 + 5 == SEGMENT * (delay + 1)


@pytest.mark.parametrize("wording", ["words", "prose"])
def test_second_readings_are_the_same_shuffled_and_new(wording: str) -> None:
    made = noun_episodes("test", 1, wording, 5, (1, 2))[0]
    bare = [[n.strip(", ") for n in reading.nouns] for reading in (made.first, *made.readings)]
    first, same, shuffled, novel = bare
    assert same == first != shuffled
    assert sorted(shuffled) == sorted(first)
    assert not set(novel) & set(first)


def test_noun_lines_score_the_second_reading(library: Library) -> None:
    own = loaded("noun-recall", library)
    line = NounCorpus(own.encode, 5).batch(1, 3, 16, torch.Generator().manual_seed(0))[0]
    assert len(line) == 3 * SEGMENT
    again, first = line.ids[line.scored], line.ids[1:6]
    assert again.tolist() == first.tolist()


def test_who_remembers_a_list_is_less_surprised_by_it_alone(library: Library) -> None:
    task = NounRecall(NounRecall.Config(episodes=6, delays=(1, 2)))
    episodes = list(task.episodes(library, None))
    samples = answered(
        task, episodes, lambda ask: ask.answer if ask.label.startswith("same") else "x",
        loaded("noun-recall", library).encode,
    )  # fmt: skip
    found = {(e.metric, e.slice): e.value for e in task.metrics(samples)}
    assert found["surprisal_drop", ""] == pytest.approx(2.9)
    assert found["surprisal_drop", "list=shuffled"] == found["surprisal_drop", "list=novel"] == 0
    assert found["surprisal_drop", "control:wiped"] == 0
    delays = sorted(set(drops(samples)["delay"]))
    assert [found["surprisal_drop", f"delay={d}"] for d in delays] == pytest.approx([2.9, 2.9])
