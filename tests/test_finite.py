"""What is not finite fails where it begins, and no number is computed from it."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from test_observe import build as build_model
from test_observe import encode, words

from memory_bench import plugins
from memory_bench.driver.observe import observe
from memory_bench.episode import Ask, Episode, Read
from memory_bench.errors import NotFinite
from memory_bench.finite import check_samples, unanswered, unsound
from memory_bench.gate.lines import lines
from memory_bench.mlflow.view import cell_view
from memory_bench.protocol import MemoryModel
from memory_bench.report.board import collect, grouped
from memory_bench.report.build import build
from memory_bench.report.comparison import compare
from memory_bench.state import State
from memory_bench.statistics import effects, learned, pairing, retention, stats
from memory_bench.statistics.halflife import half_life
from memory_bench.store import Store
from memory_bench.testing import tiny_backbone
from synthetic import TASKS, make_cell, make_record, question_samples, text_samples

BAD = (math.nan, math.inf)
Samples = pd.DataFrame


def task(name: str) -> Any:
    return plugins.load("tasks", name)()


def asks(labels: bool) -> Samples:
    """Answers that were written or chosen, at two distances; PubMedQA's have no label."""
    frame = question_samples(0, {16: 0.7, 64: 0.6}, questions=6)
    lists = [["yes"] for _ in range(len(frame))]
    label = [f"distance={d}" if labels else "" for d in frame["distance_tokens"]]
    return frame.assign(generated=frame["predicted"], accepted=lists, label=label)


def nouns() -> Samples:
    """Lists of two nouns, read and read again in three ways."""
    frame = question_samples(0, {16: 0.7}, questions=6)
    frame = frame[frame["control"] == ""]
    parts = [
        frame.assign(label=f"{kind}:{place}", event=number)
        for number, (kind, place) in enumerate((k, p) for k in ("first", "same", "shuffled", "novel") for p in (1, 2))
    ]
    return pd.concat(parts, ignore_index=True)


def reads() -> Samples:
    return text_samples(0, 0.02, documents=3)


def _marked(samples: Samples) -> Samples:
    return pairing.judged(task("pubmedqa"), samples)


AGGREGATES: dict[str, tuple[Callable[[], Samples], Callable[[Samples], Any]]] = {
    "pg19": (reads, lambda s: task("pg19").metrics(s)),
    "pubmedqa": (lambda: asks(False), lambda s: task("pubmedqa").metrics(s)),
    "passkey's parent": (lambda: asks(True), lambda s: task("key-value").metrics(s)),
    "correct": (lambda: asks(True), lambda s: list(task("squad-retention").correct(s))),
    "noun-recall": (nouns, lambda s: task("noun-recall").metrics(s)),
    "judge text": (reads, lambda s: learned.judge(s, "bits_per_byte", trained=True, has_memory=True)),
    "judge answers": (lambda: asks(False), lambda s: learned.judge(s, "accuracy", trained=True, has_memory=True)),
    "text pairs": (reads, lambda s: pairing.difference(("a", s), ("b", text_samples(0, 0.0, documents=3)), "nll")),
    "answer pairs": (lambda: asks(True), lambda s: pairing.difference(("a", asks(True)), ("b", s), "accuracy")),
    "lift": (lambda: _marked(asks(True)), pairing.lift),
    "lifts": (lambda: asks(True), retention.lifts),
    "half-life": (lambda: asks(True), retention.half_life_estimates),
    "half-lives": (lambda: asks(True), lambda s: retention.differences({"a": s, "b": asks(True)}, {})),
    "expected": (lambda: asks(True), lambda s: retention.expected_shares(lambda d: 0.5, s)),
    "perplexity": (reads, lambda s: effects.perplexity_effect({0: s}, {0: text_samples(0, 0.0, documents=3)})),
    "share": (reads, lambda s: effects.share_effect({0: s}, {0: text_samples(0, 0.0, documents=3)}, {0: reads()})),
}


def spoiled(samples: Samples, column: str, row: int, bad: float) -> Samples:
    """A copy with one cell that is no value: in a list of choices one of them."""
    values = list(samples[column])
    values[row] = [bad, *values[row][1:]] if column == "choice_nll" and isinstance(values[row], list) else bad
    return samples.assign(**{column: pd.Series(values, index=samples.index)})


