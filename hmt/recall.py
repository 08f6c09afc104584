"""HMT's recall: the cache of the newest memories, and one query's attention over it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from memory_bench.state import State


@dataclass(frozen=True, slots=True)
class MemoryCache(State):
    """The newest written memories of every row, oldest first; a row with fewer has empty slots in front.

    Attributes:
        entries: ``[rows, slots, width]``, what recall mixes.
        keys: ``[rows, slots, recall_width]``, what it compares: projected once, when the entry is written.
        filled: ``[rows, slots]`` bool.
    """

    entries: Tensor
    keys: Tensor
    filled: Tensor

    @classmethod
    def empty(cls, rows: int, width: int, recall_width: int, like: Tensor) -> "MemoryCache":
        """A cache without slots, of `like`'s device and type."""
        filled = like.new_zeros(rows, 0, dtype=torch.bool)
        return cls(like.new_zeros(rows, 0, width), like.new_zeros(rows, 0, recall_width), filled)

    @property
    def slots(self) -> int:
        """Slots used by the row that uses most."""
        return int(self.filled.shape[1])

    def append(self, entry: Tensor, key: Tensor, wrote: Tensor, limit: int) -> "MemoryCache":
        """The cache after a segment: at most `limit` slots, the oldest leave first.

        Args:
            entry: ``[rows, 1, width]``.
            key: ``[rows, 1, recall_width]``.
            wrote: ``[rows]`` bool; the other rows keep exactly what they had and gain an empty slot in front, so that
                slots count back from the newest in all rows.
            limit: N.
        """
        return MemoryCache(
            _push(self.entries, entry, wrote)[:, -limit:],
            _push(self.keys, key, wrote)[:, -limit:],
            _push(self.filled, self.filled.new_ones(len(wrote), 1), wrote)[:, -limit:],
        )

    def compare(self, query: Tensor) -> Tensor:
        """Inner products ``[rows, slots]`` of the keys with a projected query ``[rows, 1, recall_width]``."""
        return (query @ self.keys.transpose(1, 2))[:, 0]

    def mix(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The softmax-weighted memory ``[rows, 1, width]`` and the weights ``[rows, slots]`` in float32.

        Weights are rounded to the entries' type before they mix. A row without entries gets a mixture of empty slots
        that means nothing.
        """
        masked = scores.float().masked_fill(~self.filled, torch.finfo(torch.float32).min)
        weights = masked.softmax(dim=-1)
        return weights.to(self.entries.dtype)[:, None] @ self.entries, weights


def _push(old: Tensor, new: Tensor, wrote: Tensor) -> Tensor:
    """`new` ``[rows, 1, …]`` behind `old` ``[rows, slots, …]``; an empty slot in front where nothing was written."""
    here = wrote.view(-1, *(1,) * (old.dim() - 1))
    return torch.where(here, torch.cat([old, new], dim=1), torch.cat([torch.zeros_like(new), old], dim=1))
