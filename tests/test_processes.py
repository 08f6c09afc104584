"""Several processes that train one model are one: the same gradients, one record, and one end for all."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from sharing import trained
from torch import Tensor

from memory_bench import plugins
from memory_bench.budget import Budget, BudgetExceeded, Usage
from memory_bench.cell import from_json, to_json
from memory_bench.command.jobs import workers_for
from memory_bench.corpus import Line
from memory_bench.driver.backward import counts
from memory_bench.driver.meter import Meter
from memory_bench.driver.others import Others, Spending
from memory_bench.driver.peers import Peers
from memory_bench.errors import MachineError, UserError
from memory_bench.gate.lines import setting
from memory_bench.record import Record
from memory_bench.report.grouping import _identity, labels
from memory_bench.running.cluster import absolute, needs
from memory_bench.running.executors import Local
from memory_bench.running.options import parse_processes
from memory_bench.running.ranks import Ranks
from memory_bench.store import Store
from memory_bench.testing import card_of, tiny_backbone
from synthetic import make_cell

HERE = Path(__file__).parent
EXACT = 1e-4  # of a gradient's largest number: float32 rounds each sum by 6e-8 of it, in another order and depth
NEAR = 2e-5  # of a weight after six steps of at most 3e-3: Adam divides by a gradient's size, tiny ones' rounding too
TEXT: list[dict[str, Any]] = [{"model": name, "rows": 4, "steps": 6} for name in ("rmt", "hmt", "mplus")]
LINES = {"corpus": "lines", "steps": 4}
TWO: dict[str, dict[str, Any]] = {
    **{what["model"]: what for what in TEXT},
    "rows that cannot be halved": {"model": "rmt", "rows": 5, "steps": 4},
    "lines of unequal length": {"model": "hmt", "rows": 5, **LINES},
    "a loss over all rows": {"model": "mplus", "rows": 5, **LINES},
    "computed again": {"model": "mplus", "rows": 5, **LINES, "recipe": {"checkpoint": True, "bptt": 2}},
    "uneven segments": {"model": "rmt", "rows": 4, "steps": 4, "recipe": {"shortest": 0.5}},
    "one row": {"model": "rmt", "rows": 1, "steps": 3},
}
EVERY: dict[str, dict[str, Any]] = {
    name: {"model": name, "rows": 3, "steps": 2, "segments": 2} for name in sorted(plugins.installed("models"))
}
WRONG: dict[str, dict[str, Any]] = {
    "error": {"model": "rmt", "rows": 4, "steps": 6, "spoil": "error"},
    "dropout": {"model": "rmt", "rows": 4, "steps": 6, "spoil": "dropout"},
    "limit": {"model": "rmt", "rows": 4, "steps": 6, "limits": {"train_seconds": 1e-6, "train_tokens": 10**6}},
    "after all": {"model": "rmt", "rows": 2, "steps": 2},
}


NOT_HERE = {
    "memoryprompt": "UserError: MemoryPrompt has a loss of its own over whole batches, which is another one for a part "
    "of the rows: leave out --processes."
}


def can_join() -> str:
    """Why processes cannot find each other here; empty: they can."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        return "this torch has no gloo"
    try:
        torch.distributed.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    except RuntimeError as error:
        return f"nothing can listen on the loopback here: {error}"
    return ""


pytestmark = pytest.mark.skipif(bool(can_join()), reason=can_join() or "gloo works")


