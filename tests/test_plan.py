"""A plan that can be believed: what is counted, measured and computed beforehand is what a run then says."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from memory_bench import plugins
from memory_bench.backbone.small import TINY, small_card, small_model
from memory_bench.budget import Budget, BudgetExceeded, load_budget
from memory_bench.command import commands, preparing
from memory_bench.command.foretelling import foretold, planner_of
from memory_bench.command.jobs import make_job
from memory_bench.corpus import TextCorpus
from memory_bench.driver.meter import Meter
from memory_bench.driver.stream import walk
from memory_bench.driver.train import train
from memory_bench.errors import UserError
from memory_bench.recipe import Recipe, Stage
from memory_bench.record import Record
from memory_bench.report.build import build
from memory_bench.report.scorers import scorers
from memory_bench.running.budgets import load_budgets
from memory_bench.running.calibration import Calibrations
from memory_bench.running.counting import Counter
from memory_bench.running.options import Options
from memory_bench.running.pace import Sample, fit_paces
from memory_bench.running.planning import broken_limits, deadline_of
from memory_bench.running.remaining import Remaining
from memory_bench.running.shapes import Shapes
from memory_bench.running.worker import run_cell
from memory_bench.store import Store

MODELS = "truncation,full-context,hmt,rmt,armt,mplus,memorizing,longmem,retrieval,memoryllm"
Prepare = Callable[..., tuple[preparing.Prepared, Options]]


@pytest.fixture
def prepare(world: Any, tmp_path: Any) -> Prepare:
    """``prepare(models, tasks, budget text…)``: a run in the world, ready."""

    def made(models: str, tasks: str = "pg19", budget: str = "", **changes: Any) -> tuple[preparing.Prepared, Options]:
        path = tmp_path / "own.toml"
        path.write_text(budget or world.budget.read_text(encoding="utf-8"))
        options = Options(
            models, tasks, str(world.backbone), str(path), "1", "", world.data, True, tmp_path / "out", "3", (), True,
            "inline", "", False, True, False, world.cache, False,
        )  # fmt: skip
        options = replace(options, **changes)
        return commands.prepare(options), options

    return made


def run(prepared: preparing.Prepared, options: Options) -> list[Record]:
    return [
        run_cell(make_job(c, prepared.out, options, 1), lambda *_: None, lambda _: None) for c in prepared.grid.cells
    ]


@pytest.mark.parametrize("task", ["pg19", "pubmedqa", "passkey"])
def test_counted_tokens_and_flops_are_the_records(prepare: Prepare, task: str) -> None:
    prepared, options = prepare(MODELS, task, controls=False)
    counter = Counter(prepared.backbones)
    assert len(prepared.grid.cells) == 10
    for cell, record in zip(prepared.grid.cells, run(prepared, options), strict=True):
        assert record.status == "ok", record.detail
        counted = counter.count(cell).usage
        for name in ("train_tokens", "train_flops", "train_steps", "eval_tokens", "eval_flops"):
            assert getattr(counted, name) == getattr(record.usage, name), (cell.title, name)
        assert counted.train_tokens > 0, "the window and its like train their adapters"
        assert counter.model(cell.training).added_parameters() == record.usage.added_parameters


def simulate(weights: dict[str, float], took: dict[str, float], workers: int, *, seconds: bool) -> list[float]:
    """Planned left against true left, after each cell that ended, of cells run in their order."""
    clock = [0.0]
    remaining = Remaining(weights, workers, seconds=seconds, now=lambda: clock[0])
    waiting, running, ratios = list(took), {}, []  # type: ignore[var-annotated]
    while waiting or running:
        while waiting and len(running) < workers:
            key = waiting.pop(0)
            running[key] = clock[0] + took[key]
            remaining.begin(key)
        key = min(running, key=running.__getitem__)
        clock[0] = running.pop(key)
        remaining.end(key)
        free = sorted([*(end for end in running.values()), *[clock[0]] * (workers - len(running))])
        for other in waiting:
            free[0] += took[other]
            free.sort()
        if waiting:
            told = remaining.left()
            assert told is not None
            ratios.append(told / (free[-1] - clock[0]))
    return ratios


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize(("scale", "seconds"), [(1.0, True), (1.6, True), (1e-9, False)])
def test_time_left_is_right_within_a_quarter_after_the_first_cell(workers: int, scale: float, seconds: bool) -> None:
    """Cells of 10 s to 600 s, the dear ones last, as where `6 of 66 minutes` was followed by `126 min left`."""
    took = {f"c{i}": 10.0 * (1 + i) ** 1.4 for i in range(24)}
    weights = {key: value / scale for key, value in took.items()}
    ratios = simulate(weights, took, workers, seconds=seconds)
    assert len(ratios) > 10
    assert all(0.75 <= r <= 1.25 for r in ratios), ratios
    equal = simulate(dict.fromkeys(took, 0.0), took, workers, seconds=False)
    assert min(equal) < 0.5  # what knows nothing of the cells is far off, so the test can fail


def test_time_left_grows_while_a_cell_runs_longer_than_planned() -> None:
    clock = [0.0]
    remaining = Remaining({"a": 10.0, "b": 10.0, "c": 30.0}, 1, seconds=True, now=lambda: clock[0])
    remaining.begin("a")
    assert remaining.left() == 50.0
    clock[0] = 100.0
    assert (remaining.left() or 0) > 200.0  # the others will take longer, too


def test_a_small_cell_that_misses_its_plan_by_seconds_says_little_of_the_others() -> None:
    took = {"first": 8.0} | {f"c{i}": 60.0 for i in range(20)}
    ratios = simulate(took | {"first": 1.0}, took, 1, seconds=True)
    assert ratios[0] <= 2.0  # eight times as long as it would take, if the first cell alone were believed
    assert ratios[-1] == pytest.approx(1.0, abs=0.05)


def test_a_training_that_cells_share_weighs_once(prepare: Prepare) -> None:
    prepared, options = prepare("truncation,rmt", "pg19,pg19-interleaved", controls=False)
    planner = planner_of(prepared.grid.cells, prepared.backbones, options, measure=False)
    for cell in prepared.grid.cells:
        plan = {"peak_bytes": 1, "train_seconds": 30.0, "eval_seconds": 2.0, "control_seconds": 0.0}
        planner.calibrations.keep(cell, plan | {"start_seconds": 5.0, "seconds": 37.0, "how": "measured here"})
    jobs = [make_job(cell, prepared.out, options, 1) for cell in prepared.grid.cells]
    _, remaining = foretold(jobs, options, 1)
    trainings = {cell.training.key for cell in prepared.grid.cells}
    assert len(trainings) < len(jobs), "some cells share one"
    assert remaining.left() == 37.0 * len(trainings) + 7.0 * (len(jobs) - len(trainings))


def test_limits_that_a_planned_cell_breaks_are_named() -> None:
    row = {"peak_bytes": 240_000_000, "train_seconds": 9.0, "eval_seconds": 70.0}
    budget = Budget("b", device_bytes=150_000_000, host_bytes=10**9, train_tokens=5, train_seconds=8, eval_seconds=60)
    found = broken_limits(budget, row, 7, 500_000_000)
    assert found == [
        "device_bytes 150 MB, about 240 MB",
        "eval_seconds 60 s, about 70 s",
        "train_seconds 8 s, about 9 s",
    ]
    assert broken_limits(Budget("b", train_seconds=8), row, 7, None) == []  # there a clock ends the training: a length
    assert broken_limits(Budget("b", added_parameters=6), row, 7, None) == ["added_parameters 6, about 7"]


def test_prices_of_calls_are_found_again() -> None:
    samples = [Sample("step", own, grown, 0.01 + 0.5 * own + 2 * grown) for own in (1, 2, 3) for grown in (0, 0.1, 0.4)]
    found = fit_paces(samples)["step"]
    assert found == pytest.approx([0.01, 0.5, 2.0])
    assert all(price >= 0 for price in fit_paces([replace(s, seconds=1 - s.own / 10) for s in samples])["step"])


@pytest.mark.parametrize("model", ["truncation", "rmt", "hmt", "memorizing", "mplus", "xl-cache"])
def test_the_computed_peak_is_that_of_the_tensors_of_a_real_step(model: str) -> None:
    """The same trainer, once on shapes and once on numbers, both counted storage by storage."""
    cls, recipe = plugins.load("models", model), Recipe("r", (Stage(segments=3, rows=4, steps=2),), lr=1e-3)
    corpus = TextCorpus([torch.arange(400) % 60])
    peaks = []
    for counting in (Shapes(), Numbers()):
        with counting:
            backbone = small_model({**TINY, "vocab": 64}, torch.Generator())
            config = cls.fit(small_card("tiny", TINY, ""), Budget("b", train_tokens=1))

            def build(config: Any, backbone: Any = backbone) -> Any:
                return cls(backbone, config, torch.Generator())

            train(build, config, recipe, corpus, Meter(Budget("b"), torch.device("cpu")), seed=0)
        peaks.append(counting.peak)
    assert peaks[0] == pytest.approx(peaks[1], rel=0.1)


class Numbers(Shapes):
    """Counts the storages of tensors that have numbers."""

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)


def test_full_context_has_the_longest_context_that_a_limit_holds() -> None:
    cls, card = plugins.load("models", "full-context"), small_card("tiny", TINY, "")
    for name in ("cpu-minutes", "cpu-smol", "smoke"):  # the configs of shipped presets, and so their keys, stay
        assert "context" not in plugins.plain(cls.fit(card, load_budget(name)))
    small, larger = (cls.fit(card, Budget("b", train_tokens=0, device_bytes=n * 10**6)) for n in (10, 20))
    assert plugins.plain(small)["context"] == small.context < larger.context
    config = replace(small, segment=8, context=20)
    model = cls(small_model(TINY, torch.Generator()), config, torch.Generator())
    lines = TextCorpus([torch.arange(100)]).batch(1, 4, 8, torch.Generator())
    with torch.no_grad(), pytest.raises(BudgetExceeded, match="context 20, 24 at token 21"):
        list(walk(model, lines))


def test_budgets_with_other_limits() -> None:
    one, two = load_budgets("smoke[device_bytes=1.5GB, train_tokens=100],cpu-minutes")
    assert (one.name, one.device_bytes, one.train_tokens) == (
        "smoke[device_bytes=1.5GB,train_tokens=100]",
        15 * 10**8,
        100,
    )
    assert two == load_budget("cpu-minutes")
    assert load_budgets("smoke[eval_seconds=none]")[0].eval_seconds is None
    assert load_budgets("smoke[own_curriculum=false]")[0].own_curriculum is False
    for wrong, said in [
        ("smoke[device_byte=1GB]", "Did you mean device_bytes?"),
        ("smoke[device_bytes=1XB]", "100MB"),
        ("smoke[train_tokens=1.5]", "whole number"),
        ("smoke[train_tokens=5MB]", "give a number."),
        ("smoke[train_tokens]", "limit=value"),
        ("smoke,smoke", "twice"),
        ("smoke[device_bytes=-1]", "give a number"),
        ("smoke[own_curriculum=0]", "true or false"),
        ("smoke[seeds=none]", "give a number"),
    ]:
        with pytest.raises(UserError) as raised:
            load_budgets(wrong)
        assert said in str(raised.value), (wrong, raised.value)


def test_boards_of_several_budgets_stay_apart(prepare: Prepare, tmp_path: Path) -> None:
    text = f"{tmp_path}/own.toml,{tmp_path}/own.toml[device_bytes=3GB]"
    prepare("truncation")  # writes own.toml
    prepared, options = prepare(
        "truncation,rmt", budget='train_tokens = 1000\n[tasks.pg19]\nextent = "full"\n', controls=False
    )
    prepared = commands.prepare(replace(options, budget=text))
    assert len(prepared.grid.cells) == 4
    store = Store.open_or_create(prepared.out)
    records = run(prepared, options)
    assert [r.detail for r in records] == [""] * 4
    boards = build(store, scorers([store])).boards
    assert sorted(b.budget.name for b in boards) == ["own", "own[device_bytes=3GB]"]
    assert all(len(b.rows) == 2 for b in boards)


def test_plan_against_actual_comes_from_records(prepare: Prepare) -> None:
    prepared, options = prepare("truncation", controls=False)
    job = make_job(prepared.grid.cells[0], prepared.out, options, 1)
    plan = {"peak_bytes": 10**8, "seconds": 9.0, "start_seconds": 6.0, "how": "measured here"}
    record = run_cell(replace(job, plan=plan), lambda *_: None, lambda _: None)
    assert record.provenance["plan"] == {"peak_bytes": 10**8, "seconds": 3.0, "how": "measured here"}
    store = Store.open(prepared.out)
    store.write_run(commands.grid_json(prepared))
    text = build(store, scorers([store])).markdown()
    assert "Planned and spent:" in text
    assert "measured here" in text


def test_a_cell_that_was_run_is_known(prepare: Prepare, tmp_path: Path) -> None:
    prepared, options = prepare("truncation", controls=False)
    known = Calibrations(tmp_path / "cache", "cpu")
    cell = prepared.grid.cells[0]
    assert known.spent(cell) is None
    record = run(prepared, options)[0]
    known.learn(replace(record, status="failed", detail="x"))
    assert known.spent(cell) is None
    known.learn(record)
    spent = known.spent(cell)
    assert spent is not None
    assert spent.peak_bytes == record.usage.peak_device_bytes


def test_a_deadline_is_three_times_the_plan_where_no_limit_is(prepare: Prepare) -> None:
    prepared, _ = prepare("rmt", controls=False, budget="train_tokens = 1000\neval_seconds = 5\n")
    cell = prepared.grid.cells[0]
    assert deadline_of(cell, None) is None
    assert deadline_of(cell, {"seconds": 10.0}) == 600.0
    assert deadline_of(cell, {"seconds": 400.0}) == 1200.0
    timed = replace(cell, training=replace(cell.training, budget=replace(cell.training.budget, train_seconds=5.0)))
    assert deadline_of(timed, {"seconds": 400.0}) is None
