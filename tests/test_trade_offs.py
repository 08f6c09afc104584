"""Plots of quality against cost, rows over budget in every plot, looks, plans and sweeps, on made-up results."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memory_bench.budget import Usage
from memory_bench.files.artefacts import Damaged
from memory_bench.record import Record
from memory_bench.report.board import Board, collect
from memory_bench.report.build import build
from memory_bench.report.comparison import compare
from memory_bench.report.costs import cost
from memory_bench.report.fronts import front
from memory_bench.report.limits import Struck, read_detail
from memory_bench.report.looks import assigned
from memory_bench.report.naming import name_marks, spread_out
from memory_bench.report.plots import draw, plots
from memory_bench.report.scales import Scale
from memory_bench.report.sweeps import _stepped
from memory_bench.report.trade_offs import PRICES, prices
from memory_bench.store import Store
from synthetic import TASKS, make_cell, make_record, question_samples, text_samples

NEW, OLD = "device_bytes 150 MB, 163 MB at segment 37/391", "device_bytes@segment 6/8"
GAINS = {"truncation": 0.0, "hmt": 0.03, "rmt": 0.0285, "mplus": -0.03, "xl-cache": 0.06}
STATES = {"truncation": 0, "hmt": 2_000, "rmt": 40_000, "mplus": 80_000, "xl-cache": 900_000}


def spread(folder: Path, over: Sequence[tuple[str, str, bool]] = ()) -> Store:
    """Five models whose states differ by a factor of 450, one without; and rows over budget (name, detail, partial)."""
    store = Store.open_or_create(folder)
    for seed in (0, 1):
        for name, gain in GAINS.items():
            samples = text_samples(seed, gain)
            record = make_record(make_cell(name, seed=seed), samples)
            record.usage.state_bytes = STATES[name]
            record.usage.peak_device_bytes = 300_000_000 + 40 * STATES[name]
            store.write_record(record, samples)
        for name, detail, partial in over:
            whole = text_samples(seed, 0.5)
            samples = whole[(whole.episode < "book-01") & (whole.start < 64)] if partial else None
            store.write_record(make_record(make_cell(name, seed=seed), samples, "over_budget", detail), samples)
    return store


def panels(board: Board, kind: str) -> Any:
    return draw(board, next(p for p in plots(board) if p.kind == kind)).axes


def texts(axes: Any) -> list[str]:
    return [t.get_text() for panel in axes for t in panel.texts]


def test_every_price_has_its_plot_and_fills_it(tmp_path: Path) -> None:
    (board,) = collect(spread(tmp_path), TASKS)
    kinds = [plot.kind for plot in plots(board)]
    assert set(PRICES) <= set(kinds)
    for kind in PRICES:
        costs = prices(board, kind)
        for axes in panels(board, kind):
            marks = [line.get_xdata()[0] for line in axes.lines if line.get_markersize() == 8]
            across = axes.transAxes.inverted().transform([axes.transData.transform((x, 1)) for x in marks])[:, 0]
            assert len(marks) == len(GAINS), kind
            assert across.min() >= 0
            assert across.max() <= 1
            positive = [c for c in costs.values() if c]
            if max(positive) > 2 * min(positive):
                assert across.max() - across.min() > 0.6, kind


@pytest.mark.parametrize(
    "costs", [[1.0, 2.5], [1e3, 1e9], [0, 8, 5e6], [0, 5.0], [3e5, 3.1e5], [4.0, 4.0], [0.0, 0.0], [1e-4, 7e-4, 2e-3]]
)
def test_scales_of_all_kinds(costs: list[float]) -> None:
    scale = Scale.of(costs)
    places = [scale.at(c) for c in costs]
    assert all(scale.low < place < scale.high for place in places)
    assert places == sorted(places)
    if len(set(costs)) > 1:
        ends = np.log10([scale.low, *places, scale.high]) if scale.logarithmic else [scale.low, *places, scale.high]
        assert (ends[-2] - ends[1]) / (ends[-1] - ends[0]) > 0.6


@pytest.mark.parametrize("costs", [[1.15e6, 2.3e6 + 1], [0.083, 0.17], [1.0, 3.9], [1e3, 1e9], [3e5, 3.1e5]])
def test_an_axis_has_three_ticks_at_least(costs: list[float]) -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    Scale.of(costs).apply(axes)
    low, high = axes.get_xlim()
    assert sum(low <= tick <= high for tick in axes.get_xticks()) >= 3


@pytest.mark.parametrize("kind", ["position", "state_bytes", "peak_device_bytes"])
def test_rows_without_a_number_write_no_names_over_the_picture(tmp_path: Path, kind: str) -> None:
    """Four rows over budget: numbers at their crosses, and under the plot what the numbers mean."""
    lost = ("longmem", "memorizing", "retrieval", "armt")
    (board,) = collect(spread(tmp_path, [(name, NEW, False) for name in lost]), TASKS)
    axes = panels(board, kind)
    inside = [t.get_text() for panel in axes for t in panel.texts if t.xyann != (0, -40)]
    assert not [text for text in inside if "over budget" in text]
    (key,) = [t.get_text() for panel in axes for t in panel.texts if t.xyann == (0, -40)]
    said = [line for line in key.splitlines() if line.startswith("×")]
    assert sorted(line.split()[2].rstrip(":") for line in said) == sorted(lost)
    assert sorted("".join(t for t in inside if t.replace(",", "").isdigit()).replace(",", "")) == list("1234")


def test_names_of_limits_that_would_touch_stand_on_two_lines() -> None:
    assert _stepped(["60 MB", "100 MB", "150 MB", "2 GB"], [0.05, 0.15, 0.25, 0.8]) == [
        "60 MB", "\n100 MB", "150 MB", "2 GB",
    ]  # fmt: skip


def test_zero_stands_left_of_a_break(tmp_path: Path) -> None:
    (board,) = collect(spread(tmp_path), TASKS)
    axes = panels(board, "state_bytes")[0]
    assert next(t.get_text() for t in axes.get_xticklabels()) == "0"
    assert axes.get_xticks()[0] < min(s for s in STATES.values() if s)
    assert "left of the break: 0" in " ".join(texts([axes]))


def test_only_what_is_worse_beyond_the_tie_is_dominated(tmp_path: Path) -> None:
    (board,) = collect(spread(tmp_path), TASKS)
    found = front(board, prices(board, "state_bytes"))
    assert not board.pair("hmt", "rmt").told_apart  # type: ignore[union-attr]
    assert set(found.dominated) == {"mplus"}  # rmt is dearer than hmt and may be as good
    assert found.steps[:2] == ("truncation", "hmt")
    assert found.steps[-1] == "xl-cache"
    cheap = front(board, dict.fromkeys(GAINS, 1.0))
    assert set(cheap.dominated) == {"truncation", "hmt", "rmt", "mplus"}
    assert cheap.steps == ("xl-cache",)
    greys = [line.get_markeredgecolor() for line in panels(board, "state_bytes")[0].lines if line.get_markersize() == 8]
    assert greys.count("#BDBDBD") == 1


def test_names_touch_neither_marks_nor_each_other() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = [(f"model-{i}", 0.1 + 0.013 * (i % 5), 0.5 + 0.01 * i) for i in range(12)]
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    left = name_marks(axes, places, [], ["black"] * 12)
    shown = {t.get_text(): t.get_window_extent() for t in axes.texts}
    assert set(left) | set(shown) == {name for name, _, _ in places}
    assert shown
    boxes = list(shown.values())
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    marks = axes.transData.transform([(x, y) for _, x, y in places])
    assert not any(box.contains(*mark) for box in boxes for mark in marks)


@pytest.mark.parametrize(
    ("detail", "found"),
    [
        (NEW, Struck("device_bytes", "150 MB", "163 MB", "segment 37/391")),
        (OLD, Struck("device_bytes", "", "", "segment 6/8")),
        ("train_tokens 49,152, 60,000 at step 3", Struck("train_tokens", "49,152", "60,000", "step 3")),
        ("host_bytes of this machine, more was asked for at the start",
         Struck("host_bytes", "of this machine", "more was asked for", "the start")),
        ("something else", Struck("something else")),
        ("", Struck("a limit")),
    ],
)  # fmt: skip
def test_details_of_both_forms_are_read(detail: str, found: Struck) -> None:
    assert read_detail(detail) == found


@pytest.mark.parametrize(("detail", "said"), [(NEW, "device_bytes 150 MB"), (OLD, "device_bytes")])
@pytest.mark.parametrize("partial", [True, False])
def test_a_row_over_budget_is_marked_in_every_plot(tmp_path: Path, detail: str, said: str, partial: bool) -> None:
    store = spread(tmp_path, [("full-context", detail, partial)])
    (board,) = collect(store, TASKS)
    for plot in plots(board):
        axes = draw(board, plot).axes
        crosses = [line for panel in axes for line in panel.lines if line.get_marker() == "x"]
        assert crosses, plot.kind
        named = [
            *texts(axes),
            *(t.get_text() for panel in axes if panel.get_legend() for t in panel.get_legend().texts),
        ]
        assert any(said in text for text in named), plot.kind
    row = next(row for row in board.rows if row.label == "full-context")
    assert (row.headline is not None) == partial
    assert "full-context" not in board.letters
    costs = prices(board, "state_bytes")
    assert "full-context" not in {*front(board, costs).steps, *front(board, costs).dominated}
    text = build(store, TASKS).markdown()
    assert "full-context did not" in text  # its half a book would have come first
    assert ("scored 1% of the text" in text) == partial
    if partial:
        verdicts = {r["verdict"] for r in compare(store, [], TASKS)[0].rows() if "full-context" in (r["a"], r["b"])}
        assert not any(v.endswith("is better") for v in verdicts)


def test_half_lives_and_distances_show_a_row_over_budget(tmp_path: Path) -> None:
    store = Store.open_or_create(tmp_path)
    for name in ("truncation", "hmt"):
        samples = question_samples(0, {16: 0.8, 64: 0.6}, questions=12)
        store.write_record(make_record(make_cell(name, "pubmedqa"), samples), samples)
    store.write_record(make_record(make_cell("full-context", "pubmedqa"), None, "over_budget", NEW), None)
    (board,) = collect(store, TASKS)
    for kind in ("headline", "distance"):
        assert any("device_bytes 150 MB at segment 37/391" in text for text in texts(panels(board, kind))), kind


def test_a_partial_seed_is_no_noise_between_seeds(tmp_path: Path) -> None:
    store = spread(tmp_path, [("full-context", NEW, True)])
    (board,) = collect(store, TASKS)
    without = collect(spread(tmp_path / "other"), TASKS)[0]
    pair, alone = board.pair("hmt", "truncation"), without.pair("hmt", "truncation")
    assert pair is not None
    assert alone is not None
    assert pair.floor == alone.floor


def test_a_model_looks_the_same_whoever_else_is_there() -> None:
    shipped = [
        "armt", "autocompressor", "emllm", "emllm (nothing retrieved)", "emllm (random selection)", "extended-mind",
        "extended-mind (memory off)", "extended-mind (random selection)", "full-context",
        "full-context[rotary=True]", "hmt", "hmt (recall off)", "infini-attention", "infllm",
        "infllm (nothing retrieved)", "infllm (random selection)", "longmem", "memlong", "memlong (memory off)",
        "memlong (random selection)", "memorizing", "memorizing (memory off)", "memorizing[top_k=0]", "memoryllm",
        "memoryprompt", "mplus", "retrieval", "rmt", "sirllm", "sliding-window", "ttt", "unimix",
        "unimix (no recurrent tokens)", "unimix (no window)", "unimix (nothing retrieved)",
        "unimix (random selection)", "xl-cache", "truncation",
    ]  # fmt: skip
    found = assigned(shipped)
    assert len(set(found.values())) == len(shipped)
    for label in shipped:
        assert assigned([label])[label] == found[label]
    more = [f"model-{i}" for i in range(40)]
    assert len(set(assigned([*shipped, *more]).values())) == len(shipped) + len(more)
    for other in [*more, "a", "=1+1", *(f"{letter}{i}" for letter in "az" for i in range(60))]:
        with_it = assigned([*shipped, other])
        assert {label: with_it[label] for label in shipped} == {label: found[label] for label in shipped}, other


def test_names_at_the_ends_of_curves_do_not_touch_and_stay_near() -> None:
    assert spread_out([], 10) == []
    assert spread_out([0, 50, 20], 10) == [0, 50, 20]
    assert spread_out([5, 5, 5], 10) == [-5, 5, 15]
    found = spread_out([30, 0, 31, 32, 100], 10)
    assert found == [pytest.approx(x) for x in (21, 0, 31, 41, 100)]
    rng = np.random.default_rng(0)
    for _ in range(50):
        wanted = list(rng.uniform(0, 100, size=14))
        places = spread_out(wanted, 10)
        assert np.argsort(places, kind="stable").tolist() == np.argsort(wanted, kind="stable").tolist()
        assert np.diff(sorted(places)).min() >= 10 - 1e-9
        assert np.mean(places) == pytest.approx(np.mean(wanted))


def test_a_plan_stands_beside_what_was_spent(tmp_path: Path) -> None:
    store = spread(tmp_path)
    assert "Planned and spent" not in build(store, TASKS).markdown()
    for record in store.records():
        if record.cell.training.model.name == "hmt":
            plan = {"peak_bytes": 150_000_000, "seconds": 100.0, "how": "measured here"}
            record.usage.control_seconds = 50.0
            planned = replace(record, provenance={**record.provenance, "plan": plan})
            store.write_record(planned, store.samples(record.key))
    report = build(store, TASKS)
    text, page = report.markdown(), report.html()
    line = next(line for line in text.splitlines() if "measured here" in line)
    spent = 1.8 * 30 + 50
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["hmt", "150 MB", "300 MB", "2.00", "100", f"{spent:.3g}", f"{spent / 100:.2f}", "measured here"]
    assert "Planned and spent" in page
    assert "controls s" in text
    plain = store.records()[0].to_json()
    for wrong in (
        {"peak_bytes": "x", "seconds": 1, "how": ""},
        {"peak_bytes": 1, "seconds": -1, "how": ""},
        {"how": ""},
    ):
        plain["provenance"]["plan"] = wrong
        with pytest.raises((Damaged, ValueError)):
            Record.from_json(plain)


def test_budgets_that_differ_in_one_limit_are_a_sweep(tmp_path: Path) -> None:
    store = Store.open_or_create(tmp_path)
    for size in (150_000_000, 2_000_000_000, None):
        for name in ("truncation", "full-context"):
            cell = make_cell(name)
            budget = replace(cell.training.budget, name=f"sweep-{size}", device_bytes=size)
            cell = replace(cell, training=replace(cell.training, budget=budget))
            lost = name == "full-context" and size == 150_000_000
            samples = None if lost else text_samples(0, 0.02 * (name == "full-context"))
            record = make_record(cell, samples, "over_budget" if lost else "ok", NEW if lost else "")
            store.write_record(record, samples)
    report = build(store, TASKS)
    assert len(report.boards) == 3
    (sweep,) = report.sweeps
    assert (sweep.limit, [sweep.bound(b) for b in sweep.boards]) == ("device_bytes", [1.5e8, 2e9, None])
    text = report.markdown(links=True)
    assert "| full-context | over budget: device_bytes 150 MB" in text.split("## Across budgets")[1]
    files = {path.name for path in report.write(tmp_path / "out")}
    assert {"pg19-tiny-by-device_bytes.png", "pg19-tiny-by-device_bytes.svg"} <= files
    assert "plots/pg19-tiny-by-device_bytes.png" in text
    assert build(spread(tmp_path / "one"), TASKS).sweeps == []


@pytest.mark.parametrize(
    ("budget", "ended", "said"),
    [
        ("cpu-minutes", "train_tokens", "Equal for all: 204,800 training tokens. Not equal:"),
        ("cpu-minutes-flops", "train_flops", "Equal for all: training FLOPs, at most 660 G"),
        ("gpu-minutes", "train_seconds", "Equal for all: training time, at most 180 s. Not equal: 204,800 training"),
    ],
)
def test_a_board_says_what_is_equal(tmp_path: Path, budget: str, ended: str, said: str) -> None:
    store = Store.open_or_create(tmp_path)
    for name in ("truncation", "hmt"):
        samples = text_samples(0, 0.0)
        record = make_record(make_cell(name, budget=budget), samples)
        record.usage.training_ended_by = ended
        store.write_record(record, samples)
    report = build(store, TASKS)
    assert said in report.markdown()
    assert said in report.tex()
    (axes, *_) = panels(report.boards[0], "headline")
    what = {"train_tokens": "tokens", "train_flops": "FLOPs", "train_seconds": "time"}[ended]
    assert f"at equal training {what}" in axes.get_title(loc="left")


def test_what_was_seen_of_a_cell_that_was_ended_from_outside_is_on_the_board(tmp_path: Path) -> None:
    store = Store.open_or_create(tmp_path / "run")
    store.write_run({})
    for name in ("truncation", "full-context"):
        record = make_record(make_cell(name), text_samples(0, 0.0))
        if name == "full-context":
            usage = Usage(train_tokens=204_800, train_flops=7e11, train_seconds=21.0, training_ended_by="train_tokens",
                          peak_device_bytes=195_700_000, peak_host_bytes=720_000_000)  # fmt: skip
            limit = "device_bytes 200 MB, more was asked for at segment 290/535"
            record = replace(record, status="over_budget", detail=limit, metrics=(), usage=usage, learned=None)
        store.write_record(record, None if record.status == "over_budget" else text_samples(0, 0.0))
    (board,) = collect(store, TASKS)
    told = cost(next(row for row in board.everything if row.label == "full-context"))
    assert (told.peak_device_bytes, told.train_tokens, told.train_seconds) == (195_700_000, 204_800, 21.0)
    assert (told.eval_tokens, told.added_parameters, told.weight_bytes) == (None, None, None)
