"""What a cell reads and computes, counted without computing: its own driver, walked by a model that does nothing.

Batches, streams, questions and controls are those of the run, FLOPs those of the model's own formulas, and the meter is
the run's; so tokens and FLOPs are what its record will say, as long as no clock ends its training.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from memory_bench import plugins
from memory_bench.budget import Budget, BudgetExceeded, Usage
from memory_bench.cell import Cell, Training, digest
from memory_bench.corpus import Corpus
from memory_bench.driver.encoding import Stream, encode_episode
from memory_bench.driver.hollow import BlankCorpus, Call, Hollow, blank_stream
from memory_bench.driver.meter import Meter
from memory_bench.driver.observe import observe_streams
from memory_bench.driver.train import train
from memory_bench.episode import Encode
from memory_bench.protocol import MemoryModel, State
from memory_bench.running.building import put_adapters, window_training
from memory_bench.running.grid import make_task
from memory_bench.running.recipes import make_recipe, trains
from memory_bench.running.shapes import Shapes
from memory_bench.zoo.named import Backbones, Loaded
from memory_bench.zoo.pretrained import rematch
from memory_bench.zoo.skeletons import skeleton, tokens_of

ROUGH_BYTES = 2.4  # bytes in a token of a tokenizer that is not trained yet


@dataclass(frozen=True, slots=True)
class Noted:
    """A call of the model, and whether it is a control's, which is not charged."""

    call: Call
    control: bool


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step: how many segments it walks, and its FLOPs."""

    segments: int
    flops: float


@dataclass(frozen=True, slots=True)
class Counted:
    """What a cell would read and compute.

    Attributes:
        usage: tokens, FLOPs and optimiser steps, as its record will have them.
        steps: of its training, in order.
        calls: of its evaluation, in order.
        exact: as the run counts; otherwise the tokenizer is yet to be made, and texts have about so many tokens.
    """

    usage: Usage
    steps: tuple[Step, ...] = ()
    calls: tuple[Noted, ...] = ()
    exact: bool = True


class Tally(Meter):
    """A meter that reads neither clock nor memory.

    Args:
        budget: whose tokens and FLOPs end training, and whose seconds if it is known how many a FLOP takes.
        pace: seconds of a training FLOP; None: no clock ends it.
    """

    def __init__(self, budget: Budget, pace: float | None = None) -> None:
        self.calls: list[Noted] = []
        self.pace = pace
        # Where tokens or FLOPs are counted, seconds are a guard and no length.
        seconds = None if pace is None or budget.counts else budget.train_seconds
        super().__init__(
            replace(budget, device_bytes=None, host_bytes=None, train_seconds=seconds, eval_seconds=None),
            torch.device("cpu"),
        )

    def note(self, call: Call) -> None:
        """Told by the model."""
        self.calls.append(Noted(call, self._phase == "control"))

    def elapsed(self) -> float:
        """See `Meter.elapsed`: what the FLOPs so far would take."""
        return self.usage.train_flops * (self.pace or 0.0)

    def stepped(
        self, model: MemoryModel[Any], rows: int, tokens: int, before: int, real: int, *, absorbed: bool = False
    ) -> None:
        """See `Watcher.stepped`: tokens and FLOPs alone, for a model without weights holds nothing."""
        self.charge(model, rows, tokens, before, real, absorbed=absorbed)

    def ticked(self) -> None:
        """See `Watcher.ticked`: nothing is read."""

    def state(self, state: State, rows: int) -> None:
        """See `Watcher.state`: nothing is held."""

    def stepping(self, rows: int) -> AbstractContextManager[Any]:
        """See `Watcher.stepping`: nothing is computed."""
        del rows
        return nullcontext()

    def wrote(self, before: State, after: State, rows: int, read: int) -> None:
        """See `Watcher.wrote`: nothing is."""


@dataclass(slots=True)
class Counter:
    """Counts cells; what they share (streams, corpora, models of shapes) is made once.

    Args:
        backbones: where backbones come from, and the data with them.
    """

    backbones: Backbones
    _made: dict[str, Any] = field(default_factory=dict)

    def count(self, cell: Cell, pace: float | None = None, *, trains: bool = True) -> Counted:
        """What `cell` would read and compute.

        Args:
            cell: of a grid.
            pace: as of `Tally`.
            trains: it trains its model, rather than taking it from a checkpoint.

        Raises:
            UserError: something that it names cannot be had.
        """
        with one_thread():
            return self._count(cell, pace, trains=trains)

    def _count(self, cell: Cell, pace: float | None, *, trains: bool) -> Counted:
        usage, steps = self.training(cell, pace) if trains else (Usage(), ())
        model = self.model(cell.training, cell.scored_with)
        key = digest(["eval", *self._model_key(cell.training, cell.scored_with), self._task_key(cell)])
        meter, calls = self._once(key, lambda: self._evaluation(cell, model))
        usage = replace(usage, eval_tokens=meter.eval_tokens, eval_flops=meter.eval_flops)
        return Counted(usage, steps, calls, self.encoder(cell.training.backbone.name)[1])

    def _evaluation(self, cell: Cell, model: MemoryModel[Any]) -> tuple[Usage, tuple[Noted, ...]]:
        tally = Tally(cell.training.budget)
        hollow = Hollow(model, tally.note).eval().requires_grad_(False)
        streams = [blank_stream(s) for s in self.streams(cell)]
        with tally.phase("eval"):
            observe_streams(hollow, streams, seed=0, controls=cell.controls, watcher=tally, decode=lambda ids: "")
        return tally.usage, tuple(tally.calls)

    def streams(self, cell: Cell) -> list[Stream]:
        """The episodes of a cell, encoded."""
        encode, _ = self.encoder(cell.training.backbone.name)

        def made() -> list[Stream]:
            episodes = make_task(cell.task).episodes(self.backbones.library, cell.limit)
            return [encode_episode(episode, encode, cell.training.seed) for episode in episodes]

        streams: list[Stream] = self._once(digest(["streams", self._task_key(cell)]), made)
        return streams

    def training(self, cell: Cell, pace: float | None = None) -> tuple[Usage, tuple[Step, ...]]:
        """Tokens and FLOPs of the training of `cell`, and its steps."""
        key = digest(["train", cell.training.key, pace, asdict(cell.task)])
        found: tuple[Usage, tuple[Step, ...]] = self._once(key, lambda: self._training(cell, pace))
        return found

    def _training(self, cell: Cell, pace: float | None) -> tuple[Usage, tuple[Step, ...]]:
        training, recipe = cell.training, make_recipe(cell.training.recipe)
        if not trains(training):
            return Usage(), ()
        tally = Tally(training.budget, pace)
        steps: list[Step] = []
        if (first := window_training(training, self.backbones)) is not None:
            before, steps_before = self.training(replace(cell, training=first), pace)
            tally.charge_training(before)
            steps += steps_before
        made = dict.fromkeys(("calls", "flops"), 0.0) | {"flops": tally.usage.train_flops}

        def stepped(done: int, total: int) -> None:
            del done, total
            steps.append(Step(len(tally.calls) - int(made["calls"]), tally.usage.train_flops - made["flops"]))
            made.update(calls=len(tally.calls), flops=tally.usage.train_flops)

        def build(config: Any) -> MemoryModel[Any]:
            return Hollow(
                self.model(replace(training, model=replace(training.model, config=plugins.plain(config)))), tally.note
            )

        config = self.model(training).config
        # What ends before its first step has read what it has read; its limit is broken, as the run will say.
        with suppress(BudgetExceeded), tally.phase("train"):
            train(build, config, recipe, BlankCorpus(self.corpus(cell)), tally, seed=training.seed, progress=stepped)
        return tally.usage, tuple(steps)

    def corpus(self, cell: Cell) -> Corpus:
        """What a cell trains on, encoded. A corpus that remembers what it gave is made anew for every training."""
        encode, _ = self.encoder(cell.training.backbone.name)
        card = self.backbones.card(cell.training.backbone.name)
        task = make_task(cell.task)
        plan = task.plan(self.backbones.library, pretrained=card.pretrained)
        return task.corpus(self.backbones.library, plan, encode)

    def model(self, training: Training, changes: dict[str, Any] | None = None) -> Any:
        """The model of a training, without weights; with `changes`, as it is scored."""
        key = digest(["model", *self._model_key(training, changes)])
        return self._once(key, lambda: self._model(training, changes or {}))

    @staticmethod
    def _model_key(training: Training, changes: dict[str, Any] | None) -> list[Any]:
        """What a model without weights depends on; a recipe gives its backbone adapters, if anything is trained."""
        return [*map(asdict, (training.model, training.backbone, training.recipe)), trains(training), changes or {}]

    def _model(self, training: Training, changes: dict[str, Any]) -> Any:
        cls = plugins.load("models", training.model.name)
        fitted = cls.fit(self.backbones.card(training.backbone.name), training.budget)
        config = plugins.configure(training.model.name, fitted, {**training.model.config, **changes})
        with Shapes():
            return self.fresh(training)(config)

    def fresh(self, training: Training) -> Callable[[Any], MemoryModel[Any]]:
        """Builds the models of a training over one new backbone of shapes; to be called inside `Shapes`."""
        cls = plugins.load("models", training.model.name)
        card = self.backbones.card(training.backbone.name)
        pretrained = rematch(training, self.backbones)
        dtype = getattr(torch, training.backbone.config["dtype"])
        backbone = skeleton(self.backbones, card.name, dtype, None if pretrained is None else pretrained.own)
        put_adapters(backbone, training, cls, make_recipe(training.recipe))
        encode = tokens_of(self.backbones, card.name)

        def build(config: Any) -> MemoryModel[Any]:
            if (helpers := cls.helpers(config)) and encode is not None:
                self.backbones.equip(Loaded(backbone, encode, card), helpers)
            model: MemoryModel[Any] = cls(backbone, config, torch.Generator())
            return model

        return build

    def encoder(self, name: str) -> tuple[Encode, bool]:
        """The tokenizer of a backbone; or a rough one, and False."""
        found = self._once(f"tokens {name}", lambda: tokens_of(self.backbones, name))
        return (rough, False) if found is None else (found, True)

    @staticmethod
    def _task_key(cell: Cell) -> list[Any]:
        return [asdict(cell.task), cell.limit, cell.controls, asdict(cell.training.backbone)]

    def _once(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch uses one thread: threads that wait for tiny tensors take longer than the tensors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def rough(text: str) -> tuple[list[int], list[int]]:
    """About as many tokens as a small tokenizer would make, which is not there yet."""
    size = len(text.encode())
    count = max(1, round(size / ROUGH_BYTES)) if size else 0
    sizes = [size * (i + 1) // count - size * i // count for i in range(count)]
    return [0] * count, sizes
