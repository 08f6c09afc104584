"""Finds lm-eval's task files by name without building its index, which takes half a minute."""

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memory_bench.errors import DataError, UserError
from memory_bench.lm_eval import include_path, require
from memory_bench.sources import Sources, of_file, of_module

_NAME = re.compile(rb"^(task|group):[ \t]*['\"]?([^\s'\"#]+)", flags=re.M)
LOCAL = ("json", "csv", "parquet", "text", "arrow", "xml", "pandas")  # formats of `datasets` that read files
PATIENCE = 5.0  # seconds until the hub counts as out of reach


def task_file(name: str) -> Path:
    """The YAML file of a task: a path, or the file that names it among ours and lm-eval's own.

    Raises:
        UserError: there is none, or the name is that of a group.
    """
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UserError(f"There is no task file {name}.")
        return Path(name)
    files = [path for root in (include_path(), require() / "tasks") for path in _files(root)]
    files.sort(key=lambda path: path.stem != name)  # most files are called like their task
    known: set[str] = set()
    for path in files:
        for kind, found in _named(path):
            if found == name and kind == "task":
                return path
            if found == name:
                raise UserError(f"'{name}' is a group of lm-eval tasks: name one of its tasks ({path.parent.name}/…).")
            known |= {found} if kind == "task" else set()
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    guess = f" Nearest: {', '.join(near)}." if near else ""
    hint = "`memory-bench lm-eval ls tasks` shows all; a YAML file can be given too."
    raise UserError(f"Unknown lm-eval task '{name}'.{guess} {hint}")


def _files(root: Path) -> list[Path]:
    """All YAML files below a folder, in a fixed order."""
    found = [os.path.join(at, name) for at, _, names in os.walk(root) for name in names if name.endswith(".yaml")]
    return [Path(path) for path in sorted(found)]


def defines_task(path: Path) -> bool:
    """The file names one task and no group."""
    return [kind for kind, _ in _named(path)] == ["task"]


def _named(path: Path) -> list[tuple[str, str]]:
    """(kind, name) of what a file defines at its top level."""
    return [(kind.decode(), name.decode(errors="replace")) for kind, name in _NAME.findall(path.read_bytes())]


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a task file, with what it includes and the functions it names.

    Raises:
        UserError: it is no YAML file of a single task in fields, or names what cannot be imported.
    """
    require()
    from lm_eval.tasks._yaml_loader import load_yaml

    sources = task_sources(path)
    sources.forget_changed()
    try:
        fields: dict[str, Any] = load_yaml(path)
        sources.mark()
    except Exception as error:  # of YAML, of files it includes, of modules it names
        raise UserError(f"The lm-eval task file {path} cannot be read: {_first_line(error)}") from error
    if not isinstance(fields.get("task"), str):
        raise UserError(f"{path} is no single lm-eval task: its field 'task' must be a name.")
    if "class" in fields:
        raise UserError(
            f"{path} is a program of its own (field 'class'): only tasks written as fields can be asked here."
        )
    return fields


def task_sources(path: Path) -> Sources:
    """A task file, the files it includes, and those of its functions with what they import."""
    start = path.resolve()
    found: dict[str, Path] = {}
    left = [start]
    while left:
        file = left.pop()
        name = os.path.relpath(file, start.parent)
        if name in found or not file.is_file():
            continue  # what is missing, lm-eval says
        found[name] = file
        included, functions = _references(file)
        left += [(file.parent / other).resolve() for other in included]
        for module in {function.rpartition(".")[0] for function in functions}:
            own = (file.parent / f"{module.replace('.', '/')}.py").resolve()
            if own.is_file():
                found |= {os.path.relpath(own.parent / n, start.parent): f for n, f in of_file(own).files.items()}
            elif module:
                found |= of_module(module, plugin=False).files
    return Sources(found)


def _references(file: Path) -> tuple[list[str], list[str]]:
    """The files that a YAML file includes, and the functions it names (and what looks like one)."""
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        fields = load_yaml(file, resolve_func=False, recursive=False)
    except Exception:  # reading it in earnest says so
        return [], []
    included = fields.get("include") or []
    # Unresolved, a function is the folder's path and its name.
    start = f"{file.parent}{os.sep}"
    functions = [text.removeprefix(start) for text in _texts(fields) if text.startswith(start)]
    return [str(one) for one in (included if isinstance(included, list) else [included])], functions


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested fields."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
    elif isinstance(value, str):
        yield value


def check_reach(fields: dict[str, Any], *, hub: bool) -> None:
    """Find out in seconds whether data of the hub can be had; lm-eval itself would retry for half a minute.

    Raises:
        DataError: the hub is out of reach.
    """
    path = fields.get("dataset_path")
    if not path or path in LOCAL or Path(str(path)).exists() or callable(fields.get("custom_dataset")):
        return
    if not hub:
        return  # `datasets` looks into its own cache, and answers at once
    try:
        from huggingface_hub import HfApi

        HfApi().dataset_info(str(path), timeout=PATIENCE)
    except Exception as error:
        raise DataError(f"{no_data(fields, error)} (HF_HUB_OFFLINE=1: what datasets has in its cache.)") from error


def no_data(fields: dict[str, Any], error: Exception) -> str:
    """The sentence for data that cannot be had."""
    where = fields.get("dataset_path") or "its custom_dataset"
    return (
        f"The data of lm-eval task {fields['task']} ({where}) cannot be had: {_first_line(error)}. Connect to the hub, "
        "or give a YAML file with local data_files."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
