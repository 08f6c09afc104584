"""Runs that are disturbed: parents that die, machines that fail, results that are replaced, two commands at once."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from memory_bench.budget import BudgetExceeded, Usage
from memory_bench.command import commands
from memory_bench.errors import MachineError
from memory_bench.running import faults, going_on, obituary, worker
from memory_bench.running.apart import Event
from memory_bench.running.executors import Inline, Local
from memory_bench.running.job import Job
from memory_bench.store import Store

ROOT = Path(__file__).parent.parent
SIGNALS = [signal.SIGKILL, signal.SIGHUP, signal.SIGQUIT]
Prepare = Callable[..., list[Job]]

BAD = '''
from __future__ import annotations
import errno, os, signal
from dataclasses import dataclass
from memory_bench.zoo.pretrain import Window

@dataclass(frozen=True, slots=True)
class BadConfig:
    segment: int = 8
    trouble: str = "kill"

class Bad(Window):
    """A model that comes to grief in its second step."""
    Config = BadConfig
    def __init__(self, backbone, config, rng):
        super().__init__(backbone, config)
        self.trouble, self.steps = config.trouble, 0
    def step(self, state, segment, *, write=True):
        self.steps += 1
        if self.steps == 2:
            if self.trouble.startswith("E"):
                number = getattr(errno, self.trouble)
                raise OSError(number, os.strerror(number))
            if self.trouble in ("SIGKILL", "SIGTERM"):
                os.kill(os.getpid(), getattr(signal, self.trouble))
            if self.trouble == "missing":
                open("/nowhere/mine.bin")
            if self.trouble == "torch":
                raise RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 192 vs 86")
        return super().step(state, segment, write=write)
'''
# A command: starts a worker, which starts a child in a session of its own, and waits for both.
PARENT = """
import sys, subprocess, time
from pathlib import Path
from memory_bench.running.orphans import watch
from memory_bench.running.processes import start

def child():
    code = "import time; time.sleep(60)"
    pid = subprocess.Popen([sys.executable, "-c", code], start_new_session=True).pid
    Path(sys.argv[2]).write_text(str(pid))
    time.sleep(60)

def fork(told):
    watch()
    child()

if sys.argv[1] == "child":
    watch()
    child()
program = [sys.executable, __file__, "child", sys.argv[2]]
with start(fork if sys.argv[1] == "fork" else program, inside=Path(sys.argv[3])) as worker:
    print(worker.pid, flush=True)
    worker.wait()
