"""The short form of `benchmarks/soak.py`: a few points of each kind, seeded; the long form is run by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_disturbed_runs_end_as_undisturbed_ones(tmp_path: Path) -> None:
    asked = [
        "--points",
        "6",
        "--seed",
        "3",
        "--kinds",
        "clock,write,full,two,damage",
        "--json",
        str(tmp_path / "found"),
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "soak.py"), *asked],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [point["verdict"] for point in json.loads((tmp_path / "found").read_text())] == ["same"] * 6
