"""A pool of memory tokens in every layer: what MemoryLLM and M+ share (prefix attention, write pass, merge, decoding).

Unusual here:

- The pool has a row axis and lives in the state; two streams never share one, and nothing is a module attribute.
- Memory rows are raw residual-stream vectors. They enter a layer in front of the text, give keys and values only, and
  are not passed on: the next layer puts its own memory rows in front.
- Rows are processed without padding (`grouping`); inside this file every row of a batch has equally many tokens and
  has been written equally often.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from memory_bench.backbone.lora import Adapter, LinearFn, plain
from memory_bench.backbone.model import Backbone
from memory_bench.errors import UserError
from memory_bench.protocol import DecodePlan, MemoryModel, Readout, Segment, Traits

from .grouping import group_rows, join_rows, scatter_rows
from .pool_frame import Cached, Frame, asking_from, run_layer
from .pool_others import Others
from .pool_state import PoolState, draw_permutations, fill_pool

P = TypeVar("P", bound=PoolState)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a read pass gives.

    Attributes:
        hidden: final hidden states ``[rows, tokens, width]``.
        recalled: per layer ``[rows, n, width]``, rows recalled from beyond the pool.
        inputs: per layer the text's layer input; only while training.
        cache: per layer; only on request.
    """

    hidden: Tensor
    recalled: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]
    cache: tuple[Cached, ...]


@dataclass(frozen=True, slots=True)
class Written:
    """What a write pass gives.

    Attributes:
        block: ``[rows, layers, new tokens, width]``.
        hidden: last layer's output at the text ``[rows, tokens, width]``, before the final norm; None where it was not
            asked for.
        inputs: per layer the text's layer input, before that layer's offset.
    """

    block: Tensor
    hidden: Tensor | None
    inputs: tuple[Tensor, ...]


