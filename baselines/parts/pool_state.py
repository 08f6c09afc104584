"""The pool of a pool model as data: its options, its state, and the arithmetic of dropping and filling.

What is dropped depends on a row's seed, the number of its writes and the layer, and on nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from memory_bench.backbone.lora import TARGETS
from memory_bench.errors import UserError
from memory_bench.state import State

from .drawing import row_generator


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """Hyper-parameters of a pool model (K, B and N of the papers: `tokens_per_block`, `blocks`, `pool_tokens`)."""

    segment: int = 512  # text tokens read and written per step
    tokens_per_block: int = 16  # memory tokens a write adds in every layer
    blocks: int = 20  # the pool holds this many blocks per layer
    drop_per_layer: bool = True  # every layer drops its own random rows, or all layers the same ones
    bos_embedding: bool = True  # a trained vector per layer in front of the memory, in place of a bos token
    lora_rank: int = 0  # 0: no adapters
    lora_alpha: float = 32.0
    lora_targets: Sequence[str] = TARGETS
    add_read_lora: bool = False  # a second adapter for reading; without it the write adapter is always on
    pool_initialized: bool = False  # False: plain backbone until the first write, whose block then fills the pool
    learned_start: bool = False  # extension: the pool a stream starts with is trained (implies an initialised pool)
    leak_first_offset: bool = False  # official first fill: blocks also carry the next layer's offset (in-place bug)
    checkpoint: str = ""  # folder, file or hub id of released weights, which are loaded instead of training
    rope_frequencies: Literal["float32", "bfloat16"] = "float32"  # of a checkpoint: M+'s are bfloat16 where it is

    def __post_init__(self) -> None:
        for name in ("segment", "tokens_per_block", "blocks"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)} is too small; it must be at least 1.")
        if self.rope_frequencies != "float32" and not self.checkpoint:
            raise UserError("rope_frequencies is about released weights: it needs a checkpoint.")

    @property
    def pool_tokens(self) -> int:
        """Memory tokens per layer."""
        return self.tokens_per_block * self.blocks


@dataclass(frozen=True, slots=True)
class PoolState(State):
    """The pools of some streams.

    Attributes:
        pool: ``[rows, layers, pool_tokens, width]``, old to new; the last block is the newest.
        host_filled: ``[rows]`` bool; False: the pool is noise and the model runs as the plain backbone.
        host_writes: ``[rows]`` int64, segments written so far.
        host_seeds: ``[rows]`` int64.
    """

    pool: Tensor
    host_filled: Tensor
    host_writes: Tensor
    host_seeds: Tensor


def merge_pool(pool: Tensor, block: Tensor, permutations: Tensor) -> Tensor:
    """The pool after as many rows as `block` has were dropped at random, with `block` at its end.

    Args:
        pool: ``[rows, layers, N, width]``.
        block: ``[rows, layers, n, width]``.
        permutations: of 0 .. N - 1, ``[rows or 1, layers or 1, N]``; the first N - n entries stay, in pool order.
    """
    kept = split_permutation(permutations, block.shape[2])[0]
    return torch.cat([take_rows(pool, kept), block[:, :, -pool.shape[2] :]], dim=2)


def split_permutation(permutations: Tensor, new: int) -> tuple[Tensor, Tensor]:
    """Sorted indices of the rows that stay and of the `new` rows that are dropped."""
    stay = max(0, permutations.shape[-1] - new)
    return permutations[..., :stay].sort(dim=-1).values, permutations[..., stay:].sort(dim=-1).values


def take_rows(pool: Tensor, index: Tensor) -> Tensor:
    """``pool[r, l, index[r, l]]``: ``[rows, layers, n, width]``; `index` may have one row or one layer for all."""
    rows, layers, size, width = pool.shape
    starts = torch.arange(0, rows * layers * size, size).view(rows, layers, 1)
    chosen = (starts + index.cpu()).to(pool.device)  # whole rows of the flattened pool, which is faster than gather
    return pool.reshape(-1, width).index_select(0, chosen.flatten()).view(rows, layers, -1, width)


def fill_pool(block: Tensor, size: int) -> Tensor:
    """Whole copies of `block` along axis 2, then its last rows, until there are `size`."""
    new = block.shape[2]
    if new >= size:
        return block[:, :, -size:]
    copies = [block] * (size // new)
    return torch.cat([*copies, block[:, :, new - size % new :]], dim=2)


def draw_permutations(state: PoolState, layers: int) -> Tensor:
    """Random permutations ``[rows, layers, pool_tokens]`` for the state's next write (on the host)."""
    known: dict[tuple[int, int], Tensor] = {}
    pairs = list(zip(state.host_seeds.tolist(), state.host_writes.tolist(), strict=True))
    for seed, writes in pairs:
        if (seed, writes) not in known:
            numbers = torch.rand(layers, state.pool.shape[2], generator=row_generator(seed, writes))
            known[seed, writes] = numbers.argsort(dim=-1, stable=True)
    return torch.stack([known[pair] for pair in pairs])
