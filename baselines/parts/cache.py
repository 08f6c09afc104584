"""A cache of keys and values with a fixed number of slots, filled per row with real tokens only."""

import torch
import torch.nn.functional as F
from torch import Tensor

from memory_bench.backbone.model import Backbone, Past


def empty_cache(backbone: Backbone, rows: int, slots: int) -> Past:
    """`slots` slots that hold nothing yet; allocating all at once keeps the state's size constant."""
    shape = (rows, backbone.kv_heads, slots, backbone.head_width)
    blank = torch.zeros(shape, device=backbone.device, dtype=backbone.dtype)
    return Past(
        (blank,) * backbone.layers,
        (blank,) * backbone.layers,
        torch.zeros(rows, slots, dtype=torch.bool, device=backbone.device),
        torch.arange(slots, device=backbone.device).expand(rows, -1),
    )


def keep_recent(past: Past, window: int, sinks: int = 0) -> Past:
    """The first `sinks` and the last `window` real entries of every row, in order, at positions 0, 1, 2 ….

    Rows with fewer real entries have their unused slots (mask False) at the end. `past` has at least
    ``sinks + window`` slots, the result exactly as many.
    """
    rank = past.mask.long().cumsum(dim=1)  # [rows, cached], real entries from 1
    return keep(past, past.mask & ((rank <= sinks) | (rank > rank[:, -1:] - window)), sinks + window)[0]


def keep(past: Past, kept: Tensor, slots: int) -> tuple[Past, Tensor]:
    """The entries in `kept` ``[rows, cached]`` bool, in order, at positions 0, 1, 2 …, unused slots at the end.

    Returns:
        A cache of `slots` slots, and the entry ``[rows, slots]`` that each is (meaningless where a slot is not used).
    """
    kept = F.pad(kept, (0, max(0, slots - kept.shape[1])))
    order = kept.long().argsort(dim=1, descending=True, stable=True)[:, :slots]  # kept ones first, in their order

    def gather(x: Tensor) -> Tensor:  # [rows, kv_heads, cached, head] -> [rows, kv_heads, slots, head]
        x = F.pad(x, (0, 0, 0, kept.shape[1] - x.shape[2])) if x.shape[2] < kept.shape[1] else x
        return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    packed = Past(
        tuple(gather(k) for k in past.keys),
        tuple(gather(v) for v in past.values),
        kept.gather(1, order),
        torch.arange(slots, device=order.device).expand(order.shape),
    )
    return packed, order


def next_positions(backbone: Backbone, past: Past, mask: Tensor) -> Tensor:
    """``[rows, tokens]``: positions of new tokens with `mask`, counted on from each row's filled slots."""
    return past.mask.sum(dim=1, keepdim=True) + backbone.positions(mask)