"""


@pytest.fixture
def bad(tmp_path: Path) -> str:
    """A model file; its option ``trouble`` says what goes wrong."""
    (tmp_path / "bad.py").write_text(BAD)
    return f"{tmp_path}/bad.py:Bad"


def eventually(true: Callable[[], bool], seconds: float = 3.0) -> bool:
    until = time.monotonic() + seconds
    while not true():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True


@pytest.mark.parametrize("form", ["program", "fork"])
def test_a_worker_ends_with_its_parent_and_takes_along_what_it_started(form: str, tmp_path: Path) -> None:
    script, note, place = tmp_path / "parent.py", tmp_path / "pid", tmp_path / "place"
    script.write_text(PARENT)
    place.mkdir()
    with subprocess.Popen(
        [sys.executable, str(script), form, str(note), str(place)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert eventually(lambda: note.is_file() and note.read_text() != "", 60)
        child = int(note.read_text())
        assert not gone(pid)
        assert not gone(child)
        parent.kill()
    assert eventually(lambda: gone(pid) and gone(child)), "3 s later nothing lives"
    assert eventually(lambda: not list(place.iterdir())), "its folder is gone too"


def test_a_worker_started_by_hand_watches_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    from memory_bench.running import orphans

    monkeypatch.delenv(orphans.PARENT, raising=False)
    before = threading.active_count()
    orphans.watch()
    assert threading.active_count() == before


def test_a_worker_to_which_nobody_listens_leaves_without_a_record(
    jobs: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def write(self, text: str) -> None:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    class Left(BaseException):
        pass

    def leave() -> None:
        raise Left

    monkeypatch.setattr(worker, "leave", leave)
    (job,) = jobs("rmt")
    with pytest.raises(Left):
        worker.carry_out(job, Broken())  # type: ignore[arg-type]
    assert Store(job.out).record(job.cell.key) is None


def command(world: Any, out: Path, *more: str) -> list[str]:
    given = world.arguments("--out", str(out), "--executor", "local", "--quiet")
    asked = ["--models", "rmt", "--tasks", "pg19", "--seeds", "1", "--no-controls"]
    return [sys.executable, "-m", "memory_bench", "run", *asked, *given, *more]


def numbers(out: Path) -> list[Any]:
    return [(r.key, r.status, r.metrics, r.usage.train_tokens) for r in Store.open(out).records()]


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_command_that_ends_in_the_middle_leaves_no_worker_and_no_result(
    number: signal.Signals, world: Any, tmp_path: Path
) -> None:
    environment = {**os.environ, **world.environment(), "OMP_NUM_THREADS": "1"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    subprocess.run(command(world, whole), env=environment, check=True, capture_output=True, timeout=300)
    with subprocess.Popen(command(world, parts), env=environment, stderr=subprocess.PIPE) as running:
        place = psutil.Process(running.pid)
        assert eventually(lambda: any("entry" in " ".join(p.cmdline()) for p in place.children()), 120)
        workers = [p.pid for p in place.children(recursive=True)]
        running.send_signal(number)
        running.communicate(timeout=60)
    assert eventually(lambda: all(gone(pid) for pid in workers))
    assert Store.open(parts).records() == []
    done = subprocess.run(command(world, parts), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert numbers(parts) == numbers(whole)


def test_a_hangup_is_taken_like_ctrl_c_and_ignored_where_it_was() -> None:
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        with commands._terminable():
            os.kill(os.getpid(), signal.SIGHUP)
        for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
            with pytest.raises(KeyboardInterrupt), commands._terminable():
                os.kill(os.getpid(), number)
            assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def safetensors_error(text: str) -> Exception:
    return type("SafetensorError", (Exception,), {})(text)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        *((OSError(n, os.strerror(n)), text) for n, text in faults.REASONS.items()),
        (
            safetensors_error("Error while serializing: I/O error: No space left on device (os error 28)"),
            "disk is full",
        ),
        (OSError("Error writing bytes to file. Detail: [errno 28] No space left on device"), "disk is full"),
        (RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 192 vs 86"), "written whole"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "written whole"),
        (Exception("Read-only file system (os error 30)"), "read-only"),
        (PermissionError(errno.EACCES, "Permission denied", "/run/out/cells/a/record.json"), "not permitted"),
        (PermissionError(errno.EACCES, "Permission denied", "/cache/backbones/tiny.lock"), "not permitted"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/cache/encoded/x.safetensors"), "somebody removed"),
        (MachineError("Cannot write to /run/out: the disk is full."), "the disk is full"),
    ],
    ids=str,
)
def test_the_machines_fault_is_known_in_every_costume(error: Exception, said: str) -> None:
    ours = (Path("/run/out"), Path("/cache"))
    assert said in faults.fault(error, ours)
    wrapped = ValueError("my model could not write")
    wrapped.__cause__ = error
    assert said in faults.fault(wrapped, ours)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file", "/home/me/weights.bin"),
        PermissionError(errno.EACCES, "Permission denied", "/home/me/weights.bin"),
        PermissionError(errno.EACCES, "Permission denied", "/cache-of-mine/weights.bin"),
        ValueError("No space left on device in my ring"),
        KeyError("Input/output error"),
        RuntimeError("shapes do not match"),
        safetensors_error("Error while deserializing header: HeaderTooSmall"),
        BudgetExceeded("host_bytes", 1, 2, ""),
    ],
    ids=str,
)
def test_a_plug_ins_own_mistake_is_not_the_machines(error: Exception) -> None:
    assert faults.fault(error, (Path("/run/out"), Path("/cache"))) == ""


def ends(events: list[Event]) -> list[str]:
    return [e.notice if e.record is None else f"{e.record.status} {e.record.detail}" for e in events if e.ends]


@pytest.mark.parametrize(
    ("trouble", "why"),
    [
        ("ENOSPC", "the disk is full"),
        ("ESTALE", "a network folder went away"),
        ("EMFILE", "too many files are open"),
        ("torch", "a file could not be written whole"),
        ("SIGKILL", "its process was ended from outside (SIGKILL)"),
        ("SIGTERM", "its process was ended from outside (SIGTERM)"),
    ],
)
def test_what_the_machine_does_to_a_cell_is_no_result(trouble: str, why: str, bad: str, jobs: Prepare) -> None:
    asked = jobs(f"{bad}[trouble={trouble}]") + jobs(f"{bad}[trouble=none]")
    told = ends(list(Inline().run([replace(job, deadline=300.0) for job in asked])))
    title = asked[0].cell.title
    assert told[0] == f"{title} has no result, by no fault of its own: {why}. The same command goes on."
    assert told[1] == "ok ", "the run goes on"
    assert Store(asked[0].out).record(asked[0].cell.key) is None


def test_a_plug_ins_own_missing_file_is_its_result(bad: str, jobs: Prepare) -> None:
    (said,) = ends(list(Inline().run(jobs(f"{bad}[trouble=missing]"))))
    assert said.startswith("failed FileNotFoundError: [Errno 2] No such file or directory: '/nowhere/mine.bin'")


FAKE = """
import json, os, signal, sys
from pathlib import Path
what, job = sys.argv[1], json.loads(Path(sys.argv[-1]).read_text())
seed = job["cell"]["training"]["seed"]
if "--prepare" in sys.argv:
    sys.exit(0) if what != "prepare" else os.kill(os.getpid(), signal.SIGKILL)
