"""Carry: a gated mean of a segment stands before the next one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memory_bench.backbone import Backbone
from memory_bench.protocol import MemoryModel, Readout, Segment, State, Traits


@dataclass(frozen=True, slots=True)
class CarryConfig:
    """Options of `Carry`; `segment` is set to the backbone's window."""

    segment: int = 512  # tokens per step


@dataclass(frozen=True, slots=True)
class CarryState(State):
    """What a stream remembers."""

    memory: Tensor  # [rows, 1, width]


class Carry(MemoryModel[CarryState]):
    """Puts a gated mean of a segment before the next."""

    Config = CarryConfig
    source = "An example: the smallest recurrent memory."

    def __init__(self, backbone: Backbone, config: CarryConfig, rng: torch.Generator) -> None:
        super().__init__()
        self.backbone, self.traits = backbone, Traits(segment=config.segment)
        start = 0.1 * torch.randn(backbone.width, generator=rng)
        self.gate = nn.Parameter(start.to(device=backbone.device, dtype=backbone.dtype))

    def open(self, rows: int, *, seeds: Sequence[int] | None = None) -> CarryState:
        """See `MemoryModel.open`; nothing is drawn, so no seeds are needed."""
        del seeds
        return CarryState(self.gate.new_zeros(rows, 1, self.backbone.width))

    def step(self, state: CarryState, segment: Segment, *, write: bool = True) -> tuple[Readout, CarryState]:
        """See `MemoryModel.step`."""
        real = segment.mask  # [rows, tokens]
        one = real.new_ones(real.shape[0], 1)
        mask, text = torch.cat([one, real], dim=1), torch.cat([~one, real], dim=1)
        inputs = torch.cat([state.memory, self.backbone.embed(segment.ids)], dim=1)
        hidden = self.backbone.run(inputs, mask, text=text)[:, 1:]
        readout = Readout(hidden, self.backbone.head)
        if not write:
            return readout, state
        count = real.sum(dim=1).clamp(min=1)[:, None, None]
        mean = (hidden * real[..., None]).sum(dim=1, keepdim=True) / count  # [rows, 1, width]
        keep = real.any(dim=1)[:, None, None]  # a row of nothing but padding keeps its memory
        return readout, CarryState(torch.where(keep, self.gate * mean, state.memory))

    def flops(self, tokens: int, remembered: int) -> int:
        """See `MemoryModel.flops`: a position more than the segment has."""
        del remembered
        return self.backbone.flops(tokens + 1, keys=tokens + 1, predicted=tokens)
