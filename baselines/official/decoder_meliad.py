"""The decoder of google-research/meliad, for replays only: T5 relative bias, strict causality, XL cache.

Its memory is the product's: search, attention, gate and store come from `knn`, `ring` and `memorizing`.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from memory_bench.parity.replaying import Weights

from ..memorizing import MemorizingConfig, window_and_memory
from ..parts import knn
from ..parts.ring import Ring


@dataclass(frozen=True, slots=True)
class MeliadSizes:
    """Sizes of the decoder.

    `memory_bias`: the memory layer has a relative bias too; `epsilon`: of normalised queries and keys.
    """

    hidden: int
    heads: int
    head_width: int
    mlp: int
    layers: int
    vocab: int
    window: int
    buckets: int
    max_distance: int
    memory_layer: int
    memory_bias: bool
    epsilon: float


@dataclass(frozen=True, slots=True)
class MeliadState:
    """The store of the memory layer, and every layer's cached keys and values ``[rows, heads, cached, head]``."""

    store: Ring
    cached: tuple[tuple[Tensor, Tensor], ...]

    def reset(self, rows: Tensor) -> "MeliadState":
        """Rows (``[rows]`` bool) that start a document know nothing, and their cache is zero."""
        blank = rows[:, None, None, None]
        cached = tuple((k.masked_fill(blank, 0.0), v.masked_fill(blank, 0.0)) for k, v in self.cached)
        return replace(self, store=self.store.reset(rows), cached=cached)


class MeliadDecoder:
    """Weights under the case's names, ``[out, in]``; no biases anywhere."""

    def __init__(self, sizes: MeliadSizes, config: MemorizingConfig, weights: Weights) -> None:
        self.sizes, self.config = sizes, config
        wide = sizes.heads * sizes.head_width
        shapes = {f"{name}_proj": (wide, sizes.hidden) for name in "qkv"} | {
            "o_proj": (sizes.hidden, wide),
            "attention_norm_scale": (sizes.hidden,),
            "attention_scale": (sizes.heads,),
            "ffn_norm_scale": (sizes.hidden,),
            "ffn_in": (sizes.mlp, sizes.hidden),
            "ffn_out": (sizes.hidden, sizes.mlp),
        }
        self.embedding = weights.take("backbone.embedding", sizes.vocab, sizes.hidden)
        self.final_scale = weights.take("backbone.final_norm_scale", sizes.hidden)
        self.blocks: list[dict[str, Tensor]] = []
        for layer in range(sizes.layers):
            block = {name: weights.take(f"backbone.layers.{layer}.{name}", *shape) for name, shape in shapes.items()}
            if layer != sizes.memory_layer or sizes.memory_bias:
                table = weights.take(f"backbone.layers.{layer}.relative_bias_table", sizes.heads, sizes.buckets)
                block["relative_bias_table"] = table
            self.blocks.append(block)
        self.gate = weights.take(f"memory.layers.{sizes.memory_layer}.memory_gate", sizes.heads)

    def open(self, rows: int) -> MeliadState:
        """Nothing was read: the store is empty, and the cache is full of zeros."""
        shape = (rows, self.sizes.heads, self.sizes.head_width)
        blank = self.embedding.new_zeros(rows, self.sizes.heads, self.config.xl_cache, self.sizes.head_width)
        store = Ring.empty(1, shape, self.config.slots, self.embedding, whole=True)
        return MeliadState(store, ((blank, blank),) * self.sizes.layers)

    def segment(self, state: MeliadState, ids: Tensor) -> tuple[Tensor, MeliadState, dict[str, Tensor]]:
        """Logits ``[rows, tokens, vocab]`` of a segment, the state after it, and what its memory layer did.

        What it did: ``queries``, ``keys``, ``values``, ``local_attention``, ``memory_attention``
        ``[rows, tokens, heads, head]``; ``retrieved_keys`` and ``retrieved_values`` ``[rows, tokens, heads, k, head]``.
        """
        sizes, seen = self.sizes, {}
        hidden, cached, store = self.embedding[ids], [], state.store
        for layer, block in enumerate(self.blocks):
            normed = rms_norm(hidden) * block["attention_norm_scale"]
            q, own, values = (
                (normed @ block[f"{name}_proj"].T).unflatten(-1, (sizes.heads, -1)).transpose(1, 2) for name in "qkv"
            )
            if self.config.normalise:
                q, own = knn.normalise(q, sizes.epsilon), knn.normalise(own, sizes.epsilon)
            scale = block["attention_scale"].abs()[:, None, None]
            keys, own_values = torch.cat([state.cached[layer][0], own], dim=2), values
            values = torch.cat([state.cached[layer][1], own_values], dim=2)
            window = knn.Local(q * scale, keys, values, self._visible(block, scale, ids.shape[1]))
            if layer == sizes.memory_layer:
                valid = store.valid()
                attended = window_and_memory(self.config, window, q * scale, store, 0, (valid, None), self.gate)
                seen = memory_seen(self.config, window, q * scale, store, valid)
                seen |= {"queries": q, "keys": own, "values": own_values}
                store = store.write([own], [own_values], torch.ones_like(ids, dtype=torch.bool))
            else:
                attended = knn.window_attention(window.q, keys, values, window.visible)
            start = keys.shape[2] - self.config.xl_cache
            cached.append((keys[:, :, start:], values[:, :, start:]))
            hidden = hidden + attended.transpose(1, 2).flatten(2) @ block["o_proj"].T
            inner = (rms_norm(hidden) * block["ffn_norm_scale"]) @ block["ffn_in"].T
            hidden = hidden + F.relu(inner) @ block["ffn_out"].T
        hidden = rms_norm(hidden) * self.final_scale
        logits = hidden @ self.embedding.T / math.sqrt(sizes.hidden)
        return logits, MeliadState(store, tuple(cached)), {k: v.transpose(1, 2) for k, v in seen.items()}

    def _visible(self, block: dict[str, Tensor], scale: Tensor, tokens: int) -> Tensor:
        """The mask ``[1, heads or 1, tokens, cached + tokens]``: strictly earlier, at most a window away, with bias."""
        cached = self.config.xl_cache
        distance = torch.arange(cached, cached + tokens)[:, None] - torch.arange(cached + tokens)
        visible = ((distance > 0) & (distance <= self.sizes.window))[None, None]
        if "relative_bias_table" not in block:
            return visible
        bucket = relative_bucket(distance, self.sizes.buckets, self.sizes.max_distance, torch.finfo(torch.float32).eps)
        bias = scale * block["relative_bias_table"][:, bucket]
        return bias[None].masked_fill(~visible, -math.inf)


