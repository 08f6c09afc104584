"""A ring buffer of keys and values as a value: the newest tokens of every row, oldest overwritten first."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from memory_bench.state import State


@dataclass(frozen=True, slots=True)
class Ring(State):
    """Keys and values of the last `capacity` real tokens of every row, without gradients.

    Token t of a row (counted from 0, padding left out) is in slot ``t mod capacity``. Slots are allocated as a stream
    fills them, up to `capacity`; one that holds nothing is zero. Reading needs no copy, and forks share everything. A
    write copies the buffers: for m written tokens 1 / (m * heads per kv head) of the multiply-adds of searching them.

    Attributes:
        keys: per layer ``[rows, kv_heads, slots, head]``.
        values: per layer, same shape.
        written: ``[rows]`` int64, tokens written so far.
        capacity: slots at most.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    written: Tensor
    capacity: int

    @classmethod
    def empty(
        cls, layers: int, shape: tuple[int, int, int], capacity: int, like: Tensor, *, whole: bool = False
    ) -> "Ring":
        """Nothing is written yet.

        Args:
            layers: number of layers.
            shape: (rows, kv_heads, head).
            capacity: see `Ring`.
            like: has the device and type of the entries.
            whole: allocate all slots now.
        """
        rows, kv_heads, width = shape
        blank = like.new_zeros(rows, kv_heads, capacity if whole else 0, width)
        written = torch.zeros(rows, dtype=torch.long, device=like.device)
        return cls((blank,) * layers, (blank,) * layers, written, capacity)

    @property
    def slots(self) -> int:
        """Slots allocated: no row has written more, unless it filled the ring."""
        return int(self.keys[0].shape[2]) if self.keys else 0

    def valid(self, exclude: int | Tensor = 0) -> Tensor:
        """``[rows, slots]`` bool: slots that hold a token, the newest `exclude` (``[rows, 1]``, or of all) left out."""
        slot = torch.arange(self.slots, device=self.written.device)
        age = (self.written[:, None] - 1 - slot) % self.capacity  # 0: the newest
        return (slot < self.written[:, None]) & (age >= exclude)

    def write(self, keys: Sequence[Tensor], values: Sequence[Tensor], mask: Tensor) -> "Ring":
        """The ring after the real tokens of `mask` ``[rows, tokens]``; keys, values ``[rows, kv_heads, tokens, head]``.

        A row without real tokens stays as it is.
        """
        rank = mask.long().cumsum(dim=1) - 1  # [rows, tokens], of the real tokens
        count = mask.sum(dim=1)
        row, token = (mask & (rank >= (count - self.capacity)[:, None])).nonzero(as_tuple=True)
        slot = (self.written[row] + rank[row, token]) % self.capacity
        grown = min(self.capacity, self.slots + mask.shape[1]) - self.slots

        def put(old: Tensor, new: Tensor) -> Tensor:
            changed = F.pad(old, (0, 0, 0, grown)) if grown else old.clone()
            changed.transpose(1, 2)[row, slot] = new.detach().transpose(1, 2)[row, token]
            return changed

        return Ring(
            tuple(put(old, new) for old, new in zip(self.keys, keys, strict=True)),
            tuple(put(old, new) for old, new in zip(self.values, values, strict=True)),
            self.written + count,
            self.capacity,
        )

    def reset(self, rows: Tensor) -> "Ring":
        """The ring with the chosen rows (``[rows]`` bool) emptied."""
        blank = rows[:, None, None, None]
        return replace(
            self,
            keys=tuple(k.masked_fill(blank, 0.0) for k in self.keys),
            values=tuple(v.masked_fill(blank, 0.0) for v in self.values),
            written=self.written.masked_fill(rows, 0),
        )
