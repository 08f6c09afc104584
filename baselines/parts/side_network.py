"""The official side block: attention and feed-forward in parallel behind one layer norm, with ALiBi (as in GPT-J).

The default side network needs none of this: its blocks are copies of the backbone's (`memory_bench.backbone.layers`).
Source: Victorwz/LongMem@b7f3c6b, ``sidenet_layer_palm_sidenet_retrieval.py``, ``joint_multihead_attention_sum.py``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memory_bench.backbone.layers import Layers
from memory_bench.backbone.lora import LinearFn, plain


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a stack of parallel blocks: `inner` is the width of the feed-forward."""

    layers: int
    width: int
    inner: int
    heads: int


def empty_linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
    """A linear layer without values: the default ones would be drawn from the global generator."""
    return cast(nn.Linear, nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias))


class ParallelAttention(nn.Module):
    """The four projections, without bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (empty_linear(width, width, False) for _ in range(4))


class ParallelFeedForward(nn.Module):
    """Two linear layers with bias."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc_in, self.fc_out = empty_linear(width, inner, True), empty_linear(inner, width, True)


class ParallelBlock(nn.Module):
    """``x + attention(norm(x)) + mlp(norm(x))``."""

    def __init__(self, width: int, inner: int, epsilon: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=epsilon)
        self.attention = ParallelAttention(width)
        self.mlp = ParallelFeedForward(width, inner)


class ParallelLayers(Layers):
    """A stack of parallel blocks behind the verbs of `Layers`.

    Args:
        shape: sizes.
        rng: of the initial values (those of `nn.Linear`); None: zeros, to be loaded.
        epsilon: of the layer norms; official: 1e-5 in the side network, 1e-6 in the backbone.
        activation: of the feed-forward; official: exact GELU in the side network, its tanh form in the backbone.
    """

    def __init__(
        self,
        shape: Shape,
        rng: torch.Generator | None,
        *,
        epsilon: float = 1e-5,
        activation: Callable[[Tensor], Tensor] = F.gelu,
    ) -> None:
        super().__init__()
        self.family, self.heads, self.kv_heads = "parallel", shape.heads, shape.heads
        self.head_width, self.hidden_width = shape.width // shape.heads, shape.width
        self.key_shift = nn.ParameterList()
        self.activation = activation
        self.blocks = nn.ModuleList(ParallelBlock(shape.width, shape.inner, epsilon) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width, eps=epsilon)
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            bound = linear.in_features**-0.5
            for p in linear.parameters():
                values = torch.zeros(p.shape) if rng is None else (torch.rand(p.shape, generator=rng) * 2 - 1) * bound
                p.data.copy_(values)

    @property
    def _blocks(self) -> Any:
        return self.blocks

    @property
    def _last_norm(self) -> Any:
        return self.norm

    def norm_input(self, layer: int, hidden: Tensor) -> Tensor:
        """See `Layers.norm_input`; the feed-forward reads the same."""
        return cast(Tensor, self._blocks[layer].norm(hidden))

    def project(
        self, layer: int, normed: Tensor, text: Tensor | None = None, linear: LinearFn = plain
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Layers.project`; keys are never shifted."""
        del text
        attention = self._blocks[layer].attention
        names = ("q_proj", "k_proj", "v_proj")
        q, k, v = (linear(f"attention.{name}", getattr(attention, name), normed) for name in names)
        return self.split_heads(q), self.split_heads(k), self.split_heads(v)

    def split_heads(self, x: Tensor) -> Tensor:
        """``[rows, tokens, heads * head]`` as ``[rows, heads, tokens, head]``."""
        return cast(Tensor, x.unflatten(-1, [-1, self.head_width])).transpose(1, 2)

    def close(self, layer: int, hidden: Tensor, attended: Tensor, linear: LinearFn = plain) -> Tensor:
        """See `Layers.close`."""
        block = self._blocks[layer]
        inner = self.activation(linear("mlp.fc_in", block.mlp.fc_in, block.norm(hidden)))
        out = linear("attention.o_proj", block.attention.o_proj, attended)
        return hidden + out + linear("mlp.fc_out", block.mlp.fc_out, inner)


def alibi_slopes(heads: int) -> list[float]:
    """ALiBi's slope of every head: powers of ``2 ** (-8 / heads)``; heads beyond a power of 2 take from twice as many.

    Source: Press, Smith and Lewis, arXiv 2108.12409, with the paper's code for other counts.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    return slopes if power == heads else slopes + alibi_slopes(2 * power)[::2][: heads - power]


def alibi_mask(mask: Tensor, positions: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Added to logits ``[rows, heads, tokens, tokens]``: slope times the key's position, or -inf where it is hidden.

    Args:
        mask: ``[rows, tokens]`` bool.
        positions: ``[rows, tokens]``.
        heads: number of heads.
        dtype: of the result.
    """
    slopes = torch.tensor(alibi_slopes(heads), device=mask.device)
    bias = slopes[:, None, None] * positions[:, None, None, :]  # [rows, heads, 1, tokens]
    return causal_bias(bias.to(dtype), mask)


def causal_bias(bias: Tensor, mask: Tensor) -> Tensor:
    """`bias` ``[rows, heads, 1 or tokens, tokens]``, -inf at later tokens and at padding (which sees itself)."""
    tokens = mask.shape[1]
    visible = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril() & mask[:, None, :]
    visible = visible | torch.eye(tokens, dtype=torch.bool, device=mask.device)
    return bias.masked_fill(~visible[:, None], -torch.inf)
