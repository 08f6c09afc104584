"""Which task computes the metrics of a folder's records again: one that is installed, or that this command asked for.

A folder of results is data. A name in it never has a file imported (``x.py:Task``, a task file of lm-eval), and what is
not installed, or does not take the options in the record, costs its own board the recomputed numbers: the record's
are shown.
"""

import re
from collections.abc import Collection, Iterable, Mapping

from memory_bench import plugins
from memory_bench.cell import Choice, digest
from memory_bench.errors import UserError
from memory_bench.report.rows import Scorer
from memory_bench.store import Store

FILES = (".py", ".yaml", ".yml")
"""Endings of what is looked for in a folder, not among what is installed."""


def scorer_key(task: Choice) -> str:
    """Under what `scorers` finds a cell's task: its name and its options, as some metrics depend on them."""
    return f"{task.name} {digest(task.config)}"


def scorer_of(tasks: Mapping[str, Scorer], task: Choice) -> Scorer | None:
    """The scorer of a cell's task among `tasks`, by `scorer_key` or else by the task's name."""
    return tasks.get(scorer_key(task), tasks.get(task.name))


def scorers(stores: Iterable[Store], asked: Collection[Choice] = ()) -> dict[str, Scorer]:
    """The tasks of all records by `scorer_key`; for those that are missing, their store is warned.

    Args:
        stores: of the records.
        asked: tasks that the user has named in this command, which may be files.
    """
    found: dict[str, Scorer] = {}
    for store in stores:
        for task in {scorer_key(r.cell.task): r.cell.task for r in store.records()}.values():
            try:
                found[scorer_key(task)] = _scorer(task, trusted=task in asked)
            except UserError as problem:
                store.warn(
                    f"{task.name} is shown with the records' own numbers, and nothing of it is compared: {problem}"
                )
    return found


def is_installed(kind: str, name: str) -> bool:
    """Whether a name stands for an installed plug-in alone, so that no file of anybody's choice is looked for."""
    family, colon, member = name.partition(":")
    if not colon:
        return name in plugins.installed(kind)
    plain = re.fullmatch(r"[\w.+-]+", member) is not None and not member.endswith(FILES)
    return plain and family in plugins.installed(f"{kind}.families")


def _scorer(choice: Choice, *, trusted: bool) -> Scorer:
    """The task of a record.

    Raises:
        UserError: it is not installed, or fails with these options.
    """
    if not trusted and not is_installed("tasks", choice.name):
        raise UserError("no such task is installed, and a record does not have a file imported.")
    options = {k: v for k, v in choice.config.items() if k != "data"}
    try:
        cls = plugins.load("tasks", choice.name)
        task: Scorer = cls(plugins.configure(choice.name, cls.Config(), options))
        if not isinstance(task.headline, str):
            raise UserError(f"{choice.name} has no headline.")
    except UserError:
        raise
    except Exception as error:  # another package's fault, or options of another version
        raise UserError(f"{choice.name} fails ({type(error).__name__}: {error}).") from error
    return task
