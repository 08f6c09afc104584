"""Checkpoints are loaded if they are what was saved of that training; else it is done again, with a notice."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from damage import KINDS, flip, mutate, resealed
from safetensors.torch import load_file, save_file
from torch import Tensor

from memory_bench.budget import Usage
from memory_bench.cell import Training
from memory_bench.driver.checkpoints import load_checkpoint, save_checkpoint
from memory_bench.driver.train import Trained
from memory_bench.files.artefacts import vouch
from memory_bench.protocol import MemoryModel
from memory_bench.recipe import find_recipe
from memory_bench.testing.backbones import tiny_backbone
from memory_bench.zoo.pretrain import Window, WindowConfig
from synthetic import make_cell

RECIPE = find_recipe("tiny-pretrain")  # trains all weights
SPENT = Usage(train_tokens=640, train_steps=5, train_flops=1e9, train_seconds=0.5, training_ended_by="train_tokens",
              gradient_bytes=4, optimizer_bytes=8, activation_bytes=90, train_joules=1.5)  # fmt: skip
FILES = ("training.json", "weights.safetensors", "SHA256SUMS")


@pytest.fixture(scope="module")
def model() -> MemoryModel[Any]:
    return Window(tiny_backbone("llama", vocab_size=30), WindowConfig(8))


@pytest.fixture
def training() -> Training:
    return make_cell("hmt").training


@pytest.fixture
def folder(model: MemoryModel[Any], training: Training, tmp_path: Path) -> Path:
    done = Trained(model, [(128, 3.5), (640, float("nan"))], "train_tokens")
    save_checkpoint(tmp_path / training.key, done, RECIPE, training, SPENT)
    return tmp_path / training.key


@pytest.fixture(scope="module")
def blank() -> MemoryModel[Any]:
    return Window(tiny_backbone("llama", vocab_size=30), WindowConfig(8))


@pytest.fixture
def load(blank: MemoryModel[Any], training: Training) -> Callable[[Path], tuple[Any, dict[str, Tensor], list[str]]]:
    """``load(folder)``: what `load_checkpoint` gives (with its spending), its weights, and the notices."""

    def call(folder: Path) -> tuple[Any, dict[str, Tensor], list[str]]:
        notices: list[str] = []
        usage = Usage()
        for parameter in blank.parameters():
            parameter.data.zero_()
        found = load_checkpoint(folder, training, lambda config: blank, WindowConfig(8), usage, notice=notices.append)
        if found is None:
            assert usage == Usage()
            return None, {}, notices
        return (usage, found.ended_by, repr(found.curve)), found.model.state_dict(), notices

    return call


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_what_was_saved_comes_back(folder: Path, load: Callable[..., Any], model: MemoryModel[Any]) -> None:
    facts, weights, notices = load(folder)
    assert facts == (SPENT, "train_tokens", "[(128, 3.5), (640, nan)]")
    assert same(weights, model.state_dict())
    assert not notices
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    assert json.loads((folder / "training.json").read_text())["schema"] == 1
    assert load(folder.with_name("nothing")) == (None, {}, [])


def test_a_checkpoint_of_before_may_lack_what_was_not_measured(folder: Path, load: Callable[..., Any]) -> None:
    facts = json.loads((folder / "training.json").read_text())
    for name in ("gradient_bytes", "optimizer_bytes", "activation_bytes", "train_joules"):
        del facts["usage"][name]
    (folder / "training.json").write_text(json.dumps({k: v for k, v in facts.items() if k not in ("schema", "sha256")}))
    (folder / FILES[-1]).unlink()
    (usage, *_), _, notices = load(folder)
    assert usage == replace(SPENT, gradient_bytes=None, optimizer_bytes=None, activation_bytes=None, train_joules=None)
    assert len(notices) == 1


@pytest.mark.parametrize("spoil", KINDS, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_noticed(name: str, spoil: Callable[[Path], None], folder: Path, load: Callable[..., Any]) -> None:
    spoil(folder / name)
    found, _, notices = load(folder)
    assert found is None
    assert len(notices) == 1
    assert f"checkpoints/{folder.name} is not used, and its model is to be trained again" in notices[0]


def test_any_flipped_bit_of_the_weights_is_noticed(folder: Path, load: Callable[..., Any]) -> None:
    path, rng = folder / "weights.safetensors", Random(0)
    raw = path.read_bytes()
    for place in rng.sample(range(len(raw)), 30):
        path.write_bytes(raw)
        flip(path, place)
        assert load(folder)[0] is None
    path.write_bytes(raw)
    assert load(folder)[0] is not None


def test_the_checkpoint_of_another_training_is_noticed(
    folder: Path, load: Callable[..., Any], model: MemoryModel[Any], training: Training
) -> None:
    other = replace(training, seed=7)
    theirs = folder.with_name(other.key)
    strange = Window(tiny_backbone("llama", vocab_size=30, seed=9), WindowConfig(8))
    save_checkpoint(theirs, Trained(strange, [], "steps"), RECIPE, other, SPENT)
    shutil.copy(theirs / "weights.safetensors", folder)
    assert load(folder)[0] is None
    shutil.copy(theirs / "SHA256SUMS", folder)
    shutil.copy(theirs / "training.json", folder)
    found, _, notices = load(folder)
    assert found is None
    assert f"of another training ({other.key})" in notices[0]


def test_training_facts_are_mutated_in_hundreds_of_ways(
    folder: Path, load: Callable[..., Any], model: MemoryModel[Any], training: Training
) -> None:
    """Noticed by the checksum, and by what they are where a program with a fault had summed them."""
    path, rng = folder / "training.json", Random(4)
    whole = json.loads(path.read_text())
    right = load(folder)
    for _ in range(120):
        changed = mutate(whole, rng)
        path.write_text(json.dumps(changed))
        assert load(folder)[0] is None or json.dumps(changed) == json.dumps(whole)  # "" may be changed into ""
        path.write_text(resealed(changed))
        vouch(folder / "SHA256SUMS", training.key, {n: folder / n for n in FILES[:2]})
        found, weights, notices = load(folder)
        assert bool(notices) == (found is None)
        assert found is None or same(weights, right[1])
    path.write_text(json.dumps(whole, indent=1))


def as_an_older_version(folder: Path) -> None:
    """Takes away what tells files from others."""
    (folder / "SHA256SUMS").unlink()
    path = folder / "training.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in facts.items() if k not in ("schema", "sha256")}))


def test_a_checkpoint_of_an_older_version_is_used_and_said(
    folder: Path, load: Callable[..., Any], model: MemoryModel[Any]
) -> None:
    as_an_older_version(folder)
    found, weights, notices = load(folder)
    assert found is not None
    assert same(weights, model.state_dict())
    assert "has no checksums, as an older version wrote it; it is used as it is" in notices[0]
    kept = load_file(folder / "weights.safetensors")
    first = sorted(kept)[0]
    for wrong in (
        {n: t for n, t in kept.items() if n != first},
        {**kept, "more": torch.ones(1)},
        {**kept, first: torch.ones(2, 2)},
    ):
        save_file(wrong, folder / "weights.safetensors")
        found, _, notices = load(folder)
        assert found is None
        assert "its weights are not the model's" in notices[0]
    save_file(kept, folder / "weights.safetensors")
    facts = json.loads((folder / "training.json").read_text())
    facts["training"]["seed"] = 5
    (folder / "training.json").write_text(json.dumps(facts))
    assert load(folder)[0] is None


def test_a_checkpoint_that_lost_its_checksums_is_not_an_older_one(folder: Path, load: Callable[..., Any]) -> None:
    (folder / "SHA256SUMS").unlink()
    assert "has no checksums" in load(folder)[2][0]
    assert load(folder)[0] is None


def test_a_file_where_the_folder_was(folder: Path, load: Callable[..., Any], training: Training) -> None:
    shutil.rmtree(folder)
    folder.write_text("")
    assert load(folder)[0] is None
    done = Trained(Window(tiny_backbone("llama", vocab_size=30), WindowConfig(8)), [], "steps")
    save_checkpoint(folder, done, RECIPE, training, SPENT)
    assert load(folder)[0] is not None


# The commands


def damaged_run(invoke: Callable[..., tuple[int, str, str]], world: Any, out: Path) -> tuple[list[str], Path]:
    """A run of two seeds of `rmt`; the command, and the samples of its first cell."""
    command = ["run", *world.arguments("--out", str(out), "--no-controls", "--models", "rmt", "--tasks", "pg19",
                                       "--seeds", "2")]  # fmt: skip
    assert invoke(*command)[0] == 0
    return command, sorted(out.glob("cells/*/samples.parquet"))[0]


def test_every_command_notices_damage_and_run_mends_it(
    invoke: Callable[..., tuple[int, str, str]], world: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command, samples = damaged_run(invoke, world, out)
    key, board = samples.parent.name, (out / "leaderboard.csv").read_text()
    weights = {p: p.read_bytes() for p in out.glob("checkpoints/*/weights.safetensors")}
    record = json.loads((samples.parent / "record.json").read_text())
    mine = record["provenance"]["finished"], record["metrics"]
    said = f"cells/{key}/samples.parquet is not used and the cell counts as not done"
    before = samples.stat()
    flip(samples)
    os.utime(samples, ns=(before.st_atime_ns, before.st_mtime_ns))
    for name in ("report", "compare"):
        err = invoke(name, str(out))[2]
        assert f"Warning: {said}" in err, name
    code, _, err = invoke("check", str(out), "--write", str(tmp_path / "reference.jsonl"))
    assert code == 2
    assert said in err
    assert "1 cells have no result" in err
    assert said in (out / "leaderboard.md").read_text()
    for path in weights:
        flip(path)
    code, _, err = invoke(*command)
    assert code == 0
    assert f"Note: {said}" in err
    assert "1 cells done, 1 to run" in err
    assert f"checkpoints/{record_training(samples)} is not used, and its model is to be trained again" in err
    again = json.loads((samples.parent / "record.json").read_text())
    assert again["metrics"] == mine[1]
    assert len(again["provenance"]["notices"]) == 1
    assert invoke(*command)[2].count("is not used") == 0
    path = out / "checkpoints" / record_training(samples) / "weights.safetensors"
    assert path.read_bytes() == weights[path], "trained again to the same bit"
    assert header(board) == header((out / "leaderboard.csv").read_text())


def header(board: str) -> list[str]:
    """The part of a board that no clock moves: model, task, metric, slice and value."""
    return [",".join(line.split(",")[:10]) for line in board.splitlines() if "bits_per_byte" in line]


def record_training(samples: Path) -> str:
    from memory_bench.cell import from_json

    return from_json(json.loads((samples.parent / "record.json").read_text())["cell"]).training.key


def test_the_same_notice_comes_out_of_a_worker_process(world: Any, tmp_path: Path) -> None:
    """Its standard output carries it to the command."""
    from memory_bench.running.apart import told

    cell = make_cell("hmt")
    event = told(cell, json.dumps({"notice": "checkpoints/x is not used"}))
    assert event is not None
    assert (event.phase, event.notice) == ("notice", "checkpoints/x is not used")
    assert told(cell, '{"phase": "eval", "done": 1, "total": 2}') is not None
    assert [told(cell, line) for line in ("3", "[]", "{}", "no JSON", "null")] == [None] * 5
