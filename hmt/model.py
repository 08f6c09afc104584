"""Hierarchical Memory Transformer: sensory tokens, a short-term memory token, and recall from the newest memories.

Unusual here:

- The recall query is causal by default: it summarises the second half of the *previous* segment (or the question, where
  one is given). The official query, the first half of the segment being predicted, is ``recall_query="current-half"``;
  `Traits.look_ahead` says how far it sees.
- One step runs the backbone twice: once for the summary, once for the segment. With ``recall=False``, and before
  anything was written, only once.
- Keys of the cache are projected when a memory is written and stay in the state; the official code projects the whole
  cache again in every segment (the same numbers; gradients differ only where the state is detached).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memory_bench.axes import Axes
from memory_bench.backbone.model import Backbone
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.choices import check_choices
from memory_bench.errors import UserError
from memory_bench.protocol import MemoryModel, Readout, Segment, State, Traits

from .layout import HMTLayout
from .recall import MemoryCache

OFFICIAL_LARGE = 4096  # the official code scores with scale 1/h from these widths on


@dataclass(frozen=True, slots=True)
class HMTConfig:
    """Hyper-parameters of HMT; the paper's symbols are in brackets."""

    segment: int = 512  # text tokens per step [L]
    memory_tokens: int = 1  # memories written per segment [m]; recall needs exactly one
    sensory_tokens: int = 32  # tokens of the previous segment repeated before the text [k]
    recall: bool = True  # off: the memory is handed on from segment to segment (stage 1)
    recall_query: Literal["previous-half", "current-half"] = "previous-half"  # what the query summarises
    recall_width: int = 4096  # width of query and keys [h]
    recall_scale: Literal["1/sqrt(h)", "1/h", "official"] = "1/sqrt(h)"  # official: 1/h when scoring with d, h >= 4096
    recall_dtype: Literal["float32", "bfloat16"] = "float32"  # float32: as the backbone
    cache: int = 300  # newest memories that can be recalled [N]
    summary_fraction: float = 0.5  # of a segment that the query summarises [j / L]
    generation_summary: Literal["fraction", "half"] = "fraction"  # half: L // 2 tokens where text is given (official)
    count_padding: bool = False  # official: padding takes positions, summary and sensory slots, and is remembered
    checkpoint: str = ""  # folder, file or hub id of released weights, which are loaded instead of training

    def __post_init__(self) -> None:
        if self.recall and self.memory_tokens != 1:
            raise UserError(f"hmt recalls single vectors: memory_tokens = {self.memory_tokens} needs recall = false.")
        if self.segment < 1 or self.cache < 1 or self.recall_width < 1:
            raise UserError("hmt: segment, cache and recall_width must be at least 1.")
        if min(self.memory_tokens, self.sensory_tokens) < 0 or not 0 < self.summary_fraction <= 1:
            raise UserError("hmt: token counts cannot be negative, and summary_fraction lies between 0 and 1.")
        check_choices("hmt", self)

    @classmethod
    def official(cls) -> "HMTConfig":
        """The repository's behaviour at commit 177da4b with the sizes of its scripts (window 1024)."""
        return cls(
            segment=990,
            recall_query="current-half",
            recall_scale="official",
            recall_dtype="bfloat16",
            cache=100,
            generation_summary="half",
            count_padding=True,
        )

    @property
    def summary_tokens(self) -> int:
        """Tokens the query summarises [j]: from the nominal segment length, with Python's rounding."""
        return round(self.segment * self.summary_fraction)


@dataclass(frozen=True, slots=True)
class HMTState(State):
    """What HMT remembers.

    Attributes:
        memory: ``[rows, memory_tokens, width]``, the newest memory (the initial one before anything was read).
        cache: memories to recall from; without recall it stays empty.
        tail: ``[rows, kept]`` int64, the last ids of the previous segment, right-aligned.
        tail_mask: ``[rows, kept]`` bool, where `tail` holds a token.
    """

    memory: Tensor
    cache: MemoryCache
    tail: Tensor
    tail_mask: Tensor


@dataclass(frozen=True, slots=True)
class Reading:
    """The memory read for a segment ``[rows, memory_tokens, width]``, and how recall chose it ``[rows, slots]``."""

    memory: Tensor
    weights: Tensor | None = None


