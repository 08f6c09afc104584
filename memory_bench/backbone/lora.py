"""Low-rank adapters beside projections: ``y = W x + (alpha / rank) * B (A x)``; no module is changed or wrapped.

A recipe gives them to the backbone of every model (`Backbone.adapt`), inside `project` and `close`, so that no model
can forget them; a model may have adapters of its own, which it hands to the same verbs (``linear=``). Dropout on the
adapter's input (0.1 in official trainings) is left out. Source: LoRA (arXiv 2106.09685), initial values as in PEFT.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from memory_bench.card import ADAPTED, BackboneCard
from memory_bench.errors import unknown

Projection = Callable[[Tensor], Tensor]
"""A projection of a layer: a module, or one with an adapter beside it."""

LinearFn = Callable[[str, Projection, Tensor], Tensor]
"""Applies a projection, ``fn(name, projection, x)`` with `name` like ``self_attn.q_proj``; a place for adapters."""

TARGETS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
"""What MemoryLLM and M+ adapt."""

KINDS: Mapping[str, str] = {
    **{f"{kind}_proj": kind for kind in ADAPTED},
    **{"out_proj": "o", "fc1": "up", "fc2": "down"},
    **{"c_fc": "up", "attn.c_proj": "o", "mlp.c_proj": "down"},
}
"""What a projection is, by the end of its name; GPT-2's ``c_attn`` is three in one."""

FUSED = "c_attn"


def plain(name: str, projection: Projection, x: Tensor) -> Tensor:
    """The projection as it is."""
    return projection(x)


def kinds_of(name: str) -> frozenset[str]:
    """What the projection called `name` is: one of `memory_bench.card.ADAPTED`, or several."""
    last = name.rpartition(".")[2]
    return frozenset("qkv") if last == FUSED else frozenset({KINDS.get(name) or KINDS[last]})


class Projecting(Protocol):
    """What must be known of a backbone."""

    layers: int

    @property
    def device(self) -> torch.device:
        """Where its weights are."""

    @property
    def dtype(self) -> torch.dtype:
        """Their type."""

    def projections(self, layer: int) -> dict[str, tuple[int, int]]:
        """Names of a layer's projections with (outputs, inputs)."""


class LowRank(nn.Module):
    """One adapted projection: ``A`` ``[rank, inputs]``, ``B`` ``[outputs, rank]`` (zero at the start)."""

    def __init__(self, outputs: int, inputs: int, rank: int, rng: torch.Generator) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.A = nn.Parameter((torch.rand(rank, inputs, generator=rng) * 2 - 1) * bound)
        self.B = nn.Parameter(torch.zeros(outputs, rank))

    @property
    def size(self) -> int:
        """How many weights it has."""
        return self.A.numel() + self.B.numel()

    def add(self, y: Tensor, x: Tensor, scale: float) -> Tensor:
        """`y` ``[..., outputs]`` with `scale` times the update of `x` ``[..., inputs]``."""
        inside = nn.functional.linear(x, self.A)
        return torch.addmm(y.flatten(0, -2), inside.flatten(0, -2), self.B.t(), alpha=scale).view_as(y)


class Adapter(nn.Module):
    """Adapters for layers; parameters are named ``layers.0.self_attn.q_proj.A``.

    Args:
        backbone: only its shapes, device and dtype are used.
        rank: of the update.
        alpha: the update is scaled by ``alpha / rank``.
        targets: names of projections, or their last components.
        rng: for the initial values.

    Raises:
        UserError: a target is no projection of a layer.
    """

    def __init__(
        self, backbone: Projecting, rank: int, alpha: float, targets: Iterable[str], rng: torch.Generator
    ) -> None:
        super().__init__()
        self.rank = rank
        self.scale = alpha / rank
        chosen = sorted(set(targets))
        self.layers = nn.ModuleList()
        for layer in range(backbone.layers):
            own = backbone.projections(layer)
            names = {**{name.rpartition(".")[2]: name for name in own}, **{name: name for name in own}}
            block = nn.ModuleDict()
            for target in chosen:
                if target not in names:
                    raise unknown("LoRA target", target, names)
                group = block
                *groups, last = names[target].split(".")
                for part in groups:
                    if part not in group:
                        group[part] = nn.ModuleDict()
                    group = cast(nn.ModuleDict, group[part])
                group[last] = LowRank(*own[names[target]], rank, rng)
            self.layers.append(block)
        self.to(device=backbone.device, dtype=backbone.dtype)

    def pair(self, layer: int, name: str) -> LowRank | None:
        """What is beside the layer's projection called `name`; None: nothing."""
        found = self.layers[layer]
        for part in name.split("."):
            if part not in cast(nn.ModuleDict, found):
                return None
            found = cast(nn.ModuleDict, found)[part]
        return cast(LowRank, found)

    def beside(self, layer: int, name: str, projection: Projection) -> Projection:
        """The layer's projection called `name` with its update added."""
        pair = self.pair(layer, name)
        return projection if pair is None else lambda x: pair.add(projection(x), x, self.scale)

    def linear(self, layer: int) -> LinearFn:
        """The layer's projections with the update added, for the ``linear=`` of `Layers.project` and `close`."""
        return lambda name, projection, x: self.beside(layer, name, projection)(x)

    def size(self, layer: int, kinds: Iterable[str] = ADAPTED) -> int:
        """How many weights are beside a layer's projections of these kinds (`memory_bench.card.ADAPTED`)."""
        wanted = set(kinds)
        pairs = ((n, m) for n, m in self.layers[layer].named_modules() if isinstance(m, LowRank))
        return sum(m.size for n, m in pairs if kinds_of(n) & wanted)

    def flops(self, layer: int, rows: int, prefix: int = 0) -> int:
        """Operations of a layer over `rows` text positions and `prefix` memory rows, which ask nothing."""
        return 2 * rows * self.size(layer) + 2 * prefix * self.size(layer, "kv")


def adapter_size(card: BackboneCard, rank: int, kinds: Iterable[str]) -> int:
    """How many weights `Backbone.adapt` puts beside a backbone, from what is known of it without loading it."""
    inside = card.width if card.family == "llama" else card.heads * card.head_width  # OPT may embed in fewer channels
    asking, giving = card.heads * card.head_width, card.kv_heads * card.head_width
    ends = {"q": inside + asking, "k": inside + giving, "v": inside + giving, "o": asking + inside}
    ends |= dict.fromkeys(("gate", "up", "down"), inside + card.mlp_width)
    wanted = set(kinds) - (set() if card.family == "llama" else {"gate"})
    if card.family == "gpt2" and wanted & set("qkv"):
        ends["q"] = inside + asking + 2 * giving
        wanted = (wanted - set("qkv")) | {"q"}
    return rank * card.layers * sum(ends[kind] for kind in wanted)
