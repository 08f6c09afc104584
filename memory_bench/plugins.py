"""Finds models, tasks and replays: entry points of installed packages, and scratch files named outright.

Nothing registers itself, and no plug-in silently takes another's name: what a second package calls by a name that is
taken is ``name@package``. What is not ours is known by its sources too (`identity`).

An entry point's value is ``module:Class``; listing reads the class's docstring and constant attributes from the source
file without importing it (importing a model means importing torch: seconds). Other packages' plug-ins are imported to
be listed, since nothing else tells whether they can be: a broken one costs its own line and nothing else.
"""

import difflib
import json
import math
import sys
import tomllib
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, fields
from importlib.machinery import SourceFileLoader
from importlib.metadata import EntryPoint, entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple, TypeVar

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from memory_bench.errors import UserError, unknown
from memory_bench.files.content import digest_of
from memory_bench.files.plain import odd, oversized, shortened, toml_table
from memory_bench.frames import home_of_file, home_of_module, last_foreign, place, summary
from memory_bench.kinds import NEEDED, fault
from memory_bench.sources import Sources, of_file, of_module

T = TypeVar("T")
DISTRIBUTION = "memory-bench"


class Identity(NamedTuple):
    """What the code of a plug-in is; both empty for those of this package, which have a version.

    Attributes:
        package: distribution that installed it, with its version.
        code: 16 hexadecimal digits of its sources (`memory_bench.sources`).
    """

    package: str = ""
    code: str = ""


def installed(kind: str) -> dict[str, EntryPoint]:
    """Entry points of ``memory_bench.<kind>`` (``models``, ``tasks``, ``parity``) by name.

    Where several packages use a name, it stands for ours; the others', or all of them without one of ours, are called
    ``name@package``.
    """
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=f"memory_bench.{kind}"):
        found.setdefault(entry.name, []).append(entry)
    named: dict[str, EntryPoint] = {}
    for name, entries in found.items():
        for entry in entries:
            plain = len(entries) == 1 or _ours(entry)
            named[name if plain else f"{name}@{entry.dist.name if entry.dist else entry.module}"] = entry
    return dict(sorted(named.items()))


def own(kind: str) -> set[str]:
    """Names of the plug-ins that come with this package."""
    return {name for name, entry in installed(kind).items() if _ours(entry)}


def _ours(entry: EntryPoint) -> bool:
    """It is one of this package's own plug-ins."""
    return entry.dist is not None and entry.dist.name.lower().replace("_", "-") == DISTRIBUTION


def replayed_model(name: str) -> str:
    """The model that a reference case calls `name`: itself, or the one whose replay has that name too."""
    known, models = installed("parity"), installed("models")
    if name in models or name not in known:
        return name
    return next((m for m in models if m in known and known[m].value == known[name].value), name)


def load(kind: str, name: str) -> Any:
    """The object that `name` stands for: an entry point, ``path/to/file.py:Class``, or one of a family: ``lm-eval:x``.

    A family is a class whose ``named`` gives the class of the name behind the colon; its entry point is in the group
    ``memory_bench.<kind>.families``.

    Raises:
        UserError: no such name or file, it cannot be imported, or it is something else than `kind` says.
    """
    if ".py:" in name and not name.endswith(":"):
        path, _, attribute = name.rpartition(":")
        return _from_file(path, attribute, kind)
    family, _, member = name.partition(":")
    if family in (families := installed(f"{kind}.families")):
        return _loaded(families[family], kind, family).named(member)
    if (whole := complete(kind, name)) != name:
        raise UserError(f"{name} names no class: write {whole}.")
    known, singular = installed(kind), kind.removesuffix("s")
    if name not in known:
        hint = f"`memory-bench list {kind}` shows all." if kind != "parity" else ""
        if Path(f"{name}.py").is_file():
            hint += f" There is a file of that name: --{kind} {name}.py."
        raise unknown(singular, name, known, hint.strip())
    found = _loaded(known[name], kind, name)
    if why := fault(found, kind):
        entry = known[name]
        raise UserError(f"{name} is no {singular}: {why}. It is {entry.value} of package {_package(entry)}.")
    return found


