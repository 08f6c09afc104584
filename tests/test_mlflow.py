"""The MLflow view: what a record becomes, that repeating changes nothing, and sentences where MLflow is not there."""

import importlib.util
import math
import os
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from damage import flip

from memory_bench.cell import Cell
from memory_bench.cli import main
from memory_bench.command import commands
from memory_bench.episode import Estimate
from memory_bench.errors import UserError
from memory_bench.files.artefacts import vouch
from memory_bench.mlflow import sync as mlflow_sync
from memory_bench.mlflow.place import NotSynced, check, reach, shown
from memory_bench.mlflow.sync import Synced, sync
from memory_bench.mlflow.view import POINTS, Point, View, cell_view
from memory_bench.report.build import PAGES
from memory_bench.store import Store
from synthetic import TEXT_DATA, make_cell, make_record, question_samples, text_samples

needs_mlflow = pytest.mark.skipif(
    importlib.util.find_spec("mlflow") is None, reason="the extra mlflow is not installed"
)
DISTANCES = {16: 0.9, 64: 0.8, 256: 0.6}
CURVE = [[512, 4.5], [1024, 4.0], [1536, 3.75]]
NOBODY = "http://127.0.0.1:1"


def put(store: Store, cell: Cell, status: str = "ok", **options: Any) -> None:
    """A record with a training curve."""
    text = cell.task.name == "pg19"
    seed = cell.training.seed
    samples = text_samples(seed, 0.01, documents=4) if text else question_samples(seed, DISTANCES, questions=9)
    record = make_record(cell, samples, status, **options)
    happened = {**record.provenance, "curve": CURVE, "started": "2025-12-31T23:59:00+00:00", "commit": "abc123"}
    store.write_record(replace(record, provenance=happened), samples)


def fill(folder: Path) -> Store:
    """Six cells on two tasks, one of them over budget and one failed, with the files of a report."""
    store = Store.open_or_create(folder)
    put(store, make_cell("truncation", role="control"))
    put(store, make_cell("hmt", segment=32))
    put(store, make_cell("hmt", label="hmt recall_query=current-half", recall_query="current-half"), look_ahead=16)
    put(store, make_cell("rmt", "pubmedqa"))
    put(store, make_cell("mplus", "pubmedqa"), "over_budget", detail="eval_seconds@segment 6/8")
    store.write_record(make_record(make_cell("longmem", "pubmedqa"), None, "failed", "RuntimeError: no bank"), None)
    grid = {
        "request": {"models": ["hmt", "rmt"], "tasks": ["pg19", "pubmedqa"], "budget": {"name": "cpu-minutes"}},
        "skipped": [{"model": "mplus", "task": "pg19", "reason": "no"}],
    }
    store.write_run(grid)
    (folder / "plots").mkdir(exist_ok=True)
    files = {"leaderboard.md": "# Board", "leaderboard.html": "<p>Board", "plots/curve.png": "png"}
    for name, content in {**files, "leaderboard.csv": "model,metric,value\nhmt,accuracy,0.5\n"}.items():
        (folder / name).write_text(content)
    return store


def names(view: View) -> set[str]:
    return {point.name for point in view.points}


def viewed(store: Store, model: str, task: str) -> View:
    key = next(r.key for r in store.records() if (r.cell.training.model.name, r.cell.task.name) == (model, task))
    record = store.record(key)
    assert record is not None
    return cell_view(record, store, "run")


# What a record becomes


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return fill(tmp_path_factory.mktemp("runs") / "smoke-0a1b2c")


def estimate(slice_: str, note: str = "", metric: str = "accuracy") -> Estimate:
    return Estimate(metric, 0.5, 0.4, 0.6, 9, slice_, "share", True, note)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (estimate("distance=256"), Point("by_distance/accuracy", 0.5, 256)),
        (estimate("position=256-512"), Point("by_position/accuracy", 0.5, 384)),
        (estimate("position=3"), Point("by_position/accuracy", 0.5, 3)),
        (estimate("list=again,delay=128"), Point("by_delay/accuracy/list again", 0.5, 128)),
        (estimate("label=maybe"), Point("by_label/accuracy/maybe", 0.5, 0)),
        (estimate("depth=0.25,length=1400"), Point("by_length/accuracy/depth 0.25", 0.5, 1400)),
        (estimate("control:wiped"), Point("control/accuracy/wiped", 0.5, 0)),
        (estimate("look_ahead=16;distance=64"), Point("by_distance/accuracy", 0.5, 64)),
        (estimate("label=ja/nein, 50 %"), Point("by_label/accuracy/ja_nein/50 _", 0.5, 0)),
        (estimate("", "h > 512", "half_life"), Point("half_life_at_least", 0.5, 0)),
        (estimate("", "h < 16", "half_life"), Point("half_life_at_most", 0.5, 0)),
    ],
    ids=lambda value: value.slice or value.note if isinstance(value, Estimate) else "",
)
def test_slices_become_steps_and_names(given: Estimate, wanted: Point, store: Store, tmp_path: Path) -> None:
    record = replace(store.records()[0], metrics=(given,), status="ok", levels={}, provenance={}, learned=None)
    points = [p for p in cell_view(record, Store(tmp_path), "run").points if not p.name.startswith(("cost/", "ci95/"))]
    assert points == [wanted]


