"""What an installation carries, and that it does not depend on the folder a command is given in."""

import importlib.util
import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path

import pytest

from memory_bench.parity.cases import find_cases
from memory_bench.published.reported import load
from memory_bench.running.executors import WORKER
from memory_bench.shipped import parity_folder, read_certificates

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def packages() -> dict[str, Path]:
    """Installed name to folder in the checkout."""
    mapped = PYPROJECT["tool"]["setuptools"]["package-dir"]
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    return {name: ROOT / mapped.get(name, name.replace(".", "/")) for name in listed}


def test_every_package_is_listed() -> None:
    folders = {p.parent for top in ("memory_bench", "hmt", "baselines", "tasks") for p in (ROOT / top).rglob("*.py")}
    assert folders <= set(packages().values())


def test_suites_and_cases_are_listed_as_data() -> None:
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]
    folders = packages()
    carried = {f for name, globs in patterns.items() for glob in globs for f in folders[name].glob(glob) if f.is_file()}
    wanted = [f for name in ("parity", "reported") for f in (ROOT / "results" / name).rglob("*") if f.is_file()]
    wanted += [f for name in ("suites", "budgets") for f in (ROOT / "memory_bench" / name).glob("*.toml")]
    wanted += (ROOT / "tasks" / "lm_eval").glob("*.yaml")
    wanted += (ROOT / "memory_bench" / "report" / "assets").iterdir()
    wanted.append(ROOT / "memory_bench" / "py.typed")
    assert len(wanted) > 50
    assert set(wanted) <= carried


def test_shipped_data_are_found() -> None:
    assert len(list(find_cases([parity_folder()]))) >= 13
    assert len(load()) > 2000
    assert {"hmt", "rmt", "memoryllm", "mplus"} <= set(read_certificates())
    assert {"smoke.toml", "tiny.toml"} <= {f.name for f in resources.files("memory_bench.suites").iterdir()}


def test_results_hold_no_code() -> None:
    assert not list((ROOT / "results").rglob("*.py"))
    spec = importlib.util.find_spec("memory_bench.results")
    assert spec is None or spec.origin is None


@pytest.mark.parametrize("folder", ["hmt", "baselines", "tasks"])
def test_plugin_folders_have_one_name(folder: str) -> None:
    code = f"import {folder}"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert f"Import memory_bench.{folder}" in found.stderr


def test_workers_run_what_is_installed(tmp_path: Path) -> None:
    (tmp_path / "memory_bench").mkdir()
    (tmp_path / "memory_bench" / "__init__.py").write_text("raise RuntimeError('not the installed package')\n")
    command = [*WORKER, "--prepare", "no-such-job.json"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "FileNotFoundError" in found.stderr
    assert "not the installed package" not in found.stderr


def test_tested_versions_are_those_required() -> None:
    """Every direct dependency has a tested version."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0] for line in lines if line and not line.startswith("#")}
    extras = PYPROJECT["project"]["optional-dependencies"]
    required = [r for r in extras["dev"] if not r.startswith("memory-bench[")] + extras["lm-eval"] + extras["mlflow"]
    required += extras["ray"] + extras["slurm"] + extras["page"]
    required += PYPROJECT["project"]["dependencies"]
    names = {requirement.split(">")[0].split("=")[0].strip().lower() for requirement in required}
    assert names <= pinned
