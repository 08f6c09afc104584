"""Extended Mind: every layer of an untrained model attends, beside its window, to the most alike of thousands of keys.

Unusual here:

- The window is read again for every segment, with positions from 0; memory is what has left it. The place of a query
  in the window is therefore its distance to every memory, whose keys have no position.
- What is retrieved is what has the largest cosine with the query, each query and head for itself, and nothing is
  looked up by later text. One softmax over memories and window weighs both by the plain product.
- Entries are written once and never change. By default they come from another pass, without memory, over windows of
  the text that begin at multiples of `memory_stride` (official); `memory_pass="reading"` saves that pass.
- By default the window begins at a place that does not depend on how long the segment is. Officially it is measured
  from the segment's end (`window_start="end"`): the same token stands elsewhere, and sees less, when more text follows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from memory_bench.axes import Axes
from memory_bench.backbone.model import Backbone
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.choices import check_choices
from memory_bench.errors import UserError
from memory_bench.protocol import MemoryModel, Readout, Segment, State, Traits

from .parts import knn
from .parts.chunk_bank import take
from .parts.drawing import draw_slots, row_seeds
from .parts.grouping import group_rows
from .parts.ring import Ring

SEGMENTS = 128  # segments that a fitted store holds at most
STORE_SHARE = 10  # a stream's store takes at most this fraction of the budget's device memory

Look = Callable[[int, Tensor], None]
"""Told of every search: the layer, and the slots ``[rows, heads, n, k]`` before any are hidden by the threshold."""


@dataclass(frozen=True, slots=True)
class ExtendedMindConfig:
    """Options of Extended Mind; the official code's names in brackets."""

    segment: int = 512  # text tokens per step [stride of its perplexity script]
    history: int = 1536  # tokens before the segment that are read with it again
    top_k: int = 10  # entries retrieved per query and head [topk]; 0: memory off
    layers: tuple[int, ...] | None = None  # layers with memory, from 0 [use_external_mind_by_layer]; None: all
    slots: int = 100_000  # newest tokens kept
    similarity_threshold: float | None = None  # entries no more alike than that are hidden [mask_by_sim]; None: none
    special_ids: tuple[int, ...] = ()  # tokens that leave no entry [remove_special_ids]
    memory_pass: Literal["plain", "reading"] = "plain"  # what entries are made by
    memory_stride: int = 512  # tokens between the windows of the plain pass [stride]
    memory_context: int = 3072  # tokens of each of them [max_len]
    window_start: Literal["segment", "end"] = "segment"  # what the window is measured from; official: the end
    selection: Literal["similarity", "random"] = "similarity"  # random: as many entries, whichever (a control)

    def __post_init__(self) -> None:
        if min(self.segment, self.slots, self.memory_stride) < 1 or self.top_k < 0:
            raise UserError("extended-mind: segment, slots and memory_stride must be at least 1, top_k at least 0.")
        if self.history < 0:
            raise UserError("extended-mind: history cannot be negative; 0 reads every segment alone.")
        if self.memory_context < self.memory_stride:
            raise UserError("extended-mind: memory_context must be at least memory_stride, or tokens are left out.")
        check_choices("extended-mind", self)

    @classmethod
    def official(cls) -> "ExtendedMindConfig":
        """As the official Llama class and its perplexity experiment, with the special ids of Llama."""
        return cls(window_start="end", special_ids=(0, 1, 2))

    @property
    def window(self) -> int:
        """Tokens read at once with a whole segment [local]."""
        return self.history + self.segment


@dataclass(frozen=True, slots=True)
class ExtendedMindState(State):
    """Entries of everything read, and the text that is read again.

    Attributes:
        store: keys and values of the memory layers; the newest are of tokens that the window still shows.
        recent: ``[rows, n]`` int32, the last tokens, last ones right; -1: none.
        read: ``[rows]`` int64, tokens read.
        host_seeds: ``[rows]`` int64, of random selections; None: nothing is drawn.
    """

    store: Ring
    recent: Tensor
    read: Tensor
    host_seeds: Tensor | None