@pytest.mark.parametrize("name", AGGREGATES)
def test_one_bad_cell_is_refused_or_not_looked_at(name: str) -> None:
    made, compute = AGGREGATES[name]
    samples, rng = made(), np.random.default_rng(7)
    usual = repr(compute(samples))
    refused = 0
    for column in samples.columns:
        for bad in BAD:
            broken = spoiled(samples, column, int(rng.integers(len(samples))), bad)
            try:
                found = repr(compute(broken))
            except NotFinite:
                refused += 1
                continue
            assert found == usual, f"{column} = {bad} gave another number"
    assert refused > len(samples.columns), "most columns count"


@pytest.mark.parametrize("bad", BAD)
def test_statistics_refuse_what_is_not_finite(bad: float) -> None:
    good, spoilt = [1.0, 2.0, 3.0, 4.0], [1.0, bad, 3.0, 4.0]
    units = [0, 1, 2, 3]
    for call in (
        lambda: stats.ratio_interval(spoilt, good, seed=0),
        lambda: stats.ratio_interval(good, spoilt, seed=0),
        lambda: stats.mean_interval(spoilt, units, seed=0),
        lambda: stats.paired_difference(spoilt, good, units, seed=0),
        lambda: stats.paired_difference(good, spoilt, units, seed=0),
        lambda: stats.paired_ratio_difference(good, spoilt, good, seed=0),
        lambda: stats.paired_ratio_difference(good, good, good, den_b=spoilt, seed=0),
        lambda: stats.holm(spoilt),
        lambda: stats.seed_floor([good, spoilt]),
        lambda: half_life([0.5, bad, 0.5, 0.1], [1, 1, 2, 2], units),
        lambda: half_life([0.5, 0.5, 0.5, 0.1], [1, bad, 2, 2], units),
        lambda: half_life([0.5, 0.5, 0.5, 0.1], [1, 1, 2, 2], units, floor=bad),
        lambda: half_life([0.5, 0.5, 0.5, 0.1], [1, 1, 2, 2], units, floor=([bad, 0.0], [0, 1])),
        lambda: effects.seed_interval(spoilt),
        lambda: effects.mean_effect(np.array([good, spoilt]), "all"),
    ):
        with pytest.raises(NotFinite):
            call()
    with pytest.raises(NotFinite):
        stats.mean_interval(good, [0.0, math.nan, 1.0, 2.0], seed=0)


def test_a_bootstrap_sample_without_a_value_lies_beyond_both_ends() -> None:
    drawn = np.linspace(0.0, 1.0, 1000)
    whole = stats.percentiles(drawn, 500)
    few, many = drawn.copy(), drawn.copy()
    few[400:405], many[400:440] = math.nan, math.nan
    low, high = stats.percentiles(few, 500)
    assert low is not None
    assert high is not None
    assert whole[0] is not None
    assert whole[1] is not None
    assert low < whole[0] < whole[1] < high
    assert stats.percentiles(many, 500) == (None, None)


def test_questions_that_were_not_asked_are_no_bad_cells() -> None:
    frame = asks(False)
    blank = frame.tail(3).assign(predicted="", generated="", nll=math.nan, choice_nll=None, control="")
    whole = pd.concat([frame, blank], ignore_index=True)
    assert unanswered(check_samples(whole)).sum() == 3
    names = {e.metric for e in task("pubmedqa").metrics(whole)}
    assert "accuracy" in names
    assert "answer_logprob" not in names  # of the answered ones it would be another
    assert "memory_lift" not in names


POISON = 62  # the id of "~", which no other character has


def poisoned(name: str, **options: Any) -> MemoryModel[Any]:
    """A model whose backbone has one embedding that has overflowed."""
    backbone = tiny_backbone("llama")
    model = build_model(name, backbone, **options)
    with torch.no_grad():
        backbone.model.get_input_embeddings().weight[POISON] = math.inf  # type: ignore[operator]
    return model


