"""Boards say no more than they know: winners, unequal trainings, boards without numbers, threads, lm-eval's door."""

import csv
import io
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from memory_bench.budget import PRESETS, Budget
from memory_bench.card import BackboneCard
from memory_bench.cell import Cell, Choice
from memory_bench.command import jobs
from memory_bench.driver.meter import Meter
from memory_bench.errors import UserError
from memory_bench.report.board import collect
from memory_bench.report.build import build
from memory_bench.report.comparison import compare
from memory_bench.report.plots import plots
from memory_bench.report.words import direction, winners
from memory_bench.store import Store
from synthetic import TASKS, make_cell, make_record, question_samples, text_samples


def put(store: Store, cell: Cell, gain: float, ended_by: str = "train_tokens", steps: int = 100, **facts: Any) -> None:
    samples = text_samples(cell.training.seed, gain)
    record = make_record(cell, samples)
    record.usage.training_ended_by, record.usage.train_steps = ended_by, steps
    store.write_record(replace(record, provenance={**record.provenance, **facts}), samples)


def test_one_seed_names_no_winner(tmp_path: Path) -> None:
    store = Store.open_or_create(tmp_path)
    for name, gain in (("truncation", 0.0), ("hmt", 0.05)):
        put(store, make_cell(name), gain)
    (board,) = collect(store, TASKS)
    assert board.letters["hmt"] != board.letters["truncation"]
    assert winners(board) == ("No winner is named from one seed: the noise between seeds is unknown. First: hmt.")
    assert "| one seed" in build(store, TASKS).markdown()
    assert compare(store, [], TASKS)[0].rows()[0]["verdict"] == "hmt is ahead, no winner: one seed"
    put(store, make_cell("hmt", seed=1), 0.05)
    assert "from one seed for truncation" in winners(collect(store, TASKS)[0])
    put(store, make_cell("truncation", seed=1), 0.0)
    (board,) = collect(store, TASKS)
    assert winners(board) == "Best: hmt, ahead of all others."
    assert compare(store, [], TASKS)[0].rows()[0]["verdict"] == "hmt is better"


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_training_that_the_clock_ended_is_not_ranked_as_equal(tmp_path: Path, everywhere: bool) -> None:
    store = Store.open_or_create(tmp_path)
    for seed in (0, 1):
        for name, gain in (("truncation", 0.0), ("rmt", 0.02), ("hmt", 0.05)):
            cell = make_cell(name, seed=seed)
            cell = replace(cell, training=replace(cell.training, recipe=Choice("invented-studies")))
            late = everywhere or (name == "hmt" and seed == 1)
            put(store, cell, gain, *(("train_seconds", 479) if late else ("steps", 490)))
    (board,) = collect(store, TASKS)
    said = "training ended by train_seconds after 479 of 490 steps"
    text = build(store, TASKS).markdown()
    assert "Best:" not in text
    assert "the same for all" not in text
    if everywhere:
        assert board.unequal == dict.fromkeys(("truncation", "rmt", "hmt"), said)
        return
    assert [row.label for row in board.rows] == ["rmt", "truncation", "hmt"]
    assert board.unequal == {"hmt": said}
    assert "hmt" not in board.letters
    assert board.against_window(board.rows[-1]) is None
    assert winners(board) == "No winner is named, as the trainings are not equal (see the notes of hmt)."
    assert f"{said}: not ranked" in text
    lines = list(csv.DictReader(io.StringIO(build(store, TASKS).csv())))
    assert all(line["detail"].startswith(said) for line in lines if line["model"] == "hmt")
    verdicts = {(p["a"], p["b"]): p["verdict"] for p in compare(store, [], TASKS)[0].rows()}
    assert verdicts["truncation", "hmt"] == "hmt is ahead, no winner: their trainings are not equal"
    assert verdicts["rmt", "truncation"] == "rmt is better"


def test_a_recipe_with_other_steps_is_no_equal_training(tmp_path: Path) -> None:
    store = Store.open_or_create(tmp_path)
    for seed in (0, 1):
        for name, gain, recipe in (("truncation", 0.0, ""), ("rmt", 0.02, ""), ("hmt", 0.05, "-short")):
            cell = make_cell(name, seed=seed)
            cell = replace(cell, training=replace(cell.training, recipe=Choice(f"key-value{recipe}")))
            put(store, cell, gain, "steps", 150 if recipe else 450)
    (board,) = collect(store, TASKS)
    assert board.unequal == {"hmt": "training has 150 steps, others' have 450"}
    assert [row.label for row in board.rows] == ["rmt", "truncation", "hmt"]
    assert winners(board).startswith("No winner is named")
    assert "the same for all" not in build(store, TASKS).markdown()


