"""Associative Recurrent Memory Transformer: a matrix of associations in every layer, read everywhere, written rarely.

Unusual here:

- Memory tokens stand after the text and are the same learned vectors in every segment; nothing but the associations
  goes from one segment to the next. Text never sees memory tokens, so a look (``write=False``) leaves them out.
- Associations are float32 at least, whatever the backbone's type: reading divides by sums that can be tiny.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memory_bench.axes import Axes
from memory_bench.backbone.model import Backbone
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.errors import UserError
from memory_bench.protocol import MemoryModel, Readout, Segment, State, Traits

EPSILON = 1e-5  # of every division
NARROWEST = 16  # `fit` goes no lower: with fewer features, the sums that reads divide by are too often near zero


@dataclass(frozen=True, slots=True)
class ARMTConfig:
    """Hyper-parameters of ARMT."""

    segment: int = 512  # text tokens per step
    memory_tokens: int = 10  # positions after the text from which every layer writes; 0: nothing is remembered
    associative_size: int = 64  # width of keys and queries before the feature map; paper: d_mem
    nu: int = 3  # products per feature; keys have 2 * nu * associative_size features
    correction: bool = True  # what the normaliser knows already is not added again; paper: gamma
    extended_positions: bool | None = False  # GPT-2: memory tokens have learned positions of their own; None: if GPT-2
    count_padding: bool = False  # official: padding takes positions, and a segment of padding alone is remembered

    def __post_init__(self) -> None:
        if self.segment < 1 or self.memory_tokens < 0:
            raise UserError("armt: segment must be at least 1 and memory_tokens at least 0.")
        if self.associative_size < 1 or not 1 <= self.nu <= 2 * self.associative_size:
            raise UserError("armt: associative_size must be at least 1, and nu between 1 and twice associative_size.")

    @classmethod
    def official(cls) -> "ARMTConfig":
        """The repository's behaviour at commit aa145de."""
        return cls(extended_positions=None, count_padding=True)


@dataclass(frozen=True, slots=True)
class ARMTState(State):
    """The associations of every layer.

    Attributes:
        matrices: per layer ``[rows, features, width]``; paper: A.
        normalisers: per layer ``[rows, features]``; paper: z.
        written: ``[rows]`` bool, something has been written.
    """

    matrices: tuple[Tensor, ...]
    normalisers: tuple[Tensor, ...]
    written: Tensor


def dpfp(x: Tensor, nu: int) -> Tensor:
    """Non-negative features ``[..., 2 * nu * size]`` of `x` ``[..., size]`` (deterministic parameter-free projection).

    Products of ``u = [relu(x), relu(-x)]`` with u rolled by 1 … nu. Schlag et al., arXiv:2102.11174.
    """
    u = torch.cat([x, -x], dim=-1).relu()
    size = u.shape[-1]
    wrapped = torch.cat([u[..., size - nu :], u], dim=-1)  # rolling is slicing here
    return torch.cat([u * wrapped[..., nu - r : nu - r + size] for r in range(1, nu + 1)], dim=-1)


