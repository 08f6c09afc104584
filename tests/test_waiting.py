"""The process of a run with a process per cell: it waits, and holds nothing that only planning or reporting needs."""

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from memory_bench.errors import DataError, MachineError, UserError
from memory_bench.running import forks as module
from memory_bench.running.forks import in_fork
from memory_bench.store import Store

HERE = Path(__file__).parent


def in_light_process(code: str) -> str:
    """What a process without torch says when it runs `code`; `in_fork` forks there."""
    code = f"import sys; from memory_bench.running.forks import in_fork\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_waiting_run_is_small(world: Any, tmp_path: Path) -> None:
    """Planning, workers and the report load torch, pandas and the rest; the command itself does not."""
    asked = ["--executor", "local", "--models", "rmt", "--tasks", "pg19", "--seeds", "2", "--no-controls", "--quiet"]
    done = subprocess.run(
        [sys.executable, str(HERE / "waiting.py"), *world.arguments(*asked, "--out", str(tmp_path / "out"))],
        capture_output=True, text=True, env={**os.environ, **world.environment(), "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["code"] == 0, done.stderr
    assert found["loaded"] == []
    assert found["bytes"] < 100_000_000
    assert [record.status for record in Store.open(tmp_path / "out").records()] == ["ok", "ok"]
    assert (tmp_path / "out" / "leaderboard.md").is_file()


def test_what_a_fork_loads_is_gone_with_it() -> None:
    said = in_light_process(
        "def work():\n"
        "    import wave\n"
        "    print('inside')\n"
        "    return {'a': [1, 2]}\n"
        "print(in_fork(work), 'wave' in sys.modules)"
    )  # fmt: skip
    assert said == "inside\n{'a': [1, 2]} False\n"


ERRORS = [DataError("no data"), MachineError("full"), KeyError("k"), OSError(28, "x")]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_errors_of_a_fork_are_raised_here(error: Exception) -> None:
    said = in_light_process(
        "from memory_bench.errors import *\n"
        f"def work(): raise {error!r}\n"
        "try: in_fork(work)\n"
        "except Exception as e: print(repr(e), 'in work' in ''.join(e.__notes__))"
    )
    assert said == f"{error!r} True\n"


def test_an_error_that_cannot_be_sent_is_told() -> None:
    said = in_light_process(
        "def work():\n"
        "    class Own(Exception): pass\n"
        "    raise Own('words')\n"
        "try: in_fork(work)\n"
        "except RuntimeError as e: print('words' in str(e))"
    )
    assert said == "True\n"


def test_a_killed_fork_is_the_machines_fault() -> None:
    said = in_light_process(
        "import os\n"
        "from memory_bench.errors import MachineError\n"
        "try: in_fork(lambda: os.kill(os.getpid(), 9))\n"
        "except MachineError as e: print(e)"
    )
    assert said == "A process of this command was ended (SIGKILL).\n"


def test_a_fork_ends_with_its_command(tmp_path: Path) -> None:
    code = (
        "import os, time; from pathlib import Path; from memory_bench.running.forks import in_fork\n"
        f"def work(): Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()) + ' '); time.sleep(600)\n"
        "in_fork(work)"
    )
    command = subprocess.Popen([sys.executable, "-c", code])
    while not (said := (tmp_path / "pid").read_text() if (tmp_path / "pid").exists() else "").endswith(" "):
        time.sleep(0.05)
    child = psutil.Process(int(said))
    command.kill()
    command.wait()
    psutil.wait_procs([child], timeout=60)
    assert not child.is_running()


def test_here_where_torch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", sys)
    monkeypatch.setattr(module.os, "fork", lambda: pytest.fail("forked"))
    assert in_fork(os.getpid) == os.getpid()


@pytest.mark.parametrize("kind", [UserError, DataError, MachineError])
def test_sentences_can_be_sent(kind: type[Exception]) -> None:
    assert str(pickle.loads(pickle.dumps(kind("a sentence")))) == "a sentence"
