"""The store: a folder of files, one folder per cell, in which a record's presence means that the cell is done.

::

    run.json                     the grid as asked; package versions        .known.json  which cells were found done
    cells/<key>/record.json      one result        samples.parquet   one row per scored event        log.txt
    checkpoints/<training key>/  trained memory, shared by all tasks of that training
    unfinished/<training key>/   a training on its way, if it is kept (docs/long-trainings.md); gone when it has ended

Every file is written to a temporary name in its own folder and renamed, samples before the record; no file is appended
to by two processes. An interrupted run therefore leaves cells that are done and cells that are not, nothing between.
Checksums (`memory_bench.files.artefacts`) are checked whenever a file is read: a record that was altered, that has
lost its samples or has others' counts as not done.
"""

import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from memory_bench.cell import digest
from memory_bench.errors import UserError
from memory_bench.files.artefacts import (
    CHECKSUM,
    Damaged,
    Notice,
    explained,
    read_json,
    settled,
    sha256,
    write_atomically,
    write_json,
)
from memory_bench.files.remembered import Remembered, facts_of, identity
from memory_bench.files.shapes import RunShape, conform
from memory_bench.finite import unsound, unsound_scores
from memory_bench.record import SCHEMA, Record, versions
from memory_bench.samples import check_unsummed, read_parquet, to_parquet

if TYPE_CHECKING:
    import pandas as pd

SAMPLES = "samples.parquet"
TRAINING = "training.json"  # beside the weights of a trained memory
KNOWN = ".known.json"
SOUND = "finite"
"""The entry of a record that says whether all scores in the samples it vouches for are finite: none needs to look."""


