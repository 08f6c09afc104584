"""Models that overspend in every way are stopped, by the limit that they passed, and nobody else is harmed."""

import errno
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from memory_bench.budget import load_budget
from memory_bench.driver.beacon import Place
from memory_bench.driver.clock import Lent
from memory_bench.driver.memory import resident
from memory_bench.running import fence, processes
from memory_bench.running.executors import Executor, Inline, Local
from memory_bench.running.fence import Cgroup
from memory_bench.running.guard import Bounds, Guard
from memory_bench.running.held import children_bytes, resident_bytes
from memory_bench.running.job import Job
from memory_bench.running.processes import start
from memory_bench.running.refusals import refused
from memory_bench.running.starting import warm_up
from memory_bench.running.stored import Files

SCRIPTS = Path(__file__).resolve().parent.parent / "benchmarks"
REFUSED = ("ones", "fill", "numpy", "private")  # before anything is touched
Run = Callable[..., Any]


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.delitem(sys.modules, "limits", raising=False)
    return importlib.import_module("limits")


@pytest.fixture
def overspend(limits: ModuleType, jobs: Callable[[str], list[Job]], tmp_path: Path) -> Run:
    """``overspend(executor, cases)``: their rows by title, after a well-behaved cell has been run beside them."""

    def run(executor: Executor, cases: list[Any]) -> dict[str, Any]:
        warm_up()
        made = limits.prepared(cases, tmp_path, jobs, resident().now)
        before = {p.pid for p in psutil.Process().children(recursive=True)}
        found = {row.case.title + row.case.limit: row for row in limits.rows(cases, made, executor)}
        assert len(found) == len(cases)
        left = {p.pid for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE}
        assert left <= before
        (good,) = jobs(f"{tmp_path}/over.py:Over")
        with closing(executor.run([good])) as events:
            (record,) = [e.record for e in events if e.record is not None]
        assert (record.status, record.detail) == ("ok", "")
        return found

    return run


def check(row: Any) -> None:
    """Stopped by the right limit, not far above it, at a place."""
    assert row.status == "over_budget", row
    assert row.detail.startswith(f"{row.case.limit} "), row
    assert "segment" in row.detail, row
    assert row.ratio <= (1.2 if row.case.limit.endswith("_seconds") else 1.05), row
    if row.case.limit == "device_bytes" and row.case.way in REFUSED:
        assert "more was asked for" in row.detail, row


def test_every_way_of_overspending_is_stopped_inline(limits: ModuleType, overspend: Run) -> None:
    for row in overspend(Inline(), list(limits.CASES)).values():
        check(row)


def test_a_process_of_its_own_is_stopped_alike(limits: ModuleType, overspend: Run) -> None:
    ways = [("grow", "device_bytes"), ("ones", "device_bytes"), ("session", "device_bytes"), ("sleep", "train_seconds")]
    cases = [next(c for c in limits.CASES if (c.way, c.limit) == chosen) for chosen in ways]
    for row in overspend(Local(2), cases).values():
        check(row)


@pytest.mark.slow
def test_every_way_is_stopped_in_a_process_of_its_own(limits: ModuleType, overspend: Run) -> None:
    for row in overspend(Local(2), list(limits.CASES)).values():
        check(row)


def test_without_a_cgroup_children_are_stopped_too(
    limits: ModuleType, overspend: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cgroup, "make", classmethod(lambda cls, pid: None))
    cases = [c for c in limits.CASES if c.way in ("grow", "ones", "shared", "session") and c.limit == "device_bytes"]
    for row in overspend(Inline(), cases).values():
        assert row.status == "over_budget", row
        assert row.detail.startswith("device_bytes 150 MB, "), row


def test_equal_cells_are_charged_alike(jobs: Callable[[str], list[Job]], tmp_path: Path) -> None:
    """In a fork, one after the other: what the first left behind is not the second's."""
    (job,) = jobs("truncation")
    peaks = []
    for name in ("one", "other", "third"):
        again = replace(job, out=tmp_path / name)
        with closing(Inline().run([again])) as events:
            (record,) = [e.record for e in events if e.record is not None]
        assert record.status == "ok", record.detail
        peaks.append(record.usage.peak_device_bytes)
    assert max(peaks) - min(peaks) <= max(0.02 * max(peaks), 1_000_000), peaks
    assert max(peaks) < 100_000_000, "libraries are charged"