def test_runs_with_other_budgets_of_one_name_have_no_winner(tmp_path: Path) -> None:
    stores = {}
    for run, tokens in (("short", 1000), ("long", 9000)):
        stores[run] = Store.open_or_create(tmp_path / run)
        for seed in (0, 1):
            cell = make_cell("hmt", seed=seed)
            budget = Budget("mine", train_tokens=tokens)
            put(stores[run], replace(cell, training=replace(cell.training, budget=budget)), tokens / 1e5)
    (pair,) = compare(stores, [], TASKS)[0].rows()
    assert pair["verdict"] == "hmt@long is ahead, no winner: their trainings are not equal"


def test_a_seed_that_failed_makes_no_winner_of_the_others(tmp_path: Path) -> None:
    store = Store.open_or_create(tmp_path)
    for seed in (0, 1, 2):
        for name, gain in (("truncation", 0.0), ("rmt", 0.02), ("hmt", 0.05)):
            if (name, seed) != ("hmt", 2):
                put(store, make_cell(name, seed=seed), gain)
    store.write_record(make_record(make_cell("hmt", seed=2), None, "failed", "NotFinite: no"), None)
    (board,) = collect(store, TASKS)
    assert winners(board) == "Best: rmt, ahead of all others that finished (hmt did not)."
    verdicts = {(p["a"], p["b"]): p["verdict"] for p in compare(store, [], TASKS)[0].rows()}
    assert verdicts["rmt", "hmt"] == "hmt is ahead, no winner: hmt failed with other seeds"
    assert verdicts["rmt", "truncation"] == "rmt is better"


def test_where_nobody_finished_nobody_gains_by_answering_less(tmp_path: Path) -> None:
    store = Store.open_or_create(tmp_path)
    for name, share, count in (("truncation", 0.5, 40), ("rmt", 0.9, 10)):
        samples = question_samples(0, {16: share})
        samples = samples[samples["episode"].isin(sorted(samples["episode"].unique())[:count])]
        cell = make_cell(name, "pubmedqa")
        store.write_record(make_record(cell, samples, "over_budget", "eval_seconds@question 9"), samples)
    (board,) = collect(store, TASKS)
    assert [row.label for row in board.rows] == ["truncation", "rmt"]
    assert "30 of 40 questions unanswered, counted as wrong" in build(store, TASKS).markdown()


def test_equal_time_is_equal_where_time_is_the_budget(tmp_path: Path) -> None:
    store = Store.open_or_create(tmp_path)
    for seed in (0, 1):
        for name, gain in (("truncation", 0.0), ("hmt", 0.05)):
            put(store, make_cell(name, seed=seed, budget="gpu-minutes"), gain, "train_seconds")
    (board,) = collect(store, TASKS)
    assert not board.unequal
    assert winners(board) == "Best: hmt, ahead of all others."


def test_a_board_without_numbers_says_nothing_of_better(tmp_path: Path) -> None:
    store = Store.open_or_create(tmp_path)
    for name in ("truncation", "hmt"):
        store.write_record(make_record(make_cell(name), None, "failed", "RuntimeError: no"), None)
    (board,) = collect(store, TASKS)
    report = build(store, TASKS)
    assert direction(board) == winners(board) == ""
    for text in (report.markdown(), report.html()):
        assert "is better" not in text
    assert {line["higher_is_better"] for line in csv.DictReader(io.StringIO(report.csv()))} == {""}
    assert "is better" not in compare(store, [], TASKS)[0].markdown()


def card(parameters: int) -> BackboneCard:
    return BackboneCard("b", "llama", 8, 1, 1, 1, 8, 16, 64, 32, True, parameters)


