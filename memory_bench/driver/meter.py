"""Counts what a cell spends, and stops it where the budget says so. One meter a cell, handed down; no globals.

Seconds are the device's: of a GPU those that pass, of a CPU those that the process computes on it, all of its threads
together. What else the machine is busy with must not end a training before its tokens are read.
"""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from memory_bench.budget import Budget, BudgetExceeded, Usage
from memory_bench.driver.stream import Watcher, segment_length
from memory_bench.protocol import MemoryModel, State

Phase = Literal["train", "eval"]
BACKWARD_PASSES = 2  # what a backward pass costs, in forward passes
TRAIN_PASSES = 1 + BACKWARD_PASSES
CHECK_EVERY = 16  # steps between two readings of the process's memory


class Meter(Watcher):
    """What was spent so far (`usage`) against the limits of `budget`.

    Args:
        budget: the limits.
        device: where the model runs; on CPU device memory is the process's peak above its start.
    """

    def __init__(self, budget: Budget, device: torch.device) -> None:
        self.budget = budget
        self.usage = Usage()
        self.device = device
        self.where = ""
        self.train_passes = TRAIN_PASSES  # one more where activations are recomputed
        self._phase: Phase = "eval"
        self._started = self._now()
        self._steps = 0
        self._start_bytes = psutil.Process().memory_info().rss
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            if budget.device_bytes is not None:  # the allocator itself refuses what the budget does not allow
                total = torch.cuda.get_device_properties(device).total_memory
                torch.cuda.set_per_process_memory_fraction(min(1.0, budget.device_bytes / total), device)

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Times what happens inside; the seconds are written even if it fails. Hard limits are checked at its end.

        Raises:
            BudgetExceeded: see `enforce`.
        """
        self._phase, self._started = name, self._now()
        before = self._seconds(name)
        try:
            yield
            self._synchronise()
            self.enforce()
        finally:
            self._synchronise()
            setattr(self.usage, f"{name}_seconds", before + self._now() - self._started)
            self.read_memory()

    @contextmanager
    def uncharged(self) -> Iterator[None]:
        """See `Watcher.uncharged`: the clock stands still."""
        self._synchronise()
        before = self._now()
        try:
            yield
        finally:
            self._synchronise()
            self._started += self._now() - before

    def _seconds(self, name: Phase) -> float:
        return self.usage.train_seconds if name == "train" else self.usage.eval_seconds

    def _now(self) -> float:
        return time.process_time() if self.device.type == "cpu" else time.monotonic()

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def elapsed(self) -> float:
        """Seconds in the current phase (earlier phases of the same name included)."""
        return self._seconds(self._phase) + self._now() - self._started

    def stepped(
        self, model: MemoryModel[Any], rows: int, tokens: int, before: int, real: int, *, absorbed: bool = False
    ) -> None:
        """See `Watcher.stepped`; raises `BudgetExceeded` where a hard limit is passed."""
        flops = rows * (model.absorb_flops if absorbed else model.flops)(tokens, before)
        if self._phase == "train":
            self.usage.train_tokens += real
            detached = 0 if absorbed else rows * model.detached_flops(tokens, before)
            self.usage.train_flops += self.train_passes * flops - BACKWARD_PASSES * detached
        else:
            self.usage.eval_tokens += real
            self.usage.eval_flops += flops
        self.where = f"segment {before // segment_length(model) + 1}"
        self._steps += 1
        if self._steps % CHECK_EVERY == 0:
            self.enforce()

    def charge_training(self, spent: Usage) -> None:
        """Count another training, without which this one could not begin."""
        self.usage.train_tokens += spent.train_tokens
        self.usage.train_flops += spent.train_flops
        self.usage.train_seconds += spent.train_seconds

    def state(self, state: State, rows: int) -> None:
        """See `Watcher.state`: the largest state of one row counts."""
        if self._phase == "train" or not rows:
            return
        size = state.size()
        self.usage.state_bytes = max(self.usage.state_bytes, size.device // rows)
        self.usage.state_host_bytes = max(self.usage.state_host_bytes, size.host // rows)

    def read_memory(self) -> None:
        """Update the peaks."""
        peak = peak_bytes()
        self.usage.peak_host_bytes = max(self.usage.peak_host_bytes, peak)
        above = max(0, peak - self._start_bytes)
        on_device = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else above
        self.usage.peak_device_bytes = max(self.usage.peak_device_bytes, on_device)

    def enforce(self) -> None:
        """Raise for limits that end the work wherever it is.

        Raises:
            BudgetExceeded: device or host memory, or seconds of evaluation.
        """
        self.read_memory()
        for name, used in (("device_bytes", self.usage.peak_device_bytes), ("host_bytes", self.usage.peak_host_bytes)):
            limit = getattr(self.budget, name)
            if limit is not None and used > limit:
                raise BudgetExceeded(name, limit, used, self.where)
        limit = self.budget.eval_seconds
        if self._phase == "eval" and limit is not None and self.elapsed() > limit:
            raise BudgetExceeded("eval_seconds", limit, self.elapsed(), self.where)

    def spent_share(self, *, tokens: bool = True) -> tuple[float, str]:
        """The largest share of a training limit used so far, and that limit's name.

        Args:
            tokens: count the token and FLOP limits (off for recipes that bring their own number of steps).
        """
        b, u = self.budget, self.usage
        shares = [(0.0, "")]
        if b.train_seconds is not None:
            shares.append((self.elapsed() / b.train_seconds if b.train_seconds else 1.0, "train_seconds"))
        if tokens and b.train_tokens is not None:
            shares.append((u.train_tokens / b.train_tokens if b.train_tokens else 1.0, "train_tokens"))
        if tokens and b.train_flops is not None:
            shares.append((u.train_flops / b.train_flops if b.train_flops else 1.0, "train_flops"))
        return max(shares)


def peak_bytes() -> int:
    """The most main memory this process has held.

    Linux hands a parent's ``ru_maxrss`` down to the programs it starts, so there the kernel's figure of this program's
    own address space is read.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
