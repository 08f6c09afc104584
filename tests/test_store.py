"""The store: what is written comes back, and an interruption at any point leaves done or not done."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import pytest
from damage import KINDS, mutate, resealed

from memory_bench.budget import Usage
from memory_bench.episode import Estimate
from memory_bench.errors import UserError
from memory_bench.files.artefacts import write_atomically
from memory_bench.gate.command import check
from memory_bench.gate.lines import lines
from memory_bench.mlflow.view import cell_view, run_view
from memory_bench.record import Record, checkout, provenance
from memory_bench.report.board import collect, grouped
from memory_bench.samples import to_parquet
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


@pytest.mark.parametrize(("failing", "done"), [(".samples-", False), ("record.json", False), ("samples.parquet", True)])
def test_interrupted_write_is_done_or_not_done(
    store: Store, monkeypatch: pytest.MonkeyPatch, failing: str, done: bool
) -> None:
    record, samples = result()
    real = os.replace

    def stop(source: Any, target: Any) -> None:
        if Path(target).name.startswith(failing):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        store.write_record(record, samples)
    monkeypatch.undo()
    assert (store.record(record.key) is not None) == (store.samples(record.key) is not None) == done
    assert not list(store.cell_folder(record.key).glob(".*.tmp"))
    store.write_record(record, samples)
    assert store.record(record.key) is not None
    assert {p.name for p in store.cell_folder(record.key).iterdir()} == {"record.json", "samples.parquet"}


def test_rewriting_never_pairs_an_old_record_with_new_samples(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    record, samples = result()
    store.write_record(record, samples)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.write_record(record, samples)
    assert store.record(record.key) == record, "the old result stays until the new one is whole"
    assert store.samples(record.key) is not None


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


def test_a_record_may_lack_what_was_not_measured_and_nothing_else(store: Store) -> None:
    record, _ = result()
    record.usage.weight_bytes, record.usage.eval_joules, record.usage.train_flops = 12, 0.5, math.nan
    again = Record.from_json(json.loads(json.dumps(record.to_json()))).usage
    assert (again.weight_bytes, again.eval_joules, again.activation_bytes) == (12, 0.5, None)
    assert math.isnan(again.train_flops)
    older = record.to_json()
    for name in [name for name, value in asdict(Usage()).items() if value is None]:
        del older["usage"][name]
    assert Record.from_json(older).usage.weight_bytes is None
    older["usage"]["weight_bytes"] = "12"
    with pytest.raises(ValueError, match=r"usage\.weight_bytes"):
        Record.from_json(older)


@pytest.mark.parametrize(
    "wrong", [{"kind": "cubic"}, {"points": [[1]]}, {"points": [["1", 2]]}, {"bytes_per_token": "1"}, {"kind": None}]
)
def test_growth_that_is_none_is_refused(wrong: dict[str, Any]) -> None:
    record, _ = result()
    growth = {"kind": "linear", "bytes_per_token": 1.5, "bytes_per_doubling": None, "points": [[1, 2], [2, 3]]}
    data = json.loads(json.dumps(record.to_json()))
    data["provenance"]["state_growth"] = growth
    assert Record.from_json(data).provenance["state_growth"] == growth
    data["provenance"]["state_growth"] = {**growth, **wrong}
    with pytest.raises(ValueError, match="state_growth"):
        Record.from_json(data)


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
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EBADF, "broken")))
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
    assert found["processor"]  # another one may give other numbers
    assert {"python", "torch", "transformers", "pandas", "memory-bench"} <= set(found["versions"])


def test_records_open_without_torch() -> None:
    modules = "memory_bench.record, memory_bench.store, memory_bench.statistics.stats"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# Damage


def other(seed: int) -> pd.DataFrame:
    """The samples of another cell: as many rows, of the same columns."""
    return question_samples(seed, {16: 0.9}, questions=6)


def swap(store: Store, record: Record) -> None:
    """Another cell's samples."""
    foreign, samples = make_cell("rmt", "pubmedqa", record.cell.training.seed), other(record.cell.training.seed)
    store.write_record(make_record(foreign, samples), samples)
    shutil.copy(store.cell_folder(foreign.key) / "samples.parquet", store.cell_folder(record.key))
    store.remove(foreign.key)


