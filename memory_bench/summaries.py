"""What a plug-in says of itself, read from its source without importing it: its class's docstring and constants."""

import ast
import importlib.util
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from memory_bench.axes import Axes


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

    @property
    def axes(self) -> dict[str, Any] | None:
        """Of `memory_bench.axes.Axes`, with its defaults; None where the class does not say."""
        declared = self.constants.get("axes")
        try:
            return None if declared is None else asdict(Axes(**declared))
        except (TypeError, ValueError):
            return None  # `memory_bench.testing.check_model` says what is wrong


def summarise(entry: EntryPoint, name: str = "") -> Summary:
    """What can be known of a plug-in without importing it; `name` as of `installed`, or the entry point's own."""
    name = name or entry.name
    origin = entry.dist.name if entry.dist else ""
    try:
        with redirect_stdout(sys.stderr):
            tree = _source(entry.module)
        node = _classes(tree).get(entry.attr)
        if node is None:
            return Summary(name, "", {}, origin, f"{entry.module} has no class {entry.attr}")
        constants = _all_constants(entry.module, entry.attr)
    except (Exception, SystemExit) as error:  # packages on the way are imported, or an entry point is misspelt
        return Summary(name, "", {}, origin, str(error) or type(error).__name__)
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


def _named(call: ast.Call) -> dict[str, Any]:
    """The arguments of a call that has only named literals, as ``axes = Axes(unit="token kv")`` has.

    Raises:
        ValueError: it has others.
    """
    if call.args or any(word.arg is None for word in call.keywords):
        raise ValueError("not only named arguments")
    return {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}


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
                found[target.id] = _named(value) if isinstance(value, ast.Call) else ast.literal_eval(value)
            except ValueError:
                continue
    return found
