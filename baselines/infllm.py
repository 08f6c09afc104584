"""InfLLM: blocks of earlier text, found by their most attended keys, beside a window. Nothing is trained.

A stream's keys and values are cut into blocks of `block_size` tokens once they have left the window. Every execution
block attends to the `selected_blocks` whose representative keys its mean query likes best, summed over heads, all at
one constant distance: positions never exceed the window and an execution block, so a backbone reads texts far longer
than it was trained on. See `parts/block_model.py` for the attention and `parts/block_options.py` for who chooses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.errors import UserError

from .parts.block_model import ABLATIONS, BlockModel, BlockState, Pass
from .parts.block_options import BlockOptions


@dataclass(frozen=True, slots=True)
class InfLLMConfig(BlockOptions):
    """Options of InfLLM; see `BlockOptions`."""

    block_size: int = 128  # tokens of a block [block_size]
    selected_blocks: int = 16  # attended to at once [topk]; 0: none
    select_per_head: bool = False  # every query head chooses alone [perhead]

    def __post_init__(self) -> None:
        self.check("infllm", "block_size")
        if self.selected_blocks < 0:
            raise UserError("infllm: selected_blocks cannot be negative.")

    @classmethod
    def official(cls) -> "InfLLMConfig":
        """As the code at commit 12b7079: an execution block chooses by its own mean query, and nothing is masked."""
        return cls(selection="official", far_mask="none")


class InfLLM(BlockModel[BlockState]):
    """InfLLM: blocks of earlier text beside a window, found by their most attended keys. Nothing is trained.

    Xiao et al., *InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context Memory* (2024).
    """

    Config = InfLLMConfig
    source = (
        "arXiv:2402.04617; thunlp/InfLLM@12b7079. Deviations by default: an execution block is answered with what the "
        "one before it chooses (no look-ahead), pending tokens are far once they left the window (official: attended "
        "twice), the backbone's own rotary frequencies, rows with padding. Blocks stay on the device, no cache of them."
    )
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {**ABLATIONS, "nothing retrieved": {"selected_blocks": 0}}

    def __init__(self, backbone: Any, config: InfLLMConfig, rng: torch.Generator) -> None:
        super().__init__(backbone, config, rng)
        self.per_head = config.select_per_head

    @classmethod
    def fit(cls, card: BackboneCard, budget: Budget) -> InfLLMConfig:
        """Execution blocks and window of the backbone's own window, and blocks that fill half of it when chosen."""
        del budget
        window = card.window
        size = max(2, min(32, window // 8))
        return InfLLMConfig(
            segment=window,
            execution_block=window,
            local_window=window,
            sink_tokens=max(1, min(128, window // 8)),
            representative_tokens=min(4, size),
            block_size=size,
            selected_blocks=max(1, window // 2 // size),
        )

    def open(self, rows: int, *, seeds: Sequence[int] | None = None) -> BlockState:
        """See `MemoryModel.open`."""
        return BlockState(**self.open_store(rows, seeds))

    @property
    def retrieves(self) -> bool:
        """See `BlockModel.retrieves`."""
        return bool(self.config.selected_blocks)

    def choose(self, state: BlockState, layer: int, scores: Tensor, tokens: Tensor) -> tuple[Tensor, None]:
        """The best blocks; see `BlockModel.choose`."""
        del state, layer, tokens
        best = scores.topk(min(self.config.selected_blocks, scores.shape[-1]), dim=-1).indices
        times = torch.zeros(scores.shape, dtype=torch.long, device=scores.device)
        return times.scatter(-1, best, 1).masked_fill(scores == -torch.inf, 0), None

    def remember(self, state: BlockState, after: BlockState, done: Pass) -> BlockState:
        """Sinks first, then a block of every `block_size` tokens that have left the window."""
        del state, done
        config, store = self.config, after.store
        left = (store.host_read - config.local_window).clamp(min=0)
        sinks = left.clamp(max=config.sink_tokens)
        made = (left - sinks) // config.block_size - store.counts
        sizes = [[config.block_size] * new for new in made.tolist()]
        return replace(after, store=store.cut(sinks, sizes, config.representative_tokens))

    def widths(self, read: int, tokens: int) -> tuple[int, int, int]:
        """See `BlockModel.widths`."""
        config = self.config
        left = max(0, read - config.local_window)
        sinks = min(config.sink_tokens, left)
        blocks = (left - sinks) // config.block_size
        first = sinks + blocks * config.block_size
        pending = min(max(0, read + tokens - config.local_window - first), read - first)
        scored = blocks if blocks > config.selected_blocks > 0 else 0
        chosen = blocks if config.selection == "token" and scored else min(blocks, config.selected_blocks)
        return chosen * config.block_size, pending, scored