@pytest.mark.parametrize("spoil", [*KINDS, swap], ids=lambda spoil: spoil.__name__)
def test_a_record_whose_samples_do_not_fit_counts_as_not_done(store: Store, spoil: Callable[..., None]) -> None:
    record, samples = result()
    store.write_record(record, samples)
    if spoil is swap:
        swap(store, record)
    else:
        spoil(store.cell_folder(record.key) / "samples.parquet")
    assert store.record(record.key) is None
    assert store.records() == []
    assert store.samples(record.key) is None
    assert len(store.warnings) == 1
    assert f"cells/{record.key}/samples.parquet is not used" in store.warnings[0]


def test_any_flipped_bit_is_noticed(store: Store) -> None:
    record, samples = result()
    store.write_record(record, samples)
    path, rng = store.cell_folder(record.key) / "samples.parquet", Random(0)
    raw = path.read_bytes()
    for place in rng.sample(range(len(raw)), 100):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1 << rng.randrange(8)]) + raw[place + 1 :])
        assert store.record(record.key) is None
    path.write_bytes(raw)
    assert store.record(record.key) == record


def test_samples_beside_a_record_that_has_none_are_not_its(store: Store) -> None:
    record, samples = result()
    failed = replace(record, status="failed", metrics=(), learned=None)
    store.write_record(failed, None)
    (store.cell_folder(record.key) / "samples.parquet").write_bytes(to_parquet(samples, record.key))
    assert store.record(record.key) == failed
    assert store.samples(record.key) is None


def test_a_record_is_mutated_in_a_hundred_ways(store: Store, tmp_path: Path) -> None:
    """Noticed by its checksum; and by its types, where a program with a fault had summed them."""
    record, samples = result()
    store.write_record(record, samples)
    path, rng = store.cell_folder(record.key) / "record.json", Random(5)
    whole = json.loads(path.read_text())
    for _ in range(80):
        changed = mutate(whole, rng)
        path.write_text(json.dumps(changed))
        found = Store(store.folder).record(record.key)
        assert found is None or changed == whole or "sha256" not in changed
        path.write_text(resealed(changed))
        broken = Store(store.folder)
        for read in broken.records():
            cell_view(read, broken, "run")
            lines([[read]], {})
            read.cell.title, read.look_ahead, read.to_json()
        assert broken.records() or broken.warnings or not changed
    path.write_text(json.dumps(whole))
    assert store.record(record.key) == record


def test_the_run_file_is_mutated_in_a_hundred_ways(store: Store) -> None:
    record, samples = result()
    store.write_record(record, samples)
    request = {"models": ["hmt"], "tasks": ["pubmedqa"], "budget": {"name": "cpu-minutes"}}
    roles, skipped = {record.key: ["control", "mine"]}, [{"model": "longmem", "task": "pubmedqa", "reason": "no"}]
    store.write_run({"request": request, "cells": [record.key], "roles": roles, "skipped": skipped,
                     "data": {"pubmedqa": {"label": "x", "revision": "1", "origin": "hub"}}})  # fmt: skip
    path, rng = store.folder / "run.json", Random(6)
    whole = json.loads(path.read_text())
    assert grouped(store)[0][0][0].cell.role == "control"
    for _ in range(50):
        changed = mutate(whole, rng)
        path.write_text(json.dumps(changed))
        broken = Store(store.folder)
        assert broken.run() == {} or changed == whole or "sha256" not in changed
        path.write_text(resealed(changed))
        broken = Store(store.folder)
        view = cell_view(broken.records()[0], broken, "run")
        run_view(broken, "run", [view], None)
        collect(broken, {})
        assert broken.run() or broken.warnings
    path.write_text("[]")
    with pytest.raises(UserError, match=r"Cannot tell which cells are missing.*run.json is not used"):
        check(store.folder, against=None, write=tmp_file(store))


