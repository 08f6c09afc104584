"""Recurrent Memory Transformer: a few memory vectors before and after every segment, handed on from one to the next.

Unusual here:

- The same vectors are what a segment reads and what it writes over: there is no write embedding of its own. The written
  memory is the final hidden state, used as an input embedding in the next segment as it is.
- A look (``write=False``) leaves the trailing memory out: nothing before it can see it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memory_bench.axes import Axes
from memory_bench.backbone.model import Backbone
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.errors import UserError
from memory_bench.protocol import MemoryModel, Readout, Segment, State, Traits
from memory_bench.weights.released import Release, Shape
from memory_bench.weights.transfer import Layout, Place, backbone_places, embedding_width


@dataclass(frozen=True, slots=True)
class RMTConfig:
    """Hyper-parameters of RMT."""

    segment: int = 512  # text tokens per step
    memory_tokens: int = 10  # vectors handed on; 0: segments are independent
    normalise_memory: bool = False  # scale each handed-on vector to a root mean square of 1 (not in the paper)
    count_padding: bool = False  # official: padding takes positions, and a segment of padding alone is remembered
    legacy_write_slot: bool = False  # official: generated text follows [memory; prompt; memory]
    checkpoint: str = ""  # folder, file or hub id of released weights, which are loaded instead of training

    def __post_init__(self) -> None:
        if self.segment < 1 or self.memory_tokens < 0:
            raise UserError("rmt: segment must be at least 1 and memory_tokens at least 0.")

    @classmethod
    def official(cls) -> "RMTConfig":
        """The repository's behaviour at commit 9d0ebe1."""
        return cls(count_padding=True, legacy_write_slot=True)


@dataclass(frozen=True, slots=True)
class RMTState(State):
    """The memory ``[rows, memory_tokens, width]``."""

    memory: Tensor


class RMTLayout(Layout):
    """A state dict of the official ``RecurrentWrapper``: ``memory_cell.memory`` beside ``memory_cell.model``."""

    def options(self, release: Release, dtype: str) -> dict[str, Any]:
        """The number of memory tokens."""
        shape = release.shapes.get("memory_cell.memory")
        return {} if shape is None else {"memory_tokens": shape[0]}

    def places(self, config: RMTConfig, backbone: Mapping[str, Shape]) -> dict[str, Place]:
        """See the class."""
        places = backbone_places(backbone, "memory_cell.model.")
        width = embedding_width(backbone)
        return places | {"memory_cell.memory": Place("initial_memory", (config.memory_tokens, width))}