@pytest.mark.parametrize(
    ("error", "says_so"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("unable to mmap 800 bytes from file </x>: Cannot allocate memory (12)"), True),
        (RuntimeError("can't start new thread"), True),  # whose stack has no room
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("the pool is out of memory slots"), False),
        (ValueError("std::bad_alloc"), False),
        (KeyError("memory"), False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_says_that_memory_was_refused(error: BaseException, says_so: bool) -> None:
    assert refused(error) is says_so
    wrapped = ValueError("the step failed")
    wrapped.__cause__ = error
    assert refused(wrapped) is says_so
    wrapped = ValueError("while it was handled")
    wrapped.__context__ = error
    assert refused(wrapped) is says_so
    wrapped.__suppress_context__ = True  # from None
    assert refused(wrapped) is says_so


ORPHAN = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print("told", flush=True)
"""


def test_what_a_worker_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    with start([sys.executable, "-c", ORPHAN], inside=tmp_path) as worker:
        bounds = Bounds(load_budget("smoke"), "cpu", 60.0)
        with Guard(worker, bounds) as guard:
            assert worker.process.stdout is not None
            began = time.monotonic()
            assert worker.process.stdout.read() == "told\n"  # to its end: nobody holds it open any more
            assert worker.wait() == 0
        assert time.monotonic() - began < 20
        assert guard.judged() is None
        folder = worker.folder
    assert not folder.exists()
    assert not list(tmp_path.iterdir())


def test_nothing_is_begun_before_it_is_watched(tmp_path: Path) -> None:
    """A quick model would else ask for its memory before anything stands around it."""
    told = Place("train", "segment 1/2", held=10**8)
    with start([sys.executable, "-c", "import time; time.sleep(60)"], inside=tmp_path) as worker:
        worker.beacon.tell(told)
        began = time.monotonic()
        worker.beacon.await_watcher(0.3)
        assert time.monotonic() - began >= 0.3, "nobody watches"
        with Guard(worker, Bounds(load_budget("smoke"), "cpu", 60.0)) as guard:
            began = time.monotonic()
            worker.beacon.await_watcher(20.0)
            assert time.monotonic() - began < 10
            assert guard.looks
        assert worker.beacon.read() == told, "what is told stays whole"


def test_a_worker_has_a_folder_of_its_own_and_a_beacon(tmp_path: Path) -> None:
    code = (
        "import tempfile; from memory_bench.driver.beacon import Place; from memory_bench.running import processes\n"
        "processes.own_beacon().tell(Place('eval', 'segment 3/9')); print(tempfile.gettempdir())"
    )
    with start([sys.executable, "-c", code], inside=tmp_path) as worker:
        assert worker.process.stdout is not None
        assert Path(worker.process.stdout.read().strip()) == worker.temporary
        assert worker.wait() == 0
        assert worker.beacon.read() == Place("eval", "segment 3/9")
    assert processes.own_beacon() is None


VFORK = """
import ctypes, sys, time
held = bytearray(60_000_000); held[::4096] = b"x" * len(held[::4096])
libc = ctypes.CDLL(None)
print("told", flush=True)
if libc.vfork() == 0:
    libc.sleep(2)
    libc._exit(0)
"""


def test_a_child_that_still_runs_in_its_parents_memory_holds_nothing(tmp_path: Path) -> None:
    """``subprocess`` starts programs so; on a busy machine it takes a while, and was charged as a second worker."""
    with start([sys.executable, "-c", VFORK], inside=tmp_path) as worker:
        assert worker.process.stdout is not None
        assert worker.process.stdout.readline() == "told\n"
        deadline = time.monotonic() + 5
        while not (children := worker.members() - {worker.pid}) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert children
        assert children_bytes(worker.pid, resident_bytes(worker.pid)[0], children)[0] < 5_000_000


FILES = """
import os, sys, tempfile
kept = [tempfile.TemporaryFile(), open(sys.argv[1], "wb"), open(sys.argv[2], "wb")]
os.unlink(sys.argv[1])
print("began", flush=True)
sys.stdin.readline()
for file in kept:
    file.write(b"x" * 3_000_000); file.flush()
print("told", flush=True)
sys.stdin.readline()
"""


def test_files_without_a_name_count_while_they_are_open(tmp_path: Path) -> None:
    """One that was made nameless in its own folder, one that was deleted elsewhere, one with a name; each once."""
    beside = tmp_path / "beside"
    beside.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", FILES, str(tmp_path / "gone"), str(tmp_path / "named")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(beside)},
    )  # fmt: skip
    worker: Any = SimpleNamespace(pid=process.pid, folder=beside, temporary=beside)
    files = Files(worker, [])
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "began\n"
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "told\n"
    files.find([], begun=True, maps=True)
    files.measure()
    assert 9_000_000 <= files.bytes < 9_500_000
    process.communicate("\n")
    files.find([], begun=True, maps=True)
    files.measure()
    assert 3_000_000 <= files.bytes < 3_200_000


def test_what_children_compute_is_spent_in_the_phase_in_which_they_do() -> None:
    """Alive or ended; what one computed before a phase is none of it, though it ends in it."""
    burn = (
        "import sys, time\nfor _ in sys.stdin:\n    end = time.process_time() + 0.3\n"
        "    while time.process_time() < end: pass\n    print(flush=True)"
    )
    lent = Lent(os.getpid())
    lent.look("train", [])
    child = subprocess.Popen([sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None

    def work() -> None:
        child.stdin.write("\n")  # type: ignore[union-attr]
        child.stdin.flush()  # type: ignore[union-attr]
        child.stdout.readline()  # type: ignore[union-attr]

    work()
    assert 0.25 < lent.look("train", [child.pid]) < 1.0
    assert lent.look("eval", [child.pid]) == pytest.approx(0.0, abs=0.1)
    work()
    assert 0.25 < lent.look("eval", [child.pid]) < 0.5
    child.communicate()
    assert 0.25 < lent.look("eval", []) < 0.5
    assert 0.25 < lent.look("train", []) < 1.0


def test_groups_that_killed_runs_have_left_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, own, others = (tmp_path / f"memory-bench-{name}" for name in (f"{ended.pid}-0", f"{os.getpid()}-9", "mine"))
    for folder in (left, own, others):
        folder.mkdir()
    monkeypatch.setattr(fence, "_bases", lambda: [(tmp_path, fence.V1)])
    assert Cgroup.make(os.getpid()) is None  # there is no file for a limit in it
    assert {path.name for path in tmp_path.iterdir()} == {own.name, others.name}