def complete(kind: str, name: str) -> str:
    """A name with its class: ``file.py`` is ``file.py:Class`` where the file has one model (or task).

    Raises:
        UserError: the file has several, or none, or cannot be imported.
    """
    path = name.removesuffix(":")
    if not path.endswith(".py") or path.partition(":")[0] in installed(f"{kind}.families"):
        return name
    found, others = _classes_in(_module(path), kind)
    if len(found) == 1:
        return f"{path}:{found[0]}"
    if found:
        raise UserError(f"{path} has several {kind}: choose {', '.join(f'{path}:{one}' for one in found)}.")
    why = "; ".join(f"{cls} is none: {reason}" for cls, reason in others.items()) or "it defines no class"
    raise UserError(f"{path} has no {kind.removesuffix('s')}: {why}.")


def _classes_in(module: ModuleType, kind: str) -> tuple[list[str], dict[str, str]]:
    """The models (or tasks) that a file defines itself, and why its other classes are none."""
    own = {n: c for n, c in vars(module).items() if isinstance(c, type) and c.__module__ == module.__name__}
    faults = {name: fault(cls, kind) for name, cls in own.items()}
    return [name for name, why in faults.items() if not why], {name: why for name, why in faults.items() if why}


def broken(kind: str, name: str, read: str) -> str:
    """Why an installed plug-in cannot be used, else empty: of ours what was `read`, others are imported to be told."""
    if _ours(installed(kind)[name]):
        return read
    try:
        load(kind, name)
    except UserError as error:
        return str(error)
    return ""


def asked(owner: str, method: Callable[..., T], *given: Any, **named: Any) -> T:
    """What a plug-in's own method gives while a run is planned.

    Raises:
        UserError: the method's, or what else it raised, with the line: a mistake of the plug-in is found now.
    """
    try:
        return method(*given, **named)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        where = last_foreign(error) or place(error, [home_of_module(getattr(method, "__module__", None) or "")])
        name = getattr(method, "__name__", "its class")
        text = f"{owner}: {name} raised {summary(error)}"
        raise UserError(f"{text}{f' ({where})' if where else ''}; nothing was run.") from error


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else "unknown"


def _loaded(entry: EntryPoint, kind: str, name: str) -> Any:
    """What an entry point names, from its sources as they are now."""
    try:
        sources = _sources(entry)
        sources.forget_changed()
        with redirect_stdout(sys.stderr):  # standard output is for results
            found = entry.load()
        sources.mark()
    except (Exception, SystemExit) as error:  # a plug-in may fail in any way; it must not take the others down
        module, _, attribute = entry.value.partition(":")
        where = place(error, [home_of_module(module)])
        near = difflib.get_close_matches(attribute, vars(sys.modules.get(module, object)), n=1)
        where += f"; did you mean {near[0]}?" if near and attribute != near[0] else ""
        raise UserError(
            f"The {kind.removesuffix('s')} '{name}' of package {_package(entry)} cannot be loaded: {summary(error)} "
            f"({'; '.join(filter(None, [entry.value, where]))})."
        ) from error
    return found


def _from_file(path: str, attribute: str, kind: str) -> Any:
    """The class of a file that is a model (or a task)."""
    module, singular = _module(path, attribute), kind.removesuffix("s")
    found, _ = _classes_in(module, kind) if kind in NEEDED else ([], {})
    known = found or [n for n in vars(module) if not n.startswith("_")]
    if not hasattr(module, attribute):
        raise unknown(f"name in {path}", attribute, known)
    if why := fault(getattr(module, attribute), kind):
        others = f" The file has {', '.join(f'{path}:{one}' for one in found)}." if found else ""
        raise UserError(f"{path}:{attribute} is no {singular}: {why}.{others}")
    return getattr(module, attribute)


