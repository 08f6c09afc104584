"""AutoCompressors: every segment ends with summary tokens, whose hidden states stand before all later segments.

Unusual here:

- The summaries of all segments stay, so that the cost grows with the square of the text, unless `max_summaries` is set.
- Summary vectors are final hidden states, used as input embeddings as they are. Learned positions (OPT, GPT-2) count
  the text of a segment alone, and summaries have none; rotary ones count summaries and text.
- A look (``write=False``) leaves the summary tokens out: nothing before them can see them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memory_bench.axes import Axes
from memory_bench.backbone.model import NOWHERE, Backbone
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.choices import check_choices
from memory_bench.errors import UserError
from memory_bench.protocol import MemoryModel, Readout, Segment, State, Traits
from memory_bench.weights.released import Release, Shape
from memory_bench.weights.transfer import Layout, Place, backbone_places, embedding_width

RATIO = 30  # text tokens per summary token, about that of the paper's training: 1536 to 50
LONGEST = 20  # segments whose summaries stay at most, as many as the paper's longest training compressed


@dataclass(frozen=True, slots=True)
class AutoCompressorConfig:
    """Hyper-parameters of AutoCompressors."""

    segment: int = 512  # text tokens per step
    summary_tokens: int = 50  # vectors that a segment writes; paper: kappa; 0: segments are independent
    accumulate: bool = True  # the summaries of all segments stay; False: the last segment's alone, as in RMT
    max_summaries: int | None = None  # vectors that are kept at most, the oldest are dropped (not official)
    # random: as the embedding table is spread; eos: its end-of-text row, which the paper says; overwritten: what the
    # official code leaves of that, its initialiser's normal distribution
    summary_init: Literal["random", "eos", "overwritten"] = "random"
    write_padding: bool = False  # official: a segment of padding alone is summarised, too
    read_padding: bool = False  # official Llama class with its default use_cache: padding is read as if it were text
    checkpoint: str = ""  # folder, file or hub id of released weights, which are loaded instead of training

    def __post_init__(self) -> None:
        if self.segment < 1 or self.summary_tokens < 0:
            raise UserError("autocompressor: segment must be at least 1 and summary_tokens at least 0.")
        if self.max_summaries is not None and self.max_summaries < self.summary_tokens:
            raise UserError(
                f"autocompressor: max_summaries = {self.max_summaries} has no room for the {self.summary_tokens} "
                f"summary tokens of one segment: use {self.summary_tokens} or more, or none for all."
            )
        check_choices("autocompressor", self)

    @classmethod
    def official(cls) -> "AutoCompressorConfig":
        """The repository's behaviour at commit 80352a4 where it trains and evaluates (without a key-value cache)."""
        return cls(summary_init="overwritten", write_padding=True)


@dataclass(frozen=True, slots=True)
class AutoCompressorState(State):
    """The summary vectors, oldest first.

    Attributes:
        summaries: ``[rows, slots, width]``.
        mask: ``[rows, slots]`` bool; a row with fewer than others has its empty slots in front.
    """

    summaries: Tensor
    mask: Tensor


class AutoCompressorLayout(Layout):
    """A state dict of the official classes: the backbone's own names beside ``embed_summary``."""

    def options(self, release: Release, dtype: str) -> dict[str, Any]:
        """The number of summary tokens."""
        shape = release.shapes.get("embed_summary.weight")
        return {} if shape is None else {"summary_tokens": shape[0]}

    def places(self, config: AutoCompressorConfig, backbone: Mapping[str, Shape]) -> dict[str, Place]:
        """See the class."""
        shape = (config.summary_tokens, embedding_width(backbone))
        return backbone_places(backbone) | {"embed_summary.weight": Place("summary_embeddings", shape)}


