"""Cells on other machines: what they are given, what a node must see, and that nothing but the run's folder counts."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from memory_bench.errors import MachineError, UserError
from memory_bench.running import cluster, node
from memory_bench.running.cluster import Cluster, Needs, absolute, needs
from memory_bench.running.obituary import settled
from memory_bench.store import Store

Prepare = Callable[..., list[Any]]
FAKE = """
import json, os, signal, sys, time
from pathlib import Path
out, what, job = Path(sys.argv[1]), sys.argv[2], json.loads(Path(sys.argv[-1]).read_text())
seed = job["cell"]["training"]["seed"]
if "--prepare" in sys.argv:
    sys.exit(0)
from memory_bench.running.orphans import watch
watch()
(out / f"raylet-{seed}").write_text(os.environ.get("RAY_RAYLET_PID", ""))
with open(out / "attempts", "a") as attempts:
    attempts.write(f"{seed}\\n")
first = (out / "attempts").read_text().split().count(str(seed)) == 1
if (what == "slow" or what == "slow-0" and seed == 0) and first:
    time.sleep(600)
if what == "killed" and seed == 1:
    os.kill(os.getpid(), signal.SIGKILL)
from memory_bench.record import Record, now, provenance
from memory_bench.budget import Usage
from memory_bench.cell import from_json
from memory_bench.store import Store
facts = provenance(device="cpu", threads=1, started=now())
record = Record(from_json(job["cell"]), "ok", f"seed {seed}", (), Usage(), facts, None, {})
print(json.dumps({"notice": f"something of {seed}"}), flush=True)
Store(Path(job["out"])).write_record(record, None)
"""


@pytest.fixture
def command(tmp_path: Path) -> Callable[[str], tuple[str, ...]]:
    """``command(what)``: a worker that writes a record at once, except as `what` says."""
    (tmp_path / "fake.py").write_text(FAKE)
    return lambda what: (sys.executable, str(tmp_path / "fake.py"), str(tmp_path), what)


def attempts(place: Path) -> list[str]:
    """Seeds of the cells that workers began with."""
    return (place / "attempts").read_text().split() if (place / "attempts").exists() else []


class Threads(Cluster):
    """An engine whose nodes are threads of this process; `nodes` may change what a call says."""

    def __init__(self, command: Sequence[str], nodes: Callable[[node.Call], dict[str, str]] = lambda call: call()):
        super().__init__(command)
        self.nodes, self.arrays, self.said = nodes, list[tuple[int, Needs]](), dict[int, Any]()
        self.cancelled: list[int] = []

    def _submit(self, calls: Sequence[node.Call], wanted: Needs) -> list[int]:
        self.arrays.append((len(calls), wanted))
        tasks = list(range(len(self.said), len(self.said) + len(calls)))
        for task, call in zip(tasks, calls, strict=True):
            self.said[task] = None
            threading.Thread(target=lambda t, c: self.said.update({t: self.nodes(c)}), args=(task, call)).start()
        return tasks

    def _ended(self, tasks: Sequence[int]) -> dict[int, dict[str, str]]:
        time.sleep(0.02)
        return {task: self.said[task] for task in tasks if self.said[task] is not None}

    def _cancel(self, tasks: Sequence[int]) -> None:
        self.cancelled += tasks


def followed(executor: Cluster, asked: Sequence[Any]) -> tuple[dict[int, str], list[str]]:
    """By seed how a cell ended; and what was told beside."""
    ends, told = dict[int, str](), list[str]()
    with closing(executor.run(asked)) as events:
        for event in events:
            if event.ends:
                ends[event.cell.training.seed] = "lost" if event.record is None else event.record.status
            if event.notice:
                told.append(event.notice)
    return ends, told


def test_a_cell_is_given_what_was_predicted_of_it(jobs: Prepare) -> None:
    (job,) = jobs("rmt", device_bytes=4 * 10**9, host_bytes=6 * 10**9, train_seconds=60, eval_seconds=60)
    foretold = replace(job, plan={"peak_bytes": 1.2e9, "seconds": 600.0, "how": "measured here"})
    assert needs(foretold) == Needs(cpus=1, gpus=0, memory=3 * 10**9, minutes=45)
    assert needs(job) == Needs(1, 0, 6 * 10**9, 75), "nobody has predicted it: its limits"
    assert needs(job, prepare=True) == Needs(1, 0, 6 * 10**9, cluster.UNKNOWN_MINUTES)
    (free,) = jobs("rmt", train_seconds=None, eval_seconds=None)
    assert needs(free) == Needs(1, 0, 6 * 10**9, cluster.UNKNOWN_MINUTES)
    assert needs(replace(free, threads=2)).cpus == 2
    assert needs(replace(foretold, device="cuda", threads=64)) == Needs(4, 1, 6 * 10**9, 45), "its peak is the GPU's"


def test_a_job_means_the_same_everywhere(jobs: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = jobs("rmt")
    monkeypatch.chdir(job.out.parent)
    there = absolute(replace(job, out=Path("out"), deadline=700.0))
    assert (there.out, there.deadline, there.threads) == (job.out.resolve(), None, 1)
    assert there.allotted == needs(job).memory
    assert type(job).from_json(json.loads(json.dumps(there.to_json()))) == there


def test_stamps_are_the_same_on_every_machine(jobs: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = jobs("rmt")
    store, own = Store(job.out), Path.stat
    store.log_path(job.cell.key).with_name("record.json").write_text("{}")
    here = store.stamp(job.cell.key)

    def elsewhere(path: Path, **more: Any) -> os.stat_result:
        found = own(path, **more)
        return os.stat_result([*found[:2], found.st_dev + 1, *found[3:]], {"st_mtime_ns": found.st_mtime_ns})

    monkeypatch.setattr(Path, "stat", elsewhere)
    assert here == store.stamp(job.cell.key)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"out": "/nowhere/out"}, "does not see the run's folder /nowhere/out: results come back through it"),
        ({"cache": "/nowhere/cache"}, "does not see the cache /nowhere/cache: backbones and data"),
        ({"there": ["/nowhere/mine.py"]}, "does not see /nowhere/mine.py, which the run needs"),
        ({"versions": {"torch": "1.0"}}, "this one 1.0: install the same there"),
        ({"versions": {"sources of memory-bench": "0"}}, "this one 0: install the same there"),
    ],
)
def test_a_machine_that_sees_too_little_is_refused(
    changed: dict[str, Any], said: str, jobs: Prepare, tmp_path: Path
) -> None:
    (job,) = jobs("rmt")
    asked = node.wanted([replace(job, cache=tmp_path / "cache")])
    assert node.refusal(asked) == ""
    sentence = node.refusal({**asked, **changed})
    assert sentence.startswith("The machine ")
    assert sentence.endswith(".")
    assert said in sentence


def test_a_folder_of_the_same_name_is_another(jobs: Prepare, tmp_path: Path) -> None:
    (job,) = jobs("rmt")
    job = replace(job, cache=tmp_path / "cache")
    asked = node.wanted([job])
    assert node.wanted([job])["marks"] == asked["marks"], "a folder keeps its mark"
    for folder in ("out", "cache"):
        (Path(asked[folder]) / node.MARK).write_text("0" * 32)  # on that machine's own disk
        assert f"{asked[folder]}: " in node.refusal(asked)
        (Path(asked[folder]) / node.MARK).write_text(asked["marks"][asked[folder]])


def test_files_that_a_run_names_are_wanted(jobs: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = jobs("rmt")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("")
    training = replace(job.cell.training, model=replace(job.cell.training.model, name="mine.py:Mine"))
    there = node.wanted([replace(job, cell=replace(job.cell, training=training))])["there"]
    assert {str(tmp_path / "mine.py"), str(tmp_path), str(Path(job.cell.training.backbone.name))} <= set(there)


def test_cells_that_need_the_same_are_one_array(
    jobs: Prepare, command: Callable[[str], tuple[str, ...]], tmp_path: Path
) -> None:
    executor = Threads(command("well"))
    ends, told = followed(executor, jobs("rmt", seeds="4"))
    assert ends == dict.fromkeys(range(4), "ok")
    assert [size for size, _ in executor.arrays] == [1, 4], "the backbone, then all cells"
    assert sorted(told) == [f"something of {seed}" for seed in range(4)]
    assert sorted(attempts(tmp_path)) == list("0123")


def test_a_killed_worker_is_no_result(jobs: Prepare, command: Callable[[str], tuple[str, ...]]) -> None:
    asked = jobs("rmt", seeds="3")
    ends, told = followed(Threads(command("killed")), asked)
    assert ends == {0: "ok", 1: "lost", 2: "ok"}
    assert [s for s in told if "by no fault of its own: its process was ended from outside (SIGKILL)" in s]
    assert Store(asked[1].out).record(asked[1].cell.key) is None
    assert followed(Threads(command("well")), [asked[1]])[0] == {1: "ok"}, "the same command goes on"


def test_only_the_folder_counts(
    jobs: Prepare, command: Callable[[str], tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "VISIBLE", 0.2)
    asked = jobs("rmt", seeds="1,")

    def boasts(call: node.Call) -> dict[str, str]:
        return {}

    ends, told = followed(Threads(command("well"), boasts), asked)
    assert ends == {1: "lost"}
    assert "which is not in the run's folder" in told[0]

    def dies_late(call: node.Call) -> dict[str, str]:
        said = call()
        return said if call.prepare else {"taken": "Ray lost it (NodeDiedError)"}

    assert followed(Threads(command("well"), dies_late), asked)[0] == {1: "ok"}, "its record was there"


def test_a_second_attempt_takes_what_the_first_has_written(
    jobs: Prepare, command: Callable[[str], tuple[str, ...]], tmp_path: Path
) -> None:
    (job,) = jobs("rmt")
    call = node.Call(absolute(replace(job, before="")).to_json(), node.wanted([job]), False, command("well"))
    both = [threading.Thread(target=call) for _ in range(2)]  # one that passes for lost is still at work
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert attempts(tmp_path) == ["0"]
    assert Store(job.out).record(job.cell.key) is not None


@pytest.mark.parametrize("prepare", [True, False])
def test_a_machine_that_refuses_stops_the_run(
    prepare: bool, jobs: Prepare, command: Callable[[str], tuple[str, ...]], tmp_path: Path
) -> None:
    def other(call: node.Call) -> dict[str, str]:
        return {"refused": "The machine n7 does not see it."} if call.prepare == prepare else call()

    executor = Threads(command("well"), other)
    with pytest.raises(UserError, match="n7"):
        followed(executor, jobs("rmt", seeds="2"))
    assert not attempts(tmp_path)


def test_an_interrupted_run_cancels_its_tasks(jobs: Prepare, command: Callable[[str], tuple[str, ...]]) -> None:
    never = threading.Event()

    def hangs(call: node.Call) -> dict[str, str]:
        if not call.prepare and call.job["cell"]["training"]["seed"] == 0:
            never.wait(20)
        return {} if call.prepare else {"taken": "it was taken away"}

    executor = Threads(command("well"), hangs)
    with closing(executor.run(jobs("rmt", seeds="2"))) as events:
        assert next(event.cell.training.seed for event in events if event.ends) == 1
    never.set()
    assert executor.cancelled == [1]


def test_an_engine_that_breaks_ends_the_run(
    jobs: Prepare, command: Callable[[str], tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = Threads(command("well"))
    monkeypatch.setattr(executor, "_ended", lambda tasks: 1 / 0)
    with pytest.raises(UserError, match="cannot be asked any more: ZeroDivisionError"):
        followed(executor, jobs("rmt"))


def test_a_scheduler_that_gave_too_little_memory_is_no_limit(jobs: Prepare, tmp_path: Path) -> None:
    (job,) = jobs("rmt", host_bytes=6 * 10**9)
    guard: Any = SimpleNamespace(judged=lambda: None, oom_kills=-1, verdict=None, children=False, others=False)
    worker: Any = SimpleNamespace(trouble="", log=tmp_path / "log.txt")
    with pytest.raises(MachineError, match="the 3 GB of memory that a scheduler gave it were too little"):
        settled(replace(job, allotted=3 * 10**9), Store(job.out), worker, guard, -9, "")
    assert Store(job.out).record(job.cell.key) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--executor", "ray"), "--executor ray needs Ray: pip install 'memory-bench[ray]'."),
        (("--executor", "slurm"), "--executor slurm needs submitit: pip install 'memory-bench[slurm]'."),
        (("--executor", "slum"), "Unknown executor 'slum'. Did you mean slurm?"),
        (("--ray-address", "h:1"), "--ray-address h:1 is of --executor ray; this is inline."),
    ],
)
def test_what_is_missing_is_a_sentence(
    given: tuple[str, ...], said: str, invoke: Any, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("ray", "submitit"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    code, out, err = invoke("run", *world.arguments("--models", "rmt", "--tasks", "pg19", *given))
    assert (code, out, list(tmp_path.iterdir())) == (2, "", [])
    assert said in err


def needs_package(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed (pip install 'memory-bench[ray,slurm]')")


@pytest.fixture
def nodes() -> Iterator[Any]:
    """A Ray cluster of a head that computes nothing and one more node, on this machine."""
    needs_package("ray")
    from ray.cluster_utils import Cluster as Nodes

    made = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80_000_000})
    try:
        yield made
    finally:
        made.shutdown()


def node_of(nodes: Any) -> Any:
    return nodes.add_node(num_cpus=2, memory=20 * 10**9, object_store_memory=80_000_000)


@pytest.mark.cluster
def test_ray_goes_on_when_a_node_is_killed(
    nodes: Any, jobs: Prepare, command: Callable[[str], tuple[str, ...]], tmp_path: Path
) -> None:
    from memory_bench.running.on_ray import Ray

    asked = jobs("rmt", seeds="2")
    made = [node_of(nodes) for _ in range(2)]
    ends: dict[int, str] = {}
    with closing(Ray(nodes.address, command=command("slow-0")).run(asked)) as events:
        for event in events:
            if event.ends:
                ends[event.cell.training.seed] = "lost" if event.record is None else event.record.status
                while "0" not in attempts(tmp_path):
                    time.sleep(0.1)
                if len(ends) == 1:  # that of seed 1; the other is at work
                    raylet = int((tmp_path / "raylet-0").read_text())
                    (busy,) = (one for one in made if one.all_processes["raylet"][0].process.pid == raylet)
                    nodes.remove_node(busy, allow_graceful=False)
    assert ends == {0: "ok", 1: "ok"}
    assert attempts(tmp_path).count("0") == 2, "once on each node"


@pytest.mark.cluster
@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid:6379", "6379", "ray://127.0.0.1:x", "h:99999999"])
def test_an_address_without_a_cluster_is_a_sentence(address: str, jobs: Prepare) -> None:
    needs_package("ray")
    from memory_bench.running.on_ray import Ray

    with pytest.raises(UserError, match=re.escape(f"There is no Ray cluster at {address}: ")):
        followed(Ray(address), jobs("rmt"))


@pytest.mark.cluster
def test_submitit_runs_cells_and_runs_them_again(
    jobs: Prepare, command: Callable[[str], tuple[str, ...]], tmp_path: Path
) -> None:
    needs_package("submitit")
    from memory_bench.running.on_slurm import Slurm

    asked = jobs("rmt", seeds="2")
    executor = Slurm(asked[0].out, engine="local", command=command("killed"))
    assert followed(executor, [asked[0]])[0] == {0: "ok"}
    assert not (asked[0].out / "slurm").exists(), "what went well leaves nothing"


def requeued(executor: Any, place: Path, again: Callable[[str], None]) -> None:
    """Take cells away as soon as a worker is at each."""
    while len(attempts(place)) < sum(not prepare for _, prepare in executor._tasks.values()) or not attempts(place):
        time.sleep(0.1)
    for task, (_, prepare) in list(executor._tasks.items()):
        if not prepare:
            again(task)


@pytest.mark.cluster
def test_submitit_goes_on_after_a_preemption(
    jobs: Prepare, command: Callable[[str], tuple[str, ...]], tmp_path: Path
) -> None:
    needs_package("submitit")
    from memory_bench.running.on_slurm import Slurm

    asked = jobs("rmt")
    executor = Slurm(asked[0].out, engine="local", command=command("slow"))

    def again(task: str) -> None:
        (runner,) = psutil.Process(int(task)).children()
        runner.send_signal(signal.SIGUSR2)

    threading.Thread(target=requeued, args=(executor, tmp_path, again), daemon=True).start()
    assert followed(executor, asked)[0] == {0: "ok"}
    assert attempts(tmp_path) == ["0", "0"]


@pytest.mark.cluster
def test_slurm_goes_on_after_a_requeue(
    jobs: Prepare, command: Callable[[str], tuple[str, ...]], tmp_path: Path
) -> None:
    needs_package("submitit")
    if shutil.which("sbatch") is None or "UP" not in subprocess.run(
        ["scontrol", "ping"], capture_output=True, text=True, timeout=20, check=False
    ).stdout:  # fmt: skip
        pytest.skip("no Slurm answers here (docs/clusters.md says how one is started on one machine)")
    from memory_bench.running.on_slurm import Slurm

    asked = jobs("rmt", seeds="2")
    executor = Slurm(asked[0].out, command=command("slow"))

    def again(task: str) -> None:
        subprocess.run(["scontrol", "requeue", task], timeout=20, check=True)

    threading.Thread(target=requeued, args=(executor, tmp_path, again), daemon=True).start()
    ends, _ = followed(executor, asked)
    assert ends == {0: "ok", 1: "ok"}
    assert len(attempts(tmp_path)) >= 4, "each twice"
