"""The decoder of lucidrains/memorizing-transformers-pytorch, for replays only: multi-query, T5 bias, XL cache.

Its memory is the product's: search, joint softmax and store come from `knn`, `ring` and `memorizing`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from memory_bench.parity.replaying import Weights

from ..memorizing import MemorizingConfig, window_and_memory
from ..parts import knn
from ..parts.ring import Ring
from .decoder_meliad import relative_bucket

UNIT = 1e-24  # under the root: the length of queries and keys is at least 1e-12

Cache = tuple[Tensor, Tensor]
"""Keys and values ``[rows, 1, cached, head]``."""


@dataclass(frozen=True, slots=True)
class MemoryLayer:
    """Attention with one key/value head, whose memory holds what drops out of its XL cache.

    Attributes:
        config: store, cache, search and fusion.
        heads: query heads.
        q, kv, out: projections, ``[out, in]``.
        log_scale: ``[heads]``.
    """

    config: MemorizingConfig
    heads: int
    q: Tensor
    kv: Tensor
    out: Tensor
    log_scale: Tensor

    def open(self, rows: int) -> tuple[Ring, Cache]:
        """Nothing was read."""
        width = self.kv.shape[0] // 2
        blank = self.kv.new_zeros(rows, 1, 0, width)
        return Ring.empty(1, (rows, 1, width), self.config.slots, self.kv), (blank, blank)

    def attend(self, x: Tensor, bias: Tensor, store: Ring, cache: Cache) -> tuple[Tensor, Ring, Cache]:
        """Output ``[rows, tokens, hidden]``, store and cache; `bias` is ``[1, heads, tokens, cached + tokens]``."""
        q, own, own_values = split_heads(x, self.q, self.kv, self.heads)
        q, own = knn.normalise(q, UNIT) * self.log_scale.exp()[:, None, None], knn.normalise(own, UNIT)
        keys, values = torch.cat([cache[0], own], dim=2), torch.cat([cache[1], own_values], dim=2)
        window = knn.Local(q, keys, values, causal(bias))
        attended = window_and_memory(self.config, window, q, store, 0, (store.valid(), None), None)
        leaving = max(0, keys.shape[2] - self.config.xl_cache)
        gone = torch.ones(len(x), leaving, dtype=torch.bool, device=x.device)
        store = store.write([keys[:, :, :leaving]], [values[:, :, :leaving]], gone)
        return join_heads(attended) @ self.out.T, store, (keys[:, :, leaving:], values[:, :, leaving:])


@dataclass(frozen=True, slots=True)
class LucidrainsSizes:
    """Sizes of the decoder."""

    hidden: int
    heads: int
    head_width: int
    mlp: int
    layers: int
    vocab: int
    buckets: int
    max_distance: int
    memory_layer: int


class LucidrainsDecoder:
    """Weights under the case's names."""

    def __init__(self, sizes: LucidrainsSizes, config: MemorizingConfig, weights: Weights) -> None:
        self.sizes, self.config = sizes, config
        wide, hidden = sizes.heads * sizes.head_width, sizes.hidden
        projections = {"to_q.weight": (wide, hidden), "to_kv.weight": (2 * sizes.head_width, hidden)}
        projections["to_out.weight"] = (hidden, wide)
        shapes: dict[str, tuple[int, ...]] = {"0.norm.weight": (hidden,), "0.norm.bias": (hidden,)}
        shapes |= {"1.norm.weight": (hidden,), "1.norm.bias": (hidden,)}
        shapes |= {"1.fn.net.0.weight": (sizes.mlp, hidden), "1.fn.net.0.bias": (sizes.mlp,)}
        shapes |= {"1.fn.net.3.weight": (hidden, sizes.mlp), "1.fn.net.3.bias": (hidden,)}
        attention = {f"0.fn.{name}": shape for name, shape in projections.items()} | {"0.fn.to_out.bias": (hidden,)}
        self.blocks: list[dict[str, Tensor]] = []
        for layer in range(sizes.layers):
            named = shapes if layer == sizes.memory_layer else shapes | attention
            self.blocks.append({n: weights.take(f"backbone.layers.{layer}.{n}", *s) for n, s in named.items()})
        place = f"memory.layers.{sizes.memory_layer}.0.fn"
        q, kv, out = (weights.take(f"{place}.{name}", *shape) for name, shape in projections.items())
        self.memory = MemoryLayer(
            config, sizes.heads, q, kv, out, weights.take(f"{place}.scale", sizes.heads, 1, 1)[:, 0, 0]
        )
        table = "rel_pos_bias.relative_attention_bias.weight"
        self.table = weights.take(f"backbone.{table}", sizes.buckets, sizes.heads)
        self.memory_table = weights.take(f"memory.knn_{table}", sizes.buckets, sizes.heads)
        self.embedding = weights.take("backbone.token_emb.weight", sizes.vocab, hidden)
        self.norm = [weights.take(f"backbone.to_logits.0.{name}", hidden) for name in ("weight", "bias")]
        self.head = weights.take("backbone.to_logits.1.weight", sizes.vocab, hidden)
        self.head_bias = weights.take("backbone.to_logits.1.bias", sizes.vocab)

    def open(self, rows: int) -> tuple[Ring, list[Cache]]:
        """Nothing was read."""
        store, blank = self.memory.open(rows)
        return store, [blank] * self.sizes.layers

    def segment(self, ids: Tensor, store: Ring, caches: list[Cache]) -> tuple[Tensor, Ring, list[Cache]]:
        """Logits ``[rows, tokens, vocab]`` of a segment, store and XL caches after it."""
        hidden, after = self.embedding[ids], []
        for layer, (block, cache) in enumerate(zip(self.blocks, caches, strict=True)):
            x = F.layer_norm(hidden, hidden.shape[-1:], block["0.norm.weight"], block["0.norm.bias"])
            if layer == self.sizes.memory_layer:
                bias = self._bias(self.memory_table, ids.shape[1], cache)
                attended, store, cache = self.memory.attend(x, bias, store, cache)
            else:
                attended, cache = self._plain(block, x, cache)
            after.append(cache)
            hidden = hidden + attended
            x = F.layer_norm(hidden, hidden.shape[-1:], block["1.norm.weight"], block["1.norm.bias"])
            inner = F.gelu(F.linear(x, block["1.fn.net.0.weight"], block["1.fn.net.0.bias"]))
            hidden = hidden + F.linear(inner, block["1.fn.net.3.weight"], block["1.fn.net.3.bias"])
        hidden = F.layer_norm(hidden, hidden.shape[-1:], self.norm[0], self.norm[1])
        return F.linear(hidden, self.head, self.head_bias), store, after

    def _plain(self, block: dict[str, Tensor], x: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """An ordinary layer: scaled by ``head ** -0.5``, nothing normalised."""
        q, own, own_values = split_heads(x, block["0.fn.to_q.weight"], block["0.fn.to_kv.weight"], self.sizes.heads)
        keys, values = torch.cat([cache[0], own], dim=2), torch.cat([cache[1], own_values], dim=2)
        visible = causal(self._bias(self.table, x.shape[1], cache))
        attended = knn.window_attention(q * self.sizes.head_width**-0.5, keys, values, visible)
        start = max(0, keys.shape[2] - self.config.xl_cache)
        out = F.linear(join_heads(attended), block["0.fn.to_out.weight"], block["0.fn.to_out.bias"])
        return out, (keys[:, :, start:], values[:, :, start:])

    def _bias(self, table: Tensor, tokens: int, cache: Cache) -> Tensor:
        """``[1, heads, tokens, cached + tokens]``; as official, queries count from the first cached key."""
        distance = torch.arange(tokens)[:, None] - torch.arange(cache[0].shape[2] + tokens)
        bucket = relative_bucket(distance, self.sizes.buckets, self.sizes.max_distance)
        return table[bucket].permute(2, 0, 1)[None] * math.sqrt(self.sizes.head_width)


def split_heads(x: Tensor, q: Tensor, kv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[rows, heads, tokens, head]``, keys and values ``[rows, 1, tokens, head]``."""
    key, value = (x @ kv.T).chunk(2, dim=-1)
    return (x @ q.T).unflatten(-1, (heads, -1)).transpose(1, 2), key[:, None], value[:, None]


def join_heads(attended: Tensor) -> Tensor:
    """``[rows, heads, tokens, head]`` as ``[rows, tokens, heads * head]``."""
    return attended.transpose(1, 2).flatten(2)


def causal(bias: Tensor) -> Tensor:
    """`bias` ``[..., tokens, cached + tokens]`` where a query may look (also at itself), else minus infinity."""
    tokens, keys = bias.shape[-2:]
    allowed = torch.ones(tokens, keys, dtype=torch.bool, device=bias.device).tril(keys - tokens)
    return bias.masked_fill(~allowed, -math.inf)
