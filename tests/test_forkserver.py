"""Workers forked from a process that has imported everything: what a fresh program would be, and far sooner there."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from memory_bench.record import Record
from memory_bench.running import forkserver, processes
from memory_bench.running.apart import run_apart
from memory_bench.running.executors import Local
from memory_bench.running.fence import Cgroup
from memory_bench.running.forkserver import ForkServer
from memory_bench.running.job import Job
from memory_bench.running.processes import WORKER, Worker

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no fork server there")

TOLD = r'''
from __future__ import annotations
import json, os, random, signal, sys, time
from dataclasses import dataclass
from pathlib import Path
import numpy as np
import torch
from memory_bench.zoo.pretrain import Window

IMPORTED = os.getpid()
SEEN = []

@dataclass(frozen=True, slots=True)
class TellConfig:
    segment: int = 8
    way: str = ""

class Tell(Window):
    """A model that tells of the process it is in, and may leave others behind."""
    Config = TellConfig
    def __init__(self, backbone, config, rng):
        super().__init__(backbone, config)
        SEEN.append(1)
        self.way = config.way
        if "MEMORY_BENCH_BEACON" not in os.environ:
            return  # built by who plans the run
        open_now = [n for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}")]
        told = {
            "pid": os.getpid(), "imported": IMPORTED, "seen": len(SEEN), "cpu": time.process_time(),
            "session": os.getsid(0), "here": os.getcwd(), "draws": [random.random(), float(np.random.rand())],
            "temporary": os.environ["TMPDIR"], "asked": os.environ.get("ASKED"), "arguments": sys.argv,
            "sockets": [n for n in open_now if os.readlink(f"/proc/self/fd/{n}").startswith("socket:")],
            "threads": torch.get_num_threads(), "mark": os.environ["MEMORY_BENCH_BEACON"],
            "shown": [line for line in open("/proc/self/environ").read().split("\0") if "BEACON" in line],
        }
        Path(__file__).with_name(f"told-{os.getpid()}.json").write_text(json.dumps(told))
    def step(self, state, segment, *, write=True):
        if self.way == "exit":
            os._exit(7)
        if self.way == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.way == "leave" and not (left := Path(__file__).with_name("left")).exists():
            reading, writing = os.pipe()
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    left.write_text(str(os.getpid()))
                    os.close(writing)
                    time.sleep(600)
                os._exit(0)
            os.close(writing)
            os.read(reading, 1)
        if self.way == "hang":
            time.sleep(600)
        return super().step(state, segment, write=write)
'''
Prepare = Callable[..., list[Job]]


@pytest.fixture
def tell(tmp_path: Path) -> str:
    (tmp_path / "tell.py").write_text(TOLD)
    return f"{tmp_path}/tell.py:Tell"


@pytest.fixture
def server() -> Iterator[ForkServer]:
    with ForkServer() as made:
        yield made


def told(folder: Path) -> list[dict[str, Any]]:
    """What the models have told, by the order of their cells."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("told-*.json"))]


def ran(job: Job, folder: Path, server: ForkServer | None) -> Record:
    """The record of a job, in a folder of its own."""
    folder.mkdir()
    again = replace(job, out=folder / "out")
    workers: list[Worker] = []
    end = run_apart(again, folder, WORKER, lambda event: None, workers.append, server=server)
    assert end is not None, "stopped"
    assert end.record is not None, end.notice
    assert isinstance(workers[0].process, forkserver.Served) == (server is not None)
    return end.record


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("model", ["truncation", "rmt"])
def test_a_fork_gives_what_a_fresh_program_gives(
    model: str, threads: int, jobs: Prepare, server: ForkServer, tmp_path: Path
) -> None:
    """To the bit; and memory is charged alike, though a fork shares pages with its server and begins without others."""
    (job,) = (replace(job, threads=threads) for job in jobs(model))
    fresh, forked, again = (ran(job, tmp_path / name, by) for name, by in (("a", None), ("b", server), ("c", server)))
    assert fresh.status == "ok", fresh.detail
    assert forked.metrics == fresh.metrics == again.metrics
    for name, least in (("peak_device_bytes", 1_000_000), ("peak_host_bytes", 0)):
        peaks = [getattr(record.usage, name) for record in (fresh, forked, again)]
        assert max(peaks) - min(peaks) <= max(0.02 * max(peaks), least), (name, peaks)


