"""`compare`: paired differences between models of one run and between runs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from memory_bench.errors import UserError
from memory_bench.report.comparison import compare
from memory_bench.statistics import pairing, stats
from memory_bench.store import Store
from synthetic import TASKS, few_questions, make_cell, make_record, make_store, question_samples, text_samples


def test_compare_models_of_one_run(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    found = compare(store, ["hmt", "rmt", "longmem"], TASKS)
    assert [c.board.task for c in found] == ["pg19", "pubmedqa"]
    (pair,) = found[0].pairs
    assert (pair.a, pair.b) == ("hmt", "rmt")
    assert pair.told_apart
    text = found[0].markdown()
    assert "hmt is better" in text
    assert "longmem: skipped (needs a GPT-2 backbone), no number to compare." in text
    assert found[0].rows()[0]["verdict"] == "hmt is better"


def test_compare_corrects_for_the_number_of_pairs(tmp_path: Path) -> None:
    store = few_questions(tmp_path)
    samples = question_samples(0, {16: 0.6, 64: 0.6}, questions=9)
    store.write_record(make_record(make_cell("hmt", "pubmedqa"), samples), samples)
    (two,) = compare(store, ["rmt", "truncation"], TASKS)[0].pairs
    three = next(p for p in compare(store, [], TASKS)[0].pairs if {p.a, p.b} == {"rmt", "truncation"})
    assert two.p == pytest.approx(three.p) == pytest.approx(two.adjusted)
    assert three.adjusted > two.adjusted


def test_compare_between_runs(tmp_path: Path) -> None:
    old, new = few_questions(tmp_path / "old"), few_questions(tmp_path / "new")
    samples = question_samples(0, {16: 0.0, 64: 0.0}, questions=9)
    new.write_record(make_record(make_cell("rmt", "pubmedqa"), samples), samples)
    (found,) = compare({"old": old, "new": new}, ["rmt"], TASKS)
    (pair,) = found.pairs
    assert (pair.a, pair.b) == ("rmt@old", "rmt@new")
    assert "rmt@old is ahead, no winner: one seed" in found.markdown()
    (found,) = compare({"old": old, "new": new}, ["truncation", "rmt@new"], TASKS)
    assert set(found.models) == {"truncation@old", "truncation@new", "rmt@new"}


def test_compare_between_runs_as_plain_rows(tmp_path: Path) -> None:
    few_questions(tmp_path / "a" / "run")
    stores = [few_questions(tmp_path / name) for name in ("b", "c")]
    (found,) = compare(stores, ["rmt"], TASKS)
    assert [line["a"] for line in found.rows()] == ["rmt@b"]
    assert [line["verdict"] for line in found.rows()] == ["cannot be told apart"]
    (found,) = compare([Store.open(tmp_path / "a" / "run")], [], TASKS)
    assert {line["a"] for line in found.rows()} | {line["b"] for line in found.rows()} == {"rmt", "truncation"}


def test_compare_mistakes(tmp_path: Path) -> None:
    store = few_questions(tmp_path)
    with pytest.raises(UserError, match="Did you mean rmt"):
        compare(store, ["rmtt", "truncation"], TASKS)
    with pytest.raises(UserError, match="no two results"):
        compare(store, ["rmt"], TASKS)


def test_what_has_no_paired_test_is_said(tmp_path: Path) -> None:
    store = Store.open_or_create(tmp_path)
    for name, segment in (("rmt", 128), ("hmt", 32)):
        samples = text_samples(0, 0.0, documents=2, segment=segment)
        store.write_record(make_record(make_cell(name), samples), samples)
    (found,) = compare(store, [], TASKS)
    assert found.pairs == ()
    assert "Nothing to compare here." in (text := found.markdown())
    assert "so no paired test" in text


@pytest.mark.parametrize(
    ("metric", "fewer", "seeds"),
    [("bits_per_byte", 0, 1), ("nll", 0, 1), *(("accuracy", f, s) for f in (0, 1) for s in (1, 2, 3, 5))],
)
def test_what_pairs_share_changes_no_number(metric: str, fewer: int, seeds: int) -> None:
    """In a table every pair is, to the bit, what it is alone and what the plain formulas give."""
    if metric == "accuracy":

        def answers(n: int) -> pd.DataFrame:
            share = {16: 0.4 + 0.1 * n, 64: 0.5}
            return pd.concat([question_samples(7 * n + s, share, questions=21 - fewer * n) for s in range(seeds)])

        rows = {f"m{n}": answers(n) for n in range(3)}
    else:
        rows = {f"m{n}": text_samples(0, 0.01 * n, documents=22 - n, segment=32 + 32 * (n % 2)) for n in range(3)}
    table = pairing.differences(rows, metric, {label: [1.0] for label in rows})
    assert len(table) == 3
    for pair in table:
        alone = pairing.difference((pair.a, rows[pair.a]), (pair.b, rows[pair.b]), metric)
        assert alone is not None
        assert replace(pair, adjusted=1.0) == alone
        assert (pair.value, pair.low, pair.high, pair.p) == _plainly(rows[pair.a], rows[pair.b], metric)


def _plainly(a: pd.DataFrame, b: pd.DataFrame, metric: str) -> tuple[float | None, ...]:
    """A pair of rows of one seed, whose documents (more than 20) are the units."""
    if metric == "accuracy":
        keys = ["cluster", "episode", "event"]
        scores = [(p.predicted == p.answer).astype(float).groupby([p[k] for k in keys]).mean()
                  for p in (part[part.control == ""] for part in (a, b))]  # fmt: skip
        shared = scores[0].index.intersection(scores[1].index)
        both = [part.loc[shared].to_numpy() for part in scores]
        return stats.paired_difference(*both, shared.get_level_values(0).to_numpy(), seed=0)
    column, constant = pairing.RATIOS[metric]
    both_texts = [part[part.control == ""] for part in (a, b)]
    names = set(both_texts[0].episode) & set(both_texts[1].episode)
    sums = [part[part.episode.isin(names)] for part in both_texts]
    units = [stats.scored_units(p.cluster, p.episode, p.start, p.tokens) for p in sums]
    tops, bottoms = ([np.bincount(u, weights=p[c]) for u, p in zip(units, sums, strict=True)] for c in ("nll", column))
    return stats.paired_ratio_difference(tops[0] / constant, tops[1] / constant, bottoms[0], den_b=bottoms[1], seed=0)
