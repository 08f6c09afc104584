"""A folder of results is data: no command that reads one imports code that a record or ``run.json`` names."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from memory_bench.cell import Cell, Choice
from memory_bench.errors import UserError
from memory_bench.report.scorers import scorer_key, scorers
from memory_bench.store import Store
from synthetic import few_questions, make_cell, make_record, question_samples

Run = Callable[..., tuple[int, str, str]]
CANARY = """
from pathlib import Path
Path({marker!r}).write_text("imported")
class T:
    headline = "accuracy"
class M:
    pass
def f(*given):
    return 1.0
"""


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take seconds, and are drawn from the same rows."""
    monkeypatch.setattr("memory_bench.report.plots.render", lambda board, labels: [])


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that leaves a mark when it is imported; at the end there must be none."""
    marker = tmp_path / "marker"
    file = tmp_path / "canary.py"
    file.write_text(CANARY.format(marker=str(marker)))
    yield file
    assert not marker.exists()


@pytest.fixture
def store(canary: Path, tmp_path: Path) -> Store:
    """Results of installed plug-ins, and beside them some whose model, task or both are a file."""
    found = few_questions(tmp_path / "run")
    yaml = tmp_path / "task.yaml"
    yaml.write_text("task: mine\nmetric_list:\n- metric: !function canary.f\n")
    known = make_cell("rmt", "pubmedqa")
    config = {"data": "mine"}
    tasks = (known.task, *(Choice(n, config=config) for n in (f"{canary}:T", f"lm-eval:{yaml}", "gone", "lm-eval:")))
    for number, task in enumerate(tasks):
        for model in (f"{canary}:M", "absent", f"absent{number}.py:X"):
            training = replace(known.training, model=Choice(model), corpus=Choice(f"{canary}:T"))
            put(found, replace(known, training=training, task=task, label=""))
    named = [f"{canary}:M", f"{canary}:T"]
    found.write_run({"request": {"models": named, "tasks": named}, "skipped": [
        {"model": f"{canary}:M", "task": f"{canary}:T", "reason": "why"}], "data": {}})  # fmt: skip
    return found


def put(store: Store, cell: Cell, samples: pd.DataFrame | None = None) -> None:
    samples = question_samples(0, {16: 0.5, 64: 0.5}, questions=9) if samples is None else samples
    record = make_record(make_cell("rmt", "pubmedqa"), samples)
    store.write_record(replace(record, cell=cell), samples)


def test_a_report_shows_what_it_does_not_import(store: Store, canary: Path, invoke: Run) -> None:
    code, out, err = invoke("report", str(store.folder))
    assert (code, "Traceback" in err) == (0, False)
    assert f"{canary}:T" in out
    assert out.count("absent") > 4
    assert f"{canary}:T is shown with the records' own numbers" in err
    assert "gone is shown with the records' own numbers" in err
    page = (store.folder / "leaderboard.csv").read_text()
    gone = pd.read_csv(store.folder / "leaderboard.csv").query("task == 'gone' and metric == 'accuracy'")
    assert set(gone["model"]) == {f"{canary}:M", "absent", "absent3.py:X"}
    assert set(gone["higher_is_better"]) == {True}
    assert "canary.py" in page


def test_nothing_else_that_reads_results_imports_it(
    store: Store, canary: Path, invoke: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(store.folder)
    code, said, err = invoke("compare", "rmt", "truncation", "--out", out)
    assert (code, "rmt" in said, "Traceback" in err) == (0, True, False)
    assert invoke("compare", f"{canary}:M", "absent", "--out", out)[0] == 0
    reference = "results/reference/smoke-cpu.jsonl"
    for more in (("--against", str(Path(__file__).parents[1] / reference)), ("--write", str(tmp_path / "ref.jsonl"))):
        code, _, err = invoke("check", out, *more)
        assert code in (1, 2), err
        assert "Traceback" not in err


def test_mlflow_is_shown_what_is_not_imported(store: Store, invoke: Run) -> None:
    pytest.importorskip("mlflow")
    from memory_bench.mlflow import sync
    from memory_bench.mlflow.view import cell_view

    sync._report(store, ())
    views = [cell_view(record, store, "run") for record in store.records()]
    assert len(views) == len(store.records())


def test_lm_eval_reads_a_model_of_a_file_only_where_it_is_named(store: Store, canary: Path) -> None:
    from memory_bench.lm_eval.loading import from_run

    known = make_cell("rmt", "pubmedqa", seed=7)
    put(store, replace(known, training=replace(known.training, model=Choice(f"{canary}:M")), label="mine"))
    machine: Any = None
    with pytest.raises(UserError, match=r"a record does not have a file imported: name it yourself with model=.*:M"):
        from_run(store.folder, "mine", machine, seed=None, task="pubmedqa", device="cpu")


def test_a_file_is_imported_for_the_command_that_names_it(tmp_path: Path) -> None:
    store = few_questions(tmp_path / "run")
    (tmp_path / "mine.py").write_text(
        "from memory_bench.tasks.pubmedqa import PubMedQA\nclass T(PubMedQA):\n    pass\n"
    )
    task = Choice(f"{tmp_path}/mine.py:T", config={"data": "mine"})
    put(store, replace(make_cell("rmt", "pubmedqa"), task=task))
    assert scorer_key(task) not in scorers([store])
    assert scorers([store], [task])[scorer_key(task)].headline == "accuracy"


def test_options_of_another_version_cost_their_own_board(store: Store, invoke: Run) -> None:
    """`fused` is an option of `pubmedqa`, `fuzed` was one of an imagined earlier version."""
    odd = Choice("pubmedqa", config={"data": "odd", "fuzed": 3})
    put(store, replace(make_cell("rmt", "pubmedqa"), task=odd))
    code, out, err = invoke("report", str(store.folder))
    assert code == 0
    assert "pubmedqa is shown with the records' own numbers" in err
    assert "odd" in out
