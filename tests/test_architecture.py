"""Who may import whom, and what a file may look like, read from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLUGINS = ("hmt", "baselines", "tasks")
PLUGIN_PACKAGES = tuple(f"memory_bench.{folder}" for folder in (*PLUGINS, "results"))
LIGHT = ("cli", "plugins", "card", "cell", "record", "store", "stats", "report", "tables", "plots", "budget", "recipe")
LIGHT += ("errors", "episode")
LINES = 400
SOURCES = sorted(p for folder in ("memory_bench", *PLUGINS) for p in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    """Dotted name under which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "memory_bench" else ("memory_bench", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, only_top: bool = False) -> Iterator[str]:
    """Absolute names of what a file imports; `only_top`: when it is imported itself, not inside functions."""
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
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            left += node.orelse
        elif not (only_top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            left += ast.iter_child_nodes(node)


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
    modules = [f"memory_bench.{name}" for name in LIGHT if (ROOT / "memory_bench" / f"{name}.py").exists()]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT.parent).returncode == 0, modules


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_do_not_name_torch_at_the_top(name: str) -> None:
    path = ROOT / "memory_bench" / f"{name}.py"
    if path.exists():
        assert not [n for n in imports(path, only_top=True) if inside(n, "torch")]
