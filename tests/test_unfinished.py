"""A training that is killed on its way goes on to the same bit; what was kept and does not fit is never used."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from damage import KINDS
from safetensors.torch import load_file
from test_train import builder, toy_corpus, weights
from torch import Tensor, nn

from memory_bench.budget import Budget
from memory_bench.corpus import Line, LineCorpus, TextCorpus
from memory_bench.driver import randomness
from memory_bench.driver.every import Every, parse_every
from memory_bench.driver.meter import Meter
from memory_bench.driver.tensor_file import read_tensors, write_tensors
from memory_bench.driver.train import train
from memory_bench.driver.unfinished import ASIDE, FACTS, TENSORS, CannotGoOn, Keeper
from memory_bench.errors import UserError
from memory_bench.files.artefacts import Damaged
from memory_bench.protocol import Segment
from memory_bench.recipe import Recipe, Stage
from memory_bench.running.fence import FileLimit
from memory_bench.testing import tiny_backbone
from memory_bench.zoo.pretrain import Window, WindowConfig

CPU = torch.device("cpu")
KEY = "0123456789abcdef"
STEPS, KILLED = 9, 6  # optimiser steps, and after which of them the first attempt is killed
TWO = Recipe(
    "two", (Stage(2, 4, steps=4, model={"recall": False, "memory_tokens": 2}), Stage(3, 4, steps=5)), lr=3e-3, warmup=2
)
ONE = Recipe("one", (Stage(2, 4),), lr=3e-3, warmup=2)


class Killed(BaseException):
    """Of the process, as far as a test in one process can have it."""


class Chancy(Window):
    """The window with all that draws: torch's dropout, generators of its own of three kinds, and a count of calls."""

    def __init__(self, backbone: Any, config: Any) -> None:
        super().__init__(backbone, config)
        self.drop, self.own, self.calls = nn.Dropout(0.2), torch.Generator().manual_seed(3), 0
        self.python, self.numpy = random.Random(4), np.random.default_rng(5)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.zeros(2), persistent=False)

    def step(self, state: Any, segment: Segment, *, write: bool = True) -> Any:
        readout, state = super().step(state, segment, write=write)
        self.calls += 1
        self.seen += 0.5
        noise = torch.randn(1, generator=self.own).item() + self.python.random() + float(self.numpy.random())
        noise += random.random() + float(np.random.rand()) + self.calls % 3 + float(self.seen[0]) / 10
        return replace(readout, hidden=self.drop(readout.hidden) * (self.scale + 0.01 * noise)), state


def lines_corpus() -> LineCorpus:
    """Lines of two lengths, drawn without replacement: the corpus remembers which."""
    drawn = torch.Generator().manual_seed(2)
    made = [torch.randint(64, (16 if i % 2 else 24,), generator=drawn) for i in range(7)]
    return LineCorpus([Line(ids, torch.arange(len(ids)) > 0, seed=i) for i, ids in enumerate(made)])


def keeper(folder: Path, notices: list[str] | None = None, every: Every | None = Every(steps=2), **more: Any) -> Keeper:  # noqa: B008
    told = [] if notices is None else notices
    more = {"surroundings": {"torch": "2"}, **more}
    return Keeper(folder / KEY, KEY, every, notice=told.append, **more)


def attempt(
    name: str, keeping: Keeper | None, *, recipe: Recipe = TWO, corpus: Any = None, kill: int = 0, **limits: Any
) -> SimpleNamespace:
    """One process's attempt at a training; `kill` is the optimiser step after which it ends."""
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    if name == "chancy":
        backbone, config = tiny_backbone("llama"), WindowConfig(8)
        build: Any = partial(Chancy, backbone)
    else:
        build, config = builder(name, tiny_backbone("llama"))
    meter = Meter(Budget("test", **limits), CPU)
    done = 0

    def progress(share: int, total: int) -> None:
        nonlocal done
        done += 1
        if meter.usage.train_steps == kill:
            raise Killed

    try:
        with meter.phase("train"):
            trained = train(build, config, recipe, corpus or toy_corpus(), meter, seed=0, progress=progress,
                            keeper=keeping)  # fmt: skip
    except Killed:
        return SimpleNamespace(usage=meter.usage, steps=done)
    return SimpleNamespace(
        trained=trained, usage=meter.usage, steps=done, after=(random.random(), np.random.rand(), torch.rand(1).item())
    )


def same(one: SimpleNamespace, other: SimpleNamespace) -> bool:
    """To the bit."""
    a, b = weights(one.trained.model), weights(other.trained.model)
    counted = [(x.usage.train_tokens, x.usage.train_steps, x.usage.train_flops) for x in (one, other)]
    return (
        a.keys() == b.keys()
        and all(torch.equal(a[n], b[n]) for n in a)
        and one.trained.curve == other.trained.curve
        and one.trained.ended_by == other.trained.ended_by
        and counted[0] == counted[1]
        and one.after == other.after
    )


