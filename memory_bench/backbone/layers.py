"""One decoder layer of a Hugging Face model at a time: the verbs a pass is written in, and copies of layers.

Unusual here:

- A backbone and a side network made of copied layers are the same class, so that norms, biases, grouped heads, the key
  shift and residuals of three families are written once.
- Queries are handed out with their layer's own attention scale in them (GPT-2's by layer, Granite's multiplier), so
  that whoever divides by the root of the head's width, as everywhere, computes the model's attention.
- What differs between layers is handed out per layer: `Backbone.rotation` and `Backbone.visible` have one entry each.
"""

import copy
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memory_bench.backbone.lora import Adapter, LinearFn, Projection, plain

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines ``[rows, 1, tokens, head]`` of a layer's positions."""


class Layers(nn.Module):
    """Decoder layers of the Llama, GPT-2 or OPT family, called by index.

    Attributes:
        family: ``llama``, ``gpt2`` or ``opt``.
        heads, kv_heads, head_width: sizes of the attention.
        hidden_width: of what goes from layer to layer.
        adapter: beside the projections, wherever they are applied; None: there are none.
        key_shift: per layer, how much of the previous text token's key is mixed in; empty: keys are not shifted.
    """

    family: str
    heads: int
    kv_heads: int
    head_width: int
    hidden_width: int
    key_shift: nn.ParameterList

    def __init__(self) -> None:
        super().__init__()
        self.adapter: Adapter | None = None

    @property
    @abstractmethod
    def _blocks(self) -> Any:
        """The layers' own modules."""

    @property
    @abstractmethod
    def _last_norm(self) -> Any:
        """The norm behind the last layer; None where the model has none (OPT with post-norm)."""

    def final_norm(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[rows, tokens, hidden_width]`` behind the last layer, normalised."""
        return hidden if self._last_norm is None else cast(Tensor, self._last_norm(hidden))

    def norm_input(self, layer: int, hidden: Tensor) -> Tensor:
        """What the layer's projections see: the normalised input (OPT with post-norm: the input itself)."""
        block = self._blocks[layer]
        if self.family == "gpt2":
            return cast(Tensor, block.ln_1(hidden))
        if self.family == "opt":
            return cast(Tensor, block.self_attn_layer_norm(hidden) if block.do_layer_norm_before else hidden)
        return cast(Tensor, block.input_layernorm(hidden))

    def project(
        self, layer: int, normed: Tensor, text: Tensor | None = None, linear: LinearFn = plain
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[rows, heads, tokens, head]``, keys and values ``[rows, kv_heads, tokens, head]``, unrotated.

        Args:
            layer: index of the layer.
            normed: ``[rows, tokens, hidden_width]`` from `norm_input`.
            text: ``[rows, tokens]`` bool, where the rows are text (only the key shift asks); None: everywhere.
            linear: applies the projections.
        """
        block = self._blocks[layer]
        attention = block.attn if self.family == "gpt2" else block.self_attn
        linear = self._adapted(layer, linear)
        if self.family == "gpt2":
            q, k, v = linear("attn.c_attn", attention.c_attn, normed).chunk(3, dim=-1)
        else:
            q = linear("self_attn.q_proj", attention.q_proj, normed)
            k = linear("self_attn.k_proj", attention.k_proj, normed)
            v = linear("self_attn.v_proj", attention.v_proj, normed)
        if self.key_shift:
            k = self._shift(k, self.key_shift[layer], text)
        q, k, v = (t.unflatten(-1, (-1, self.head_width)).transpose(1, 2) for t in (q, k, v))
        if self.family == "llama" and hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        usual = self.head_width**-0.5
        own = float(getattr(attention, "scaling", usual))
        return q if math.isclose(own, usual) else q * (own / usual), k, v

    def query_weight(self, layer: int) -> Tensor:
        """What turns a layer's normalised input into queries, ``[heads, head, hidden_width]``, its adapter included.

        Llama family; without biases, the norm of queries and the layer's own scale.
        """
        name, weight = "self_attn.q_proj", cast(Tensor, self._blocks[layer].self_attn.q_proj.weight)
        pair = None if self.adapter is None else self.adapter.pair(layer, name)
        if self.adapter is not None and pair is not None:
            weight = torch.addmm(weight, pair.B, pair.A, alpha=self.adapter.scale)
        return cast(Tensor, weight.unflatten(0, (self.heads, self.head_width)))

    def _adapted(self, layer: int, linear: LinearFn) -> LinearFn:
        """`linear`, which is given projections that have their adapters beside them."""
        adapter = self.adapter
        if adapter is None:
            return linear
        return lambda name, projection, x: linear(name, adapter.beside(layer, name, projection), x)

    @staticmethod
    def _shift(keys: Tensor, share: Tensor, text: Tensor | None) -> Tensor:
        before = F.pad(keys, (0, 0, 1, 0))[:, :-1]
        both = torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device) if text is None else text
        both = both & F.pad(both, (1, 0))[:, :-1]
        return keys + (both[..., None] * torch.sigmoid(share)) * (before - keys)

    @staticmethod
    def rotate(x: Tensor, rotation: Rotation | None, *, spent: bool = False) -> Tensor:
        """`x` ``[rows, heads, tokens, head]`` turned to its positions (half-split convention of Llama).

        Args:
            x: queries or keys.
            rotation: the layer's own entry of `Backbone.rotation`.
            spent: nobody needs `x` any more, so that it may be overwritten.
        """
        if rotation is None:
            return x
        cos, sin = rotation
        left, right = x.chunk(2, dim=-1)
        if torch.is_grad_enabled():
            return (x * cos + torch.cat([-right, left], dim=-1) * sin).to(x.dtype)  # OLMo turns in float32
        # The same sums without what only a gradient needs: joined halves, and memory for each step.
        minus, plus = right * sin[..., : left.shape[-1]], left * sin[..., left.shape[-1] :]
        turned = x.mul_(cos) if spent and x.dtype == cos.dtype else x * cos
        turned[..., : left.shape[-1]].sub_(minus)
        turned[..., left.shape[-1] :].add_(plus)
        return turned.to(x.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        """Scaled dot-product attention ``[rows, tokens, heads * head]``.

        Args:
            q: rotated queries; k, v: rotated keys and values (kv heads are repeated here).
            k: see q.
            v: see q.
            visible: the layer's own entry of `Backbone.visible`: ``[rows, 1, tokens, keys]`` bool, or floats added to
                the scores; None: plain causal over equally many queries and keys.
        """
        groups = self.heads // self.kv_heads
        # The CPU's kernel takes shared heads as they are; on CUDA the fast kernels for masks do not.
        shared = groups > 1 and q.device.type == "cpu"
        if groups > 1 and not shared:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, visible, is_causal=visible is None, enable_gqa=shared)
        return out.transpose(1, 2).flatten(2)

    def close(self, layer: int, hidden: Tensor, attended: Tensor, linear: LinearFn = plain) -> Tensor:
        """Output of the layer: attention output projection, feed-forward, residuals and norms."""
        block, linear = self._blocks[layer], self._adapted(layer, linear)
        if self.family == "gpt2":
            hidden = hidden + linear("attn.c_proj", block.attn.c_proj, attended)
            inner = block.mlp.act(linear("mlp.c_fc", block.mlp.c_fc, block.ln_2(hidden)))
            return hidden + linear("mlp.c_proj", block.mlp.c_proj, inner)
        if self.family == "opt":
            return self._close_opt(block, hidden, attended, linear)
        share = float(getattr(block, "residual_multiplier", 1.0))  # Granite
        hidden = hidden + _times(linear("self_attn.o_proj", block.self_attn.o_proj, attended), share)
        normed, mlp = block.post_attention_layernorm(hidden), block.mlp
        gate = linear("mlp.gate_proj", mlp.gate_proj, normed)
        up = linear("mlp.up_proj", mlp.up_proj, normed)
        return hidden + _times(linear("mlp.down_proj", mlp.down_proj, mlp.act_fn(gate) * up), share)

    @staticmethod
    def _close_opt(block: Any, hidden: Tensor, attended: Tensor, linear: LinearFn) -> Tensor:
        before: bool = block.do_layer_norm_before
        hidden = hidden + linear("self_attn.out_proj", block.self_attn.out_proj, attended)
        hidden = hidden if before else block.self_attn_layer_norm(hidden)
        inner = block.final_layer_norm(hidden) if before else hidden
        inner = block.activation_fn(linear("fc1", block.fc1, inner))
        hidden = hidden + linear("fc2", block.fc2, inner)
        return hidden if before else cast(Tensor, block.final_layer_norm(hidden))

    @torch.no_grad()
    def projections(self, layer: int) -> dict[str, tuple[int, int]]:
        """Names of a layer's projections (``self_attn.q_proj``) with (outputs, inputs), found by a pass over zeros."""
        found: dict[str, tuple[int, int]] = {}

        def note(name: str, projection: Projection, x: Tensor) -> Tensor:
            y = projection(x)
            found[name] = (y.shape[-1], x.shape[-1])
            return y

        like = next(self._blocks[layer].parameters())
        x = torch.zeros(1, 1, self.hidden_width, device=like.device, dtype=like.dtype)
        q, _, _ = self.project(layer, x, linear=note)
        self.close(layer, x, q.transpose(1, 2).flatten(2), linear=note)
        return found

    def layer_flops(self, layer: int, tokens: int, keys: int) -> int:
        """Forward operations of a layer over `tokens` positions that each attend `keys` keys (multiply-add = 2)."""
        matrices: int = sum(p.numel() for p in self._blocks[layer].parameters() if p.dim() == 2)
        adapters = 0 if self.adapter is None else self.adapter.size(layer)
        return 2 * tokens * (matrices + adapters) + 4 * tokens * keys * self.heads * self.head_width

    def project_flops(self, layer: int, tokens: int, *, queries: bool = True) -> int:
        """Of `layer_flops`, what `project` takes; without `queries`, for positions that give keys and values only."""
        made = (self.heads if queries else 0) + 2 * self.kv_heads
        adapters = 0 if self.adapter is None else self.adapter.size(layer, "qkv" if queries else "kv")
        return 2 * tokens * (self.hidden_width * made * self.head_width + adapters)


def itself(seen: Tensor) -> Tensor:
    """`seen` ``[rows, tokens, keys]`` where a query that would see nothing sees itself: the softmax of nothing is NaN.

    The last keys are the queries' own.
    """
    tokens = seen.shape[1]
    alone = torch.eye(tokens, dtype=torch.bool, device=seen.device) & ~seen.any(dim=2, keepdim=True)
    return seen | F.pad(alone, (seen.shape[2] - tokens, 0))


def added(visible: Sequence[Tensor | None], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """`visible` of all layers as what the CPU's attention adds to its scores: made once, not in every layer.

    It makes the same of a bool. Elsewhere kernels want them laid out in ways of their own.
    """
    made = {id(mask): mask for mask in visible}
    for key, mask in made.items():
        if mask is not None and mask.dtype is torch.bool and mask.device.type == "cpu":
            made[key] = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)
    return tuple(made[id(mask)] for mask in visible)


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


class CopiedLayers(Layers):
    """Trainable copies of some layers of `source` without its adapters, and of the norm behind its last one.

    The copies are called by their own index: layer i here is layer ``chosen[i]`` there, and turns and sees as that one.
    """

    def __init__(self, source: Layers, chosen: Sequence[int]) -> None:
        super().__init__()
        self.chosen = tuple(chosen)
        self.family, self.heads, self.kv_heads = source.family, source.heads, source.kv_heads
        self.head_width, self.hidden_width = source.head_width, source.hidden_width
        self.blocks = nn.ModuleList(copy.deepcopy(source._blocks[layer]) for layer in chosen)
        self.norm = copy.deepcopy(source._last_norm)
        self.key_shift = nn.ParameterList(copy.deepcopy(source.key_shift[i]) for i in chosen if len(source.key_shift))
        self.requires_grad_()
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """The layers stay in evaluation mode: as in the backbone, nothing is dropped."""
        del mode
        return super().train(False)

    @property
    def _blocks(self) -> Any:
        return self.blocks

    @property
    def _last_norm(self) -> Any:
        return self.norm
