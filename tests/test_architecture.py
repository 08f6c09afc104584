"""Who may import whom, and what a file may look like, read from the source."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLUGINS = ("hmt", "baselines", "tasks")
PLUGIN_PACKAGES = tuple(f"memory_bench.{folder}" for folder in (*PLUGINS, "results"))
LIGHT = ("cli", "plugins", "card", "cell", "record", "store", "budget", "recipe", "errors", "episode", "shipped")
LIGHT += ("statistics.stats", "report.build", "report.tables", "report.plots", "report.comparison", "command.listing")
LIGHT += ("gate.command", "mlflow.view", "published.reported", "running.options", "running.console", "backbone")
LIGHT += ("command.commands", "running.executors", "running.apart", "running.forks", "files.remembered")
LINES = 400
SOURCES = sorted(p for folder in ("memory_bench", *PLUGINS) for p in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    """Dotted name under which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "memory_bench" else ("memory_bench", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, only_top: bool = False, typing: bool = False) -> Iterator[str]:
    """Absolute names of what a file imports.

    Args:
        path: of the file.
        only_top: only what it imports when it is imported itself, not inside functions.
        typing: also what it imports for its types alone.
    """
    package = name_of(path).split(".")
    package = package if path.stem == "__init__" else package[:-1]
    left: list[ast.AST] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while left:
        node = left.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and not typing and "TYPE_CHECKING" in ast.unparse(node.test):
            left += node.orelse
        elif not (only_top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            left += ast.iter_child_nodes(node)


FILES = {name_of(path): path for path in SOURCES}
HALL = ROOT / "memory_bench" / "__init__.py"
MAP = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_plugins_are_apart(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    own = f"memory_bench.{folder}"
    forbidden = [p for p in PLUGIN_PACKAGES if folder == "memory_bench" or p != own]
    wrong = [n for n in imports(path) if any(inside(n, p) for p in forbidden)]
    assert not wrong, f"{name_of(path)} imports {wrong}"
    bare = [n for n in imports(path) if n.split(".")[0] in (*PLUGINS, "results")]
    assert not bare, f"{name_of(path)} imports {bare}, which is named memory_bench.… when installed"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_are_short_and_silent(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= LINES, f"{name_of(path)} has more than {LINES} lines"
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    assert path.name == "cli.py" or not [c for c in calls if getattr(c.func, "id", "") == "print"]


def test_light_modules_do_not_import_torch() -> None:
    modules = [f"memory_bench.{name}" for name in LIGHT]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT.parent).returncode == 0, modules


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_do_not_name_torch_at_the_top(name: str) -> None:
    assert not [n for n in imports(FILES[f"memory_bench.{name}"], only_top=True) if inside(n, "torch")]


def rooms() -> dict[str, int]:
    """Every room of the map to its floor, counted from the top; a room that stands there twice is an error."""
    table = MAP.split("## Rooms")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]+) \|", table, flags=re.M)
    found: dict[str, int] = {}
    for floor, row in enumerate(rows):
        for room in re.findall(r"`([^`]+)`", row):
            assert room not in found, f"{room} is in the map twice"
            found[room] = floor
    return found


def room_of(path: Path) -> str:
    """The folder of a file; in the hall the file itself."""
    relative = path.relative_to(ROOT)
    return str(relative if relative.parent == Path("memory_bench") else relative.parent)


def neighbours(path: Path) -> set[Path]:
    """The project's files that a file imports, wherever in it and for whatever reason."""
    found = set()
    for name in imports(path, typing=True):
        while name and name not in FILES:
            name = name.rpartition(".")[0]
        if name in FILES and FILES[name] not in (path, HALL):
            found.add(FILES[name])
    return found


def test_the_map_shows_every_room() -> None:
    assert set(rooms()) == {room_of(path) for path in SOURCES if path != HALL}


@pytest.mark.parametrize("path", [path for path in SOURCES if path != HALL], ids=name_of)
def test_files_import_their_own_room_and_rooms_below(path: Path) -> None:
    floors, own = rooms(), room_of(path)
    wrong = [str(other.relative_to(ROOT)) for other in sorted(neighbours(path))
             if room_of(other) != own and floors[room_of(other)] <= floors[own]]  # fmt: skip
    assert not wrong, f"{path.relative_to(ROOT)} (floor {floors[own]}) imports {', '.join(wrong)}, not below it"


def circle(graph: dict[Path, set[Path]]) -> list[Path]:
    """Some files that import each other in a circle; empty if there are none."""
    done: set[Path] = set()

    def walk(path: Path, way: list[Path]) -> list[Path]:
        if path in way:
            return way[way.index(path) :]
        if path not in done:
            for other in sorted(graph[path]):
                if found := walk(other, [*way, path]):
                    return found
        done.add(path)
        return []

    return next((found for path in sorted(graph) if (found := walk(path, []))), [])


def test_no_files_import_each_other_in_a_circle() -> None:
    found = circle({path: neighbours(path) for path in SOURCES})
    assert not found, " imports ".join(name_of(path) for path in found)


def test_a_circle_is_found() -> None:
    a, b, c = Path("a"), Path("b"), Path("c")
    assert circle({a: {b}, b: {c}, c: {b}}) == [b, c]
    assert not circle({a: {b, c}, b: {c}, c: set()})


@pytest.mark.parametrize("folder", sorted({path.parent for path in SOURCES}), ids=name_of)
def test_a_room_says_what_its_files_are(folder: Path) -> None:
    said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    listed = re.findall(r"^- `([^`]+\.py)`: \S", said, flags=re.M)
    assert sorted(listed) == listed
    assert set(listed) == {path.name for path in SOURCES if path.parent == folder and path.name != "__init__.py"}


def test_the_map_is_short() -> None:
    assert len(MAP.splitlines()) <= 160
