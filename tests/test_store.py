"""The store: what is written comes back, and an interruption at any point leaves done or not done."""

import errno
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from memory_bench.episode import Estimate
from memory_bench.errors import UserError
from memory_bench.files.artefacts import write_atomically
from memory_bench.record import Record, checkout, provenance
from memory_bench.store import Store, link_latest
from synthetic import make_cell, make_record, question_samples


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open_or_create(tmp_path / "run")


def result(seed: int = 0) -> tuple[Record, pd.DataFrame]:
    samples = question_samples(seed, {16: 0.5}, questions=6)
    return make_record(make_cell("hmt", "pubmedqa", seed), samples), samples


def test_record_and_samples_come_back(store: Store) -> None:
    record, samples = result()
    store.write_record(record, samples)
    assert store.record(record.key) == record
    assert store.records() == [record]
    back = store.samples(record.key)
    assert back is not None
    pd.testing.assert_frame_equal(back, samples)
    assert isinstance(back.choice_nll[0], list)
    assert store.record(record.key) is not None
    assert [p.name for p in sorted(store.cell_folder(record.key).iterdir())] == ["record.json", "samples.parquet"]


def test_numbers_that_are_not_finite_are_null(store: Store) -> None:
    record, _ = result()
    odd = Estimate("accuracy", math.nan, None, None, 0)
    record = replace(record, metrics=(odd,), levels={"chance": np.float32(0.5)}, learned=None)  # type: ignore[dict-item]
    store.write_record(record, None)
    text = (store.cell_folder(record.key) / "record.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["metrics"][0]["value"] is None
    back = store.record(record.key)
    assert back is not None
    assert math.isnan(back.metrics[0].value)
    assert back.levels == {"chance": 0.5}


@pytest.mark.parametrize("failing", ["samples.parquet", "record.json"])
def test_interrupted_write_is_not_done(store: Store, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    record, samples = result()
    real = os.replace

    def stop(source: Any, target: Any) -> None:
        if Path(target).name == failing:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        store.write_record(record, samples)
    monkeypatch.undo()
    assert store.record(record.key) is None
    assert not list(store.cell_folder(record.key).glob(".*.tmp"))
    store.write_record(record, samples)
    assert store.record(record.key) is not None


def test_rewriting_never_pairs_an_old_record_with_new_samples(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    record, samples = result()
    store.write_record(record, samples)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.write_record(record, samples)
    assert store.record(record.key) is None


@pytest.mark.parametrize("damage", ["half", "empty", "list", "schema", "field", "foreign"])
def test_broken_record_counts_as_not_done_and_says_so(store: Store, damage: str) -> None:
    record, samples = result()
    store.write_record(record, samples)
    path = store.cell_folder(record.key) / "record.json"
    whole = path.read_text()
    data = json.loads(whole)
    if damage == "field":
        del data["usage"]
    broken = {
        "half": whole[: len(whole) // 2],
        "empty": "",
        "list": "[]",
        "schema": json.dumps({**data, "schema": 99}),
        "field": json.dumps(data),
        "foreign": json.dumps(result(seed=5)[0].to_json()),
    }[damage]
    path.write_text(broken)
    assert store.record(record.key) is None
    assert store.records() == []
    assert len(store.warnings) == 1
    assert record.key in store.warnings[0]


def test_edited_cell_is_noticed(store: Store) -> None:
    record, _ = result()
    data = record.to_json()
    data["cell"]["training"]["seed"] = 99
    with pytest.raises(ValueError, match="key"):
        Record.from_json(data)


def test_broken_samples_are_a_warning(store: Store) -> None:
    record, samples = result()
    store.write_record(record, samples)
    (store.cell_folder(record.key) / "samples.parquet").write_bytes(b"PAR1")
    assert store.samples(record.key) is None
    assert "samples.parquet" in store.warnings[0]
    store.write_record(record, None)
    assert not (store.cell_folder(record.key) / "samples.parquet").exists()


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "full"), (errno.EACCES, "permitted"), (errno.EROFS, "read-only"), (errno.ENOTDIR, "file")],
)
def test_refused_writes_are_one_sentence(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match=words):
        store.write_record(*result())


def test_other_errors_are_bugs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        write_atomically(tmp_path / "x", "y")
    assert list(tmp_path.iterdir()) == []


def test_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        Store.open_or_create(tmp_path / "file")
    with pytest.raises(UserError, match="file"):
        Store.open_or_create(tmp_path / "file" / "below")


@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write to read-only folders")
def test_read_only_folder_is_found_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    Store.open_or_create(folder)
    (folder / "cells").chmod(0o555)
    with pytest.raises(UserError, match="permitted"):
        Store.open_or_create(folder)


def test_open_wants_results(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no results"):
        Store.open(tmp_path)


def test_lock_excludes_another_process(store: Store) -> None:
    code = (
        "import sys; from pathlib import Path; from filelock import Timeout; from memory_bench.store import Store\n"
        "try:\n  Store(Path(sys.argv[1])).lock('k').acquire(timeout=0.1); print('got')\n"
        "except Timeout: print('held')"
    )

    def other() -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, str(store.folder)], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    with store.lock("k"):
        assert other() == "held"
    assert other() == "got"


def test_latest_link_moves(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for name in ("one", "two"):
        (runs / name).mkdir(parents=True)
        assert link_latest(runs, runs / name)
        assert (runs / "latest").resolve() == (runs / name).resolve()
    assert sorted(p.name for p in runs.iterdir()) == ["latest", "one", "two"]
    assert os.readlink(runs / "latest") == "two"  # the folder can be moved


def test_no_links_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    assert not link_latest(tmp_path, tmp_path / "run")
    (tmp_path / "latest").mkdir()
    monkeypatch.undo()
    assert not link_latest(tmp_path, tmp_path / "run")


def test_run_file(store: Store) -> None:
    store.write_run({"models": ["hmt"]})
    run = store.run()
    assert run["grid"] == {"models": ["hmt"]}
    assert run["schema"] == 1
    assert "torch" in run["versions"]


def test_provenance_names_no_place() -> None:
    found = provenance(device="cpu", threads=1, started="2026-01-01T00:00:00+00:00")
    text = json.dumps(found)
    assert str(Path(__file__).parents[1]) not in text
    assert os.uname().nodename not in text
    assert set(checkout()) == {"commit", "dirty"}
    assert {"python", "torch", "transformers", "pandas", "memory-bench"} <= set(found["versions"])


def test_records_open_without_torch() -> None:
    modules = "memory_bench.record, memory_bench.store, memory_bench.statistics.stats"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
