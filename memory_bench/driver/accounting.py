"""What a cell holds and moves: bytes of weights, gradients, optimiser, activations and state, and joules.

The meter owns one and tells it of what happens; numbers go into `Usage` as they are known.

- Weights, gradients and the optimiser's state are sums over tensors.
- Activations are what was alive at once (`memory_bench.driver.alive`) beside weights, gradients, optimiser and memory
  state, in steps chosen for that: the first of every stage of training, where states are activations as gradients flow
  through them, and in evaluation the first step and one whenever rows or state have doubled.
- State is counted after every step of the main pass of the evaluation: the largest per row by place, what a step was
  given and what it made anew, and how the size grows with the tokens read.
"""

import math
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from memory_bench.budget import Usage
from memory_bench.driver.alive import Alive
from memory_bench.driver.energy import Energy
from memory_bench.protocol import MemoryModel, State
from memory_bench.state import Place, size_of

PER_OCTAVE = 4  # sizes kept for every doubling of the tokens read
POINTS = 40  # sizes kept in a record


class Accounting:
    """What one cell holds and moves, written into its `usage`.

    Args:
        usage: of the cell.
        device: where the model runs.
        energy: read in place of the device's own counters.
    """

    def __init__(self, usage: Usage, device: torch.device, energy: Energy | None = None) -> None:
        self.usage = usage
        self.energy = energy or Energy(_identifier(device))
        self._model: weakref.ref[MemoryModel[Any]] | None = None
        self._phase = ""
        self._began: float | None = None  # joules from which the phase's count
        self._unmeasured = False  # a part of the training's joules is not known, so their sum is not
        self._optimised = 0  # parameters that the optimiser keeps something of
        self._open: Alive | None = None  # of an evaluation step whose state after it is not known yet
        self._rows, self._held, self._measured = 0, 0, 0  # largest of a measured step; bytes of state now and then
        self._last: tuple[State, dict[object, tuple[Place, int]]] | None = None  # what is held by the state just made
        self._moved = [0, 0, 0]  # bytes read and written, rows times segments
        self._sizes: dict[int, tuple[int, int]] = {}  # by part of an octave: (tokens read, bytes per row)

    def model(self, model: MemoryModel[Any]) -> None:
        """`model` is at work: its weights, each once, and those of a frozen helper."""
        self.energy.tick()
        if self._model is None or self._model() is not model:
            self._model = weakref.ref(model)
            self.usage.weight_bytes = weight_bytes(model)

    def entered(self, phase: str) -> None:
        """From here on it is `phase`: ``train`` or ``eval``; in any other, steps and joules are nobody's."""
        now = self.energy.now()
        known = self._phase == "eval" or (self._phase == "train" and not self._unmeasured)
        if now is not None and self._began is not None and known:
            field = f"{self._phase}_joules"
            setattr(self.usage, field, (getattr(self.usage, field) or 0.0) + now - self._began)
        self._phase, self._began = phase, now

    def take_up(self, spent: Usage) -> None:
        """The joules of the training are `spent` and those to come, if both are measured."""
        self._unmeasured = spent.train_joules is None or self.energy.now() is None
        self.usage.train_joules = None if self._unmeasured else spent.train_joules

    @contextmanager
    def training(self, optimizer: Optimizer, *, first: bool) -> Iterator[None]:
        """Around one optimiser step; of the `first` of a stage the activations are measured."""
        if not first:
            yield
        else:
            with Alive() as alive:
                yield
            kept = [*_state_of(optimizer), *(p.grad for p in _parameters(optimizer) if p.grad is not None)]
            self.usage.activation_bytes = max(self.usage.activation_bytes or 0, alive.peak_beside(kept))
        if first or len(optimizer.state) != self._optimised:
            self._optimised = len(optimizer.state)
            gradients = sum(p.grad.nbytes for p in _parameters(optimizer) if p.grad is not None)
            kept_bytes = sum(t.nbytes for t in _state_of(optimizer))
            self.usage.gradient_bytes = max(self.usage.gradient_bytes or 0, gradients)
            self.usage.optimizer_bytes = max(self.usage.optimizer_bytes or 0, kept_bytes)

    def stepping(self, rows: int) -> AbstractContextManager[Any]:
        """Around one step with `rows` rows; in evaluation measured where it is likely the largest so far."""
        self._close(())
        self._last = None
        if self._phase != "eval":
            return nullcontext()
        grown = self._held >= 2 * self._measured and self._held > (self.usage.activation_bytes or 0) // 4
        if rows < 2 * self._rows and not grown:
            return nullcontext()
        self._rows, self._measured = max(self._rows, rows), self._held
        self._open = Alive()
        return self._open

    def _close(self, kept: tuple[Tensor, ...]) -> None:
        if self._open is not None:
            self.usage.activation_bytes = max(self.usage.activation_bytes or 0, self._open.peak_beside(kept))
            self._open = None

    def state(self, state: State, rows: int) -> None:
        """A state of `rows` rows exists; of those in evaluation the largest of one row counts, by place."""
        if self._phase != "eval" or not rows:
            return
        self._close(tuple(t for _, t in state.tensors()) if self._open is not None else ())
        held = state.holdings()
        self._last = state, held
        size, usage = size_of(held), self.usage
        self._held = size.total
        usage.state_bytes = max(usage.state_bytes, size.device // rows)
        usage.state_host_bytes = max(usage.state_host_bytes, size.host // rows)
        usage.state_disk_bytes = max(usage.state_disk_bytes or 0, size.disk // rows)

    def wrote(self, before: State, after: State, rows: int, read: int) -> None:
        """A step was given `before` and made `after`, which has read `read` tokens of each of its `rows` rows.

        Counted in evaluation. What a step is given counts as read. Storages of `after` that are not in `before` count
        as written: a store that is copied to make room is written whole, one that shares its older part with the state
        before only for what is new.
        """
        if self._phase != "eval" or not rows:
            return
        last, self._last = self._last, None  # no state outlives its step for being counted
        made = last[1] if last is not None and last[0] is after else after.holdings()
        given = before.holdings()
        self._moved[0] += sum(size for _, size in given.values())
        self._moved[1] += sum(size for key, (_, size) in made.items() if key not in given)
        self._moved[2] += rows
        self.usage.state_read_bytes = self._moved[0] / self._moved[2]
        self.usage.state_written_bytes = self._moved[1] / self._moved[2]
        size = sum(size for _, size in made.values()) // rows
        part = math.floor(PER_OCTAVE * math.log2(max(1, read)))
        self._sizes[part] = max(self._sizes.get(part, (0, 0)), (read, size))

    def sizes(self) -> list[tuple[int, int]]:
        """(tokens read, bytes of a row's state) in ascending order, spread evenly over the octaves."""
        found = sorted(self._sizes.values())
        last = len(found) - 1
        picked = range(len(found)) if len(found) <= POINTS else {round(i * last / (POINTS - 1)) for i in range(POINTS)}
        return [found[i] for i in sorted(picked)]


def weight_bytes(model: MemoryModel[Any]) -> int:
    """Bytes of a model's parameters and of its frozen embedder's, each storage once."""
    embedder = model.backbone.embedder
    helper = 0 if embedder is None else embedder.parameters * torch.float32.itemsize
    storages = [p.untyped_storage() for p in model.parameters()]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values()) + helper


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _state_of(optimizer: Optimizer) -> list[Tensor]:
    return [value for kept in optimizer.state.values() for value in kept.values() if isinstance(value, Tensor)]


def _identifier(device: torch.device) -> str | None:
    """A GPU's, as its driver knows it; None for the processors."""
    if device.type != "cuda":
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)  # older releases do not know it
    return None if uuid is None else str(uuid)
