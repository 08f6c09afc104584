"""`memory-bench lm-eval …`: lm-eval's own command, with our models registered and our tasks in its index."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from memory_bench.lm_eval import NAME, include_path, require
from memory_bench.lm_eval.finding import defines_task


def register() -> None:
    """Make ``--model memory-bench`` known to lm-eval, unless its entry point did."""
    require()
    from lm_eval.api.registry import register_model

    from memory_bench.lm_eval.model import MemoryLM

    with suppress(ValueError):  # "already registered": a release that reads entry points has it
        register_model(NAME)(MemoryLM)


def command(arguments: Sequence[str]) -> int:
    """Run lm-eval's command with `arguments`; it ends the process itself where they are wrong (exit code 2).

    Raises:
        UserError: lm-eval is not installed, or our model cannot do what is asked.
    """
    require()
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging()
    before = sys.argv
    sys.argv = ["lm-eval", *arguments]  # lm-eval reads its arguments from there
    try:
        harness: Any = HarnessCLI()
        parsed = harness.parse_args()
        if hasattr(parsed, "include_path"):
            given = parsed.include_path
            parsed.include_path = [str(include_path()), *([given] if given else [])]
        if getattr(parsed, "model", None) == NAME or getattr(parsed, "config", None):
            register()
        with _small_index(parsed):
            harness.execute(parsed)
    finally:
        sys.argv = before
    return 0


@contextmanager
def _small_index(parsed: Any) -> Iterator[None]:
    """Inside, lm-eval leaves its own 14,000 tasks out of its index where only ours and files are asked for.

    Reading them all takes half a minute.
    """
    from lm_eval import tasks

    asked = [name for text in getattr(parsed, "tasks", None) or () for name in str(text).split(",")]
    usual = tasks.TaskManager
    if parsed.command == "run" and asked and all(map(_stands_alone, asked)):
        tasks.TaskManager = partial(usual, include_defaults=False)
    try:
        yield
    finally:
        tasks.TaskManager = usual


def _stands_alone(name: str) -> bool:
    path = Path(name) if name.endswith((".yaml", ".yml")) else include_path() / f"{name}.yaml"
    return path.is_file() and defines_task(path)
