"""Fact updates: what is made and trained on, what answers are called, and the tables and plots of a report."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
import pytest
import torch
from retention_records import task_cell
from test_facts import loaded

from memory_bench.backbone.small import CLOSED
from memory_bench.cell import Choice
from memory_bench.data import Library
from memory_bench.data.facts import SEGMENT, VALUES
from memory_bench.data.lives import RELATIONS
from memory_bench.data.studies import OBJECTS, SUBJECTS, TIMES, VERBS
from memory_bench.data.updates import Statement, balanced_cases, drawn_cases, make_updates
from memory_bench.driver.encoding import encode_episode
from memory_bench.episode import Ask, Episode, Read
from memory_bench.errors import UserError
from memory_bench.report import plots
from memory_bench.report.build import Report, build
from memory_bench.store import Store
from memory_bench.tasks.fact_updates import FactUpdates, UpdatesCorpus, told_apart
from memory_bench.testing import check_task
from synthetic import make_record

Config = FactUpdates.Config
SMALL = Config(updates=(0, 2), distances=(1, 4), repeats=5)


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(None, tmp_path, hub=False)


def history(episode: Episode) -> dict[str, list[tuple[int, str]]]:
    """Per key the (place in tokens, value) of its statements, oldest first; words are tokens."""
    found: dict[str, list[tuple[int, str]]] = {}
    at = 0
    for event in episode.events:
        if isinstance(event, Read):
            words = event.text.split()
            if len(words) == 2 and words[1] in VALUES:
                found.setdefault(words[0], []).append((at, words[1]))
            at += len(words)
    return found


def said_of(label: str, name: str) -> str:
    return dict(part.split("=") for part in label.split(","))[name]


@pytest.mark.parametrize("keys", [1, 2, 3])
def test_the_newest_value_answers_and_older_ones_are_named(library: Library, keys: int) -> None:
    task = FactUpdates(Config(keys=keys, repeats=2, distances=(0, 1, 5)))
    for episode in task.episodes(library, None):
        told = history(episode)
        values = [value for stated in told.values() for _, value in stated]
        assert len(set(values)) == len(values)  # a wrong answer says whose it is
        asked = [event for event in episode.events if isinstance(event, Ask)]
        assert len(asked) == len(told) == keys
        for event in asked:
            stated = told[event.prompt.split()[-1]]
            segments = [at // SEGMENT for at, _ in stated]
            assert len(set(segments)) == len(segments)
            assert event.answer.split() == [stated[-1][1]]
            evidence = [e.text for e in episode.events if isinstance(e, Read) and e.tag == event.evidence]
            assert evidence == [f" {event.prompt.split()[-1]}{event.answer}"]
            assert said_of(event.label, "older").split("|") == ([v for _, v in stated[:-1]] or [""])
            assert set(said_of(event.label, "others").split("|")) - {""} == {*values} - {v for _, v in stated}
            assert int(said_of(event.label, "updates")) == len(stated) - 1
            read = sum(len(e.text.split()) for e in episode.events if isinstance(e, Read))
            assert int(said_of(event.label, "distance")) == SEGMENT * (read // SEGMENT - segments[-1])
            assert event.choices == tuple(f" {value}" for value in VALUES)


def test_every_number_of_updates_has_every_distance_as_often(library: Library) -> None:
    for key in zip(*balanced_cases((0, 1, 2), (1, 2), 2, 24), strict=True):
        assert set(Counter(key).values()) == {4}
    assert balanced_cases((0, 1), (1, 2), 2, 9)[:5] == balanced_cases((0, 1), (1, 2), 2, 5)
    task = FactUpdates(SMALL)
    labels = [e.label for x in task.episodes(library, None) for e in x.events if isinstance(e, Ask)]
    counts = Counter((said_of(label, "updates"), said_of(label, "distance")) for label in labels)
    assert counts == {(n, str(d * SEGMENT)): 10 for n in "02" for d in (1, 4)}


@pytest.mark.parametrize("segments", [1, 2, 4, 8])
def test_training_lines_are_whole_segments_and_score_only_answers(library: Library, segments: int) -> None:
    own = loaded("key-value", library)
    for line in UpdatesCorpus(own.encode, Config()).batch(20, segments, 16, torch.Generator().manual_seed(0)):
        assert len(line) == segments * SEGMENT
        words = [CLOSED["key-value"].words[i] for i in line.ids.tolist()]
        for place in line.scored.nonzero().ravel().tolist():
            before = [at for at in range(place - 2) if words[at] == words[place - 1] and words[at + 1] in VALUES]
            assert words[before[-1] + 1] == words[place]  # the newest
        assert line.given is not None
        assert not bool((line.given & line.scored).any())


def test_drawn_cases_reach_all_updates_and_distances() -> None:
    found = {case for n in range(400) for case in drawn_cases(Random(n), (0, 1, 2, 4), 2, 8)}
    assert {updates for updates, _ in found} == {0, 1, 2, 4}
    assert {distance for _, distance in found} == set(range(8))
    assert all(updates + distance < 8 for updates, distance in found)


@pytest.mark.parametrize("distance", [0, 3])
def test_prose_says_the_same_in_chunks_of_equal_length(library: Library, distance: int) -> None:
    task = FactUpdates(Config(wording="prose", updates=(4,), distances=(distance,), repeats=20, chunk=128))
    for episode in task.episodes(library, 12):
        sizes = [event.tokens for event in episode.events if isinstance(event, Read)]
        assert sum(sizes) % 128 == 0
        assert min(sizes) >= 64 or len(sizes) == sum(sizes) // 128
        for event in episode.events:
            if isinstance(event, Ask):
                assert len(set(event.choices)) == 8
                older = said_of(event.label, "older").split("|")
                assert len(older) == 4
                assert {f" {value}" for value in older} < set(event.choices)
                assert event.answer.strip() not in older
                newest = next(e for e in episode.events if isinstance(e, Read) and e.tag == event.evidence)
                assert event.answer in newest.text
                assert any(newest.text in e.text for e in episode.events if isinstance(e, Read))
        stream = encode_episode(episode, lambda text: (list(range(len(text.split()))), [1] * len(text.split())), 0)
        assert all(q.distance_tokens >= 128 * distance for q in stream.questions)


def test_no_value_of_prose_stands_in_its_filler() -> None:
    filler = {*SUBJECTS, *VERBS, *OBJECTS, *TIMES}
    for relation in RELATIONS:
        assert not filler & set(relation.values)
        assert len(set(relation.values)) == len(relation.values)
        assert len(set(relation.wordings)) == 3
        assert (
            max(len(w.format("Klaistroumsk Plaidreasourk", v)) for w in relation.wordings for v in relation.values) < 90
        )


def test_statements_of_prose_are_in_three_wordings() -> None:
    made = make_updates(Random("w"), [(4, 1), (4, 2)], 8, prose=64)
    said = [p.text for parts in made.segments for p in parts if isinstance(p, Statement)]
    assert len(said) == 10
    assert len({text.rsplit(" ", 2)[0] for text in said}) > 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"updates": (0, 0)}, "updates must be different"), ({"updates": (-1,)}, "updates must be different"),
        ({"distances": ()}, "distances must be different"), ({"keys": 4}, "keys must be from 1 to 3"),
        ({"repeats": 0}, "repeats at least 1"), ({"spread": 3}, "spread must be at least the most updates, 4"),
        ({"updates": (0, 9), "spread": 9}, "must be at most 16, not 20"),
        ({"wording": "prose", "chunk": 100}, "chunk must be at least 64 a key, 128"),
        ({"wording": "prose", "updates": (7,), "keys": 2}, "must be at most 12, not 16"),
    ],
)  # fmt: skip
def test_impossible_updates_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match="fact-updates") as refused:
        Config(**wrong)
    assert said in str(refused.value)


def test_what_changes_the_facts_changes_the_training(library: Library) -> None:
    names = [FactUpdates(c).plan(library, pretrained=False).corpus for c in (Config(), Config(updates=(0, 3), keys=3))]
    assert names == ["fact-updates", "fact-updates,updates=(0,3),keys=3"]
    assert FactUpdates(Config(repeats=3, distances=(1,))).plan(library, pretrained=False).corpus == "fact-updates"
    assert FactUpdates(Config(wording="prose")).plan(library, pretrained=True).corpus == "books"


def answered(task: FactUpdates, library: Library, answer: Callable[[Ask], str], seed: int = 0) -> pd.DataFrame:
    """Rows as the driver writes them, of somebody who answers as `answer` does and is blind when wiped."""
    rows = []
    for episode in task.episodes(library, None):
        asks = [(i, e) for i, e in enumerate(episode.events) if isinstance(e, Ask)]
        for i, ask in asks:
            for control in ("", "wiped", "ceiling"):
                said = {"": answer(ask), "wiped": ask.choices[0], "ceiling": ask.answer}[control]
                nll = 0.1 if said == ask.answer else 3.0
                far = int(said_of(ask.label, "distance"))
                rows.append(
                    {"seed": seed, "episode": episode.id, "cluster": episode.id, "event": i, "kind": "ask",
                     "control": control, "start": far, "tokens": 1, "nbytes": 4, "words": 1, "nll": nll,
                     "distance_tokens": far, "distance_bytes": far, "choice_nll": [nll] * len(ask.choices),
                     "predicted": said, "answer": ask.answer, "label": ask.label, "generated": "", "greedy": False,
                     "accepted": [ask.answer]}
                )  # fmt: skip
    return pd.DataFrame(rows)


def oldest(ask: Ask) -> str:
    """What somebody answers who never replaces a value."""
    older = said_of(ask.label, "older").split("|")[0]
    return f" {older}" if older else ask.answer


def foreign(ask: Ask) -> str:
    """Another key's value."""
    return f" {said_of(ask.label, 'others').split('|')[0]}"


