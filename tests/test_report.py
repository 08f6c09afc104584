"""The report on made-up results whose effects are known: ranking, ties, statuses, look-ahead, files."""

import csv
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from memory_bench.report.board import collect
from memory_bench.report.build import Report, build
from memory_bench.report.layout import Table, to_markdown, to_tex
from memory_bench.report.tables import scaled, size
from memory_bench.store import Store
from synthetic import (
    TASKS,
    few_questions,
    make_cell,
    make_record,
    make_store,
    question_samples,
    text_samples,
)

COLUMNS = """
    model, backbone, task, data, budget, seeds, metric, slice, value, ci_low, ci_high, n, unit, higher_is_better,
    status, added_parameters, added_fraction, train_tokens, train_flops, train_seconds, eval_tokens,
    eval_flops_per_token, eval_tokens_per_second, peak_device_bytes, peak_host_bytes, state_bytes, parity, role, detail
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def report(store: Store) -> Report:
    return build(store, TASKS, {"rmt": "exact", "hmt": "max|Δ|=1e-6"})


@pytest.fixture(scope="module")
def lines(report: Report) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(report.csv())))


def pick(lines: list[dict[str, str]], model: str, task: str, metric: str, slice_: str = "") -> dict[str, str]:
    found = [r for r in lines if (r["model"], r["task"], r["metric"], r["slice"]) == (model, task, metric, slice_)]
    assert len(found) == 1
    return found[0]


def test_csv_has_the_columns_in_order(report: Report, lines: list[dict[str, str]]) -> None:
    assert report.csv().splitlines()[0].split(",") == COLUMNS.replace("\n", " ").replace(" ", "").split(",")
    row = pick(lines, "rmt", "pg19", "bits_per_byte")
    assert float(row["ci_low"]) < float(row["value"]) < float(row["ci_high"])
    assert (row["n"], row["seeds"], row["status"], row["parity"], row["role"]) == ("24", "2", "ok", "exact", "asked")
    assert row["data"] == "pg19 (stand-in: Shakespeare and Milton)"
    assert row["higher_is_better"] == "false"
    assert "seeds 0 1; seed sd" in row["detail"]
    assert float(row["eval_flops_per_token"]) == pytest.approx(1.4 * 1.05e6)
    assert float(row["added_fraction"]) == pytest.approx(21_000 / (540_000 - 21_000))
    assert pick(lines, "hmt", "pg19", "bits_per_byte")["parity"] == "max|Δ|=1e-6"
    assert pick(lines, "truncation", "pg19", "bits_per_byte")["role"] == "control"


MEASURED = """
    weight_bytes, optimizer_bytes, activation_bytes, gradient_bytes, state_device_bytes, state_host_bytes,
    state_disk_bytes, state_read_bytes, state_written_bytes, state_growth
