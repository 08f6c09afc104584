"""Segment-level recurrence (Transformer-XL, arXiv 1901.02860): attend to the previous segment's keys and values.

Through L layers information travels L segments back. Relative positions come from the rotary embedding, counted over
the slots of the cache and then the segment; the paper's own relative encoding (section 3.3) would need its backbone.

With `select`, the cache is chosen from a longer pool, per layer and head (TRAMS, arXiv 2310.15494, without training).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch

from memory_bench.axes import Axes
from memory_bench.backbone.model import Backbone, Past
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.choices import check_choices
from memory_bench.errors import UserError
from memory_bench.protocol import MemoryModel, Readout, Segment, Traits

from .parts.cache import empty_cache, keep_recent, next_positions
from .parts.drawing import row_seeds
from .parts.selection import Pool, scores_of

SEGMENTS = 8  # segments that a pool holds
LATE: dict[str, Any] = {"left_out": True}  # options that came later: no part of a key while they have their default


@dataclass(frozen=True, slots=True)
class XLCacheConfig:
    """Options of `XLCache`."""

    segment: int = 512  # tokens per step; paper: L, code: tgt_len
    memory: int | None = None  # cached tokens; paper: M, code: mem_len; None: as many as a segment has
    detach_cache: bool = False  # no gradient into the cache (paper: SG, section 3.2); False: the recipe decides
    # all: the newest `memory` tokens; else chosen of a pool: trams: by length and sum of a key mapped back into the
    # layer's input; norm: by that length alone; recent: the newest again; random: by chance (controls)
    select: Literal["all", "trams", "norm", "recent", "random"] = field(default="all", metadata=LATE)
    pool: int | None = field(default=None, metadata=LATE)  # tokens to choose from; official: 400; None: 8 segments
    top_k: int | None = field(default=None, metadata=LATE)  # chosen ones; official: 50; None: half of `memory`

    def __post_init__(self) -> None:
        check_choices("xl-cache", self)
        if self.select == "all":
            if self.pool is not None or self.top_k is not None:
                raise UserError(
                    "xl-cache: pool and top_k say what is chosen of: set select = trams too, or leave them."
                )
            return
        if not 1 <= self.chosen <= self.attended <= self.slots:
            raise UserError(
                f"xl-cache: of a pool of {self.slots} tokens {self.attended} are attended to (memory), {self.chosen} "
                "of them chosen (top_k): use 1 <= top_k <= memory <= pool."
            )

    @property
    def attended(self) -> int:
        """Cached tokens that a segment attends to."""
        return self.segment if self.memory is None else self.memory

    @property
    def slots(self) -> int:
        """Cached tokens that they are chosen of."""
        return SEGMENTS * self.segment if self.pool is None else self.pool

    @property
    def chosen(self) -> int:
        """Tokens chosen by score."""
        return self.attended // 2 if self.top_k is None else self.top_k

    @classmethod
    def official(cls) -> Self:
        """As the paper trains."""
        return cls(detach_cache=True)


class XLCache(MemoryModel[Past | Pool]):
    """The backbone over the cached previous segment and the current one."""

    Config = XLCacheConfig
    families = ("llama",)  # learned absolute positions are part of a cached key, which then cannot move
    source = (
        "Transformer-XL, arXiv 1901.02860, with the backbone's rotary positions. Keys and values are cached where the "
        "paper caches hidden states: the same predictions; with `detach_cache` the key and value projections get no "
        "gradient from cached tokens. By default gradients flow through the cache, as for every model here. "
        "Selection: TRAMS, arXiv 2310.15494; lwaekfjlk/TRAMS@e53bcc8; scores of query heads that share a key are added."
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
        self.memory = config.attended
        self.traits = Traits(segment=config.segment)

    @classmethod
    def fit(cls, card: BackboneCard, budget: Budget) -> XLCacheConfig:
        """Segments and cache of the backbone's own window."""
        del budget
        return XLCacheConfig(segment=card.window)

    def open(self, rows: int, *, seeds: Sequence[int] | None = None) -> Past | Pool:
        """See `MemoryModel.open`; only a random selection draws."""
        if self.config.select == "all":
            return empty_cache(self.backbone, rows, self.memory)
        drawn = row_seeds(rows, seeds) if self.config.select == "random" else None
        return Pool.empty(self.backbone, rows, self.config.slots, self.memory, drawn)

    def step(self, state: Past | Pool, segment: Segment, *, write: bool = True) -> tuple[Readout, Past | Pool]:
        """See `MemoryModel.step`."""
        cached = state.chosen if isinstance(state, Pool) else state
        where = next_positions(self.backbone, cached, segment.mask)
        embeds = self.backbone.embed(segment.ids)
        hidden, own = self.backbone.run_cached(embeds, segment.mask, cached, positions=where, keep=write)
        if own is not None:
            state = self._written(state, own)
        return Readout(hidden, self.backbone.head), state

    def _written(self, state: Past | Pool, own: Past) -> Past | Pool:
        after: Past | Pool
        if self.config.select != "all" and isinstance(state, Pool):
            scores = scores_of(self.config.select, self.backbone, own, state)
            after = state.written(own, scores, self.memory - self.config.chosen)
        else:
            assert isinstance(state, Past)
            after = keep_recent(state.extend(own), self.memory)
        return after.detach() if self.config.detach_cache else after

    def flops(self, tokens: int, remembered: int) -> int:
        """See `MemoryModel.flops`; empty slots are computed and masked."""
        passed = self.backbone.flops(tokens, keys=self.memory + tokens)
        return passed + self.detached_flops(tokens, remembered)

    def detached_flops(self, tokens: int, remembered: int) -> int:
        """Scores. See `MemoryModel.detached_flops`."""
        del remembered
        if self.config.select not in ("trams", "norm"):
            return 0
        backbone = self.backbone
        weights = backbone.heads * backbone.head_width * backbone.hidden_width  # of a layer's queries
        adapter, layers = backbone.adapter, range(backbone.layers)
        pairs = [] if adapter is None else [adapter.pair(layer, "self_attn.q_proj") for layer in layers]
        ranks = sum(len(pair.A) for pair in pairs if pair is not None)
        return 2 * weights * (backbone.layers * tokens + ranks)
