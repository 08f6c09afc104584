"""Mistakes in the data, found before anything is trained: every task gives its episodes once."""

from collections.abc import Iterable

from memory_bench.cell import Cell
from memory_bench.data.library import Library
from memory_bench.errors import UserError
from memory_bench.running.grid import make_task


def check_episodes(cells: Iterable[Cell], library: Library, *, fetch: bool = True) -> None:
    """Go through the episodes that cells will be evaluated on, once for each task and limit.

    Args:
        cells: to run.
        library: with their data.
        fetch: also where the data would have to be fetched from the hub.

    Raises:
        UserError: the data are not enough for what is asked (no book is long enough, too few questions), or the task
            fails on them.
    """
    seen: list[tuple[object, int | None]] = []
    for cell in cells:
        if (cell.task, cell.limit) in seen:
            continue
        seen.append((cell.task, cell.limit))
        task, name = make_task(cell.task), cell.task.name
        needs = [need for need in (task.needs, *task.beside) if need]
        if not fetch and any(library.source(need).origin == "hub" for need in needs):
            continue
        try:
            found = sum(1 for _ in task.episodes(library, cell.limit))
        except UserError:
            raise
        except Exception as error:  # another package's task; every cell would fail like this
            raise UserError(
                f"{name} gives no episodes from {cell.task.config.get('data', 'its data')}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not found:
            raise UserError(
                f"{name} gives no episodes from {cell.task.config.get('data', 'its data')}: there is too little of it "
                "for what is asked."
            )
