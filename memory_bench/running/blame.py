"""What a failed cell says of an error: what it was, the line of the plug-in, and the log."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from memory_bench import plugins
from memory_bench.cell import Cell
from memory_bench.errors import UserError
from memory_bench.frames import Home, home_of_file, home_of_module, place, summary
from memory_bench.store import Store

STANDARD_ERROR = 2


def told(error: Exception, cell: Cell, store: Store) -> str:
    """The detail of a cell that failed with `error`: ``ValueError: … (step in bad.py line 23; see cells/KEY/log.txt)``.

    The traceback goes to the cell's log, which standard error is in a process of its own. No file is named that is not
    there, and the plug-in's by its place in its folder or package.
    """
    homes = tuple(_homes(cell))
    said = [place(error, homes)]
    with suppress(OSError, UserError):  # a full disk: then there is no log to name
        log = store.log_path(cell.key)
        text = "".join(traceback.format_exception(error))
        if _is_standard_error(log):
            sys.stderr.write(text)
            sys.stderr.flush()
        else:
            log.write_text(text, encoding="utf-8", errors="backslashreplace")
        said.append(f"see {log.relative_to(store.folder).as_posix()}")
    message = summary(error)
    for folder in (str(home.folder) for home in homes if home.folder is not None):
        message = message.replace(f"{folder}{os.sep}", "")
    where = "; ".join(filter(None, said))
    return f"{message} ({where})" if where else message


def _homes(cell: Cell) -> Iterator[Home]:
    """Where the code of a cell's model and task is."""
    for kind, name in (("models", cell.training.model.name), ("tasks", cell.task.name)):
        if ".py:" in name:
            yield home_of_file(Path(name.rpartition(":")[0]))
            continue
        family = name.partition(":")[0]
        entry = plugins.installed(kind).get(name) or plugins.installed(f"{kind}.families").get(family)
        if entry is not None:
            yield home_of_module(entry.module)


def _is_standard_error(log: Path) -> bool:
    """Whether this process's standard error is the cell's log already."""
    try:
        return os.path.samestat(os.fstat(STANDARD_ERROR), log.stat())
    except OSError:
        return False