def together(whats: list[dict[str, Any]], size: int, out: Path) -> "list[subprocess.Popen[bytes]]":
    """The processes of these trainings, started."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
    command = [sys.executable, str(HERE / "sharing.py")]
    started = [
        subprocess.Popen([*command, str(rank), str(size), str(store.port), str(out), json.dumps(whats)])
        for rank in range(size)
    ]
    started[0].store = store  # type: ignore[attr-defined]
    return started


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What came of all trainings by two processes, by their numbers and the process's."""
    out = tmp_path_factory.mktemp("two")
    for process in together([*TWO.values(), *WRONG.values(), *EVERY.values()], 2, out):
        assert process.wait(1500) == 0
    return out


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By three, of which the third has no row."""
    out = tmp_path_factory.mktemp("three")
    for process in together([{**TWO["mplus"], "rows": 2}], 3, out):
        assert process.wait(1500) == 0
    return out


def facts(out: Path, number: int, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / f"{number}-{rank}.json").read_text())
    return found


def agree(out: Path, number: int, size: int, what: dict[str, Any]) -> None:
    """Process by process, and with one process."""
    one, told = trained(what, None)
    many = [load_file(out / f"{number}-{rank}.safetensors") for rank in range(size)]
    assert all(torch.equal(many[0][name], other[name]) for other in many for name in many[0]), "all hold the same"
    assert one.keys() == many[0].keys()
    assert any(name.startswith("grad.") for name in one) == bool(told["steps"])
    for name, tensor in one.items():
        apart = (many[0][name] - tensor).abs().max() if tensor.numel() else torch.zeros(())
        bound = EXACT * float(tensor.abs().max()) + 1e-9 if name.startswith("grad.") else NEAR
        assert float(apart) <= bound, (name, float(apart), bound)
    seen = facts(out, number)
    for name in ("tokens", "flops", "steps", "ended_by"):
        assert seen[name] == told[name], name
    assert [tokens for tokens, _ in seen["curve"]] == [tokens for tokens, _ in told["curve"]]
    for (_, mine), (_, other) in zip(seen["curve"], told["curve"], strict=True):
        assert mine == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("name", TWO)
def test_two_processes_train_as_one(name: str, two: Path) -> None:
    agree(two, list(TWO).index(name), 2, TWO[name])


@pytest.mark.parametrize("name", EVERY)
def test_every_model_can_be_divided(name: str, two: Path) -> None:
    number = len(TWO) + len(WRONG) + list(EVERY).index(name)
    assert facts(two, number).get("error") == facts(two, number, 1).get("error") == NOT_HERE.get(name)
    if name not in NOT_HERE:
        agree(two, number, 2, EVERY[name])


def test_of_three_one_may_have_no_row(three: Path) -> None:
    agree(three, 0, 3, {**TWO["mplus"], "rows": 2})


def test_seconds_of_both_are_charged(two: Path) -> None:
    first, second = (facts(two, 0, rank) for rank in range(2))
    assert first["others"] > 0
    assert first["seconds"] > first["others"]
    assert first["others"] <= second["seconds"] * 1.0001


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("error", "ValueError: the model is broken there"),
        ("dropout", "UserError: RMT draws random numbers that are not its rows' own"),
        ("limit", "BudgetExceeded: train_seconds 1e-06 s"),
    ],
)
def test_an_error_of_one_is_that_of_all(name: str, says: str, two: Path) -> None:
    number = len(TWO) + list(WRONG).index(name)
    for rank in range(2):
        assert says in facts(two, number, rank)["error"]
    agree(two, len(TWO) + len(WRONG) - 1, 2, WRONG["after all"])  # they go on together


@pytest.mark.parametrize("how", ["exit", "hang"])
def test_one_that_is_gone_is_not_waited_for(how: str, tmp_path: Path) -> None:
    started = together([{**TWO["rmt"], "spoil": how, "patience": 20.0}], 2, tmp_path)
    try:
        assert started[0].wait(1500) == 0
        assert facts(tmp_path, 0)["error"].startswith("Gone: ")
    finally:
        for process in started:
            process.kill()
            process.wait()


def lines(*sizes: int) -> list[Line]:
    return [Line(torch.zeros(n, dtype=torch.long), torch.arange(n) > 0, seed=i) for i, n in enumerate(sizes)]


class Placed(Peers):
    """A process that has no others."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def test_every_row_is_somebodys() -> None:
    batch = lines(3, 9, 9, 4, 7, 8, 1)
    parts = [Placed(rank, 3).own(batch) for rank in range(3)]
    assert sorted(line.seed for part in parts for line in part) == list(range(7))
    assert [len(part) for part in parts] == [3, 2, 2]
    assert max(map(len, parts[0])) == 9, "the first one reads as many segments as the whole batch has"


def test_a_whole_batch_is_counted_as_one_process_steps_it() -> None:
    assert counts(lines(9, 4, 16), iter([8] * 9)) == {0: (3, 8, 20), 8: (2, 8, 9)}