class ExtendedMind(MemoryModel[ExtendedMindState]):
    """Klett & Ahle, *Extended Mind Transformers*. Adds no parameters.

    Raises:
        UserError: a memory layer does not exist.
    """

    Config = ExtendedMindConfig
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("llama",)  # entries have no position; a learned one is part of every key
    source: ClassVar[str] = (
        "arXiv:2406.02332; normal-computing/extended-mind-transformers@4f068c1 (Llama, dense memory). Deviations by "
        "default: the window begins at a place that later text does not move; rows of any number and with padding; "
        "the newest slots are counted without special tokens. Its faiss store and the MPT variant are left out."
    )
    axes = Axes(
        unit="token kv", capacity="grows", write="direct", read="by similarity per token",
        inject="all layers", fusion="one softmax", order="lost",
    )  # fmt: skip
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "memory off": {"top_k": 0},
        "random selection": {"selection": "random"},
    }

    def __init__(self, backbone: Backbone, config: ExtendedMindConfig, rng: torch.Generator) -> None:
        super().__init__()
        del rng  # nothing to initialise
        self.backbone = backbone
        self.config = config
        chosen = range(backbone.layers) if config.layers is None else sorted(set(config.layers))
        if not all(0 <= layer < backbone.layers for layer in chosen):
            last = backbone.layers - 1
            raise UserError(f"extended-mind.layers = {list(chosen)}: this backbone has layers 0 to {last}.")
        self.layers = tuple(chosen) if config.top_k else ()
        self.traits = Traits(segment=config.segment)
        plain = config.memory_context - 1 if config.memory_pass == "plain" and self.layers else 0
        self.kept = max(plain, config.history if config.window_start == "segment" else config.window - 1)

    @classmethod
    def fit(cls, card: BackboneCard, budget: Budget) -> ExtendedMindConfig:
        """Half a window for the segment and half for what is read again, so that no token sees more text than a window.

        Entries come from windows of the same length.
        """
        segment = max(1, card.window // 2)
        slots = min(ExtendedMindConfig().slots, SEGMENTS * segment)
        if budget.device_bytes is not None:
            slot = 2 * 4 * card.layers * card.kv_heads * card.head_width  # bytes, in float32
            slots = max(1, min(slots, budget.device_bytes // STORE_SHARE // slot))
        return ExtendedMindConfig(
            segment=segment,
            history=card.window - segment,
            memory_stride=segment,
            memory_context=card.window,
            slots=slots,
        )

    def open(self, rows: int, *, seeds: Sequence[int] | None = None) -> ExtendedMindState:
        """See `MemoryModel.open`; only a random selection draws."""
        backbone, config = self.backbone, self.config
        like = torch.empty(0, device=backbone.device, dtype=backbone.dtype)
        shape = (rows, backbone.kv_heads, backbone.head_width)
        return ExtendedMindState(
            store=Ring.empty(len(self.layers), shape, config.slots + config.window, like),
            recent=torch.full((rows, self.kept), -1, dtype=torch.int32, device=backbone.device),
            read=torch.zeros(rows, dtype=torch.int64, device=backbone.device),
            host_seeds=row_seeds(rows, seeds) if config.selection == "random" else None,
        )

    def step(
        self, state: ExtendedMindState, segment: Segment, *, write: bool = True
    ) -> tuple[Readout, ExtendedMindState]:
        """See `MemoryModel.step`."""
        hidden, keys, values = self.read(state, segment)
        if write:
            if self.config.memory_pass == "plain":
                keys, values = self._plain(state, segment)
            state = self._written(state, segment, keys, values)
        return Readout(hidden, self.backbone.head), state

    def absorb(self, state: ExtendedMindState, segment: Segment) -> ExtendedMindState:
        """See `MemoryModel.absorb`: entries of the plain pass need no reading."""
        if self.config.memory_pass == "reading" and self.layers:
            return self.step(state, segment)[1]
        return self._written(state, segment, *self._plain(state, segment))

    def read(
        self, state: ExtendedMindState, segment: Segment, look: Look | None = None
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The reading pass over the window.

        Returns:
            Final hidden states ``[rows, tokens, width]``, and of the memory layers the segment's keys (before rotary)
            and values ``[rows, kv_heads, tokens, head]``.
        """
        backbone = self.backbone
        ids, own = self._window(state, segment)
        mask = ids >= 0
        where, embeds = backbone.positions(mask), backbone.embed(ids.clamp(min=0))
        resumed = backbone.resume(embeds, (where, mask), (state,))
        first = resumed.first
        valid = self.memories(state, segment)
        known = bool(valid.any())
        visible = backbone.visible(mask, (), first, positions=where)
        turn, turn_keys = backbone.rotation(where[:, first:], queries=True), backbone.rotation(where)
        hidden = backbone.begin(embeds[:, first:], where[:, first:])
        keys, values = [], []
        for layer in range(backbone.layers):
            q, k, v = backbone.project(layer, backbone.norm_input(layer, hidden), mask[:, first:])
            k, v = resumed.join(k, v)
            found = None
            q, turned = backbone.rotate(q, turn[layer]), backbone.rotate(k, turn_keys[layer])
            if layer in self.layers:
                keys.append(take(k, own))
                values.append(take(v, own))
                found = self._choose(state, layer, q, valid, mask, look) if known else None
            if found is None:
                attended = backbone.attend(q, turned, v, visible[layer])
            else:
                q, number = q * backbone.head_width**-0.5, self.layers.index(layer)
                stored = state.store.keys[number], state.store.values[number]
                local = knn.Local(q, turned, v, visible[layer])
                attended = knn.attend_retrieved(q, *stored, found, local=local).transpose(1, 2).flatten(2)
            hidden = backbone.close(layer, hidden, attended)
        return take(resumed.finish(backbone.end(hidden))[:, None], own)[:, 0], keys, values

    def _window(self, state: ExtendedMindState, segment: Segment) -> tuple[Tensor, Tensor]:
        """The ids of the window ``[rows, n]``, right-aligned without gaps, -1 for none; the segment's places in it."""
        before = self._before(state, segment)
        ids = torch.cat([before.long(), segment.ids.masked_fill(~segment.mask, -1)], dim=1)
        real = ids >= 0
        order = real.int().argsort(dim=1, stable=True)
        spare = ids.shape[1] - max(1, int(real.sum(dim=1).max()))
        own = order.argsort(dim=1)[:, before.shape[1] :] - spare
        return ids.gather(1, order[:, spare:]), own.clamp(min=0)

    def _shown(self, segment: Segment) -> Tensor:
        """``[rows, 1]``: how many tokens before the segment its window shows."""
        if self.config.window_start == "end":
            return (self.config.window - segment.lengths).clamp(min=0)[:, None]
        return torch.full_like(segment.lengths, self.config.history)[:, None]

    def _before(self, state: ExtendedMindState, segment: Segment) -> Tensor:
        """Those tokens, ``[rows, n]`` int32, last ones right; -1 where a row has fewer."""
        recent, shown = state.recent, self._shown(segment)
        age = torch.arange(recent.shape[1] - 1, -1, -1, device=recent.device)
        recent = recent.masked_fill(age >= shown, -1)
        return recent[:, recent.shape[1] - int((recent >= 0).sum(dim=1).max()) :]

    def memories(self, state: ExtendedMindState, segment: Segment) -> Tensor:
        """``[rows, slots]`` bool: the slots that `segment` may retrieve, of tokens that its window does not show."""
        before = self._before(state, segment)
        hidden = (self._leaves(before) & (before >= 0)).sum(dim=1, keepdim=True)
        # Those that the window shows are the newest; the store has room for them beside `slots` others.
        outside = state.store.valid(hidden + self.config.slots)
        return state.store.valid(hidden) & ~outside

    def _leaves(self, ids: Tensor) -> Tensor:
        """Which of `ids` leave an entry, bool."""
        special = torch.tensor(self.config.special_ids, dtype=ids.dtype, device=ids.device)
        return ~torch.isin(ids, special)

    def _choose(
        self, state: ExtendedMindState, layer: int, q: Tensor, valid: Tensor, mask: Tensor, look: Look | None
    ) -> Tensor:
        """Slots that rotated queries retrieve, ``[rows, heads, tokens, k]``; -1: none."""
        config = self.config
        if state.host_seeds is not None:
            found = draw_slots(valid, config.top_k, mask, q.shape[1], state.host_seeds, state.read, layer)
            return found[:, :, mask.shape[1] - q.shape[2] :]
        keys, least = state.store.keys[self.layers.index(layer)], config.similarity_threshold
        found, alike = knn.search_cosine(q, keys, config.top_k, valid)
        if look is not None:
            look(layer, found)
        return found if least is None else found.masked_fill(alike <= least, -1)

    @torch.no_grad()
    def _plain(self, state: ExtendedMindState, segment: Segment) -> tuple[list[Tensor], list[Tensor]]:
        """Keys (before rotary) and values of the segment's tokens, ``[rows, kv_heads, tokens, head]`` a memory layer.

        From passes over windows of the text without memory; each token from the first window that covers it.
        """
        backbone, shape = self.backbone, (*segment.ids.shape, self.backbone.kv_heads, self.backbone.head_width)
        like = torch.zeros((), device=backbone.device, dtype=backbone.dtype)
        made = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in self.layers]
        for group in group_rows(segment, state.read.cpu()) if self.layers else ():
            index = torch.arange(len(segment.ids)) if group.index is None else group.index
            index = index.to(segment.ids.device)
            read, tokens = int(state.read[index[0]]), group.ids.shape[1]
            text = torch.cat([state.recent[index].long(), group.ids], dim=1)
            offset = read + tokens - text.shape[1]  # of the text's first token in the stream
            parts = []
            for start, new, end in self._windows(read, read + tokens):
                ids = text[:, start - offset : end - offset]
                _, past = backbone.run_cached(backbone.embed(ids), torch.ones_like(ids, dtype=torch.bool))
                assert past is not None
                parts.append(past.select(torch.arange(new - start, end - start, device=ids.device)))
            own = segment.mask[index]
            row, place = index[:, None].expand_as(own)[own], own.nonzero()[:, 1]
            for layer, (keys, values) in zip(self.layers, made, strict=True) if parts else ():
                for whole, each in ((keys, [p.keys[layer] for p in parts]), (values, [p.values[layer] for p in parts])):
                    whole[row, place] = torch.cat(each, dim=2).transpose(1, 2).flatten(0, 1)
        return [keys.transpose(1, 2) for keys, _ in made], [values.transpose(1, 2) for _, values in made]

    def _windows(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """The windows of the plain pass for the stream's tokens `start` to `end`: first token, first new one, end."""
        stride, context = self.config.memory_stride, self.config.memory_context
        found, new = [], start
        while new < end:
            begin = 0 if new < context else ((new - context) // stride + 1) * stride  # the first that covers `new`
            found.append((begin, new, min(begin + context, end)))
            new = found[-1][2]
        return found

    def _written(
        self, state: ExtendedMindState, segment: Segment, keys: list[Tensor], values: list[Tensor]
    ) -> ExtendedMindState:
        """The state after a segment with these entries."""
        own = segment.ids.masked_fill(~segment.mask, -1).int()
        text = torch.cat([state.recent, own], dim=1)
        order = (text >= 0).int().argsort(dim=1, stable=True)[:, text.shape[1] - self.kept :]  # real ones last
        store = state.store.write(keys, values, segment.mask & self._leaves(segment.ids))
        return ExtendedMindState(store, text.gather(1, order), state.read + segment.lengths, state.host_seeds)

    def flops(self, tokens: int, remembered: int) -> int:
        """See `MemoryModel.flops`; special tokens are counted as if they left entries."""
        config, backbone = self.config, self.backbone
        shown = config.history if config.window_start == "segment" else max(0, config.window - tokens)
        read = min(shown, remembered) + tokens
        total = backbone.flops(read, read, predicted=tokens)
        if remembered > shown:
            slots = min(config.slots + config.window, remembered)
            searched = 0 if config.selection == "random" else 2 * slots
            per_query = (searched + 4 * min(config.top_k, slots)) * backbone.head_width
            total += len(self.layers) * backbone.heads * read * per_query
        return total + (self._plain_flops(tokens, remembered) if config.memory_pass == "plain" else 0)

    def _plain_flops(self, tokens: int, remembered: int) -> int:
        if not self.layers:
            return 0
        windows = self._windows(remembered, remembered + tokens)
        return sum(self.backbone.flops(end - start, end - start, predicted=0) for start, _, end in windows)

    def absorb_flops(self, tokens: int, remembered: int) -> int:
        """See `MemoryModel.absorb_flops`."""
        if self.config.memory_pass == "reading" and self.layers:
            return super().absorb_flops(tokens, remembered)
        return self._plain_flops(tokens, remembered)

    def detached_flops(self, tokens: int, remembered: int) -> int:
        """See `MemoryModel.detached_flops`: the plain pass."""
        return self._plain_flops(tokens, remembered) if self.config.memory_pass == "plain" else 0
