"""Segment-level recurrence (Transformer-XL, arXiv 1901.02860): attend to the previous segment's keys and values.

Through L layers information travels L segments back. Relative positions come from the rotary embedding, counted over
the slots of the cache and then the segment; the paper's own relative encoding (section 3.3) would need its backbone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from memory_bench.axes import Axes
from memory_bench.backbone.model import Backbone, Past
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.protocol import MemoryModel, Readout, Segment, Traits

from .parts.cache import empty_cache, keep_recent, next_positions


@dataclass(frozen=True, slots=True)
class XLCacheConfig:
    """Options of `XLCache`."""

    segment: int = 512  # tokens per step; paper: L, code: tgt_len
    memory: int | None = None  # cached tokens; paper: M, code: mem_len; None: as many as a segment has
    detach_cache: bool = False  # no gradient into the cache (paper: SG, section 3.2); False: the recipe decides

    @classmethod
    def official(cls) -> Self:
        """As the paper trains."""
        return cls(detach_cache=True)


class XLCache(MemoryModel[Past]):
    """The backbone over the cached previous segment and the current one."""

    Config = XLCacheConfig
    families = ("llama",)  # learned absolute positions are part of a cached key, which then cannot move
    source = (
        "Transformer-XL, arXiv 1901.02860, with the backbone's rotary positions. Keys and values are cached where the "
        "paper caches hidden states: the same predictions; with `detach_cache` the key and value projections get no "
        "gradient from cached tokens. By default gradients flow through the cache, as for every model here."
    )
    axes = Axes(
        unit="token kv", capacity="fixed", overflow="drop oldest", write="direct", read="by position",
        inject="all layers", fusion="one softmax", order="kept",
    )  # fmt: skip

    def __init__(self, backbone: Backbone, config: XLCacheConfig, rng: torch.Generator) -> None:
        super().__init__()
        del rng  # nothing to initialise
        self.backbone = backbone
        self.config = config
        self.memory = config.segment if config.memory is None else config.memory
        self.traits = Traits(segment=config.segment)

    @classmethod
    def fit(cls, card: BackboneCard, budget: Budget) -> XLCacheConfig:
        """Segments and cache of the backbone's own window."""
        del budget
        return XLCacheConfig(segment=card.window)

    def open(self, rows: int, *, seeds: Sequence[int] | None = None) -> Past:
        """See `MemoryModel.open`."""
        del seeds
        return empty_cache(self.backbone, rows, self.memory)

    def step(self, state: Past, segment: Segment, *, write: bool = True) -> tuple[Readout, Past]:
        """See `MemoryModel.step`."""
        where = next_positions(self.backbone, state, segment.mask)
        embeds = self.backbone.embed(segment.ids)
        hidden, own = self.backbone.run_cached(embeds, segment.mask, state, positions=where, keep=write)
        if own is not None:
            state = keep_recent(state.extend(own), self.memory)
            state = state.detach() if self.config.detach_cache else state
        return Readout(hidden, self.backbone.head), state

    def flops(self, tokens: int, remembered: int) -> int:
        """See `MemoryModel.flops`; empty slots are computed and masked."""
        del remembered
        return self.backbone.flops(tokens, keys=self.memory + tokens)
