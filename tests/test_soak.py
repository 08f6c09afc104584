"""The short form of `benchmarks/soak.py`: points of each kind, seeded; the long form is run by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("executor", "points"), [("inline", 20), pytest.param("local", 6, marks=pytest.mark.slow)])
def test_disturbed_runs_end_as_undisturbed_ones(executor: str, points: int, tmp_path: Path) -> None:
    asked = ["--points", str(points), "--seed", "3", "--executor", executor, "--json", str(tmp_path / "found")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "soak.py"), *asked],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [point["verdict"] for point in json.loads((tmp_path / "found").read_text())] == ["same"] * points