def test_a_number_that_is_none_is_a_tag(store: Store, tmp_path: Path) -> None:
    given = (estimate("", "no memory", "half_life"), replace(estimate("distance=16"), value=math.nan))
    record = replace(store.records()[0], metrics=given, status="ok", levels={}, provenance={}, learned=None)
    view = cell_view(record, Store(tmp_path), "run")
    assert all(name.startswith("cost/") for name in names(view))
    assert view.tags["mb.half_life"] == "no memory"


def test_a_cell_without_a_result_has_costs_only(store: Store) -> None:
    view = viewed(store, "mplus", "pubmedqa")
    assert view.tags["mb.status"] == "over_budget"
    assert view.tags["mb.detail"] == "eval_seconds@segment 6/8"
    assert {name.split("/")[0] for name in names(view)} == {"cost", "train"}
    failed = viewed(store, "longmem", "pubmedqa")
    assert (failed.tags["mb.status"], failed.tags["mb.detail"]) == ("failed", "RuntimeError: no bank")


def test_numbers_that_are_no_headline_stand_apart(store: Store) -> None:
    found = [cell_view(r, store, "run") for r in store.records() if r.look_ahead]
    assert [view.tags["mb.look_ahead"] for view in found] == ["16"]
    assert not {"bits_per_byte", "by_position/nll"} & names(found[0])
    assert {"look_ahead/bits_per_byte", "look_ahead/by_position/nll"} <= names(found[0])


def test_a_view_says_what_was_asked_and_read(store: Store) -> None:
    view = viewed(store, "truncation", "pg19")
    assert view.name == "truncation · pg19 · seed 0 (control)"
    assert view.tags["mb.role"] == "control"
    assert (view.params["model"], view.params["task"], view.params["seed"]) == ("truncation", "pg19", "0")
    assert view.params["budget.train_tokens"] == "204800"
    data = view.datasets[0]
    assert (data.name, data.use, data.tags["mb.stand_in"]) == (TEXT_DATA, "eval", "true")
    assert [p.value for p in view.points if p.name == "train/loss"] == [4.5, 4.0, 3.75]
    assert view.finished is not None
    assert view.started is not None
    assert view.finished - view.started == 60_000


def test_a_long_curve_is_averaged(store: Store, tmp_path: Path) -> None:
    curve = [[10 * (i + 1), float(i % 3)] for i in range(3 * POINTS)]
    record = replace(store.records()[0], provenance={"curve": curve})
    points = [p for p in cell_view(record, Store(tmp_path), "run").points if p.name == "train/loss"]
    assert [p.value for p in points] == [1.0] * POINTS
    assert [p.step for p in points[:2]] == [30, 60]


def test_the_role_is_that_of_the_last_command(tmp_path: Path) -> None:
    store = Store.open_or_create(tmp_path)
    put(store, cell := make_cell("rmt", role="control"))
    before = cell_view(store.records()[0], store, "run")
    store.write_run({"roles": {cell.key: ["asked", "rmt of mine"]}})
    after = cell_view(store.records()[0], store, "run")
    assert (before.tags["mb.role"], after.tags["mb.role"], after.name) == (
        "control",
        "asked",
        "rmt of mine · pg19 · seed 0",
    )
    assert before.mark != after.mark


def test_the_report_is_built_where_it_is_older_than_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, built = fill(tmp_path / "run"), []

    class Built:
        def write(self, folder: Path) -> None:
            built.append(folder)

    monkeypatch.setattr("memory_bench.report.build.build", lambda *_, **__: Built())
    monkeypatch.setattr("memory_bench.running.grid.make_task", lambda choice: choice)
    mlflow_sync._report(store, ())
    assert not built
    record = store.cell_folder(store.records()[0].key) / "record.json"
    later = (store.folder / "leaderboard.csv").stat().st_mtime + 5
    os.utime(record, (later, later))
    mlflow_sync._report(store, ())
    assert built == [store.folder]


