"""Sliding window with attention sinks (StreamingLLM, arXiv 2309.17453).

The cache holds the keys and values of a stream's first few tokens (the sinks, on which attention parks what it does
not need) and of its last `window` tokens. Positions are given within the cache, not in the text (section 3.2), so the
stream may be longer than any sequence the backbone was trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from memory_bench.axes import Axes
from memory_bench.backbone.model import Backbone, Past
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.protocol import MemoryModel, Readout, Segment, Traits

from .parts.cache import empty_cache, keep_recent, next_positions


@dataclass(frozen=True, slots=True)
class SlidingWindowConfig:
    """Options of `SlidingWindow`; paper: `sinks` is 4 and `window` the rest of the cache."""

    segment: int = 512  # tokens per step
    sinks: int = 4  # first tokens of the stream kept for ever; 0: a plain sliding window
    window: int | None = None  # last tokens kept; None: as many as a segment has


class SlidingWindow(MemoryModel[Past]):
    """The backbone over sinks, recent tokens and the current segment."""

    Config = SlidingWindowConfig
    families = ("llama",)  # learned absolute positions are part of a cached key, which then cannot move
    source = (
        "StreamingLLM, arXiv 2309.17453. Several tokens enter at once, so a prediction sees between `window` and "
        "`window + segment` recent tokens, where the paper's decoder, fed token by token, always sees `window`."
    )
    axes = Axes(
        unit="token kv", capacity="fixed", overflow="drop oldest", write="direct", read="by position",
        inject="all layers", fusion="one softmax", order="kept",
    )  # fmt: skip

    def __init__(self, backbone: Backbone, config: SlidingWindowConfig, rng: torch.Generator) -> None:
        super().__init__()
        del rng  # nothing to initialise
        self.backbone = backbone
        self.config = config
        self.window = config.segment if config.window is None else config.window
        self.traits = Traits(segment=config.segment)

    @classmethod
    def fit(cls, card: BackboneCard, budget: Budget) -> SlidingWindowConfig:
        """Segments and window of the backbone's own window."""
        del budget
        return SlidingWindowConfig(segment=card.window)

    def open(self, rows: int, *, seeds: Sequence[int] | None = None) -> Past:
        """See `MemoryModel.open`."""
        del seeds
        return empty_cache(self.backbone, rows, self.config.sinks + self.window)

    def step(self, state: Past, segment: Segment, *, write: bool = True) -> tuple[Readout, Past]:
        """See `MemoryModel.step`."""
        where = next_positions(self.backbone, state, segment.mask)
        embeds = self.backbone.embed(segment.ids)
        hidden, own = self.backbone.run_cached(embeds, segment.mask, state, positions=where, keep=write)
        if own is not None:
            state = keep_recent(state.extend(own), self.window, self.config.sinks)
        return Readout(hidden, self.backbone.head), state

    def flops(self, tokens: int, remembered: int) -> int:
        """See `MemoryModel.flops`; empty slots are computed and masked."""
        del remembered
        return self.backbone.flops(tokens, keys=self.config.sinks + self.window + tokens)
