"""A store read twice by every query: the newest tokens by position, and the best of all others by similarity.

A query at position p of its segment (memory tokens count) sees the newest ``window - p`` tokens of the store, as in a
window that slides; what it finds by similarity lies beyond them, so that nothing is attended to twice.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import knn
from .drawing import draw_slots
from .ring import Ring


@dataclass(frozen=True, slots=True)
class Newest:
    """The newest tokens of a store as queries of a segment see them.

    Attributes:
        slots: ``[rows, n]`` int64, where they are in the ring, oldest first.
        age: ``[rows, n]`` int64, 0 for the newest; a token of the segment at position p lies ``p + 1 + age`` behind it.
        seen: ``[rows, tokens, n]`` bool.
    """

    slots: Tensor
    age: Tensor
    seen: Tensor

    def of(self, entries: Tensor) -> Tensor:
        """Their keys or values ``[rows, kv_heads, n, head]`` of a layer's ``[rows, kv_heads, slots, head]``."""
        index = self.slots[:, None, :, None].expand(-1, entries.shape[1], -1, entries.shape[3])
        return entries.gather(2, index)


def newest(store: Ring, window: int, where: Tensor) -> Newest:
    """The newest tokens by position.

    Args:
        store: the ring.
        window: tokens that the first position of a segment sees.
        where: ``[rows, tokens]`` int64, positions of the queries, from 0.
    """
    count = min(window, store.slots)
    age = torch.arange(count - 1, -1, -1, device=where.device).expand(len(where), -1)  # [rows, n]
    token = store.written[:, None] - 1 - age
    seen = (token >= 0)[:, None] & (age[:, None] < window - where[:, :, None])
    return Newest(token.clamp(min=0) % store.capacity, age, seen)


def beyond(store: Ring, window: int, where: Tensor) -> Tensor:
    """``[rows, tokens, slots]`` bool: tokens that a query at `where` does not see in its window."""
    slot = torch.arange(store.slots, device=where.device)
    age = (store.written[:, None] - 1 - slot) % store.capacity  # [rows, slots]
    return store.valid()[:, None] & (age[:, None] >= window - where[:, :, None])


@torch.no_grad()
def best(q: Tensor, keys: Tensor, k: int, allowed: Tensor, instead: Tensor | None = None) -> Tensor:
    """Slots of the `k` largest products of every query: ``[rows, heads, tokens, min(k, slots)]``, -1 for none.

    Args:
        q: ``[rows, heads, tokens, head]``.
        keys: ``[rows, kv_heads, slots, head]``.
        k: how many.
        allowed: ``[rows, tokens, slots]`` bool.
        instead: ``[rows, slots]`` bool, slots that fill up what is missing, whichever; None: nothing does.
    """
    found = []
    size = max(1, knn.BLOCK // max(1, q.shape[0] * q.shape[1] * keys.shape[2]))
    for part, may in zip(q.split(size, dim=2), allowed.split(size, dim=1), strict=True):
        products = knn.products(part, keys)
        never = torch.finfo(products.dtype).min
        ranked = products.masked_fill(~may[:, None], never)
        if instead is not None:
            ranked = ranked.masked_fill((~may & instead[:, None])[:, None], never / 2)
        value, index = ranked.topk(min(k, keys.shape[2]), dim=-1)
        found.append(index.masked_fill(value == never, -1))
    return found[0] if len(found) == 1 else torch.cat(found, dim=2)


def any_of(store: Ring, k: int, allowed: Tensor, mask: Tensor, heads: int, seeds: Tensor, layer: int) -> Tensor:
    """As many slots drawn at random instead, ``[rows, heads, tokens, min(k, slots)]``: a control of the search.

    Args:
        store: the ring.
        k: how many.
        allowed: ``[rows, tokens, slots]`` bool.
        mask: ``[rows, tokens]`` bool, queries that draw.
        heads: how many draw.
        seeds: ``[rows]``, of the rows.
        layer: tells the draws of several layers apart.
    """
    return draw_slots(store.valid(), k, mask, heads, seeds, store.written, layer, allowed=allowed)
