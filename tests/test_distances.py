"""The headline by distance: its table, and the sentence where the order at the largest distance is another."""

from pathlib import Path

import pandas as pd
import pytest
from retention_records import DISTANCES, TASKS, answers, other_store, result, task_cell

from memory_bench.report import distances
from memory_bench.report.build import Report, build
from memory_bench.store import Store

# name, half-life, accuracy at the start: the first is best on the whole, the second holds on longest
REVERSED = (("mplus", 9000.0, 0.98), ("hmt", 1e9, 0.55), ("rmt", 8000.0, 0.97))
ALIKE = (("mplus", 1e9, 0.95), ("hmt", 6000.0, 0.9), ("rmt", 1500.0, 0.85))


def made(folder: Path, models: tuple[tuple[str, float, float], ...], only: int | None = None) -> Report:
    """Two seeds; `only`: questions at one distance alone."""
    store = Store.open_or_create(folder)
    for seed in (0, 1):
        for name, half, start in models:
            samples: pd.DataFrame = answers(seed, half, start=start)
            samples = samples if only is None else samples[samples["distance_tokens"] == only]
            store.write_record(result(task_cell(name, "squad-retention", seed), samples), samples)
    return build(store, TASKS)


def test_accuracy_stands_in_a_column_for_every_distance(tmp_path: Path) -> None:
    report = made(tmp_path, ALIKE)
    table = distances.table(report.boards[0])
    assert table is not None
    assert table.columns == ("model", *(f"{d:,}" for d in DISTANCES))
    assert [row[0] for row in table.rows] == [row.label for row in report.boards[0].rows]
    own = next(row for row in report.boards[0].rows if row.label == "rmt").find("accuracy", "distance=16384")
    assert own is not None
    assert next(row for row in table.rows if row[0] == "rmt")[-1].startswith(f"{100 * own.value:.1f} % [")
    for text in (report.markdown(), report.html()):
        assert "Accuracy by distance, in tokens" in text
        assert "another than the headline" not in text


def test_another_order_at_the_largest_distance_is_said(tmp_path: Path) -> None:
    report = made(tmp_path, REVERSED)
    board = report.boards[0]
    assert board.rows[0].label != "hmt"
    sentence = distances.other_order(board)
    start = "At the largest distance, 16,384 tokens, the order is another than the headline's: hmt 5"
    assert sentence.startswith(start)
    assert sentence in report.markdown()
    assert "another than the headline" in report.html()


def test_what_did_not_finish_has_no_place_in_the_order(tmp_path: Path) -> None:
    store = Store.open_or_create(tmp_path)
    for name, half, start in REVERSED[:2]:
        samples = answers(0, half, start=start)
        status = ("over_budget", "eval_seconds@segment 20/33") if name == "hmt" else ("ok", "")
        store.write_record(result(task_cell(name, "squad-retention"), samples, *status), samples)
    board = build(store, TASKS).boards[0]
    assert distances.other_order(board) == ""
    table = distances.table(board)
    assert table is not None
    assert {row[0] for row in table.rows} == {"mplus", "hmt"}  # it stays in the table


def test_one_distance_is_the_headline_itself(tmp_path: Path) -> None:
    assert distances.table(made(tmp_path, REVERSED, only=512).boards[0]) is None


@pytest.mark.parametrize("task", [0, 1])
def test_depths_and_delays_are_no_distances(tmp_path: Path, task: int) -> None:
    board = build(other_store(tmp_path), TASKS).boards[task]
    assert distances.table(board) is None
    assert distances.other_order(board) == ""
