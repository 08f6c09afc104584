"""Attention to the best stored entries: exact or bucketed search, gathering, own or joint softmax. Plain tensors only.

Everywhere: queries ``[rows, heads, tokens, head]``, already multiplied by the attention scale; stored keys and values
``[rows, kv_heads, slots, head]``, without gradients; every query head searches the store of its kv head, which is never
repeated. Choosing entries has no gradient; queries get theirs through the logits.

Unusual here:

- Queries are taken in blocks, so that neither scores ``[tokens, slots]`` nor gathered entries ``[tokens, k, head]``
  exist for all of them at once; in training, the blocks of a long text are computed again in the backward pass.
- Scores are computed once: the best of them are the logits, so keys are not gathered. Without gradients one buffer
  holds those of all blocks in turn: fresh pages cost as much as the product.
- In a small store (`dense_is_cheaper`) values are not gathered either: weights that are zero but for the chosen slots,
  times all values, give the same sum.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .largest import largest

BLOCK = 1 << 22  # floats of scores or gathered entries that exist at once: 16 MB in float32
DENSE = 16  # stores of up to so many times k slots are summed without gathering (measured: neither is faster there)
TIE = 1e6  # factor on scores in the softmax that picks a bucket's winner (official code)


@dataclass(frozen=True, slots=True)
class Local:
    """What shares the softmax with the retrieved entries.

    Attributes:
        q: ``[rows, heads, tokens, head]``, scaled, for these keys (rotated where those are).
        keys: ``[rows, kv_heads, n, head]``.
        values: same shape.
        visible: broadcastable to ``[rows, heads, tokens, n]``; bool: may be seen, float: added to logits; None: causal
            over equally many queries and keys.
    """

    q: Tensor
    keys: Tensor
    values: Tensor
    visible: Tensor | None = None

    def tokens(self, start: int, end: int) -> "Local":
        """The same for the queries from `start` to `end`, the mask written out."""
        visible = self.visible
        if visible is None:
            count = self.q.shape[2]
            visible = torch.ones(count, count, dtype=torch.bool, device=self.q.device).tril()[None, None]
        if visible.shape[-2] > 1:
            visible = visible[..., start:end, :]
        return Local(self.q[:, :, start:end], self.keys, self.values, visible)


def normalise(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """`x` divided by its length over the last axis, ``x / sqrt(sum(x²) + epsilon)``."""
    return x * (x.square().sum(dim=-1, keepdim=True) + epsilon).rsqrt()


def products(q: Tensor, keys: Tensor) -> Tensor:
    """Inner products ``[rows, heads, tokens, slots]`` of every query with every key of its kv head."""
    return _grouped(q, keys.shape[1]).matmul(keys.transpose(-1, -2)).view(*q.shape[:3], keys.shape[2])


class _Products:
    """`products` of one block after another with the same keys; each is overwritten by the next, without gradients."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys
        self._room = keys.new_empty(0)

    def __call__(self, q: Tensor) -> Tensor:
        keys = self.keys
        if torch.is_grad_enabled():
            return products(q, keys)
        size = (q.shape[0] * keys.shape[1], q.shape[1] // keys.shape[1] * q.shape[2], keys.shape[2])
        if len(self._room) < math.prod(size):
            self._room = keys.new_empty(math.prod(size))
        out = self._room[: math.prod(size)].view(size)
        torch.bmm(_grouped(q, keys.shape[1]).flatten(0, 1), keys.flatten(0, 1).transpose(-1, -2), out=out)
        return out.view(*q.shape[:3], keys.shape[2])


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    """``[rows, heads, tokens, head]``: `values` summed with `weights` ``[rows, heads, tokens, slots]``."""
    out: Tensor = _grouped(weights, values.shape[1]).matmul(values)
    return out.view(*weights.shape[:3], values.shape[3])


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """``[rows, heads, tokens, n]`` as ``[rows, kv_heads, heads / kv_heads * tokens, n]``."""
    return x.reshape(x.shape[0], kv_heads, -1, x.shape[3])


def _masked(logits: Tensor, visible: Tensor | None) -> Tensor:
    if visible is None:
        return logits
    if visible.dtype is torch.bool:
        return logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
    return logits + visible


def dense_is_cheaper(slots: int, k: int) -> bool:
    """Whether `retrieve_and_attend` sums over a store of so many slots instead of gathering `k` of them."""
    return slots <= DENSE * k


def flops(slots: int, k: int, *, bucketed: bool = False) -> int:
    """Operations (multiply-add = 2) of `retrieve_and_attend` for one query of one head, per channel of the head."""
    if bucketed or dense_is_cheaper(slots, k):
        return 4 * slots
    return 2 * slots + 2 * k


@torch.no_grad()
def search(q: Tensor, keys: Tensor, k: int, valid: Tensor | None = None) -> Tensor:
    """Slots of the `k` largest products with each query, best first: ``[rows, heads, tokens, min(k, slots)]`` int64.

    Args:
        q: queries.
        keys: index keys (of entries, or of chunks of entries).
        k: how many.
        valid: ``[rows, slots]`` bool, slots that hold something; others come last, so they are only among the chosen
            where fewer than `k` are valid. None: all.
    """
    valid = None if valid is None else valid[:, None, None]
    per_token, scores = q.shape[0] * q.shape[1] * keys.shape[2], _Products(keys)
    found = [
        largest(_masked(scores(part), valid), min(k, keys.shape[2]))[1]
        for part in q.split(_block_tokens(per_token), dim=2)
    ]
    return found[0] if len(found) == 1 else torch.cat(found, dim=2)


@torch.no_grad()
def search_cosine(q: Tensor, keys: Tensor, k: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `search`, by the cosine instead of the product.

    Args:
        q: queries, scaled or not.
        keys: ``[rows, kv_heads, slots, head]``.
        k: how many.
        valid: ``[rows, slots]`` bool; None: all.

    Returns:
        Slots ``[rows, heads, tokens, min(k, slots)]``, best first and -1 where fewer than `k` are valid, and their
        cosines.
    """
    q, keys = normalise(q), normalise(keys)
    valid = None if valid is None else valid[:, None, None]
    found, alike, scores = list[Tensor](), list[Tensor](), _Products(keys)
    for part in q.split(_block_tokens(q.shape[0] * q.shape[1] * keys.shape[2]), dim=2):
        best, index = largest(_masked(scores(part), valid), min(k, keys.shape[2]))
        found.append(index.masked_fill(best < -2, -1))  # hidden: no cosine is as small
        alike.append(best)
    return torch.cat(found, dim=2), torch.cat(alike, dim=2)


def gather(entries: Tensor, index: Tensor, chunk: int = 1) -> Tensor:
    """``[rows, heads, tokens, k * chunk, head]``: the entries of the chunks `index` ``[rows, heads, tokens, k]``.

    `entries` is ``[rows, kv_heads, slots, head]``; chunk j is its slots ``j * chunk`` to ``(j + 1) * chunk - 1``.
    """
    rows, kv_heads, slots, width = entries.shape
    chunks = slots // chunk
    flat = entries.reshape(rows * kv_heads * chunks, chunk * width)
    start = torch.arange(0, len(flat), chunks, device=index.device).view(rows, kv_heads, 1, 1, 1)
    places = index.view(rows, kv_heads, -1, *index.shape[2:]) + start
    return flat.index_select(0, places.flatten()).view(*index.shape[:3], -1, width)


def attend_retrieved(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    *,
    chunk: int = 1,
    valid: Tensor | None = None,
    local: Local | None = None,
) -> Tensor:
    """Attention ``[rows, heads, tokens, head]`` to the entries of the chosen chunks, in blocks of queries.

    Args:
        q: queries.
        keys: ``[rows, kv_heads, slots, head]``.
        values: same shape.
        index: ``[rows, heads, tokens, k]``, chunks chosen by `search`; -1 is none, and gets no weight.
        chunk: slots per chunk; 1: the index is over single entries.
        valid: ``[rows, slots / chunk]`` bool; other chunks get no weight. None: all have some.
        local: shares the softmax; None: a softmax of the retrieved entries alone (where none of them is valid, the
            output is finite and meaningless).
    """

    def block(q: Tensor, index: Tensor, local: Local | None) -> Tensor:
        none, index = index < 0, index.clamp(min=0)
        logits = gather(keys, index, chunk).matmul(q[..., None])[..., 0]  # [rows, heads, tokens, k * chunk]
        logits = _masked(logits, ~none.repeat_interleave(chunk, dim=-1))
        if valid is not None:
            rows = torch.arange(len(valid), device=index.device).view(-1, 1, 1, 1)
            logits = _masked(logits, valid[rows, index].repeat_interleave(chunk, dim=-1))
        weights, rest = _softmax(logits, local)
        return _sum(weights[..., None, :].matmul(gather(values, index, chunk))[..., 0, :], rest)

    return _in_blocks(block, q, index, local, 2 * q.shape[1] * index.shape[3] * chunk * q.shape[3])


def retrieve_and_attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    k: int,
    *,
    bucketed: bool = False,
    valid: Tensor | None = None,
    dilute: bool = False,
    local: Local | None = None,
) -> Tensor:
    """Search and attention at once: ``[rows, heads, tokens, head]`` over the `k` best entries of every query.

    Args:
        q: queries.
        keys: ``[rows, kv_heads, slots, head]``.
        values: same shape.
        k: entries per query.
        bucketed: search as `bucket_shares` does; slots must be a multiple of k.
        valid: ``[rows, slots]`` bool; None: all.
        dilute: official: a slot that holds nothing takes part with its zeros where fewer than `k` are valid.
        local: see `attend_retrieved`.
    """
    slots = keys.shape[2]
    preferred = None if valid is None else valid[:, None, None]
    usable = None if dilute else preferred
    multiply = _Products(keys)

    def exact(q: Tensor, _: None, local: Local | None) -> Tensor:
        scores = multiply(q)
        if k >= slots:
            weights, rest = _softmax(_masked(scores, usable), local)
            return _sum(weighted(weights, values), rest)
        best, index = largest(_masked(scores, preferred), k)  # their gradient is that of the chosen products
        weights, rest = _softmax(scores.gather(-1, index) if dilute else best, local)
        if dense_is_cheaper(slots, k):
            return _sum(weighted(torch.zeros_like(scores).scatter(-1, index, weights), values), rest)
        return _sum(weights[..., None, :].matmul(gather(values, index))[..., 0, :], rest)

    def by_bucket(q: Tensor, _: None, local: Local | None) -> Tensor:
        scores = products(q, keys)
        shares = bucket_shares(scores, k, valid)  # [rows, heads, tokens, slots / k, k]
        logits = (shares * scores.unflatten(-1, (-1, k))).sum(dim=-2)  # of the winners' mean key
        if usable is not None:
            logits = _masked(logits, usable.unflatten(-1, (-1, k)).any(dim=-2))
        weights, rest = _softmax(logits, local)
        return _sum(weighted((weights[..., None, :] * shares).flatten(-2), values), rest)

    gathered = 0 if bucketed or dense_is_cheaper(slots, k) else k * q.shape[3]
    return _in_blocks(by_bucket if bucketed else exact, q, None, local, q.shape[1] * (2 * slots + gathered))


@torch.no_grad()
def bucket_shares(scores: Tensor, k: int, valid: Tensor | None = None) -> Tensor:
    """Who wins each bucket: ``[rows, heads, tokens, slots / k, k]``, summing to 1 over the second last axis.

    Slot i is in bucket ``i mod k`` and the best of every bucket is retrieved (meliad's ``_retrieve_topk_gatherless``).
    Written as a softmax that is a one-hot but for ties, whose keys and values are averaged.

    Args:
        scores: ``[rows, heads, tokens, slots]``; slots must be a multiple of k.
        k: number of buckets.
        valid: ``[rows, slots]`` bool, slots that may win over others; None: all.
    """
    if valid is not None:
        scores = scores - TIE * (~valid)[:, None, None].to(scores.dtype)
    by_bucket: Tensor = scores.unflatten(-1, (-1, k)).float()
    return (by_bucket * TIE).softmax(dim=-2).to(scores.dtype)


def window_attention(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None) -> Tensor:
    """Attention ``[rows, heads, tokens, head]`` to keys and values that all queries share.

    Args:
        q: scaled queries.
        keys: ``[rows, kv_heads, n, head]``.
        values: same shape.
        visible: see `Local`; a query that may see nothing gets zero.
    """
    groups = q.shape[1] // keys.shape[1]
    if groups > 1:
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    blind = None
    if visible is not None:
        seen = visible if visible.dtype is torch.bool else visible > -math.inf
        blind = ~seen.any(dim=-1, keepdim=True)
        # The softmax of an empty row would be NaN.
        visible = visible | blind if visible.dtype is torch.bool else visible.masked_fill(blind, 0.0)
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible, is_causal=visible is None, scale=1.0)
    return out if blind is None else out.masked_fill(blind, 0.0)


def mix_by_gate(local: Tensor, memory: Tensor, gate: Tensor, known: Tensor | None = None) -> Tensor:
    """``g * memory + (1 - g) * local`` with ``g = sigmoid(gate)`` per head.

    Args:
        local: ``[rows, heads, tokens, head]``.
        memory: same shape.
        gate: ``[heads]``.
        known: ``[rows]`` bool, rows whose store holds something; the others keep `local` as it is. None: all do.
    """
    share = torch.sigmoid(gate)[None, :, None, None]
    if known is not None:
        share = share * known[:, None, None, None]
        memory = memory.masked_fill(~known[:, None, None, None], 0.0)
    return torch.lerp(local, memory, share.to(local.dtype).expand_as(local))


def _softmax(logits: Tensor, local: Local | None) -> tuple[Tensor, Tensor | None]:
    """Weights of `logits` and, if `local` shares their softmax, its part of the output."""
    if local is None:
        return logits.softmax(dim=-1), None
    near = _masked(products(local.q, local.keys), local.visible)
    weights = torch.cat([logits, near], dim=-1).softmax(dim=-1)
    far, near = weights.split([logits.shape[-1], near.shape[-1]], dim=-1)
    return far, weighted(near, local.values)


def _sum(far: Tensor, near: Tensor | None) -> Tensor:
    return far if near is None else far + near


def _block_tokens(floats_per_token: int) -> int:
    return max(1, BLOCK // max(1, floats_per_token))


def _in_blocks(
    block: Callable[..., Tensor], q: Tensor, index: Tensor | None, local: Local | None, floats_per_token: int
) -> Tensor:
    """``block(q, index, local)`` over blocks of tokens; several blocks are computed again in the backward pass."""
    tokens, floats = q.shape[2], q.shape[0] * floats_per_token
    if local is not None:
        floats += q.shape[0] * q.shape[1] * local.keys.shape[2]
    size = _block_tokens(floats)
    if size >= tokens:
        return block(q, index, None if local is None else local.tokens(0, tokens))
    again = torch.is_grad_enabled() and (q.requires_grad or (local is not None and local.values.requires_grad))
    parts = []
    size = math.ceil(tokens / math.ceil(tokens / size))  # as even as possible
    for start in range(0, tokens, size):
        end = min(tokens, start + size)
        given = (
            q[:, :, start:end],
            None if index is None else index[:, :, start:end],
            None if local is None else local.tokens(start, end),
        )
        parts.append(
            checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False) if again else block(*given)
        )
    return torch.cat(parts, dim=2)