@pytest.mark.parametrize("name", ["truncation", "full-context", "rmt", "xl-cache"])
def test_text_names_the_token_where_it_begins(name: str) -> None:
    text = words(1, 12)
    episodes = [
        Episode("whole", (Read(words(2, 30), scored=True),)),
        Episode("book", (Read(f"{text}~ {text}", scored=True),)),
    ]
    with pytest.raises(NotFinite, match=rf"^non-finite from token {len(text) + 1} of book$"):
        observe(poisoned(name), episodes, encode, seed=0)


def test_a_control_counts() -> None:
    model = build_model("rmt", segment=8)
    opened, fresh = model.open, []

    def later_ones_break(rows: int, **seeds: Any) -> Any:
        fresh.append(opened(rows, **seeds))
        return fresh[0] if len(fresh) == 1 else replace(fresh[-1], memory=fresh[-1].memory * math.nan)

    model.open = later_ones_break  # type: ignore[method-assign]
    with pytest.raises(NotFinite, match=r"of book \(control wiped\)"):
        observe(model, [Episode("book", (Read(words(1, 8) + "a", scored=True),))], encode, seed=0)


@pytest.mark.parametrize("choices", [(" a", " b"), (" ab", " c"), ()])
def test_a_question_is_named(choices: tuple[str, ...]) -> None:
    answer = choices[0] if choices else " a"
    ask = Ask("~?", choices, answer, "text", max_tokens=0 if choices else 2)
    events = (Read(words(1, 6), tag="text"), ask)
    with pytest.raises(NotFinite, match=r"from the question at token 24 of quiz \(event 1\)"):
        observe(poisoned("truncation"), [Episode("quiz", events)], encode, seed=0, decode=str)


def test_the_logits_of_what_is_written_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The right answer is likely enough; what the model writes instead runs into the overflow."""
    model = poisoned("truncation")
    monkeypatch.setattr(type(model), "decode", lambda self, state, prompt, plan: _written(self, state, prompt, plan))
    ask = Ask("?", (), " a", "text", max_tokens=3)
    with pytest.raises(NotFinite, match="of quiz"):
        observe(model, [Episode("quiz", (Read(words(1, 6), tag="text"), ask))], encode, seed=0, decode=str)


def _written(model: Any, state: Any, prompt: Any, plan: Any) -> torch.Tensor:
    """Greedy decoding that writes the poison first."""
    ids = torch.cat([prompt.ids, torch.full((len(prompt.ids), 1), POISON)], dim=1)
    readout, _ = model.step(state, type(prompt).full(ids), write=False)
    readout.logits(-1)
    return torch.full((len(ids), plan.new_tokens), POISON)


def test_a_memory_that_is_not_finite_is_refused_though_nothing_reads_it() -> None:
    model = build_model("rmt", segment=8)
    absorb = model.absorb
    nan = torch.tensor(math.nan)

    def broken(state: Any, segment: Any) -> Any:
        after = absorb(state, segment)
        return replace(after, memory=after.memory * nan)

    model.absorb = broken  # type: ignore[method-assign]
    ask = Ask("?", (" a", " b"), " a", "text")
    with pytest.raises(NotFinite, match="non-finite memory from the segment at token 1 of quiz"):
        observe(model, [Episode("quiz", (Read(words(1, 12), tag="text"), ask))], encode, seed=0)


def test_rows_of_a_broken_state() -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True, slots=True)
    class Two(State):
        number: torch.Tensor
        table: tuple[torch.Tensor, ...]
        count: torch.Tensor

    good = Two(torch.zeros(3), (torch.full((3, 2, 2), 3e38),), torch.ones(3, dtype=torch.long))
    assert good.broken_rows() == []  # its sum overflows, its numbers do not
    assert replace(good, number=torch.tensor([0.0, math.nan, 0.0])).broken_rows() == [1]
    assert replace(good, table=(torch.tensor([[1.0], [1.0], [-math.inf]]),)).broken_rows() == [2]


def old_store(folder: Path) -> Store:
    """As an earlier version left it: one model's samples have a NaN, and its numbers leave that out."""
    store = Store.open_or_create(folder)
    for seed in (0, 1):
        for name, gain in (("truncation", 0.0), ("hmt", 0.02), ("rmt", 0.01)):
            samples = text_samples(seed, gain)
            record = make_record(make_cell(name, seed=seed), samples)
            if name == "hmt":
                samples.loc[samples.index[5], "nll"] = math.nan
                record = replace(record, metrics=tuple(replace(m, value=0.0) for m in record.metrics))
            store.write_record(record, samples)
    return store