# A database


def runs_of(uri: str, kind: str = "cell") -> dict[str, Any]:
    """Active runs by name."""
    from mlflow import MlflowClient

    client = MlflowClient(uri, registry_uri=uri)
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    found = client.search_runs([experiment.experiment_id], f"tags.`mb.kind` = '{kind}'")
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


def content(folder: Path) -> dict[str, list[Any]]:
    """Every row of every table of a database."""
    with sqlite3.connect(folder / "mlflow.db") as base:
        tables = [name for (name,) in base.execute("select name from sqlite_master where type = 'table'")]
        return {name: sorted(base.execute(f'select * from "{name}"').fetchall(), key=repr) for name in tables}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Synced, Path]:
    """A store, what was said of its first sync, and the folder it was called in."""
    here = tmp_path_factory.mktemp("here")
    store = fill(tmp_path_factory.mktemp("runs") / "smoke-0a1b2c")
    before = Path.cwd()
    os.chdir(here)
    try:
        return store, sync(store), here
    finally:
        os.chdir(before)


@needs_mlflow
def test_a_store_becomes_runs(written: tuple[Store, Synced, Path]) -> None:
    store, said, here = written
    uri = f"sqlite:///{store.folder / 'mlflow.db'}"
    assert (said.experiment, said.new, said.unchanged) == ("smoke", 6, 0)
    assert not list(here.iterdir()), "nothing is written into the current folder"
    parent = runs_of(uri, "run")["smoke-0a1b2c"]
    assert not parent.data.metrics
    assert parent.data.params["models"] == "hmt, rmt"
    assert parent.data.tags["mb.status"] == "4 ok, 1 over_budget, 1 failed"
    assert parent.data.tags["mb.skipped"] == "mplus on pg19: no"
    cells = runs_of(uri)
    assert len(cells) == 6
    assert {run.data.tags["mlflow.parentRunId"] for run in cells.values()} == {parent.info.run_id}
    assert {run.info.status for run in (*cells.values(), parent)} == {"FINISHED"}
    over = cells["mplus · pubmedqa · seed 0"]
    assert over.data.tags["mb.status"] == "over_budget"
    assert "accuracy" not in over.data.metrics
    read = cells["hmt · pg19 · seed 0"].inputs.dataset_inputs[0]
    assert read.dataset.name == TEXT_DATA
    assert {tag.key: tag.value for tag in read.tags}["mlflow.data.context"] == "eval"


@needs_mlflow
def test_curves_have_steps(written: tuple[Store, Synced, Path]) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{written[0].folder / 'mlflow.db'}"
    client, cells = MlflowClient(uri, registry_uri=uri), runs_of(uri)

    def steps(run: str, metric: str) -> list[int]:
        return [m.step for m in client.get_metric_history(cells[run].info.run_id, metric)]

    assert steps("rmt · pubmedqa · seed 0", "by_distance/accuracy") == [16, 64, 256]
    assert steps("hmt · pg19 · seed 0", "by_position/nll") == [32, 96, 160, 224]
    assert steps("hmt · pg19 · seed 0", "train/loss") == [512, 1024, 1536]
    assert steps("hmt · pg19 · seed 0", "bits_per_byte") == [0]


