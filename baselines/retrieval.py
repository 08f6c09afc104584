"""Retrieval: chunks of the text read are kept as tokens, and those that match best are put before the segment.

Unusual here:

- The window is that of `truncation`: what is retrieved and the segment share it (by default half each), so neither
  sees more text at once than the other. Equal windows, not equal segments, are what a comparison needs.
- A segment is searched for by its question (`Segment.given`), continued from the segment before if it began there;
  where nothing is given, by the text of the segment before. Never by text that is being predicted.
- Nothing but `exclude` keeps a chunk from being found, so text that is merely read mostly finds the chunks just before
  it, which are made of the very words searched for: the recent past, unless something older resembles it more.
- Positions are counted through the retrieved text and on; a masked blank after every chunk keeps the key shift of the
  `tiny` backbone from mixing keys of texts that are not neighbours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from memory_bench.axes import Axes
from memory_bench.backbone.embedder import Embedder
from memory_bench.backbone.model import Backbone
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.choices import check_choices
from memory_bench.errors import UserError
from memory_bench.protocol import MemoryModel, Readout, Segment, State, Traits

from .parts.bm25 import BM25
from .parts.drawing import draw_slots, row_seeds
from .parts.questions import last, read_last, searched

LARGE = 256  # windows from this size retrieve four chunks, smaller ones two


@dataclass(frozen=True, slots=True)
class RetrievalConfig:
    """Options of `Retrieval`; a prediction sees ``segment + chunk * retrieved`` tokens at most."""

    segment: int = 256  # tokens per step
    chunk: int = 64  # tokens of a chunk
    retrieved: int = 4  # chunks put before a segment
    search: Literal["bm25", "minilm"] = "bm25"  # by terms, or by sentence embeddings (all-MiniLM-L6-v2)
    chunks: int | None = None  # kept at most, the oldest are dropped; None: all
    exclude: int = 0  # the last so many chunks are not retrieved
    selection: Literal["best", "random"] = field(default="best", metadata={"left_out": True})  # random: a control

    def __post_init__(self) -> None:
        check_choices("retrieval", self)
        if min(self.segment, self.chunk, self.retrieved) < 1 or self.exclude < 0:
            raise UserError("retrieval: segment, chunk and retrieved must be at least 1, and exclude at least 0.")
        if self.chunks is not None and self.chunks < 1:
            raise UserError("retrieval: chunks must be at least 1; leave it out to keep all.")


@dataclass(frozen=True, slots=True)
class Chunks(State):
    """Consecutive chunks of every row.

    Attributes:
        ids: ``[rows, chunks, chunk]`` int32; -1 where a row has no chunk.
        keys: ``[rows, chunks, ...]``, what the search keeps of each.
    """

    ids: Tensor
    keys: Tensor


@dataclass(frozen=True, slots=True)
class RetrievalState(State):
    """What was read.

    Attributes:
        blocks: chunks in reading order; states share them instead of copying.
        pending: ``[rows, chunk - 1]`` int32, tokens that fill no chunk yet, last ones right; -1: none.
        query: ``[rows, segment]`` int32, the last text that can be searched for, last ones right; -1: none.
        asked: ``[rows]`` bool, whether that is a question rather than text.
        host_drawn: ``[rows, 2]`` int64, seed and tokens read of random selections; None: nothing is drawn.
    """

    blocks: tuple[Chunks, ...]
    pending: Tensor
    query: Tensor
    asked: Tensor
    host_drawn: Tensor | None = None


class Cosine:
    """Search by sentence embeddings: a chunk's is computed once, when it is written; a query's at every search."""

    def __init__(self, embedder: Embedder, chunk: int) -> None:
        self.embedder = embedder
        self.chunk = chunk

    def keys(self, ids: Tensor) -> Tensor:
        """Unit vectors ``[rows, chunks, width]`` of `ids` ``[rows, chunks, chunk]``; 0 where there is no chunk."""
        found = torch.zeros(*ids.shape[:2], self.embedder.width, device=ids.device)
        real = ids[:, :, 0] >= 0
        found[real] = self.embedder(ids[real])
        return found

    def scores(self, ids: Tensor, keys: Tensor, query: Tensor) -> Tensor:
        """Cosines ``[rows, chunks]`` of chunks and `query` ``[rows, tokens]`` (negative ids are no tokens)."""
        del ids
        return (keys @ self.embedder(query)[:, :, None]).squeeze(2)

    def write_flops(self, chunks: int) -> int:
        """Operations of `keys`."""
        return chunks * self.embedder.flops(self.chunk)

    def query_flops(self, chunks: int, tokens: int) -> int:
        """Operations of `scores`."""
        return self.embedder.flops(tokens) + 2 * chunks * self.embedder.width


class Retrieval(MemoryModel[RetrievalState]):
    """The backbone on a segment and on the chunks of earlier text that match the question best.

    Raises:
        UserError: the window is longer than the backbone has positions, or there is no embedder to search with.
    """

    Config = RetrievalConfig
    version: ClassVar[int] = 1
    source: ClassVar[str] = (
        "Retrieved text before the input as in in-context retrieval-augmented language models (arXiv 2302.00083), the "
        "corpus being the stream's own past; BM25 by Robertson & Zaragoza (2009), or all-MiniLM-L6-v2. Deviation: "
        "once a segment instead of every few tokens."
    )
    axes = Axes(
        unit="text", capacity="grows", write="direct", read="by similarity per segment", inject="text",
        fusion="one softmax", order="coarse",
    )  # fmt: skip

    def __init__(self, backbone: Backbone, config: RetrievalConfig, rng: torch.Generator) -> None:
        super().__init__()
        del rng  # nothing to initialise
        self.backbone = backbone
        self.config = config
        before = config.chunk * config.retrieved
        limit = backbone.max_positions
        if limit is not None and config.segment + before > limit:
            raise UserError(
                f"retrieval needs {config.segment + before} positions, but the backbone has {limit}: lower segment "
                f"({config.segment}), chunk ({config.chunk}) or retrieved ({config.retrieved})."
            )
        self.search: BM25 | Cosine = BM25(backbone.vocab)
        if config.search == "minilm":
            if backbone.embedder is None:
                raise UserError("retrieval: search = minilm needs an embedder beside the backbone; use search = bm25.")
            self.search = Cosine(backbone.embedder, config.chunk)
        self.traits = Traits(segment=config.segment, bounded=config.chunks is not None)
        self.gap = 1 if len(backbone.key_shift) else 0

    @classmethod
    def fit(cls, card: BackboneCard, budget: Budget) -> RetrievalConfig:
        """The backbone's own window, half of it for what is retrieved."""
        del budget
        count = 4 if card.window >= LARGE else 2
        chunk = max(1, card.window // 2 // count)
        return RetrievalConfig(segment=max(1, card.window - chunk * count), chunk=chunk, retrieved=count)

    @classmethod
    def helpers(cls, config: RetrievalConfig) -> Mapping[str, str]:
        """See `MemoryModel.helpers`."""
        return {"minilm": "search=bm25"} if config.search == "minilm" else {}

    def added_parameters(self) -> int:
        """With the embedder's; BM25 has none."""
        return super().added_parameters() + (self.search.embedder.parameters if isinstance(self.search, Cosine) else 0)

    def open(self, rows: int, *, seeds: Sequence[int] | None = None) -> RetrievalState:
        """See `MemoryModel.open`. With a limit, all slots are there from the start: the size is constant."""

        def nothing(*shape: int) -> Tensor:
            return torch.full((rows, *shape), -1, dtype=torch.int32, device=self.backbone.device)

        ids = nothing(self.config.chunks or 0, self.config.chunk)
        blocks = (Chunks(ids, self.search.keys(ids)),) if self.config.chunks else ()
        pending, query = nothing(self.config.chunk - 1), nothing(self.config.segment)
        drawn = F.pad(row_seeds(rows, seeds)[:, None], (0, 1)) if self.config.selection == "random" else None
        return RetrievalState(blocks, pending, query, torch.zeros_like(query[:, 0], dtype=torch.bool), drawn)

    def step(self, state: RetrievalState, segment: Segment, *, write: bool = True) -> tuple[Readout, RetrievalState]:
        """See `MemoryModel.step`."""
        found = F.pad(self.retrieve(state, segment), (0, self.gap), value=-1).flatten(1)  # [rows, before]
        own = segment.ids.masked_fill(~segment.mask, -1)
        ids = torch.cat([found.long(), own], dim=1)
        hidden = self.backbone.run(self.backbone.embed(ids.clamp(min=0)), ids >= 0)[:, found.shape[1] :]
        return Readout(hidden, self.backbone.head), self.absorb(state, segment) if write else state

    def retrieve(self, state: RetrievalState, segment: Segment) -> Tensor:
        """The chunks put before `segment`, ``[rows, n, chunk]`` in reading order; -1 where a row has fewer.

        The more recent of equal ones wins, so chunks that share nothing with the query give way to recent ones.
        """
        if not state.blocks:
            return state.query.new_zeros(len(state.query), 0, self.config.chunk)
        chunks = _cat(state.blocks)
        real = chunks.ids[:, :, 0] >= 0
        later = real.flip(1).long().cumsum(dim=1).flip(1)  # [rows, chunks]: this one and those after it
        can = real & (later > self.config.exclude)
        slots = can.shape[1]
        if slots <= self.config.retrieved:
            return chunks.ids.masked_fill(~can[..., None], -1)
        if state.host_drawn is not None:
            once = torch.ones_like(can[:, :1])
            seeds, reads = state.host_drawn.unbind(dim=1)
            drawn = draw_slots(can, self.config.retrieved, once, 1, seeds, reads)[:, 0, 0]
            best = drawn.sort(dim=1).values
            return _take(chunks.ids, best.clamp(min=0)).masked_fill((best < 0)[..., None], -1)
        query = last(searched(state.query, state.asked, segment)[0], self.config.segment)
        scores = self.search.scores(chunks.ids, chunks.keys, query)
        order = scores.masked_fill(~can, -torch.inf).flip(1).argsort(dim=1, descending=True, stable=True)
        best = (slots - 1 - order[:, : self.config.retrieved]).sort(dim=1).values  # [rows, retrieved]
        return _take(chunks.ids, best).masked_fill(~can.gather(1, best)[..., None], -1)

    def absorb(self, state: RetrievalState, segment: Segment) -> RetrievalState:
        """The state after reading: tokens are cut into chunks and kept; the backbone is not run."""
        size = self.config.chunk
        own = segment.ids.masked_fill(~segment.mask, -1).int()
        text = torch.cat([state.pending, own], dim=1)
        order = (text < 0).int().argsort(dim=1, stable=True)
        text = text.gather(1, order)  # real ones first, in order
        full = (text >= 0).sum(dim=1) // size  # [rows]: chunks that are complete now
        count = int(full.max())
        ids = text[:, : count * size].unflatten(1, (count, size)) if count else text.new_zeros(len(text), 0, size)
        ids = ids.masked_fill((torch.arange(count, device=ids.device) >= full[:, None])[..., None], -1)
        rest = text.masked_fill(torch.arange(text.shape[1], device=ids.device) < (full * size)[:, None], -1)
        return RetrievalState(
            self._keep(state.blocks, ids) if count else state.blocks,
            last(rest, size - 1).clone(),  # a part of `rest` would keep all of it
            *read_last(state.query, state.asked, segment),
            None if state.host_drawn is None else state.host_drawn + F.pad(segment.lengths.cpu()[:, None], (1, 0)),
        )

    def _keep(self, blocks: tuple[Chunks, ...], ids: Tensor) -> tuple[Chunks, ...]:
        """`blocks` and the new chunks `ids` ``[rows, n, chunk]``."""
        new = Chunks(ids, self.search.keys(ids))
        if self.config.chunks is None:
            # A block joins an equally long one, so there are few, and a chunk is copied log2(chunks) times at most.
            while blocks and blocks[-1].ids.shape[1] <= new.ids.shape[1]:
                blocks, new = blocks[:-1], _cat((blocks[-1], new))
            return (*blocks, new)
        both = _cat((*blocks, new))
        order = (both.ids[:, :, 0] >= 0).int().argsort(dim=1, stable=True)[:, -self.config.chunks :]  # real ones last
        return (Chunks(_take(both.ids, order), _take(both.keys, order)),)

    def flops(self, tokens: int, remembered: int) -> int:
        """The backbone over what is retrieved and the segment, and the search. See `MemoryModel.flops`.

        BM25 has no matrix products, which alone are counted; an embedder's are.
        """
        chunks, inputs = self._chunks(remembered), self._inputs(tokens, remembered)
        searches = chunks > self.config.retrieved and self.config.selection == "best"
        searched = self.search.query_flops(chunks, self.config.segment) if searches else 0
        return self.backbone.flops(inputs, inputs, predicted=tokens) + searched + self.absorb_flops(tokens, remembered)

    def detached_flops(self, tokens: int, remembered: int) -> int:
        """All but the backbone's pass. See `MemoryModel.detached_flops`."""
        inputs = self._inputs(tokens, remembered)
        return self.flops(tokens, remembered) - self.backbone.flops(inputs, inputs, predicted=tokens)

    def _inputs(self, tokens: int, remembered: int) -> int:
        """Tokens of a segment and of what is put before it."""
        return tokens + min(self._chunks(remembered), self.config.retrieved) * (self.config.chunk + self.gap)

    def _chunks(self, remembered: int) -> int:
        return remembered // self.config.chunk if self.config.chunks is None else self.config.chunks

    def absorb_flops(self, tokens: int, remembered: int) -> int:
        """See `MemoryModel.absorb_flops`: embeddings of the chunks that become complete, or nothing."""
        size = self.config.chunk
        return self.search.write_flops((remembered + tokens) // size - remembered // size)


def _cat(blocks: tuple[Chunks, ...]) -> Chunks:
    if len(blocks) == 1:
        return blocks[0]
    return Chunks(torch.cat([b.ids for b in blocks], dim=1), torch.cat([b.keys for b in blocks], dim=1))


def _take(x: Tensor, index: Tensor) -> Tensor:
    """``x[row, index[row]]``: `x` ``[rows, chunks, ...]``, `index` ``[rows, n]``."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]