def resumed(name: str, folder: Path, notices: list[str] | None = None, **how: Any) -> SimpleNamespace:
    """A training whose first attempt was killed after step `KILLED`, which was the third that was kept."""
    corpus = how.pop("corpus", toy_corpus)
    attempt(name, keeper(folder), corpus=corpus(), kill=KILLED + 1, **how)
    assert [p.name for p in (folder / KEY).iterdir()] == [f"{KILLED:09d}"]
    return attempt(name, keeper(folder, notices), corpus=corpus(), **how)


CASES = [
    *((name, how) for name in ("hmt", "mplus", "rmt", "chancy") for how in ("stages", "tokens", "lines")),
    *((name, "memory") for name in ("hmt", "memoryllm", "longmem")),
]


@pytest.mark.parametrize(("name", "how"), CASES)
def test_it_ends_as_if_nothing_had_happened(name: str, how: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {
        "stages": {},
        "tokens": {"recipe": ONE, "train_tokens": STEPS * 64},
        "lines": {"corpus": lines_corpus},
        "memory": {"recipe": replace(TWO, trains="memory")},
    }[how]
    made = {**more, "corpus": more["corpus"]()} if "corpus" in more else more
    whole = attempt(name, None, **made)
    assert whole.steps == STEPS
    notices: list[str] = []
    again = resumed(name, tmp_path, notices, **more)
    assert again.steps == STEPS - KILLED
    assert same(whole, again)
    assert notices == [f"The training {KEY} goes on after optimiser step {KILLED}."]


def test_keeping_changes_nothing(tmp_path: Path) -> None:
    assert same(attempt("chancy", None), attempt("chancy", keeper(tmp_path)))


@pytest.mark.parametrize("forgotten", ["torch", "plain", "own", "moments", "buffers"])
def test_nothing_that_is_put_back_is_superfluous(
    forgotten: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time one of them is not, the end is another."""
    whole = attempt("chancy", None)
    if forgotten == "plain":
        monkeypatch.setattr(randomness, "put_back_plain", lambda states, model: None)
    elif forgotten == "torch":
        monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    elif forgotten == "own":
        back = randomness.put_back_tensors
        monkeypatch.setattr(randomness, "_kept", lambda model: {})
        monkeypatch.setattr(randomness, "put_back_tensors", back)
    else:
        from memory_bench.driver.standing import Standing

        back_all, part = Standing.put_back, {"moments": "optimizer", "buffers": "seen"}[forgotten]

        def put_back(self: Standing, file: Path) -> None:
            back_all(self, file)
            if part == "seen":
                self.model.seen.zero_()
            else:
                self.optimizer.state.clear()

        monkeypatch.setattr(Standing, "put_back", put_back)
    assert not same(whole, resumed("chancy", tmp_path))


# What is not used


@pytest.mark.parametrize("spoil", KINDS, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("name", [FACTS, TENSORS, "SHA256SUMS"])
def test_a_damaged_one_is_set_aside(name: str, spoil: Callable[[Path], None], tmp_path: Path) -> None:
    attempt("rmt", keeper(tmp_path), kill=3)
    spoil(tmp_path / KEY / "000000002" / name)
    notices: list[str] = []
    again = attempt("rmt", keeper(tmp_path, notices))
    assert again.steps == STEPS
    assert same(attempt("rmt", None), again)
    assert len(notices) == 1
    assert f"unfinished/{KEY}/000000002 is not used and set aside" in notices[0]
    assert (tmp_path / KEY / f"000000002{ASIDE}").is_dir()


def test_behind_a_damaged_one_an_older_is_gone_on_from(tmp_path: Path) -> None:
    """As a kill between two steps of keeping leaves them."""
    attempt("rmt", keeper(tmp_path), kill=3)
    shutil.copytree(tmp_path / KEY / "000000002", tmp_path / "older")
    attempt("rmt", keeper(tmp_path), kill=5)
    shutil.move(tmp_path / "older", tmp_path / KEY / "000000002")
    (tmp_path / KEY / "000000008.part").mkdir()
    (tmp_path / KEY / "000000004" / TENSORS).write_bytes(b"")
    again = attempt("rmt", keeper(tmp_path))
    assert again.steps == STEPS - 2
    assert same(attempt("rmt", None), again)


def test_another_trainings_is_set_aside(tmp_path: Path) -> None:
    attempt("rmt", Keeper(tmp_path / KEY, "another", Every(steps=2), surroundings={"torch": "2"}), kill=3)
    notices: list[str] = []
    assert attempt("rmt", keeper(tmp_path, notices)).steps == STEPS
    assert "belongs to another (another)" in notices[0]


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ({}, {"surroundings": {"torch": "3"}}, "it was made with torch 2, not 3"),
        ({"model": "memorizing"}, {}, "it does not hold what the model has"),
        ({"recipe": replace(TWO, stages=(*TWO.stages, Stage(2, 2, steps=1)))}, {}, "it is of other stages"),
        ({"corpus": TextCorpus([torch.arange(64).repeat(9)])}, {}, "the corpus does not draw again"),
    ],
)  # fmt: skip
def test_what_would_not_end_in_the_same_numbers_is_not_gone_on_from(
    first: dict[str, Any], second: dict[str, Any], says: str, tmp_path: Path
) -> None:
    """Though its key is right, as nobody but a person who moves files about could bring it."""
    attempt(first.pop("model", "rmt"), keeper(tmp_path), kill=3, **first)
    notices: list[str] = []
    corpora = iter(toy_corpus, None)
    keeping = keeper(tmp_path, notices, **second)
    for corpus in corpora:
        try:
            again = attempt("rmt", keeping, corpus=corpus)
            break
        except CannotGoOn as error:
            keeping.put_aside(str(error))
    assert says in notices[0]
    assert same(attempt("rmt", None), again)


# What it costs


def test_it_is_charged_to_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither writing nor reading nor drawing again; what the attempt before had spent is."""
    plain = attempt("rmt", None).usage.train_seconds
    keep, found = Keeper.keep, Keeper.found
    monkeypatch.setattr(Keeper, "keep", lambda self, *a: (time.sleep(2), keep(self, *a))[1])
    monkeypatch.setattr(Keeper, "found", lambda self: (time.sleep(2), found(self))[1])
    killed = attempt("rmt", keeper(tmp_path), kill=3)
    kept = json.loads((tmp_path / KEY / "000000002" / FACTS).read_text())["usage"]["train_seconds"]
    again = attempt("rmt", keeper(tmp_path, every=None))
    assert max(killed.usage.train_seconds, again.usage.train_seconds) < plain + 1.5
    assert 0 < kept < again.usage.train_seconds


def test_seconds_that_were_spent_count_against_their_limit(tmp_path: Path) -> None:
    attempt("rmt", keeper(tmp_path), recipe=ONE, kill=3, train_seconds=60.0)
    place = tmp_path / KEY / "000000002"
    facts = json.loads((place / FACTS).read_text())
    facts["usage"]["train_seconds"] = 59.99
    rewrite(place, facts)
    again = attempt("rmt", keeper(tmp_path), recipe=ONE, train_seconds=60.0)
    assert again.trained.ended_by == "train_seconds"
    assert again.usage.train_steps < 8


def rewrite(place: Path, facts: dict[str, Any]) -> None:
    """As a program that goes on would have written it."""
    from memory_bench.files.artefacts import vouch, write_json

    write_json(place / FACTS, {k: v for k, v in facts.items() if k != "sha256"})
    vouch(place / "SHA256SUMS", KEY, {n: place / n for n in (FACTS, TENSORS)})


def test_a_full_disk_is_said_once_and_costs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, tensors: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("memory_bench.driver.unfinished.write_tensors", full)
    notices: list[str] = []
    done = attempt("rmt", keeper(tmp_path, notices))
    assert same(done, attempt("rmt", None))
    assert notices == [
        f"The training {KEY} could not be kept on its way (No space left on device); it goes on all the same."
    ]
    assert not list((tmp_path / KEY).iterdir())


def test_the_models_limit_on_files_does_not_bound_it(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = FileLimit(4096)
    notices: list[str] = []
    try:
        attempt("rmt", keeper(tmp_path, notices, unfenced=limit.lifted), kill=3)
        assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == 4096
        with pytest.raises(OSError, match="too large"):
            (tmp_path / "more").write_bytes(bytes(5000))
    finally:
        limit.lift()
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == before
    assert (tmp_path / KEY / "000000002" / TENSORS).stat().st_size > 4096
    assert not notices


def test_tensors_come_back_from_a_file_that_others_can_read(tmp_path: Path) -> None:
    given: dict[str, Tensor] = {
        "a": torch.randn(3, 5), "b": torch.randn(4, 6).t(), "count": torch.tensor(3.0), "none": torch.zeros(0, 2),
        "half": torch.randn(7).bfloat16(), "flags": torch.rand(9) > 0.5, "long": torch.arange(5),
        "large": torch.randn(700, 900),
    }  # fmt: skip
    file = tmp_path / "file"
    write_tensors(file, given)
    found = load_file(file)
    assert found.keys() == given.keys()
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in given.items())
    back = {n: torch.empty_like(t) for n, t in given.items()}
    read_tensors(file, back)
    assert all(torch.equal(back[n], t) for n, t in given.items())
    for wrong in ({"a": torch.zeros(5, 3)}, {"a": torch.zeros(3, 5).double()}, {"z": torch.zeros(1)}):
        with pytest.raises(Damaged):
            read_tensors(file, wrong)
    for cut in (0, 3, 40, file.stat().st_size - 1):
        (tmp_path / "cut").write_bytes(file.read_bytes()[:cut])
        with pytest.raises(Damaged):
            read_tensors(tmp_path / "cut", {})
    with pytest.raises(TypeError, match="complex64"):
        write_tensors(tmp_path / "odd", {"z": torch.zeros(2, dtype=torch.complex64)})


def test_how_often_is_steps_or_seconds() -> None:
    assert [parse_every(t) for t in ("", "500", "90s", "1.5m", "2h")] == [
        None, Every(steps=500), Every(seconds=90.0), Every(seconds=90.0), Every(seconds=7200.0)
    ]  # fmt: skip
    for wrong in ("0", "0s", "-3", "often", "10 m", "1e3", "9" * 5000, "10d"):
        with pytest.raises(UserError, match="--checkpoint-every"):
            parse_every(wrong)
    assert Every(steps=3).due(6, 0.0)
    assert not Every(steps=3).due(7, 1e9)
    assert Every(seconds=5).due(7, 5.0)
    assert not Every(seconds=5).due(7, 4.9)


# Processes


@pytest.mark.parametrize("name", ["hmt", "mplus"])
def test_a_killed_worker_leaves_what_the_next_goes_on_from(
    name: str, jobs: Callable[..., list[Any]], tmp_path: Path
) -> None:
    """The very processes of a run: the record and the weights are those of a run that nobody disturbed."""
    job = replace(jobs(name, train_tokens=8_000, eval_seconds=None, train_seconds=None)[0], checkpoint_every="3")
    calm = replace(job, out=tmp_path / "calm", checkpoint_every="")
    key = job.cell.training.key
    assert ended(calm, tmp_path) == 0
    process = started(job, tmp_path)
    folder = job.out / "unfinished" / key
    while not (folder.is_dir() and any(p.name.isdigit() for p in folder.iterdir())):
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (job.out / "checkpoints").exists()
    assert ended(replace(job, checkpoint_every=""), tmp_path) == 0
    records = [json.loads((j.out / "cells" / j.cell.key / "record.json").read_text()) for j in (calm, job)]
    assert records[0]["metrics"] == records[1]["metrics"]
    assert records[0]["provenance"]["curve"] == records[1]["provenance"]["curve"]
    counted = ("train_tokens", "train_steps", "train_flops", "eval_tokens", "eval_flops", "training_ended_by")
    assert [records[0]["usage"][n] for n in counted] == [records[1]["usage"][n] for n in counted]
    assert "goes on after optimiser step" in records[1]["provenance"]["notices"][0]
    files = [j.out / "checkpoints" / key / "weights.safetensors" for j in (calm, job)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not folder.exists()
    samples = [(j.out / "cells" / j.cell.key / "samples.parquet").read_bytes() for j in (calm, job)]
    assert samples[0] == samples[1]


def started(job: Any, folder: Path) -> "subprocess.Popen[bytes]":
    path = folder / f"{job.out.name}-job.json"
    path.write_text(json.dumps(job.to_json()))
    command = [sys.executable, "-P", "-m", "memory_bench.running.entry", str(path)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def ended(job: Any, folder: Path) -> int:
    return started(job, folder).wait()


def test_force_begins_anew(world: Any, tmp_path: Path, invoke: Callable[..., tuple[int, str, str]]) -> None:
    out = tmp_path / "out"
    command = ["run", *world.arguments("--out", str(out), "--no-controls", "--models", "rmt", "--tasks", "pg19",
                                       "--seeds", "1")]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Keeper, "forget", lambda self: None)
        assert invoke(*command, "--checkpoint-every", "1", "--budget", str(without_limits(world, tmp_path)))[0] == 0
    assert len(list(out.glob("unfinished/*/*"))) == 1
    shutil.rmtree(out / "checkpoints")
    shutil.rmtree(out / "cells")
    err = invoke(*command, "--force", "--budget", str(without_limits(world, tmp_path)))[2]
    assert "goes on after" not in err
    assert not list(out.glob("unfinished/*"))
    assert invoke(*command, "--checkpoint-every", "often")[0] == 2


def without_limits(world: Any, folder: Path) -> Path:
    path = folder / "free.toml"
    path.write_text('train_tokens = 2000\n[tasks.pg19]\nextent = "full"\n')
    return path
