"""MemLong: upper layers attend, beside their window, to whole chunks of earlier text, with one layer's keys and values.

Unusual here:

- A segment chooses its chunks once, for all its tokens, heads and layers: by its question, or else by the text before
  it. Officially (`retrieval_query="current-piece"`) it is the text of the segment itself, which is being predicted.
- All retrieval layers read the keys and values that `memory_layer` made. They are stored before rotary and without
  gradients; where the layers below are frozen (`freeze_below`, the second stage of its training) they never grow stale.
- What chunks are found by is the mean key of the memory layer (`search="keys"`, no other model), or an embedding of
  their text (`search="text"`, as published).
- Every layer also attends to the last `window` tokens before the segment; officially (`window=0`) it is read alone.
  Chunks that reach into that window are not retrieved.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memory_bench.axes import Axes
from memory_bench.backbone.embedder import Embedder
from memory_bench.backbone.model import Backbone, Past
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.choices import check_choices
from memory_bench.errors import UserError
from memory_bench.protocol import DecodePlan, MemoryModel, Readout, Segment, State, Traits

from .parts.cache import empty_cache, keep_recent, next_positions
from .parts.chunk_fusion import attend_chunks, chunk_positions
from .parts.drawing import draw_slots, row_seeds
from .parts.questions import marks, read_keys, read_last, searched, searched_keys
from .parts.text_memory import Found, TextMemory, chunks_held, chunks_written

SEGMENTS = 128  # segments that a fitted memory holds at most
STORE_SHARE = 10  # a stream's memory takes at most this fraction of the budget's device memory

Look = Callable[[Tensor, Found | None], None]
"""Told of every pass of a continuation: the query, and what is retrieved."""


@dataclass(frozen=True, slots=True)
class MemLongConfig:
    """Options of MemLong; the official code's names in brackets."""

    segment: int = 512  # text tokens per step, a piece [last_context_length]
    window: int = 512  # earlier tokens that every layer attends to; official: 0
    memory_layer: int | None = None  # whose keys and values are stored, from 0 [mem_layer]; None: half of the way up
    retrieval_layers: tuple[int, ...] | None = None  # [ret_attn_layers]; None: every fourth from the memory layer on
    memory_tokens: int = 32_768  # stored at most [memory_size]
    chunk: int = 128  # tokens of a chunk [mem_group_size]
    retrieved_chunks: int = 8  # [ret_group_size]; 0: memory off
    search: Literal["keys", "text"] = "keys"  # official: text
    retrieval_query: Literal["previous-piece", "current-piece"] = "previous-piece"  # official: current, looks ahead
    selection: Literal["similarity", "random"] = "similarity"  # random: as many chunks, whichever (a control)
    memory_position: Literal["zero", "continual", "repeated"] = "zero"  # continual: before the segment; repeated: see
    gate: Literal["none", "bias", "scale"] = "none"  # a scalar per head and retrieval layer [use_gate]; scale: official
    eviction: Literal["oldest", "halve"] = "oldest"  # official: halve
    short_chunks: bool = False  # official: every piece is cut into chunks anew
    store: Literal["backbone", "bfloat16"] = "backbone"  # numbers of the memory [mem_dtype]; official: bfloat16
    freeze_below: bool = False  # the memory layer and those below it are not trained: stage 2

    def __post_init__(self) -> None:
        if min(self.segment, self.chunk) < 1 or min(self.window, self.retrieved_chunks) < 0:
            raise UserError("memlong: segment and chunk must be at least 1, window and retrieved_chunks at least 0.")
        if self.memory_tokens < self.chunk:
            raise UserError(f"memlong: memory_tokens must be at least a chunk, {self.chunk} tokens.")
        check_choices("memlong", self)

    @classmethod
    def official(cls) -> "MemLongConfig":
        """As the official code with the sizes and options of its scripts (``repeated`` positions are its default)."""
        return cls(
            segment=1024,
            window=0,
            search="text",
            retrieval_query="current-piece",
            eviction="halve",
            short_chunks=True,
            store="bfloat16",
        )


