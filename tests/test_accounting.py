"""What a cell holds and moves, against what can be computed by hand; for every installed model on a tiny backbone."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from memory_bench.budget import Budget, Usage
from memory_bench.corpus import Line
from memory_bench.driver.accounting import POINTS, Accounting, weight_bytes
from memory_bench.driver.alive import Alive
from memory_bench.driver.meter import Meter
from memory_bench.driver.stream import line_nll, walk
from memory_bench.driver.train import train
from memory_bench.protocol import MemoryModel, Segment
from memory_bench.recipe import Recipe, Stage
from memory_bench.state import State, StateSize
from memory_bench.statistics.growth import fit_growth
from memory_bench.testing import card_of, tiny_backbone

CPU = torch.device("cpu")
MODELS = {e.name: e for e in entry_points(group="memory_bench.models") if e.value.startswith("memory_bench.")}
NAMED = pytest.mark.parametrize("entry", [pytest.param(e, id=name) for name, e in sorted(MODELS.items())])
SMALL: dict[str, dict[str, Any]] = {  # stores that a few segments fill
    "autocompressor": {"max_summaries": 8},
    "extended-mind": {"slots": 24},
    "hmt": {"cache": 4},
    "longmem": {"memory_size": 24},
    "memlong": {"memory_tokens": 24},
    "memorizing": {"slots": 24},
    "mplus": {"initial_recall_frequency": 4.0, "merge_every": 4},
    "retrieval": {"chunks": 6},
    "unimix": {"store_segments": 3},
}
GROWING = (  # before they are full
    *(
        "autocompressor",
        "emllm",
        "extended-mind",
        "full-context",
        "hmt",
        "infllm",
        "longmem",
        "memlong",
        "memorizing",
        "mplus",
        "retrieval",
        "unimix",
    ),
)


def build(entry: EntryPoint, **options: Any) -> MemoryModel[Any]:
    kind: type[MemoryModel[Any]] = entry.load()
    tiny = tiny_backbone("llama" if "llama" in kind.families else kind.families[0])
    config = replace(kind.fit(card_of(tiny, window=8), Budget("tests")), **options)  # type: ignore[attr-defined]
    return kind(tiny, config, torch.Generator().manual_seed(1))


def line(tokens: int, seed: int = 0) -> Line:
    ids = torch.randint(64, (tokens,), generator=torch.Generator().manual_seed(seed))
    return Line(ids, torch.arange(tokens) > 0)


@torch.no_grad()
def read(model: MemoryModel[Any], tokens: int, rows: int = 2) -> Meter:
    meter = Meter(Budget("tests"), CPU)
    with meter.phase("eval"):
        line_nll(model.eval(), [line(tokens, n) for n in range(rows)], watcher=meter)
    return meter


# Weights, gradients, optimiser


class Lines:
    def batch(self, rows: int, segments: int, length: int, rng: torch.Generator) -> list[Line]:
        del rng
        return [line(segments * length, n) for n in range(rows)]


@NAMED
def test_weights_gradients_and_optimiser_are_the_sums_over_tensors(entry: EntryPoint) -> None:
    model = build(entry)
    meter = Meter(Budget("tests"), CPU)
    recipe = Recipe("tests", (Stage(segments=2, rows=2, steps=2),), lr=1e-3)
    with meter.phase("train"):
        train(lambda _: model, model.config, recipe, Lines(), meter, seed=0)  # type: ignore[arg-type]
    usage, own = meter.usage, list(model.parameters())
    assert usage.weight_bytes == weight_bytes(model) == sum(p.nbytes for p in own)
    reached = [p for p in own if p.grad is not None]
    assert usage.gradient_bytes == sum(p.nbytes for p in reached) > 0
    assert usage.optimizer_bytes == sum(2 * p.nbytes + 4 for p in reached)  # two averages and the number of steps
    assert (usage.activation_bytes or 0) > 0


def test_a_tied_weight_and_a_helper_count_once(make_backbone: Callable[..., Any]) -> None:
    backbone = make_backbone("qwen3")  # its head is its embedding
    model = MODELS["truncation"].load()(backbone, MODELS["truncation"].load().Config(8), torch.Generator())
    assert weight_bytes(model) == sum(p.nbytes for p in model.parameters())
    backbone.embedder = type("Encoder", (), {"parameters": 10})()
    assert weight_bytes(model) == sum(p.nbytes for p in model.parameters()) + 40


# Activations


def test_what_is_alive_at_once_is_counted_to_the_byte() -> None:
    x = torch.ones(1000, requires_grad=True)  # was there before
    with Alive() as alive:
        y = x.exp()  # 4,000 bytes, kept for its gradient
        z = (y[:500].sin() + 1).cos()  # 2,000 each; a view is nothing, and what sin gives goes
        del y
        assert alive.now == alive.peak == 4000 + 2 * 2000
        loss = z.sum()
    del z, loss
    assert alive.now == 0
    assert alive.peak == alive.peak_beside([]) == 8004


def test_kept_tensors_leave_the_peak_only_if_they_were_in_it() -> None:
    with Alive() as alive:
        early = torch.ones(100)
        torch.ones(1000).sum()
        late = torch.ones(50)
    assert alive.peak == 400 + 4000 + 4
    assert alive.peak_beside([early, late, torch.ones(7)]) == 4004


class Squares(torch.nn.Module):
    """`parameters` numbers that are squared `depth` times."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((1000,), 0.5))

    def forward(self, depth: int) -> Tensor:
        out: Tensor = self.weight
        for _ in range(depth):
            out = out.exp().neg()
        return out.sum()