def test_cells_have_nothing_of_each_other(
    jobs: Prepare, tell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor of the server: a plug-in is imported in its worker; ends are told as those of a child."""
    monkeypatch.setenv("ASKED", "this")
    monkeypatch.chdir(tmp_path)
    asked = jobs(f"{tell},{tell}[way=exit],{tell}[way=segfault],{tell}[segment=9]")
    with closing(Local(2).run([replace(job, threads=2) for job in asked])) as events:
        records = {e.record.cell.key: e.record for e in events if e.record is not None}
    ends = [records[job.cell.key] for job in asked]
    assert [r.status for r in ends] == ["ok", "failed", "failed", "ok"]
    assert "ended with code 7 without a record" in ends[1].detail
    assert "died of signal 11" in ends[2].detail
    cells = told(tmp_path)
    assert len({cell["pid"] for cell in cells}) == 4
    for cell in cells:
        assert cell["pid"] == cell["imported"] == cell["session"]
        assert (cell["asked"], cell["here"], cell["threads"]) == ("this", str(tmp_path), 2)
        assert (cell["sockets"], len(cell["arguments"])) == ([], 2)
        assert cell["shown"] == [f"{processes.BEACON}={cell['mark']}"]
        assert cell["temporary"] == str(Path(cell["mark"]).with_name("temporary"))
        assert cell["cpu"] <= 1.0, "imports are paid for again"
    for draws in zip(*(cell["draws"] for cell in cells), strict=True):
        assert len(set(draws)) == len(cells)


def eventually(holds: Callable[[], bool], seconds: float = 240.0) -> bool:
    ends = time.monotonic() + seconds
    while not (found := holds()) and time.monotonic() < ends:
        time.sleep(0.05)
    return found


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_what_a_worker_forks_is_known_by_its_mark(
    jobs: Prepare, tell: str, server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody's child in a session of its own, and no cgroup around it."""
    monkeypatch.setattr(Cgroup, "make", classmethod(lambda cls, pid: None))
    (job,) = jobs(f"{tell}[way=leave]")
    assert ran(job, tmp_path / "run", server).status == "ok"
    left = int((tmp_path / "left").read_text())
    assert eventually(lambda: gone(left), 10)


COMMAND = """
import sys
from memory_bench.running.forkserver import ForkServer
from memory_bench.running.processes import WORKER, start
with ForkServer() as server, start([*WORKER, sys.argv[1]], server=server) as worker:
    print(server._process.pid, worker.pid, [n for n in ("torch", "numpy", "pandas") if n in sys.modules], flush=True)
    print(worker.wait(), flush=True)
"""


@pytest.mark.parametrize("killed", ["command", "server"])
def test_a_worker_ends_with_its_server_and_that_with_its_command(
    killed: str, jobs: Prepare, tell: str, tmp_path: Path
) -> None:
    (job,) = jobs(f"{tell}[way=hang]")
    (tmp_path / "job.json").write_text(json.dumps(job.to_json()))
    asked = [sys.executable, "-c", COMMAND, str(tmp_path / "job.json")]
    with subprocess.Popen(asked, stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        server, worker, loaded = command.stdout.readline().split(maxsplit=2)
        assert loaded == "[]\n", "the command itself stays small"
        assert eventually(lambda: bool(told(tmp_path)))
        os.kill(command.pid if killed == "command" else int(server), signal.SIGKILL)
        assert command.stdout.readline() == ("" if killed == "command" else "-9\n")
    assert eventually(lambda: gone(int(server)) and gone(int(worker)), 60)


def test_where_there_is_no_server_a_fresh_program_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(forkserver, "SERVER", (sys.executable, "-c", "pass"))
    own = {processes.BEACON: str(tmp_path / "beacon")}
    with ForkServer() as server:
        assert [server.begin([*WORKER, "job.json"], sys.stderr, own) for _ in range(2)] == [None, None]
    with ForkServer() as server:
        assert server.begin(["another", "program"], sys.stderr, own) is None
    with pytest.raises(ConnectionAbortedError):
        server.begin([*WORKER, "job.json"], sys.stderr, own)


def test_a_server_whose_forks_cannot_compute_is_found_out() -> None:
    """One with a pool of threads, which its forks would wait for in vain."""
    code = (
        "import sys, torch; torch.set_num_threads(2); big = torch.ones(512, 512); (big @ big).exp()\n"
        "from memory_bench.running import forkserver; forkserver.PATIENCE = 5.0\n"
        "print(forkserver._computes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stderr
