"""The gradients of a batch: of one process that reads all of it, or of one of several that read some rows each.

Both are the mean over all scored tokens of the batch, so several processes add what each computed of that same mean.
Equal to one process are they only for a model whose rows do not depend on each other: one that draws from anything but
its rows' seeds, or changes a buffer or number of its own while it reads, is refused.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from memory_bench.corpus import Line
from memory_bench.driver import randomness
from memory_bench.driver.meter import Meter
from memory_bench.driver.others import Spending
from memory_bench.driver.peers import Peers
from memory_bench.driver.stream import Piece, segment_length, walk
from memory_bench.errors import NotFinite, UserError
from memory_bench.protocol import MemoryModel
from memory_bench.recipe import Recipe

Counts = dict[int, tuple[int, int, int]]
"""By tokens read before: rows, tokens of a row, real tokens of a step."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one optimiser step learns from; the same in every process.

    Attributes:
        model: at work.
        lines: all of them.
        recipe: how they are read.
        seed: of the training.
        step: its number, from 0.
        aux: the model's own loss is added.
    """

    model: MemoryModel[Any]
    lines: list[Line]
    recipe: Recipe
    seed: int
    step: int
    aux: bool

    def lengths(self) -> Iterator[int] | None:
        """See `Recipe.lengths`."""
        return self.recipe.lengths(segment_length(self.model), self.seed, self.step)


@dataclass(frozen=True, slots=True)
class Worked:
    """Who counts a step, whose gradients are made, and whether it is the first of its kind."""

    meter: Meter
    optimizer: torch.optim.Optimizer
    first: bool

    def read(self, batch: Batch, lines: Sequence[Line]) -> list[Piece]:
        """Read lines of a batch with gradients."""
        options: dict[str, Any] = {"detach_every": batch.recipe.bptt, "recompute": batch.recipe.checkpoint}
        with self.meter.ledger.saving() if self.first else nullcontext():
            return list(walk(batch.model, lines, lengths=batch.lengths(), watcher=self.meter, **options))

    def back(self, whole: Tensor) -> None:
        """Gradients of a loss, and no others."""
        self.optimizer.zero_grad(set_to_none=True)
        whole.backward()

    def parameters(self) -> list[nn.Parameter]:
        """Those that train."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def alone(batch: Batch, worked: Worked) -> float:
    """Gradients of the batch, all of it read here; its mean surprisal (nats).

    Raises:
        NotFinite: the loss is not finite.
    """
    pieces = worked.read(batch, batch.lines)
    loss = torch.stack([p.nll.sum() for p in pieces]).sum() / max(1, sum(int(p.scored.sum()) for p in pieces))
    aux = [p.aux for p in pieces if p.aux is not None] if batch.aux else []
    value = float(loss.detach())
    whole = loss + torch.stack(aux).mean() if aux else loss
    _check(float(whole.detach()), batch.step)
    worked.back(whole)
    return value


def shared(batch: Batch, worked: Worked, peers: Peers) -> float:
    """As `alone`, with rows of all `peers`: every process has the gradients of the whole batch then.

    Raises:
        NotFinite: as of `alone`.
        UserError: the model's numbers depend on how the batch is divided.
    """
    model, meter = batch.model, worked.meter
    meter.counted = counts(batch.lines, batch.lengths() or repeat(segment_length(model))).__getitem__
    before = randomness.mark(model, model.backbone.device)
    peers.lending = batch.aux
    pieces = worked.read(batch, peers.own(batch.lines))
    said = {p.start: p.aux for p in pieces if p.aux is not None}
    if said and not model.divides:
        raise UserError(
            f"{type(model).__name__} has a loss of its own over whole batches, which is another one for a part of "
            "the rows: leave out --processes."
        )
    total = max(1, sum(int(line.scored.sum()) for line in batch.lines))
    loss = _sum([p.nll.sum() for p in pieces]) / total
    aux = _sum(list(said.values()) if batch.aux else [])
    told = peers.met("losses", (float(loss.detach()), float(aux.detach()), sorted(said)))
    segments = max(1, len({start for _, _, starts in told for start in starts}))
    _check(sum(nll + own / segments for nll, own, _ in told), batch.step)
    whole = loss + aux / segments if batch.aux and said else loss
    if pieces:
        worked.back(whole)
    else:  # fewer rows than processes
        worked.optimizer.zero_grad(set_to_none=True)
    peers.forget()
    if randomness.mark(model, model.backbone.device) != before:
        raise UserError(
            f"{type(model).__name__} draws random numbers that are not its rows' own, or changes a buffer or number "
            "of its own while it reads, so that its numbers depend on how a batch is divided: leave out --processes."
        )
    parameters = worked.parameters()
    spent: list[tuple[list[bool], Spending]] = peers.met(
        "gradients", ([p.grad is not None for p in parameters], meter.spending())
    )
    peers.add_up(parameters, [has for has, _ in spent])
    if peers.rank == 0:
        meter.count_others([spending for _, spending in spent[1:]])
    return float(sum(nll for nll, _, _ in told))


def counts(lines: Sequence[Line], lengths: Iterator[int]) -> Counts:
    """What one process would step of a whole batch, whose segments have `lengths`, one after the other."""
    sizes, start, found = [len(line) for line in lines], 0, Counts()
    while left := [size - start for size in sizes if size > start]:
        length = next(lengths)
        cut = [min(size, length) for size in left]
        found[start] = len(cut), max(cut), sum(cut)
        start += length
    return found


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum() if parts else torch.zeros(())


def _check(total: float, place: int) -> None:
    if not math.isfinite(total):
        raise NotFinite(f"non-finite: the training loss became {total} at optimiser step {place}")
