"""A recurrent cell written out: its numbers come from a generator that is handed in, its products are counted."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memory_bench.backbone.model import Backbone


def uniform(shape: tuple[int, ...], bound: float, backbone: Backbone, rng: torch.Generator) -> nn.Parameter:
    """Values between minus `bound` and `bound`; of a backbone that has shapes alone, a shape alone."""
    if backbone.device.type == "meta":
        return nn.Parameter(torch.empty(shape, device=backbone.device, dtype=backbone.dtype))
    values = torch.empty(shape).uniform_(-bound, bound, generator=rng)
    return nn.Parameter(values.to(backbone.device, backbone.dtype))


class LSTMCell(nn.Module):
    """One step of a long short-term memory, as ``torch.nn.LSTMCell`` with the same names.

    Args:
        inputs: width of what comes in.
        hidden: width of what is kept.
        backbone: has the device and type of the weights.
        rng: for the initial values, uniform within ``1 / sqrt(hidden)``.
    """

    def __init__(self, inputs: int, hidden: int, backbone: Backbone, rng: torch.Generator) -> None:
        super().__init__()
        bound = hidden**-0.5
        self.weight_ih = uniform((4 * hidden, inputs), bound, backbone, rng)
        self.weight_hh = uniform((4 * hidden, hidden), bound, backbone, rng)
        self.bias_ih = uniform((4 * hidden,), bound, backbone, rng)
        self.bias_hh = uniform((4 * hidden,), bound, backbone, rng)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """What is shown and what is kept after `x` ``[rows, inputs]``; h, c ``[rows, hidden]``."""
        gates = F.linear(x, self.weight_ih, self.bias_ih) + F.linear(h, self.weight_hh, self.bias_hh)
        into, forget, new, out = gates.chunk(4, dim=-1)
        c = forget.sigmoid() * c + into.sigmoid() * new.tanh()
        return out.sigmoid() * c.tanh(), c

    def flops(self) -> int:
        """Of the products of one step of one row (multiply-add = 2)."""
        return 2 * (self.weight_ih.numel() + self.weight_hh.numel())
