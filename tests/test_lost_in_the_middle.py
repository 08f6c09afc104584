"""Lost in the middle: what is made and trained on, places and distances, primacy and recency, the table by place."""

import json
import re
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
from memory_bench.data.pairs import BEFORE, word_pairs
from memory_bench.driver.encoding import encode_episode
from memory_bench.episode import Ask, Episode, Read
from memory_bench.errors import UserError
from memory_bench.report import plots
from memory_bench.report.build import build
from memory_bench.store import Store
from memory_bench.tasks.answers import hit
from memory_bench.tasks.lost_in_the_middle import LostInTheMiddle, PairsCorpus
from memory_bench.testing import check_task
from synthetic import make_record

Config = LostInTheMiddle.Config
SMALL = Config(pairs=9, places=3, episodes=12)


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(None, tmp_path, hub=False)


def text_of(episode: Episode) -> str:
    return "".join(event.text for event in episode.events if isinstance(event, Read))


def asks_of(episode: Episode) -> list[Ask]:
    return [event for event in episode.events if isinstance(event, Ask)]


@pytest.mark.parametrize(("pairs", "density"), [(16, 2), (9, 4), (32, 5)])
def test_every_place_is_asked_for_on_the_same_context(library: Library, pairs: int, density: int) -> None:
    task = LostInTheMiddle(Config(pairs=pairs, places=3, episodes=4, density=density))
    encode = loaded("key-value", library).encode
    for episode in task.episodes(library, None):
        words = text_of(episode).split()
        stated = [at for at, word in enumerate(words[1:], 1) if word in VALUES]
        assert len(stated) == pairs
        assert len(words) % SEGMENT == SEGMENT - 6  # two questions with their answers would fill it
        counts = [sum(at // SEGMENT == s for at in stated) for s in range(len(words) // SEGMENT + 1)]
        assert counts == [density] * (pairs // density) + [pairs % density] * (pairs % density > 0) + [0]
        for ask, place in zip(asks_of(episode), (0, round((pairs - 1) / 2), pairs - 1), strict=True):
            at = stated[place]
            assert (ask.prompt.split()[-1], ask.answer.strip()) == (words[at - 1], words[at])
            far = SEGMENT * (len(words) // SEGMENT - at // SEGMENT)
            assert ask.label == f"place={place},distance={far}"
        stream = encode_episode(episode, encode, 0)
        assert [q.distance_tokens for q in stream.questions] == [
            len(words) - 1 - stated[round(n * (pairs - 1) / 2)] for n in range(3)
        ]


def test_objects_are_those_of_the_original(library: Library) -> None:
    task = LostInTheMiddle(Config(wording="json", pairs=20, places=4, episodes=3))
    for episode in task.episodes(library, None):
        text = text_of(episode)
        assert text.startswith(BEFORE + '{"')
        found = json.loads(text.removeprefix(BEFORE))
        assert len(found) == 20
        assert re.fullmatch(r'\{"[0-9a-f-]{36}": "[0-9a-f-]{36}",', text.removeprefix(BEFORE).split("\n")[0])
        for ask, place in zip(asks_of(episode), (0, 6, 13, 19), strict=True):
            key = list(found)[place]
            assert ask.prompt == f'\n\nKey: "{key}"\nCorresponding value:'
            assert ask.accepted == (found[key],)
            assert hit(f" {found[key]}", ask.accepted)
            assert hit(ask.answer, ask.accepted)
            assert not hit(key, ask.accepted)
            assert (ask.choices, ask.label) == ((), f"place={place}")


@pytest.mark.parametrize("density", [2, 5])
@pytest.mark.parametrize("segments", [1, 2, 8])
def test_training_lines_are_whole_segments_and_score_only_answers(
    library: Library, density: int, segments: int
) -> None:
    own = loaded("key-value", library)
    for line in PairsCorpus(own.encode, density).batch(20, segments, 16, torch.Generator().manual_seed(0)):
        assert len(line) == segments * SEGMENT
        words = [CLOSED["key-value"].words[i] for i in line.ids.tolist()]
        scored = line.scored.nonzero().ravel().tolist()
        assert len(scored) == 2
        for place in scored:
            (at,) = [i for i in range(len(words) - 6) if words[i] == words[place - 1]]
            assert words[at + 1] == words[place]


def test_pairs_come_in_the_order_of_their_places() -> None:
    made = word_pairs(Random("p"), 10, 3)
    assert [made.texts[at] for at in made.places] == [pair.text for pair in made.pairs]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"pairs": 33}, "pairs must be from 3 to 32 in words, not 33"), ({"pairs": 2}, "pairs must be from 3"),
        ({"places": 2}, "places must be from 3 to pairs = 16"), ({"places": 17}, "places must be from 3 to pairs = 16"),
        ({"density": 1}, "density must be from 2 to 5"), ({"density": 6}, "density must be from 2 to 5"),
        ({"episodes": 0}, "episodes and max_tokens at least 1"),
        ({"wording": "json", "pairs": 1001}, "to 1000 in json"),
    ],
)  # fmt: skip
def test_impossible_pairs_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match="lost-in-the-middle") as refused:
        Config(**wrong)
    assert said in str(refused.value)


