"""EM-LLM: events that end where the text surprises, retrieved like InfLLM's blocks. Nothing is trained.

InfLLM's attention (`parts/block_model.py`) over blocks that are events of `min_block_size` to `max_block_size` tokens,
as many as fill a budget of tokens; optionally with a contiguity buffer of the events beside those retrieved, and with
ends moved to where the keys around them fall apart best.

Unusual here:

- Surprisal is counted for every token that is written, so writing pays for the head (once more than the prediction).
- Numbers about events are on the host, the same in all layers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from memory_bench.backbone.model import Backbone
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.errors import UserError
from memory_bench.protocol import Readout

from .parts import events
from .parts.block_model import ABLATIONS, BlockModel, BlockState, Pass
from .parts.block_options import BlockOptions


@dataclass(frozen=True, slots=True)
class EMLLMConfig(BlockOptions):
    """Options of EM-LLM; see `BlockOptions`. A call of the official code is an execution block here."""

    local_window: int = 4096
    min_block_size: int = 8  # tokens of an event; a shorter one is joined to the next
    max_block_size: int = 128
    retrieved_tokens: int = 2048  # of events attended to at once [n_mem]; 0: none
    threshold_gamma: float = 1.0  # a token is surprising above mean + gamma * std [surprisal_threshold_gamma]
    boundary_shift: Literal[0, 1] = 1  # 1: an event begins with the surprising token; 0: official, one token earlier
    # Surprisal that the threshold is of, where the window before holds none yet. running: of the tokens before;
    # official: what is there, in the first call of all its tokens (with refinement) or of its first few.
    statistics: Literal["running", "official"] = "running"
    boundary_refinement: bool = False  # move ends of events by the similarity of keys
    refine_with_buffer: bool = True  # which starts at the last end of the call before
    refine_from_layer: int = 20  # keys of the layers from this one on; of the last one, if there are fewer
    similarity_metric: Literal["modularity", "conductance"] = "modularity"
    contiguity_buffer: bool = False  # also attend to the events beside the retrieved ones
    contiguity_buffer_size: float = 0.3  # of the room for events; 1 or more: tokens
    deduplicate: bool = True  # official, off: an event that is also in the buffer is attended to twice

    def __post_init__(self) -> None:
        self.check("emllm", "min_block_size", "max_block_size")
        if self.min_block_size > self.max_block_size:
            raise UserError("emllm: min_block_size must not exceed max_block_size.")
        if self.retrieved_tokens < 0 or self.refine_from_layer < 0 or self.contiguity_buffer_size < 0:
            raise UserError("emllm: retrieved_tokens, refine_from_layer and contiguity_buffer_size are at least 0.")
        if not math.isfinite(self.threshold_gamma):
            raise UserError("emllm: threshold_gamma must be a finite number.")
        if self.contiguity_buffer and self.selection == "token":
            raise UserError(
                "emllm: the contiguity buffer follows one choice of an execution block: it needs selection causal, "
                "official or random."
            )

    @classmethod
    def official(cls) -> "EMLLMConfig":
        """As the code at commit e911d1f with the settings of its configuration files."""
        return cls(selection="official", far_mask="none", boundary_shift=0, statistics="official", deduplicate=False)

    @property
    def history(self) -> int:
        """Tokens whose surprisal is kept: all that can be pending, and a call before the one that ends."""
        return self.local_window + self.max_block_size + 2 * self.execution_block


@dataclass(frozen=True, slots=True)
class EventState(BlockState):
    """What was read, and what is known of its events.

    Attributes:
        last: ``[rows, width]``, final hidden state of the newest token.
        host_surprisal: ``[rows, history]`` float32 nats, the last column is the newest token's; 0: not known.
        host_ends: ``[rows, history]`` bool, likewise: an event begins here.
        host_call: ``[rows, 2]`` int64, the last call: where its pending tokens began, and its tokens.
        host_queue: ``[rows, layers, blocks]`` int64, the contiguity buffer; -1: nothing.
    """

    last: Tensor
    host_surprisal: Tensor
    host_ends: Tensor
    host_call: Tensor
    host_queue: Tensor


class EMLLM(BlockModel[EventState]):
    """EM-LLM: events that end where the text surprises, retrieved by their most attended keys. Nothing is trained.

    Fountas et al., *Human-like Episodic Memory for Infinite Context LLMs* (ICLR 2025).
    """

    Config = EMLLMConfig
    source = (
        "arXiv:2407.09450; em-llm/EM-LLM-model@e911d1f. Deviations by default: those of infllm; an event begins with "
        "the surprising token (official: one earlier), every token read has a surprisal, no event is attended to "
        "twice, the room for events is that of a full call."
    )
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {**ABLATIONS, "nothing retrieved": {"retrieved_tokens": 0}}

    @classmethod
    def fit(cls, card: BackboneCard, budget: Budget) -> EMLLMConfig:
        """Execution blocks and window of the backbone's own window, and as many tokens of events as half of it."""
        del budget
        window = card.window
        shortest = max(2, min(8, window // 16))
        return EMLLMConfig(
            segment=window,
            execution_block=window,
            local_window=window,
            sink_tokens=max(1, min(128, window // 8)),
            min_block_size=shortest,
            max_block_size=max(2 * shortest, min(128, window // 4)),
            retrieved_tokens=max(1, window // 2),
            refine_from_layer=min(20, 2 * card.layers // 3),
        )

    def __init__(self, backbone: Backbone, config: EMLLMConfig, rng: torch.Generator) -> None:
        super().__init__(backbone, config, rng)
        self.refined_layers = range(min(config.refine_from_layer, backbone.layers - 1), backbone.layers)

    def open(self, rows: int, *, seeds: Sequence[int] | None = None) -> EventState:
        """See `MemoryModel.open`."""
        backbone, history = self.backbone, self.config.history
        return EventState(
            **self.open_store(rows, seeds),
            last=torch.zeros(rows, backbone.width, device=backbone.device, dtype=backbone.dtype),
            host_surprisal=torch.zeros(rows, history),
            host_ends=torch.zeros(rows, history, dtype=torch.bool),
            host_call=torch.zeros(rows, 2, dtype=torch.long),
            host_queue=torch.full((rows, backbone.layers, 0), -1),
        )

    @property
    def retrieves(self) -> bool:
        """See `BlockModel.retrieves`."""
        return bool(self.config.retrieved_tokens)

    def _room(self, overflow: int, sinks: int) -> int:
        """Tokens of events that fit, beside so many far pending tokens and sinks."""
        config = self.config
        room = config.sink_tokens + config.execution_block + config.retrieved_tokens - overflow - sinks
        return max(0, room) if self.retrieves else 0

    def _buffer(self, room: int) -> int:
        """Of the room, tokens of the contiguity buffer."""
        config, size = self.config, self.config.contiguity_buffer_size
        if not (config.contiguity_buffer and self.retrieves):
            return 0
        return int(size) if size >= 1 else int(size * room + 1)

    def _call(self, tokens: int) -> int:
        """Tokens that the room is counted for: by default of a full call, so that what follows has no influence."""
        return tokens if self.config.selection == "official" else int(self.config.execution_block)

    def choose(self, state: EventState, layer: int, scores: Tensor, tokens: Tensor) -> tuple[Tensor, list[list[int]]]:
        """Events by score until they fill their room, and the contiguity buffer; see `BlockModel.choose`."""
        store, window = state.store, self.config.local_window
        if not store.host_sizes.shape[1]:
            return torch.zeros(scores.shape, dtype=torch.long, device=scores.device), [[] for _ in tokens]
        overflow = store.host_read - store.pending_start + torch.tensor([self._call(n) for n in tokens.tolist()])
        pairs = zip((overflow - window).clamp(min=0).tolist(), store.host_sinks.tolist(), strict=True)
        rooms = [self._room(*pair) for pair in pairs]
        buffers = [self._buffer(room) for room in rooms]
        similar = [room - buffer for room, buffer in zip(rooms, buffers, strict=True)]
        order = scores.argsort(dim=-1, descending=True, stable=True)
        sizes = store.host_sizes.to(scores.device)[:, None, None].expand_as(order).gather(-1, order)
        room = torch.tensor(similar, device=scores.device)[:, None, None].expand(order.shape[:3])
        count = events.taken(sizes, room) if self.retrieves else torch.zeros_like(room)
        first = torch.arange(order.shape[-1], device=order.device) < count[..., None]
        times = torch.zeros_like(order).scatter(-1, order, first.long())
        if not self.config.contiguity_buffer:
            return times, []
        queues = []
        for row, buffer in enumerate(buffers):
            old = [block for block in state.host_queue[row, layer].tolist() if block >= 0]
            selected = order[row, 0, 0, : int(count[row, 0, 0])].tolist()
            known = store.host_sizes[row, : int(store.counts[row])].tolist()
            queue = events.neighbours(selected, known, old, buffer) if self.retrieves else []
            queues.append(list(dict.fromkeys(queue)) if self.config.deduplicate else queue)
            for block in queues[-1]:
                times[row, :, :, block] += 1
        return times.clamp(max=1) if self.config.deduplicate else times, queues

    def widths(self, read: int, tokens: int) -> tuple[int, int, int]:
        """See `BlockModel.widths`: bounds, because what is pending depends on the text."""
        config = self.config
        left = max(0, read - config.local_window)
        sinks = min(config.sink_tokens, left)
        stored = left - sinks
        pending = min(max(0, read + tokens - config.local_window - sinks), read - sinks)
        pending = min(pending, config.max_block_size - 1 + tokens)
        if not self.retrieves:
            return 0, pending, 0
        full = max(0, min(config.local_window, read - sinks) + self._call(tokens) - config.local_window)
        room = self._room(full, sinks)
        over = config.max_block_size // 2
        most = room + over + (over if config.contiguity_buffer else 0)
        if config.contiguity_buffer and config.contiguity_buffer_size >= 1:
            most += int(config.contiguity_buffer_size)
        repeated = stored > 0 and not config.deduplicate  # as often as they fit
        chosen = stored if config.selection == "token" else most if repeated else min(stored, most)
        return chosen, pending, (left - sinks) // config.min_block_size

    @torch.no_grad()
    def remember(self, state: EventState, after: EventState, done: Pass) -> EventState:
        """Surprisal of the new tokens, the ends of events in the call that is complete, then sinks and blocks."""
        after = self._surprised(state, after, done)
        config, tokens = self.config, done.part.mask.sum(dim=1)
        shift, ends = config.boundary_shift, after.host_ends.clone()
        before = state.store.pending_start
        for row, new in enumerate(tokens.tolist()):
            if new:
                # With the token behind its last one the call before is complete; with a shift, this one is already.
                call = (int(before[row]), new) if shift else tuple(state.host_call[row].tolist())
                self._find_ends(after, ends, row, call, int(after.store.host_read[row]) - (0 if shift else new))
        calls = torch.where((tokens > 0)[:, None], torch.stack([before, tokens], dim=1), state.host_call)
        after = replace(after, host_ends=ends, host_call=calls, host_queue=self._queued(state, done))
        store = after.store
        left = (store.host_read - config.local_window).clamp(min=0)
        sinks = left.clamp(max=config.sink_tokens)
        lengths = (left - sinks - store.host_sizes.sum(dim=1)).tolist()
        sizes = [self._blocks(after, ends[row], row, length) for row, length in enumerate(lengths)]
        return replace(after, store=store.cut(sinks, sizes, config.representative_tokens))

    def _blocks(self, state: EventState, ends: Tensor, row: int, length: int) -> list[int]:
        """Sizes of the new blocks of a row, of which `length` pending tokens have left the window."""
        config, window = self.config, self.config.local_window
        if length < config.min_block_size:
            return []
        stop = config.history - window  # the window's tokens are behind this column
        inside = ends[stop - length : stop].nonzero()[:, 0].tolist()
        return events.blocks_of(inside, length, config.min_block_size, config.max_block_size)

    def _surprised(self, state: EventState, after: EventState, done: Pass) -> EventState:
        """With the surprisal of the new tokens, whose predictions begin with the token before them."""
        mask, history = done.part.mask, self.config.history
        hidden = torch.cat([state.last[:, None], done.hidden[:, :-1]], dim=1)
        surprisal = -Readout(hidden, self.backbone.head).logprobs(done.ids).cpu()
        known = mask & ((state.store.host_read > 0)[:, None] | (torch.arange(mask.shape[1]) > 0))
        surprisal = torch.where(known, surprisal, 0.0)
        tokens = mask.sum(dim=1)
        column = torch.arange(history) + tokens[:, None]  # of old and new side by side, padding behind

        def extended(old: Tensor, new: Tensor) -> Tensor:
            return torch.cat([old, new], dim=1).gather(1, column)

        newest = done.hidden[torch.arange(len(tokens)), (tokens - 1).clamp(min=0).to(done.hidden.device)]
        some = (tokens > 0).to(newest.device)[:, None]
        return replace(
            after,
            last=torch.where(some, newest, state.last),
            host_surprisal=extended(state.host_surprisal, surprisal),
            host_ends=extended(state.host_ends, torch.zeros_like(mask)),
        )

    def _find_ends(self, state: EventState, ends: Tensor, row: int, call: tuple[int, ...], stop: int) -> None:
        """Mark where events begin in a row's `call` (first pending token, tokens) that ended before token `stop`."""
        config = self.config
        first, tokens = call
        if not tokens:
            return
        read, start = int(state.store.host_read[row]), stop - tokens
        newest = config.history - read + (1 - config.boundary_shift)  # column of a place's surprisal, less the place
        surprisal = state.host_surprisal[row]

        def of(low: int, high: int) -> Tensor:
            return surprisal[max(0, newest + low) : max(0, newest + high)]

        values = of(start, stop)
        if config.statistics == "official":
            found = events.surprising(values, self._official(of, first, start, stop), config.threshold_gamma)
        else:
            # The first token of a text has no surprisal.
            low = max(stop - config.local_window, first, config.boundary_shift)
            before = of(low, start) if low < start else values[:0]
            skipped = max(0, config.boundary_shift - start)
            found = (
                events.surprising(values, before, config.threshold_gamma)
                if len(before) > 1
                else [n + skipped for n in events.surprising_so_far(values[skipped:], config.threshold_gamma)]
            )
        if found and config.boundary_refinement:
            found = self._refined(state, ends, row, first, start, stop, found)
        ends[row, config.history - read + torch.tensor([start + n for n in found], dtype=torch.long)] = True

    def _official(self, of: Any, first: int, start: int, stop: int) -> Tensor:
        """The surprisal that the official code's threshold is of."""
        config = self.config
        if config.boundary_refinement and not start:
            values: Tensor = of(start, stop)
            return values
        low = max(stop - config.local_window, first)
        high = min(max(start, first + config.sink_tokens), stop)
        if high <= low:
            return torch.zeros(0)
        values = of(low, high).clone()
        if config.boundary_refinement and high > start:
            values[start - low :] = 0.0  # not yet known there
        return values

    def _refined(
        self, state: EventState, ends: Tensor, row: int, first: int, start: int, stop: int, found: list[int]
    ) -> list[int]:
        """The ends `found` in a call, moved."""
        config, tokens, before = self.config, stop - start, 0
        if config.refine_with_buffer and stop - first >= 2 * tokens:
            column = config.history - int(state.store.host_read[row]) + start
            known = ends[row, max(0, column - tokens) : column].nonzero()[:, 0]
            before = min(tokens, column) - int(known[-1]) if len(known) else 0
        store = state.store
        parts = [store.keys[n][row, :, start - before : stop].float() for n in self.refined_layers]
        similarity = torch.stack([(k @ k.transpose(1, 2)).sum(dim=0) for k in parts]).sum(dim=0).cpu()
        return events.refined(found, similarity, before, config.min_block_size, config.similarity_metric)

    def _queued(self, state: EventState, done: Pass) -> Tensor:
        """The contiguity buffers after a call."""
        if not self.config.contiguity_buffer:
            return state.host_queue
        some = done.part.mask.any(dim=1).tolist()
        olds = [[[b for b in old if b >= 0] for old in row] for row in state.host_queue.tolist()]
        rows = [[new[n] for new in done.queue] if some[n] else row for n, row in enumerate(olds)]
        width = max(len(queue) for row in rows for queue in row)
        return torch.tensor([[[*queue, *[-1] * (width - len(queue))] for queue in row] for row in rows])

    def flops(self, tokens: int, remembered: int) -> int:
        """As `BlockModel.flops`, with the head for the surprisal of what is written."""
        return super().flops(tokens, remembered) + self._surprisal_flops(tokens)

    def detached_flops(self, tokens: int, remembered: int) -> int:
        """As `BlockModel.detached_flops`, with the surprisal."""
        return super().detached_flops(tokens, remembered) + self._surprisal_flops(tokens)

    def _surprisal_flops(self, tokens: int) -> int:
        calls = -(-tokens // self.config.execution_block)  # each asks the head how long its answers are
        return int(2 * (tokens + calls) * self.backbone.width * self.backbone.vocab)