@pytest.mark.parametrize(
    ("answer", "rates"),
    [(lambda ask: ask.answer, (1, 0, 0)), (oldest, (0.5, 0.5, 0)), (foreign, (0, 0, 1))],
    ids=["newest", "oldest", "another key's"],
)
def test_the_three_rates_add_up(library: Library, answer: Callable[[Ask], str], rates: tuple[float, ...]) -> None:
    task = FactUpdates(SMALL)
    found = {(e.metric, e.slice): e for e in task.metrics(answered(task, library, answer))}
    names = ("accuracy", "stale_rate", "alien_rate")
    assert tuple(found[name, ""].value for name in names) == pytest.approx(rates)
    for slice_ in ("updates=0", "updates=2", "distance=16", "distance=64", "updates=2,distance=64"):
        assert sum(found[name, slice_].value for name in names) == pytest.approx(1)
    assert found["alien_rate", "value=another key's"].value == pytest.approx(rates[2])
    assert found["alien_rate", "value=never stated"].value == 0
    assert not found["stale_rate", ""].higher_is_better


def test_the_rates_of_a_guess_are_counted_from_the_choices(library: Library) -> None:
    task = FactUpdates(SMALL)
    found = {(e.metric, e.slice): e.value for e in task.metrics(answered(task, library, oldest))}
    for slice_, stale in (("", 1 / 16), ("updates=0", 0), ("updates=2", 2 / 16), ("distance=64", 1 / 16)):
        assert found["stale_chance", slice_] == pytest.approx(stale)
        assert found["alien_chance", slice_] == pytest.approx(15 / 16 - stale)
    parts = [found["alien_chance", f"value={name}"] for name in ("another key's", "never stated")]
    assert sum(parts) == pytest.approx(found["alien_chance", ""])
    assert task.levels(library) == {"chance": 1 / 16, "any value of the key": pytest.approx((1 + 1 / 3) / 2)}
    rng = Random("guess")  # measured, a guess has these rates
    many = FactUpdates(replace(SMALL, repeats=150))
    apart = told_apart(answered(many, library, lambda ask: rng.choice(ask.choices)))
    apart = apart[(apart["control"] == "") & (apart["updates"] == 2)]
    assert apart["stale"].mean() == pytest.approx(2 / 16, abs=0.04)
    assert apart["alien"].mean() == pytest.approx(13 / 16, abs=0.05)