def test_threads_are_the_backbones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = card(500_000), card(135_000_000)
    found = set()
    for cores in (1, 2, 16, 64):
        monkeypatch.setattr(jobs, "cores", lambda cores=cores: cores)
        found.add((jobs.threads_for(small, "cpu"), jobs.threads_for(large, "cpu")))
        assert jobs.workers_for([small], "cpu") == cores
        assert 1 <= jobs.workers_for([small, large], "cpu") <= max(1, cores // 2)
    assert found == {(1, 2)}


def test_a_row_computed_with_other_threads_says_so(tmp_path: Path) -> None:
    store = Store.open_or_create(tmp_path)
    for name, threads in (("truncation", 2), ("rmt", 2), ("hmt", 16)):
        put(store, make_cell(name), 0.01, device="cpu", threads=threads)
    text = build(store, TASKS).markdown()
    assert text.count("computed with 16 threads, others with 2") == 1


def test_a_busy_machine_ends_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds are those the CPU computes; on a machine with other work many more pass."""
    clock = iter(range(0, 10**9, 10**4))
    passed = [0.0]

    def passing() -> float:
        passed[0] = float(next(clock))
        return passed[0]

    monkeypatch.setattr("memory_bench.driver.clock.time.monotonic", passing)
    monkeypatch.setattr("memory_bench.driver.clock.waited", lambda pid: passed[0])
    meter = Meter(Budget("b", train_tokens=100, train_seconds=60, eval_seconds=60), torch.device("cpu"))
    with meter.phase("train"):
        assert meter.spent_share()[0] < 1
    with meter.phase("eval"):
        meter.enforce()
    assert meter.usage.train_seconds < 60


def test_presets_at_equal_tokens_have_no_clock_of_a_busy_machine() -> None:
    for budget in PRESETS.values():
        if budget.train_tokens and budget.name.startswith("gpu"):
            assert budget.train_seconds is None, budget.name


def chosen(corpus: str, backbone: str, *, pretrained: bool = False, trained: str = "trained") -> Any:
    training = make_cell("rmt").training
    training = replace(training, corpus=Choice(corpus), backbone=Choice(backbone))
    loaded = SimpleNamespace(card=SimpleNamespace(pretrained=pretrained))
    return SimpleNamespace(training=training, loaded=loaded, trained=trained, read={})


STAND_IN, REAL = {"data": "pubmedqa (stand-in: invented studies)"}, {"data": "pubmedqa"}


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra lm-eval is not installed")
@pytest.mark.parametrize(
    ("task", "document", "model", "said"),
    [
        ("mb_pubmedqa", STAND_IN, chosen("books", "tiny"), "has a backbone and a training of its own"),
        ("mb_pubmedqa", STAND_IN, chosen("invented-studies", "invented-studies"), ""),
        ("mb_pubmedqa", REAL, chosen("books", "tiny"), "rmt was trained on books, and .* trains it on pubmedqa"),
        ("mb_pubmedqa", REAL, chosen("pubmedqa", "tiny"), ""),
        ("mb_pubmedqa", REAL, chosen("books", "smollm2-135m", pretrained=True), ""),
        ("mb_pg19", {"data": "pg19"}, chosen("pubmedqa", "tiny"), "trained on pubmedqa, .* trains it on books"),
        ("mb_pg19", {"data": "pg19"}, chosen("books", "tiny"), ""),
        ("mb_key_value", {"data": "key-value"}, chosen("key-value,load=1", "key-value"), ""),
        ("lambada_openai", {}, chosen("pubmedqa", "tiny"), ""),
    ],
)
def test_lm_eval_reads_our_tasks_with_the_boards_model(
    task: str, document: dict[str, Any], model: Any, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    from memory_bench.lm_eval.fitting import Fit

    request = SimpleNamespace(task_name=task, doc=document)
    fit = Fit(model)
    if said:
        with pytest.raises(UserError, match=said):
            fit.check([request])
    else:
        fit.check([request])
    other = Fit(SimpleNamespace(**{**vars(model), "trained": "nothing to train"}))
    other.check([request, request])
    own_backbone = "backbone" in said
    assert len(other.misfits) == own_backbone == ("own" in caplog.text)  # untrained models fit any training


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra lm-eval is not installed")
@pytest.mark.parametrize(
    ("read", "document", "said"),
    [
        (
            ("pg19", "aa"),
            {"data": "pg19 (stand-in: Shakespeare and Milton)", "revision": "bb"},
            "where the run read pg19",
        ),
        (("pg19", "aa"), {"data": "pg19", "revision": "bb"}, "another version of pg19 than the run's"),
        (("pg19", "aa"), {"data": "pg19", "revision": "aa"}, ""),
        (None, {"data": "pg19 (stand-in: Shakespeare and Milton)", "revision": "bb"}, ""),
    ],
)
def test_lm_eval_reads_no_other_data_than_the_run(
    read: tuple[str, str] | None, document: dict[str, Any], said: str
) -> None:
    from memory_bench.lm_eval.fitting import Fit

    model = chosen("none", "smollm2-135m", pretrained=True, trained="nothing to train")
    model.read = {} if read is None else {"pg19": read}
    request = SimpleNamespace(task_name="mb_pg19", doc=document)
    if said:
        with pytest.raises(UserError, match=said):
            Fit(model).check([request])
    else:
        Fit(model).check([request])


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra lm-eval is not installed")
def test_lm_evals_door_refuses_what_is_not_finite() -> None:
    from test_finite import POISON, poisoned

    from memory_bench.errors import NotFinite
    from memory_bench.lm_eval.reading import Counts, Reader
    from memory_bench.lm_eval.writing import write

    reader = Reader(poisoned("truncation", segment=4), rows=2, seed=0, watcher=Counts())
    with pytest.raises(NotFinite, match="non-finite likelihood"):
        list(reader.likelihoods({(1, 2, POISON): [(3,)]}))
    with pytest.raises(NotFinite, match="non-finite likelihood"):
        list(reader.texts([(1, POISON, 3, 4)]))
    with pytest.raises(NotFinite, match="non-finite logits in an answer"):
        list(write(reader, [(1, POISON)], 2, lambda ids: False))


def test_untrained_rows_of_several_seeds_hide_no_noise(tmp_path: Path) -> None:
    """On a pretrained backbone the window and its like are untrained, and the same with every seed."""
    store = Store.open_or_create(tmp_path)
    for seed, shift in ((0, 0.006), (1, -0.006)):
        for name, gain in (("hmt", 0.03 + shift), ("rmt", 0.010 - shift), ("truncation", 0.0), ("xl-cache", 0.004),
                           ("retrieval", 0.002), ("sliding-window", 0.006)):  # fmt: skip
            trained = name in ("hmt", "rmt")
            samples = text_samples(seed if trained else 0, gain).assign(seed=seed)
            record = make_record(make_cell(name, seed=seed), samples)
            if not trained:
                record.usage.train_tokens = record.usage.trained_parameters = 0
            store.write_record(record, samples)
    (board,) = collect(store, TASKS)
    pair, still = board.pair("hmt", "rmt"), board.pair("xl-cache", "truncation")
    assert pair is not None
    assert pair.adjusted < 0.001
    assert not pair.told_apart
    assert still is not None
    assert still.floor == 0
    found = {(p.a, p.b): p for p in compare(store, [], TASKS)[0].pairs}
    assert found["hmt", "rmt"].floor == pair.floor


def revised(cell: Cell, **backbone: Any) -> Cell:
    return replace(cell, training=replace(cell.training, backbone=Choice("tiny", **backbone)))


@pytest.mark.parametrize(
    ("other", "said"),
    [({"revision": "bbbb222233"}, "revision bbbb2222"), ({"config": {"dtype": "bfloat16"}}, "dtype bfloat16")],
)
def test_two_backbones_of_one_name_are_two_boards(tmp_path: Path, other: dict[str, Any], said: str) -> None:
    store = Store.open_or_create(tmp_path)
    for backbone, gain in (({"revision": "aaaa1111", "config": {"dtype": "float32"}}, 0.0),
                           ({"revision": "aaaa1111", "config": {"dtype": "float32"}} | other, 0.3)):  # fmt: skip
        for name in ("truncation", "hmt"):
            put(store, revised(make_cell(name), **backbone), gain)
    boards = collect(store, TASKS)
    assert [len(board.rows) for board in boards] == [2, 2]
    assert all(len(row.records) == 1 for board in boards for row in board.rows)
    report = build(store, TASKS)
    assert f"backbone tiny ({said})" in report.markdown()
    assert len({line["backbone"] for line in report.rows()}) == 2
    assert len({plot.name for board in boards for plot in plots(board)}) == 2 * len(plots(boards[0]))
    assert len(compare(store, [], TASKS)) == 2


def test_budgets_of_one_name_are_shown_with_their_limits(tmp_path: Path) -> None:
    store = Store.open_or_create(tmp_path)
    for size in (150_000_000, 2_000_000_000):
        cell = make_cell("hmt")
        budget = replace(cell.training.budget, device_bytes=size)
        put(store, replace(cell, training=replace(cell.training, budget=budget)), 0.0)
    report = build(store, TASKS)
    assert "budget cpu-minutes (device_bytes 150 MB)" in report.markdown()
    assert "budget cpu-minutes (device_bytes 2 GB)" in report.markdown()
    (found,) = compare(store, [], TASKS)
    assert {*found.models} == {"hmt (device_bytes 150 MB)", "hmt (device_bytes 2 GB)"}


def test_training_on_other_text_is_a_row_of_its_own(tmp_path: Path) -> None:
    store = Store.open_or_create(tmp_path)
    for corpus in ("books", "books (stand-in)"):
        cell = make_cell("hmt", "pubmedqa")
        cell = replace(cell, training=replace(cell.training, corpus=Choice(corpus)))
        samples = question_samples(0, {16: 0.5}, questions=9)
        store.write_record(make_record(cell, samples), samples)
    (board,) = collect(store, TASKS)
    assert len(board.rows) == len({row.label for row in board.rows}) == 2
