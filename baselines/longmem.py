"""LongMem: a frozen backbone reads, a small side network beside it predicts, with the past in a bank of chunks.

Names: the paper's SideNet is `side`, its cached memory bank a `ChunkBank`, its joint attention `fuse`; its symbols r, k
and c are `reduction`, `retrieved_tokens` and `chunk`, and the backbone's hidden states H[0] to H[L] `Encoded.hidden`.

Unusual here:

- The backbone is never trained, whatever the recipe says, and runs without gradients; its own predictions are not used.
- Side layer i starts as a copy of the backbone's block ``r * i + 1``. Keys and values in the bank are those of a
  backbone block, and the side layer that was copied from it reads them with its own queries.
- Writing needs the backbone's lower blocks only: `absorb` costs a part of a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from memory_bench.axes import Axes
from memory_bench.backbone.layers import CopiedLayers, Layers
from memory_bench.backbone.model import Backbone
from memory_bench.backbone.reuse import Resumed
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.choices import check_choices
from memory_bench.errors import UserError
from memory_bench.protocol import MemoryModel, Readout, Segment, Traits

from .parts.chunk_bank import ChunkBank
from .parts.chunk_reader import ChunkReader
from .parts.knn import mix_by_gate
from .parts.side_network import ParallelLayers, Shape, alibi_mask

SEGMENTS = 64  # segments that the bank holds at most
STORE_SHARE = 10  # a stream's bank takes at most this fraction of the budget's device memory


@dataclass(frozen=True, slots=True)
class LongMemConfig:
    """Hyper-parameters of LongMem."""

    segment: int = 1024  # text tokens per step
    reduction: int = 2  # backbone blocks per side layer (paper: layer reduction factor)
    retrieval_layer: int | None = None  # backbone block whose keys and values are kept; None: at 3/4 of the depth
    memory_size: int = 65536  # tokens the bank holds per row
    chunk: int = 4  # consecutive tokens that are found together, by their mean key
    retrieved_tokens: int = 64  # per token and head; a multiple of chunk
    gate_init: float = 0.0  # of the gate before its sigmoid: 0 weighs memory and local attention alike
    memory_position: Literal["none", "query", "constant"] = "none"  # where queries stand when they read (rotary) memory
    pre_norm_last: bool = False  # last cross residual before the backbone's final norm (official: behind it)
    side_block: Literal["backbone", "parallel"] = "backbone"  # official: parallel, with ALiBi and layer norms
    side_inner: int | None = None  # feed-forward width of parallel side blocks; None: four times the width
    shared_bank: bool = False  # official: one bank for all rows of a batch; memory_size is for all of them
    zero_chunks: bool = False  # official: chunks that are missing are read as zeros, not masked
    coarse_eviction: bool = False  # official: a write that would fill the shared bank first drops twice its own size

    def __post_init__(self) -> None:
        if min(self.segment, self.reduction, self.chunk, self.retrieved_tokens) < 1:
            raise UserError("longmem: segment, reduction, chunk and retrieved_tokens must be at least 1.")
        if self.retrieved_tokens % self.chunk:
            nearest = max(1, round(self.retrieved_tokens / self.chunk)) * self.chunk
            raise UserError(
                f"longmem: retrieved_tokens = {self.retrieved_tokens} is no multiple of chunk = {self.chunk}: "
                f"use {nearest}."
            )
        if self.memory_size < self.chunk:
            raise UserError(f"longmem: memory_size must be at least one chunk, {self.chunk} tokens.")
        if self.side_inner is not None and self.side_inner < 1:
            raise UserError("longmem: side_inner must be at least 1; leave it out for four times the width.")
        if self.coarse_eviction and not self.shared_bank:  # rows would lose chunks because of the rows beside them
            raise UserError("longmem: coarse_eviction is a rule of one bank for all rows: set shared_bank = true, too.")
        check_choices("longmem", self)

    @classmethod
    def official(cls) -> Self:
        """The repository's behaviour at commit b7f3c6b."""
        return cls(side_block="parallel", shared_bank=True, zero_chunks=True, coarse_eviction=True)