def test_activations_of_a_training_step_leave_out_gradients_and_optimiser() -> None:
    model, usage = Squares(), Usage()
    accounting, optimizer = Accounting(usage, CPU), torch.optim.AdamW(model.parameters(), foreach=False)
    for number, depth in enumerate((3, 50)):  # the second is not the first of its stage
        optimizer.zero_grad()
        with accounting.training(optimizer, first=number == 0):
            model(depth).backward()
            optimizer.step()
        # exp keeps what it gives; at the end the last neg's, its sum, and on the way back one or two more
        assert 3 * 4000 + 4000 <= (usage.activation_bytes or 0) <= 3 * 4000 + 3 * 4000 + 8
    assert (usage.gradient_bytes, usage.optimizer_bytes) == (4000, 8004)


def test_what_the_optimiser_makes_at_its_peak_is_no_activation() -> None:
    """The most is alive in the optimiser's own step: a root and its quotient beside a gradient and two averages."""
    model, usage = Squares(), Usage()
    accounting, optimizer = Accounting(usage, CPU), torch.optim.AdamW(model.parameters(), foreach=False)
    with accounting.training(optimizer, first=True):
        model(0).backward()
        optimizer.step()
    assert (usage.gradient_bytes, usage.optimizer_bytes) == (4000, 8004)
    assert 4000 <= (usage.activation_bytes or 0) <= 2 * 4000 + 100


def test_measuring_does_not_change_a_number() -> None:
    model, found = build(MODELS["mplus"]), []
    for measured in (True, False):
        meter = Meter(Budget("tests"), CPU)
        meter.accounting.entered("eval" if measured else "")
        with torch.no_grad():
            found.append([p.nll.tolist() for p in walk(model.eval(), [line(60)], watcher=meter)])
        assert (meter.usage.activation_bytes is not None) == measured
    assert found[0] == found[1]


# State


@dataclass(frozen=True, slots=True)
class Bag(State):
    rows_: Tensor
    host_rest: Tensor | None = None
    more: tuple[Any, ...] = ()


def test_a_storage_counts_once_and_whole() -> None:
    big = torch.zeros(2, 1000)
    assert Bag(big).size() == StateSize(device=8000)
    assert Bag(big[:, :10]).size() == StateSize(device=8000)  # the part keeps all of it
    assert Bag(big[:, :10].clone()).size() == StateSize(device=80)
    assert Bag(big, None, (big, big[:, 5:], big.view(-1))).size() == StateSize(device=8000)
    assert Bag(torch.arange(3).expand(2, -1)).size() == StateSize(device=48)  # for each row its own
    assert Bag(big, torch.zeros(2, 5)).size() == StateSize(device=8000, host=40)


