"""Cells from job to record: in this process, in processes of their own, killed, broken, interrupted, continued."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from memory_bench.command import commands
from memory_bench.episode import Estimate
from memory_bench.errors import UserError
from memory_bench.recipe import RECIPES, Stage
from memory_bench.record import Record
from memory_bench.report.rows import plain
from memory_bench.running.apart import Event
from memory_bench.running.executors import Inline, Local
from memory_bench.running.job import Job
from memory_bench.running.options import Options
from memory_bench.running.worker import _mark_look_ahead, run_cell
from memory_bench.store import Store

BAD = '''
from __future__ import annotations
import os, signal
from dataclasses import dataclass
import torch
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
            if self.trouble == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.trouble == "memory":
                raise MemoryError
            if self.trouble == "cuda":
                raise torch.OutOfMemoryError("CUDA out of memory")
            if self.trouble == "raise":
                raise ValueError("as I like it")
            if self.trouble == "exit":
                os._exit(7)
        return super().step(state, segment, write=write)
'''
Prepare = Callable[..., list[Job]]


@pytest.fixture
def bad(tmp_path: Path) -> str:
    (tmp_path / "bad.py").write_text(BAD)
    return f"{tmp_path}/bad.py:Bad"


def run_inline(jobs: list[Job]) -> list[Record]:
    return [event.record for event in Inline().run(jobs) if event.record is not None]


def run_here(jobs: list[Job]) -> list[Record]:
    """As `run_inline`, without the fork of this process that limits need: what is patched counts here."""
    return [run_cell(job, lambda phase, done, total: None) for job in jobs]


def numbers(records: list[Record]) -> list[Any]:
    return [(r.status, r.metrics, r.usage.train_tokens, r.usage.eval_flops, r.learned) for r in records]


def test_a_cell_has_the_same_numbers_twice(jobs: Prepare, tmp_path: Path) -> None:
    asked = jobs("hmt,mplus", "pg19,pubmedqa")
    first = run_inline(asked)
    assert [r.status for r in first] == ["ok"] * 4
    again = run_inline([replace(job, out=tmp_path / "again") for job in asked])
    assert numbers(first) == numbers(again)
    assert all(r.provenance["processor"] and r.provenance["vector_unit"] for r in first)
    for job in asked:
        one, other = (Store(folder).samples(job.cell.key) for folder in (job.out, tmp_path / "again"))
        assert one is not None
        pd.testing.assert_frame_equal(one, other)  # type: ignore[arg-type]
    facts = first[0].provenance
    assert facts["segment"] == 16
    assert first[0].usage.trained_parameters == first[0].usage.added_parameters > 0


def test_options_after_training_change_the_scoring_of_the_same_weights(jobs: Prepare) -> None:
    asked = jobs("memorizing[slots=8],memorizing[slots=8,test.slots=64],memorizing[slots=64]")
    small, enlarged, large = run_inline(asked)
    keys = [r.cell.training.key for r in (small, enlarged, large)]
    assert keys[0] == keys[1] != keys[2]
    assert small.key != enlarged.key
    assert small.usage.train_flops == enlarged.usage.train_flops > 0
    assert small.usage.state_bytes < enlarged.usage.state_bytes == large.usage.state_bytes
    assert small.metrics[0].value != enlarged.metrics[0].value


def test_look_ahead_is_that_of_the_model_as_scored(jobs: Prepare) -> None:
    official, causal = run_inline(
        jobs("hmt[recall_query=current-half],hmt[recall_query=current-half,test.recall_query=previous-half]")
    )
    assert official.look_ahead > 0 == causal.look_ahead
    assert plain(official.metrics[0].slice) != official.metrics[0].slice
    assert causal.metrics[0].slice == ""


def test_a_recipe_may_differ_for_one_model(jobs: Prepare) -> None:
    usual, cut = run_inline(jobs("rmt,rmt[train.bptt=1]"))
    assert usual.usage.train_tokens == cut.usage.train_tokens
    assert usual.metrics[0].value != cut.metrics[0].value


def test_the_mark_of_look_ahead_leaves_slices_readable() -> None:
    """A slice that loses its name beside the mark would pass for the headline of a seed."""
    for slice_ in ("", "position=0-256"):
        marked = _mark_look_ahead(Estimate("nll", 1.0, None, None, 1, slice_), 7)
        assert marked.slice.startswith("look_ahead=7")
        assert plain(marked.slice) == slice_


def test_a_job_survives_its_file(jobs: Prepare) -> None:
    (job,) = jobs("hmt[recall=false]")
    assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job


def test_training_shared_by_tasks_is_done_once(jobs: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    from memory_bench.running import going_on

    trained: list[int] = []
    original = going_on.train
    monkeypatch.setattr(going_on, "train", lambda *a, **k: (trained.append(k["seed"]), original(*a, **k))[1])
    records = run_here(jobs("rmt", "pg19,pubmedqa", seeds="2"))
    assert trained == [0, 1]
    by_seed = {r.cell.training.seed: [] for r in records}
    for r in records:
        by_seed[r.cell.training.seed].append((r.usage.train_tokens, r.usage.train_seconds, r.usage.training_ended_by))
    assert all(one == other and one[0] > 0 for one, other in by_seed.values())


def test_a_trained_model_comes_back_from_its_checkpoint(jobs: Prepare) -> None:
    asked = jobs("hmt")
    (first,) = run_inline(asked)
    (again,) = run_inline(asked)  # the checkpoint is there now
    assert numbers([first]) == numbers([again])
    assert first.provenance["curve"] == again.provenance["curve"]


@pytest.fixture
def frozen(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    """``frozen(option=…)``: a method that freezes its backbone, in a short training of a backbone that starts fresh."""
    short = replace(RECIPES["invented-studies"], stages=(Stage(segments=1, rows=4, steps=2),))
    monkeypatch.setitem(RECIPES, "invented-studies", short)
    (tmp_path / "nothing").mkdir()
    options = Options(
        "longmem", "pubmedqa", "tiny", "cpu-minutes", "1", "", tmp_path / "nothing", True, tmp_path / "out", "2",
        (), False, "inline", "", False, True, False, world.cache, False,
    )  # fmt: skip
    Store.open_or_create(tmp_path / "out")

    def job(**wrong: Any) -> Job:
        settings = tuple(f"longmem.{name}={value}" for name, value in wrong.items())
        (cell,) = commands.prepare(replace(options, settings=settings)).grid.cells
        return Job(cell, tmp_path / "out", None, world.cache, True, False, "cpu", 1)

    return job


def test_a_backbone_that_was_trained_and_frozen_comes_back_too(
    frozen: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    from memory_bench.running import going_on

    trained: list[str] = []
    original = going_on.train
    monkeypatch.setattr(going_on, "train", lambda *a, **k: (trained.append(type(a[1]).__name__), original(*a, **k))[1])
    job = frozen()
    (first,) = run_here([job])
    (again,) = run_here([job])
    assert first.status == "ok", first.detail
    assert trained == ["TruncationConfig", "LongMemConfig"]
    assert numbers([first]) == numbers([again])
    assert first.usage.train_tokens > first.provenance["curve"][0][0] > 0


def test_options_that_do_not_fit_are_found_before_anything_runs(frozen: Callable[..., Job]) -> None:
    with pytest.raises(UserError, match="use 0 to 1"):
        frozen(retrieval_layer=9)


@pytest.mark.parametrize("damage", ["weights.safetensors", "training.json"])
def test_a_broken_checkpoint_is_trained_again(damage: str, jobs: Prepare) -> None:
    asked = jobs("rmt")
    (first,) = run_inline(asked)
    folder = Store(asked[0].out).checkpoint_folder(asked[0].cell.training.key)
    (folder / damage).write_bytes(b"\x10\x00")
    (again,) = run_inline(asked)
    assert numbers([first]) == numbers([again])


def test_models_without_a_memory_run_on_a_pretrained_backbone(jobs: Prepare) -> None:
    records = run_inline(jobs("truncation,xl-cache,sliding-window,full-context"))
    assert [r.status for r in records] == ["ok"] * 4
    assert {r.usage.training_ended_by for r in records} == {"train_tokens"}
    (adapters,) = {r.usage.trained_parameters for r in records}  # the recipe's, the same for all
    assert adapters > 0
    assert {r.usage.added_parameters for r in records} == {adapters}


@pytest.mark.parametrize(
    ("limits", "detail"),
    [
        ({"eval_seconds": 1e-4}, "eval_seconds 0.0001 s, "),
        ({"device_bytes": 1000}, "device_bytes 1 kB, "),
        ({"host_bytes": 1000}, "host_bytes 1 kB, "),
        ({"added_parameters": 5}, "added_parameters 5, "),
    ],
)
def test_a_passed_limit_is_a_result(limits: dict[str, Any], detail: str, jobs: Prepare) -> None:
    (job,) = jobs("memoryllm", "pubmedqa", **limits)  # few steps: limits are also checked at a phase's end
    record = run_cell(job, lambda phase, done, total: None)
    assert record.status == "over_budget"
    assert record.detail.startswith(detail)
    stored = Store(job.out).record(job.cell.key)
    assert stored is not None
    assert (stored.status, stored.detail, stored.usage) == (record.status, record.detail, record.usage)


@pytest.mark.parametrize(
    ("trouble", "status", "detail"),
    [
        ("raise", "failed", "ValueError: as I like it"),
        ("memory", "over_budget", "device_bytes of this machine, more was asked for at optimiser step 1, segment 2/4"),
        ("cuda", "over_budget", "device_bytes of this machine, more was asked for at optimiser step 1, segment 2/4"),
        ("none", "ok", ""),
    ],
)
def test_whatever_happens_is_a_record(trouble: str, status: str, detail: str, bad: str, jobs: Prepare) -> None:
    (job,) = jobs(f"{bad}[trouble={trouble}]")
    (record,) = run_inline([job])
    line = BAD[: BAD.index("as I like it")].count("\n") + 1
    told = f" (step in bad.py line {line}; see cells/{record.key}/log.txt)" if status == "failed" else ""
    assert (record.status, record.detail) == (status, f"{detail}{told}")
    log = job.out / "cells" / record.key / "log.txt"
    assert not told or "ValueError: as I like it" in log.read_text()


def test_an_edited_model_file_is_another_cell(bad: str, jobs: Prepare) -> None:
    (before,) = jobs(bad)
    path = Path(bad.rsplit(":", 1)[0])
    path.write_text(path.read_text().replace("segment: int = 8", "segment: int = 4"))
    (after,) = jobs(bad)
    assert before.cell.key != after.cell.key
    assert before.cell.training.key != after.cell.training.key
    assert after.cell.training.model.config["segment"] == 16, "fit sizes it to the backbone"


FAKE = """
import json, os, signal, sys, time
from pathlib import Path
name, job = sys.argv[1], json.loads(Path(sys.argv[-1]).read_text())
seed = job["cell"]["training"]["seed"]
if "--prepare" in sys.argv:
    sys.exit(0)