def test_old_results_do_not_win(tmp_path: Path) -> None:
    store = old_store(tmp_path)
    (board,) = collect(store, TASKS)
    assert [row.label for row in board.rows] == ["rmt", "truncation", "hmt"]
    last = board.rows[-1]
    assert (last.status, last.headline) == ("failed", None)
    assert "scores are not finite" in last.reasons[0]
    text = build(store, TASKS).markdown()
    assert "failed: non-finite: 1 of 576 scores are not finite" in text
    assert "Best: hmt" not in text
    assert {label for pair in compare(store, [], TASKS)[0].pairs for label in (pair.a, pair.b)} == {"rmt", "truncation"}
    found = lines([row for members in grouped(store) for row in members], {})
    of_hmt = {line.metric: line for line in found if line.model == "hmt"}
    assert of_hmt["status"].values == {0: 2, 1: 2}
    assert "bits_per_byte" not in of_hmt
    record = next(r for r in store.records() if r.cell.training.model.name == "hmt")
    view = cell_view(record, store, "run")
    assert view.tags["mb.status"] == "failed"
    assert not any(point.name == "bits_per_byte" for point in view.points)


def test_old_choices_that_are_none(tmp_path: Path) -> None:
    """Parquet keeps a NaN within a list as null."""
    store = Store.open_or_create(tmp_path)
    samples = question_samples(0, {16: 0.5}, questions=9)
    samples.at[samples.index[2], "choice_nll"] = [math.nan, 1.0, 1.0]
    cell = make_cell("rmt", "pubmedqa")
    store.write_record(make_record(cell, samples), samples)
    loaded, record = store.samples(cell.key), store.record(cell.key)
    assert loaded is not None
    assert record is not None
    assert record.status == "failed"
    assert build(store, TASKS).markdown().count("1 of 81 choice's scores are not finite") == 1


def test_a_metric_that_is_none_by_its_note_is_sound() -> None:
    record = make_record(make_cell("hmt"), text_samples(0, 0.0))
    one = replace(record.metrics[0], value=math.nan)
    assert unsound([one]) == "bits_per_byte is not finite"
    assert not unsound([replace(one, note="no memory"), replace(one, n=0)])


def test_a_seed_without_a_number_is_not_averaged_away() -> None:
    records = [make_record(make_cell("hmt", seed=seed), text_samples(seed, 0.0)) for seed in (0, 1)]
    broken = replace(records[1].metrics[0], value=math.nan)
    rows = [[records[0], replace(records[1], metrics=(broken, *records[1].metrics[1:]))]]
    assert "bits_per_byte" not in {line.metric for line in lines(rows, {}) if not line.slice}


def test_a_perplexity_too_large_for_a_float_says_so_and_fails_nothing() -> None:
    """Of text without blanks a word is a paragraph."""
    samples = text_samples(0, 0.0, documents=3)
    found = {e.metric: e for e in task("pg19").metrics(samples.assign(words=(samples["start"] == 0).astype(int)))}
    assert not unsound(found.values())
    assert math.isnan(found["ppl_word"].value)
    assert found["ppl_word"].note.endswith("beyond the largest float")
    assert math.isfinite(found["bits_per_byte"].value)


def test_a_hidden_entry_of_the_vocabulary_is_no_fault() -> None:
    backbone = tiny_backbone()
    hidden = torch.zeros(1, 2, backbone.width)
    for logit, sound in ((-math.inf, True), (math.inf, False), (math.nan, False)):
        bias = torch.zeros(backbone.vocab)
        bias[3] = logit
        head = backbone.model.get_output_embeddings()  # type: ignore[operator]
        handle = head.register_forward_hook(lambda module, given, out, bias=bias: out + bias)
        with backbone.watched() as finite:
            backbone.head(hidden)
        handle.remove()
        assert all(map(bool, finite)) is sound
