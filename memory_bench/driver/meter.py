"""Counts what a cell spends, and stops it where the budget says so. One meter a cell, handed down; no globals.

Every limit is looked at with every step of the model, in training, reading, questions, generation and controls alike.
Seconds are those of `memory_bench.driver.clock`. Whoever watches from outside learns of every step by the beacon.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, Self

import torch

from memory_bench.budget import Budget, BudgetExceeded, Usage
from memory_bench.driver.accounting import Accounting
from memory_bench.driver.beacon import Beacon, Place
from memory_bench.driver.clock import Clock
from memory_bench.driver.ledger import Ledger
from memory_bench.driver.memory import forget_peak, peak_bytes, resident
from memory_bench.driver.others import Others, Spending
from memory_bench.driver.stream import Watcher
from memory_bench.protocol import MemoryModel, State

__all__ = ["BACKWARD_PASSES", "TRAIN_PASSES", "Meter", "Phase", "peak_bytes"]

Phase = Literal["train", "eval"]
BACKWARD_PASSES = 2  # what a backward pass costs, in forward passes
TRAIN_PASSES = 1 + BACKWARD_PASSES
BYTES = ("device_bytes", "host_bytes")
PEAKS = ("peak_device_bytes", "peak_reserved_bytes", "peak_host_bytes")
TRAINED = ("train_tokens", "train_steps", "train_flops", "train_seconds")
SPENT = (*TRAINED, "gradient_bytes", "optimizer_bytes", "activation_bytes")


def training_flops(
    model: MemoryModel[Any], rows: int, tokens: int, before: int, passes: int, absorbed: bool = False
) -> float:
    """FLOPs of a training step of `rows` rows, its backward pass included, in `passes` forward passes."""
    flops = rows * (model.absorb_flops if absorbed else model.flops)(tokens, before)
    detached = 0 if absorbed else rows * model.detached_flops(tokens, before)
    return passes * flops - BACKWARD_PASSES * detached


class Meter(Watcher):
    """What was spent so far (`usage`) against the limits of `budget`.

    Args:
        budget: the limits.
        device: where the model runs; on CPU device memory is the process's peak above its start.
        beacon: told of every step, and of every beginning and end of a phase.
        others: what other processes of the training spend (`memory_bench.driver.others`).

    Attributes:
        counted: in a training that several processes share, (rows, tokens, real tokens) that all of them step after so
            many tokens: they are counted in place of this process's own.
    """

    def __init__(
        self, budget: Budget, device: torch.device, beacon: Beacon | None = None, others: Others | None = None
    ) -> None:
        self.budget, self.device, self.beacon = budget, device, beacon
        self.usage, self.ledger, self.others = Usage(), Ledger(), others or Others()
        self.counted: Callable[[int], tuple[int, int, int]] | None = None
        self.accounting = Accounting(self.usage, device)
        self.train_passes = TRAIN_PASSES  # one more where activations are recomputed
        self._phase = "start"
        self._within, self._step, self._control = "", "", ""
        self._beside = (0, 0)  # the model at work, how many parameters it has beside its backbone
        self._clock = Clock(wall=device.type != "cpu")
        self._mark = self._clock.reading()
        self.begin()

    def begin(self) -> None:
        """Charge the cell from here on: not with what the process holds now, nor with what it held before."""
        self._forget_peak()
        self.held = resident().now
        if self.device.type == "cuda" and self.budget.device_bytes is not None:
            # The allocator itself refuses what the budget does not allow.
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.budget.device_bytes / total), self.device)
        self._tell()

    def _forget_peak(self) -> None:
        forget_peak()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def another(self) -> Self:
        """A meter for a training of its own under the same budget, charged from the same start."""
        self.read_memory()  # beginning anew forgets the peak
        other = type(self)(self.budget, self.device, self.beacon, self.others.another())
        other.held = self.held
        return other

    # Where the cell is

    @property
    def where(self) -> str:
        """The place in the work: ``optimiser step 12, segment 3/8``; empty before there is one."""
        place = ", ".join(filter(None, (self._within, self._step)))
        return place + (f" (control {self._control})" if self._control and place else "")

    def at(self, number: int, total: int, name: str = "") -> None:
        """See `Watcher.at`; the beacon is told."""
        alone = total == 1 and self._within and self._phase != "train"  # a question in one step is a place of its own
        self._step = "" if alone else f"segment {number}/{total}"
        if name and not self._within:
            self._step += f" of {name.removesuffix(f' (control {self._control})')}"
        self._tell()

    @contextmanager
    def within(self, place: str) -> Iterator[None]:
        """See `Watcher.within`."""
        outer = self._within, self._step
        self._within, self._step = place, ""
        yield
        self._within, self._step = outer  # where it fails, the place stays

    def _tell(self) -> None:
        if self.beacon is not None:
            own = self._spent() - (self.others.seconds if self._phase == "train" else 0.0)
            began = self._mark.before(own)  # what others compute their watcher sees itself
            self.beacon.tell(Place(self._phase, self.where, began, self.held + self.others.held))

    # Phases and their clocks

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Times what happens inside; the seconds are written even if it fails. Hard limits are checked at its end.

        Raises:
            BudgetExceeded: see `enforce`.
        """
        outer = self._enter(name)
        self._within = self._step = self._control = ""
        self._tell()
        try:
            yield
            self._synchronise()
            self.enforce()
        finally:
            self._synchronise()
            self.read_memory()
            self.ledger.rest()
            self._enter(outer)
            if name == "train":
                self.others.add_to(self.usage, wall=self.device.type != "cpu")
            self._tell()

    @contextmanager
    def control(self, name: str) -> Iterator[None]:
        """See `Watcher.control`: a clock of its own, which the budget bounds as well; one in another is part of it."""
        if self._phase == "control":
            yield
            return
        self._synchronise()
        place = self._within, self._step
        outer, self._control = self._enter("control"), name
        self._tell()
        try:
            yield
            self._synchronise()
            self.enforce()
            self._control, (self._within, self._step) = "", place  # where it fails, the place stays
        finally:
            self._synchronise()
            self._enter(outer)
            self._tell()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What happens inside is the harness's own and charged to nobody: no seconds, no joules, no peak of memory."""
        self._synchronise()
        outer = self._enter("start")
        self.read_memory()
        self._tell()
        try:
            yield
        finally:
            self._synchronise()
            self._forget_peak()
            self._enter(outer)
            self._tell()

    def take_up(self, spent: Usage) -> None:
        """Go on from what an earlier attempt at this training had `spent`; inside of `aside`."""
        for name in SPENT:
            setattr(self.usage, name, getattr(spent, name))
        for name in PEAKS:
            setattr(self.usage, name, max(getattr(self.usage, name), getattr(spent, name)))
        self.accounting.take_up(spent)

    def _enter(self, phase: str) -> str:
        """Go over into another phase; the one before is returned."""
        self._settle()
        outer, self._phase = self._phase, phase
        self.accounting.entered(phase)
        return outer

    def _settle(self) -> None:
        """Charge the phase with the seconds since they were last charged."""
        now = self._clock.reading()
        spent, self._mark = self._spent() + self._clock.between(self._mark, now), now
        if self._phase != "start":
            setattr(self.usage, f"{self._phase}_seconds", spent)

    def _spent(self) -> float:
        return 0.0 if self._phase == "start" else float(getattr(self.usage, f"{self._phase}_seconds"))

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def elapsed(self) -> float:
        """Seconds in the current phase (earlier phases of the same name included)."""
        self._settle()
        return self._spent()

    def spending(self) -> Spending:
        """What this process has spent and held in the phase, as it tells the first one."""
        self._settle()
        self.read_memory()
        u = self.usage
        kinds = (u.gradient_bytes or 0, u.optimizer_bytes or 0, u.activation_bytes or 0)
        host = self.others.own_held + max(0, u.peak_host_bytes - self.held)
        return Spending(self._spent(), u.peak_device_bytes, u.peak_reserved_bytes, host, *kinds)

    def count_others(self, spent: Sequence[Spending]) -> None:
        """Charge the phase with what the other processes have spent since they were last counted; see `Others`.

        Raises:
            BudgetExceeded: see `enforce`.
        """
        self._settle()
        self.usage.train_seconds += self.others.count(spent)
        self._tell()
        self.enforce()

    # What was spent

    def stepped(
        self, model: MemoryModel[Any], rows: int, tokens: int, before: int, real: int, *, absorbed: bool = False
    ) -> None:
        """See `Watcher.stepped`; raises `BudgetExceeded` where a limit that ends the work is passed."""
        self.charge(model, rows, tokens, before, real, absorbed=absorbed)
        self.ledger.hold(model)
        self.accounting.model(model)
        self.count_added(model)
        self.ticked()

    def charge(
        self, model: MemoryModel[Any], rows: int, tokens: int, before: int, real: int, *, absorbed: bool = False
    ) -> None:
        """Count the tokens and FLOPs of a step for the phase; those of controls are nobody's."""
        if self._phase == "control":
            return
        if self._phase == "train":
            if self.counted is not None:
                rows, tokens, real = self.counted(before)
            self.usage.train_tokens += real
            self.usage.train_flops += training_flops(model, rows, tokens, before, self.train_passes, absorbed)
        else:
            self.usage.eval_tokens += real
            self.usage.eval_flops += rows * (model.absorb_flops if absorbed else model.flops)(tokens, before)

    def ticked(self) -> None:
        """See `Watcher.ticked`; raises `BudgetExceeded` where a limit that ends the work is passed."""
        self.enforce()
        if self._phase == "train":
            self.in_time()

    def count_added(self, model: MemoryModel[Any]) -> None:
        """Count the parameters that a method adds; looked at with every step, for they may be made in one.

        Raises:
            BudgetExceeded: `added_parameters`.
        """
        beside = [part for name, part in model.named_children() if name != "backbone"]
        own = [p for part in beside for p in part.parameters()] + list(model.parameters(recurse=False))
        count = sum(p.numel() for p in own)
        if self._beside == (id(model), count):
            return
        self._beside = (id(model), count)
        added, allowed = model.added_parameters(), self.budget.added_parameters
        self.usage.added_parameters = added
        if allowed is not None and added > allowed:
            raise BudgetExceeded("added_parameters", allowed, added, self.where)

    def charge_training(self, spent: Usage, others: Others | None = None) -> None:
        """Count another training, without which this one could not begin, and what `others` spent in it."""
        self.others.seconds += 0.0 if others is None else others.seconds
        self.usage.train_tokens += spent.train_tokens
        self.usage.train_flops += spent.train_flops
        self.usage.train_seconds += spent.train_seconds
        if spent.train_joules is not None:
            self.usage.train_joules = (self.usage.train_joules or 0.0) + spent.train_joules

    def state(self, state: State, rows: int) -> None:
        """See `Watcher.state`: the largest state of one row counts, and that of all rows as memory that is held."""
        if self._phase == "train" or not rows:
            return
        self.ledger.state = state.size().device
        self.accounting.state(state, rows)

    def stepping(self, rows: int) -> AbstractContextManager[Any]:
        """See `Watcher.stepping`."""
        return self.accounting.stepping(rows)

    def wrote(self, before: State, after: State, rows: int, read: int) -> None:
        """See `Watcher.wrote`."""
        self.accounting.wrote(before, after, rows, read)

    def read_memory(self) -> None:
        """Update the peaks."""
        own, used = resident(), self.usage
        beside = self.others.most
        used.peak_host_bytes = max(used.peak_host_bytes, own.peak + beside.host)
        if self.device.type == "cuda":
            held, reserved = torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
            used.peak_reserved_bytes = max(used.peak_reserved_bytes, reserved + beside.reserved)
        else:
            held = max(0, own.peak - self.held)
        used.peak_device_bytes = max(used.peak_device_bytes, max(held, self.ledger.total) + beside.device)

    # What it may be

    def enforce(self) -> None:
        """Raise for limits that end the work wherever it is.

        Raises:
            BudgetExceeded: device memory (of an accelerator also what its allocator has reserved), host memory, or
                seconds of the evaluation or its controls.
        """
        self.read_memory()
        on_device = max(self.usage.peak_device_bytes, self.usage.peak_reserved_bytes)
        for name, used in zip(BYTES, (on_device, self.usage.peak_host_bytes), strict=True):
            limit = getattr(self.budget, name)
            if limit is not None and used > limit:
                raise BudgetExceeded(name, limit, used, self.where)
        if self._phase != "train":
            self.in_time()

    def in_time(self) -> None:
        """Raise where the phase has taken longer than it may; a limit of 0 on training means none, not no time.

        Raises:
            BudgetExceeded: `train_seconds`, `eval_seconds` or ``control_seconds``.
        """
        limit = self.budget.seconds(self._phase)
        spent = self.elapsed()
        if limit is not None and spent > limit[1] and (limit[1] or self._phase != "train"):
            raise BudgetExceeded(*limit, spent, self.where)

    def spent_share(self, *, tokens: bool = True) -> tuple[float, str]:
        """The largest share of a training limit used so far, and that limit's name.

        Where tokens or FLOPs are limited, seconds are a guard beside them (`memory_bench.driver.train`) and no share.

        Args:
            tokens: off for recipes whose own number of steps is the limit: nothing else is then.
        """
        b, u = self.budget, self.usage
        shares = [(0.0, "")]
        if tokens and b.train_tokens is not None:
            shares.append((u.train_tokens / b.train_tokens if b.train_tokens else 1.0, "train_tokens"))
        if tokens and b.train_flops is not None:
            shares.append((u.train_flops / b.train_flops if b.train_flops else 1.0, "train_flops"))
        if tokens and b.train_seconds is not None and not b.counts:
            shares.append((self.elapsed() / b.train_seconds if b.train_seconds else 1.0, "train_seconds"))
        return max(shares)


class Following(Meter):
    """The meter of a process beside the first one of a training: it counts, and leaves all limits to the first's."""

    def enforce(self) -> None:
        """See `Meter.enforce`."""
        self.read_memory()

    def in_time(self) -> None:
        """See `Meter.in_time`."""
