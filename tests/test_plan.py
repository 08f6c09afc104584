"""A plan that can be believed: what is counted, measured and computed beforehand is what a run then says."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from memory_bench.command import commands
from memory_bench.record import Record
from memory_bench.running.counting import Counter
from memory_bench.running.options import Options
from memory_bench.running.worker import run_cell

MODELS = "truncation,full-context,hmt,rmt,armt,mplus,memorizing,longmem,retrieval,memoryllm"
Prepare = Callable[..., tuple[commands.Prepared, Options]]


@pytest.fixture
def prepare(world: Any, tmp_path: Any) -> Prepare:
    """``prepare(models, tasks, budget text…)``: a run in the world, ready."""

    def made(models: str, tasks: str = "pg19", budget: str = "", **changes: Any) -> tuple[commands.Prepared, Options]:
        path = tmp_path / "own.toml"
        path.write_text(budget or world.budget.read_text(encoding="utf-8"))
        options = Options(
            models, tasks, str(world.backbone), str(path), "1", "", world.data, True, tmp_path / "out", "3", (), True,
            "inline", "", False, True, False, world.cache, False,
        )  # fmt: skip
        options = replace(options, **changes)
        return commands.prepare(options), options

    return made


def run(prepared: commands.Prepared, options: Options) -> list[Record]:
    return [
        run_cell(commands.make_job(c, prepared.out, options, 1), lambda *_: None, lambda _: None)
        for c in prepared.grid.cells
    ]


@pytest.mark.parametrize("task", ["pg19", "pubmedqa", "passkey"])
def test_counted_tokens_and_flops_are_the_records(prepare: Prepare, task: str) -> None:
    prepared, options = prepare(MODELS, task, controls=False)
    counter = Counter(prepared.backbones)
    assert len(prepared.grid.cells) == 10
    for cell, record in zip(prepared.grid.cells, run(prepared, options), strict=True):
        assert record.status == "ok", record.detail
        counted = counter.count(cell).usage
        for name in ("train_tokens", "train_flops", "train_steps", "eval_tokens", "eval_flops"):
            assert getattr(counted, name) == getattr(record.usage, name), (cell.title, name)
        assert counted.train_tokens > 0 or cell.training.model.name in ("truncation", "full-context", "retrieval")
