"""A few real steps of a cell, in its own process and as it runs them: what one takes, and how much is held meanwhile.

Evaluation: the largest batch, cut to a few segments, then to twice as many, as long as there is time, with controls and
questions; then one row through its whole text, for what a memory grows to. Training: some optimiser steps of every
stage, the largest first. What does not fit the time is left out.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import Tensor

from memory_bench.budget import Budget
from memory_bench.cell import Cell
from memory_bench.corpus import Corpus, Line
from memory_bench.driver.clock import Clock, waited
from memory_bench.driver.encoding import Stream, encode_episode
from memory_bench.driver.hollow import Hollow, blank_stream
from memory_bench.driver.memory import forget_peak, peak_bytes
from memory_bench.driver.meter import Meter
from memory_bench.driver.observe import observe_streams, side_by_side
from memory_bench.driver.stream import Watcher, cut, segment_length
from memory_bench.driver.train import train
from memory_bench.episode import Decode, Episode
from memory_bench.protocol import DecodePlan, MemoryModel, Readout, Segment, State
from memory_bench.recipe import Recipe, Stage
from memory_bench.running.building import Parts
from memory_bench.running.counting import Noted, Tally
from memory_bench.running.pace import Sample, Stretch, fit_paces

TRAIN_SECONDS, EVAL_SECONDS, GROWTH_SECONDS = 6.0, 6.0, 3.0
STEPS = 4  # of a stage; the first warms up
FIRST_SEGMENTS = 2


class Timed(MemoryModel[Any]):
    """A model that notes when it was called; `times` are readings of `clock`."""

    def __init__(self, model: MemoryModel[Any], clock: Clock) -> None:
        super().__init__()
        self._of, self._clock = [model], clock
        self.times: list[float] = []
        self.traits, self.backbone = model.traits, model.backbone

    def open(self, rows: int, *, seeds: Sequence[int] | None = None) -> Any:
        """See `MemoryModel.open`."""
        return self._of[0].open(rows, seeds=seeds)

    def step(self, state: Any, segment: Segment, *, write: bool = True) -> tuple[Readout, Any]:
        """See `MemoryModel.step`."""
        self.times.append(self._clock.now())
        return self._of[0].step(state, segment, write=write)

    def absorb(self, state: Any, segment: Segment) -> Any:
        """See `MemoryModel.absorb`."""
        self.times.append(self._clock.now())
        return self._of[0].absorb(state, segment)

    def decode(self, state: Any, prompt: Segment, plan: DecodePlan) -> Tensor:
        """See `MemoryModel.decode`."""
        self.times.append(self._clock.now())
        return self._of[0].decode(state, prompt, plan)

    def flops(self, tokens: int, remembered: int) -> int:
        """See `MemoryModel.flops`."""
        return self._of[0].flops(tokens, remembered)


@dataclass(frozen=True, slots=True)
class Measured:
    """What a few steps of a cell said.

    Attributes:
        start_bytes: main memory that the process held before anything was charged.
        start_seconds: that passed until the model was built: imports, backbone, data.
        encode_seconds: of the device, for the text of all episodes.
        train: steps of its stages; empty where nothing is trained or there was no time.
        train_peak: bytes above the start; 0: see `train`.
        paces: seconds of a call of the model by kind, as `memory_bench.running.pace` has them.
        stretches: what the largest batch held after so many tokens.
        rows: of that batch.
        growth: (tokens, bytes of one row's memory) up to the longest text, or as far as there was time.
    """

    start_bytes: int
    start_seconds: float
    encode_seconds: float
    train: list[dict[str, float]]
    train_peak: int
    paces: dict[str, list[float]]
    stretches: list[dict[str, float]]
    rows: int
    growth: list[list[int]]


def measure(
    cell: Cell, parts: Parts, corpus: Corpus | None, episodes: Sequence[Episode], meter: Meter, decode: Decode
) -> Measured:
    """Train and read a little.

    Args:
        cell: what will be run.
        parts: what its model is made of.
        corpus: what it is trained on; None: it is not trained.
        episodes: of its task.
        meter: of the cell, made where a run makes it: peaks are above its start.
        decode: the backbone's tokenizer, backwards.
    """
    clock = Clock(wall=meter.device.type == "cuda")
    passed = time.time() - psutil.Process().create_time() - waited(os.getpid())
    start = max(time.process_time(), passed)
    released = parts.released()
    scored = parts.scored(parts.begun() if released is None else released.model, cell.scored_with)
    began = clock.now()
    streams = [encode_episode(episode, parts.loaded.encode, cell.training.seed) for episode in episodes]
    encode_seconds = clock.now() - began
    streams.sort(key=lambda s: -len(s.line))
    batch = streams[: side_by_side(scored, len(streams[0].line))]
    # Before any training: what that leaves free would hide what a memory grows by. Weights make no difference to it.
    _forget_peak(meter)
    samples, stretches = _read(cell, scored, batch, clock, meter, decode)
    growth = _grow(scored, batch[0].line, clock)
    _forget_peak(meter)
    steps = [] if corpus is None else _train(parts, corpus, cell.training.seed, clock, meter.device)
    train_peak = _peak(meter) if steps else 0
    return Measured(
        start_bytes=meter.held,
        start_seconds=start,
        encode_seconds=encode_seconds,
        train=steps,
        train_peak=train_peak,
        paces=fit_paces(samples),
        stretches=[s.to_json() for s in stretches],
        rows=len(batch),
        growth=growth,
    )


def _train(parts: Parts, corpus: Corpus, seed: int, clock: Clock, device: torch.device) -> list[dict[str, float]]:
    """A few optimiser steps of each stage, the largest first, as far as there is time."""
    recipe, began, found = parts.recipe, clock.now(), []
    probe = replace(recipe.stages[0], segments=1, rows=1, steps=1)
    probed = _steps(parts, recipe, probe, corpus, seed, clock, device)
    per_flop = probed[0]["seconds"] / max(1.0, probed[0]["flops"]) if probed else 0.0
    for stage in sorted(recipe.stages, key=lambda s: -s.rows * s.segments):
        share = probed[0]["flops"] * stage.rows * max(1, stage.segments) if probed else 0.0
        left = TRAIN_SECONDS - (clock.now() - began)
        steps = min(STEPS, int(left / max(1e-9, per_flop * share)))
        if steps < 1 and per_flop * share > left:
            continue
        done = _steps(parts, recipe, replace(stage, steps=max(2, steps)), corpus, seed, clock, device)
        found += done[1:] if len(done) > 1 else done
        per_flop = done[-1]["seconds"] / max(1.0, done[-1]["flops"]) if done else per_flop
    return found


def _steps(
    parts: Parts, recipe: Recipe, stage: Stage, corpus: Corpus, seed: int, clock: Clock, device: torch.device
) -> list[dict[str, float]]:
    """What each step of a stage took; with its walked segments and FLOPs."""
    meter, found = _Segments(Budget("calibration"), device), list[dict[str, float]]()
    last = {"seconds": clock.now(), "flops": 0.0, "segments": 0.0}

    def stepped(done: int, total: int) -> None:
        del done, total
        now = {"seconds": clock.now(), "flops": meter.usage.train_flops, "segments": float(meter.walked)}
        found.append({name: value - last[name] for name, value in now.items()})
        last.update(now)

    with meter.phase("train"):
        short = replace(recipe, stages=(stage,))
        train(parts.build, parts.config, short, corpus, meter, seed=seed, progress=stepped)
    return found


class _Segments(Meter):
    """Also counts the segments that were walked."""

    walked = 0

    def stepped(self, *args: Any, **more: Any) -> None:
        """See `Watcher.stepped`."""
        self.walked += 1
        super().stepped(*args, **more)


class _States(Watcher):
    """The largest memory of a row, in bytes."""

    held = 0

    def state(self, state: State, rows: int) -> None:
        """See `Watcher.state`."""
        size = state.size()
        self.held = max(self.held, (size.device + size.host) // max(1, rows))


def _read(
    cell: Cell, model: MemoryModel[Any], batch: Sequence[Stream], clock: Clock, meter: Meter, decode: Decode
) -> tuple[list[Sample], list[Stretch]]:
    """The batch cut to a few segments, then to twice as many; what every call took, and what was held."""
    samples: list[Sample] = []
    stretches: list[Stretch] = []
    length, segments, began, last = segment_length(model), FIRST_SEGMENTS, clock.now(), 0.0
    longest = len(batch[0].line)
    while not stretches or (stretches[-1].tokens < longest and clock.now() - began + 2.5 * last < EVAL_SECONDS):
        tokens = min(longest, segments * length)
        part = [shortened(stream, tokens, length) for stream in batch]
        started, timed, states = clock.now(), Timed(model, clock), _States()
        observe_streams(timed, part, seed=0, controls=cell.controls, watcher=states, decode=decode)
        ended = clock.now()
        last = ended - started
        calls = calls_of(model, part, controls=cell.controls)
        if len(calls) == len(timed.times):
            took = [b - a for a, b in zip(timed.times, [*timed.times[1:], ended], strict=True)]
            samples += [Sample.of(noted, model, seconds) for noted, seconds in zip(calls, took, strict=True)]
        stretches.append(Stretch(tokens, _peak(meter), states.held, last))
        segments *= 2
    return samples, stretches


def calls_of(model: MemoryModel[Any], streams: Sequence[Stream], *, controls: bool) -> list[Noted]:
    """What the driver would ask of `model` to read `streams`."""
    tally = Tally(Budget("calibration"))
    hollow = Hollow(model, tally.note).eval().requires_grad_(False)
    blanked = [blank_stream(s) for s in streams]
    observe_streams(hollow, blanked, seed=0, controls=controls, watcher=tally, decode=lambda ids: "")
    return tally.calls


def shortened(stream: Stream, tokens: int, length: int) -> Stream:
    """The first `tokens` tokens of a stream, with its questions there; of those that come later the first, earlier."""
    if len(stream.line) <= tokens:
        return stream
    line = stream.line
    given = None if line.given is None else line.given[:tokens]
    kept = [q for q in stream.questions if q.at <= tokens]
    if stream.questions and not kept:
        kept = [replace(stream.questions[0], at=tokens - tokens // 3 % length)]
    cut_line = Line(line.ids[:tokens], line.scored[:tokens], given, line.seed)
    return replace(
        stream, line=cut_line, nbytes=stream.nbytes[:tokens], words=stream.words[:tokens],
        events=stream.events[:tokens], questions=tuple(kept),
    )  # fmt: skip


@torch.no_grad()
def _grow(model: MemoryModel[Any], line: Line, clock: Clock) -> list[list[int]]:
    """What one row remembers after so many tokens of its text."""
    length, began, state, found = segment_length(model), clock.now(), model.open(1, seeds=[line.seed]), []
    for start in range(0, len(line), length):
        segment, _ = cut([line], start, length, model.backbone.device)
        state = model.absorb(state, segment)
        size = state.size()
        found.append([start + segment.ids.shape[1], size.device + size.host])
        if clock.now() - began > GROWTH_SECONDS:
            break
    return found


def _peak(meter: Meter) -> int:
    """The most held above the start since it was last forgotten."""
    if meter.device.type == "cuda":
        return torch.cuda.max_memory_allocated(meter.device)
    return max(0, peak_bytes() - meter.held)


def _forget_peak(meter: Meter) -> None:
    """From now on the peak is that of what follows."""
    if meter.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(meter.device)
    forget_peak()
