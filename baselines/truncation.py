"""Truncation: reads the current segment and forgets everything before it. The floor every memory must beat."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from memory_bench.axes import Axes
from memory_bench.backbone.model import Backbone
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.protocol import MemoryModel, Nothing, Readout, Segment, Traits


@dataclass(frozen=True, slots=True)
class TruncationConfig:
    """Options of `Truncation`."""

    segment: int = 512  # tokens a prediction can see at most


class Truncation(MemoryModel[Nothing]):
    """The backbone alone on each segment."""

    Config = TruncationConfig
    source = "The backbone as published, applied to disjoint segments; nothing is carried over."
    axes = Axes()

    def __init__(self, backbone: Backbone, config: TruncationConfig, rng: torch.Generator) -> None:
        super().__init__()
        del rng  # nothing to initialise
        self.backbone = backbone
        self.config = config
        self.traits = Traits(segment=config.segment)

    @classmethod
    def fit(cls, card: BackboneCard, budget: Budget) -> TruncationConfig:
        """Segments of the backbone's own window."""
        del budget
        return TruncationConfig(segment=card.window)

    def open(self, rows: int, *, seeds: Sequence[int] | None = None) -> Nothing:
        """See `MemoryModel.open`."""
        del rows, seeds
        return Nothing()

    def step(self, state: Nothing, segment: Segment, *, write: bool = True) -> tuple[Readout, Nothing]:
        """See `MemoryModel.step`."""
        del write
        hidden = self.backbone.run(self.backbone.embed(segment.ids), segment.mask)
        return Readout(hidden, self.backbone.head), state

    def absorb(self, state: Nothing, segment: Segment) -> Nothing:
        """Nothing is written, so nothing is computed."""
        del segment
        return state

    def absorb_flops(self, tokens: int, remembered: int) -> int:
        """See `MemoryModel.absorb_flops`: nothing."""
        del tokens, remembered
        return 0

    def flops(self, tokens: int, remembered: int) -> int:
        """See `MemoryModel.flops`."""
        del remembered
        return self.backbone.flops(tokens, keys=tokens)
