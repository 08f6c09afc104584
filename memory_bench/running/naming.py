"""Names as a user may give them, made whole: a file that has one model, or one task, needs no class named behind it."""

from dataclasses import replace

from memory_bench import plugins
from memory_bench.running.grid import Request


def completed(request: Request) -> Request:
    """The request with ``file.py`` as ``file.py:Class``, for models and tasks, in ``--set`` and ``--limit`` too.

    Raises:
        UserError: a file has several models or tasks, none, or cannot be imported.
    """
    tasks = {name: plugins.complete("tasks", name) for name in request.tasks}
    return replace(
        request,
        models=tuple(_model(text) for text in request.models),
        tasks=tuple(tasks.values()),
        limits={tasks.get(name, name): limit for name, limit in request.limits.items()},
        settings={tasks.get(owner, owner): changes for owner, changes in request.settings.items()},
    )


def _model(text: str) -> str:
    """A model's name, made whole, with its options as they are."""
    name, bracket, options = text.partition("[")
    return f"{plugins.complete('models', name)}{bracket}{options}"