"""


def test_what_was_held_and_moved_stands_behind_the_other_columns_where_it_was_measured(tmp_path: Path) -> None:
    store = few_questions(tmp_path)
    record, samples = make_record(make_cell("hmt", "pubmedqa"), None), question_samples(0, {16: 0.5}, questions=9)
    spent = {"weight_bytes": 2_000_000, "optimizer_bytes": 4_000_000, "activation_bytes": 80_000_000,
             "gradient_bytes": 2_000_000, "state_bytes": 76_000, "state_host_bytes": 500, "state_disk_bytes": 0,
             "state_read_bytes": 1000.4, "state_written_bytes": 32_000.0}  # fmt: skip
    points = [[32, 100], [64, 132], [128, 196], [256, 324]]
    grown = {"kind": "linear", "bytes_per_token": 1500.0, "bytes_per_doubling": None, "points": points}
    facts = {**record.provenance, "state_growth": grown}
    store.write_record(replace(record, usage=replace(record.usage, **spent), provenance=facts), samples)
    report = build(store, TASKS)
    wanted = [name.strip() for name in (COLUMNS + "," + MEASURED).split(",")]
    assert report.csv().splitlines()[0].split(",") == wanted  # no joules: no row has any
    rows = {row["model"]: row for row in csv.DictReader(io.StringIO(report.csv()))}
    assert [rows["hmt"][name] for name in wanted[-10:]] == [
        "2000000", "4000000", "80000000", "2000000", "76000", "500", "0", "1000", "32000", "linear: 1500 bytes/token",
    ]  # fmt: skip
    assert {rows["rmt"][name] for name in wanted[-10:]} == {""}
    text = report.markdown()
    for shown in ("76.5 kB, +1.5 kB/token", "Memory and energy:", "| 500 B", "- **activations**", "**memory state**"):
        assert shown in text
    assert "Memory and energy" in report.html()
    for hidden in ("state on disk", "eval J", "train J"):
        assert hidden not in text


def test_older_records_are_shown_as_they_were(report: Report) -> None:
    for hidden in ("Memory and energy", "activations", "constant", "state on"):
        assert hidden not in report.markdown()


def test_value_is_the_tasks_over_all_seeds(store: Store, lines: list[dict[str, str]]) -> None:
    both = pd.concat([text_samples(s, 0.011, segment=64, wiped=0.004) for s in (0, 1)])
    wanted = TASKS["pg19"].metrics(both)[0].value
    assert float(pick(lines, "rmt", "pg19", "bits_per_byte")["value"]) == pytest.approx(wanted)


def test_every_status_stays(lines: list[dict[str, str]]) -> None:
    over = pick(lines, "mplus", "pg19", "bits_per_byte")
    assert over["status"] == "over_budget"
    assert over["detail"].startswith("eval_seconds@segment 6/8 (seed 1)")
    assert over["value"]
    failed = pick(lines, "mplus", "pubmedqa", "accuracy")
    assert (failed["status"], failed["value"], failed["n"]) == ("failed", "", "0")
    assert "pool is empty" in failed["detail"]
    skipped = pick(lines, "longmem", "pg19", "bits_per_byte")
    assert (skipped["status"], skipped["train_tokens"]) == ("skipped", "")


def test_look_ahead_is_marked_and_never_ranked(report: Report, lines: list[dict[str, str]]) -> None:
    label = "hmt recall_query=current-half"
    mine = [row for row in lines if row["model"] == label]
    assert mine
    assert all(row["slice"].startswith("look_ahead=16") for row in mine)
    assert any(row["slice"] == "look_ahead=16;position=0-64" for row in mine)
    board = report.boards[0]
    assert label not in [row.label for row in board.rows]
    assert [row.label for row in board.ahead] == [label]
    assert all(label not in (pair.a, pair.b) for pair in board.pairs)
    assert "| 16 tokens " in report.markdown()


def test_ranking_and_letters(report: Report) -> None:
    board = report.boards[0]
    assert [row.label for row in board.rows] == ["xl-cache", "hmt", "rmt", "truncation", "mplus", "longmem"]
    assert board.letters["xl-cache"] == board.letters["hmt"]
    assert not set(board.letters["hmt"]) & set(board.letters["rmt"])
    gap = board.against_window(board.rows[1])
    assert gap is not None
    assert gap.value == pytest.approx(-0.025, abs=0.004)
    assert gap.low is not None
    assert gap.low < gap.value < 0
    back = board.pair("truncation", "hmt")
    assert back is not None
    assert back.value == -gap.value
    assert back.high == -gap.low


def test_other_segment_lengths_are_paired(report: Report) -> None:
    pair = report.boards[0].pair("rmt", "hmt")  # 64 against 32 tokens
    assert pair is not None
    assert pair.n == 24


def test_unfinished_documents_are_left_out_of_pairs(report: Report) -> None:
    pair = report.boards[0].pair("mplus", "truncation")
    assert pair is not None
    # Seed 1 stopped after 16 books; a plain mean over what was scored would mix books and be off by much more.
    assert pair.value == pytest.approx(-0.003, abs=0.003)


def test_noise_between_seeds_makes_ties(tmp_path: Path) -> None:
    store = Store.open_or_create(tmp_path)
    for seed, shift in ((0, 0.0), (1, 0.02)):
        for name, gain in (("hmt", 0.010 + shift), ("rmt", 0.008 - shift)):
            samples = text_samples(seed, gain)
            cell = make_cell(name, seed=seed)
            store.write_record(make_record(cell, samples), samples)
    (board,) = collect(store, TASKS)
    (pair,) = board.pairs
    assert pair.adjusted < 0.001  # the documents agree
    assert not pair.told_apart  # the seeds do not
    assert set(board.letters.values()) == {"a"}


def test_a_model_changed_after_its_training_has_a_row_of_its_own(tmp_path: Path) -> None:
    store, trained = Store.open_or_create(tmp_path), make_cell("memorizing", slots=8)
    for cell, gain in ((trained, 0.0), (replace(trained, scored_with={"slots": 64}, label="larger"), 0.03)):
        samples = text_samples(0, gain)
        store.write_record(make_record(cell, samples), samples)
    (board,) = collect(store, TASKS)
    assert [row.label for row in board.rows] == ["larger", "memorizing"]


def test_one_seed_is_told_apart_by_documents_alone(tmp_path: Path) -> None:
    store = Store.open_or_create(tmp_path)
    for name, gain in (("hmt", 0.03), ("rmt", 0.0)):
        samples = text_samples(0, gain)
        store.write_record(make_record(make_cell(name), samples), samples)
    (board,) = collect(store, TASKS)
    assert board.letters == {"hmt": "a", "rmt": "b"}
    assert board.rows[0].seed_spread is None
    assert "seed sd |" not in build(store, TASKS).markdown()


def test_memory_lift(lines: list[dict[str, str]]) -> None:
    lift = {m: float(pick(lines, m, "pubmedqa", "memory_lift")["value"]) for m in ("truncation", "rmt")}
    floor, ceiling, score = (
        float(pick(lines, "rmt", "pubmedqa", "accuracy", s)["value"]) for s in ("control:wiped", "control:ceiling", "")
    )
    assert lift["rmt"] == pytest.approx((score - floor) / (ceiling - floor))
    assert abs(lift["truncation"]) < 0.15
    assert not [row for row in lines if row["task"] == "pg19" and row["metric"] == "memory_lift"]


def test_unanswered_questions_count_as_wrong(tmp_path: Path) -> None:
    store = Store.open_or_create(tmp_path)
    whole = question_samples(0, {16: 1.0}, questions=40)
    store.write_record(make_record(make_cell("rmt", "pubmedqa"), whole), whole)
    half = whole[whole.episode < "study-010"]
    cell = make_cell("hmt", "pubmedqa")
    store.write_record(make_record(cell, half, "over_budget", "device_bytes@segment 3/9"), half)
    (board,) = collect(store, TASKS)
    row = next(r for r in board.rows if r.label == "hmt")
    assert row.headline is not None
    assert row.headline.value == pytest.approx(0.25)
    assert "30 of 40 questions unanswered" in build(store, TASKS).csv()


def test_without_samples_records_are_averaged(tmp_path: Path) -> None:
    store = Store.open_or_create(tmp_path)
    records = [make_record(make_cell("hmt", seed=s), text_samples(s, 0.02)) for s in (0, 1)]
    for record in records:
        store.write_record(record, None)
    for tasks in (TASKS, {}):
        (board,) = collect(store, tasks)
        headline = board.rows[0].headline
        assert headline is not None
        assert headline.value == pytest.approx(np.mean([r.metrics[0].value for r in records]))
        assert headline.low is not None
        assert board.pairs == ()


def test_a_task_that_fails_costs_a_warning_not_the_report(store: Store) -> None:
    class Broken:
        headline = "bits_per_byte"

        def metrics(self, samples: pd.DataFrame, seed: int = 0) -> list[Any]:
            raise RuntimeError("no")

    fresh = Store.open(store.folder)
    text = build(fresh, {**TASKS, "pg19": Broken()}).markdown()
    assert "> Warning: hmt on pg19: metrics failed" in text
    assert "2.6" in text


def test_broken_record_is_named(tmp_path: Path) -> None:
    store = few_questions(tmp_path)
    key = store.records()[0].key
    (store.cell_folder(key) / "record.json").write_text("{")
    assert f"cells/{key}/record.json is not used" in build(Store.open(tmp_path), TASKS).markdown()


def test_markdown_says_what_a_reader_needs(report: Report) -> None:
    text = report.markdown()
    assert "## At equal training tokens" in text
    assert "### pg19 (stand-in: Shakespeare and Milton) · backbone tiny · budget cpu-minutes" in text
    assert "204,800 tokens trained · 59,000 tokens scored · seeds 0, 1 · 24 documents · extent excerpt" in text
    assert "chance 33.3 %, majority 36.0 %" in text
    assert "`--budget cpu-minutes-flops`" in text.split("## At equal training FLOPs")[1]
    assert "over budget: eval_seconds@segment 6/8 (seed 1)" in text
    assert "skipped: needs a GPT-2 backbone" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(block) for block in tables if "memory wiped" in block}  # aligned columns
    for name in ("tie", "lift", "learned?", "memory wiped"):
        assert f"**{name}**" in text


def test_equal_tokens_and_equal_flops_side_by_side(tmp_path: Path) -> None:
    store = Store.open_or_create(tmp_path)
    for budget, limit in (("cpu-minutes", "train_tokens"), ("cpu-minutes-flops", "train_flops")):
        for name in ("hmt", "truncation"):
            samples = text_samples(0, 0.02 * (name == "hmt"))
            record = make_record(make_cell(name, budget=budget), samples)
            record.usage.training_ended_by = limit
            store.write_record(record, samples)
    text = build(store, TASKS).markdown()
    assert text.index("## At equal training tokens") < text.index("## At equal training FLOPs")
    assert "Not in this run" not in text
    assert "training ended by" not in text


def test_other_ends_of_training_are_noted(tmp_path: Path) -> None:
    store = Store.open_or_create(tmp_path)
    samples = text_samples(0, 0.0)
    for name in ("hmt", "rmt", "mplus"):
        record = make_record(make_cell(name), samples)
        record.usage.training_ended_by = "train_seconds" if name == "mplus" else "train_tokens"
        store.write_record(record, samples)
    board = collect(store, TASKS)[0]
    assert board.kind == "train_tokens"
    assert build(store, TASKS).markdown().count("training ended by train_seconds") == 1


def test_results_of_another_limit_are_another_board(tmp_path: Path) -> None:
    store = Store.open_or_create(tmp_path)
    for limit in (None, 3):
        samples = text_samples(0, 0.0)
        store.write_record(make_record(replace(make_cell("hmt"), limit=limit), samples), samples)
    assert len(collect(store, TASKS)) == 2
    keys = {replace(make_cell("hmt"), limit=3).key}
    assert len(collect(store, TASKS, keys)) == 1
    assert "limited to 3" in build(store, TASKS, keys=keys).markdown()


def test_the_grid_decides_roles_and_skipped_rows(tmp_path: Path) -> None:
    store = few_questions(tmp_path)
    key = make_cell("rmt", "pubmedqa").key
    left_out = {"model": "mplus", "task": "pubmedqa", "reason": "mplus works on llama backbones"}
    store.write_run({"roles": {key: ["control", "rmt memory=8"]}, "skipped": [left_out]})
    board = collect(store, TASKS)[0]
    assert [(r.label, r.role, r.status) for r in board.rows] == [
        ("rmt memory=8", "control", "ok"),
        ("truncation", "asked", "ok"),
        ("mplus", "asked", "skipped"),
    ]
    assert "skipped: mplus works on llama backbones" in build(store, TASKS).markdown()


def test_a_fixed_curriculum_is_equal_tokens(tmp_path: Path) -> None:
    store = few_questions(tmp_path)
    for record in store.records():
        record.usage.training_ended_by = "steps"
        store.write_record(record, store.samples(record.key))
    (board,) = collect(store, TASKS)
    assert (board.ended_by, board.kind) == ("steps", "train_tokens")
    text = build(store, TASKS).markdown()
    assert "the data's own number of training steps" in text
    assert "training ended by" not in text
    assert "cpu-minutes-flops" not in text


def test_few_works_are_paired_by_their_excerpts(tmp_path: Path) -> None:
    store = Store.open_or_create(tmp_path)
    for name, gain in (("hmt", 0.02), ("truncation", 0.0)):
        samples = text_samples(0, gain)
        samples["cluster"] = [f"work-{int(e[-2:]) % 3}" for e in samples["episode"]]
        store.write_record(make_record(make_cell(name), samples), samples)
    (pair,) = collect(store, TASKS)[0].pairs
    assert pair.n == 24


def test_same_label_is_told_apart(tmp_path: Path) -> None:
    store = Store.open_or_create(tmp_path)
    for memory in (4, 8):
        samples = text_samples(0, 0.0)
        store.write_record(make_record(make_cell("rmt", label="rmt", memory=memory), samples), samples)
    labels = [row.label for row in collect(store, TASKS)[0].rows]
    assert len(set(labels)) == 2


def test_built_twice_is_the_same_to_the_byte(store: Store, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from memory_bench.store import Store\n"
        "from memory_bench.report.build import build; from synthetic import TASKS\n"
        "build(Store.open(Path(sys.argv[1])), TASKS).write(Path(sys.argv[2]))"
    )
    small = few_questions(tmp_path / "run", ("rmt",))
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parent)}
    # Another process with another hash seed.
    subprocess.run([sys.executable, "-c", code, str(small.folder), str(tmp_path / "a")], check=True, env=env)
    written = build(small, TASKS).write(tmp_path / "b")
    assert [p.name for p in written[:4]] == [f"leaderboard.{e}" for e in ("md", "csv", "tex", "html")]
    assert {p.suffix for p in written[4:]} == {".png", ".svg"}
    for path in written:
        assert path.read_bytes() == (tmp_path / "a" / path.relative_to(tmp_path / "b")).read_bytes(), path.name


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.open: list[str] = []
        self.uses: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if values.get("id"):
            self.ids.append(str(values["id"]))
        for name in ("src", "href", "xlink:href"):
            target = values.get(name)
            if target and not target.startswith(("#", "data:")):
                self.loads.append(target)
            elif target:
                self.uses.add(target.removeprefix("#"))
        if tag == "script":
            self.loads.append("script")


def test_page_is_self_contained(tmp_path: Path) -> None:
    page = Page()
    text = build(few_questions(tmp_path), TASKS).html()
    page.feed(text)
    assert page.loads == []
    assert len(page.ids) == len(set(page.ids))
    assert page.uses <= set(page.ids)
    assert "stand-in: invented studies" in text


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    store = Store.open_or_create(tmp_path)
    samples = text_samples(0, 0.0)
    store.write_record(make_record(make_cell("hmt", label="<script>|x_1%"), samples), samples)
    built = build(store, TASKS)
    assert "<script>" not in built.html()
    assert "<script>\\|x_1%" in built.markdown()
    assert r"$<$script$>$$|$x\_1\%" in built.tex()


def test_empty_store(tmp_path: Path) -> None:
    built = build(Store.open_or_create(tmp_path), TASKS)
    assert "No results yet" in built.markdown()
    assert "No results yet" in built.html()
    assert built.csv().count("\n") == 1


def test_only_failures_still_make_a_report(tmp_path: Path) -> None:
    store = Store.open_or_create(tmp_path)
    store.write_record(make_record(make_cell("hmt"), None, "failed", "boom"), None)
    files = build(store, TASKS).write(tmp_path)
    assert len(files) == 4
    assert "failed: boom" in files[0].read_text()


def test_numbers_for_people() -> None:
    assert [scaled(x) for x in (0, 999, 1234, 2.05e11, 3e15)] == ["0", "999", "1.23 k", "205 G", "3 P"]
    assert [size(x) for x in (12, 2048, 3e9)] == ["12 B", "2.05 kB", "3 GB"]
    table = Table(("model", "x", "y"), (("a", "–", "1"), ("long name", "–", "22")))
    text = to_markdown(table.without_empty_columns())
    assert text == "| model     | y  |\n|-----------|----|\n| a         | 1  |\n| long name | 22 |"
    assert r"a \& b" in to_tex(Table(("m",), (("a & b",),)))


def _modules() -> Iterator[str]:
    yield from (f"report.{name}" for name in ("build", "comparison", "tables", "plots", "page"))


def test_the_report_needs_no_torch() -> None:
    code = f"import sys, {', '.join(f'memory_bench.{m}' for m in _modules())}\nprint('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
