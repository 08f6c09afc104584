"""Retention from records: tables, warning, comparisons, expected curves and plots, on made-up answers."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from retention_records import DISTANCES, TASKS, answers, other_store, result, retention_store, task_cell

from memory_bench.report import drawing, plots, retention_panels, words
from memory_bench.report.build import Report, build
from memory_bench.report.comparison import Comparison, compare
from memory_bench.statistics import pairing
from memory_bench.statistics.learned import judge
from memory_bench.statistics.retention import (
    differences,
    distances,
    expected_curve,
    expected_shares,
    half_life_estimates,
    known_without_memory,
    lifts,
)
from memory_bench.store import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return retention_store(tmp_path_factory.mktemp("retention") / "run")


@pytest.fixture(scope="module")
def report(store: Store) -> Report:
    return build(store, TASKS)


@pytest.fixture(scope="module")
def comparison(store: Store) -> Comparison:
    return compare(store, ["full-context", "hmt", "memoryllm", "truncation"], TASKS)[0]


def test_half_life_is_in_the_table_and_the_csv(report: Report) -> None:
    text = report.markdown()
    line = {row.split("|")[1].strip(): row for row in text.splitlines() if row.startswith("|")}
    assert "half-life" in text
    assert "**half-life**" in text
    assert "| > 16,384 [" in next(r for r in text.splitlines() if r.startswith("| full-context"))
    assert "no memory" in next(r for r in text.splitlines() if r.startswith("| truncation"))
    assert "mplus" in line
    rows = {r["model"]: r for r in csv.DictReader(io.StringIO(report.csv())) if r["metric"] == "half_life"}
    assert float(rows["hmt"]["ci_low"]) < 5000 < float(rows["hmt"]["ci_high"])
    assert (rows["hmt"]["unit"], rows["hmt"]["slice"], rows["hmt"]["n"]) == ("tokens", "", "40")
    lasting = rows["full-context"]
    assert (lasting["value"], lasting["ci_high"]) == ("16384.0", "")
    assert lasting["detail"].startswith("h > 16384; seeds 0 1")
    assert (rows["truncation"]["value"], rows["truncation"]["detail"].split(";")[0]) == ("", "no memory")
    assert "rmt" in rows  # over budget, and in the table


def test_lift_at_every_distance(report: Report) -> None:
    row = next(r for r in report.boards[0].rows if r.label == "hmt")
    found = {e.slice: e for e in row.estimates if e.metric == "memory_lift"}
    assert set(found) == {"", *(f"distance={d}" for d in DISTANCES)}
    assert found["distance=0"].value > 0.8
    assert found["distance=16384"].value < 0.2
    wiped, ceiling, own = (row.find("accuracy", s) for s in ("control:wiped", "control:ceiling", ""))
    assert wiped
    assert ceiling
    assert own
    assert found[""].value == pytest.approx((own.value - wiped.value) / (ceiling.value - wiped.value))


def test_answers_known_without_reading_are_warned_of(tmp_path: Path) -> None:
    store = Store.open_or_create(tmp_path)
    for name, wiped in (("hmt", 0.3), ("rmt", 0.02)):
        samples = answers(0, 3000, wiped=wiped)
        store.write_record(result(task_cell(name, "squad-retention"), samples), samples)
    report = build(store, TASKS)
    warnings = words.known_already(report.boards[0])
    assert len(warnings) == 1
    assert warnings[0].startswith("hmt answers ")
    assert "10%" in warnings[0]
    assert f"> Warning: {warnings[0]}" in report.markdown()
    assert known_without_memory(0.55, 0.5) == pytest.approx(0.1)
    assert known_without_memory(1.0, 1.0) == 0.0


def test_compare_by_distance_and_half_life(comparison: Comparison) -> None:
    found = {(name, p.a, p.b): p for name, p in comparison.by_distance}
    near, far = (found[f"distance={d}", "full-context", "hmt"] for d in (0, 8192))
    assert not near.told_apart
    assert far.told_apart
    life = found["half_life", "hmt", "memoryllm"]
    assert life.told_apart
    assert life.value == pytest.approx(np.log2(5000 / 2000), abs=0.6)
    assert not [key for key in found if key[0] == "half_life" and "truncation" in key]  # it has none
    assert far.adjusted >= far.p
    text = comparison.markdown()
    assert "By distance (tokens), corrected within this table:" in text
    assert "| > ×" in text  # the other lasts longer than was asked
    lines = [r for r in comparison.rows() if r["metric"] == "half_life"]
    assert {r["unit"] for r in lines} == {"log2 ratio"}
    assert {r["slice"] for r in comparison.rows() if r.get("slice")} == {f"distance={d}" for d in DISTANCES}


def test_compare_corrects_all_distances_together(comparison: Comparison) -> None:
    raw = sorted(p.p for _, p in comparison.by_distance)
    smallest = min(comparison.by_distance, key=lambda found: found[1].p)[1]
    assert smallest.adjusted == pytest.approx(min(1.0, len(raw) * raw[0]))


def test_pairs_use_the_same_questions_and_documents() -> None:
    one, two = answers(0, 3000), answers(0, 3000)
    assert all(p.value == 0 and p.p == 1 for _, p in differences({"a": one, "b": two}, {}))
    # Where b lacks the documents that a fails on, a must not look worse for them.
    lucky = set(one[(one.control == "") & (one.predicted == "right")].cluster)
    part = two[two.cluster.isin(sorted(lucky)[:20])]
    assert all(p.value == 0 for _, p in differences({"a": one, "b": part}, {}))


def test_noise_between_seeds_makes_ties_of_half_lives() -> None:
    frames = {"a": answers(0, 6000), "b": answers(1, 2000)}
    quiet = dict(differences(frames, {}))["half_life"]
    assert quiet.told_apart
    seeds = {"a": {"half_life": [9.0, 13.0]}, "b": {"half_life": [11.0, 12.0]}}
    assert not dict(differences(frames, seeds))["half_life"].told_apart


def test_no_comparison_by_distance_without_half_lives(tmp_path: Path) -> None:
    other = other_store(tmp_path / "run")
    assert [c.by_distance for c in compare(other, ["hmt", "rmt"], TASKS)] == [(), ()]


def test_distances_are_the_nominal_ones_where_labels_name_them() -> None:
    frame = pd.DataFrame({"label": ["distance=4096", "", "kind=x;distance=64", "longdistance=7"],
                          "distance_tokens": [4001, 12, 70, -1]})  # fmt: skip
    assert distances(frame).tolist() == [4096, 12, 64, -1]


def test_the_tasks_own_judgement_counts() -> None:
    class Lenient:
        def correct(self, samples: pd.DataFrame) -> "pd.Series[float]":
            return pd.Series(1.0, index=samples.index)

    frame = answers(0, 3000, documents=10)
    judged = pairing.judged(Lenient(), frame)
    assert pairing.correct(judged).eq(1.0).all()
    assert 0 < pairing.correct(frame).mean() < 1
    assert half_life_estimates(frame)[0].value < 16384
    verdict = judge(judged, "accuracy", trained=True, has_memory=True)
    assert verdict is not None
    assert verdict["lift"] == 0  # all right, with memory and without
    assert pairing.judged(object(), frame) is frame
    assert not lifts(judged)  # the ceiling is no higher


def test_wiped_answers_are_the_floor_and_chance_is_where_there_are_none() -> None:
    frame = answers(0, 3000, wiped=0.3, documents=100)
    measured = half_life_estimates(frame, chance=0.0)[0].value
    alone = frame[frame.control == ""]
    assert half_life_estimates(alone, chance=0.3)[0].value == pytest.approx(measured, rel=0.15)
    assert half_life_estimates(alone, chance=0.0)[0].value > 1.5 * measured
    assert half_life_estimates(frame[frame.distance_tokens == 512]) == []


def test_expected_curve_goes_through_the_first_point() -> None:
    shares = {float(d): 0.5 ** (d / 1000) for d in range(0, 9001, 100)}
    curve = expected_curve([(1000, 0.9), (8000, 0.4)], shares, 0.1)
    assert curve[0] == pytest.approx((1000, 0.9))
    assert dict(curve)[2000] == pytest.approx(0.1 + 0.8 * 0.5)
    assert curve[-1][0] == 8000
    assert expected_curve([], shares, 0.0) == expected_curve([(1, 1.0)], {}, 0.0) == []


def test_expected_shares_of_a_rule() -> None:
    frame = answers(0, 3000, documents=2)
    found = dict(expected_shares(lambda d: 0.5 ** (d / 100), frame))
    assert set(DISTANCES) <= set(found)
    assert (found[0], found[512]) == (1.0, pytest.approx(0.5**5.12))
    assert len(found) <= 60
    assert expected_shares(lambda d: None, frame) == []
    assert expected_shares(lambda d: 1.0, frame.assign(distance_tokens=-1)) == []
    assert expected_shares(lambda d: 1.0, pd.DataFrame()) == []


def panel(report: Report, kind: str, task: int = 0) -> Any:
    board = report.boards[task]
    plot = next(p for p in plots.plots(board) if p.kind == kind)
    return plots.draw(board, plot)


def test_every_row_is_in_the_plots_of_retention(report: Report) -> None:
    kinds = [plot.kind for plot in plots.plots(report.boards[0])]
    assert kinds[:3] == ["headline", "retention", "half_life"]
    assert "distance" not in kinds
    (axes,) = panel(report, "retention").axes
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["full-context", "hmt", "memoryllm", "truncation", "rmt (over budget: eval_seconds)"]
    said = {text.get_text() for text in axes.texts}
    assert {"chance", "memory wiped", "evidence in the prompt"} <= said
    dashed = [line for line in axes.lines if line.get_linewidth() == 1.1]
    assert len(dashed) == 1  # only the pool has a rule
    (bars,) = panel(report, "half_life").axes
    assert [tick.get_text() for tick in bars.get_yticklabels()][::-1][:2] == ["full-context", "hmt"]
    shown = [text.get_text() for text in bars.texts]
    assert {"failed", "no memory"} <= set(shown)
    assert "> 16,384 [16,384, open)" in shown


def test_reference_names_do_not_touch(report: Report) -> None:
    (axes,) = panel(report, "retention").axes
    heights = sorted(
        t.xy[1] for t in axes.texts if t.get_text() in ("chance", "memory wiped", "evidence in the prompt")
    )
    assert np.diff(heights).min() >= 5


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return build(other_store(tmp_path_factory.mktemp("other") / "run"), TASKS)


def test_needle_and_delay(other: Report) -> None:
    place = {board.task: i for i, board in enumerate(other.boards)}
    needle = panel(other, "depth", place["passkey"])
    shown = [axes.get_title() for axes in needle.axes if axes.get_visible()]
    assert sorted(shown) == ["hmt", "rmt", "truncation", "xl-cache"]
    values = np.asarray(needle.axes[0].images[0].get_array())
    assert values.shape == (5, 4)
    assert values[-1].min() == 1.0  # just before the question
    (axes,) = panel(other, "delay", place["noun-recall"]).axes
    assert "surprisal drop (nats)" in axes.get_ylabel()
    assert len(axes.get_legend().get_texts()) == 4
    assert "position" not in [plot.kind for plot in plots.plots(other.boards[place["noun-recall"]])]
    assert not words.is_retention(other.boards[place["passkey"]])


def test_names_under_a_distance_axis_are_few() -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    places = [0, *(2**i for i in range(6, 18))]
    retention_panels.distance_axis(axes, places)
    names = [t.get_text() for t in axes.get_xticklabels() if t.get_text()]
    assert len(names) <= retention_panels.MANY
    assert names[-1] == "131,072"
    assert drawing.factor("half_life") == 1.0
