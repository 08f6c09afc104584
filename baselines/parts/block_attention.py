"""Attention of an execution block to its window and, in the same softmax, to far tokens at one constant distance."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import knn

FLOATS = 1 << 24  # of logits that exist at once: 64 MB in float32


@dataclass(frozen=True, slots=True)
class Side:
    """What queries see on one side of the joint softmax.

    Attributes:
        q: ``[rows, heads, tokens, head]``, scaled and turned for these keys.
        keys: ``[rows, kv_heads or heads, n, head]``.
        values: same shape.
        seen: broadcastable to ``[rows, heads, tokens, n]`` bool.
    """

    q: Tensor
    keys: Tensor
    values: Tensor
    seen: Tensor

    def queries(self, start: int, end: int) -> "Side":
        """The same for the queries from `start` to `end`."""
        seen = self.seen[..., start:end, :] if self.seen.shape[-2] > 1 else self.seen
        return replace(self, q=self.q[:, :, start:end], seen=seen)

    def logits(self) -> Tensor:
        """``[rows, heads, tokens, n]``; what is not seen has the lowest number there is."""
        products = knn.products(self.q, self.keys)
        return products.masked_fill(~self.seen, torch.finfo(products.dtype).min)

    def summed(self, weights: Tensor) -> Tensor:
        """``[rows, heads, tokens, head]``: values by `weights` ``[rows, heads, tokens, n]``."""
        shared = weights.reshape(weights.shape[0], self.values.shape[1], -1, weights.shape[3])
        return (shared @ self.values).view(*weights.shape[:3], self.values.shape[3])


def joint_attention(local: Side, far: Side, real: Tensor) -> tuple[Tensor, Tensor]:
    """Output ``[rows, heads, tokens, head]`` of one softmax over both sides, and what local keys received.

    The second is ``[rows, heads, n]`` float32: weights summed over the queries of `real` ``[rows, tokens]``.
    """
    tokens = local.q.shape[2]
    per_query = local.q.shape[0] * local.q.shape[1] * (local.keys.shape[2] + far.keys.shape[2])
    size = max(1, FLOATS // per_query)
    outs, received = [], local.q.new_zeros(*local.q.shape[:2], local.keys.shape[2], dtype=torch.float32)
    for start in range(0, tokens, size):
        end = min(tokens, start + size)
        out, weights = _joint(local.queries(start, end), far.queries(start, end))
        outs.append(out)
        received = received + (weights.detach() * real[:, None, start:end, None]).sum(dim=2)
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2), received


def _joint(local: Side, far: Side) -> tuple[Tensor, Tensor]:
    near = local.logits()
    if not far.keys.shape[2]:
        weights = near.softmax(dim=-1, dtype=torch.float32)
        return local.summed(weights.to(near.dtype)), weights
    both = torch.cat([near, far.logits()], dim=-1).softmax(dim=-1, dtype=torch.float32)
    weights, rest = both.split([near.shape[-1], both.shape[-1] - near.shape[-1]], dim=-1)
    return local.summed(weights.to(near.dtype)) + far.summed(rest.to(near.dtype)), weights
