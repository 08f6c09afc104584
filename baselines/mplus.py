"""M+: MemoryLLM whose dropped rows go to a long-term store; every layer retrieves rows from it by the text's meaning.

The prefix of a read is [bos, retrieved rows, pool]. The retriever scores an entry by the mean over the query tokens of
sigmoid(query . key). The official code takes all tokens of the text being read as the query, so that a teacher-forced
score depends on later tokens; here the default query is what has been given before: the tokens marked as given, or
else the previous segment. See `pool` for the passes and `long_term` for the store.

Decisions where a stream of segments needs what the official code does not have:

- The previous segment's queries come from its write pass (with the offset of earlier layers in its last rows, and with
  the write adapter), so that `absorb` needs no read pass. Where tokens are given, queries come from the read pass.
- Without any query (a stream's first segment) the most recent entries are taken. A store with fewer entries than are
  to be retrieved gives all of them, pending ones included; an empty one gives none, and the prefix is shorter.
- An untrained model starts as MemoryLLM does: plain backbone, then a first fill. Its copies count as written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from memory_bench.axes import Axes
from memory_bench.backbone.model import Backbone
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.choices import check_choices
from memory_bench.errors import UserError
from memory_bench.protocol import Segment, Traits

from .memoryllm import fit_pool
from .parts.drawing import row_generator
from .parts.long_term import Retriever, StartingStore, Store, oldest_first, pick, relevance
from .parts.pool import PoolModel, Reading, Written
from .parts.pool_layout import MPlusLayout
from .parts.pool_others import Others
from .parts.pool_state import (
    PoolConfig,
    PoolState,
    fill_pool,
    merge_pool,
    split_permutation,
    take_rows,
)


@dataclass(frozen=True, slots=True)
class MPlusConfig(PoolConfig):
    """Hyper-parameters of M+; `blocks` counts the pool only."""

    retrieved_tokens: int = 160  # long-term rows per layer in front of the pool
    retriever_width: int = 32
    retriever_layers: int = 2  # Linear - SiLU - Linear, or 1: Linear
    retrieval_query: Literal["given", "all"] = "given"  # given or else the previous segment; official: all, looks ahead
    merge_every: int = 8  # writes after which the pending rows enter the long-term store
    initial_recall_frequency: float = 16.0  # an entry lives this / recall_decay merges, its own included
    recall_decay: float = 1.0
    grow_pool_ages: bool = False  # on: rows age in the pool too, as in the training code; the released inference: not
    repeat_short_store: bool = False  # official: with too few merged entries, repeat them and ignore the pending ones
    long_term_sizes: Sequence[int] = ()  # entries per layer that a loaded model starts with

    def __post_init__(self) -> None:
        # Spelled out: zero-argument super() does not survive dataclass(slots=True).
        PoolConfig.__post_init__(self)
        check_choices("mplus", self)
        if self.retriever_layers not in (1, 2):
            raise UserError(f"retriever_layers = {self.retriever_layers}; valid are 1 and 2.")
        if self.merge_every < 1:
            raise UserError(f"merge_every = {self.merge_every} is too small; it must be at least 1.")

    @classmethod
    def official(cls) -> "MPlusConfig":
        """The 8B model's sizes and every quirk of the official inference class that changes numbers."""
        return cls(
            segment=512,
            tokens_per_block=256,
            blocks=40,
            lora_rank=16,
            add_read_lora=True,
            pool_initialized=True,
            leak_first_offset=True,
            retrieved_tokens=2560,
            retriever_width=256,
            retrieval_query="all",
            merge_every=60,
            initial_recall_frequency=10.0,
            grow_pool_ages=False,
            repeat_short_store=True,
        )


