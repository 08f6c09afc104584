"""The conformance suite itself: it passes a small correct memory model, and catches the same model with one flaw."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from memory_bench.backbone.model import Backbone
from memory_bench.data import Library
from memory_bench.episode import Ask, Episode, Estimate, Read, Task, TrainingPlan
from memory_bench.protocol import DecodePlan, MemoryModel, Readout, Segment, State, Traits
from memory_bench.testing import (
    Check,
    check_model,
    check_task,
    measure_look_ahead,
    measured_flops,
    memory,
    model_checks,
    numbers,
    tiny_backbone,
)

SEGMENT = 8


@dataclass(frozen=True, slots=True)
class ToyConfig:
    flaw: str = ""


@dataclass(frozen=True, slots=True)
class ToyState(State):
    memory: Tensor  # [rows, 1, width]
    log: Tensor  # [rows, n], grows only where that is the flaw


class Toy(MemoryModel[ToyState]):
    """Puts a gated mean of the previous segment's hidden states before the segment."""

    Config = ToyConfig
    source = "made up"

    def __init__(self, backbone: Backbone, config: ToyConfig, rng: torch.Generator) -> None:
        super().__init__()
        self.backbone, self.flaw = backbone, config.flaw
        self.gate = nn.Parameter(torch.randn(backbone.width, generator=rng))
        if self.flaw == "unreached":
            self.idle = nn.Parameter(torch.zeros(3))
        self.traits = Traits(segment=SEGMENT, chunk_invariant=self.flaw == "chunks")

    def open(self, rows: int, *, seeds: Sequence[int] | None = None) -> ToyState:
        memory = self.gate.new_zeros(rows, 1, self.backbone.width)
        return ToyState(memory, memory[:, 0, :0])

    def step(self, state: ToyState, segment: Segment, *, write: bool = True) -> tuple[Readout, ToyState]:
        real = torch.ones_like(segment.mask) if self.flaw == "padding" else segment.mask
        embeds = self.backbone.embed(segment.ids)
        if self.flaw == "looks ahead":
            embeds = embeds + mean(embeds, real)
        if self.flaw == "length":
            embeds = embeds * segment.ids.shape[1]
        if self.flaw == "module":
            embeds = embeds + getattr(self, "last", 0.0)
        if self.flaw == "weights":
            self.scale = getattr(self, "scale", float(self.gate.sum()))
            embeds = embeds + self.scale
        one = real.new_ones(real.shape[0], 1)
        mask, text = torch.cat([one, real], dim=1), torch.cat([~one, real], dim=1)
        hidden = self.backbone.run(torch.cat([state.memory, embeds], dim=1), mask, text=text)[:, 1:]
        if self.flaw == "module":
            self.last = float(hidden.detach().mean())
        if self.flaw == "random":
            torch.rand(1)
        readout = Readout(hidden, self.backbone.head)
        return readout, state if not write and self.flaw != "peek" else self._write(state, hidden, real)

    def _write(self, state: ToyState, hidden: Tensor, real: Tensor) -> ToyState:
        memory = self.gate * mean(hidden, real)
        if self.flaw == "rows":
            memory = memory.mean(dim=0, keepdim=True).expand_as(memory)
        if self.flaw != "empty":
            memory = torch.where(real.any(dim=1)[:, None, None], memory, state.memory)
        if self.flaw == "in place":
            state.memory.copy_(memory)
        if self.flaw == "bfloat16":
            memory = memory.float()
        log = torch.cat([state.log, memory[:, 0]], dim=1) if self.flaw == "grows" else state.log
        return replace(state, memory=memory, log=log)

    def absorb(self, state: ToyState, segment: Segment) -> ToyState:
        return state if self.flaw == "absorb" else super().absorb(state, segment)

    def absorb_flops(self, tokens: int, remembered: int) -> int:
        if self.flaw == "overcharge":  # the head of predictions that nobody asks for
            return self.flops(tokens, remembered)
        return 0 if self.flaw == "absorb" else super().absorb_flops(tokens, remembered)

    def decode(self, state: ToyState, prompt: Segment, plan: DecodePlan) -> Tensor:
        out = super().decode(state, prompt, plan)
        return out.flip(1) if self.flaw == "decode" else out

    def flops(self, tokens: int, remembered: int) -> int:
        rows = tokens if self.flaw == "flops" else tokens + 1  # the memory row
        return self.backbone.flops(rows, keys=rows, predicted=tokens)


def mean(x: Tensor, mask: Tensor) -> Tensor:
    """``[rows, 1, width]``: mean over real tokens."""
    return (x * mask[..., None]).sum(dim=1, keepdim=True) / mask.sum(dim=1)[:, None, None]


def toy(flaw: str = "") -> Callable[[], MemoryModel[Any]]:
    return lambda: Toy(tiny_backbone("qwen3"), ToyConfig(flaw), torch.Generator().manual_seed(1))


def broken_promises(flaw: str) -> set[str]:
    found = set()
    for check in model_checks():
        try:
            check(toy(flaw))
        except Exception:
            found.add(check.__name__)
    return found