def _module(path: str, attribute: str = "") -> ModuleType:
    """The module of a plug-in that is a file, from its sources as they are now."""
    file = Path(path)
    if not file.is_file():
        near = difflib.get_close_matches(file.name, [f.name for f in file.parent.glob("*.py")], n=1, cutoff=0.4)
        guess = f" Did you mean {file.with_name(near[0])}?" if near else ""
        raise UserError(f"There is no file {path} to load {f'{attribute!r}' if attribute else 'from'}"
                        f"{' from' if attribute else ''}.{guess}")  # fmt: skip
    sources = of_file(file)
    # Of path and content, with what is imported from beside it: an edited file is another module.
    name = f"memory_bench_file_{digest_of([str(file.resolve()), sources.revision])[:16]}"
    module = sys.modules.get(name)
    if module is None:
        sources.forget_changed()
        module = _import_file(file, name)
        sources.mark()
    return module


class _FromSource(SourceFileLoader):
    """Never takes bytecode, which is told from an edited source by whole seconds and size alone."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def _import_file(file: Path, name: str) -> ModuleType:
    spec = spec_from_file_location(name, file, loader=_FromSource(name, str(file)))
    if spec is None or spec.loader is None:
        raise UserError(f"{file} is no Python file that can be imported.")
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it is being made
    try:
        with redirect_stdout(sys.stderr):  # standard output is for results
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        where = place(error, [home_of_file(file)])
        raise UserError(f"{file} cannot be imported: {summary(error)}{f' ({where})' if where else ''}") from error
    return module


def identity(kind: str, name: str) -> Identity:
    """What the code of a plug-in that can be loaded is.

    Raises:
        UserError: as of `load`.
    """
    load(kind, name)  # where its imports are found may be its own doing
    if ".py:" in name:
        return Identity(code=of_file(Path(name.rsplit(":", 1)[0])).revision)
    family, _, _ = name.partition(":")
    entry = installed(f"{kind}.families").get(family) or installed(kind)[name]
    if _ours(entry):
        return Identity()
    package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else ""
    return Identity(package, _sources(entry).revision)


def _sources(entry: EntryPoint) -> Sources:
    """Of an entry point; of ours none are looked at."""
    return Sources() if _ours(entry) else of_module(entry.module)


def plain(config: Any) -> dict[str, Any]:
    """The options in `config` as plain data, for a cell.

    A field with ``left_out`` in its metadata is no part of it while it has its default: it came later, and keys of
    cells stay what they were.
    """
    late = {f.name: f.default for f in fields(config) if f.metadata.get("left_out")}
    return {name: value for name, value in asdict(config).items() if name not in late or value != late[name]}


def parse_value(text: str) -> Any:
    """A command-line value as TOML reads it (numbers, true/false, lists, quoted text); anything else is text."""
    try:
        return toml_table(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    except ValueError as error:
        raise UserError(f"The value {shortened(text)} cannot be used: {error}.") from error


def configure(owner: str, config: Any, changes: Mapping[str, Any]) -> Any:
    """`config` (a frozen dataclass) with `changes`, checked against its types.

    Raises:
        UserError: an option that does not exist, a value of the wrong type, or a number that is not finite.
    """
    names = {f.name for f in fields(config)}
    for name, value in changes.items():
        if name not in names:
            raise unknown(f"option of {owner}", name, names)
        if wrong := oversized(value) if isinstance(value, float) else odd(value):
            raise UserError(f"{owner}.{name}: the value {wrong}.")
    try:
        checked = TypeAdapter(type(config)).validate_python({**asdict(config), **changes})
        json.dumps(asdict(checked))  # as records hold it
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or next(iter(changes), "")
        given = first["input"]
        said = f"give a list, such as [{shortened(str(given))}]" if first["type"] == "tuple_type" else first["msg"]
        raise UserError(f"{owner}.{where}: {said} (got {shortened(repr(given))}).") from error
    except (PydanticUserError, TypeError) as error:
        first_line = str(error).split("\n")[0]
        raise UserError(
            f"{owner}: its options must be plain data (numbers, text, flags, lists): {first_line}"
        ) from error
    for name in changes:
        if isinstance(value := getattr(checked, name), float) and not math.isfinite(value):
            raise UserError(f"{owner}.{name}: give a finite number (got {value}).")
    return checked