def tmp_file(store: Store) -> Path:
    return store.folder / "reference.jsonl"


def as_an_older_version(store: Store, key: str) -> None:
    """Takes away what tells files from others."""
    path = store.cell_folder(key) / "record.json"
    data = json.loads(path.read_text())
    del data["sha256"], data["samples"]
    path.write_text(json.dumps(data))
    samples = store.cell_folder(key) / "samples.parquet"
    pd.read_parquet(samples).to_parquet(samples, index=False)


def test_results_of_an_older_version_are_read_and_said(store: Store) -> None:
    records = []
    for seed in (0, 1):
        record, samples = result(seed)
        scored = int(samples.loc[samples.control == "", "tokens"].sum())
        records.append(replace(record, usage=replace(record.usage, scored_tokens=scored)))
        store.write_record(records[-1], samples)
        as_an_older_version(store, record.key)
    assert sorted(store.records(), key=lambda r: r.cell.training.seed) == records
    assert store.warnings == [
        "2 of 2 results have no checksums, as an older version wrote them; they are used as they are."
    ]
    found = store.samples(records[0].key)
    assert found is not None
    pd.testing.assert_frame_equal(found, result()[1])
    one, two = (store.cell_folder(r.key) / "samples.parquet" for r in records)
    shutil.copy(two, one)
    assert [r.cell.training.seed for r in store.records()] == [1]
    assert any("another cell" in warning for warning in store.warnings)
    one.write_bytes(one.read_bytes()[:1000])
    assert store.record(records[0].key) is None
    one.unlink()
    assert store.record(records[0].key) == records[0], "somebody needed the space"


KILLED = """
import os, sys
from pathlib import Path
import pandas as pd
import memory_bench.store as module
from memory_bench.store import Store
from synthetic import make_cell, make_record, question_samples

folder = Path(sys.argv[1])
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")

def hook(event, arguments):
    global left
    changes = event in CHANGES or event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if changes and str(folder) in str(arguments[0]):
        left -= 1
        if left < 0:
            os._exit(9)

cell = make_cell("hmt", "pubmedqa", 0)
old, new = (question_samples(0, {16: share}, questions=6) for share in (0.2, 0.9))
both = [(make_record(cell, samples), samples) for samples in (old, new)]
contents = {id(s): module.to_parquet(s, cell.key) for _, s in both}
module.to_parquet = lambda samples, key: contents[id(samples)]  # pyarrow's threads do not live on in a fork
for n in range(100):
    pid = os.fork()
    if pid == 0:
        folder = folder / str(n)
        store = Store.open_or_create(folder)
        store.write_record(*both[0])
        left = n
        sys.addaudithook(hook)
        store.write_record(*both[1])
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
        print(n)
        break
"""


def test_a_kill_before_any_change_leaves_the_old_result_or_the_new_one(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=True, env=environment
    )
    assert int(done.stdout) >= 5, "each change was tried"
    cell, states = make_cell("hmt", "pubmedqa", 0), []
    for n in range(int(done.stdout) + 1):
        store = Store.open(tmp_path / str(n))
        record, samples = store.record(cell.key), store.samples(cell.key)
        states.append(None if record is None else record.metrics[0].value)
        if record is not None:
            assert samples is not None
            assert make_record(cell, samples).metrics == record.metrics
        assert not store.warnings
        store.write_record(*result())
        assert store.record(cell.key) is not None
    assert states[0] is not None
    assert states[-1] not in (None, states[0])
    assert set(states) == {states[0], states[-1]}, "the old result or the new one, at every moment"