def test_where_questions_are_unanswered_there_are_no_rates(library: Library) -> None:
    task = FactUpdates(SMALL)
    samples = answered(task, library, lambda ask: ask.answer)
    first = samples.index[samples["control"] == ""][:3]
    samples.loc[first, ["predicted", "nll"]] = ["", float("nan")]
    samples["choice_nll"] = samples["choice_nll"].where(~samples.index.isin(first), None)
    found = task.metrics(samples)
    assert found[0].value == pytest.approx(1 - 3 / 40)  # they count as wrong
    assert not [e for e in found if e.metric in ("stale_rate", "alien_rate")]


@pytest.mark.parametrize("wording", ["words", "prose"])
def test_the_task_keeps_its_promises(library: Library, wording: Any) -> None:
    check_task(FactUpdates(Config(wording=wording, distances=(1, 2))), library, limit=2)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The board of one who replaces, one who never does, and one who answers with other keys' values."""
    task, library = FactUpdates(SMALL), Library(None, tmp_path_factory.mktemp("data"), hub=False)
    store = Store.open_or_create(tmp_path_factory.mktemp("updates") / "run")
    who: dict[str, Callable[[Ask], str]] = {"rmt": lambda ask: ask.answer, "memorizing": oldest, "truncation": foreign}
    for model, answer in who.items():
        for seed in (0, 1):
            samples = answered(task, library, answer, seed)
            cell = replace(task_cell(model, "fact-updates", seed), task=Choice("fact-updates", config={}))
            record = replace(make_record(replace(cell, task=Choice("pubmedqa")), None), cell=cell)
            record = replace(record, metrics=tuple(task.metrics(samples)), levels=dict(task.levels(library)))
            store.write_record(record, samples)
    return build(store, {"fact-updates": task})


