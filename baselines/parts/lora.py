"""Low-rank adapters beside a backbone: ``y = W x + (alpha / rank) * B (A x)``, applied through `Backbone`'s `linear=`.

The adapters belong to the memory model; the backbone's modules are never changed or wrapped. Dropout on the adapter's
input (0.1 in the official trainings) is left out. Source: LoRA (arXiv 2106.09685), initial values as in PEFT.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from memory_bench.backbone.layers import LinearFn
from memory_bench.backbone.model import Backbone
from memory_bench.errors import unknown

TARGETS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")


def projections(backbone: Backbone, layer: int) -> dict[str, tuple[int, int]]:
    """Names of a layer's projections (``self_attn.q_proj``) and their (outputs, inputs), found by a pass over zeros."""
    found: dict[str, tuple[int, int]] = {}

    def note(name: str, module: nn.Module, x: Tensor) -> Tensor:
        y = cast(Tensor, module(x))
        found[name] = (y.shape[-1], x.shape[-1])
        return y

    with torch.no_grad():
        x = torch.zeros(1, 1, backbone.hidden_width, device=backbone.device, dtype=backbone.dtype)
        q, _, _ = backbone.project(layer, x, linear=note)
        backbone.close(layer, x, q.transpose(1, 2).flatten(2), linear=note)
    return found


class LowRank(nn.Module):
    """One adapted projection: ``A`` ``[rank, inputs]``, ``B`` ``[outputs, rank]`` (zero at the start)."""

    def __init__(self, outputs: int, inputs: int, rank: int, rng: torch.Generator) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.A = nn.Parameter((torch.rand(rank, inputs, generator=rng) * 2 - 1) * bound)
        self.B = nn.Parameter(torch.zeros(outputs, rank))


class Adapter(nn.Module):
    """Adapters for every layer of a backbone; parameters are named ``layers.0.self_attn.q_proj.A``.

    Args:
        backbone: only its shapes, device and dtype are used.
        rank: of the update.
        alpha: the update is scaled by ``alpha / rank``.
        targets: last components of the projections' names.
        rng: for the initial values.

    Raises:
        UserError: a target is no projection of the backbone.
    """

    def __init__(
        self, backbone: Backbone, rank: int, alpha: float, targets: Iterable[str], rng: torch.Generator
    ) -> None:
        super().__init__()
        self.rank = rank
        self.scale = alpha / rank
        chosen = set(targets)
        self.layers = nn.ModuleList()
        for layer in range(backbone.layers):
            shapes = projections(backbone, layer)
            names = {name.rpartition(".")[2]: name for name in shapes}
            for target in sorted(chosen - set(names)):
                raise unknown("LoRA target", target, names)
            block = nn.ModuleDict()
            for part in sorted(chosen):
                group, _, _ = names[part].partition(".")
                if group not in block:
                    block[group] = nn.ModuleDict()
                cast(nn.ModuleDict, block[group])[part] = LowRank(*shapes[names[part]], rank, rng)
            self.layers.append(block)
        self.to(device=backbone.device, dtype=backbone.dtype)

    def linear(self, layer: int) -> LinearFn:
        """The layer's projections with the update added."""
        groups = cast(nn.ModuleDict, self.layers[layer])

        def apply(name: str, module: nn.Module, x: Tensor) -> Tensor:
            y = cast(Tensor, module(x))
            group, _, part = name.partition(".")
            if group not in groups or part not in (block := cast(nn.ModuleDict, groups[group])):
                return y
            pair, inside = block[part], nn.functional.linear(x, cast(Tensor, block[part].A))
            flat = torch.addmm(y.flatten(0, -2), inside.flatten(0, -2), cast(Tensor, pair.B).t(), alpha=self.scale)
            return flat.view_as(y)

        return apply

    def flops(self, layer: int, rows: int, prefix: int) -> int:
        """Operations of a layer over `rows` text positions and `prefix` memory rows, which ask nothing."""
        total = 0
        for name, module in self.layers[layer].named_modules():
            if isinstance(module, LowRank):
                count = rows + prefix if name.endswith(("k_proj", "v_proj")) else rows
                total += 2 * count * (module.A.numel() + module.B.numel())
        return total
