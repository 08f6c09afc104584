"""LongMem's memory: past keys and values in chunks, each found by the mean of its keys.

Unusual here:

- A bank is a value made of blocks, one for every write. Writing copies the new tokens alone: older blocks are shared
  with the bank before it, and the oldest are left out. They are put together where they are read (`joined`).
- Only real tokens are written. A chunk that is not full yet waits, so chunks depend neither on padding nor on where
  the text was cut into segments.
- Rows that were written unequally often have invalid chunks at the end of a block; a bank that would hold too many
  slots because of them is packed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self, cast

import torch
from torch import Tensor

from memory_bench.state import State


@dataclass(frozen=True, slots=True)
class Chunks(State):
    """Chunks of `size` consecutive tokens.

    Attributes:
        keys: ``[rows, kv_heads, chunks * size, head]``, before rotary.
        values: same shape.
        index: ``[rows, kv_heads, chunks, head]`` float32, the mean key of every chunk.
        valid: ``[rows, chunks]`` bool.
        full: all chunks of all rows are valid.
    """

    keys: Tensor
    values: Tensor
    index: Tensor
    valid: Tensor
    full: bool

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, counts: Sequence[int], size: int) -> Self:
        """The first `counts` (one for every row) chunks of `keys` and `values` ``[rows, kv_heads, tokens, head]``."""
        chunks, fewest = max(counts), min(counts)
        valid = counts_mask(counts, chunks, keys.device)
        keys, values = keys[:, :, : chunks * size], values[:, :, : chunks * size]
        if fewest < chunks:
            absent = ~valid.repeat_interleave(size, dim=1)[:, None, :, None]
            keys, values = keys.masked_fill(absent, 0.0), values.masked_fill(absent, 0.0)
        index = keys.unflatten(2, (chunks, size)).mean(dim=3, dtype=torch.float32)
        return cls(keys.contiguous(), values.contiguous(), index, valid, fewest == chunks)

    @property
    def count(self) -> int:
        """Slots for chunks, valid or not."""
        return int(self.valid.shape[1])

    def without_oldest(self, chunks: int, size: int) -> "Chunks":
        """All but the first `chunks` slots; nothing is copied."""
        keys, values = self.keys[:, :, chunks * size :], self.values[:, :, chunks * size :]
        return Chunks(keys, values, self.index[:, :, chunks:], self.valid[:, chunks:], self.full)


def counts_mask(counts: Sequence[int], slots: int, device: torch.device) -> Tensor:
    """``[rows, slots]`` bool: the first `counts` slots of every row."""
    if min(counts) == slots:
        return torch.ones(len(counts), slots, dtype=torch.bool, device=device)
    return torch.arange(slots, device=device) < torch.tensor(counts, device=device)[:, None]


def join(blocks: tuple[Chunks, ...]) -> Chunks:
    """All blocks as one, oldest first."""
    if len(blocks) == 1:
        return blocks[0]
    keys, values, index = (torch.cat([getattr(b, name) for b in blocks], dim=2) for name in ("keys", "values", "index"))
    return Chunks(keys, values, index, torch.cat([b.valid for b in blocks], dim=1), all(b.full for b in blocks))


def pack(chunks: Chunks, capacity: int, size: int) -> Chunks:
    """The newest valid chunks of every row, at most `capacity`, in order and with the invalid slots behind them."""
    newer = chunks.valid.flip(1).cumsum(dim=1).flip(1)  # [rows, chunks]: how many from here on
    kept = chunks.valid & (newer <= capacity)
    order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)
    slots = (order[..., None] * size + torch.arange(size, device=order.device)).flatten(1)
    return Chunks.of(take(chunks.keys, slots), take(chunks.values, slots), kept.sum(dim=1).tolist(), size)


def take(x: Tensor, slots: Tensor) -> Tensor:
    """``[rows, kv_heads, n, head]``: entries of `x` ``[rows, kv_heads, tokens, head]`` at `slots` ``[rows, n]``."""
    return x.gather(2, slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


@dataclass(frozen=True, slots=True)
class ChunkBank(State):
    """The newest `capacity` chunks of every row.

    Attributes:
        blocks: what was written, oldest first.
        waiting_keys: ``[rows, kv_heads, n, head]``, tokens of the chunk that is not full yet (n < chunk).
        waiting_values: same shape.
        waiting_mask: ``[rows, n]`` bool.
        chunk: tokens per chunk.
        capacity: chunks.
        shared: official: one bank for all rows of a batch, whose tensors have one row. Tokens are written row after
            row, and what does not fill a chunk is dropped.
        coarse: official: a write that would fill the bank first drops twice as many tokens as it brings.
    """

    blocks: tuple[Chunks, ...]
    waiting_keys: Tensor
    waiting_values: Tensor
    waiting_mask: Tensor
    chunk: int
    capacity: int
    shared: bool = False
    coarse: bool = False

    @classmethod
    def empty(cls, like: Tensor, chunk: int, capacity: int, *, shared: bool = False, coarse: bool = False) -> Self:
        """A bank that holds nothing; `like` ``[rows, kv_heads, 0, head]`` gives sizes, device and type."""
        like = like[:1] if shared else like
        mask = torch.zeros(len(like), 0, dtype=torch.bool, device=like.device)
        return cls((), like, like, mask, chunk, capacity, shared, coarse)

    @property
    def count(self) -> int:
        """Slots for chunks that are held, valid or not."""
        return sum(block.count for block in self.blocks)

    def rows(self, index: Tensor) -> Self:
        """See `State.rows`; a shared bank belongs to any rows."""
        return self if self.shared else State.rows(self, index)

    def joined(self) -> Chunks:
        """All chunks, oldest first."""
        nothing = self.waiting_keys[:, :, :0], self.waiting_values[:, :, :0]
        return join(self.blocks) if self.blocks else Chunks.of(*nothing, [0] * len(self.waiting_mask), self.chunk)

    def write(self, keys: Tensor, values: Tensor, mask: Tensor) -> Self:
        """The bank after the real tokens of a segment; the oldest chunks make room where there is none.

        Args:
            keys: ``[rows, kv_heads, tokens, head]``, before rotary.
            values: same shape.
            mask: ``[rows, tokens]`` bool.
        """
        if self.shared:
            keys, values, mask = fold_rows(keys), fold_rows(values), mask.flatten()[None]
        keys = torch.cat([self.waiting_keys, keys.detach()], dim=2)
        values = torch.cat([self.waiting_values, values.detach()], dim=2)
        mask = torch.cat([self.waiting_mask, mask], dim=1)
        counts: list[int] = mask.sum(dim=1).tolist()
        if min(counts) < mask.shape[1]:  # real tokens first, in their order
            order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
            keys, values = take(keys, order), take(values, order)
        full = [count // self.chunk for count in counts]
        new = Chunks.of(keys, values, full, self.chunk)
        rest = [0 if self.shared else count % self.chunk for count in counts]
        starts = torch.tensor(full, device=mask.device)[:, None] * self.chunk
        places = starts + torch.arange(max(rest), device=mask.device)  # [rows, waiting]
        waits = counts_mask(rest, max(rest), mask.device)
        places = places.clamp(max=max(0, mask.shape[1] - 1))  # where a row has fewer waiting: any place
        waiting = [take(x, places).masked_fill(~waits[:, None, :, None], 0.0) for x in (keys, values)]
        blocks = self._make_room(new, 2 * sum(counts) // self.chunk)
        return replace(self, blocks=blocks, waiting_keys=waiting[0], waiting_values=waiting[1], waiting_mask=waits)

    def _make_room(self, new: Chunks, coarse: int) -> tuple[Chunks, ...]:
        """The blocks with `new` behind them and, if that is too much, without the oldest chunks (`coarse` at once)."""
        if not new.count:
            return self.blocks
        total, blocks = self.count + new.count, (*self.blocks, new)
        if self.coarse:
            return (*self._drop(self.blocks, coarse if total >= self.capacity else 0), new)
        if total > self.capacity and not all(block.full for block in blocks):
            return (pack(join(blocks), self.capacity, self.chunk),)
        return self._drop(blocks, max(0, total - self.capacity))

    def _drop(self, blocks: tuple[Chunks, ...], chunks: int) -> tuple[Chunks, ...]:
        """`blocks` without their oldest `chunks`."""
        while blocks and blocks[0].count <= chunks:
            chunks -= blocks[0].count
            blocks = blocks[1:]
        return (blocks[0].without_oldest(chunks, self.chunk), *blocks[1:]) if blocks and chunks else blocks


def fold_rows(x: Tensor) -> Tensor:
    """``[rows, heads, tokens, head]`` as ``[1, heads, rows * tokens, head]``, row after row."""
    return x.transpose(0, 1).flatten(1, 2)[None]


def unfold_rows(x: Tensor, rows: int) -> Tensor:
    """``[1, heads, rows * tokens, n]`` as ``[rows, heads, tokens, n]``."""
    return cast(Tensor, x[0].unflatten(1, [rows, -1])).transpose(0, 1)
