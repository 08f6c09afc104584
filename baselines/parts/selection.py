"""Which cached tokens are attended to, per layer and key/value head, by a score that does not depend on the query.

After TRAMS (arXiv 2310.15494, `lwaekfjlk/TRAMS@e53bcc8`): a score is computed once, when a token enters the pool, from
its key before rotary. The newest tokens are always attended to; of the older ones those with the largest scores, in
the order of time, at the positions directly before the newest.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from memory_bench.backbone.model import Backbone, Past
from memory_bench.state import State

from .cache import empty_cache, keep
from .drawing import row_generator

Score = Literal["trams", "norm", "recent", "random"]


@dataclass(frozen=True, slots=True)
class Pool(State):
    """A pool of cached tokens and those of them that the next segment attends to.

    Attributes:
        cached: the pool, oldest first, unused slots at the end.
        scores: per layer ``[rows, kv_heads, slots]`` float32.
        chosen: the tokens that are attended to; which they are differs between layers and heads, how many does not.
        read: ``[rows]`` int64, tokens read.
        host_seeds: ``[rows]`` int64; None: nothing is drawn.
    """

    cached: Past
    scores: tuple[Tensor, ...]
    chosen: Past
    read: Tensor
    host_seeds: Tensor | None = None

    @classmethod
    def empty(cls, backbone: Backbone, rows: int, slots: int, attended: int, seeds: Tensor | None) -> "Pool":
        """Nothing is read yet; `seeds` as `host_seeds`."""
        cached = empty_cache(backbone, rows, slots)
        scores = torch.zeros(rows, backbone.kv_heads, slots, device=backbone.device)
        read = torch.zeros(rows, dtype=torch.long, device=backbone.device)
        return cls(cached, (scores,) * backbone.layers, empty_cache(backbone, rows, attended), read, seeds)

    def written(self, own: Past, scores: list[Tensor], newest: int) -> "Pool":
        """The pool after a segment with the entries `own` and their `scores` ``[rows, kv_heads, tokens]`` per layer.

        Args:
            own: the segment's entries.
            scores: per layer.
            newest: so many tokens are attended to whatever their score.
        """
        slots, both = self.cached.length, self.cached.extend(own)
        rank = both.mask.long().cumsum(dim=1)  # [rows, cached + tokens], real entries from 1
        cached, order = keep(both, both.mask & (rank > rank[:, -1:] - slots), slots)
        joined = (torch.cat(pair, dim=2) for pair in zip(self.scores, scores, strict=True))
        kept = tuple(s.gather(2, order[:, None].expand(-1, s.shape[1], -1)) for s in joined)
        chosen = chosen_of(cached, kept, self.chosen.length, newest)
        return Pool(cached, kept, chosen, self.read + own.mask.sum(dim=1), self.host_seeds)


def chosen_of(cached: Past, scores: tuple[Tensor, ...], attended: int, newest: int) -> Past:
    """The `attended` tokens of a pool: its `newest` and the best of all older ones, in order of time."""
    slots, real = cached.length, cached.mask.sum(dim=1)  # [rows]
    place = torch.arange(slots, device=real.device)
    recent = place >= (real - newest)[:, None]  # [rows, slots]; unused slots, too
    late = (real[:, None] - newest + place[:newest])[:, None]  # [rows, 1, newest], places of the newest
    late = late.masked_fill(late < 0, slots)

    def of(entries: Tensor, score: Tensor) -> Tensor:
        best = score.masked_fill(recent[:, None], -torch.inf).topk(attended - newest, dim=2)
        early = best.indices.masked_fill(best.values == -torch.inf, slots)
        index = torch.cat([early, late.expand(-1, early.shape[1], -1)], dim=2).sort(dim=2).values
        return index.clamp(max=slots - 1)[..., None].expand(-1, -1, -1, entries.shape[3])

    places = [of(keys, score) for keys, score in zip(cached.keys, scores, strict=True)]
    filled = torch.arange(attended, device=real.device)
    return Past(
        tuple(k.gather(2, at) for k, at in zip(cached.keys, places, strict=True)),
        tuple(v.gather(2, at) for v, at in zip(cached.values, places, strict=True)),
        filled < real[:, None],
        filled.expand(len(real), -1),
    )


@torch.no_grad()
def scores_of(kind: Score, backbone: Backbone, own: Past, state: Pool) -> list[Tensor]:
    """Per layer ``[rows, kv_heads, tokens]`` float32 of the entries of a segment that was read after `state`."""
    if kind == "recent":
        age = (state.read[:, None] + own.mask.cumsum(dim=1)).float()
        return [age[:, None].expand(-1, backbone.kv_heads, -1)] * backbone.layers
    if state.host_seeds is not None:
        return [_drawn(own.mask, state, layer, backbone.kv_heads) for layer in range(backbone.layers)]
    return [_of_keys(k, backbone.query_weight(layer), kind == "trams") for layer, k in enumerate(own.keys)]


def _of_keys(keys: Tensor, weight: Tensor, summed: bool) -> Tensor:
    """Of keys ``[rows, kv_heads, tokens, head]``, by what they are in the layer's input: ``|u|``, or times ``|sum u|``.

    The scores of the query heads that share a key are added.
    """
    shared = weight.unflatten(0, (keys.shape[1], -1)).transpose(0, 1)  # [heads per kv head, kv_heads, head, width]
    found = torch.zeros(keys.shape[:3], device=keys.device)
    for of_head in shared:
        u = (keys @ of_head).float()  # [rows, kv_heads, tokens, width]
        length = u.norm(dim=-1)
        found += length * u.sum(dim=-1).abs() if summed else length
    return found


def _drawn(mask: Tensor, state: Pool, layer: int, heads: int) -> Tensor:
    assert state.host_seeds is not None
    found = torch.zeros(mask.shape[0], heads, mask.shape[1])
    for row, (seed, read) in enumerate(zip(state.host_seeds.tolist(), state.read.tolist(), strict=True)):
        places = mask[row].nonzero()[:, 0].cpu()
        numbers = torch.rand(len(places), heads, generator=row_generator(seed, read, layer))
        found[row][:, places] = numbers.T
    return found.to(mask.device)
