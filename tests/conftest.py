"""Fixtures shared by the tests: tiny random backbones, their cards, and a world to run commands in."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from memory_bench.backbone.model import Backbone
from memory_bench.card import BackboneCard
from memory_bench.cell import Cell
from memory_bench.command import commands
from memory_bench.data import Library
from memory_bench.running.job import Job
from memory_bench.running.options import Options
from memory_bench.store import Store
from memory_bench.testing.backbones import card_of, tiny_backbone
from tests.world import World, make_world

torch.set_num_threads(1)  # tiny matrices: threads only wait for each other


@pytest.fixture
def make_backbone() -> Callable[..., Backbone]:
    """``make_backbone(family, **config)``: llama, gpt2, opt, or qwen3 (Llama family with q/k norms and key shift)."""
    return tiny_backbone


@pytest.fixture
def make_card() -> Callable[..., BackboneCard]:
    """``make_card(backbone, window=8)``."""
    return card_of


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """See `make_world`. Read only."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def invoke(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """``invoke(*arguments)``: exit code, standard output and standard error of the command in the world."""
    from memory_bench.cli import main

    for name, value in world.environment().items():
        monkeypatch.setenv(name, value)

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def jobs(world: Any, tmp_path: Path) -> Callable[..., list[Job]]:
    """``jobs(models, tasks, budget limits…)``: the jobs of a run without controls."""

    def prepare(
        models: str, tasks: str = "pg19", *, controls: bool = False, seeds: str = "1", **limits: Any
    ) -> list[Job]:
        options = Options(
            models, tasks, str(world.backbone), str(world.budget), seeds, "", world.data, True, tmp_path / "out", "2",
            (), controls, "inline", "", False, True, False, world.cache, False,
        )  # fmt: skip
        cells = commands.prepare(options).grid.cells
        Store.open_or_create(tmp_path / "out")
        return [
            Job(_limited(cell, limits), tmp_path / "out", world.data, world.cache, True, False, "cpu", 1)
            for cell in cells
        ]

    return prepare


def _limited(cell: Cell, limits: dict[str, Any]) -> Cell:
    return replace(cell, training=replace(cell.training, budget=replace(cell.training.budget, **limits)))


@pytest.fixture
def data(tmp_path: Path) -> Library:
    """The real data; tests that need them skip without."""
    folder = os.environ.get("MEMORY_BENCH_DATA")
    if not folder:
        pytest.skip("MEMORY_BENCH_DATA does not name a folder with the real data")
    return Library(Path(folder), tmp_path, stand_ins=False, hub=False)