@dataclass(frozen=True, slots=True)
class MemLongState(State):
    """What was read.

    Attributes:
        memory: chunks of text with the memory layer's keys and values.
        window: keys and values of all layers of the last tokens; None without a window.
        query: what the next segment is searched for by: token ids (search "text", see `parts.questions`), or the sum of
            keys ``[rows, width]`` float32.
        asked: ``[rows]`` bool, whether that is a question.
        read: ``[rows]`` int64, tokens read.
        host_seeds: ``[rows]`` int64, of random selections; None: nothing is drawn.
    """

    memory: TextMemory
    window: Past | None
    query: Tensor
    asked: Tensor
    read: Tensor
    host_seeds: Tensor | None


class MemLong(MemoryModel[MemLongState]):
    """Liu et al., *MemLong*.

    It adds ``score_gate`` (``[heads]`` per retrieval layer), with `gate`, and nothing else.

    Raises:
        UserError: a layer does not exist, keys are asked for before they are there, or there is no embedder.
    """

    Config = MemLongConfig
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("llama",)
    source: ClassVar[str] = (
        "arXiv:2408.16967; Bui1dMySea/MemLong@598fdf8 (eager attention). Deviations by default: chunks are found by "
        "the text before, and by mean keys instead of another model's embeddings; a window of earlier text; the oldest "
        "chunk gives way; a memory per text and row; keys rotated once. Adapters are the recipe's. Left out: its flash "
        "attention, the paper's counters, the overflow of its local cache."
    )
    axes = Axes(
        unit="chunk kv", capacity="fixed", overflow="drop oldest", write="direct",
        read="by similarity per piece", inject="some layers", fusion="one softmax", order="lost",
        trained="all",
    )  # fmt: skip
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "memory off": {"retrieved_chunks": 0},
        "random selection": {"selection": "random"},
    }

    def __init__(self, backbone: Backbone, config: MemLongConfig, rng: torch.Generator) -> None:
        super().__init__()
        del rng  # initial values are constants
        self.backbone = backbone
        self.config = config
        self.memory_layer = backbone.layers // 2 if config.memory_layer is None else config.memory_layer
        chosen = range(self.memory_layer, backbone.layers, 4)
        self.layers = tuple(chosen if config.retrieval_layers is None else sorted(set(config.retrieval_layers)))
        if not all(0 <= layer < backbone.layers for layer in (self.memory_layer, *self.layers)):
            asked = ", ".join(map(str, (self.memory_layer, *self.layers)))
            raise UserError(f"memlong: memory in layers {asked}: this backbone has layers 0 to {backbone.layers - 1}.")
        self.layers = self.layers if config.retrieved_chunks else ()
        if config.search == "keys" and self.layers and self.layers[0] < self.memory_layer:
            raise UserError("memlong: search = keys needs retrieval layers from memory_layer on; use search = text.")
        if config.search == "text" and self.layers and backbone.embedder is None:
            raise UserError("memlong: search = text needs an embedder beside the backbone; use search = keys.")
        ahead = config.segment - 1 if config.retrieval_query == "current-piece" and self.layers else 0
        self.traits = Traits(segment=config.segment, look_ahead=ahead if config.selection == "similarity" else 0)
        start = torch.zeros(backbone.heads, device=backbone.device, dtype=backbone.dtype)
        gated = self.layers if config.gate != "none" else ()
        self.score_gate = nn.ParameterDict({str(layer): nn.Parameter(start.clone()) for layer in gated})

    @classmethod
    def fit(cls, card: BackboneCard, budget: Budget) -> MemLongConfig:
        """As many tokens before the segment as in it, like `XLCache`, and as many retrieved, in 8 chunks as published.

        Small backbones retrieve in all their upper layers.
        """
        segment = card.window
        chunk = max(2, segment // 8)
        tokens = min(MemLongConfig().memory_tokens, SEGMENTS * segment)
        if budget.device_bytes is not None:
            slot = 2 * 4 * card.kv_heads * card.head_width  # bytes, in float32
            tokens = min(tokens, budget.device_bytes // STORE_SHARE // slot)
        return MemLongConfig(
            segment=segment,
            window=segment,
            retrieval_layers=tuple(range(card.layers // 2, card.layers)) if card.small else None,
            memory_tokens=max(chunk, tokens),
            chunk=chunk,
        )

    @classmethod
    def helpers(cls, config: MemLongConfig) -> Mapping[str, str]:
        """See `MemoryModel.helpers`."""
        return {"minilm": "search=keys"} if config.search == "text" and config.retrieved_chunks else {}

    def added_parameters(self) -> int:
        """With the embedder's, where it is used."""
        return super().added_parameters() + (0 if self._embedder is None else self._embedder.parameters)

    @property
    def _whole(self) -> bool:
        """Official: the text of the segment itself is searched for."""
        return self.config.retrieval_query == "current-piece"

    @property
    def _by_text(self) -> bool:
        return self.config.search == "text" and bool(self.layers)

    @property
    def _embedder(self) -> Embedder | None:
        return self.backbone.embedder if self._by_text else None

    def open(self, rows: int, *, seeds: Sequence[int] | None = None) -> MemLongState:
        """See `MemoryModel.open`; only a random selection draws."""
        backbone, config = self.backbone, self.config
        kind = torch.bfloat16 if config.store == "bfloat16" else backbone.dtype
        like = torch.zeros(rows, backbone.kv_heads, 0, backbone.head_width, device=backbone.device, dtype=kind)
        read = torch.zeros(rows, dtype=torch.int64, device=backbone.device)
        query = torch.zeros(rows, backbone.kv_heads * backbone.head_width, device=backbone.device)
        if self._by_text:
            query = torch.full((rows, config.segment), -1, dtype=torch.int32, device=backbone.device)
        width = query.shape[1] if self._embedder is None else self._embedder.width
        sizes, quirks = (config.chunk, config.memory_tokens), (config.short_chunks, config.eviction == "halve")
        return MemLongState(
            memory=TextMemory.empty(like, width, *sizes, *quirks),
            window=empty_cache(backbone, rows, config.window) if config.window else None,
            query=query,
            asked=torch.zeros_like(read, dtype=torch.bool),
            read=read,
            host_seeds=row_seeds(rows, seeds) if config.selection == "random" else None,
        )

    def step(self, state: MemLongState, segment: Segment, *, write: bool = True) -> tuple[Readout, MemLongState]:
        """See `MemoryModel.step`."""
        hidden, own, query = self._through(state, segment, state.window)
        return Readout(hidden, self.backbone.head), self._written(state, segment, own, query) if write else state

    def embed_text(self, ids: Tensor) -> Tensor:
        """Unit vectors ``[texts, width]`` float32 of `ids` ``[texts, tokens]``; negative ids are no tokens."""
        assert self._embedder is not None
        return self._embedder(ids)

    def query_text(self, state: MemLongState, segment: Segment) -> Tensor:
        """What a segment is searched for by, ``[rows, tokens]``, -1 for none (search "text")."""
        if self._whole:
            return segment.ids.masked_fill(~segment.mask, -1)
        return searched(state.query, state.asked, segment)[0]

    def find(self, state: MemLongState, segment: Segment, query: Callable[[], Tensor]) -> Found | None:
        """What a segment retrieves by the vectors ``query()`` ``[rows, width]``, made where there is a choice."""
        memory, config = state.memory, self.config
        can = memory.older_than(config.window) if self.layers else memory.real[:, :0]
        most = int(can.sum(dim=1).max()) if can.numel() else 0
        if not most:
            return None
        count = min(config.retrieved_chunks, most)
        if state.host_seeds is not None:
            once = torch.ones_like(can[:, :1])
            best = draw_slots(can, count, once, 1, state.host_seeds, state.read)[:, 0, 0]
        else:
            chosen = most > config.retrieved_chunks
            alike = (memory.index @ query()[:, :, None]).squeeze(2) if chosen else memory.index.new_zeros(can.shape)
            order = alike.masked_fill(~can, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :count]
            best = order.masked_fill(~can.gather(1, order), -1)
        return memory.at(best.sort(dim=1).values, self.backbone.dtype)

    def _vectors(self, ids: Tensor, keys: Tensor) -> Tensor:
        """What chunks are found by, `parts.text_memory.Encode`."""
        if self._by_text:
            return cast(Tensor, self.embed_text(ids.flatten(0, 1)).unflatten(0, ids.shape[:2]))
        by_chunk = keys.transpose(1, 2).flatten(2).unflatten(1, ids.shape[1:]).float()  # [rows, chunks, size, width]
        return F.normalize(by_chunk.sum(dim=2), dim=-1)

    def _through(
        self, state: MemLongState, segment: Segment, past: Past | None, given: tuple[Found | None] | None = None
    ) -> tuple[Tensor, Past, Tensor]:
        """Final hidden states of a segment behind cached tokens, its keys and values, and what it was searched for by.

        It retrieves, or reads what it is `given`.
        """
        backbone, mask = self.backbone, segment.mask
        found = None if given is None else given[0]
        chosen = given is not None
        if not chosen and (self._by_text or state.host_seeds is not None or not self.layers):
            found, chosen = self.find(state, segment, lambda: self.embed_text(self.query_text(state, segment))), True
        where = backbone.positions(mask) if past is None else next_positions(backbone, past, mask)
        keys_at = where if past is None else torch.cat([past.positions, where], dim=1)
        embeds = backbone.embed(segment.ids)
        context = (state, *(x for x in (past, *(given or ())) if x is not None))
        resumed = backbone.resume(embeds, (where, mask, marks(segment, whole=self._whole)), context)
        first = resumed.first
        turn, turn_keys = backbone.rotation(where[:, first:], queries=True), backbone.rotation(keys_at)
        visible = backbone.visible(mask, () if past is None else (past,), first, positions=where)
        hidden = backbone.begin(embeds[:, first:], where[:, first:])
        keys, values, query = [], [], state.query
        for layer in range(backbone.layers):
            frozen = self.config.freeze_below and layer <= self.memory_layer
            with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
                q, k, v = backbone.project(layer, backbone.norm_input(layer, hidden), mask[:, first:])
                k, v = resumed.join(k, v)
                keys.append(k)
                values.append(v)
                if layer == self.memory_layer and not self._by_text:
                    query = searched_keys(state.query, state.asked, segment, k, whole=self._whole)
                    if not chosen:
                        found, chosen = self.find(state, segment, partial(F.normalize, query, dim=-1)), True
                if past is not None:
                    k, v = torch.cat([past.keys[layer], k], dim=2), torch.cat([past.values[layer], v], dim=2)
                q, k = backbone.rotate(q, turn[layer]), backbone.rotate(k, turn_keys[layer])
                if found is None or layer not in self.layers:
                    attended = backbone.attend(q, k, v, visible[layer])
                else:
                    at = chunk_positions(found, self.config.memory_position, self.layers.index(layer))
                    far = backbone.rotate(found.keys, backbone.rotation(at)[layer])
                    gate = self.score_gate[str(layer)] if self.config.gate != "none" else None
                    attended = attend_chunks(backbone, (q, k, v), visible[layer], found, far, gate, self.config.gate)
                hidden = backbone.close(layer, hidden, attended)
        hidden = resumed.finish(backbone.end(hidden))
        return hidden, Past(tuple(keys), tuple(values), mask, where), query

    def _written(self, state: MemLongState, segment: Segment, own: Past, query: Tensor) -> MemLongState:
        """The state after a segment."""
        layer, window, memory = self.memory_layer, state.window, state.memory
        if window is not None:
            window = keep_recent(window.extend(own.detach()), self.config.window)
        if self.layers:
            ids = segment.ids.masked_fill(~segment.mask, -1)
            memory = memory.write(ids, own.keys[layer].detach(), own.values[layer].detach(), self._vectors)
        if self._by_text:
            query, asked = read_last(state.query, state.asked, segment)
        else:
            query, asked = read_keys(state.query, state.asked, segment, query, own.keys[layer])
        return MemLongState(memory, window, query, asked, state.read + segment.lengths, state.host_seeds)

    def _continue(self, state: MemLongState, prompt: Segment, plan: DecodePlan) -> Tensor:
        """As `MemoryModel`; officially every new token retrieves by all text so far, and nothing new is written."""
        if not (self._by_text and self._whole):
            return super()._continue(state, prompt, plan)
        ids, _ = self.continued(state, prompt, plan.new_tokens)
        ended = torch.isin(ids, torch.tensor(plan.stop_ids).to(ids)).long().cumsum(dim=1) > 0
        final = ended.long().argmax(dim=1, keepdim=True)  # a row that ended repeats its last token
        return torch.where(ended, ids.gather(1, final), ids)

    def continued(
        self, state: MemLongState, prompt: Segment, new_tokens: int, look: Look | None = None
    ) -> tuple[Tensor, Tensor]:
        """The official greedy continuation of a prompt: ids ``[rows, new_tokens]``, and the logits that gave them."""

        def choose(text: Tensor) -> tuple[Found | None]:
            vector = self.embed_text(text)
            found = self.find(state, prompt, lambda: vector)
            if look is not None:
                look(vector, found)
            return (found,)

        piece, past = prompt, state.window
        stored = state.memory.ids.flatten(1).long()
        text = torch.cat([stored, prompt.ids.masked_fill(~prompt.mask, -1)], dim=1)
        ids, logits = prompt.ids[:, :0], []
        given = choose(text[:, stored.shape[1] :])
        for number in range(new_tokens):
            if number:
                given = choose(torch.cat([text, ids], dim=1))
            hidden, own, _ = self._through(state, piece, past, given)
            past = own if past is None else past.extend(own)
            logits.append(self.backbone.head(hidden[:, -1]))
            token = logits[-1].argmax(dim=-1, keepdim=True)
            ids, piece = torch.cat([ids, token], dim=1), Segment.full(token)
        return ids, torch.stack(logits, dim=1)

    def flops(self, tokens: int, remembered: int) -> int:
        """See `MemoryModel.flops`; empty slots of the window are computed and masked."""
        backbone, config = self.backbone, self.config
        total = backbone.flops(tokens, keys=config.window + tokens)
        chunks, can = self._held(remembered)
        read = min(config.retrieved_chunks, can) * config.chunk
        total += len(self.layers) * 4 * tokens * read * backbone.heads * backbone.head_width
        if can > config.retrieved_chunks and config.selection == "similarity" and self.layers:
            by_keys = backbone.kv_heads * backbone.head_width
            total += 2 * chunks * (by_keys if self._embedder is None else self._embedder.width)
        return total + self._embed_flops(tokens, remembered)

    def _held(self, remembered: int) -> tuple[int, int]:
        config = self.config
        piece = config.segment if config.short_chunks else None
        sizes = (config.chunk, config.memory_tokens, piece)
        return chunks_held(remembered, *sizes, halve=config.eviction == "halve", hidden=config.window)

    def _embed_flops(self, tokens: int, remembered: int) -> int:
        """Of the embedder, which reads what is searched for by, and every chunk."""
        config, embedder = self.config, self._embedder
        if embedder is None:
            return 0
        new = chunks_written(tokens, remembered, config.chunk, short=config.short_chunks)
        asked = self._held(remembered)[1] > config.retrieved_chunks and config.selection == "similarity"
        query = embedder.flops(tokens if self._whole else config.segment) if asked else 0
        return query + new * embedder.flops(config.chunk)

    def detached_flops(self, tokens: int, remembered: int) -> int:
        """See `MemoryModel.detached_flops`: the embedder, and layers that are frozen."""
        keys, frozen = self.config.window + tokens, range(self.memory_layer + 1 if self.config.freeze_below else 0)
        inside = sum(self.backbone.layer_flops(layer, tokens, keys) for layer in frozen)
        return inside + self._embed_flops(tokens, remembered)