@dataclass(frozen=True, slots=True)
class MPlusState(PoolState):
    """The pools and long-term stores of some streams.

    Attributes:
        host_pool_ages: ``[rows, layers, pool_tokens]`` int64.
        host_pool_own: ``[rows, layers, pool_tokens]`` bool, rows that this stream wrote (the retriever's positives).
        host_long_term: entries that can be decayed.
        host_pending: entries that wait for the next merge.
        host_unmerged: ``[rows]`` int64, writes since the last merge.
        query: ``[rows, layers, tokens, retriever width]``, queries of the previous segment; no tokens without one.
        host_query_tokens: ``[rows]`` int64, how many of them are real.
    """

    host_pool_ages: Tensor
    host_pool_own: Tensor
    host_long_term: Store
    host_pending: Store
    host_unmerged: Tensor
    query: Tensor
    host_query_tokens: Tensor


class MPlus(PoolModel[MPlusState]):
    """See the module."""

    Config: ClassVar[type[Any]] = MPlusConfig
    released = MPlusLayout()
    source = (
        "M+, arXiv 2502.00592; wangyu-ustc/MemoryLLM@5acaf52 modeling_mplus.py. Deviations: causal retrieval query, a "
        "pool and a store per row (any batch size), padding works, short stores are not repeated, stable order among "
        "equal ages, seeded draws; adapters without dropout; the retriever's negatives are the other rows of the "
        "batch."
    )
    divides = True
    axes = Axes(
        unit="layer vectors", capacity="fixed", overflow="drop oldest", write="extra tokens",
        written_with_gradient=True, read="all, and by similarity per segment", inject="all layers",
        fusion="prefix", order="kept", trained="all",
    )  # fmt: skip

    def __init__(self, backbone: Backbone, config: MPlusConfig, rng: torch.Generator) -> None:
        super().__init__(backbone, config, rng)
        width, size = backbone.hidden_width, config.retriever_width
        self.retriever = Retriever(backbone.layers, width, size, config.retriever_layers, rng)
        self.retriever.to(device=backbone.device, dtype=backbone.dtype)
        if config.long_term_sizes:
            if len(config.long_term_sizes) != backbone.layers:
                raise UserError(f"long_term_sizes needs one size per layer: {backbone.layers}.")
            self.long_term = StartingStore(config.long_term_sizes, width, size, backbone.dtype)
        self.traits = Traits(
            segment=config.segment,
            look_ahead=config.segment - 1 if config.retrieval_query == "all" else 0,
            bounded=config.recall_decay > 0,
        )

    @classmethod
    def fit(cls, card: BackboneCard, budget: Budget) -> MPlusConfig:
        """A config sized for the backbone; see `fit_pool`.

        Small backbones: a pool of 24, 8 retrieved rows, retriever width 16, and at most 512 long-term entries (16
        lives of 8 writes of 4 rows). Others: 16 blocks in the pool and 4 retrieved (4 : 1 as in the paper), retriever
        width d / 20, at most 2,048 entries with a segment of 512.
        """
        options = fit_pool(card, budget)
        if card.width <= 256:
            return MPlusConfig(**(options | {"blocks": 6}), retrieved_tokens=8, retriever_width=16)
        retrieved = 4 * options["tokens_per_block"]
        return MPlusConfig(
            **(options | {"blocks": 16}), retrieved_tokens=retrieved, retriever_width=max(16, card.width // 20)
        )

    def open(self, rows: int, *, seeds: Sequence[int] | None = None) -> MPlusState:
        """Fresh streams, each with the model's initial pool and long-term entries."""
        start, layers, config = self.start(rows, seeds), self.backbone.layers, self.config
        nothing = StartingStore([0] * layers, self.backbone.hidden_width, config.retriever_width, self.pool.dtype)
        shape = (rows, layers, config.pool_tokens)
        return MPlusState(
            **{f.name: getattr(start, f.name) for f in fields(start)},
            host_pool_ages=torch.zeros(shape, dtype=torch.int64),
            host_pool_own=torch.zeros(shape, dtype=torch.bool),
            host_long_term=(self.long_term if config.long_term_sizes else nothing).open(rows),
            host_pending=nothing.open(rows),
            host_unmerged=torch.zeros(rows, dtype=torch.int64),
            query=self.pool.new_zeros(rows, layers, 0, config.retriever_width),
            host_query_tokens=torch.zeros(rows, dtype=torch.int64),
        )

    def in_step(self, state: MPlusState) -> MPlusState:
        """The stores without filling."""
        return replace(state, host_long_term=state.host_long_term.in_step(), host_pending=state.host_pending.in_step())

    def recall(self, state: MPlusState, layer: int, hidden: Tensor, given: Tensor | None) -> Tensor:
        """The retrieved rows of a layer ``[rows, n, width]``, oldest first."""
        long, pending = state.host_long_term, state.host_pending
        merged = long.ages[layer].shape[1]
        ages = torch.cat([long.ages[layer], pending.ages[layer]], dim=1)
        wanted = self.config.retrieved_tokens
        if self.config.repeat_short_store and merged < wanted:
            index = torch.arange(merged).repeat(wanted // max(1, merged) + 1)[-wanted:].expand(len(ages), -1)
        elif ages.shape[1] <= wanted:
            index = torch.arange(ages.shape[1]).expand(len(ages), -1)
        else:
            index = self._best(state, layer, hidden, given, ages)
        index = index.gather(1, oldest_first(ages.gather(1, index)))
        return pick([long.tokens[layer], pending.tokens[layer]], index).to(hidden.device)

    @torch.no_grad()
    def _best(self, state: MPlusState, layer: int, hidden: Tensor, given: Tensor | None, ages: Tensor) -> Tensor:
        """Indices of the entries to retrieve ``[rows, retrieved_tokens]``, ascending, on the host."""
        wanted = self.config.retrieved_tokens
        if self.config.retrieval_query == "all" or given is not None:
            queries = self.retriever.at(layer).query(self.backbone.norm_input(layer, hidden))
            weights = torch.ones_like(hidden[..., 0])
            if self.config.retrieval_query == "given" and given is not None:
                weights = given.to(weights)
        elif state.query.shape[2]:
            queries = state.query[:, layer]
            place = torch.arange(queries.shape[1])
            weights = (place < state.host_query_tokens[:, None]).to(queries)
        else:
            return oldest_first(ages)[:, -wanted:].sort(dim=1).values
        stores = (state.host_long_term, state.host_pending)
        keys = torch.cat([store.keys[layer].to(hidden.device) for store in stores], dim=1)
        ranking = relevance(queries, weights, keys).sort(dim=1, descending=True, stable=True).indices
        return ranking[:, :wanted].sort(dim=1).values.cpu()

    def store(self, state: MPlusState, written: Written, permutations: Tensor | None = None) -> MPlusState:
        """As `PoolModel.store`; also keeps the segment's queries for the next one."""
        state = super().store(state, written, permutations)
        if self.config.retrieval_query == "all":
            return state
        with torch.no_grad():
            pairs = enumerate(written.inputs)
            queries = [self.retriever.at(i).query(self.backbone.norm_input(i, x)) for i, x in pairs]
        tokens = torch.full_like(state.host_query_tokens, written.inputs[0].shape[1])
        return replace(state, query=torch.stack(queries, dim=1), host_query_tokens=tokens)

    def fill(self, state: MPlusState, block: Tensor) -> MPlusState:
        """The first fill; nothing is dropped, and every copy has the block's ages."""
        size = state.pool.shape[2]
        state = super().fill(state, block)
        ages = torch.arange(block.shape[2]).flip(0)[None, None, :, None]
        return replace(
            state,
            host_pool_ages=fill_pool(ages, size)[..., 0].expand_as(state.host_pool_ages),
            host_pool_own=torch.ones_like(state.host_pool_own),
        )

    def merge(self, state: MPlusState, block: Tensor, permutations: Tensor) -> MPlusState:
        """Append the block; the dropped rows become pending entries, and at times the pending ones are merged."""
        config, new = self.config, block.shape[2]
        kept, dropped = split_permutation(permutations, new)
        tokens = take_rows(state.pool, dropped).detach()
        ages, own = state.host_pool_ages, state.host_pool_own
        fresh = torch.arange(new).flip(0).expand(*ages.shape[:2], -1)
        stay = _of_pool(ages, kept) + (new if config.grow_pool_ages else 0)
        entries = self._entries(tokens, _of_pool(ages, dropped))
        state = replace(
            state,
            pool=merge_pool(state.pool, block, permutations),
            host_pool_ages=torch.cat([stay, fresh], dim=2),
            host_pool_own=torch.cat([_of_pool(own, kept), torch.ones_like(fresh, dtype=torch.bool)], dim=2),
            host_long_term=state.host_long_term.older(new),
            host_pending=state.host_pending.older(new).append(entries),
            host_unmerged=state.host_unmerged + 1,
        )
        return self._merge_pending(state) if int(state.host_unmerged[0]) >= config.merge_every else state

    @torch.no_grad()
    def _entries(self, tokens: Tensor, ages: Tensor) -> Store:
        """Dropped rows ``[rows, layers, n, width]`` and their ages as entries with keys and full frequency."""
        frequency = torch.full(ages[:, 0].shape, float(self.config.initial_recall_frequency), dtype=torch.float64)
        parts = []
        for layer in range(self.backbone.layers):
            rows = tokens[:, layer]
            keys = self.retriever.at(layer).key(self.backbone.norm_input(layer, rows))
            parts.append((rows.cpu(), keys.cpu(), ages[:, layer], frequency))
        return Store.of(parts, len(tokens))

    def _merge_pending(self, state: MPlusState) -> MPlusState:
        """Pending entries enter the long-term store; then all its entries decay."""
        everything = state.host_long_term.append(state.host_pending)
        nothing = [tuple(t[:, :0] for t in state.host_pending.layer(i)) for i in range(self.backbone.layers)]
        return replace(
            state,
            host_long_term=everything.decayed(self.config.recall_decay, self.config.retrieved_tokens),
            host_pending=Store.of(nothing, len(state.host_unmerged)),  # type: ignore[arg-type]
            host_unmerged=torch.zeros_like(state.host_unmerged),
        )

    def others(self, state: MPlusState, segment: Segment) -> Others | None:
        """The rows of other processes, among which are negatives of `reading_loss`."""
        if self.beside is None or not (self.training and torch.is_grad_enabled()):
            return None
        return Others.seen(self.beside, state.pool, state.host_pool_own, segment, state.host_writes)

    def reading_loss(self, state: MPlusState, reading: Reading, others: Others | None) -> Tensor | None:
        """The retriever's loss while training: pool rows of the own stream should score 1, those of others 0.

        The paper's stage 2 in a batch of streams: candidates are the pool rows of all rows of the batch, queries a
        random beginning of the text (for `query`) and the newest block (for `encoder_query`). Inputs are detached.
        None before anything has been written. Of rows that other processes read, the pools are candidates here too,
        and their queries ask there.
        """
        pool, own = state.pool.detach(), state.host_pool_own
        if others is not None:
            pool, own = torch.cat([pool, others.pool]), torch.cat([own, others.own])
        if not reading.inputs or not bool(own.any()):
            return None
        own = own.to(pool.device)
        rows, text = reading.hidden.shape[:2]
        mine = torch.eye(rows, len(pool), dtype=torch.bool, device=pool.device)
        asking = torch.arange(text) < _random_lengths(state, text)[:, None]
        total = pool.new_zeros((), dtype=torch.float32)
        for layer, hidden in enumerate(reading.inputs):
            retriever = self.retriever.at(layer)
            memory = self.backbone.norm_input(layer, pool[:, layer]).detach()
            keys = retriever.key(memory).flatten(0, 1).expand(rows, -1, -1)  # [rows, all rows * pool_tokens, width]
            positive = (mine[:, :, None] & own[None, :, layer]).flatten(1)
            queries = retriever.query(self.backbone.norm_input(layer, hidden.detach()).detach())
            newest = retriever.encoder_query(memory[:rows, -self.config.tokens_per_block :])
            hits = own[:, layer].sum()
            of = hits, len(pool) * own[:, layer].numel() - hits  # of all rows' queries: positives, negatives
            total = total + _contrast(relevance(queries, asking.to(queries), keys), positive, *of)
            total = total + _contrast(relevance(newest, torch.ones_like(newest[..., 0]), keys), positive, *of)
        return total / len(reading.inputs)

    def recalled(self, remembered: int) -> int:
        """Rows retrieved after `remembered` text tokens."""
        merged, pending = self._entries_after(remembered)
        wanted = int(self.config.retrieved_tokens)
        if self.config.repeat_short_store and merged < wanted:
            return wanted if merged else 0
        return min(wanted, merged + pending)

    def _entries_after(self, remembered: int) -> tuple[int, int]:
        """Merged and pending entries of a layer after `remembered` text tokens (loaded entries: first layer's)."""
        config = self.config
        writes = remembered // config.segment - (0 if self.starts_filled else 1)
        merges, waiting = divmod(max(0, writes), config.merge_every)
        cohorts: list[tuple[float, int]] = []
        if config.long_term_sizes:
            cohorts = [(float(config.initial_recall_frequency), int(config.long_term_sizes[0]))]
        for _ in range(merges):
            cohorts.append((float(config.initial_recall_frequency), config.merge_every * config.tokens_per_block))
            alive = [(f - config.recall_decay, n) for f, n in cohorts if f - config.recall_decay > 0.01]
            cohorts = alive if sum(n for _, n in alive) > config.retrieved_tokens else cohorts
        return sum(n for _, n in cohorts), waiting * config.tokens_per_block

    def flops(self, tokens: int, remembered: int) -> int:
        """As `PoolModel.flops`, with retrieval.

        Counted for a segment without given tokens.
        """
        config, layers = self.config, self.backbone.layers
        projection = 2 * sum(p.numel() for p in self.retriever.at(0).query.parameters()) * layers
        merged, pending = self._entries_after(remembered)
        total = super().flops(tokens, remembered)
        scored = merged + pending > config.retrieved_tokens
        if scored and not (config.repeat_short_store and merged < config.retrieved_tokens):
            asking = tokens if config.retrieval_query == "all" else min(remembered, config.segment)
            total += 2 * layers * asking * (merged + pending) * (config.retriever_width + 1)
            total += projection * tokens if config.retrieval_query == "all" else 0
        return total

    def absorb_flops(self, tokens: int, remembered: int) -> int:
        """The write pass, the keys of dropped rows, and the queries of the next retrieval."""
        config = self.config
        projection = 2 * sum(p.numel() for p in self.retriever.at(0).query.parameters()) * self.backbone.layers
        filled = self.starts_filled or remembered >= config.segment
        keys = projection * config.tokens_per_block if filled else 0
        queries = projection * tokens if config.retrieval_query == "given" else 0
        return super().absorb_flops(tokens, remembered) + keys + queries


def _of_pool(values: Tensor, index: Tensor) -> Tensor:
    """``values[r, l, index[r, l]]`` of a host tensor ``[rows, layers, pool_tokens]``."""
    return values.gather(2, index.cpu().expand(*values.shape[:2], -1))


def _random_lengths(state: MPlusState, text: int) -> Tensor:
    """How many tokens of each row's text ask while training: 1 .. text, by the row's seed and writes."""
    pairs = zip(state.host_seeds.tolist(), state.host_writes.tolist(), strict=True)
    draws = [torch.randint(1, text + 1, (1,), generator=row_generator(s, w, purpose=1)) for s, w in pairs]
    return torch.cat(draws)


def _contrast(scores: Tensor, positive: Tensor, hits: Tensor, misses: Tensor) -> Tensor:
    """Mean of -log(score) over positives and of -log(1 - score) over negatives, averaged; 0 where there are none.

    There are `hits` and `misses` of them in the whole batch, of which these scores may be a part.
    """
    hit, miss = -torch.log(scores + 1e-5), -torch.log(1 - scores + 1e-5)
    loss = (hit * positive).sum() / hits.clamp(min=1)
    return (loss + (miss * ~positive).sum() / misses.clamp(min=1)) / 2