def write():
    from memory_bench.record import Record, now, provenance
    from memory_bench.budget import Usage
    from memory_bench.cell import from_json
    from memory_bench.store import Store
    facts = provenance(device="cpu", threads=1, started=now())
    record = Record(from_json(job["cell"]), "ok", f"process {os.getpid()}", (), Usage(), facts, None, {})
    Store(Path(job["out"])).write_record(record, None)
if seed == 1 and what == "late":
    write()
if seed == 1 and what in ("kill", "late"):
    os.kill(os.getpid(), signal.SIGKILL)
if seed == 1 and what == "told":
    print(json.dumps({"lost": "the disk is full"}), flush=True); sys.exit(75)
if seed == 1 and what == "log":
    raise OSError(28, "No space left on device")
write()
"""


@pytest.fixture
def local(tmp_path: Path) -> Callable[[str], Local]:
    """``local(what)``: an executor whose worker does `what` in the cell of seed 1."""
    (tmp_path / "fake.py").write_text(FAKE)
    return lambda what: Local(1, command=(sys.executable, str(tmp_path / "fake.py"), what))


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("kill", "its process was ended from outside (SIGKILL)"),
        ("told", "the disk is full"),
        ("log", "the disk is full"),
    ],
)
def test_a_lost_worker_frees_its_training_and_the_run_goes_on(
    what: str, why: str, jobs: Prepare, local: Callable[[str], Local]
) -> None:
    asked = jobs("rmt", "pg19,pubmedqa", seeds="1,0")
    told = ends(list(local(what).run(asked)))
    assert len([end for end in told if f": {why}. The same command goes on." in end]) == 2, told
    assert len([end for end in told if end.startswith("ok ")]) == 2
    store = Store(asked[0].out)
    done = {job.cell.training.seed for job in asked if store.record(job.cell.key) is not None}
    assert done == {0}
    assert all(end.startswith("ok ") for end in ends(list(local("none").run(asked))))


def test_a_kill_of_the_system_for_want_of_memory_is_a_limit(
    jobs: Prepare, local: Callable[[str], Local], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(obituary, "oom_kills", lambda: 10**9)  # more than when the watcher began
    (job,) = jobs("rmt", seeds="1,")
    assert [end.split()[0] for end in ends(list(local("kill").run([job])))] == ["over_budget"]


def test_what_a_training_spent_is_charged_to_a_cell_that_was_ended_after_it(jobs: Prepare, tmp_path: Path) -> None:
    (job,) = jobs("rmt", seeds="1,")
    assert [end.split()[0] for end in ends(list(Inline().run([job])))] == ["ok"]
    store, key = Store(job.out), job.cell.training.key
    record = store.record(job.cell.key)
    assert record is not None
    seen = Usage(eval_seconds=3.0, peak_device_bytes=10**12, train_seconds=10.0**6)
    charged = obituary.with_training(seen, store, key)
    own = record.usage
    assert (charged.train_tokens, charged.train_flops, charged.train_seconds) == (
        own.train_tokens, own.train_flops, own.train_seconds,
    )  # fmt: skip
    assert charged.train_tokens > 0
    assert (charged.eval_seconds, charged.peak_device_bytes) == (3.0, 10**12)
    facts = store.checkpoint_folder(key) / "training.json"
    facts.write_text(facts.read_text(encoding="utf-8").replace('"train_tokens"', '"train_token"'), encoding="utf-8")
    assert obituary.with_training(seen, store, key) == seen


def test_a_record_that_was_whole_before_the_kill_counts(jobs: Prepare, local: Callable[[str], Local]) -> None:
    assert [end.split()[0] for end in ends(list(local("late").run(jobs("rmt", seeds="1,"))))] == ["ok"]


def test_a_killed_preparation_loses_its_cells_and_nothing_else(jobs: Prepare, local: Callable[[str], Local]) -> None:
    asked = jobs("rmt", seeds="2")
    told = ends(list(local("prepare").run(asked)))
    assert len(told) == 2
    assert all("the backbone's preparation was ended from outside (SIGKILL)" in end for end in told)


def test_a_full_disk_is_said_once_ends_with_1_and_the_same_command_goes_on(
    invoke: Any, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memory_bench import store as module

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    asked = (
        "run",
        "--models",
        "rmt",
        "--tasks",
        "pg19",
        "--seeds",
        "2",
        "--no-controls",
        "--out",
        str(tmp_path / "out"),
    )
    with monkeypatch.context() as patched:
        patched.setattr(module, "to_parquet", full)
        code, _, said = invoke(*asked, *world.arguments())
    assert code == 1
    assert said.count("by no fault of its own: the disk is full. The same command goes on.") == 1, said
    assert "Traceback" not in said
    assert Store(tmp_path / "out").records() == []
    assert invoke(*asked, *world.arguments())[0] == 0
    assert [r.status for r in Store(tmp_path / "out").records()] == ["ok", "ok"]


def test_what_is_made_again_stays_until_the_new_one_is_whole(
    invoke: Any, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    asked = ("run", "--models", "rmt", "--tasks", "pg19", "--seeds", "1", "--no-controls", "--out", str(out))
    assert invoke(*asked, *world.arguments())[0] == 0
    store = Store.open(out)
    (record,) = store.records()
    stamps = store.stamp(record.key), store.checkpoint_stamp(record.cell.training.key)

    def killed(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patched:
        patched.setattr(worker, "observe", killed)
        patched.setattr(going_on, "save_checkpoint", lambda *_, **__: None)
        assert invoke(*asked, *world.arguments("--force"))[0] == 1
    assert (store.stamp(record.key), store.checkpoint_stamp(record.cell.training.key)) == stamps
    assert invoke(*asked, *world.arguments("--force"))[0] == 0
    assert store.stamp(record.key) != stamps[0]
    assert store.checkpoint_stamp(record.cell.training.key) != stamps[1], "one of before the command does not count"
    assert [r.metrics for r in store.records()] == [record.metrics]


@pytest.mark.parametrize("executor", ["inline", "local"])
def test_a_cell_that_another_command_is_at_is_waited_for_and_taken(
    executor: str, jobs: Prepare, local: Callable[[str], Local]
) -> None:
    asked = [replace(job, before="") for job in jobs("rmt", seeds="2")]
    store, other, told = Store(asked[0].out), local("none"), []
    (made,) = (e.record for e in local("none").run(asked[:1]) if e.record is not None)
    record_file = store.cell_folder(made.key) / "record.json"
    content = record_file.read_bytes()
    record_file.unlink()
    held = store.lock(made.key)
    held.acquire()
    run = Inline() if executor == "inline" else other
    thread = threading.Thread(target=lambda: told.extend(run.run(asked)))
    thread.start()
    assert eventually(lambda: any(e.record is not None for e in told), 120), "the other cell goes on meanwhile"
    assert [e.cell.key for e in told if e.record is not None] == [asked[1].cell.key]
    record_file.write_bytes(content)
    held.release()
    thread.join(60)
    assert [(e.record.key, e.record.detail) for e in told if e.record is not None][1:] == [(made.key, made.detail)]
    with store.lock(made.key).acquire(timeout=0):
        pass  # given back


def test_the_job_file_holds_what_a_worker_must_know(jobs: Prepare) -> None:
    job = replace(jobs("rmt")[0], before="a", superseded={"key": "b"})
    assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job
