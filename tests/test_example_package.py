"""The example package: installed as another package would be, listed, tested by its own tests, and run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from memory_bench.store import Store

EXAMPLE = Path(__file__).parents[1] / "examples" / "memory-bench-example"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the package is installed in, without a network."""
    root = tmp_path_factory.mktemp("example")
    shutil.copytree(EXAMPLE, root / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(root / "site"), str(root / "source")]
    made = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    if made.returncode and ("No module named" in made.stderr or "BackendUnavailable" in made.stderr):
        pytest.skip(f"pip cannot build here without a network: {made.stderr.strip().splitlines()[-1]}")
    assert not made.returncode, made.stderr
    return root / "site"


def run(site: Path, world: Any, *arguments: str, module: str = "memory_bench") -> subprocess.CompletedProcess[str]:
    """A command where the package is installed."""
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, **world.environment(), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=site.parent, env=env)


def test_its_own_tests_pass(site: Path, world: Any) -> None:
    done = run(site, world, "-q", "-p", "no:cacheprovider", str(site.parent / "source" / "tests"), module="pytest")
    assert not done.returncode, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_it_is_listed(site: Path, world: Any) -> None:
    for kind, name in (("models", "carry"), ("tasks", "colours")):
        done = run(site, world, "list", kind, "--json")
        (row,) = [row for row in json.loads(done.stdout) if row["name"] == name]
        assert row["package"] == "memory-bench-example"
        assert "broken" not in row["status"]


def test_it_runs(site: Path, world: Any, tmp_path: Path) -> None:
    (budget := tmp_path / "own.toml").write_text("train_tokens = 20_000\n")
    given = ["--backbone", str(world.backbone), "--budget", str(budget), "--limit", "3", "--seeds", "1"]
    chosen = ["--models", "carry", "--tasks", "colours", "--no-controls", "--out", str(tmp_path / "out")]
    done = run(site, world, "run", *given, *chosen, "--json")
    assert not done.returncode, done.stdout + done.stderr
    (record,) = Store(tmp_path / "out").records()
    assert (record.status, record.detail, record.cell.label) == ("ok", "", "carry")
    assert record.metrics[0].metric == "accuracy"
    assert record.cell.training.model.package == "memory-bench-example 0.1.0"


def test_a_name_that_is_nearly_right_is_guessed(site: Path, world: Any) -> None:
    for flag, name, near in (("--models", "cary", "carry"), ("--tasks", "colors", "colours")):
        other = ["--tasks", "colours"] if flag == "--models" else ["--models", "carry"]
        done = run(site, world, "plan", flag, name, *other, "--backbone", str(world.backbone))
        assert done.returncode == 2
        assert f"Did you mean {near}?" in done.stderr
