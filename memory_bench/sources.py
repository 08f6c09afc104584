"""The source a plug-in consists of: its file and whatever that imports of its own package or from beside it.

Imports are read, not run, those inside functions too. Followed are files beside a plug-in that is a file, modules of
its own package, and modules that are in no ``site-packages`` (editable installations, ``PYTHONPATH``); what else is
installed is known by its version. Names that a program puts together while it runs are not seen.
"""

import ast
import hashlib
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from memory_bench.files.content import digest_of

MARK = "__memory_bench_sources__"  # attribute of a loaded module: contents of its plug-in's files at that time
INSTALLED = {"site-packages", "dist-packages"}
KNOWN = {"memory_bench", "torch", "transformers", "numpy", "pandas"}  # by version, wherever they are


@dataclass(frozen=True, slots=True)
class Sources:
    """Files of a plug-in, each under a name that does not depend on where they are.

    Attributes:
        files: module name, or path relative to the plug-in's own file, to file.
    """

    files: dict[str, Path] = field(default_factory=dict)

    @property
    def revision(self) -> str:
        """16 hexadecimal digits of names and contents."""
        return digest_of(part for name, file in sorted(self.files.items()) for part in (name, _content(file)))[:16]

    def forget_changed(self) -> None:
        """Take modules out of ``sys.modules`` if they were loaded from other contents (see `mark`), or elsewhere."""
        for path, file in self.files.items():  # another plug-in may have a helper of the same name beside it
            name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            place = getattr(sys.modules.get(name), "__file__", None) if path.endswith(".py") else None
            if place and os.path.realpath(place) != str(file) and not in_library(Path(place)):
                del sys.modules[name]
        now, loaded = self._contents(), list(self._loaded())
        if any(getattr(module, MARK, {}).get(file, now[file]) != now[file] for _, module in loaded for file in now):
            for name, _ in loaded:
                sys.modules.pop(name, None)
            importlib.invalidate_caches()
            for file in self.files.values():  # bytecode is told from an edited source by whole seconds and size alone
                with suppress(OSError, NotImplementedError):
                    Path(importlib.util.cache_from_source(str(file))).unlink()

    def mark(self) -> None:
        """Note on every loaded module which contents there were: it may import the others later."""
        now = self._contents()
        for _, module in self._loaded():
            setattr(module, MARK, getattr(module, MARK, {}) | now)

    def _contents(self) -> dict[str, str]:
        return {str(file): _content(file) for file in self.files.values()}

    def _loaded(self) -> Iterator[tuple[str, object]]:
        """Name in ``sys.modules`` and module of each file that is loaded."""
        own = {str(file) for file in self.files.values()}
        bases = {os.path.basename(file) for file in own}
        for name, module in list(sys.modules.items()):
            place = getattr(module, "__file__", None)
            if place and os.path.basename(place) in bases and os.path.realpath(place) in own:
                yield name, module


def of_file(file: Path) -> Sources:
    """The sources of a plug-in that is a file."""
    return _closure([_Node(file.name, file.resolve(), "", file.resolve().parent)], frozenset())


def of_module(name: str, *, plugin: bool = True) -> Sources:
    """The sources of an installed module; empty if it cannot be found.

    Args:
        name: of it.
        plugin: its package counts wherever it is; without, as that of any import.
    """
    own = frozenset({name.partition(".")[0]} if plugin else ())
    return _closure(list(_modules([name], own)), own)


@dataclass(frozen=True, slots=True)
class _Node:
    """A file under its name; `package` resolves its relative imports, `beside` is searched for absolute ones."""

    name: str
    file: Path
    package: str
    beside: Path | None


def _closure(start: list[_Node], own: frozenset[str]) -> Sources:
    """The files of `start` and of everything they import; modules of the packages in `own` count wherever they are."""
    found: dict[str, Path] = {}
    left = list(start)
    while left:
        node = left.pop()
        if node.file in found.values():
            continue
        found[node.name] = node.file
        for level, names in _imports(node.file, node.file.stat().st_mtime_ns, node.file.stat().st_size):
            left += _reached(node, level, names, own)
    return Sources(found)


def _reached(node: _Node, level: int, names: tuple[str, ...], own: frozenset[str]) -> Iterator[_Node]:
    """The files that an import of a file leads to."""
    if node.beside is None:
        start = node.package.split(".")
        prefix = ".".join(start[: len(start) - level + 1]) + "." if level else ""
        yield from _modules([f"{prefix}{name}".rstrip(".") for name in names], own)
        return
    folder = node.file.parent
    for _ in range(level - 1):
        folder = folder.parent
    places = [folder] if level else [node.beside, node.file.parent]
    near = [f for name in names for place in places for f in _files(place, name)]
    for file in near:
        if file.is_relative_to(node.beside):
            yield _Node(file.relative_to(node.beside).as_posix(), file, "", node.beside)
    if not near and not level:
        yield from _modules(names, own)


def _files(folder: Path, name: str) -> Iterator[Path]:
    """Files that ``import name`` runs if `folder` is searched: packages on the way, then the module itself."""
    place = folder
    for part in filter(None, name.split(".")):
        if (place / f"{part}.py").is_file():
            yield place / f"{part}.py"
        place = place / part
        if (place / "__init__.py").is_file():
            yield place / "__init__.py"
    if not name and (folder / "__init__.py").is_file():
        yield folder / "__init__.py"


def _modules(names: Iterable[str], own: frozenset[str]) -> Iterator[_Node]:
    """Files of modules, and of the packages they are in, as far as those count."""
    for name in names:
        parts = name.split(".")
        for i in range(len(parts)):
            module = ".".join(parts[: i + 1])
            if parts[0] in KNOWN or parts[0] in sys.stdlib_module_names:
                break
            try:
                spec = importlib.util.find_spec(module)
            except Exception:  # none of that name, or a package on the way that cannot be imported
                break
            if spec is None or (spec.origin is None and not spec.submodule_search_locations):
                break
            if spec.origin is None or not Path(spec.origin).is_file():
                continue  # a namespace
            if parts[0] not in own and in_library(Path(spec.origin)):
                break
            package = module if spec.submodule_search_locations is not None else module.rpartition(".")[0]
            yield _Node(module, Path(spec.origin).resolve(), package, None)


def in_library(file: Path) -> bool:
    """A file is part of an installed package or of Python's own library."""
    library = Path(sysconfig.get_path("stdlib"))
    return bool(INSTALLED & set(file.parts)) or file.is_relative_to(library)


@lru_cache(maxsize=4096)
def _imports(file: Path, changed: int, size: int) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """Level and names of every import in a file; `changed` and `size` make an edited file be read again."""
    del changed, size
    if file.suffix != ".py":
        return ()
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # loading it says so
        return ()
    found: list[tuple[int, tuple[str, ...]]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.append((0, tuple(alias.name for alias in node.names)))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            below = tuple(f"{base}.{alias.name}".strip(".") for alias in node.names if alias.name != "*")
            found.append((node.level, (base, *below) if base or node.level else below))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[0].value
            if called in ("import_module", "__import__") and isinstance(name, str):
                found.append((0, (name.lstrip("."),)))
    return tuple(found)


def _content(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
