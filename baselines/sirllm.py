"""SirLLM: attention sinks and recent tokens as in StreamingLLM, and beside them the tokens that surprised most.

Unusual here:

- A token's score is its surprisal, of the first token of a segment by the last prediction before it. Officially
  (`token_score="repeat"`) it is the surprisal of seeing the token before it once more, which is nobody's, and the first
  token of a segment gets the segment's largest.
- Room is made for a whole segment, so that what a token sees does not depend on how much text follows. Officially
  (`room="tokens"`) it is made for the tokens that come, out of the scored ones: long texts leave only recent tokens.
- Scores only say what is dropped later: a prediction never depends on later text.
- Positions are places in the cache, which close up when tokens are dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from memory_bench.axes import Axes
from memory_bench.backbone.model import Backbone, Past
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.choices import check_choices
from memory_bench.errors import UserError
from memory_bench.protocol import MemoryModel, Readout, Segment, State, Traits

from .parts.cache import empty_cache, keep, next_positions


@dataclass(frozen=True, slots=True)
class SirLLMConfig:
    """Options of `SirLLM`; the official code's names in brackets."""

    segment: int = 256  # text tokens per step, of which `scored` loses as many while they are read
    sinks: int = 4  # first tokens of the stream, kept for ever [start_size]
    recent: int = 0  # last tokens kept, at least where nothing else needs the room [recent_size]
    scored: int = 1020  # tokens kept by their score [token_entropy_size]
    decay: float = 1.0  # of all scores, a segment [decay_ratio]
    token_score: Literal["surprisal", "repeat"] = "surprisal"  # official: repeat
    room: Literal["segment", "tokens"] = "segment"  # how many tokens there must be room for; official: tokens

    def __post_init__(self) -> None:
        if self.segment < 1 or min(self.sinks, self.recent, self.scored) < 0 or not 0 <= self.decay <= 1:
            raise UserError("sirllm: segment must be at least 1, sizes at least 0, and decay between 0 and 1.")
        if self.segment > self.recent + self.scored:
            room = self.recent + self.scored
            raise UserError(f"sirllm: a segment of {self.segment} tokens needs recent + scored of as many, not {room}.")
        check_choices("sirllm", self)

    @classmethod
    def official(cls) -> "SirLLMConfig":
        """As the official code for the grocery-shopping dialogues (others: decay 0.7 and 0.9, scored 508)."""
        return cls(token_score="repeat", room="tokens")

    @property
    def size(self) -> int:
        """Tokens that the cache holds."""
        return self.sinks + self.recent + self.scored


@dataclass(frozen=True, slots=True)
class SirLLMState(State):
    """The tokens kept, the same in all layers, oldest first; unused slots come last.

    Attributes:
        cache: their keys (before rotary) and values, `SirLLMConfig.size` slots.
        scores: ``[rows, size]`` float32; 0 in unused slots.
        places: ``[rows, size]`` int64, where in the text they are.
        read: ``[rows]`` int64, tokens read.
        last: ``[rows, width]``, the final hidden state of the last token; 0 where nothing was read.
    """

    cache: Past
    scores: Tensor
    places: Tensor
    read: Tensor
    last: Tensor

    def kept(self, kept: Tensor, slots: int) -> "SirLLMState":
        """Only the entries in `kept` ``[rows, cached]`` bool, in their order, in `slots` slots."""
        cache, order = keep(self.cache, kept, slots)
        missing = max(0, slots - kept.shape[1])
        scores, places = (F.pad(x, (0, missing)).gather(1, order) * cache.mask for x in (self.scores, self.places))
        return SirLLMState(cache, scores, places, self.read, self.last)