def memory_seen(
    config: MemorizingConfig, window: knn.Local, q: Tensor, store: Ring, valid: Tensor
) -> dict[str, Tensor]:
    """Both attentions of a memory layer apart, and what was retrieved ``[rows, heads, tokens, k, head]``."""
    keys, values = store.keys[0], store.values[0]
    seen = {
        "local_attention": knn.window_attention(window.q, window.keys, window.values, window.visible),
        "memory_attention": knn.retrieve_and_attend(
            q, keys, values, config.top_k, bucketed=config.search == "bucketed", valid=valid, dilute=True
        ),
    }
    if config.search == "exact":
        found = knn.search(q, keys, config.top_k, valid)
        return seen | {"retrieved_keys": knn.gather(keys, found), "retrieved_values": knn.gather(values, found)}
    shares = knn.bucket_shares(knn.products(q, keys), config.top_k, valid)  # [rows, heads, tokens, slots / k, k]
    for name, entries in (("retrieved_keys", keys), ("retrieved_values", values)):
        by_bucket = entries.unflatten(2, (-1, config.top_k))  # [rows, heads, slots / k, k, head]
        seen[name] = torch.einsum("rhtsk,rhskd->rhtkd", shares, by_bucket)
    return seen


def rms_norm(x: Tensor) -> Tensor:
    """`x` scaled to a root mean square of 1."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def relative_bucket(distance: Tensor, buckets: int, max_distance: int, epsilon: float = 0.0) -> Tensor:
    """T5's bucket of each `distance` (0 and more): the first half exact, then logarithmic up to `max_distance`."""
    exact = buckets // 2
    ratio = distance.clamp(min=1).float() / exact
    far = exact + ((ratio + epsilon).log() / math.log(max_distance / exact) * (buckets - exact)).long()
    return torch.where(distance < exact, distance.clamp(min=0), far.clamp(max=buckets - 1))