def test_a_correct_model_passes() -> None:
    check_model(toy())


def test_a_model_that_looks_ahead_is_caught_by_what_tells_it_alone() -> None:
    assert broken_promises("looks ahead") == {"look_ahead_is_declared", "what_follows_has_no_influence"}
    assert measure_look_ahead(toy("looks ahead")()) == SEGMENT - 1


def test_a_piece_whose_length_is_known_is_caught_though_no_token_is_seen() -> None:
    numbers.look_ahead_is_declared(toy("length"))
    with pytest.raises(AssertionError, match="as if nothing followed"):
        numbers.what_follows_has_no_influence(toy("length"))


def test_memory_on_the_module_is_caught() -> None:
    with pytest.raises(AssertionError, match="leave nothing on the module, but last changed"):
        memory.nothing_stays_on_the_module(toy("module"))
    assert broken_promises("module") >= {"reopening_repeats", "documents_do_not_leak", "peeking_is_pure"}


@pytest.mark.parametrize(
    ("flaw", "check"),
    [
        ("peek", memory.peeking_is_pure),
        ("in place", memory.states_are_values),
        ("rows", memory.rows_are_independent),
        ("padding", memory.padding_has_no_influence),
        ("empty", memory.empty_rows_keep_their_memory),
        ("random", memory.random_state_is_untouched),
        ("grows", memory.size_is_honest),
        ("unreached", numbers.gradients_reach_the_parameters),
        ("weights", numbers.weights_are_the_whole_model),
        ("flops", numbers.flops_are_counted),
        ("overcharge", numbers.flops_are_counted),
        ("decode", numbers.decoding_is_rereading),
        ("absorb", numbers.absorbing_is_stepping),
        ("length", numbers.what_follows_has_no_influence),
        ("chunks", numbers.chunks_do_not_matter_where_promised),
        ("bfloat16", numbers.bfloat16_works),
    ],
)
def test_every_flaw_is_caught(flaw: str, check: Check) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        check(toy(flaw))


class Quiz(Task):
    """Asks what was read; with one flaw."""

    Config = ToyConfig
    headline, needs = "accuracy", "nothing"

    def __init__(self, flaw: str = "") -> None:
        self.flaw, self.calls = flaw, 0

    def episodes(self, library: Any, limit: int | None) -> Iterator[Episode]:
        self.calls += 1
        for number in range(limit or 9):
            fact = Read(f"It is {number % 2}{' again' * self.calls if self.flaw == 'changes' else ''}.", tag="fact")
            ask = Ask("Is it", (" 0", " 1"), " 2" if self.flaw == "answer" else f" {number % 2}", evidence="fact")
            events = (ask, fact) if self.flaw == "evidence" else (fact, ask)
            yield Episode("same" if self.flaw == "ids" else str(number), events)

    def plan(self, library: Any, *, pretrained: bool) -> TrainingPlan:
        return TrainingPlan("none")

    def corpus(self, library: Any, plan: TrainingPlan, encode: Any) -> Any:
        raise NotImplementedError

    def metrics(self, samples: pd.DataFrame, seed: int = 0) -> list[Estimate]:
        main = samples[samples["control"] == ""]
        share = float((main["predicted"] == main["answer"]).mean())
        return [Estimate("accuracy", 1 - share if self.flaw == "metrics" else share, None, None, len(main))]


def test_a_correct_task_passes() -> None:
    check_task(Quiz(), Library(None, Path("unused")))


@pytest.mark.parametrize(
    ("flaw", "sentence"),
    [
        ("changes", "the same every time"),
        ("answer", "not among the choices"),
        ("evidence", "read before its question"),
        ("ids", "ids must be unique"),
        ("metrics", "must be better for an oracle"),
    ],
)
def test_every_flaw_of_a_task_is_caught(flaw: str, sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check_task(Quiz(flaw), Library(None, Path("unused")))


@pytest.mark.parametrize("grad", [False, True])
def test_the_counter_knows_every_way_to_write_a_product(grad: bool) -> None:
    """PyTorch's own counts nothing for these on a CPU (findings/torch-flop-counter-spelling.sh)."""
    keys, query, text = torch.randn(64, 32), torch.randn(32), torch.randn(2, 16, 32)
    lstm = torch.nn.LSTM(32, 32, num_layers=2, batch_first=True)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    with torch.set_grad_enabled(grad):
        assert measured_flops(lambda: keys @ query) == 2 * 64 * 32
        assert measured_flops(lambda: torch.addmv(torch.zeros(64), keys, query)) == 2 * 64 * 32
        assert measured_flops(lambda: torch.dot(query, query)) == 2 * 32
        assert measured_flops(lambda: lstm(text)) == 2 * 2 * (2 * 16) * 4 * 2 * 32 * 32
        fused, written = (measured_flops(lambda mode=mode: layer.train(mode)(text)) for mode in (False, True))
    assert fused == written > 0