def test_rates_stand_in_tables_with_a_guess_as_the_last_line(report: Report) -> None:
    text = report.markdown()
    stale = text[
        text.index("Stale rate (an older value of the same key) by number of updates and distance in tokens") :
    ]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in stale.split("\n\n")[1].splitlines()]
    assert lines[0] == ["model", "0 updates", "2 updates", "16 tokens", "64 tokens"]
    rows = {line[0]: line[1:] for line in lines[2:]}
    assert list(rows)[-1] == "(a guess)"
    assert rows["(a guess)"] == ["0.0 %", "12.5 %", "6.2 %", "6.2 %"]
    assert [cell.split(" ")[0] for cell in rows["memorizing"]] == ["0.0", "100.0", "50.0", "50.0"]
    assert [cell.split(" ")[0] for cell in rows["rmt"]] == ["0.0"] * 4
    assert "Alien rate (a value of another key, or one never stated) by number of updates" in text
    assert "Accuracy by number of updates:" in text
    assert "**stale rate**" in text
    page = report.html()
    assert "Stale rate (an older value of the same key)" in page
    assert "(a guess)" in page


def test_plots_show_the_rates_by_updates_and_by_distance(report: Report) -> None:
    (board,) = report.boards
    kinds = {plot.kind: plot for plot in plots.plots(board)}
    assert {"updates", "rates", "retention", "half_life"} <= kinds.keys()
    three = plots.draw(board, kinds["updates"]).axes
    assert [axes.get_ylabel().split(" (")[0] for axes in three] == ["accuracy", "stale rate", "alien rate"]
    assert [axes.get_ylabel().rsplit(", ", 1)[1] for axes in three] == ["higher is better"] + ["lower is better"] * 2
    curves = {line.get_label(): list(line.get_ydata()) for line in three[1].lines}
    assert curves["memorizing"] == pytest.approx([0, 100])
    assert list(three[1].lines[-1].get_ydata()) == pytest.approx([0, 12.5])  # a guess, dotted
    two = plots.draw(board, kinds["rates"]).axes
    assert list(two[0].get_xticks()) == [16, 64]