def write():
    from memory_bench.record import Record, now, provenance
    from memory_bench.budget import Usage
    from memory_bench.cell import from_json
    from memory_bench.store import Store
    facts = provenance(device="cpu", threads=1, started=now())
    record = Record(from_json(job["cell"]), "ok", f"seed {seed}", (), Usage(), facts, None, {})
    Store(Path(job["out"])).write_record(record, None)
print(json.dumps({"phase": "eval", "done": 1, "total": 2}), flush=True)
print("no progress", b"\\xff", flush=True)
sys.stdout.buffer.write(b"\\xff\\xfe\\n"); sys.stdout.flush()
if name == "kill" and seed == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if name == "crash" and seed == 1:
    print("what happened", file=sys.stderr); sys.exit(1)
if name == "segfault" and seed == 1:
    os.kill(os.getpid(), signal.SIGSEGV)
if name == "hang" and seed == 1:
    time.sleep(60)
if name == "late-kill" and seed == 1:
    write(); os.kill(os.getpid(), signal.SIGKILL)
write()
"""


@pytest.fixture
def local(tmp_path: Path) -> Callable[[str], Local]:
    """``local(what)``: an executor whose worker does `what` in the cell of seed 1."""
    (tmp_path / "fake.py").write_text(FAKE)
    return lambda what: Local(2, command=(sys.executable, str(tmp_path / "fake.py"), what))


def follow(events: Iterator[Event]) -> dict[int, Record]:
    return {e.cell.training.seed: e.record for e in events if e.record is not None}


@pytest.mark.parametrize(
    ("what", "detail"),
    [
        ("crash", "ended with code 1 without a record; see its log.txt"),
        ("segfault", "died of signal 11"),
    ],
)
def test_a_dead_worker_is_a_record_and_the_run_goes_on(
    what: str, detail: str, jobs: Prepare, local: Callable[[str], Local]
) -> None:
    asked = jobs("rmt", seeds="3")
    records = follow(local(what).run(asked))
    assert {seed: r.status for seed, r in records.items()} == {0: "ok", 1: "failed", 2: "ok"}
    assert detail in records[1].detail
    store = Store(asked[0].out)
    stored = [store.record(job.cell.key) for job in asked]
    assert [r.detail for r in stored if r is not None] == [records[n].detail for n in range(3)]


def test_a_result_of_an_earlier_attempt_does_not_pass_for_this_ones(
    jobs: Prepare, local: Callable[[str], Local]
) -> None:
    asked = jobs("rmt", seeds="1,")
    assert follow(local("none").run(asked))[1].status == "ok"
    assert follow(local("crash").run(asked))[1].status == "failed"


def test_a_hanging_worker_is_killed_at_its_deadline(jobs: Prepare, local: Callable[[str], Local]) -> None:
    started = time.monotonic()
    records = follow(local("hang").run([replace(job, deadline=1.5) for job in jobs("rmt", seeds="1,")]))
    assert records[1].status == "over_budget"
    assert re.fullmatch(r"wall_seconds 1\.5 s, 1\.[5-9]\d* s at the start", records[1].detail), records[1].detail
    assert time.monotonic() - started < 30


def test_progress_comes_through_and_noise_does_not(jobs: Prepare, local: Callable[[str], Local]) -> None:
    phases = [(e.phase, e.done, e.total) for e in local("none").run(jobs("rmt"))]
    assert phases == [("backbone", 0, 1), ("start", 0, 1), ("eval", 1, 2), ("record", 0, 1)]


def test_what_is_stopped_leaves_no_record_and_no_process(jobs: Prepare, local: Callable[[str], Local]) -> None:
    asked = jobs("rmt", seeds="0,1")
    executor, store = local("hang"), Store(asked[0].out)
    with closing(executor.run(asked)) as events:
        assert next(e.record for e in events if e.record is not None).status == "ok"
        workers = list(executor._running.values())
    assert [w.wait(timeout=10) for w in workers] == [-signal.SIGKILL]
    deadline = time.monotonic() + 10
    while executor._running and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)  # the thread that waited for the worker is about to end
    assert store.record(asked[0].cell.key) is not None
    assert store.record(asked[1].cell.key) is None


def test_cells_of_one_training_wait_for_each_other(jobs: Prepare, local: Callable[[str], Local]) -> None:
    asked = jobs("rmt", "pg19,pubmedqa")
    assert len({job.cell.training.key for job in asked}) == 1
    order = [(e.phase, e.cell.task.name) for e in local("none").run(asked) if e.phase in ("start", "record")]
    assert order == [("start", "pg19"), ("record", "pg19"), ("start", "pubmedqa"), ("record", "pubmedqa")]


def command(world: Any, out: Path, *more: str) -> list[str]:
    given = [
        sys.executable,
        "-m",
        "memory_bench.cli",
        "run",
        *world.arguments("--out", str(out), "--executor", "local"),
    ]
    return [*given, "--no-controls", *more]


@pytest.mark.slow
def test_a_killed_model_does_not_take_the_run_down(world: Any, tmp_path: Path, bad: str) -> None:
    out = tmp_path / "out"
    models = f"{bad},{bad}[trouble=raise],{bad}[trouble=memory],rmt"
    environment = {**os.environ, **world.environment()}
    arguments = command(world, out, "--models", models, "--tasks", "pg19")
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    records = {r.cell.label: r for r in Store(out).records()}
    assert {label: r.status for label, r in records.items()} == {
        "bad[trouble=raise]": "failed",
        "bad[trouble=memory]": "over_budget",
        "rmt": "ok",
    }
    assert "was ended from outside (SIGKILL). The same command goes on." in done.stderr
    assert "as I like it" in Store(out).log_path(records["bad[trouble=raise]"].key).read_text()


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_numbers(world: Any, tmp_path: Path) -> None:
    environment = {**os.environ, **world.environment()}
    more = ["--models", "rmt,hmt", "--tasks", "pg19,pubmedqa"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    subprocess.run(command(world, whole, *more), env=environment, capture_output=True, check=True, timeout=300)
    running = subprocess.Popen(command(world, parts, *more), env=environment, stderr=subprocess.PIPE, text=True)
    while not list(parts.glob("cells/*/record.json")):
        assert running.poll() is None
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=30)
    assert running.returncode == 130
    assert "the same command continues" in said
    assert "Traceback" not in said
    done = {p.parent.name: p.stat().st_mtime for p in parts.glob("cells/*/record.json")}
    assert 1 <= len(done) < 4
    subprocess.run(command(world, parts, *more), env=environment, capture_output=True, check=True, timeout=300)
    after = {p.parent.name: p.stat().st_mtime for p in parts.glob("cells/*/record.json")}
    assert len(after) == 4
    assert all(after[key] == when for key, when in done.items())
    measured = ["seconds", "per_second", "peak_"]
    one, other = (pd.read_csv(folder / "leaderboard.csv") for folder in (whole, parts))
    kept = [c for c in one.columns if not any(part in c for part in measured)]
    pd.testing.assert_frame_equal(one[kept], other[kept])
    assert len(one) > 10