@pytest.mark.parametrize("kind", ["torch", "torch, private", "numpy", "npy", "checkpoint", "path", "folder"])
def test_what_is_mapped_from_a_file_is_on_disk(tmp_path: Path, kind: str) -> None:
    file, row = tmp_path / "store", torch.zeros(1, 2)
    values = np.zeros((1, 2048), dtype=np.float32)
    if kind == "npy":
        np.save(tmp_path / "store.npy", values)
        kept: Any = torch.from_numpy(np.load(tmp_path / "store.npy", mmap_mode="r+"))
    elif kind == "checkpoint":
        torch.save(torch.zeros(1, 2048), file)
        kept = torch.load(file, mmap=True)
    else:
        values.tofile(file)
        kept = {"numpy": lambda: torch.from_numpy(np.memmap(file, dtype=np.float32, shape=(1, 2048))),
                "torch": lambda: torch.from_file(str(file), shared=True, size=2048)[None],
                "torch, private": lambda: torch.from_file(str(file), shared=False, size=2048)[None],
                "path": lambda: file, "folder": lambda: tmp_path}[kind]()  # fmt: skip
    assert Bag(row, None, (kept,)).size() == StateSize(device=8, disk=8192)


def test_arrays_and_shared_memory_are_not_on_disk() -> None:
    array, shared = torch.from_numpy(np.zeros((1, 2048), dtype=np.float32)), torch.zeros(1, 2048).share_memory_()
    assert Bag(array, shared).size() == StateSize(device=8192, host=8192)


@NAMED
def test_a_states_parts_keep_nothing_beside_themselves(entry: EntryPoint) -> None:
    model, state = build(entry).eval(), build(entry).eval().open(1)
    with torch.no_grad():
        for n in range(6):
            state = model.absorb(state, Segment.full(line(model.traits.segment or 8, n).ids[None]))
            assert state.size().total <= sum(t.nbytes for _, t in state.tensors())


@NAMED
def test_state_grows_as_the_model_says(entry: EntryPoint) -> None:
    model = build(entry)
    before = fit_growth(read(model, 8 * 24).accounting.sizes())
    assert before is not None
    assert (before.kind == "linear") == (entry.name in GROWING)
    if entry.name == "full-context":  # keys and values of a token in every layer, its mask and position
        b = model.backbone
        assert before.bytes_per_token == pytest.approx(2 * b.layers * b.kv_heads * b.head_width * 4 + 9, rel=0.02)
    small = build(entry, **SMALL.get(entry.name, {}))
    after = fit_growth(read(small, 8 * 40).accounting.sizes())
    assert after is not None
    assert (after.kind == "constant") == small.traits.bounded


def test_written_bytes_of_the_previous_segments_cache_are_the_segments_keys_and_values() -> None:
    model = build(MODELS["xl-cache"])
    b, meter = model.backbone, read(model, 8 * 10)
    of_a_token = 2 * b.layers * b.kv_heads * b.head_width * b.dtype.itemsize + 1 + 8  # with its mask and position
    assert meter.usage.state_written_bytes == meter.usage.state_bytes == 8 * of_a_token
    shared = read(build(MODELS["full-context"]), 8 * 10)  # what was read before is shared, not copied
    assert shared.usage.state_written_bytes == pytest.approx(8 * of_a_token, rel=0.01)
    assert shared.usage.state_read_bytes == pytest.approx(8 * of_a_token * sum(range(9)) / 9, rel=0.01)


def test_bytes_of_one_row_do_not_depend_on_the_rows_beside_it() -> None:
    for name in ("xl-cache", "retrieval", "full-context"):
        one, many = (read(build(MODELS[name]), 60, rows).usage for rows in (1, 5))
        assert replace(one, peak_device_bytes=0).state_bytes == many.state_bytes
        assert one.state_written_bytes == pytest.approx(many.state_written_bytes, rel=0.01)


def test_a_question_counts_what_its_stream_has_read() -> None:
    meter, model = Meter(Budget("tests"), CPU), build(MODELS["full-context"]).eval()
    with meter.phase("eval"), torch.no_grad():
        line_nll(model, [line(40)], before=800, watcher=meter)
        with meter.control("wiped"):  # a control is nobody's
            line_nll(model, [line(40)], before=8000, watcher=meter)
    assert [tokens for tokens, _ in meter.accounting.sizes()] == [832]  # one part of an octave
    assert meter.accounting.sizes()[0][1] == meter.usage.state_bytes


def test_few_sizes_are_kept_of_a_long_stream() -> None:
    accounting = Accounting(Usage(), CPU)
    accounting.entered("eval")
    for tokens in range(1, 200_000, 7):
        accounting.wrote(Bag(torch.zeros(1, 1)), Bag(torch.zeros(1, 2)), 1, tokens)
    found = accounting.sizes()
    assert len(found) == POINTS
    assert found[0] == (1, 8)
    assert found[-1][0] > 199_990
