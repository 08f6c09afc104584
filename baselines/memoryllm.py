"""MemoryLLM: a fixed pool of memory tokens per layer that updates itself, forgetting at random.

Every segment is read with the layer's whole pool as a prefix. A second pass over [newest block, segment] gives a new
block of K rows per layer; K random rows of the pool are dropped and the block is appended, so that a block keeps the
share (1 - K/N)^t of its rows after t later writes. See `pool` for the passes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from memory_bench.axes import Axes
from memory_bench.backbone.model import Backbone
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard

from .parts.pool import PoolModel
from .parts.pool_layout import PoolLayout
from .parts.pool_state import PoolConfig, PoolState, merge_pool


@dataclass(frozen=True, slots=True)
class MemoryLLMConfig(PoolConfig):
    """Hyper-parameters of MemoryLLM."""

    @classmethod
    def official(cls) -> "MemoryLLMConfig":
        """The 8B model's sizes and every quirk of the official code that changes numbers."""
        return cls(
            segment=512,
            tokens_per_block=256,
            blocks=50,
            lora_rank=16,
            add_read_lora=True,
            pool_initialized=True,
            leak_first_offset=True,
        )


def fit_pool(card: BackboneCard, budget: Budget) -> dict[str, Any]:
    """Options of `PoolConfig` for a backbone.

    Small ones (width up to 256): 4 memory tokens a segment, a pool of 32, no adapters, since all weights train.
    Others: one memory token for 32 tokens of text (16 for a segment of 512), 20 blocks, and adapters of rank 8 for
    writing and for reading, of a smaller rank if the budget's added parameters do not allow that.
    """
    if card.width <= 256:
        return {"segment": card.window, "tokens_per_block": 4, "blocks": 8}
    q, kv = card.heads * card.head_width, card.kv_heads * card.head_width
    per_rank = 2 * card.layers * (6 * card.width + q + 2 * kv + 3 * card.mlp_width)
    rank = 8
    while rank > 1 and budget.added_parameters is not None and rank * per_rank > budget.added_parameters:
        rank //= 2
    block = max(1, card.window // 32)
    return {
        "segment": card.window,
        "tokens_per_block": block,
        "blocks": 20,
        "lora_rank": rank,
        "lora_alpha": 4.0 * rank,
        "add_read_lora": True,
    }


class MemoryLLM(PoolModel[PoolState]):
    """See the module. The state has a pool per row; the drop draws come from the rows' seeds.

    A model that starts untrained runs as the plain backbone until a stream's first write, whose block then fills the
    pool (the official rule, without its aliasing bug); an initialised noise pool would only be in the way of training.
    """

    Config: ClassVar[type[Any]] = MemoryLLMConfig
    released = PoolLayout()
    source = (
        "MemoryLLM, arXiv 2402.04624; wangyu-ustc/MemoryLLM@5acaf52 modeling_memoryllm.py. Deviations: a pool per row, "
        "padding works, exactly K rows are dropped, no in-place aliasing at the first fill, seeded draws; adapters "
        "without dropout; training through the sample's own writes instead of the published curriculum."
    )
    axes = Axes(
        unit="layer vectors", capacity="fixed", overflow="drop at random", write="extra tokens",
        written_with_gradient=True, read="all", inject="all layers", fusion="prefix", order="kept",
        trained="all",
    )  # fmt: skip

    def __init__(self, backbone: Backbone, config: MemoryLLMConfig, rng: torch.Generator) -> None:
        super().__init__(backbone, config, rng)
        self.initialized: Tensor
        flag = torch.tensor(int(config.pool_initialized or config.learned_start), dtype=torch.uint8)
        self.register_buffer("initialized", flag.to(backbone.device))

    @classmethod
    def fit(cls, card: BackboneCard, budget: Budget) -> MemoryLLMConfig:
        """A config sized for the backbone; see `fit_pool`."""
        return MemoryLLMConfig(**fit_pool(card, budget))

    @property
    def starts_filled(self) -> bool:
        """As the loaded weights say."""
        return bool(self.initialized)

    def open(self, rows: int, *, seeds: Sequence[int] | None = None) -> PoolState:
        """Fresh streams, each with the model's initial pool."""
        return self.start(rows, seeds)

    def merge(self, state: PoolState, block: Tensor, permutations: Tensor) -> PoolState:
        """Drop as many random rows as `block` has and append it; blocks of any size are taken."""
        return replace(state, pool=merge_pool(state.pool, block, permutations))