class RMT(MemoryModel[RMTState]):
    """Bulatov et al., *Recurrent Memory Transformer* (NeurIPS 2022), decoder-only.

    Attributes: ``initial_memory`` ``[memory_tokens, width]``, all the parameters it adds.

    Raises:
        UserError: the backbone has fewer positions than a segment needs.
    """

    Config = RMTConfig
    released = RMTLayout()
    version: ClassVar[int] = 1
    source: ClassVar[str] = (
        "arXiv:2207.06881; booydar/recurrent-memory-transformer@9d0ebe1. Deviations by default: padding leaves no "
        "trace, no trailing memory in a prompt that is continued."
    )
    axes = Axes(
        unit="segment vectors", capacity="fixed", overflow="overwrite", write="extra tokens",
        written_with_gradient=True, read="all", inject="input", fusion="prefix", order="lost",
        trained="all",
    )  # fmt: skip

    def __init__(self, backbone: Backbone, config: RMTConfig, rng: torch.Generator) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config
        needed = config.segment + 2 * config.memory_tokens
        if backbone.max_positions is not None and needed > backbone.max_positions:
            raise UserError(
                f"rmt needs {needed} positions for segment = {config.segment}, but the backbone has "
                f"{backbone.max_positions}: use segment = {config.segment - needed + backbone.max_positions} or less."
            )
        self.traits = Traits(segment=config.segment)
        values = torch.randn(config.memory_tokens, backbone.width, generator=rng) * backbone.embedding_scale()
        self.initial_memory = nn.Parameter(values.to(backbone.device, backbone.dtype))

    @classmethod
    def fit(cls, card: BackboneCard, budget: Budget) -> RMTConfig:
        """Ten memory tokens; a small backbone that is trained from scratch gets four, normalised."""
        small = card.small
        memory = 4 if small else 10
        if budget.added_parameters is not None:
            memory = min(memory, budget.added_parameters // card.width)
        segment = card.window
        if card.max_positions is not None:
            segment = max(1, min(segment, card.max_positions - 2 * memory))
        return RMTConfig(segment=segment, memory_tokens=memory, normalise_memory=small)

    def open(self, rows: int, *, seeds: Sequence[int] | None = None) -> RMTState:
        """See `MemoryModel.open`; RMT draws nothing."""
        del seeds
        return RMTState(self.initial_memory.expand(rows, -1, -1))

    def step(self, state: RMTState, segment: Segment, *, write: bool = True) -> tuple[Readout, RMTState]:
        """Predict a segment between two copies of the memory. See `MemoryModel.step`."""
        legacy = self.config.legacy_write_slot and not write
        if legacy and segment.given is not None and bool(segment.given.any()):
            return Readout(self._prompt_pass(state.memory, segment, segment.given), self.backbone.head), state
        hidden, written = self.main_pass(state.memory, segment, write=write)
        after = state if written is None else self.remember(state, segment, written)
        return Readout(hidden, self.backbone.head), after

    def main_pass(self, memory: Tensor, segment: Segment, *, write: bool) -> tuple[Tensor, Tensor | None]:
        """The backbone over [memory; text; memory].

        Returns:
            Final hidden states of the text ``[rows, tokens, width]``; those of the trailing memory
            ``[rows, memory_tokens, width]``, or None without `write`.
        """
        m, tokens = memory.shape[1], segment.ids.shape[1]
        trailing = memory if write else memory[:, :0]
        embeds = torch.cat([memory, self.backbone.embed(segment.ids), trailing], dim=1)
        around = (m, trailing.shape[1])
        seen, text = F.pad(segment.mask, around, value=True), F.pad(segment.mask, around, value=False)
        hidden = self._run(embeds, seen, text)
        return hidden[:, m : m + tokens], hidden[:, m + tokens :] if write else None

    def remember(self, state: RMTState, segment: Segment, written: Tensor) -> RMTState:
        """The state after a segment whose pass wrote `written`; a row without real tokens keeps its state."""
        if self.config.normalise_memory:
            written = F.rms_norm(written, written.shape[-1:])
        if self.config.count_padding:
            return RMTState(written)
        return RMTState(torch.where(segment.mask.any(dim=1)[:, None, None], written, state.memory))

    def _prompt_pass(self, memory: Tensor, segment: Segment, given: Tensor) -> Tensor:
        """Hidden states ``[rows, tokens, width]`` of [memory; prompt; memory; generated], as the official ``generate``.

        The prompt ends with the last given column; what follows it is predicted by the last memory vector.
        """
        m, prompt = memory.shape[1], int(given.any(dim=0).long().cumsum(dim=0).argmax()) + 1
        text = self.backbone.embed(segment.ids)
        embeds = torch.cat([memory, text[:, :prompt], memory, text[:, prompt:]], dim=1)
        around = [F.pad(segment.mask[:, :prompt], (m, m), value=v) for v in (True, False)]
        seen, is_text = (torch.cat([part, segment.mask[:, prompt:]], dim=1) for part in around)
        hidden = self._run(embeds, seen, is_text)
        return torch.cat([hidden[:, m : m + prompt - 1], hidden[:, 2 * m + prompt - 1 :]], dim=1)

    def _run(self, embeds: Tensor, seen: Tensor, text: Tensor) -> Tensor:
        positions = self.backbone.positions(seen, count_padding=self.config.count_padding)
        return self.backbone.run(embeds, seen, positions=positions, text=text)

    def flops(self, tokens: int, remembered: int) -> int:
        """One pass over the text and both copies of the memory. See `MemoryModel.flops`."""
        del remembered
        inputs = tokens + 2 * self.config.memory_tokens
        return self.backbone.flops(inputs, inputs, predicted=tokens)