@dataclass(frozen=True, slots=True)
class Encoded:
    """What the backbone makes of a segment.

    Attributes:
        hidden: H[0] to H[L], each ``[rows, tokens, hidden_width]``: the embeddings, then every block's output; of the
            tokens from ``resumed.first`` on.
        keys: ``[rows, kv_heads, tokens, head]`` of the retrieval layer, before rotary.
        values: same shape.
        resumed: the pass through the backbone, which goes on through the side network.
    """

    hidden: tuple[Tensor, ...]
    keys: Tensor
    values: Tensor
    resumed: Resumed


@dataclass(frozen=True, slots=True)
class SidePass:
    """What the side network makes of a segment, of the tokens that `Encoded` has.

    Attributes:
        hidden: input of every side layer and output of the last, each ``[rows, tokens, hidden_width]``.
        retrieved: ``[rows, heads, tokens, k / c]`` chunks, best first; None: the bank was empty.
    """

    hidden: tuple[Tensor, ...]
    retrieved: Tensor | None


class LongMem(MemoryModel[ChunkBank]):
    """Wang et al., *Augmenting Language Models with Long-Term Memory* (NeurIPS 2023).

    Attributes: `side`, the side network with the final norm, and `memory_gate` ``[heads]`` are all it adds and trains.

    Raises:
        UserError: layers that the backbone does not have, or a segment longer than its positions.
    """

    Config = LongMemConfig
    version: ClassVar[int] = 1
    frozen_backbone: ClassVar[bool] = True
    source: ClassVar[str] = (
        "arXiv:2306.07174; Victorwz/LongMem@b7f3c6b. Deviations by default: side blocks are the backbone's own; a bank "
        "per row, in its precision, that drops exactly what must go; missing chunks are masked; partial chunks wait."
    )
    axes = Axes(
        unit="chunk kv", capacity="fixed", overflow="drop oldest", write="direct",
        read="by similarity per token", inject="side network", fusion="gated mix", order="lost",
        trained="added parts",
    )  # fmt: skip

    def __init__(self, backbone: Backbone, config: LongMemConfig, rng: torch.Generator) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config
        r = config.reduction
        self.side_layers = backbone.layers // r
        if not self.side_layers:
            raise UserError(f"longmem: reduction = {r} leaves no side layer of {backbone.layers}: use less.")
        chosen = [_copied_block(i, r) for i in range(self.side_layers)]
        named, usual = config.retrieval_layer, chosen[-(-3 * self.side_layers // 4) - 1]
        self.retrieval_layer = usual if named is None else named
        self.reading_layer = self.retrieval_layer // r
        if not 0 <= self.reading_layer < self.side_layers:
            raise UserError(
                f"longmem: retrieval_layer = {self.retrieval_layer} has no side layer that reads it: use "
                f"0 to {self.side_layers * r - 1}."
            )
        if backbone.max_positions is not None and config.segment > backbone.max_positions:
            raise UserError(
                f"longmem: segment = {config.segment} is longer than the backbone's {backbone.max_positions} positions."
            )
        self.traits = Traits(segment=config.segment)
        self.side = self._parallel(rng) if config.side_block == "parallel" else CopiedLayers(backbone, chosen)
        self.memory_gate = nn.Parameter(
            torch.full((backbone.heads,), config.gate_init, device=backbone.device, dtype=backbone.dtype)
        )

    def _parallel(self, rng: torch.Generator) -> Layers:
        width = self.backbone.hidden_width
        if width != self.backbone.heads * self.backbone.head_width:
            raise UserError("longmem: side_block = parallel needs heads as wide as the hidden states together.")
        shape = Shape(self.side_layers, width, self.config.side_inner or 4 * width, self.backbone.heads)
        return ParallelLayers(shape, rng).to(self.backbone.device, self.backbone.dtype)

    @classmethod
    def fit(cls, card: BackboneCard, budget: Budget) -> LongMemConfig:
        """A bank of 64 segments, as the paper's; half as many side layers as blocks, or what fits the budget."""
        segment = min(card.window, card.max_positions or card.window)
        matrices = 2 if card.family in ("gpt2", "opt") else 3
        block = card.width * (2 * card.head_width * (card.heads + card.kv_heads) + matrices * card.mlp_width)
        block += 16 * card.width  # norms and biases
        reduction = min(2, card.layers)
        limit = budget.added_parameters
        while limit is not None and card.layers // reduction * block > limit and 2 * reduction <= card.layers:
            reduction *= 2
        memory = SEGMENTS * segment
        if budget.device_bytes is not None:
            memory = min(memory, budget.device_bytes // STORE_SHARE // (8 * card.kv_heads * card.head_width))
        retrieved = max(4, min(64, segment) // 4 * 4)
        memory = max(retrieved, memory)
        return LongMemConfig(segment=segment, reduction=reduction, memory_size=memory, retrieved_tokens=retrieved)

    def open(self, rows: int, *, seeds: Sequence[int] | None = None) -> ChunkBank:
        """See `MemoryModel.open`; LongMem draws nothing."""
        del seeds
        backbone, config = self.backbone, self.config
        shape = (rows, backbone.kv_heads, 0, backbone.head_width)
        return ChunkBank.empty(
            torch.zeros(shape, device=backbone.device, dtype=backbone.dtype),
            config.chunk,
            config.memory_size // config.chunk,
            shared=config.shared_bank,
            coarse=config.coarse_eviction,
        )

    def step(self, state: ChunkBank, segment: Segment, *, write: bool = True) -> tuple[Readout, ChunkBank]:
        """See `MemoryModel.step`: read what was written by earlier steps, then write this segment."""
        encoded = self.encode(segment, bank=state)
        passed = self.side_pass(state, segment, encoded)
        hidden = self.backbone.project_out(self.side.final_norm(passed.hidden[-1]))
        hidden = encoded.resumed.finish(hidden)
        after = state.write(encoded.keys, encoded.values, segment.mask) if write else state
        return Readout(hidden, self.backbone.head), after

    def absorb(self, state: ChunkBank, segment: Segment) -> ChunkBank:
        """See `MemoryModel.absorb`; the backbone runs as far as the retrieval layer."""
        encoded = self.encode(segment, upto=self.retrieval_layer)
        return state.write(encoded.keys, encoded.values, segment.mask)

    @torch.no_grad()
    def encode(self, segment: Segment, upto: int | None = None, bank: ChunkBank | None = None) -> Encoded:
        """The backbone over a segment alone; with `upto`, only as far as the keys and values of that layer.

        `bank` is what the side network will read: a step whose beginning was read with the same one is resumed.
        """
        backbone, mask = self.backbone, segment.mask
        where, embeds = backbone.positions(mask), backbone.embed(segment.ids)
        resumed = backbone.resume(embeds, (where, mask), () if bank is None else (bank,))
        first = resumed.first
        turn, turn_keys = backbone.rotation(where[:, first:], queries=True), backbone.rotation(where)
        visible = backbone.visible(mask, first=first, positions=where)
        x = backbone.begin(embeds[:, first:], where[:, first:])
        hidden, kept = [x], (x, x)
        for layer in range(backbone.layers):
            q, k, v = backbone.project(layer, backbone.norm_input(layer, x), mask[:, first:])
            k, v = resumed.join(k, v)
            if layer == self.retrieval_layer:
                kept = (k, v)
            if layer == upto:
                break
            q, k = backbone.rotate(q, turn[layer]), backbone.rotate(k, turn_keys[layer])
            attended = backbone.attend(q, k, v, visible[layer])
            x = backbone.close(layer, x, attended)
            hidden.append(x)
        if upto is None and not self.config.pre_norm_last:
            hidden[-1] = backbone.final_norm(x)
        return Encoded(tuple(hidden), *kept, resumed)

    def side_pass(self, bank: ChunkBank, segment: Segment, encoded: Encoded) -> SidePass:
        """The side network over the same embeddings, every layer given what the backbone's blocks beside it added."""
        side, backbone, r = self.side, self.backbone, self.config.reduction
        where, resumed = backbone.positions(segment.mask), encoded.resumed
        first = resumed.first
        if isinstance(side, CopiedLayers):  # each sees and turns as the block that it was copied from
            turns, turns_keys = backbone.rotation(where[:, first:], queries=True), backbone.rotation(where)
            sights = backbone.visible(segment.mask, first=first, positions=where)
            like = [(turns[i], turns_keys[i], sights[i]) for i in side.chosen]
        else:
            alibi = alibi_mask(segment.mask, where, side.heads, backbone.dtype)[:, :, first:]
            like = [(None, None, alibi)] * self.side_layers
        x, retrieved = encoded.hidden[0], None
        hidden = [x]
        for i in range(self.side_layers):
            q, k, v = side.project(i, side.norm_input(i, x), segment.mask[:, first:])
            k, v = resumed.join(k, v)
            turn, turn_keys, visible = like[i]
            attended = side.attend(side.rotate(q, turn), side.rotate(k, turn_keys), v, visible)
            if i == self.reading_layer and bank.count:
                reader = self.reader(bank)
                retrieved = reader.retrieve(q)
                attended = self.fuse(reader, attended, q, retrieved, where[:, first:])
            end = r * (i + 1) if i + 1 < self.side_layers else backbone.layers
            x = side.close(i, x, attended) + (encoded.hidden[end] - encoded.hidden[r * i])
            hidden.append(x)
        return SidePass(tuple(hidden), retrieved)

    def reader(self, bank: ChunkBank) -> ChunkReader:
        """What reads a bank that is not empty."""
        wanted = self.config.retrieved_tokens // self.config.chunk
        return ChunkReader.of(bank, wanted, zero_chunks=self.config.zero_chunks)

    def fuse(self, reader: ChunkReader, local: Tensor, q: Tensor, retrieved: Tensor, where: Tensor) -> Tensor:
        """Local attention ``[rows, tokens, heads * head]`` mixed with attention to the retrieved chunks.

        `where` ``[rows, tokens]`` are the queries' positions in the segment.

        Rows that remember nothing keep their local attention as it is.
        """
        remembered = reader.attend(self._turned(q, where) * q.shape[-1] ** -0.5, retrieved)
        near = local.unflatten(2, (q.shape[1], -1)).transpose(1, 2)  # [rows, heads, tokens, head]
        return mix_by_gate(near, remembered, self.memory_gate, reader.known).transpose(1, 2).flatten(2)

    def _turned(self, q: Tensor, where: Tensor) -> Tensor:
        """Queries turned for unrotated memory keys: not at all, to their own positions, or to the segment's end."""
        if self.config.memory_position == "none" or not isinstance(self.side, CopiedLayers):
            return q
        if self.config.memory_position == "constant":
            where = torch.full_like(where, self.config.segment)
        turn = self.backbone.rotation(where, queries=True)[self.side.chosen[self.reading_layer]]
        return self.backbone.rotate(q, turn)

    def flops(self, tokens: int, remembered: int) -> int:
        """Backbone without its head, side network, search and attention to memory, head. See `MemoryModel.flops`."""
        config, heads = self.config, self.backbone.heads * self.backbone.head_width
        passes = self.backbone.flops(tokens, tokens)
        passes += sum(self.side.layer_flops(i, tokens, tokens) for i in range(self.side_layers))
        chunks = min(remembered, config.memory_size) // config.chunk
        read = config.retrieved_tokens if config.zero_chunks else min(config.retrieved_tokens, chunks * config.chunk)
        return passes + (2 * chunks + 4 * read) * tokens * heads * bool(chunks)

    def detached_flops(self, tokens: int, remembered: int) -> int:
        """The frozen backbone below its head. See `MemoryModel.detached_flops`."""
        del remembered
        return self.backbone.flops(tokens, tokens, predicted=0)

    def absorb_flops(self, tokens: int, remembered: int) -> int:
        """The backbone's blocks below the retrieval layer and that layer's projections."""
        del remembered
        backbone = self.backbone
        below = sum(backbone.layer_flops(i, tokens, tokens) for i in range(self.retrieval_layer))
        inside = backbone.width if backbone.width != backbone.hidden_width else 0  # OPT may be projected in
        projected = backbone.project_flops(self.retrieval_layer, tokens)
        return below + projected + 2 * tokens * backbone.hidden_width * inside


def _copied_block(side_layer: int, reduction: int) -> int:
    """The backbone block that a side layer is copied from."""
    return reduction * side_layer + min(1, reduction - 1)
