"""MemLong's memory: chunks of a stream's text, each with the keys and values that one layer made of its tokens.

Unusual here:

- A chunk is found by one vector for all heads and layers, of its text or of its keys; whoever writes says which.
- Only real tokens are written. A chunk that is not full waits, so chunks depend neither on padding nor on where the
  text was cut; officially (`short`) every piece is cut anew, and its last chunk may be short.
- Officially (`halve`) a memory without room for a chunk forgets the older half of its chunks. The official code counts
  tokens and chunks apart, which agree while all chunks are full and their number is even; here they always do.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from memory_bench.state import State

from .chunk_bank import take

Encode = Callable[[Tensor, Tensor], Tensor]
"""Vectors ``[rows, chunks, width]`` of chunks, from ids ``[rows, chunks, size]`` and keys ``[rows, …, head]``."""


@dataclass(frozen=True, slots=True)
class Found(State):
    """What a piece reads of a memory.

    Attributes:
        chunks: ``[rows, n]`` int64, the chunks' places, oldest first; -1 (in front) where a row has fewer.
        keys: ``[rows, kv_heads, n * size, head]``, before rotary.
        values: same shape.
        mask: ``[rows, n * size]`` bool, real tokens.
    """

    chunks: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor

    @property
    def positions(self) -> Tensor:
        """``[rows, n * size]``: the real tokens of each row counted from 0."""
        return (self.mask.long().cumsum(dim=1) - 1).clamp(min=0)


@dataclass(frozen=True, slots=True)
class TextMemory(State):
    """Chunks of `chunk` consecutive tokens, oldest first; a row that has fewer than another has empty slots at the end.

    Attributes:
        ids: ``[rows, chunks, chunk]`` int32; -1: no token.
        keys: ``[rows, kv_heads, chunks * chunk, head]``, before rotary.
        values: same shape.
        index: ``[rows, chunks, width]`` float32, what a chunk is found by.
        waiting_ids: ``[rows, chunk - 1]`` int32, tokens that fill no chunk yet, last ones right; -1: none.
        waiting_keys: ``[rows, kv_heads, chunk - 1, head]``.
        waiting_values: same shape.
        chunk: tokens of each.
        capacity: tokens at most.
        short: official: see the module.
        halve: official: see the module.
    """

    ids: Tensor
    keys: Tensor
    values: Tensor
    index: Tensor
    waiting_ids: Tensor
    waiting_keys: Tensor
    waiting_values: Tensor
    chunk: int
    capacity: int
    short: bool
    halve: bool

    @classmethod
    def empty(cls, like: Tensor, width: int, chunk: int, capacity: int, short: bool, halve: bool) -> "TextMemory":
        """Nothing; `like` ``[rows, kv_heads, 0, head]`` gives sizes, device and type, `width` is that of the index."""
        rows, waits = len(like), 0 if short else chunk - 1
        nothing = torch.full((rows, waits), -1, dtype=torch.int32, device=like.device)
        waiting = like.new_zeros(rows, like.shape[1], waits, like.shape[3])
        index = torch.zeros(rows, 0, width, device=like.device)
        ids = nothing.new_zeros(rows, 0, chunk)
        return cls(ids, like, like, index, nothing, waiting, waiting, chunk, capacity, short, halve)

    @property
    def real(self) -> Tensor:
        """``[rows, chunks]`` bool: slots that hold a chunk."""
        return self.ids[:, :, 0] >= 0

    def older_than(self, tokens: int) -> Tensor:
        """``[rows, chunks]`` bool: chunks that reach into none of the last `tokens` tokens of their row."""
        held = self.ids >= 0
        later = held.sum(dim=2).flip(1).cumsum(dim=1).flip(1) - held.sum(dim=2)  # tokens in chunks behind each
        return self.real & (later + (self.waiting_ids >= 0).sum(dim=1, keepdim=True) >= tokens)

    def at(self, chunks: Tensor, dtype: torch.dtype) -> Found:
        """The chunks at the places `chunks` ``[rows, n]``, -1 for none, as numbers of type `dtype`."""
        place = chunks.clamp(min=0)
        slots = (place[:, :, None] * self.chunk + torch.arange(self.chunk, device=place.device)).flatten(1)
        held = (self.ids.gather(1, place[:, :, None].expand(-1, -1, self.chunk)) >= 0) & (chunks >= 0)[:, :, None]
        return Found(chunks, take(self.keys, slots).to(dtype), take(self.values, slots).to(dtype), held.flatten(1))

    @torch.no_grad()
    def write(self, ids: Tensor, keys: Tensor, values: Tensor, encode: Encode) -> "TextMemory":
        """The memory after a piece.

        Args:
            ids: ``[rows, tokens]``, -1 for padding.
            keys: ``[rows, kv_heads, tokens, head]``, before rotary.
            values: same shape.
            encode: what new chunks are found by.
        """
        text = torch.cat([self.waiting_ids, ids.int()], dim=1)
        order = (text < 0).int().argsort(dim=1, stable=True)  # real ones first, in order
        text = text.gather(1, order)
        both = [
            take(torch.cat([old, new.to(old)], dim=2), order)
            for old, new in ((self.waiting_keys, keys), (self.waiting_values, values))
        ]
        count = (text >= 0).sum(dim=1)  # [rows]
        full = (count + self.chunk - 1) // self.chunk if self.short else count // self.chunk
        most, length = int(full.max()), text.shape[1]
        made = self._append(text, both, full, most, encode) if most else self
        if self.short:
            return made
        rest = text.masked_fill(torch.arange(length, device=text.device) < (full * self.chunk)[:, None], -1)
        last = (rest >= 0).int().argsort(dim=1, stable=True)
        missing = max(0, self.chunk - 1 - length)
        last = last[:, length - min(length, self.chunk - 1) :]
        waits = F.pad(rest.gather(1, last), (missing, 0), value=-1)
        held = (waits >= 0)[:, None, :, None]
        kept = [F.pad(take(x, last), (0, 0, missing, 0)).where(held, 0.0) for x in both]
        return replace(made, waiting_ids=waits, waiting_keys=kept[0], waiting_values=kept[1])

    def _append(self, text: Tensor, both: list[Tensor], full: Tensor, most: int, encode: Encode) -> "TextMemory":
        """With `full` ``[rows]`` more chunks, `most` in the longest row, and without those that make room."""
        slots = most * self.chunk
        extra = max(0, slots - text.shape[1])
        ids = F.pad(text, (0, extra), value=-1)[:, :slots]
        ids = ids.masked_fill(torch.arange(slots, device=ids.device) >= (full * self.chunk)[:, None], -1)
        keys, values = (F.pad(x, (0, 0, 0, extra))[:, :, :slots].where((ids >= 0)[:, None, :, None], 0.0) for x in both)
        ids = ids.unflatten(1, (most, self.chunk))
        index = encode(ids, keys).masked_fill((ids[:, :, 0] < 0)[:, :, None], 0.0)
        grown = replace(
            self,
            ids=torch.cat([self.ids, ids], dim=1),
            keys=torch.cat([self.keys, keys], dim=2),
            values=torch.cat([self.values, values], dim=2),
            index=torch.cat([self.index, index.float()], dim=1),
        )
        return grown._packed(self._kept_halves(grown) if self.halve else self._kept_newest(grown))

    def _kept_newest(self, grown: "TextMemory") -> Tensor:
        """``[rows, chunks]`` bool: as many of the newest chunks as there is room for."""
        real = grown.real
        return real & (real.flip(1).long().cumsum(dim=1).flip(1) <= self.capacity // self.chunk)

    def _kept_halves(self, grown: "TextMemory") -> Tensor:
        """``[rows, chunks]`` bool: what is left where each new chunk that finds no room has the older half dropped."""
        kept, old = grown.real.clone(), self.ids.shape[1]
        tokens = (grown.ids >= 0).sum(dim=2)
        for row in range(len(kept)):
            places: list[int] = []
            for place in kept[row].nonzero()[:, 0].tolist():
                if place >= old and int(tokens[row, places].sum() + tokens[row, place]) > self.capacity:
                    places = places[len(places) // 2 :]
                places.append(place)
            kept[row] = False
            kept[row, places] = True
        return kept

    def _packed(self, kept: Tensor) -> "TextMemory":
        """Only the chunks in `kept`, in order, in as many slots as the fullest row needs."""
        slots = int(kept.sum(dim=1).max())
        if bool(kept.all()):
            return self
        order = (~kept).int().argsort(dim=1, stable=True)[:, :slots]
        held = kept.gather(1, order)
        ids = self.ids.gather(1, order[:, :, None].expand(-1, -1, self.chunk)).masked_fill(~held[:, :, None], -1)
        found = self.at(order.masked_fill(~held, -1), self.keys.dtype)
        real = found.mask[:, None, :, None]
        index = self.index.gather(1, order[:, :, None].expand(-1, -1, self.index.shape[2])) * held[:, :, None]
        return replace(
            self, ids=ids, keys=found.keys.where(real, 0.0), values=found.values.where(real, 0.0), index=index
        )


def chunks_written(tokens: int, remembered: int, size: int, *, short: bool) -> int:
    """Chunks that become complete in a piece of `tokens` after `remembered`."""
    return -(-tokens // size) if short else (remembered + tokens) // size - remembered // size


def chunks_held(
    remembered: int, size: int, capacity: int, piece: int | None, *, halve: bool, hidden: int
) -> tuple[int, int]:
    """Chunks held after `remembered` tokens, and those of them that reach into none of the last `hidden` tokens.

    With `piece`, official: every piece of so many tokens is cut anew.
    """
    most = capacity // size
    if piece is None:
        held, rest = divmod(remembered, size)
    else:
        held, rest = remembered // piece * -(-piece // size), 0
    if halve and held > most > 1:
        # From `most` one chunk more leaves the newer half and itself; then it fills up again.
        after = most - most // 2
        held = after + 1 + (held - most - 1) % (most // 2)
    held = min(held, most)
    return held, max(0, held - max(0, -(-(hidden - rest) // size)))
