"""The store: a folder of files, one folder per cell, in which a record's presence means that the cell is done.

::

    run.json                     the grid as asked; package versions
    cells/<key>/record.json      one result        samples.parquet   one row per scored event        log.txt
    checkpoints/<training key>/  trained memory, shared by all tasks of that training

Every file is written to a temporary name in its own folder and renamed, samples before the record; no file is appended
to by two processes. An interrupted run therefore leaves cells that are done and cells that are not, nothing between.
"""

import errno
import io
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from memory_bench.errors import UserError
from memory_bench.record import SCHEMA, Record, versions

if TYPE_CHECKING:
    import pandas as pd

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "writing there is not permitted",
    errno.EPERM: "writing there is not permitted",
    errno.EROFS: "it is on a read-only file system",
    errno.ENOTDIR: "part of the path is a file",
    errno.EEXIST: "a file of that name is in the way",
    errno.EISDIR: "a folder of that name is in the way",
    errno.ENAMETOOLONG: "the path is too long",
}


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write at `path` into a sentence.

    Raises:
        UserError: full disk, no permission, read-only file system, or a file where a folder should be.
    """
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0)
        if reason is None:
            raise
        raise UserError(f"Cannot write to {path}: {reason}. Choose another folder with --out.") from error


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part; makes its folder.

    Raises:
        UserError: as of `explained`.
    """
    data = content.encode() if isinstance(content, str) else content
    with explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, written atomically; NaN is an error."""
    write_atomically(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


class Store:
    """The results of a run in a folder.

    Attributes:
        folder: of the run.
        warnings: sentences about files that could not be used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.warnings: list[str] = []

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

    def checkpoint_folder(self, training_key: str) -> Path:
        """The folder of a training's checkpoint, which may not exist yet."""
        return self.folder / "checkpoints" / training_key

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
            value = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            self._warn(f"run.json cannot be read ({error.__class__.__name__}).")
            return {}
        return value if isinstance(value, dict) else {}

    def write_record(self, record: Record, samples: "pd.DataFrame | None") -> None:
        """File a result. The samples are in place before the record is, and an older record is gone before they are.

        Raises:
            UserError: as of `explained`.
        """
        folder = self.cell_folder(record.key)
        with explained(self.folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "record.json").unlink(missing_ok=True)
            if samples is None:
                (folder / "samples.parquet").unlink(missing_ok=True)
        if samples is not None:
            # Through memory: the parquet writer's own errors do not tell a full disk from a bug.
            buffer = io.BytesIO()
            samples.to_parquet(buffer, index=False)
            write_atomically(folder / "samples.parquet", buffer.getvalue())
        write_json(folder / "record.json", record.to_json())

    def record(self, key: str) -> Record | None:
        """The result of a cell; None where there is none, or (with a warning) where it is broken."""
        path = self.cell_folder(key) / "record.json"
        try:
            record = Record.from_json(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, AttributeError) as error:
            self._warn(f"cells/{key}/record.json is not used and the cell counts as not done: {error}.")
            return None
        if record.key != key:
            self._warn(f"cells/{key}/record.json is not used: it belongs to cell {record.key}.")
            return None
        return record

    def records(self) -> list[Record]:
        """All results, in the order of their keys."""
        keys = sorted(p.name for p in self.cells.iterdir() if p.is_dir()) if self.cells.is_dir() else []
        return [record for key in keys if (record := self.record(key)) is not None]

    def samples(self, key: str) -> "pd.DataFrame | None":
        """A cell's scored events; None where there are none, or (with a warning) where the file is broken."""
        import pandas as pd

        path = self.cell_folder(key) / "samples.parquet"
        if not path.is_file():
            return None
        try:
            samples = pd.read_parquet(path)
        except Exception as error:  # pyarrow raises many types for broken files
            self._warn(f"cells/{key}/samples.parquet cannot be read ({error.__class__.__name__}).")
            return None
        if "choice_nll" in samples:
            lists = [None if v is None else [float(x) for x in v] for v in samples["choice_nll"]]
            samples["choice_nll"] = pd.Series(lists, index=samples.index, dtype=object)
        return samples

    def remove(self, key: str) -> None:
        """Forget a cell (``--force``); its log goes too."""
        with explained(self.folder):
            if self.cell_folder(key).exists():
                shutil.rmtree(self.cell_folder(key))

    def _warn(self, sentence: str) -> None:
        if sentence not in self.warnings:
            self.warnings.append(sentence)


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