class HMT(MemoryModel[HMTState]):
    """He et al., *HMT: Hierarchical Memory Transformer for Efficient Long Context Language Processing* (NAACL 2025).

    Attributes (paper symbols): ``initial_memory`` ``[m, d]``, ``summary_prompt`` T ``[1, d]``, ``recall_query`` W_q and
    ``recall_key`` W_k ``[h, d]`` without bias.

    Raises:
        UserError: the backbone has fewer positions than a segment needs.
    """

    Config = HMTConfig
    released = HMTLayout()
    version: ClassVar[int] = 1
    source: ClassVar[str] = (
        "arXiv:2405.06067; OswaldHe/HMT-pytorch@177da4b. Deviations by default: causal recall query, recall in the "
        "backbone's precision, cache of 300, scale 1/sqrt(h) everywhere, padding leaves no trace."
    )
    axes = Axes(
        unit="segment vectors", capacity="fixed", overflow="drop oldest", write="extra pass",
        written_with_gradient=True, read="by similarity per segment", inject="input", fusion="prefix",
        order="coarse", trained="all",
    )  # fmt: skip
    # How much of HMT is its recall? Without it the sensory tokens and a plain recurrence are left.
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {"recall off": {"recall": False}}

    def __init__(self, backbone: Backbone, config: HMTConfig, rng: torch.Generator) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config
        needed = config.segment + config.sensory_tokens + 2 * config.memory_tokens
        if backbone.max_positions is not None and needed > backbone.max_positions:
            raise UserError(
                f"hmt needs {needed} positions for segment = {config.segment}, but the backbone has "
                f"{backbone.max_positions}: use segment = {config.segment - needed + backbone.max_positions} or less."
            )
        ahead = max(0, config.summary_tokens - 1) if config.recall and config.recall_query == "current-half" else 0
        self.traits = Traits(segment=config.segment, look_ahead=ahead)
        scale = backbone.embedding_scale()
        self.initial_memory = self._parameter(torch.randn(config.memory_tokens, backbone.width, generator=rng) * scale)
        if config.recall:
            self.summary_prompt = self._parameter(torch.randn(1, backbone.width, generator=rng) * scale)
            self.recall_query = self._projection(rng)
            self.recall_key = self._projection(rng)

    def _parameter(self, values: Tensor) -> nn.Parameter:
        return nn.Parameter(values.to(self.backbone.device, self.backbone.dtype))

    def _projection(self, rng: torch.Generator) -> nn.Linear:
        """A bias-free map to the recall width with torch's default initial values, drawn with `rng`."""
        width, bound = self.backbone.width, 1 / math.sqrt(self.backbone.width)
        linear = nn.Linear(width, self.config.recall_width, bias=False, device="meta")
        linear.weight = self._parameter((2 * torch.rand(self.config.recall_width, width, generator=rng) - 1) * bound)
        return linear

    @classmethod
    def fit(cls, card: BackboneCard, budget: Budget) -> HMTConfig:
        """Recall as wide as the feed-forward layer (as in the scripts), or as a small backbone itself."""
        small = card.small
        sensory = 8 if small else 32
        width = card.width if small else card.mlp_width
        if budget.added_parameters is not None:
            width = max(1, min(width, budget.added_parameters // (2 * card.width) - 1))
        segment = card.window
        if card.max_positions is not None:
            segment = max(1, min(segment, card.max_positions - sensory - 2))
        return HMTConfig(segment=segment, sensory_tokens=min(sensory, segment), recall_width=width)

    @property
    def recall_precision(self) -> torch.dtype:
        """Type in which queries, keys and memories are compared and mixed."""
        return torch.bfloat16 if self.config.recall_dtype == "bfloat16" else self.backbone.dtype

    def open(self, rows: int, *, seeds: Sequence[int] | None = None) -> HMTState:
        """See `MemoryModel.open`; HMT draws nothing."""
        del seeds
        config, width = self.config, self.backbone.width
        initial = self.initial_memory.expand(rows, -1, -1)
        cache = MemoryCache.empty(rows, width, config.recall_width, initial.detach().to(self.recall_precision))
        kept = max(config.sensory_tokens, config.summary_tokens if config.recall else 0)
        tail = torch.zeros(rows, kept, dtype=torch.long, device=initial.device)
        return HMTState(initial, cache, tail, torch.zeros_like(tail, dtype=torch.bool))

    def step(self, state: HMTState, segment: Segment, *, write: bool = True) -> tuple[Readout, HMTState]:
        """Recall, predict, and (with `write`) remember a segment. See `MemoryModel.step`."""
        memory = self.read(state, segment).memory
        hidden, written = self.main_pass(memory, state, segment, write=write)
        after = state if written is None else self.remember(state, segment, written)
        return Readout(hidden, self.backbone.head), after

    def read(self, state: HMTState, segment: Segment) -> Reading:
        """The memory placed around a segment: recalled, or the newest one (without recall, or before any write)."""
        if not self.config.recall or not state.cache.slots:
            return Reading(state.memory)
        summary = self.summarise(*self.query_tokens(state, segment))
        recalled, weights = self.recall(summary, state.cache, asked(segment))
        remembers = state.cache.filled.any(dim=1)[:, None, None]
        return Reading(torch.where(remembers, recalled, state.memory), weights)

    def recall_weights(self, state: HMTState, segment: Segment) -> Tensor | None:
        """The weights of recall, in float32. See `MemoryModel.recall_weights`."""
        return self.read(state, segment).weights

    def query_tokens(self, state: HMTState, segment: Segment) -> tuple[Tensor, Tensor]:
        """The tokens a recall query summarises: ids and mask, ``[rows, at most summary_tokens]``.

        ``previous-half``: the last of the previous segment; in rows with given tokens the last of those, since they are
        a condition. ``current-half``: the first of the segment; in rows with given tokens the first of those, as in the
        official ``generate``. (A segment that generation has just begun is queried with what there is: the official
        loop for long outputs does not run.)
        """
        config, count, given = self.config, self.config.summary_tokens, asked(segment)
        previous = config.recall_query == "previous-half"
        tail, tail_mask = last_columns(state.tail, count), last_columns(state.tail_mask, count)
        if previous and segment.given is None:
            return trim(tail, tail_mask, tail_mask)
        counts = torch.full_like(given, count, dtype=torch.long)  # [rows, 1]
        if config.generation_summary == "half":
            counts = torch.where(given, config.segment // 2, counts)
        eligible = torch.ones_like(segment.mask) if segment.given is None else segment.given | ~given
        if not config.count_padding:
            eligible = eligible & segment.mask
        index, taken = take(eligible, counts, max(count, config.segment // 2), last=previous)
        ids, mask = segment.ids.gather(1, index), taken & segment.mask.gather(1, index)
        if previous:
            width = ids.shape[1]
            ids = torch.where(given, ids, last_columns(tail, width))
            mask = torch.where(given, mask, last_columns(tail_mask, width))
            taken = torch.where(given, taken, mask)
        return trim(ids, mask, taken)

    def summarise(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Summary ``[rows, 1, width]`` of tokens ``[rows, tokens]``: final hidden state behind [T; tokens; T]."""
        prompt = self.summary_prompt.expand(ids.shape[0], 1, -1)
        embeds = torch.cat([prompt, self.backbone.embed(ids), prompt], dim=1)  # [rows, tokens + 2, width]
        return self._run(embeds, mask, before=1, after=1)[:, -1:]

    def recall(self, summary: Tensor, cache: MemoryCache, given: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of the summary over the cache: memory ``[rows, 1, width]``, weights ``[rows, slots]``.

        `given` ``[rows, 1]`` bool marks rows that are asked or generate: the official code scales these by 1/sqrt(h)
        even where it scales by 1/h in scoring.
        """
        config, width = self.config, self.config.recall_width
        scores = cache.compare(self._project(self.recall_query, summary))
        large = width >= OFFICIAL_LARGE and self.backbone.width >= OFFICIAL_LARGE
        if config.recall_scale == "1/h" or (config.recall_scale == "official" and large):
            return cache.mix(torch.where(given, scores / math.sqrt(width), scores / width))
        return cache.mix(scores / math.sqrt(width))

    def _project(self, projection: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x.to(self.recall_precision), projection.weight.to(self.recall_precision))

    def sensory(self, state: HMTState) -> tuple[Tensor, Tensor]:
        """Sensory tokens: ids and mask ``[rows, at most sensory_tokens]``, the last of the previous segment."""
        count = self.config.sensory_tokens
        mask = last_columns(state.tail_mask, count)
        return trim(last_columns(state.tail, count), mask, mask)

    def main_pass(
        self, memory: Tensor, state: HMTState, segment: Segment, *, write: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The backbone over [memory; sensory tokens; text; memory].

        Returns:
            Final hidden states of the text ``[rows, tokens, width]``; those of the trailing memory
            ``[rows, memory_tokens, width]``, or None without `write`: nothing before it can see it, a look needs none.
        """
        sensory, sensory_mask = self.sensory(state)
        ids = torch.cat([sensory, segment.ids], dim=1)
        mask = torch.cat([sensory_mask, segment.mask], dim=1)
        # Sensory and segment tokens are one text: padding between them moves to the front.
        order = None if self.config.count_padding or bool(mask.all()) else mask.long().argsort(dim=1, stable=True)
        if order is not None:
            ids, mask = ids.gather(1, order), mask.gather(1, order)
        memory, m = memory.to(self.backbone.dtype), memory.shape[1]
        trailing = memory if write else memory[:, :0]
        embeds = torch.cat([memory, self.backbone.embed(ids), trailing], dim=1)
        hidden = self._run(embeds, mask, before=m, after=trailing.shape[1])
        text = hidden[:, m : m + ids.shape[1]]
        if order is not None:
            text = text.gather(1, order.argsort(dim=1)[..., None].expand_as(text))
        return text[:, sensory.shape[1] :], hidden[:, m + ids.shape[1] :] if write else None

    def _run(self, embeds: Tensor, mask: Tensor, *, before: int, after: int) -> Tensor:
        """The backbone over text ``[rows, tokens]`` with always visible vectors around it."""
        seen, text = F.pad(mask, (before, after), value=True), F.pad(mask, (before, after), value=False)
        positions = self.backbone.positions(seen, count_padding=self.config.count_padding)
        return self.backbone.run(embeds, seen, positions=positions, text=text)

    def remember(self, state: HMTState, segment: Segment, written: Tensor) -> HMTState:
        """The state after a segment whose pass wrote `written`; a row without real tokens keeps its state."""
        count_padding = self.config.count_padding
        eligible = torch.ones_like(segment.mask) if count_padding else segment.mask
        wrote, kept = eligible.any(dim=1), state.tail.shape[1]
        cache = state.cache
        if self.config.recall:
            key = self._project(self.recall_key, written)
            cache = cache.append(written.to(self.recall_precision), key, wrote, self.config.cache)
        index, taken = take(eligible, torch.full_like(wrote[:, None], kept, dtype=torch.long), kept, last=True)
        return HMTState(
            torch.where(wrote[:, None, None], written, state.memory),
            cache,
            torch.where(wrote[:, None], segment.ids.gather(1, index), state.tail),
            torch.where(wrote[:, None], taken, state.tail_mask),
        )

    def flops(self, tokens: int, remembered: int) -> int:
        """Main pass and, once there is something to recall, summary pass and recall. See `MemoryModel.flops`."""
        config, width, h = self.config, self.backbone.width, self.config.recall_width
        sensory = min(config.sensory_tokens, remembered, config.segment)
        inputs = tokens + sensory + 2 * config.memory_tokens
        total = self.backbone.flops(inputs, inputs, predicted=tokens)
        if not config.recall:
            return total
        total += 2 * h * width  # the written memory's key
        if remembered:
            slots = min(config.cache, math.ceil(remembered / config.segment))
            available = tokens if config.recall_query == "current-half" else min(remembered, config.segment)
            summary = min(config.summary_tokens, available) + 2
            total += self.backbone.flops(summary, summary, predicted=0) + 2 * h * width + 2 * slots * (h + width)
        return total


def asked(segment: Segment) -> Tensor:
    """``[rows, 1]`` bool: rows in which some of the segment is given."""
    return segment.mask.new_zeros(len(segment.mask), 1) if segment.given is None else segment.given.any(1, keepdim=True)


def take(eligible: Tensor, counts: Tensor, width: int, *, last: bool) -> tuple[Tensor, Tensor]:
    """Where the first (or `last`) eligible columns of every row are, right-aligned.

    Args:
        eligible: ``[rows, tokens]`` bool.
        counts: ``[rows, 1]`` int64, how many to take.
        width: columns of the answer.
        last: take the last ones.

    Returns:
        Column indices ``[rows, width]`` in ascending order, and ``[rows, width]`` bool: where there is one.
    """
    rank = eligible.long().cumsum(dim=1)
    chosen = eligible & ((rank > rank[:, -1:] - counts) if last else (rank <= counts))
    order = chosen.long().argsort(dim=1, stable=True)  # chosen columns come last, in their order
    return last_columns(order, width), last_columns(chosen.gather(1, order), width)


def last_columns(x: Tensor, width: int) -> Tensor:
    """The last `width` columns, filled up with zeros in front."""
    return F.pad(x, (max(0, width - x.shape[1]), 0))[:, max(0, x.shape[1] - width) :]


def trim(ids: Tensor, mask: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """`ids` and `mask` without the columns that no row uses."""
    columns = used.any(dim=0)
    return ids[:, columns], mask[:, columns]