class PoolModel(MemoryModel[P]):
    """Reading with the whole pool as a prefix, and writing in a pass of its own. Subclasses say what a write keeps."""

    families = ("llama",)

    def __init__(self, backbone: Backbone, config: Any, rng: torch.Generator) -> None:
        super().__init__()
        if backbone.family != "llama":
            raise UserError(f"{type(self).__name__} works on Llama-family backbones only, not on '{backbone.family}'.")
        self.backbone = backbone
        self.config = config
        like: dict[str, Any] = {"device": backbone.device, "dtype": backbone.dtype}
        width = backbone.hidden_width
        pool = torch.randn(backbone.layers, config.pool_tokens, width, generator=rng).to(**like)
        self.pool: Tensor
        if config.learned_start:
            self.pool = nn.Parameter(pool)
        else:
            self.register_buffer("pool", pool)
        self.new_memory_positional_embedding = nn.Parameter(torch.zeros(1, 1, width, **like))
        if config.bos_embedding:
            self.bos_embedding = nn.Parameter(_bos_start(backbone, rng).repeat(backbone.layers, 1, 1).to(**like))
        self.lora = nn.ModuleDict()
        for name in ("write", "read") if config.add_read_lora else ("write",):
            if config.lora_rank:
                self.lora[name] = Adapter(backbone, config.lora_rank, config.lora_alpha, config.lora_targets, rng)
        self.traits = Traits(segment=config.segment)

    @classmethod
    def unadapted(cls, config: Any) -> Any:
        """See `MemoryModel.unadapted`: one adapter for reading and writing, as in the first MemoryLLM."""
        return replace(config, lora_rank=0, add_read_lora=False)

    @property
    def starts_filled(self) -> bool:
        """Fresh streams begin with a pool that is worth reading."""
        return bool(self.config.pool_initialized or self.config.learned_start)

    def expected_retention(self, tokens: int) -> float:
        """(1 - K/N)^t after t = tokens / segment writes: every write drops K of the pool's N rows at random."""
        config = self.config
        return float((1 - config.tokens_per_block / config.pool_tokens) ** (tokens / config.segment))

    def start(self, rows: int, seeds: Sequence[int] | None) -> PoolState:
        """The pool part of a fresh state."""
        return PoolState(
            pool=self.pool.expand(rows, -1, -1, -1),
            host_filled=torch.full((rows,), self.starts_filled),
            host_writes=torch.zeros(rows, dtype=torch.int64),
            host_seeds=torch.tensor(list(seeds) if seeds is not None else [0] * rows, dtype=torch.int64),
        )

    def step(self, state: P, segment: Segment, *, write: bool = True) -> tuple[Readout, P]:
        """Predict the segment with the pool as it is; then, with `write`, run the write pass and merge its block."""
        groups = group_rows(segment, state.host_writes)
        others = self.others(state, segment)
        hidden: list[Tensor] = []
        states: list[P] = []
        losses: list[Tensor] = []
        for group in groups:
            own = self.in_step(state if group.index is None else state.rows(group.index))
            if not group.ids.shape[1]:
                hidden.append(self.backbone.embed(group.ids))
                states.append(own)
                continue
            reading = self.read(own, group.ids, group.given)
            hidden.append(reading.hidden)
            beside = None if others is None else others.alike(segment, state.host_writes, group.index)
            loss = self.reading_loss(own, reading, beside)
            rows = len(group.ids) + (0 if beside is None else len(beside.pool))
            losses += [loss * rows] if loss is not None else []
            states.append(self.write(own, group.ids) if write else own)
        batch = len(segment.ids) + (0 if others is None else len(others.pool))
        aux = torch.stack(losses).sum() / batch if losses else None
        readout = Readout(scatter_rows(segment, groups, hidden), self.backbone.head, aux)
        return readout, join_rows(groups, states) if write else state

    def absorb(self, state: P, segment: Segment) -> P:
        """The state after reading; only the write pass is run, because predictions leave no trace in memory."""
        groups = group_rows(replace(segment, given=None), state.host_writes)
        states = []
        for group in groups:
            own = self.in_step(state if group.index is None else state.rows(group.index))
            states.append(self.write(own, group.ids) if group.ids.shape[1] else own)
        return join_rows(groups, states)

    def read(
        self, state: P, ids: Tensor, given: Tensor | None = None, *, adapter: str = "read", keep: bool = False
    ) -> Reading:
        """The read pass: per layer the prefix [bos, recalled rows, pool], then the text.

        Args:
            state: of as many rows as `ids`, all in step.
            ids: ``[rows, tokens]``.
            given: ``[rows, tokens]`` bool or None; see `Segment`.
            adapter: ``read``, or ``write`` for reading a single un-merged block as the official code does.
            keep: also return what `decode` continues from.
        """
        filled = bool(state.host_filled[0])
        hidden = self._enter(ids)
        inputs: list[Tensor] = []
        recalled: list[Tensor] = []
        cache: list[Cached] = []
        frame: Frame | None = None
        for layer in range(self.backbone.layers):
            inputs += [hidden] if self.training and torch.is_grad_enabled() else []
            full = hidden
            if filled:
                recalled.append(self.recall(state, layer, hidden, given))
                full = torch.cat([*self._bos(layer, len(ids)), recalled[-1], state.pool[:, layer], hidden], dim=1)
            if frame is None or frame.length != full.shape[1]:
                frame = Frame.of(self.backbone, full.shape[1], ids.shape[1], ids.shape[1])
            hidden, cached = run_layer(self.backbone, layer, full, frame, self._linear(adapter, layer))
            cache += [cached] if keep else []
        return Reading(self.backbone.end(hidden), tuple(recalled), tuple(inputs), tuple(cache))

    def recall(self, state: P, layer: int, hidden: Tensor, given: Tensor | None) -> Tensor:
        """Rows ``[rows, n, width]`` from beyond the pool for this layer's prefix; here none."""
        return hidden[:, :0]

    def others(self, state: P, segment: Segment) -> Others | None:
        """Rows of the batch that other processes read, where `reading_loss` asks for them; here never."""
        return None

    def reading_loss(self, state: P, reading: Reading, others: Others | None) -> Tensor | None:
        """A training loss of the model's own; here none.

        Where there are `others`, rows of the same kind in other processes, it is this process's part of all rows' loss.
        """
        return None

    def in_step(self, state: P) -> P:
        """The state of rows that have been written equally often, without filling; here it has none."""
        return state

    def write_pass(self, state: P, ids: Tensor, *, keep_hidden: bool = True) -> Written:
        """The new block: outputs of every layer at the last rows of [bos, newest block, text].

        The offset ``new_memory_positional_embedding`` is added to those rows in front of every layer and stays in the
        residual stream. A text shorter than a block lets the newest old rows ask along and carries them over. Before
        the first write there is no prefix, and the block has no more rows than the text.

        Without `keep_hidden` only the block's rows go through the last layer: the others' outputs leave no trace.
        """
        filled, text, size = bool(state.host_filled[0]), ids.shape[1], self.config.tokens_per_block
        new = size if filled else min(text, size)
        length = text + (int(self.config.bos_embedding) + size if filled else 0)
        offset = nn.functional.pad(self.new_memory_positional_embedding.expand(-1, new, -1), (0, 0, length - new, 0))
        frame = Frame.of(self.backbone, length, text, max(text, new))
        hidden = self._enter(ids)
        inputs: list[Tensor] = []
        block: list[Tensor] = []
        for layer in range(self.backbone.layers):
            inputs.append(hidden)
            prefix = [*self._bos(layer, len(ids)), state.pool[:, layer, -size:]] if filled else []
            full = torch.cat([*prefix, hidden], dim=1) + offset
            if layer == self.backbone.layers - 1 and not keep_hidden:
                frame = Frame.of(self.backbone, length, text, new)
            out, _ = run_layer(self.backbone, layer, full, frame, self._linear("write", layer))
            block.append(out[:, -new:])
            hidden = out[:, -text:]
        if self.config.leak_first_offset and not filled:
            block[:-1] = [rows + self.new_memory_positional_embedding for rows in block[:-1]]
        return Written(torch.stack(block, dim=1), hidden if keep_hidden else None, tuple(inputs))

    def write(self, state: P, ids: Tensor) -> P:
        """The state after `ids` ``[rows, tokens]`` were read (the write pass and the merge)."""
        return self.store(state, self.write_pass(state, ids, keep_hidden=False))

    def store(self, state: P, written: Written, permutations: Tensor | None = None) -> P:
        """The state with a written block in it: the first fill, or `merge` with own or recorded `permutations`."""
        if not bool(state.host_filled[0]):
            state = self.fill(state, written.block)
        else:
            if permutations is None:
                permutations = draw_permutations(state, self.backbone.layers if self.config.drop_per_layer else 1)
            state = self.merge(state, written.block, permutations)
        return replace(state, host_writes=state.host_writes + 1)

    def fill(self, state: P, block: Tensor) -> P:
        """The first fill: the pool becomes copies of the block."""
        return replace(
            state, pool=fill_pool(block, state.pool.shape[2]), host_filled=torch.ones_like(state.host_filled)
        )

    @abstractmethod
    def merge(self, state: P, block: Tensor, permutations: Tensor) -> P:
        """The state after `merge_pool`; `permutations` ``[rows or 1, layers or 1, pool_tokens]``."""

    @torch.no_grad()
    def decode(self, state: P, prompt: Segment, plan: DecodePlan) -> Tensor:
        """As `MemoryModel.decode`, with the keys and values of prefix and text cached while a segment is open."""
        out = prompt.ids.new_zeros(len(prompt.ids), plan.new_tokens)
        for group in group_rows(prompt, state.host_writes):
            rows = slice(None) if group.index is None else group.index.to(out.device)
            own = state if group.index is None else state.rows(group.index)
            given = group.given if prompt.given is not None else torch.ones_like(group.ids, dtype=torch.bool)
            out[rows] = self._decode(self.in_step(own), group.ids, given, plan)
        return out

    def _decode(self, state: P, ids: Tensor, given: Tensor | None, plan: DecodePlan) -> Tensor:
        new: list[Tensor] = []
        cache: tuple[Cached, ...] = ()
        stops = torch.tensor(plan.stop_ids, device=ids.device)
        while len(new) < plan.new_tokens:
            if not cache:
                reading = self.read(state, ids, given, keep=True)
                hidden, cache = reading.hidden[:, -1:], reading.cache
            else:
                hidden, cache = self._advance(cache, ids[:, -1:])
            token = self.backbone.head(hidden)[:, 0].argmax(dim=-1)
            if plan.fold and ids.shape[1] >= self.config.segment:
                state, ids, given, cache = self.write(state, ids), ids[:, :0], None, ()
            if new and plan.stop_ids:
                token = torch.where(torch.isin(new[-1], stops), new[-1], token)
            new.append(token)
            ids = torch.cat([ids, token[:, None]], dim=1)
        return torch.stack(new, dim=1) if new else ids[:, :0]

    def _advance(self, cache: tuple[Cached, ...], ids: Tensor) -> tuple[Tensor, tuple[Cached, ...]]:
        """Hidden states of one more token ``[rows, 1, width]`` and the cache with it."""
        backbone, hidden = self.backbone, self._enter(ids)
        longer: list[Cached] = []
        frame: Frame | None = None
        for layer, past in enumerate(cache):
            linear = self._linear("read", layer)
            normed = backbone.norm_input(layer, hidden)
            # The row before goes along because a backbone may mix its key into this one's.
            q, k, v = backbone.project(layer, torch.cat([past.last, normed], dim=1), None, asking_from(1, linear))
            if frame is None or frame.length != past.keys.shape[2] + 1:
                frame = Frame.of(backbone, past.keys.shape[2] + 1, text=1, queries=1)
                turn = backbone.rotation(torch.full_like(ids[:1], frame.start))
            new = backbone.rotate(k[:, :, 1:], turn[layer])
            keys, values = torch.cat([past.keys, new], dim=2), torch.cat([past.values, v[:, :, 1:]], dim=2)
            attended = backbone.attend(backbone.rotate(q, frame.turn[layer]), keys, values, frame.visible[layer])
            hidden = backbone.close(layer, hidden, attended, linear)
            longer.append(Cached(keys, values, normed))
        return backbone.end(hidden), tuple(longer)

    def _enter(self, ids: Tensor) -> Tensor:
        """Input of the first layer ``[rows, tokens, width]``; rotary positions take no part in it."""
        return self.backbone.begin(self.backbone.embed(ids), torch.zeros_like(ids))

    def _bos(self, layer: int, rows: int) -> list[Tensor]:
        return [self.bos_embedding[layer].expand(rows, -1, -1)] if self.config.bos_embedding else []

    def _linear(self, adapter: str, layer: int) -> LinearFn:
        if "write" not in self.lora:
            return plain
        return cast(Adapter, self.lora[adapter if adapter in self.lora else "write"]).linear(layer)

    def pass_flops(self, rows: int, asking: Sequence[int], adapter: str, predicted: int) -> int:
        """Operations of a pass over `rows` rows of memory and text, of which in layer i the last ``asking[i]`` ask."""
        backbone = self.backbone
        total = backbone.flops(0, 0, predicted=predicted)
        for layer, queries in enumerate(asking):
            silent = rows - queries  # rows that only give keys and values
            total += backbone.layer_flops(layer, queries, rows)
            total += backbone.project_flops(layer, silent, queries=False)
            if "write" in self.lora:
                used = cast(Adapter, self.lora[adapter if adapter in self.lora else "write"])
                total += used.flops(layer, queries, silent)
        return total

    def flops(self, tokens: int, remembered: int) -> int:
        """The read pass behind bos and pool (and what is recalled), and the write pass of `absorb_flops`."""
        config = self.config
        filled = self.starts_filled or remembered >= config.segment
        pool = int(config.bos_embedding) + config.pool_tokens if filled else 0
        prefix = pool + self.recalled(remembered)
        read = self.pass_flops(prefix + tokens, [tokens] * self.backbone.layers, "read", tokens)
        return read + self.absorb_flops(tokens, remembered)

    def absorb_flops(self, tokens: int, remembered: int) -> int:
        """The write pass behind bos and one block. See `MemoryModel.absorb_flops`."""
        config = self.config
        filled = self.starts_filled or remembered >= config.segment
        size = config.tokens_per_block
        prefix = int(config.bos_embedding) + size if filled else 0
        new = size if filled else min(tokens, size)
        asking = [max(tokens, new)] * (self.backbone.layers - 1) + [new]  # the last layer only makes the block
        return self.pass_flops(prefix + tokens, asking, "write", 0)

    def recalled(self, remembered: int) -> int:
        """Rows recalled from beyond the pool after `remembered` text tokens; here none."""
        return 0


def _bos_start(backbone: Backbone, rng: torch.Generator) -> Tensor:
    """``[1, 1, width]``: how the backbone's bos token enters, or noise of the embedding's scale without one."""
    noise = torch.randn(1, 1, backbone.hidden_width, generator=rng) * backbone.embedding_scale()
    token = getattr(getattr(backbone.model, "config", None), "bos_token_id", None)
    if isinstance(token, int) and 0 <= token < backbone.vocab:
        noise = backbone.embed(torch.tensor([[token]], device=backbone.device)).detach()
    return backbone.begin(noise, torch.zeros(1, 1, dtype=torch.long, device=backbone.device))
