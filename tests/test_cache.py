"""A cache heals itself, whatever became of a file in it; one that is complete is never written to."""

import errno
import hashlib
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import filelock
import pytest
from damage import KINDS, in_the_way, lose

from memory_bench.data import Library
from memory_bench.data.packages import fetch_package
from memory_bench.errors import MachineError
from memory_bench.files import artefacts
from memory_bench.files.artefacts import held, kept, read_json
from memory_bench.files.content import Hashes
from memory_bench.running import calibration
from memory_bench.zoo.compared import check_agreement
from memory_bench.zoo.named import Backbones

CONTENT = b"a package" * 100
PINNED = hashlib.sha256(CONTENT).hexdigest()
RO = (errno.EROFS, errno.EACCES, errno.ENOSPC)


def pip(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """Stands in for pip: the file appears in the folder that is asked for."""
    (Path(command[command.index("--dest") + 1]) / "x-1.tar.gz").write_bytes(CONTENT)
    return subprocess.CompletedProcess(list(command), 0, "", "")


def broken(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.CompletedProcess(list(command), 1, "", "ERROR: no network")


def fetched(cache: Path, notices: list[str], runner: Any = pip) -> Path:
    return fetch_package("x", "1", PINNED, "sdist", cache, runner, notices.append)


@pytest.mark.parametrize("spoil", KINDS)
def test_a_damaged_package_is_fetched_again(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    notices: list[str] = []
    path = fetched(tmp_path, notices)
    spoil(path)
    assert fetched(tmp_path, notices).read_bytes() == CONTENT
    assert len(notices) == (0 if spoil is lose else 1)
    assert fetched(tmp_path, notices, broken) == path


def test_a_package_that_cannot_be_read_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memory_bench.data import packages

    notices: list[str] = []
    path = fetched(tmp_path, notices)
    real = packages.sha256

    def unreadable(file: Path) -> str:
        if file == path and not notices:
            raise OSError(errno.EIO, "Input/output error")
        return real(file)

    monkeypatch.setattr(packages, "sha256", unreadable)
    assert fetched(tmp_path, notices).read_bytes() == CONTENT
    assert notices == ["x-1.tar.gz in the cache cannot be read (Input/output error): it is fetched again."]


def test_what_is_in_the_way_of_a_packages_folder_or_lock_is_taken_away(tmp_path: Path) -> None:
    (tmp_path / "packages" / "x-1.lock").mkdir(parents=True)
    (tmp_path / "packages" / "x-1").write_text("")
    assert fetched(tmp_path, []).read_bytes() == CONTENT


@pytest.mark.parametrize("number", RO, ids=errno.errorcode.get)
def test_a_complete_cache_needs_no_write(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetched(tmp_path, [])
    thing = kept(tmp_path / "things" / "it", "it", lambda part: part.write_text("it") and None, lambda sentence: None)
    for lock in tmp_path.rglob("*.lock"):
        lock.unlink()

    def refuse(self: Any, *_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), self.lock_file)

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    assert fetched(tmp_path, [], broken) == path
    assert kept(thing, "it", lambda part: pytest.fail("made"), pytest.fail) == thing
    with held(tmp_path / "other.lock") as writable:
        assert not writable
    thing.write_text("that")
    with pytest.raises(
        MachineError, match=r"^things/it in the cache is not what .* is read-only or full: name another"
    ):
        kept(thing, "it", lambda part: None, lambda sentence: None)


@pytest.mark.parametrize("spoil", KINDS)
def test_damaged_notes_of_hashes_are_written_again(
    spoil: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memory_bench.files import content

    monkeypatch.setattr(content, "settled", lambda status: True)
    file, hashes = tmp_path / "weights", Hashes(tmp_path / "hashes")
    file.write_bytes(CONTENT)
    assert hashes.of(file) == PINNED
    (note,) = (tmp_path / "hashes").iterdir()
    right = note.read_bytes()
    spoil(note)
    assert hashes.of(file) == PINNED
    assert [(p, p.read_bytes()) for p in (tmp_path / "hashes").iterdir()] == [(note, right)]


@pytest.mark.parametrize("spoil", KINDS)
def test_a_damaged_comparison_is_made_again_and_said(spoil: Callable[[Path], None], world: Any, tmp_path: Path) -> None:
    notices: list[str] = []
    backbones = Backbones(Library(world.data, tmp_path, hub=False), tmp_path, hub=False, notice=notices.append)
    name = str(world.backbone)
    check_agreement(backbones, name)
    (file,) = (tmp_path / "agreement").glob("*.json")
    right = read_json(file)
    spoil(file)
    check_agreement(backbones, name)
    assert read_json(file) == right
    assert len(notices) == (0 if spoil is lose else 1), notices
    check_agreement(backbones, name)
    assert len(notices) <= 1


@pytest.mark.parametrize("spoil", KINDS)
def test_a_damaged_calibration_is_said_and_written_again(
    spoil: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notices: list[str] = []
    known = calibration.Calibrations(tmp_path, "cpu", notice=notices.append)
    cell: Any = SimpleNamespace(key="a" * 16)
    known.keep(cell, {"seconds": 3.0})
    (file,) = known.folder.iterdir()
    spoil(file)
    assert known.planned(cell) is None
    assert len(notices) == (0 if spoil is lose else 1)
    known.keep(cell, {"seconds": 3.0})
    assert (known.planned(cell) or {})["seconds"] == 3.0


def test_calibrations_need_no_cache_that_can_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, value: Any) -> None:
        with artefacts.explained(path):
            raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(calibration, "write_json", refuse)
    calibration.Calibrations(tmp_path, "cpu").keep(SimpleNamespace(key="a" * 16), {"seconds": 3.0})  # type: ignore[arg-type]


def test_a_folder_in_the_way_of_a_lock_is_taken_away(tmp_path: Path) -> None:
    (tmp_path / "x.lock").write_text("")
    in_the_way(tmp_path / "x.lock")
    with held(tmp_path / "x.lock") as writable:
        assert writable


def test_the_machines_fault_in_any_command_is_a_sentence(invoke: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from memory_bench.command import listing

    def full(*_: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(listing, "rows", full)
    code, _, said = invoke("list", "models")
    assert code == 2
    assert said == (
        "Error: This machine is in the way: a file could not be written whole. The same command goes on "
        "when it is mended.\n"
    )