def test_what_others_spend_is_the_cells() -> None:
    meter = Meter(Budget("test", device_bytes=10**12, train_seconds=100.0, train_tokens=1), torch.device("cpu"))
    with meter.phase("train"):
        meter.count_others([Spending(3.0, 10**9, 0, 2 * 10**9, 5, 6, 7), Spending(1.0)])
        meter.count_others([Spending(5.0, 10**9, 0, 2 * 10**9, 5, 6, 7), Spending(2.0)])
        assert meter.others.seconds == 7.0
    assert 7.0 < meter.usage.train_seconds < 60.0
    assert 10**9 <= meter.usage.peak_device_bytes < 2 * 10**9
    with pytest.raises(BudgetExceeded, match="device_bytes 1 TB"), meter.phase("train"):
        meter.count_others([Spending(5.0, 10**12 + 1)])
    assert meter.others.another() == Others()
    spent = Usage(gradient_bytes=1)
    others = Others()
    others.count([Spending(1.0, gradients=5), Spending(1.0, gradients=5)])
    others.add_to(spent, wall=False)
    assert (spent.gradient_bytes, spent.optimizer_bytes) == (11, 0)


# Identity


def test_one_process_is_what_keys_have_always_been() -> None:
    cell = make_cell("hmt")
    old = to_json(cell)
    del old["training"]["processes"]
    assert from_json(old) == cell
    more = replace(cell, training=replace(cell.training, processes=2))
    assert from_json(to_json(more)) == more
    keys = {(c.key, c.training.key) for c in (cell, more, from_json(old))}
    assert len(keys) == 2
    assert "processes" not in cell._plain()["training"]
    assert asdict(cell)["training"]["processes"] == 1
    record = Record(cell, "ok", "", (), Usage(), {}, None, {})
    for odd in (0, -2, None, "two", True, 1.5, [2]):
        plain = record.to_json()
        plain["cell"]["training"]["processes"] = odd
        with contextlib.suppress(TypeError, AttributeError):
            plain["key"] = from_json(plain["cell"]).key
        with pytest.raises(ValueError, match="processes"):
            Record.from_json(plain)


def test_numbers_of_processes(jobs: Callable[..., list[Any]], world: Any) -> None:
    assert parse_processes("") == 1
    assert parse_processes("4") == 4
    for text in ("0", "-1", "many", "1.5", "9" * 30):
        with pytest.raises(UserError, match="--processes"):
            parse_processes(text)
    (job,) = jobs("rmt", device_bytes=4 * 10**9)
    several = replace(job, threads=2, cell=replace(job.cell, training=replace(job.cell.training, processes=3)))
    assert needs(several).cpus == 6
    assert needs(several).memory == needs(replace(job, threads=2)).memory + 3 * 10**9
    assert needs(several, prepare=True) == needs(replace(job, threads=2), prepare=True)
    assert needs(replace(several, device="cuda")).gpus == 3
    assert absolute(several).threads == 2
    card = card_of(tiny_backbone("llama"))
    assert workers_for([card], "cpu", 10**6) == 1


def test_rows_of_one_and_of_two_processes_are_two() -> None:
    cell = make_cell("hmt")
    one = Record(cell, "ok", "", (), Usage(), {}, None, {})
    two = replace(one, cell=replace(cell, training=replace(cell.training, processes=2)))
    assert labels([[one], [two]]) == ["hmt", "hmt (2 processes)"]
    assert labels([[two]]) == ["hmt"]
    assert _identity(one.cell)[0] == _identity(two.cell)[0]
    assert _identity(one.cell)[1] != _identity(two.cell)[1]
    assert setting(one) != setting(two)


def test_where_they_cannot_be_is_a_sentence(world: Any, tmp_path: Path, invoke: Callable[..., Any]) -> None:
    asked = ("run", *world.arguments("--models", "rmt", "--tasks", "pg19", "--out", str(tmp_path / "out")))
    for more, says in (
        (("--processes", "0"), "--processes 0: give a number from 1 to 64."),
        (("--processes", "2"), "--processes 2 needs a process for every cell: leave out --executor inline."),
    ):
        code, _, err = invoke(*asked, *more)
        assert (code, err.strip()) == (2, f"Error: {says}")


# A cell


def by_two(job: Any) -> Any:
    training = replace(job.cell.training, processes=2)
    return replace(job, cell=replace(job.cell, training=training), before="")


def beside(mark: str) -> Iterator[psutil.Process]:
    """Processes beside the first of a training whose folder for temporary files has `mark` in it."""
    for process in psutil.process_iter(["cmdline"]):
        if "--rank" in (process.info["cmdline"] or []):
            yield process