class AutoCompressor(MemoryModel[AutoCompressorState]):
    """Chevalier et al., *Adapting Language Models to Compress Contexts* (EMNLP 2023).

    Attributes: ``summary_embeddings`` ``[summary_tokens, width]``, all the parameters it adds.

    Raises:
        UserError: a segment does not fit the backbone's positions, or its summaries shall begin with an embedding that
            the backbone does not name.
    """

    Config = AutoCompressorConfig
    released = AutoCompressorLayout()
    version: ClassVar[int] = 1
    source: ClassVar[str] = (
        "arXiv:2305.14788; princeton-nlp/AutoCompressors@80352a4. Deviations by default: summary embeddings begin as "
        "spread as the embedding table, padding leaves no trace, grouped queries work, generated text is folded on "
        "every backbone; sized to a backbone, it keeps the summaries of 20 segments (max_summaries). Its training is "
        "the recipe `autocompressor`."
    )
    axes = Axes(
        unit="segment vectors", capacity="fixed", overflow="drop oldest", write="extra tokens",
        written_with_gradient=True, read="all", inject="input", fusion="prefix", order="kept", trained="all",
    )  # fmt: skip

    def __init__(self, backbone: Backbone, config: AutoCompressorConfig, rng: torch.Generator) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config
        if backbone.max_positions is not None and config.segment > backbone.max_positions:
            raise UserError(
                f"autocompressor needs {config.segment} positions for its segments, but the backbone has "
                f"{backbone.max_positions}: use segment = {backbone.max_positions} or less."
            )
        bounded = not (config.accumulate and config.summary_tokens) or config.max_summaries is not None
        self.traits = Traits(segment=config.segment, bounded=bounded)
        values = _initial(backbone, config, rng)
        self.summary_embeddings = nn.Parameter(values.to(backbone.device, backbone.dtype))

    @classmethod
    def fit(cls, card: BackboneCard, budget: Budget) -> AutoCompressorConfig:
        """Fifty summary tokens as in the paper, fewer in proportion for segments shorter than the paper's.

        Only the summaries of as many segments stay as were ever trained with: with all of them, each segment costs more
        than the one before (over 500 segments of the `tiny` backbone 68 times the window's operations, not 3).
        """
        segment = card.window if card.max_positions is None else min(card.window, card.max_positions)
        summaries = min(50, max(4, segment // RATIO))
        if budget.added_parameters is not None:
            summaries = min(summaries, budget.added_parameters // card.width)
        return AutoCompressorConfig(segment=segment, summary_tokens=summaries, max_summaries=LONGEST * summaries)

    def open(self, rows: int, *, seeds: Sequence[int] | None = None) -> AutoCompressorState:
        """See `MemoryModel.open`; nothing is drawn."""
        del seeds
        backbone = self.backbone
        return AutoCompressorState(
            torch.zeros(rows, 0, backbone.width, device=backbone.device, dtype=backbone.dtype),
            torch.zeros(rows, 0, dtype=torch.bool, device=backbone.device),
        )

    def step(
        self, state: AutoCompressorState, segment: Segment, *, write: bool = True
    ) -> tuple[Readout, AutoCompressorState]:
        """Predict a segment after all summaries, and summarise it. See `MemoryModel.step`."""
        backbone, slots, tokens = self.backbone, state.mask.shape[1], segment.ids.shape[1]
        prompts = self.summary_embeddings[: None if write else 0].expand(len(state.mask), -1, -1)
        mask = torch.ones_like(segment.mask) if self.config.read_padding else segment.mask
        around = (0, prompts.shape[1])
        seen = torch.cat([state.mask, F.pad(mask, around, value=True)], dim=1)
        text = F.pad(F.pad(mask, around, value=False), (slots, 0), value=False)
        embeds = torch.cat([state.summaries, backbone.embed(segment.ids), prompts], dim=1)
        hidden = backbone.run(embeds, seen, positions=self._positions(seen, text), text=text)
        if write:
            state = self._remember(state, hidden[:, slots + tokens :], segment.mask.any(dim=1))
        return Readout(hidden[:, slots : slots + tokens], backbone.head), state

    def _positions(self, seen: Tensor, text: Tensor) -> Tensor:
        """``[rows, slots]``: learned positions count the segment's text, and nothing else has one."""
        if self.backbone.max_positions is None:
            return self.backbone.positions(seen)
        return self.backbone.positions(text).masked_fill(~text, NOWHERE)

    def _remember(self, state: AutoCompressorState, written: Tensor, real: Tensor) -> AutoCompressorState:
        """The state after a segment that wrote `written` ``[rows, summary_tokens, width]``, in rows that are `real`."""
        real = torch.ones_like(real) if self.config.write_padding else real
        kept = state.mask if self.config.accumulate else state.mask & ~real[:, None]
        summaries = torch.cat([state.summaries, written], dim=1)
        mask = torch.cat([kept, real[:, None].expand(-1, written.shape[1])], dim=1)
        if not bool(mask.all()):  # rows with fewer have their empty slots in front
            order = mask.long().argsort(dim=1, stable=True)[:, mask.shape[1] - int(mask.sum(dim=1).max()) :]
            mask = mask.gather(1, order)
            summaries = summaries.gather(1, order[..., None].expand(-1, -1, summaries.shape[2]))
        if self.config.max_summaries is not None:
            first = max(0, mask.shape[1] - self.config.max_summaries)
            # A copy: a view would hold what was dropped.
            summaries, mask = summaries[:, first:].clone(), mask[:, first:].clone()
        return AutoCompressorState(summaries, mask)

    def flops(self, tokens: int, remembered: int) -> int:
        """One pass over summaries, text and summary tokens, where all segments before were `segment` tokens long."""
        config = self.config
        read = -(-remembered // config.segment) * config.summary_tokens
        if not config.accumulate:
            read = min(read, config.summary_tokens)
        if config.max_summaries is not None:
            read = min(read, config.max_summaries)
        inputs = read + tokens + config.summary_tokens
        return self.backbone.flops(inputs, inputs, predicted=tokens)


def _initial(backbone: Backbone, config: AutoCompressorConfig, rng: torch.Generator) -> Tensor:
    """The first summary embeddings ``[summary_tokens, width]``."""
    own: Any = backbone.model.config
    drawn = torch.randn(config.summary_tokens, backbone.width, generator=rng)
    if config.summary_init == "random":
        return drawn * backbone.embedding_scale()
    if config.summary_init == "overwritten":
        return drawn * float(own.init_std if backbone.family == "opt" else own.initializer_range)
    end = own.eos_token_id[0] if isinstance(own.eos_token_id, list) else own.eos_token_id
    if end is None:
        raise UserError("autocompressor: this backbone names no end-of-text token for summary_init = eos; use random.")
    row = backbone.embed(torch.tensor([[end]], device=backbone.device))[0].detach().cpu().float()
    return row.repeat(config.summary_tokens, 1)