class Association(nn.Module):
    """One layer's memory: what it asks, what it keeps under which key, and how strongly."""

    def __init__(self, backbone: Backbone, config: ARMTConfig, rng: torch.Generator) -> None:
        super().__init__()
        self.nu, self.correction = config.nu, config.correction
        width, size = backbone.width, config.associative_size
        self.query = _linear(backbone, size, rng)
        self.key = _linear(backbone, size, rng)
        self.value = nn.Linear(width, width, bias=False, device="meta")
        # Training starts from the plain backbone: nothing is stored.
        self.value.weight = nn.Parameter(torch.zeros(width, width, device=backbone.device, dtype=backbone.dtype))
        self.gate = _linear(backbone, 1, rng, bias=True)

    def read(self, hidden: Tensor, matrix: Tensor, normaliser: Tensor) -> Tensor:
        """`hidden` ``[rows, tokens, width]`` with what is associated to it added; nothing where nothing was written."""
        features = dpfp(self.query(hidden).to(matrix.dtype), self.nu)  # [rows, tokens, features]
        weight = features @ normaliser[..., None] + EPSILON
        return torch.addcdiv(hidden.to(matrix.dtype), features @ matrix, weight).to(hidden.dtype)

    def write(
        self, outputs: Tensor, state: tuple[Tensor, Tensor], first: Tensor, real: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Matrix and normaliser after the delta rule; no gradient goes through the correction.

        All memory tokens are written in parallel over the same old associations.

        Args:
            outputs: ``[rows, memory_tokens, width]``, of the layer at the memory tokens.
            state: matrix and normaliser before.
            first: ``[rows]`` bool, rows that have not been written: their normaliser takes every key as it is.
            real: ``[rows]`` bool, rows that are written at all.
        """
        matrix, normaliser = state
        keys = dpfp(self.key(outputs).to(matrix.dtype), self.nu)  # [rows, memory_tokens, features]
        known = keys @ normaliser[..., None] + EPSILON  # [rows, memory_tokens, 1]
        stored = keys @ matrix / known  # what is found under these keys now
        new = real[:, None, None]
        if self.correction:
            share = (1 - known / (keys.square().sum(dim=-1, keepdim=True) + EPSILON)).clamp(0, 1).detach()
            new = share.masked_fill(first[:, None, None], 1.0) * new
        strength = self.gate(outputs).sigmoid().to(matrix.dtype) * real[:, None, None]  # [rows, memory_tokens, 1]
        change = strength * (self.value(outputs).to(matrix.dtype) - stored)
        return torch.baddbmm(matrix, keys.transpose(1, 2), change), normaliser + (new * keys).sum(dim=1)


class ARMT(MemoryModel[ARMTState]):
    """Rodkin et al., *Associative Recurrent Memory Transformer* (2024).

    Attributes (paper symbols): ``memory_tokens`` ``[memory_tokens, width]``; per layer ``query`` W_Q and ``key`` W_K
    ``[associative_size, width]``, ``value`` W_V ``[width, width]``, ``gate`` W_beta with bias; with extended positions
    ``position_embeddings`` ``[memory_tokens, width]``.

    Raises:
        UserError: the embeddings are narrower than the layers, extended positions without GPT-2, or the backbone has
            fewer positions than a segment needs.
    """

    Config = ARMTConfig
    version: ClassVar[int] = 1
    source: ClassVar[str] = (
        "arXiv:2407.04841; RodkinIvan/associative-recurrent-memory-transformer@aa145de. Deviations by default: padding "
        "leaves no trace, memory tokens take the positions after the text with GPT-2, too. Left out: the optional "
        "sliding window (keys and values of the previous segment)."
    )
    axes = Axes(
        unit="matrix", capacity="fixed", overflow="merge", write="extra tokens",
        written_with_gradient=True, read="by similarity per token", inject="all layers",
        fusion="residual add", order="lost", trained="all",
    )  # fmt: skip

    def __init__(self, backbone: Backbone, config: ARMTConfig, rng: torch.Generator) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config
        if backbone.width != backbone.hidden_width:
            raise UserError(
                f"armt adds what it reads to the layers' inputs, so it needs embeddings as wide as the layers; this "
                f"{backbone.family} backbone has {backbone.width} and {backbone.hidden_width}. Use another backbone."
            )
        if config.extended_positions and backbone.family != "gpt2":
            raise UserError(
                f"armt: extended_positions is for GPT-2 only, not for '{backbone.family}'; leave it at false."
            )
        self.extended = backbone.family == "gpt2" and config.extended_positions is not False
        needed = config.segment + (0 if self.extended else config.memory_tokens)
        if backbone.max_positions is not None and needed > backbone.max_positions:
            raise UserError(
                f"armt needs {needed} positions for segment = {config.segment}, but the backbone has "
                f"{backbone.max_positions}: use segment = {config.segment - needed + backbone.max_positions} or less."
            )
        self.traits = Traits(segment=config.segment)
        shape = (config.memory_tokens, backbone.width)
        self.memory_tokens = _parameter(backbone, torch.randn(shape, generator=rng) * backbone.embedding_scale())
        if self.extended:
            self.position_embeddings = _parameter(backbone, torch.randn(shape, generator=rng))
        self.layers = nn.ModuleList(Association(backbone, config, rng) for _ in range(backbone.layers))

    @classmethod
    def fit(cls, card: BackboneCard, budget: Budget) -> ARMTConfig:
        """Ten memory tokens and keys of 64 as in the official scripts; a small backbone gets four, and keys of 32.

        A limit on added parameters makes keys narrower, down to 16; the square value projections stay.
        """
        small = card.small
        memory, size = (4, 32) if small else (10, 64)
        if budget.added_parameters is not None:
            fixed = memory * card.width + card.layers * (card.width**2 + card.width + 1)
            affordable = (budget.added_parameters - fixed) // (2 * card.layers * card.width)
            size = max(NARROWEST, min(size, affordable))
        segment = card.window
        if card.max_positions is not None:
            segment = max(1, min(segment, card.max_positions - memory))
        return ARMTConfig(segment=segment, memory_tokens=memory, associative_size=size)

    @property
    def features(self) -> int:
        """Features of a key."""
        return 2 * self.config.nu * self.config.associative_size

    def open(self, rows: int, *, seeds: Sequence[int] | None = None) -> ARMTState:
        """See `MemoryModel.open`; ARMT draws nothing."""
        del seeds
        backbone = self.backbone
        like: dict[str, Any] = {
            "device": backbone.device,
            "dtype": torch.promote_types(backbone.dtype, torch.float32),
        }
        matrix = torch.zeros(rows, self.features, backbone.width, **like)
        normaliser = torch.zeros(rows, self.features, **like)
        nothing = torch.zeros(rows, dtype=torch.bool, device=backbone.device)
        return ARMTState((matrix,) * backbone.layers, (normaliser,) * backbone.layers, nothing)

    def step(self, state: ARMTState, segment: Segment, *, write: bool = True) -> tuple[Readout, ARMTState]:
        """One pass over [text; memory tokens], reading before every layer and writing after it."""
        backbone, tokens = self.backbone, segment.ids.shape[1]
        extra = self.config.memory_tokens if write else 0
        seen, text = (F.pad(segment.mask, (0, extra), value=v) for v in (True, False))
        real = torch.ones_like(state.written) if self.config.count_padding else segment.mask.any(dim=1)
        reads = bool(state.written.any())  # before that every read is zero
        where = backbone.positions(seen, count_padding=self.config.count_padding)
        entered = self._enter(backbone.embed(segment.ids), where, extra)  # [rows, tokens + extra, width]
        resumed = backbone.resume(entered, (where, seen, text), (state,), limit=tokens)
        first = resumed.first
        turn, turn_keys = backbone.rotation(where[:, first:], queries=True), backbone.rotation(where)
        visible = backbone.visible(seen, first=first, positions=where)
        hidden = entered[:, first:]
        written: list[tuple[Tensor, Tensor]] = []
        for layer, memory in enumerate(cast(Iterable[Association], self.layers)):
            own = state.matrices[layer], state.normalisers[layer]
            hidden = memory.read(hidden, *own) if reads else hidden
            q, k, v = backbone.project(layer, backbone.norm_input(layer, hidden), text[:, first:])
            k, v = resumed.join(k, v)
            q, k = backbone.rotate(q, turn[layer]), backbone.rotate(k, turn_keys[layer])
            attended = backbone.attend(q, k, v, visible[layer])
            hidden = backbone.close(layer, hidden, attended)
            if extra:
                written.append(memory.write(hidden[:, tokens - first :], own, ~state.written, real))
        hidden = resumed.finish(backbone.end(hidden))
        if written:
            matrices, normalisers = zip(*written, strict=True)
            state = ARMTState(matrices, normalisers, state.written | real)
        return Readout(hidden[:, :tokens], backbone.head), state

    def _enter(self, text: Tensor, where: Tensor, extra: int) -> Tensor:
        """Input of the first layer: `text` ``[rows, tokens, width]`` and so many memory tokens, with positions."""
        memory = self.memory_tokens[:extra].expand(len(text), -1, -1)
        if not self.extended:
            return self.backbone.begin(torch.cat([text, memory], dim=1), where)
        placed = self.backbone.begin(text, where[:, : text.shape[1]])
        return torch.cat([placed, memory + self.position_embeddings[:extra]], dim=1)

    def flops(self, tokens: int, remembered: int) -> int:
        """One pass over text and memory tokens, its reads (once there is something to read) and its writes."""
        m, size, width = self.config.memory_tokens, self.config.associative_size, self.backbone.width
        inputs = tokens + m
        read = inputs * (size * width + self.features * (width + 1)) if remembered and m else 0
        write = m * (size * width + width * (width + 1) + self.features * (2 * width + 1))
        total = self.backbone.flops(inputs, inputs, predicted=tokens)
        return total + 2 * self.backbone.layers * (read + write)


def _parameter(backbone: Backbone, values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(backbone.device, backbone.dtype))


def _linear(backbone: Backbone, size: int, rng: torch.Generator, *, bias: bool = False) -> nn.Linear:
    """A map of hidden states to `size` with torch's default initial values, drawn with `rng`."""
    width, bound = backbone.width, 1 / math.sqrt(backbone.width)
    linear = nn.Linear(width, size, bias=bias, device="meta")
    linear.weight = _parameter(backbone, (2 * torch.rand(size, width, generator=rng) - 1) * bound)
    if bias:
        linear.bias = _parameter(backbone, (2 * torch.rand(size, generator=rng) - 1) * bound)
    return linear
