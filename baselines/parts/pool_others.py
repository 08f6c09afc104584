"""Pools of a batch's rows that other processes read, for a loss over all rows (`memory_bench.protocol.Batch`)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from memory_bench.protocol import Batch, Segment

from .grouping import facts_of


@dataclass(frozen=True, slots=True)
class Others:
    """Rows of the same segment elsewhere, without gradients.

    Attributes:
        pool: ``[rows, layers, pool tokens, width]``.
        own: ``[rows, layers, pool tokens]`` bool, what their own stream has written.
        facts: ``[rows, 3]``, see `facts_of`.
    """

    pool: Tensor
    own: Tensor
    facts: Tensor

    @classmethod
    def seen(cls, batch: Batch, pool: Tensor, own: Tensor, segment: Segment, schedule: Tensor) -> "Others | None":
        """What others show, who are shown the same of the rows here; None: nobody does."""
        found = batch.gathered([pool, own, facts_of(segment, schedule)])
        return cls(*(torch.cat(list(parts)) for parts in zip(*found, strict=True))) if found else None

    def alike(self, segment: Segment, schedule: Tensor, index: Tensor | None) -> "Others":
        """Those that would be in one group with the rows `index` here (None: all)."""
        first = 0 if index is None else int(index[0])
        same = (self.facts == facts_of(segment, schedule)[first]).all(dim=1)
        return Others(self.pool[same.to(self.pool.device)], self.own[same.to(self.own.device)], self.facts[same])