def test_what_changes_the_pairs_changes_the_training(library: Library) -> None:
    names = [LostInTheMiddle(c).plan(library, pretrained=False).corpus for c in (SMALL, Config(density=3))]
    assert names == ["lost-in-the-middle", "lost-in-the-middle,density=3"]
    assert LostInTheMiddle(Config(wording="json")).plan(library, pretrained=True).corpus == "books"


def answered(task: LostInTheMiddle, library: Library, right: Callable[[int, int], bool], seed: int = 0) -> pd.DataFrame:
    """Rows as the driver writes them, of somebody who answers rightly where `right` (context, place) says so."""
    rows = []
    for number, episode in enumerate(task.episodes(library, None)):
        for event, ask in enumerate(asks_of(episode)):
            place = int(ask.label.split(",")[0].removeprefix("place="))
            for control in ("", "wiped", "ceiling"):
                good = control == "ceiling" or (not control and right(number, place))
                said, nll = ask.answer if good else " wrong", 0.1 if good else 3.0
                rows.append(
                    {"seed": seed, "episode": episode.id, "cluster": episode.id, "event": event, "kind": "ask",
                     "control": control, "start": 99, "tokens": 1, "nbytes": 4, "words": 1, "nll": nll,
                     "distance_tokens": 99 - place, "distance_bytes": 9, "choice_nll": [nll] * len(ask.choices or (1,)),
                     "predicted": said, "answer": ask.answer, "label": ask.label,
                     "generated": "" if ask.choices else said, "greedy": good, "accepted": list(ask.accepted)}
                )  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize("wording", ["words", "json"])
def test_primacy_and_recency_are_differences_to_the_middle(library: Library, wording: Any) -> None:
    task = LostInTheMiddle(Config(wording=wording, pairs=9, places=5, episodes=12))
    # Always at the last place, in every second context at the first, in every fourth between.
    samples = answered(task, library, lambda n, place: n % {8: 1, 0: 2}.get(place, 4) == 0)
    found = {(e.metric, e.slice): e for e in task.metrics(samples)}
    assert [found["accuracy", f"place={p}"].value for p in (0, 2, 4, 6, 8)] == pytest.approx([0.5, 0.25, 0.25, 0.25, 1])
    assert found["primacy", ""].value == pytest.approx(0.25)
    assert found["recency", ""].value == pytest.approx(0.75)
    low, high = found["recency", ""].low, found["recency", ""].high
    assert low is not None
    assert high is not None
    assert 0 < low < 0.75 < high <= 1  # paired: contexts are drawn, not questions
    assert (("half_life", "") in found) == (wording == "words")
    assert any(name.startswith("distance=") for _, name in found) == (wording == "words")


def test_where_questions_are_unanswered_there_is_neither(library: Library) -> None:
    task = LostInTheMiddle(SMALL)
    samples = answered(task, library, lambda n, place: True)
    first = samples.index[samples["control"] == ""][:3]
    samples.loc[first, ["predicted", "nll"]] = ["", float("nan")]
    samples["choice_nll"] = samples["choice_nll"].where(~samples.index.isin(first), None)
    found = task.metrics(samples)
    assert found[0].value == pytest.approx(1 - 3 / 36)
    assert not [e for e in found if e.metric in ("primacy", "recency")]


@pytest.mark.parametrize("wording", ["words", "json"])
def test_the_task_keeps_its_promises(library: Library, wording: Any) -> None:
    check_task(LostInTheMiddle(Config(wording=wording, pairs=6, places=3)), library, limit=2)


def test_the_table_has_places_as_columns(library: Library, tmp_path: Path) -> None:
    task, store = LostInTheMiddle(SMALL), Store.open_or_create(tmp_path / "run")
    for model, last in (("rmt", 9), ("xl-cache", 3)):
        for seed in (0, 1):
            samples = answered(task, library, lambda n, place, last=last: n < last or place == 8, seed)
            cell = replace(task_cell(model, "lost-in-the-middle", seed), task=Choice("lost-in-the-middle", config={}))
            record = replace(make_record(replace(cell, task=Choice("pubmedqa")), None), cell=cell)
            record = replace(record, metrics=tuple(task.metrics(samples)), levels=dict(task.levels(library)))
            store.write_record(record, samples)
    report = build(store, {"lost-in-the-middle": task})
    text = report.markdown()
    part = text[text.index("Accuracy by place in the context, in pairs before the one asked for:") :]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.split("\n\n")[1].splitlines()]
    assert lines[0] == ["model", "0", "4", "8"]
    assert [cell.split(" ")[0] for cell in lines[3][1:]] == ["25.0", "25.0", "100.0"]
    (board,) = report.boards
    drawn = {plot.kind: plot for plot in plots.plots(board)}
    (axes,) = plots.draw(board, drawn["place"]).axes
    assert list(axes.lines[1].get_ydata()) == pytest.approx([25, 25, 100])
