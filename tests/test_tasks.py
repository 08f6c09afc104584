"""Tasks: their texts, and their metrics against numbers worked out by hand."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from memory_bench.backbone.tokenizer import word_level
from memory_bench.data import Library
from memory_bench.data.studies import SEGMENT, WORDS
from memory_bench.episode import Ask, Document, Episode, Estimate, Read, TrainingPlan
from memory_bench.errors import DataError, UserError
from memory_bench.tasks.interleaved import InterleavedPG19, interleave
from memory_bench.tasks.language_modeling import PG19, WikiText103, consecutive, excerpt, joined
from memory_bench.tasks.pubmedqa import CHOICES, TRAIN_CONTEXT, PubMedQA

ENCODE = word_level(WORDS)
ROW: dict[str, Any] = {
    "seed": 0, "episode": "a", "cluster": "a", "event": 0, "kind": "read", "control": "", "start": 1, "tokens": 1,
    "nbytes": 1, "words": 1, "nll": 0.0, "distance_tokens": -1, "distance_bytes": -1, "choice_nll": None,
    "predicted": "", "answer": "", "label": "",
}  # fmt: skip


def table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame([{**ROW, **row} for row in rows])


def by_name(found: list[Estimate]) -> dict[tuple[str, str], Estimate]:
    return {(e.metric, e.slice): e for e in found}


def offline(tmp_path: Path) -> Library:
    """Only what needs no download: invented studies."""
    return Library(None, tmp_path, hub=False)


def bytes_encode(text: str) -> tuple[list[int], list[int]]:
    data = list(text.encode())
    return data, [1] * len(data)


# language modelling


def test_excerpts_are_whole_words_within_the_bytes() -> None:
    document = Document("d", "one été three four five", {})
    assert excerpt(document, 0, 100).text == document.text
    assert excerpt(document, 4, 9).text == "été"  # é has two bytes: été is bytes 4 to 9
    assert excerpt(document, 5, 100).text == "three four five"
    assert excerpt(document, 0, 8).text == "one"
    assert excerpt(document, 4, 8).text == ""
    assert excerpt(document, 500, 600).text == ""


def test_consecutive_excerpts_do_not_overlap_and_take_works_in_turn() -> None:
    works = [Document(name, " ".join(f"{name}{i}" for i in range(200)), {}) for name in "xyz"]
    cuts = consecutive(works, 10, 110, 7)
    assert [d.meta["work"] for d in cuts] == ["x", "y", "z", "x", "y", "z", "x"]
    words = [w for d in cuts for w in d.text.split()]
    assert len(words) == len(set(words))
    assert cuts == consecutive(works, 10, 110, 7)


def test_joined_articles_keep_every_word_in_order() -> None:
    articles = [Document("0", " a b c \n", {}), Document("1", " d e f g \n", {}), Document("2", " h \n", {})]
    cuts = joined(articles, 3)
    assert [d.text.split() for d in cuts] == [["a", "b", "c"], ["d", "e", "f"]]
    assert [d.meta["work"] for d in cuts] == ["0", "1"]


def test_interleaved_books_keep_every_word_and_alternate() -> None:
    assert interleave("a b c d e", "1 2 3", 2) == "a b 1 2 c d 3 e"
    assert interleave("a", "1 2 3 4", 1).split() == ["a", "1", "2", "3", "4"]


@pytest.mark.parametrize("extent", ["all", "bytes:5", "bytes:9-9", "bytes:-1-5", ""])
def test_a_wrong_extent_is_a_sentence(extent: str) -> None:
    with pytest.raises(UserError, match="bytes:FIRST-LAST"):
        PG19.Config(extent=extent)


def test_language_modelling_numbers_by_hand() -> None:
    # Two documents: 10 and 30 nats over 8 and 12 tokens, 20 and 60 bytes, 4 and 6 words.
    samples = table(
        [
            {"episode": "a", "cluster": "a", "start": 1, "tokens": 8, "nbytes": 20, "words": 4, "nll": 10.0},
            {"episode": "b", "cluster": "b", "start": 1, "tokens": 8, "nbytes": 40, "words": 4, "nll": 20.0},
            {"episode": "b", "cluster": "b", "start": 300, "tokens": 4, "nbytes": 20, "words": 2, "nll": 10.0},
            {"episode": "a", "cluster": "a", "tokens": 8, "nbytes": 20, "words": 4, "nll": 16.0, "control": "wiped"},
        ]
    )
    found = by_name(PG19().metrics(samples))
    assert next(iter(found)) == ("bits_per_byte", "")
    assert found["bits_per_byte", ""].value == pytest.approx(40 / 80 / math.log(2))
    assert found["nll", ""].value == pytest.approx(2.0)
    assert found["ppl_token", ""].value == pytest.approx(math.exp(2.0))
    assert found["ppl_word", ""].value == pytest.approx(math.exp(4.0))
    assert found["bits_per_byte", "position=0-256"].value == pytest.approx(30 / 60 / math.log(2))
    assert found["bits_per_byte", "position=256-512"].value == pytest.approx(10 / 20 / math.log(2))
    assert found["bits_per_byte", "control:wiped"].value == pytest.approx(16 / 20 / math.log(2))
    assert ("bits_per_byte", "control:foreign") not in found
    assert not any(e.higher_is_better for e in found.values())


def test_a_uniform_model_has_the_bits_of_its_vocabulary() -> None:
    rows = [
        {
            "episode": f"{d}",
            "cluster": f"{d}",
            "start": 1 + 32 * s,
            "tokens": 32,
            "nbytes": 32,
            "nll": 32 * math.log(256),
        }
        for d in range(25)
        for s in range(20)
    ]
    found = by_name(PG19().metrics(table(rows)))
    assert found["bits_per_byte", ""].value == pytest.approx(8.0)
    assert found["bits_per_byte", ""].low == pytest.approx(8.0)
    assert found["ppl_token", ""].value == pytest.approx(256)
    assert found["bits_per_byte", ""].n == 25
    assert ("bits_per_byte", "position=512-1024") in found


def test_few_documents_are_resampled_in_blocks_and_seeds_are_no_documents() -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"seed": seed, "episode": d, "cluster": d, "start": 1 + 32 * s, "tokens": 32, "nbytes": 64, "nll": nll}
        for d in "abc"
        for s in range(40)
        for seed, nll in enumerate(rng.normal(60, 5, size=2))
    ]
    both = by_name(PG19().metrics(table(rows)))["bits_per_byte", ""]
    one = by_name(PG19().metrics(table([r for r in rows if r["seed"] == 0])))["bits_per_byte", ""]
    assert both.n == one.n == 21  # 7 blocks of each of the 3 documents
    assert both.low is not None
    assert both.high is not None
    assert both.low < both.value < both.high
    assert both.value != one.value


def test_excerpts_of_few_works_are_the_units() -> None:
    rows = [
        {"episode": f"{work}:{i}", "cluster": work, "start": start, "tokens": 10, "nbytes": 30, "nll": 20.0 + i}
        for work in "abc"
        for i in range(8)
        for start in (1, 11)
    ]
    assert PG19().metrics(table(rows))[0].n == 24


def test_one_segment_has_a_number_but_no_interval() -> None:
    found = PG19().metrics(table([{"nll": 1.0}]))
    assert (found[0].low, found[0].high) == (None, None)
    assert PG19().metrics(table([{"kind": "ask"}])) == []


# questions


def asked(answers: list[str], predictions: list[str], **more: Any) -> list[dict[str, Any]]:
    return [
        {"episode": f"e{i}", "cluster": f"e{i}", "kind": "ask", "answer": a, "predicted": p, "nll": 0.5, **more}
        for i, (a, p) in enumerate(zip(answers, predictions, strict=True))
    ]


ANSWERS = [" yes"] * 6 + [" no"] * 3 + [" maybe"]


def test_a_perfect_answerer() -> None:
    found = by_name(PubMedQA().metrics(table(asked(ANSWERS, ANSWERS))))
    assert next(iter(found)) == ("accuracy", "")
    assert found["accuracy", ""].value == found["macro_f1", ""].value == 1.0
    assert found["accuracy", ""].n == 10
    assert found["answer_logprob", ""].value == pytest.approx(-0.5)
    assert {found["accuracy", f"label={c}"].value for c in ("yes", "no", "maybe")} == {1.0}


def test_a_constant_answerer() -> None:
    found = by_name(PubMedQA().metrics(table(asked(ANSWERS, [" yes"] * 10))))
    assert found["accuracy", ""].value == pytest.approx(0.6)
    assert found["macro_f1", ""].value == pytest.approx((2 * 6 / (2 * 6 + 4)) / 3)  # F1 of yes is .75, the others 0
    assert found["accuracy", "label=yes"].value == 1.0
    assert found["accuracy", "label=maybe"].value == 0.0
    low, high = found["accuracy", ""].low, found["accuracy", ""].high
    assert low is not None
    assert high is not None
    assert low < 0.6 < high


def test_lift_lies_between_the_floor_and_the_ceiling() -> None:
    rows = asked(ANSWERS, ANSWERS[:5] + ["x"] * 5)  # 0.5
    rows += asked(ANSWERS, [*ANSWERS[:2], *["x"] * 8], control="wiped")  # 0.2
    rows += asked(ANSWERS, [*ANSWERS[:8], "x", "x"], control="ceiling")  # 0.8
    found = by_name(PubMedQA().metrics(table(rows)))
    assert found["accuracy", "control:wiped"].value == pytest.approx(0.2)
    assert found["accuracy", "control:ceiling"].value == pytest.approx(0.8)
    assert found["memory_lift", ""].value == pytest.approx(0.5)
    without_ceiling = [r for r in rows if r.get("control") != "ceiling"]
    assert ("memory_lift", "") not in by_name(PubMedQA().metrics(table(without_ceiling)))


def test_seeds_are_averaged_and_distances_are_kept_apart() -> None:
    near, far = {"label": "distance=96"}, {"label": "distance=384"}
    rows = asked(ANSWERS, ANSWERS, seed=0, **near) + asked(ANSWERS, [" yes"] * 10, seed=1, **near)
    rows += [{**r, "episode": f"far {r['episode']}"} for r in asked(ANSWERS, ["x"] * 10, **far)]
    found = by_name(PubMedQA(PubMedQA.Config(distance=4)).metrics(table(rows)))
    assert found["accuracy", ""].value == pytest.approx(0.8)
    assert found["accuracy", ""].n == 10
    assert found["macro_f1", ""].value == pytest.approx((1 + 0.25) / 2)
    assert found["accuracy", "distance=96"].value == pytest.approx(0.8)
    assert found["accuracy", "distance=384"].value == 0.0
    far_first = by_name(PubMedQA(PubMedQA.Config(distance=16)).metrics(table(rows)))
    assert far_first["accuracy", ""].value == 0.0


def test_questions_of_one_document_are_one_unit() -> None:
    rows = [{**r, "cluster": f"c{i // 5}"} for i, r in enumerate(asked(ANSWERS, ANSWERS))]
    assert PubMedQA().metrics(table(rows))[0].n == 2


@pytest.mark.parametrize("option", ["fused", "distance", "questions"])
def test_options_must_be_positive(option: str) -> None:
    with pytest.raises(UserError, match=option):
        PubMedQA.Config(**{option: 0})


def test_stand_in_episodes_fill_whole_segments_and_hide_nothing(tmp_path: Path) -> None:
    task, library = PubMedQA(PubMedQA.Config(questions=20)), offline(tmp_path)
    episodes = list(task.episodes(library, None))
    assert len(episodes) == 60
    assert [asks(e)[0].label for e in episodes[:4]] == ["distance=96", "distance=24", "distance=384", "distance=96"]
    assert [e.id for e in task.episodes(library, 5)] == [e.id for e in episodes[:5]]
    assert episodes == list(task.episodes(library, None))
    for episode in episodes:
        evidence, filler, ask = episode.events
        assert isinstance(evidence, Read)
        assert isinstance(filler, Read)
        assert isinstance(ask, Ask)
        words = (evidence.text + filler.text + ask.prompt).split(" ")
        assert len(words) % SEGMENT == 0
        assert f"distance={(len(words) // SEGMENT - 1) * SEGMENT}" == ask.label
        assert len(ENCODE(evidence.text + filler.text + ask.prompt)[0]) == len(words)
        assert set(words) <= set(WORDS)
        assert words[-1] in evidence.text.split()
        assert words[-1] not in filler.text.split()
        assert ask.choices == CHOICES
        assert ask.answer in CHOICES
        assert evidence.tag == ask.evidence == "evidence"


def asks(episode: Episode) -> list[Ask]:
    return [e for e in episode.events if isinstance(e, Ask)]


def test_stand_in_training_lines_end_with_the_only_scored_word(tmp_path: Path) -> None:
    task, library = PubMedQA(), offline(tmp_path)
    plan = task.plan(library, pretrained=True)
    assert plan == TrainingPlan("invented-studies", recipe="invented-studies", backbone="invented-studies")
    corpus = task.corpus(library, plan, ENCODE)
    for segments in (1, 2, 4):
        lines = corpus.batch(8, segments, SEGMENT, torch.Generator().manual_seed(1))
        again = corpus.batch(8, segments, SEGMENT, torch.Generator().manual_seed(1))
        assert all(torch.equal(a.ids, b.ids) for a, b in zip(lines, again, strict=True))
        assert len({tuple(line.ids.tolist()) for line in lines}) == 8
        lengths = [len(line) - 1 for line in lines]
        assert set(lengths) <= {n * SEGMENT for n in range(1, segments + 1)}
        assert lengths.count(segments * SEGMENT) >= 4
        for line in lines:
            assert line.scored.nonzero().flatten().tolist() == [len(line) - 1]
            assert line.given is not None
            assert not bool((line.given & line.scored).any())
            assert WORDS[int(line.ids[-1])] in ("yes", "no", "maybe")


def test_stand_in_levels(tmp_path: Path) -> None:
    levels = PubMedQA().levels(offline(tmp_path))
    assert levels == {"chance": 1 / 3, "both outcomes, not whose": 2 / 3}
    with pytest.raises(UserError, match="fused"):
        list(PubMedQA(PubMedQA.Config(fused=2)).episodes(offline(tmp_path), None))


def test_wikitext_is_refused_without_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no stand-in"):
        list(WikiText103().episodes(offline(tmp_path), None))


# with the real data


def test_pg19_documents(data: Library) -> None:
    task = PG19()
    episodes = list(task.episodes(data, None))
    sizes = [len(text_of(e).encode()) for e in episodes]
    assert len({e.cluster for e in episodes}) == len(episodes) == 32
    assert min(sizes) > 5000
    assert max(sizes) <= 5100
    assert [e.id for e in task.episodes(data, 3)] == [e.id for e in episodes[:3]]
    whole = next(iter(PG19(PG19.Config(extent="full")).episodes(data, 1)))
    assert text_of(episodes[0]) in text_of(whole)
    assert task.plan(data, pretrained=False) == WikiText103().plan(data, pretrained=True) == TrainingPlan("books")


def test_interleaved_pairs_hold_both_books(data: Library) -> None:
    books = {e.id: text_of(e).split() for e in PG19().episodes(data, None)}
    pairs = list(InterleavedPG19(InterleavedPG19.Config(words=16)).episodes(data, None))
    assert len(pairs) == len(books) // 2
    first, second = pairs[0].id.split("+")
    words = text_of(pairs[0]).split()
    assert words[:16] == books[first][:16]
    assert words[16:32] == books[second][:16]
    assert sorted(words) == sorted(books[first] + books[second])


def text_of(episode: Episode) -> str:
    return "".join(e.text for e in episode.events if isinstance(e, Read))


def test_an_extent_beyond_all_books_is_a_sentence(data: Library) -> None:
    with pytest.raises(UserError, match="long enough"):
        list(PG19(PG19.Config(extent="bytes:9000000-9000100")).episodes(data, None))


def test_books_corpus_is_the_training_text(data: Library) -> None:
    corpus = PG19().corpus(data, TrainingPlan("books"), bytes_encode)
    line = corpus.batch(1, 2, 16, torch.Generator().manual_seed(0))[0]
    piece = bytes(line.ids.tolist()).decode(errors="ignore")
    assert len(line) == 32
    assert any(piece in d.text for d in data.books("train"))
    assert not any(piece in d.text for d in data.books("test"))


def test_wikitext_documents(data: Library) -> None:
    episodes = list(WikiText103().episodes(data, None))
    assert len(episodes) == 32
    assert {len(text_of(e).split()) for e in episodes} == {2000}
    assert len(list(WikiText103(WikiText103.Config(documents=0)).episodes(data, None))) == 120
    assert len(list(WikiText103(WikiText103.Config(words=0, documents=0)).episodes(data, None))) == 60


def test_pubmedqa_episodes(data: Library) -> None:
    task = PubMedQA()
    episodes = list(task.episodes(data, None))
    assert len(episodes) == 500
    assert [asks(e)[0].answer for e in episodes].count(" yes") == 276
    assert task.levels(data)["majority"] == pytest.approx(0.552)
    assert task.plan(data, pretrained=False).corpus == "pubmedqa"
    assert task.plan(data, pretrained=True) == TrainingPlan("books")
    ask = asks(episodes[0])[0]
    assert ask.prompt.startswith("\nQuestion: ")
    assert ask.prompt.endswith("\nAnswer:")


def test_fused_studies_are_all_read_before_all_questions(data: Library) -> None:
    episodes = list(PubMedQA(PubMedQA.Config(fused=3)).episodes(data, 7))
    assert [len(asks(e)) for e in episodes] == [3, 3, 1]
    kinds = [type(e) for e in episodes[0].events]
    assert kinds == [Read, Read, Read, Ask, Ask, Ask]
    tags = {e.tag: e.text for e in episodes[0].events if isinstance(e, Read)}
    single = list(PubMedQA().episodes(data, 7))
    for n, ask in enumerate(asks(episodes[0])):
        assert tags[ask.evidence].strip() == text_of(single[n]).strip()
        assert ask == Ask(**{**_fields(asks(single[n])[0]), "evidence": ask.evidence})


def _fields(ask: Ask) -> dict[str, Any]:
    return {name: getattr(ask, name) for name in Ask.__dataclass_fields__}


def test_pubmedqa_training_lines_are_not_test_studies(data: Library) -> None:
    task = PubMedQA()
    corpus = task.corpus(data, task.plan(data, pretrained=False), bytes_encode)
    lines = corpus.batch(500, 0, 32, torch.Generator().manual_seed(0))
    texts = [bytes(line.ids.tolist()).decode(errors="ignore") for line in lines]
    assert len(set(texts)) == 500
    questions = {asks(e)[0].prompt for e in task.episodes(data, None)}
    for line, text in zip(lines, texts, strict=True):
        answer = bytes(line.ids[line.scored].tolist()).decode()
        assert answer in CHOICES
        assert text.endswith(f"\nAnswer:{answer}")
        assert line.given is not None
        assert int((~line.given & ~line.scored).sum()) <= TRAIN_CONTEXT
        assert bytes(line.ids[line.given].tolist()).decode() not in questions


def test_estimates_are_plain_numbers() -> None:
    found = PubMedQA().metrics(table(asked(ANSWERS, ANSWERS))) + PG19().metrics(table([{"nll": 1.0}, {"start": 300}]))
    json.dumps([[e.value, e.low, e.high, e.n] for e in found], allow_nan=False)
    assert all(type(e.value) is float and type(e.n) is int for e in found)
