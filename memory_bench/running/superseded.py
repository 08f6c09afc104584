"""Results whose inputs have changed since are set aside, and taken back when the inputs are as they were.

A run's folder answers for what it was last asked: rows of one table never stand on two contents of a backbone, of
training data or of a plug-in, whichever of them the last command asked for. Nothing is thrown away.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from memory_bench.cell import CHOICES, Cell, digest
from memory_bench.store import Store

FOLDER = "superseded"


def set_aside(store: Store, cells: Sequence[Cell]) -> int:
    """Move results of what `cells` use with another content out of ``cells/``, and earlier ones of `cells` back.

    Returns:
        How many were moved out.
    """
    keys, now = {cell.key for cell in cells}, {part: content for cell in cells for part, content in _parts(cell)}
    aside = store.folder / FOLDER
    others = sorted(folder.name for folder in store.cells.iterdir() if folder.is_dir() and folder.name not in keys)
    records = [record for key in others if (record := store.record(key)) is not None]
    old = [r.key for r in records if any(now.get(part, content) != content for part, content in _parts(r.cell))]
    for key in old:
        _move(store.cell_folder(key), aside / key)
    for key in keys:
        if (aside / key / "record.json").is_file() and not (store.cell_folder(key) / "record.json").is_file():
            _move(aside / key, store.cell_folder(key))
    return len(old)


def _parts(cell: Cell) -> Iterator[tuple[str, tuple[object, ...]]]:
    """What a cell uses, by its name and options, and of which content each is."""
    for kind in ("task", *CHOICES):
        choice = cell.task if kind == "task" else getattr(cell.training, kind)
        content = (choice.version, choice.revision, choice.package, choice.code)
        yield digest([kind, choice.name, choice.config]), content


def _move(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)