def test_a_cell_of_two_processes(jobs: Callable[..., list[Any]], tmp_path: Path) -> None:
    """Killed in its second process it is lost, not failed; the same job goes on from what was kept."""
    limits = {"train_tokens": 12_000, "eval_seconds": None, "train_seconds": None}
    (job,) = jobs("hmt", **limits)
    alone = replace(job, out=tmp_path / "alone", before="")
    Store.open_or_create(alone.out)
    (one,) = [e.record for e in Local(1).run([alone]) if e.ends]
    assert one is not None
    assert one.status == "ok", one.detail
    both = replace(by_two(job), checkpoint_every="2")
    folder = job.out / "unfinished" / both.cell.training.key
    ends: list[Any] = []
    killed = False
    for event in Local(1).run([both]):
        if event.ends:
            ends.append(event)
        elif not killed and event.phase == "train":
            until = time.monotonic() + 300
            while not (folder.is_dir() and any(p.name.isdigit() for p in folder.iterdir())):
                assert time.monotonic() < until
                time.sleep(0.01)
            (second,) = beside(str(tmp_path))
            os.kill(second.pid, signal.SIGKILL)
            killed = True
    assert killed
    assert [e.phase for e in ends] == ["lost"], ends
    assert "process 1 of the 2 of its training was ended from outside (SIGKILL)" in ends[0].notice
    assert not Store(job.out).stamp(both.cell.key)
    assert not list(beside(str(tmp_path)))
    (event,) = [e for e in Local(1).run([both]) if e.ends]
    record = event.record
    assert record is not None
    assert record.status == "ok", record.detail
    assert "goes on after optimiser step" in record.provenance["notices"][0]
    assert record.provenance["processes"] == record.cell.training.processes == 2
    assert record.key != one.key
    mine, other = record.usage, one.usage
    for name in ("train_tokens", "train_steps", "train_flops", "training_ended_by", "eval_tokens"):
        assert getattr(mine, name) == getattr(other, name), name
    assert mine.gradient_bytes == 2 * (other.gradient_bytes or 0)
    for a, b in zip(record.metrics, one.metrics, strict=True):
        assert (a.metric, a.slice) == (b.metric, b.slice)
        assert a.value == pytest.approx(b.value, rel=1e-3)
    weights = [load_file(o / "checkpoints" / k / "weights.safetensors") for o, k in (
        (job.out, both.cell.training.key), (alone.out, one.cell.training.key))]  # fmt: skip
    assert all(near(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.mark.parametrize(
    ("ended", "kills", "kind", "says"),
    [
        (["exit 76", "kill -KILL $$"], 0, MachineError, "process 2 of the 3 of its training was ended from outside"),
        (["kill -TERM $$", "exit 76"], 0, MachineError, "process 1 of the 3 of its training was ended from outside"),
        (["exit 76", "kill -KILL $$"], 1, MemoryError, "process 2 of the 3 of its training was refused memory"),
        (["exit 76", "exit 3"], 0, RuntimeError, "process 2 of the 3 of its training ended with code 3"),
        (["exit 76", "kill -SEGV $$"], 0, RuntimeError, "process 2 of the 3 of its training ended with code -11"),
        (["sleep 60", "exit 76"], 0, MachineError, "one of the 3 processes of its training does not answer"),
    ],
)  # fmt: skip
def test_why_one_is_gone(
    ended: list[str], kills: int, kind: type[Exception], says: str, jobs: Callable[..., list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A kill from outside is no result; a crash of its own, or memory that was refused, is one."""
    (job,) = jobs("rmt")
    job = replace(job, cell=replace(job.cell, training=replace(job.cell.training, processes=3)))
    with Ranks(job) as ranks:
        ranks._processes = [subprocess.Popen(["sh", "-c", how], stdin=-1, stdout=-1, text=True) for how in ended]
        for process, how in zip(ranks._processes, ended, strict=True):
            if not how.startswith("sleep"):
                process.wait()
        before = ranks._oom_kills
        monkeypatch.setattr("memory_bench.running.ranks.oom_kills", lambda: before + kills)
        why = ranks._why("timed out")
    assert type(why) is kind
    assert str(why).startswith(says)
    assert all(process.poll() is not None for process in ranks._processes)


def near(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() < 1e-3)
