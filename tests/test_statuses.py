"""Which cells are done is known at once when nothing has changed, and looked up anew when anything has."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import resealed, truncate

from memory_bench.store import KNOWN, Store
from synthetic import few_questions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two results of long ago, as far as the files' times say."""
    store = few_questions(tmp_path / "run")
    return store.folder


@pytest.fixture(autouse=True)
def at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of a moment ago counts as one of long ago."""
    for place in ("files.remembered", "store", "files.artefacts"):
        monkeypatch.setattr(f"memory_bench.{place}.settled", lambda status: True)


def keys(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cells").iterdir())


def counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, str], int]:
    """What a new process finds, and how many records it had to read for it."""
    read: list[str] = []
    original = Store.record
    with monkeypatch.context() as patch:
        patch.setattr(Store, "record", lambda self, key: read.append(key) or original(self, key))
        return Store(folder).statuses(keys(folder)), len(read)


def test_what_is_done_is_looked_up_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = dict.fromkeys(keys(folder), "ok")
    assert counted(folder, monkeypatch) == (done, 2)
    assert counted(folder, monkeypatch) == (done, 0)


def flip(path: Path) -> None:
    """One bit, with the times of before: that of the inode tells."""
    content, times = bytearray(path.read_bytes()), path.stat()
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("name", ["record.json", "samples.parquet"])
@pytest.mark.parametrize("spoil", [truncate, flip, Path.unlink])
def test_what_was_changed_is_not_done(
    folder: Path, name: str, spoil: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(folder).statuses(keys(folder))
    spoil(folder / "cells" / keys(folder)[0] / name)
    assert counted(folder, monkeypatch) == ({keys(folder)[1]: "ok"}, 1)


def test_another_status_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(folder).statuses(keys(folder))
    file = folder / "cells" / keys(folder)[0] / "record.json"
    file.write_text(resealed({**json.loads(file.read_text()), "status": "failed"}))
    found, read = counted(folder, monkeypatch)
    assert (found[keys(folder)[0]], read) == ("failed", 1)


def test_a_copy_is_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(folder).statuses(keys(folder))
    shutil.copytree(folder, folder.with_name("copy"))
    assert counted(folder.with_name("copy"), monkeypatch)[1] == 2


def test_other_code_looks_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(folder).statuses(keys(folder))
    monkeypatch.setattr("memory_bench.store._code", lambda: "another")
    assert counted(folder, monkeypatch)[1] == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"of": 1, "found": 3}', '{"found": {}}'])
def test_a_damaged_memory_is_none(folder: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(folder).statuses(keys(folder))
    (folder / KNOWN).write_text(content)
    assert counted(folder, monkeypatch) == (dict.fromkeys(keys(folder), "ok"), 2)


def test_odd_entries_are_not_believed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(folder).statuses(keys(folder))
    kept = json.loads((folder / KNOWN).read_text())
    kept["found"] = {key: [1] for key in kept["found"]}
    (folder / KNOWN).write_text(resealed(kept))
    assert counted(folder, monkeypatch)[1] == 2


def test_what_has_just_changed_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memory_bench.files.remembered.settled", lambda status: False)
    folder = few_questions(tmp_path / "run").folder
    assert counted(folder, monkeypatch)[1] == counted(folder, monkeypatch)[1] == 2