@needs_mlflow
def test_files_are_artifacts(written: tuple[Store, Synced, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    store = written[0]
    uri = f"sqlite:///{store.folder / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # which `load_table` looks at
    client = MlflowClient()
    run = runs_of(uri)["rmt · pubmedqa · seed 0"]
    table = client.load_table(run.info.experiment_id, "samples.parquet", [run.info.run_id])
    assert len(table) == len(question_samples(0, DISTANCES, questions=9))
    parent = runs_of(uri, "run")["smoke-0a1b2c"].info
    there = {a.path for a in client.list_artifacts(parent.run_id)}
    assert there == {"leaderboard.md", "leaderboard.html", "leaderboard.csv", "leaderboard.parquet", "plots"}
    place = store.folder / "mlartifacts" / parent.run_id / "artifacts"
    assert pd.read_parquet(place / "leaderboard.parquet").value.tolist() == [0.5]


@needs_mlflow
def test_links_lead_to_the_cells_with_a_result(written: tuple[Store, Synced, Path]) -> None:
    store, said, _ = written
    cells = runs_of(f"sqlite:///{store.folder / 'mlflow.db'}")
    assert list(said.pages) == ["Compare pg19", "Curve of pg19", "Compare pubmedqa", "Curve of pubmedqa"]
    rmt = cells["rmt · pubmedqa · seed 0"].info
    these = f"runs=[%22{rmt.run_id}%22]&experiments=[%22{rmt.experiment_id}%22]"
    assert said.pages["Compare pubmedqa"] == f"http://127.0.0.1:5000/#/compare-runs?{these}"
    assert f"/#/metric?{these}&metric=%22by_distance/accuracy%22" in said.pages["Curve of pubmedqa"]
    assert said.pages["Compare pg19"].count("%22") == 2 * 3 + 2
    assert str(store.folder / "mlflow.db") in said.serve


@needs_mlflow
def test_what_changes_is_replaced_and_nothing_else(written: tuple[Store, Synced, Path]) -> None:
    store, uri = written[0], f"sqlite:///{written[0].folder / 'mlflow.db'}"
    before, first = content(store.folder), runs_of(uri)
    assert sync(store).unchanged == 6
    assert content(store.folder) == before

    put(store, make_cell("mplus", "pubmedqa"))  # it has a result now
    (store.folder / "leaderboard.csv").write_text("model,metric,value\nmplus,accuracy,0.7\n")
    said, second = sync(store), runs_of(uri)
    assert (said.replaced, said.unchanged, said.new) == (1, 5, 0)
    assert "accuracy" in second["mplus · pubmedqa · seed 0"].data.metrics
    kept = set(first) - {"mplus · pubmedqa · seed 0"}
    assert {first[name].info.run_id for name in kept} == {second[name].info.run_id for name in kept}
    parent = runs_of(uri, "run")["smoke-0a1b2c"]
    assert parent.data.tags["mb.status"] == "5 ok, 1 failed"
    assert {run.data.tags["mlflow.parentRunId"] for run in second.values()} == {parent.info.run_id}

    store.remove(make_cell("longmem", "pubmedqa").key)
    assert sync(store).removed == 1
    assert len(runs_of(uri)) == 5


@needs_mlflow
def test_an_interrupted_sync_is_completed(written: tuple[Store, Synced, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    store, uri = written[0], f"sqlite:///{written[0].folder / 'mlflow.db'}"
    put(store, make_cell("armt"))
    (store.folder / "leaderboard.csv").touch()

    log = MlflowClient.log_artifact

    def refuse(client: MlflowClient, run: str, path: str, folder: str | None = None) -> None:
        if path.endswith("record.json"):
            raise OSError("No space left on device")
        log(client, run, path, folder)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", refuse)
        with pytest.raises(NotSynced, match="No space left on device"):
            sync(store)
    assert sync(store).replaced == 1
    assert "bits_per_byte" in runs_of(uri)["armt · pg19 · seed 0"].data.metrics
    assert len(runs_of(uri, "run")) == 1


@needs_mlflow
def test_a_folder_that_moved_is_a_sentence(written: tuple[Store, Synced, Path], tmp_path: Path) -> None:
    store = fill(tmp_path / "smoke-0a1b2c")
    (store.folder / "mlflow.db").write_bytes((written[0].folder / "mlflow.db").read_bytes())
    with pytest.raises(UserError, match="the folder has moved; delete"):
        sync(store)


# The command


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (("--mlflow",), ""),
        (("--mlflow", "--models", "rmt"), ""),
        (("--mlflow", "http://127.0.0.1:5000", "--models", "rmt"), "http://127.0.0.1:5000"),
        (("--mlflow=sqlite:///x.db",), "sqlite:///x.db"),
        (("--models", "rmt"), None),
    ],
    ids=["alone", "before", "uri", "equals", "absent"],
)
def test_the_option_has_an_optional_value(
    arguments: tuple[str, ...], asked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(commands, "run", lambda options: seen.append(options) or 0)
    with pytest.raises(SystemExit) as ended:
        main(["run", *arguments])
    assert not ended.value.code
    assert [o.mlflow for o in seen] == [asked]
    assert seen[0].models == ("rmt" if "--models" in arguments else "")


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return int(ended.value.code or 0), err


@needs_mlflow
@pytest.mark.parametrize(
    ("uri", "said"),
    [
        (NOBODY, f"MLflow at {NOBODY} cannot be used: nobody answers there."),
        ("mlruns", "'mlruns' is no place for MLflow: give http://HOST:PORT"),
        ("file:///somewhere/mlruns", "is no place for MLflow"),
    ],
)
def test_run_finds_out_before_it_begins(
    uri: str, said: str, world: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MEMORY_BENCH_CACHE", str(world.cache))
    given = ("--models", "truncation", "--tasks", "pg19", "--out", str(tmp_path / "out"), "--mlflow", uri)
    code, err = call(capsys, "run", *world.arguments(), *given)
    assert code == 2
    assert said in err
    assert not (tmp_path / "out").exists()


def test_without_the_extra_is_a_sentence(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, err = call(capsys, "sync", "mlflow", str(store.folder))
    assert (code, len(err.splitlines())) == (2, 1)
    assert 'pip install "memory-bench[mlflow]"' in err
    with pytest.raises(UserError, match="not installed"):
        reach("")


@needs_mlflow
def test_mistakes_and_failures_of_sync(store: Store, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert call(capsys, "sync", "mflow", str(store.folder)) == (
        2,
        "Error: Unknown view 'mflow'. Did you mean mlflow?\n",
    )
    assert call(capsys, "sync", "mlflow", str(tmp_path))[0] == 2
    code, err = call(capsys, "sync", "mlflow", str(store.folder), "--uri", NOBODY)
    assert (code, len(err.splitlines())) == (1, 1)
    assert "nobody answers there" in err


@pytest.mark.parametrize(
    "problem", [NotSynced("MLflow went away."), UserError("It has moved.")], ids=["failed", "mistake"]
)
def test_results_stand_where_mlflow_fails(
    problem: Exception, store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise problem

    monkeypatch.setattr(mlflow_sync, "sync", fail)
    assert mlflow_sync.after_run(store.folder, "http://me:secret@host:1", quiet=True) == 1
    err = capsys.readouterr().err
    assert f"repeat with `memory-bench sync mlflow {store.folder} --uri " in err
    assert "secret" not in err


def test_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for uri in ("", "http://h:1", "https://h", "sqlite:////a/b.db", "postgresql+psycopg2://u:p@h/d"):
        check(uri)
    assert shown("postgresql://u:p@h/d") == "postgresql://u:…@h/d"
    assert shown("http://h:5000/x") == "http://h:5000/x"


# A server


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5)
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of `mlflow server` on a free port."""
    home = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    places = ["--backend-store-uri", f"sqlite:///{home}/server.db", "--artifacts-destination", str(home / "files")]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "mlflow", "server", *options, *places]
    with (home / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=home, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 300  # alone it takes 20 seconds
        while not _answers(f"{address}/health"):
            assert process.poll() is None, (home / "log").read_text()
            assert time.monotonic() < until, (home / "log").read_text()
            time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


@pytest.mark.slow
@needs_mlflow
def test_a_server(server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = fill(tmp_path / "smoke-0a1b2c")
    assert call(capsys, "sync", "mlflow", str(store.folder), "--uri", server) == (0, "")
    cells = runs_of(server)
    assert len(cells) == 6
    assert not (store.folder / "mlflow.db").exists()
    said = sync(store, server)
    assert (said.unchanged, said.serve) == (6, "")
    assert {n: r.info.run_id for n, r in runs_of(server).items()} == {n: r.info.run_id for n, r in cells.items()}
    assert said.pages["Compare pg19"].startswith(f"{server}/#/compare-runs?runs=[%22")
    store.remove(make_cell("longmem", "pubmedqa").key)  # perhaps another machine's: it stays
    assert sync(store, server).removed == 0
    assert len(runs_of(server)) == 6
    parent = runs_of(server, "run")["smoke-0a1b2c"].info.run_id
    assert {run.data.tags["mlflow.parentRunId"] for run in runs_of(server).values()} == {parent}


def test_damaged_results_are_said_and_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, built = fill(tmp_path / "run"), []

    class Built:
        def write(self, folder: Path) -> None:
            built.append(folder)

    monkeypatch.setattr("memory_bench.report.build.build", lambda *_, **__: Built())
    monkeypatch.setattr("memory_bench.running.grid.make_task", lambda choice: choice)
    pages = ["leaderboard.md", "leaderboard.csv"]
    vouch(store.folder / "leaderboard.sha256", PAGES, {name: store.folder / name for name in pages})
    mlflow_sync._report(store, ())
    assert not built
    flip(store.folder / "leaderboard.csv")
    mlflow_sync._report(store, ())
    assert len(built) == 1
    flip(store.folder / "leaderboard.csv")
    samples = store.cell_folder(store.records()[0].key) / "samples.parquet"
    before = samples.stat()
    flip(samples)
    os.utime(samples, ns=(before.st_atime_ns, before.st_mtime_ns))
    later = Store(store.folder)
    mlflow_sync._report(later, ())
    assert len(built) == 2
    assert len(later.records()) == len(list(later.cells.iterdir())) - 1
    assert "samples.parquet is not used" in later.warnings[0]