class Store:
    """The results of a run in a folder.

    Attributes:
        folder: of the run.
        warnings: sentences about files that could not be used.

    Args:
        folder: of the run.
        notice: told of each warning at once.
    """

    def __init__(self, folder: Path, notice: Notice = lambda sentence: None) -> None:
        self.folder = folder
        self.warnings: list[str] = []
        self._notice = notice
        self._known: dict[str, _Read] = {}

    @classmethod
    def open_or_create(cls, folder: Path) -> "Store":
        """The store in `folder`, which is made where it does not exist.

        Raises:
            UserError: it cannot be made or written to.
        """
        store = cls(folder)
        with explained(folder):
            store.cells.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=store.cells):
                pass  # a read-only folder is found out now, not after an hour of training
        return store

    @classmethod
    def open(cls, folder: Path) -> "Store":
        """The store in an existing folder, for reading.

        Raises:
            UserError: no results there.
        """
        store = cls(folder)
        if not store.cells.is_dir():
            raise UserError(f"{folder} holds no results (no folder 'cells'); give the --out folder of a run.")
        return store

    @property
    def cells(self) -> Path:
        """The folder of all cells."""
        return self.folder / "cells"

    def cell_folder(self, key: str) -> Path:
        """The folder of one cell, which may not exist yet."""
        return self.cells / key

    def log_path(self, key: str) -> Path:
        """Where a cell's worker writes its log; the folder is made."""
        with explained(self.folder):
            self.cell_folder(key).mkdir(parents=True, exist_ok=True)
        return self.cell_folder(key) / "log.txt"

    def stamp(self, key: str) -> str:
        """What tells a cell's record file from any other that was or will be at its place; empty: there is none."""
        return _stamp(self.cell_folder(key) / "record.json")

    def checkpoint_stamp(self, training_key: str) -> str:
        """The same of a training's checkpoint."""
        return _stamp(self.checkpoint_folder(training_key))

    def checkpoint_folder(self, training_key: str) -> Path:
        """The folder of a training's checkpoint, which may not exist yet."""
        return self.folder / "checkpoints" / training_key

    def unfinished_folder(self, training_key: str) -> Path:
        """Where a training is kept on its way; a folder for each time, named by its optimiser steps."""
        return self.folder / "unfinished" / training_key

    def unfinished_stamp(self, training_key: str) -> str:
        """As `stamp`, of the newest."""
        folder = self.unfinished_folder(training_key)
        names = sorted(p.name for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []
        return _stamp(folder / names[-1]) if names else ""

    def lock(self, key: str) -> FileLock:
        """A lock between processes and machines that share the folder; `key` is a cell's or a training's."""
        folder = self.folder / ".locks"
        with explained(self.folder):
            folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{key}.lock")

    def write_run(self, grid: dict[str, Any]) -> None:
        """Write ``run.json``: the grid as asked, the schema, and package versions."""
        write_json(self.folder / "run.json", {"schema": SCHEMA, "grid": grid, "versions": versions()})

    def run(self) -> dict[str, Any]:
        """``run.json``; empty where it is missing or (with a warning) broken."""
        try:
            found = read_json(self.folder / "run.json")
            conform(RunShape, found)
            return found
        except FileNotFoundError:
            return {}
        except ValueError as error:
            self.warn(f"run.json is not used: {error}. The same `memory-bench run` writes it again.")
            return {}

    def write_record(self, record: Record, samples: "pd.DataFrame | None") -> None:
        """File a result. One that is there stays until this one is whole, and is replaced in one step.

        The record holds the checksum of the samples and of itself. New samples stand beside the old under a name with
        their checksum until the record that vouches for them is in place; a reader finds them there as well.

        Raises:
            UserError: as of `explained`.
        """
        folder = self.cell_folder(record.key)
        with explained(self.folder):
            folder.mkdir(parents=True, exist_ok=True)
        vouched, new = None, None
        if samples is not None:
            content = to_parquet(samples, record.key)
            sound = not unsound_scores(*_scores(io.BytesIO(content)))
            vouched = {"rows": len(samples), CHECKSUM: hashlib.sha256(content).hexdigest(), SOUND: sound}
            new = _waiting(folder, str(vouched[CHECKSUM]))
            write_atomically(new, content)
        write_json(folder / "record.json", {**record.to_json(), "samples": vouched})
        with explained(self.folder):
            if new is None:
                (folder / SAMPLES).unlink(missing_ok=True)
            else:
                os.replace(new, folder / SAMPLES)
            for left in folder.glob(".*.tmp"):  # of writers that were killed; the cell is ours now
                left.unlink(missing_ok=True)
            for left in folder.glob(_waiting(folder, "*").name):
                left.unlink(missing_ok=True)

    def statuses(self, keys: Iterable[str]) -> dict[str, str]:
        """The status of the `record` of each cell that has one; files that were looked at before are not read again."""
        known, found = Remembered(self.folder / KNOWN, _code()), {}
        for key in keys:
            files = self.cell_folder(key) / "record.json", self.cell_folder(key) / SAMPLES
            facts, still = facts_of(files)
            status = known.get(key, facts)
            if status is None and (record := self.record(key)) is not None:
                status = record.status
                whole = self._known[key].vouched is None or facts[1] is not None
                if still and whole and facts_of(files)[0] == facts:
                    known.put(key, facts, status)
            if status is not None:
                found[key] = status
        known.save()
        return found

    def record(self, key: str) -> Record | None:
        """The result of a cell; None where there is none, or (with a warning) where it or its samples are broken."""
        found = self._read(key)
        return None if found is None else self._sound(found)

    def _sound(self, read: "_Read") -> Record:
        """The record, failed where its numbers are not finite: earlier versions filed such results as ``ok``."""
        record, vouched = read.record, read.vouched
        if record.status not in ("ok", "over_budget"):
            return record
        fault = unsound(record.metrics)
        if not fault and vouched is not None and not (isinstance(vouched, dict) and vouched.get(SOUND) is True):
            fault = unsound_scores(*_scores(self._samples_path(record.key, vouched)))
        if not fault:
            return record
        detail = f"non-finite: {fault}, though it was filed as {record.status}; run it again with --retry failed"
        return replace(record, status="failed", detail=detail, metrics=(), learned=None)

    def records(self) -> list[Record]:
        """All results, in the order of their keys."""
        keys = sorted(p.name for p in self.cells.iterdir() if p.is_dir()) if self.cells.is_dir() else []
        found = [read for key in keys if (read := self._read(key)) is not None]
        if older := sum(not read.summed for read in found):
            self.warn(f"{older} of {len(found)} results have no checksums, as an older version wrote them; they are "
                      "used as they are.")  # fmt: skip
        return [self._sound(read) for read in found]

    def samples(self, key: str) -> "pd.DataFrame | None":
        """A cell's scored events; None where there are none, or (with a warning) where its files are broken."""
        found = self._read(key)
        if found is None or found.vouched is None:
            return None
        path = self._samples_path(key, found.vouched)
        if not path.is_file():
            return None
        try:
            return read_parquet(path, key)
        except Damaged as error:
            self.warn(f"cells/{key}/{SAMPLES} is not used: {error}.")
            return None

    def _read(self, key: str) -> "_Read | None":
        """A cell's record and what it vouches for, if it and the samples are those that were written together."""
        place = f"cells/{key}/record.json"
        try:
            read = self._parsed(self.folder / place)
            if read.record.key != key:
                raise Damaged(f"it belongs to cell {read.record.key}")
            place = f"cells/{key}/{SAMPLES}"
            self._check_samples(read)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self.warn(f"{place} is not used and the cell counts as not done: {error}.")
            return None
        return read

    def _parsed(self, path: Path) -> "_Read":
        """What a record's file holds; parsed once as long as the file stays the same."""
        status = path.stat()
        known = self._known.get(path.parent.name)
        if known is not None and settled(status) and known.status == identity(status):
            return known
        data = read_json(path)
        # {}: an older version wrote it
        read = _Read(Record.from_json(data), data.get("samples", {}), CHECKSUM in data, identity(status))
        self._known[path.parent.name] = read
        return read

    def _samples_path(self, key: str, vouched: Any) -> Path:
        """Where a record's samples are: at their place, or still on the way there."""
        folder = self.cell_folder(key)
        sum_ = vouched.get(CHECKSUM) if isinstance(vouched, dict) else None
        if isinstance(sum_, str) and sum_.isalnum() and (waiting := _waiting(folder, sum_)).is_file():
            return waiting
        return folder / SAMPLES

    def _check_samples(self, read: "_Read") -> None:
        record, vouched = read.record, read.vouched
        path = self._samples_path(record.key, vouched)
        if vouched is None:
            return
        if not isinstance(vouched, dict):
            raise Damaged("the record does not say what it must hold")
        if not path.is_file():
            if vouched:
                raise Damaged("it is missing")
        elif not vouched:
            check_unsummed(path, record)
        elif sha256(path) != vouched.get(CHECKSUM):
            raise Damaged("it is not what was written with the record (its checksum differs)")

    def remove(self, key: str) -> None:
        """Forget a cell; its log goes too."""
        with explained(self.folder):
            if self.cell_folder(key).exists():
                shutil.rmtree(self.cell_folder(key))

    def warn(self, sentence: str) -> None:
        """Add to the warnings what was not yet among them."""
        if sentence not in self.warnings:
            self.warnings.append(sentence)
            self._notice(sentence)


@dataclass(frozen=True, slots=True)
class _Read:
    """What a record's file holds: the record, what it says of its samples (None: it has none), and which file it was.

    Attributes:
        record: as it was filed.
        vouched: rows and checksum of the samples; empty: an older version wrote it.
        summed: the file has a checksum of itself.
        status: of the file when it was read.
    """

    record: Record
    vouched: Any
    summed: bool
    status: list[int]


@lru_cache(maxsize=1)
def _code() -> str:
    """Hash of the code that says what a sound record is."""
    here = Path(__file__).parent
    judges = [here / f"{name}.py" for name in ("store", "samples", "record", "cell", "budget", "recipe", "finite")]
    return digest([path.read_text(encoding="utf-8") for path in (*judges, *sorted((here / "files").glob("*.py")))])


def _scores(file: Path | io.BytesIO) -> tuple[list[float | None], list[float | None]]:
    """Every score in a file of samples and every choice's; of files that cannot be read `Store.samples` warns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if isinstance(file, Path) and not file.is_file():
        return [], []
    try:
        with pq.ParquetFile(file) as opened:  # threads cost more than they save here
            table = opened.read(columns=["nll", "choice_nll"], use_threads=False)
        nll, choices = (table.column(name).combine_chunks() for name in ("nll", "choice_nll"))
        lists = [] if pa.types.is_null(choices.type) else choices.flatten().to_pylist()
    except Exception:  # pyarrow raises many types for broken files
        return [], []
    return nll.to_pylist(), lists


def _waiting(folder: Path, checksum: str) -> Path:
    """Where samples are until their record is in place."""
    return folder / f".samples-{checksum}.parquet"


def _stamp(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return ""
    # Not the device: each machine numbers its own, and those that share the folder compare stamps.
    return f"{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"


def link_latest(runs_folder: Path, out: Path) -> bool:
    """Let ``runs_folder/latest`` point to `out`, in one step; False where the platform or file system has no links."""
    link = runs_folder / "latest"
    try:
        target = os.path.relpath(out.resolve(), runs_folder.resolve())
    except ValueError:  # another drive
        target = str(out.resolve())
    try:
        runs_folder.mkdir(parents=True, exist_ok=True)
        # A folder of its own makes the temporary name ours alone.
        with tempfile.TemporaryDirectory(dir=runs_folder, prefix=".latest.") as scratch:
            new = Path(scratch) / "link"
            new.symlink_to(target, target_is_directory=True)
            os.replace(new, link)
    except (OSError, NotImplementedError):
        return False
    return True
