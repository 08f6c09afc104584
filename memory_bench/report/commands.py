"""The commands that make a run, or one row of it, again: from ``run.json`` and the cells."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from memory_bench.report.board import Board
from memory_bench.report.rows import Row

PROGRAM = ("memory-bench", "run")


def run_command(run: Mapping[str, Any], boards: Sequence[Board]) -> str:
    """The command of a run; empty where its folder does not say what was asked.

    Args:
        run: ``run.json``.
        boards: of the run, for their budgets.
    """
    request = _request(run)
    if not request:
        return ""
    budgets = dict.fromkeys(board.budget.name for board in boards)
    limits = ",".join(f"{task}={n}" if task else str(n) for task, n in request.get("limits", {}).items())
    return _command(
        request["models"], request["tasks"], request["backbone"], ",".join(budgets), request["seeds"], limits,
        [*_settings(request.get("settings", {})), *_rest(request["controls"], run)],
    )  # fmt: skip


def row_command(run: Mapping[str, Any], board: Board, row: Row) -> str:
    """The command that makes the cells of one row, and of the controls that come with its model.

    Args:
        run: ``run.json``; empty: options that were given with --set are not known, and only the cell has them.
        board: of the row.
        row: of the board.
    """
    cell = row.records[0].cell
    request = _request(run)
    label = cell.label or cell.training.model.name
    # An ablation that runs as a control is asked for by its model: `hmt (recall off)` comes with `hmt`.
    asked = next((model for model in request.get("models", ()) if label.startswith(f"{model} (")), label)
    owners = (asked.partition("[")[0], board.task, "backbone")
    mine = {owner: options for owner, options in request.get("settings", {}).items() if owner in owners}
    return _command(
        [asked], [board.task], request.get("backbone", board.backbone), board.budget.name, sorted(set(row.seeds)),
        "" if cell.limit is None else str(cell.limit), [*_settings(mine), *_rest(cell.controls, run)],
    )  # fmt: skip


def _request(run: Mapping[str, Any]) -> Mapping[str, Any]:
    """What was asked of a run; empty where ``run.json``, which anybody may have written, does not say it whole."""
    grid = run.get("grid")
    request = grid.get("request") if isinstance(grid, Mapping) else None
    if not isinstance(request, Mapping):
        return {}
    lists = {"models": str, "tasks": str, "seeds": int}
    whole = (
        all(isinstance(request.get(n), list) and all(isinstance(x, k) for x in request[n]) for n, k in lists.items())
        and isinstance(request.get("backbone"), str)
        and isinstance(request.get("controls"), bool)
        and isinstance(request.get("limits", {}), Mapping)
        and isinstance(request.get("settings", {}), Mapping)
        and all(isinstance(options, Mapping) for options in request.get("settings", {}).values())
    )
    return request if whole else {}


def _command(
    models: Sequence[str], tasks: Sequence[str], backbone: str, budget: str, seeds: Sequence[int], limit: str,
    more: Sequence[str],
) -> str:  # fmt: skip
    named = ",".join(map(str, seeds)) + ("," if len(seeds) == 1 else "")  # one number alone would count seeds
    words = [*PROGRAM, "--models", ",".join(models), "--tasks", ",".join(tasks), "--backbone", backbone,
             "--budget", budget, "--seeds", named]  # fmt: skip
    words += ["--limit", limit] if limit else []
    return shlex.join([*words, *more])


def _settings(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    pairs = [(f"{owner}.{name}", value) for owner, options in settings.items() for name, value in options.items()]
    return [word for name, value in pairs for word in ("--set", f"{name}={_value(value)}")]


def _value(value: Any) -> str:
    """As an option's value is written in a command, so that it is read as the same: TOML, or plain text."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(_quoted(item) for item in value)}]"
    return str(value)


def _quoted(item: Any) -> str:
    escaped = str(item).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"' if isinstance(item, str) else _value(item)


def _rest(controls: bool, run: Mapping[str, Any]) -> list[str]:
    """Whether controls ran, and whether data came from a folder of the user's (`DIR` stands for it)."""
    grid = run.get("grid")
    data = grid.get("data") if isinstance(grid, Mapping) else None
    sources = data.values() if isinstance(data, Mapping) else ()
    real = any(isinstance(source, Mapping) and source.get("origin") == "folder" for source in sources)
    return [*([] if controls else ["--no-controls"]), *(["--data", "DIR", "--no-stand-ins"] if real else [])]
