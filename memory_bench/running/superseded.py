"""Results whose inputs have changed since are set aside, and taken back when the inputs are as they were.

A run's folder answers for what it was last asked: rows of one table never stand on two contents of a backbone, and
whoever reads all records finds one for each question. Nothing is thrown away.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from memory_bench.cell import Cell
from memory_bench.store import Store

FOLDER = "superseded"


def set_aside(store: Store, cells: Sequence[Cell]) -> int:
    """Move results that `cells` ask for with another content out of ``cells/``, and earlier ones of `cells` back.

    Returns:
        How many were moved out.
    """
    keys, asked = {cell.key for cell in cells}, {cell.asked for cell in cells}
    aside = store.folder / FOLDER
    old = [r.key for r in store.records() if r.key not in keys and r.cell.asked in asked]
    for key in old:
        _move(store.cell_folder(key), aside / key)
    for key in keys:
        if (aside / key / "record.json").is_file() and not (store.cell_folder(key) / "record.json").is_file():
            _move(aside / key, store.cell_folder(key))
    return len(old)


def _move(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)
