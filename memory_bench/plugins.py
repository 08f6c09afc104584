"""Finds models, tasks and replays: entry points of installed packages, and scratch files named outright.

Nothing registers itself, and no plug-in silently takes another's name: what a second package calls by a name that is
taken is ``name@package``. What is not ours is known by its sources too (`identity`).

An entry point's value is ``module:Class``; listing reads the class's docstring and constant attributes from the source
file without importing it (importing a model means importing torch: seconds), so a broken third-party package costs one
line of a list and nothing else.
"""

import ast
import importlib.util
import math
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from importlib.machinery import SourceFileLoader
from importlib.metadata import EntryPoint, entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from memory_bench.errors import UserError, unknown
from memory_bench.files.content import digest_of
from memory_bench.files.plain import odd, oversized, shortened, toml_table
from memory_bench.sources import Sources, of_file, of_module

DISTRIBUTION = "memory-bench"
NEEDED = {
    "models": ("Config", "fit", "families", "ablations", "open", "step", "flops"),
    "tasks": ("Config", "headline", "needs", "episodes", "plan", "corpus", "metrics"),
}
"""What a class must have, by kind of plug-in."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What a list shows of a plug-in.

    Attributes:
        name: as used on the command line.
        text: first sentence of the class's docstring.
        constants: class attributes that are literals (``families``, ``version``, ``source`` …).
        origin: distribution that installed it.
        broken: why it cannot be read; empty if it can.
    """

    name: str
    text: str
    constants: Mapping[str, Any]
    origin: str
    broken: str = ""


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
    if ".py:" in name:
        return _checked(_from_file(*name.rsplit(":", 1)), kind, name)
    family, _, member = name.partition(":")
    if family in (families := installed(f"{kind}.families")):
        return _loaded(families[family], kind, family).named(member)
    known = installed(kind)
    if name not in known:
        singular = kind.removesuffix("s")
        raise unknown(singular, name, known, f"`memory-bench list {kind}` shows all." if kind != "parity" else "")
    return _checked(_loaded(known[name], kind, name), kind, name)


def _checked(found: Any, kind: str, name: str) -> Any:
    """What a name stands for, if it is a class that has what is asked of its kind."""
    needed = NEEDED.get(kind, ())
    lacking = [n for n in needed if not hasattr(found, n) or n in getattr(found, "__abstractmethods__", ())]
    if needed and (not isinstance(found, type) or lacking):
        lacks = f"it has no {', '.join(lacking)}" if isinstance(found, type) else "it is no class"
        raise UserError(f"{name} is no {kind.removesuffix('s')}: {lacks}.")
    return found


def _loaded(entry: EntryPoint, kind: str, name: str) -> Any:
    """What an entry point names, from its sources as they are now."""
    try:
        sources = _sources(entry)
        sources.forget_changed()
        found = entry.load()
        sources.mark()
    except Exception as error:  # a plug-in may fail in any way; it must not take the others down
        origin = entry.dist.name if entry.dist else "unknown"
        raise UserError(
            f"The {kind.removesuffix('s')} '{name}' of package {origin} cannot be loaded: {error}"
        ) from error
    return found


def _from_file(path: str, attribute: str) -> Any:
    file = Path(path)
    if not file.is_file():
        raise UserError(f"There is no file {path} to load '{attribute}' from.")
    sources = of_file(file)
    # Of path and content, with what is imported from beside it: an edited file is another module.
    name = f"memory_bench_file_{digest_of([str(file.resolve()), sources.revision])[:16]}"
    module = sys.modules.get(name)
    if module is None:
        sources.forget_changed()
        module = _import_file(file, name)
        sources.mark()
    if not hasattr(module, attribute):
        raise unknown(f"name in {path}", attribute, [n for n in vars(module) if not n.startswith("_")])
    return getattr(module, attribute)


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
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"{file} cannot be imported: {type(error).__name__}: {error}") from error
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


def summarise(entry: EntryPoint, name: str = "") -> Summary:
    """What can be known of a plug-in without importing it; `name` as of `installed`, or the entry point's own."""
    name = name or entry.name
    origin = entry.dist.name if entry.dist else ""
    try:
        tree = _source(entry.module)
        node = _classes(tree).get(entry.attr)
        if node is None:
            return Summary(name, "", {}, origin, f"{entry.module} has no class {entry.attr}")
        constants = _all_constants(entry.module, entry.attr)
    except (ImportError, OSError, SyntaxError, ValueError) as error:
        return Summary(name, "", {}, origin, str(error))
    text = ast.get_docstring(node) or ""
    if not text or text.startswith("See the module"):
        text = ast.get_docstring(tree) or ""
    return Summary(name, text.split("\n\n")[0].replace("\n", " "), constants, origin)


@lru_cache
def _source(module: str) -> ast.Module:
    """The syntax tree of a module that is not imported (the packages it is in are)."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(f"module {module} is not installed")
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _classes(tree: ast.Module) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _all_constants(module: str, name: str) -> dict[str, Any]:
    """Constants of a class and of its bases, as far as those are in the same package or in this one."""
    tree = _source(module)
    node = _classes(tree).get(name)
    if node is None:
        return {}
    imported = {
        (alias.asname or alias.name): (_resolve(line, module), alias.name)
        for line in tree.body
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
    }
    found: dict[str, Any] = {}
    for base in reversed(node.bases):
        plain = base.value if isinstance(base, ast.Subscript) else base
        if isinstance(plain, ast.Name):
            where, real = imported.get(plain.id, (module, plain.id))
            if where.split(".")[0] in (module.split(".")[0], "memory_bench"):
                found |= _all_constants(where, real)
    return found | _constants(node)


def _resolve(line: ast.ImportFrom, module: str) -> str:
    """The absolute name of the module that an import names."""
    name = "." * line.level + (line.module or "")
    return importlib.util.resolve_name(name, module.rpartition(".")[0]) if line.level else name


def _constants(node: ast.ClassDef) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for line in node.body:
        target = (
            line.targets[0]
            if isinstance(line, ast.Assign)
            else line.target
            if isinstance(line, ast.AnnAssign)
            else None
        )
        value = getattr(line, "value", None)
        if isinstance(target, ast.Name) and value is not None:
            try:
                found[target.id] = ast.literal_eval(value)
            except ValueError:
                continue
    return found


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
        if fault := oversized(value) if isinstance(value, float) else odd(value):
            raise UserError(f"{owner}.{name}: the value {fault}.")
    try:
        checked = TypeAdapter(type(config)).validate_python({**asdict(config), **changes})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or next(iter(changes), "")
        given = first["input"]
        said = f"give a list, such as [{shortened(str(given))}]" if first["type"] == "tuple_type" else first["msg"]
        raise UserError(f"{owner}.{where}: {said} (got {shortened(repr(given))}).") from error
    for name in changes:
        if isinstance(value := getattr(checked, name), float) and not math.isfinite(value):
            raise UserError(f"{owner}.{name}: give a finite number (got {value}).")
    return checked
