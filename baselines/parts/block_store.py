"""All keys and values of a stream, with a table of the blocks they are cut into: what InfLLM and EM-LLM retrieve from.

Unusual here:

- Token t of a row is in slot t, so sinks, window, pending tokens and blocks are ranges of one store: nothing is kept
  twice and a block is a start and a size.
- A block is found by one vector per query head: the mean key of its tokens that were attended to most while they were
  local. Attention received is kept for the pending tokens, those that are in no block yet and are no sinks.
- Keys are stored before rotary and without gradients; scores are float32. Counts are on the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from memory_bench.state import State


@dataclass(frozen=True, slots=True)
class BlockStore(State):
    """See the module. Rows may have read unequally much: slots and columns beyond a row's own are zero.

    Attributes:
        keys: per layer ``[rows, kv_heads, slots, head]``.
        values: per layer, same shape.
        representatives: per layer ``[rows, heads, blocks, head]`` float32.
        received: per layer ``[rows, heads, pending]`` float32, the last column is the row's newest token.
        host_read: ``[rows]`` int64, tokens written.
        host_sinks: ``[rows]`` int64, of them sinks: the first ones.
        host_starts: ``[rows, blocks]`` int64, first token of every block; a row's blocks come first and in order.
        host_sizes: ``[rows, blocks]`` int64, its tokens; 0: the row has no such block.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    representatives: tuple[Tensor, ...]
    received: tuple[Tensor, ...]
    host_read: Tensor
    host_sinks: Tensor
    host_starts: Tensor
    host_sizes: Tensor

    @classmethod
    def empty(cls, layers: int, rows: int, heads: int, kv_heads: int, like: Tensor) -> "BlockStore":
        """Nothing is written; `like` ``[0, head]`` has the device and type of keys and the width of a head."""
        width = like.shape[-1]
        blank, scores = like.new_zeros(rows, kv_heads, 0, width), like.new_zeros(rows, heads, 0, dtype=torch.float32)
        none = like.new_zeros(rows, heads, 0, width, dtype=torch.float32)
        zero, table = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, 0, dtype=torch.long)
        return cls((blank,) * layers, (blank,) * layers, (none,) * layers, (scores,) * layers, zero, zero, table, table)

    @property
    def counts(self) -> Tensor:
        """``[rows]`` int64 on the host: blocks."""
        return (self.host_sizes > 0).sum(dim=1)

    @property
    def pending_start(self) -> Tensor:
        """``[rows]`` int64 on the host: the oldest token that is neither a sink nor in a block."""
        return self.host_sinks + self.host_sizes.sum(dim=1)

    def write(self, keys: Sequence[Tensor], values: Sequence[Tensor], mask: Tensor) -> "BlockStore":
        """The store after the tokens of `mask` ``[rows, tokens]`` (on the host, real ones first in every row).

        Args:
            keys: per layer ``[rows, kv_heads, tokens, head]``.
            values: per layer, same shape.
            mask: see above.
        """
        read = self.host_read + mask.sum(dim=1)
        device = self.keys[0].device
        row, token = (t.to(device) for t in mask.nonzero(as_tuple=True))
        slot = self.host_read.to(device)[row] + token
        grown = max(0, int(read.max()) - self.keys[0].shape[2])

        def put(old: Tensor, new: Tensor) -> Tensor:
            changed = F.pad(old, (0, 0, 0, grown)) if grown else old.clone()
            changed.transpose(1, 2)[row, slot] = new.detach().transpose(1, 2)[row, token]
            return changed

        return replace(
            self,
            keys=tuple(put(old, new) for old, new in zip(self.keys, keys, strict=True)),
            values=tuple(put(old, new) for old, new in zip(self.values, values, strict=True)),
            host_read=read,
        )

    def attended(self, local: Sequence[Tensor], before: Tensor, mask: Tensor) -> "BlockStore":
        """The store after attention was received, once the tokens are written.

        Args:
            local: per layer ``[rows, heads, past + tokens]``: sums over queries of the weights of local keys, of which
                the last are the new tokens' and the one before them the newest token's before.
            before: ``[rows]`` on the host, tokens read before.
            mask: ``[rows, tokens]`` on the host, the new tokens.
        """
        tokens = mask.shape[1]
        missing = tokens - (self.host_read - before)  # padding behind a row's new tokens
        shift = None if not bool(missing.any()) else missing.to(local[0].device)

        def add(old: Tensor, new: Tensor) -> Tensor:
            width = max(old.shape[2] + tokens, new.shape[2])
            whole = F.pad(old, (width - tokens - old.shape[2], tokens)) + F.pad(new, (width - new.shape[2], 0))
            if shift is None:
                return whole
            column = torch.arange(width, device=whole.device) - shift[:, None]  # [rows, width]
            moved = whole.gather(2, column.clamp(min=0)[:, None].expand_as(whole))
            return moved.masked_fill((column < 0)[:, None], 0.0)

        pairs = zip(self.received, local, strict=True)
        return replace(self, received=tuple(add(old, new.detach().float()) for old, new in pairs))

    def cut(self, sinks: Tensor, sizes: Sequence[Sequence[int]], best: int) -> "BlockStore":
        """The store with the oldest pending tokens of every row moved: first to sinks, then into blocks.

        Args:
            sinks: ``[rows]`` on the host, from now on.
            sizes: per row, of the new blocks, oldest first.
            best: a block's representative is the mean key of so many of its tokens, those that received most.
        """
        store = replace(self, host_sinks=sinks)
        if any(sizes):
            store = store._with_blocks(sizes, best)
        width = int((store.host_read - store.pending_start).max())
        return replace(store, received=tuple(r[..., max(0, r.shape[2] - width) :].clone() for r in store.received))

    def _with_blocks(self, sizes: Sequence[Sequence[int]], best: int) -> "BlockStore":
        most = max(map(len, sizes))
        size = torch.tensor([[*row, *[0] * (most - len(row))] for row in sizes])  # [rows, new blocks]
        start = self.pending_start[:, None] + size.cumsum(dim=1) - size
        old, made = self.counts, (size > 0).sum(dim=1)
        grown = max(0, int((old + made).max()) - self.host_sizes.shape[1])
        row, new = (size > 0).nonzero(as_tuple=True)
        place = old[row] + new

        def enter(table: Tensor, entries: Tensor) -> Tensor:
            changed = F.pad(table, (0, grown)) if grown else table.clone()
            changed[row, place] = entries[row, new]
            return changed

        device = self.keys[0].device
        at = [t.to(device) for t in (row, new, place)]

        def represent(table: Tensor, keys: Tensor, received: Tensor) -> Tensor:
            changed = F.pad(table, (0, 0, 0, grown)) if grown else table.clone()
            means = self._representatives(keys, received, start.to(device), size.to(device), best)
            changed.transpose(1, 2)[at[0], at[2]] = means.transpose(1, 2)[at[0], at[1]]
            return changed

        layers = zip(self.representatives, self.keys, self.received, strict=True)
        return replace(
            self,
            representatives=tuple(represent(*layer) for layer in layers),
            host_starts=enter(self.host_starts, start),
            host_sizes=enter(self.host_sizes, size),
        )

    def _representatives(self, keys: Tensor, received: Tensor, start: Tensor, size: Tensor, best: int) -> Tensor:
        """``[rows, heads, new blocks, head]`` of blocks at `start` with `size` ``[rows, new blocks]``."""
        rows, heads, width = received.shape
        longest = int(size.max())
        offset = torch.arange(longest, device=start.device)
        inside = offset < size[..., None]  # [rows, new, longest]
        token = (start[..., None] + offset).clamp(max=keys.shape[2] - 1)
        column = width - self.host_read.to(start.device)[:, None, None] + token
        index = column.clamp(0, width - 1).flatten(1)[:, None].expand(-1, heads, -1)
        seen = received.gather(2, index).view(rows, heads, *inside.shape[1:])
        order = seen.masked_fill(~inside[:, None], -1.0).topk(min(best, longest), dim=-1).indices
        used = order < size[:, None, :, None]  # behind a short block's own tokens come places beyond it
        chosen = token[:, None].expand_as(seen).gather(3, order)  # [rows, heads, new, best]
        row = torch.arange(rows, device=start.device).view(-1, 1, 1, 1)
        head = torch.arange(heads, device=start.device) // (heads // keys.shape[1])
        found = keys[row, head.view(1, -1, 1, 1), chosen].float() * used[..., None]
        return found.sum(dim=3) / used.sum(dim=3).clamp(min=1)[..., None]


def spans(starts: Tensor, sizes: Tensor, times: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of chosen blocks, block after block, in `width` places.

    Args:
        starts: ``[..., blocks]``, first tokens.
        sizes: ``[..., blocks]``.
        times: ``[..., blocks]``, how often each block is taken.
        width: places; at least as many as there are tokens.

    Returns:
        Token numbers ``[..., width]``, the block of each, and whether there is one.
    """
    ends = (sizes * times).cumsum(dim=-1)
    place = torch.arange(width, device=starts.device).expand(*ends.shape[:-1], width).contiguous()
    if not ends.shape[-1]:
        return torch.zeros_like(place), torch.zeros_like(place), torch.zeros_like(place, dtype=torch.bool)
    block = torch.searchsorted(ends.contiguous(), place, right=True).clamp(max=ends.shape[-1] - 1)
    size = sizes.gather(-1, block)
    inside = place - (ends - sizes * times).gather(-1, block)
    token = starts.gather(-1, block) + inside % size.clamp(min=1)
    there = place < ends[..., -1:]
    return token.where(there, 0), block, there