class SirLLM(MemoryModel[SirLLMState]):
    """The backbone over sinks, surprising and recent tokens and the current segment. Adds no parameters."""

    Config = SirLLMConfig
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("llama",)  # learned absolute positions are part of a cached key
    source: ClassVar[str] = (
        "Yao, Li & Zhao, SirLLM (arXiv 2405.12528); Zoeyyao27/SirLLM@4c95578. Deviations by default: a token's score "
        "is its own surprisal; room is made for a whole segment; rows of any number and with padding; a text longer "
        "than a segment is read in pieces, where the official code stops."
    )
    axes = Axes(
        unit="token kv", capacity="fixed", overflow="drop least surprising", write="direct", read="all",
        inject="all layers", fusion="one softmax", order="kept",
    )  # fmt: skip

    def __init__(self, backbone: Backbone, config: SirLLMConfig, rng: torch.Generator) -> None:
        super().__init__()
        del rng  # nothing to initialise
        self.backbone = backbone
        self.config = config
        self.traits = Traits(segment=config.segment)

    @classmethod
    def fit(cls, card: BackboneCard, budget: Budget) -> SirLLMConfig:
        """As many tokens in all as `SlidingWindow`: 4 sinks, a window of others, half of them the last ones."""
        del budget
        recent = card.window // 2
        return SirLLMConfig(segment=card.window, recent=recent, scored=2 * card.window - recent)

    def open(self, rows: int, *, seeds: Sequence[int] | None = None) -> SirLLMState:
        """See `MemoryModel.open`; nothing is drawn."""
        del seeds
        backbone, size = self.backbone, self.config.size
        cache = empty_cache(backbone, rows, size)
        nothing = torch.zeros(rows, size, device=backbone.device)
        return SirLLMState(
            cache=cache,
            scores=nothing,
            places=nothing.long(),
            read=nothing.new_zeros(rows, dtype=torch.int64),
            last=torch.zeros(rows, backbone.width, device=backbone.device, dtype=backbone.dtype),
        )

    def step(self, state: SirLLMState, segment: Segment, *, write: bool = True) -> tuple[Readout, SirLLMState]:
        """See `MemoryModel.step`; a text longer than a segment is read in pieces, each of which makes room."""
        size, tokens = self.config.segment, segment.ids.shape[1]
        before, parts = state, []
        for start in range(0, tokens, size):
            piece = Segment(segment.ids[:, start : start + size], segment.mask[:, start : start + size])
            hidden, state = self._piece(state, piece, write=write or start + size < tokens)
            parts.append(hidden)
        hidden = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return Readout(hidden, self.backbone.head), state if write else before

    def _piece(self, state: SirLLMState, segment: Segment, *, write: bool) -> tuple[Tensor, SirLLMState]:
        """Final hidden states ``[rows, tokens, width]`` of at most a segment, and the state after it."""
        room = self.with_room(state, segment)
        where = next_positions(self.backbone, room.cache, segment.mask)
        embeds = self.backbone.embed(segment.ids)
        hidden, own = self.backbone.run_cached(embeds, segment.mask, room.cache, positions=where, keep=write)
        if own is None:
            return hidden, state
        scores = self._scores(state, hidden.detach(), segment)
        some, lengths = segment.mask.any(dim=1), segment.lengths
        places = (state.read[:, None] + segment.mask.long().cumsum(dim=1) - 1).clamp(min=0)
        last = hidden.detach().gather(1, _last_place(segment.mask)[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0]
        grown = SirLLMState(
            cache=room.cache.extend(own.detach()),
            scores=torch.cat([room.scores, scores], dim=1),
            places=torch.cat([room.places, places], dim=1),
            read=state.read + lengths,
            last=torch.where(some[:, None], last, state.last),
        )
        return hidden, grown.kept(grown.cache.mask, self.config.size)

    def with_room(self, state: SirLLMState, segment: Segment) -> SirLLMState:
        """The entries that `segment` is read with, their scores decayed; a row without tokens keeps all it has.

        Dropped are, where there is no room, all but the best scored, the sinks and, in what room is left, the newest.
        """
        config, cache = self.config, state.cache
        comes = segment.lengths[:, None]  # [rows, 1]
        reads = comes > 0
        room = torch.full_like(comes, config.segment) if config.room == "segment" else comes
        count = cache.mask.sum(dim=1, keepdim=True)
        slot = torch.arange(config.size, device=count.device).expand_as(cache.mask)
        order = state.scores.masked_fill(~cache.mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
        kept = cache.mask & (order.argsort(dim=1) < config.scored - room)  # [rows, slots], by rank of score
        kept |= cache.mask & (slot < config.sinks)
        left = config.size - room - kept.sum(dim=1, keepdim=True)
        others = cache.mask & ~kept & (slot > 0)  # the official code never comes to the first
        newer = others.flip(1).long().cumsum(dim=1).flip(1)  # [rows, slots], of those from here on
        kept |= others & (newer <= left)
        kept = torch.where(reads & (count + room > config.size), kept, cache.mask)
        # A row that reads nothing here is not read either, and `_piece` gives it back all it had.
        slots = config.size - (config.segment if config.room == "segment" else int(comes.min()))
        decayed = torch.where(reads & (count > 0), state.scores * config.decay, state.scores)
        whole = SirLLMState(cache, decayed, state.places, state.read, state.last)
        return whole.kept(kept, config.size if bool((~reads).any()) else slots)

    @torch.no_grad()
    def _scores(self, state: SirLLMState, hidden: Tensor, segment: Segment) -> Tensor:
        """``[rows, tokens]`` float32 of a segment's tokens, given its final hidden states and the state before it."""
        mask, ids, head = segment.mask, segment.ids, self.backbone.head
        real = mask.long().cumsum(dim=1)  # [rows, tokens], from 1
        earlier = torch.where(mask, torch.arange(ids.shape[1], device=ids.device), -1).cummax(dim=1).values
        earlier = torch.cat([torch.full_like(earlier[:, :1], -1), earlier[:, :-1]], dim=1)  # the token before
        at = earlier.clamp(min=0)
        if self.config.token_score == "repeat":
            again = -Readout(hidden, head).logprobs(ids)
            found = again.gather(1, at)
            return torch.where(real == 1, again.masked_fill(~mask, 0.0).amax(dim=1, keepdim=True), found) * mask
        predicting = hidden.gather(1, at[:, :, None].expand(-1, -1, hidden.shape[2]))
        predicting = torch.where((earlier < 0)[:, :, None], state.last[:, None], predicting)
        found = -Readout(predicting, head).logprobs(ids)
        known = (state.read > 0)[:, None] | (real > 1)  # the stream's first token was not predicted
        return found * (mask & known)

    def flops(self, tokens: int, remembered: int) -> int:
        """See `MemoryModel.flops`; the head runs once more for the scores, and empty slots are computed and masked."""
        del remembered
        size, room = self.config.size, self.config.room
        total, done = 0, 0
        while done < tokens:
            piece = min(self.config.segment, tokens - done)
            slots = size - (self.config.segment if room == "segment" else piece)
            total += self.backbone.flops(piece, keys=slots + piece)
            done += piece
        return total + self._score_flops(tokens)

    def _score_flops(self, tokens: int) -> int:
        pieces = -(-tokens // self.config.segment)  # `Readout.logprobs` looks at one more position, for the vocabulary
        return 2 * (tokens + pieces) * self.backbone.width * self.backbone.vocab

    def detached_flops(self, tokens: int, remembered: int) -> int:
        """See `MemoryModel.detached_flops`: the scores."""
        del remembered
        return self._score_flops(tokens)


def _last_place(mask: Tensor) -> Tensor:
    """``[rows]``: the place of each row's last real token; any where it has none."""
    return torch.where(mask, torch.arange(mask.shape[1], device=mask.device), 0).amax(dim=1)
