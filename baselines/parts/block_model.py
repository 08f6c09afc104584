"""What InfLLM and EM-LLM share: execution blocks that attend to a window and, at one distance, to chosen blocks.

A segment is read in execution blocks, each through all layers. In a layer the block attends, in one softmax, to the
window before it at true distances, and to far tokens at the constant distance ``local_window - 1``: sinks, blocks that
were chosen, and pending tokens that left the window and are in no block yet. What is chosen and how the pending tokens
are cut into blocks is the method's own. Who chooses is an option, see `block_options.py`.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from memory_bench.axes import Axes
from memory_bench.backbone.model import Backbone
from memory_bench.protocol import DecodePlan, MemoryModel, Readout, Segment, State, Traits

from .block_attention import Side, joint_attention
from .block_sight import Sight
from .block_store import BlockStore, spans
from .drawing import row_generator
from .execution import Execution, executions, scatter


@dataclass(frozen=True, slots=True)
class BlockState(State):
    """What was read.

    Attributes:
        store: keys, values and blocks.
        query: ``[rows, layers, heads, head]`` float32, the mean query of the last execution block.
        host_seeds: ``[rows]`` int64, of random choices.
    """

    store: BlockStore
    query: Tensor
    host_seeds: Tensor


S = TypeVar("S", bound=BlockState)


@dataclass(frozen=True, slots=True)
class Pass:
    """An execution block as it went through the layers.

    Attributes:
        part: where it stands in the segment.
        ids: ``[rows, tokens]``.
        hidden: final hidden states ``[rows, tokens, width]``.
        inputs: of every layer.
        chosen: per layer ``[rows, 1 or heads, 1 or tokens, blocks]`` int64, how often each block was attended to.
        queue: per layer, what the method's `choose` wants to keep.
    """

    part: Execution
    ids: Tensor
    hidden: Tensor
    inputs: tuple[Tensor, ...]
    chosen: tuple[Tensor, ...]
    queue: tuple[Any, ...]


class BlockModel(MemoryModel[S]):
    """See the module; nothing is trained, and there are no parameters beside the backbone's.

    Subclasses say what is chosen (`choose`, and its widths) and how pending tokens become blocks (`remember`).
    """

    families: ClassVar[tuple[str, ...]] = ("llama",)  # keys must be there without their positions
    axes = Axes(
        unit="chunk kv", capacity="grows", write="direct", read="by similarity per piece",
        inject="all layers", fusion="one softmax", order="lost",
    )  # fmt: skip
    per_head = False  # every query head chooses alone

    def __init__(self, backbone: Backbone, config: Any, rng: torch.Generator) -> None:
        super().__init__()
        del rng  # there is nothing to initialise
        self.backbone = backbone
        self.config = config
        ahead = min(config.execution_block, config.segment) - 1
        looks = config.selection == "official" and self.retrieves
        single = config.execution_block == 1 and config.selection != "random"
        self.traits = Traits(
            segment=config.segment,
            look_ahead=ahead if looks else 0,
            bounded=False,
            chunk_invariant=single and not len(backbone.key_shift),
        )

    @property
    @abstractmethod
    def retrieves(self) -> bool:
        """Blocks are attended to at all."""

    @abstractmethod
    def choose(self, state: S, layer: int, scores: Tensor, tokens: Tensor) -> tuple[Tensor, Any]:
        """How often every block is attended to, and what `Pass.queue` keeps.

        Args:
            state: before the execution block.
            layer: index.
            scores: ``[rows, 1 or heads, 1 or tokens, blocks]`` float32, -inf where a row has no such block.
            tokens: ``[rows]`` on the host, of the execution block.

        Returns:
            ``[rows, 1 or heads, 1 or tokens, blocks]`` int64, and anything.
        """

    @abstractmethod
    def remember(self, state: S, after: S, done: Pass) -> S:
        """The state `after` the tokens were written, with pending tokens moved into sinks and blocks."""

    @abstractmethod
    def widths(self, read: int, tokens: int) -> tuple[int, int, int]:
        """Sizes that no execution block of `tokens` tokens after `read` ones exceeds, and that it is computed with.

        Returns:
            Chosen tokens, far pending tokens, and blocks that get a score (0: all are taken, no score is needed).
        """

    def open_store(self, rows: int, seeds: Sequence[int] | None) -> dict[str, Any]:
        """The fields of `BlockState` for fresh streams."""
        backbone = self.backbone
        like = torch.empty(0, backbone.head_width, device=backbone.device, dtype=backbone.dtype)
        shape = (rows, backbone.layers, backbone.heads, backbone.head_width)
        return {
            "store": BlockStore.empty(backbone.layers, rows, backbone.heads, backbone.kv_heads, like),
            "query": torch.zeros(shape, device=backbone.device),
            "host_seeds": torch.tensor([0] * rows if seeds is None else list(seeds), dtype=torch.long),
        }

    def step(self, state: S, segment: Segment, *, write: bool = True) -> tuple[Readout, S]:
        """See `MemoryModel.step`."""
        passes, after = self.read(state, segment, write=write)
        if passes:
            hidden = scatter(segment, [(done.part, done.hidden) for done in passes])
        else:
            hidden = self.backbone.embed(segment.ids).new_zeros(*segment.ids.shape, self.backbone.width)
        return Readout(hidden, self.backbone.head), after if write else state

    def read(self, state: S, segment: Segment, *, write: bool = True) -> tuple[list[Pass], S]:
        """The execution blocks of a segment and the state after it; without `write`, before its last one."""
        config = self.config
        parts = executions(segment, config.execution_block, at_conditions=config.selection == "causal")
        passes = []
        for number, part in enumerate(parts):
            done, state = self._execute(state, segment, part, write=write or number + 1 < len(parts))
            passes.append(done)
        return passes, state

    def _execute(self, state: S, segment: Segment, part: Execution, *, write: bool) -> tuple[Pass, S]:
        backbone, store = self.backbone, state.store
        columns = part.columns.to(segment.ids.device)
        ids = segment.ids.gather(1, columns)
        widest = self._widest(store, part)
        sight = Sight.of(backbone, self.config, store, part, widest[1])
        hidden = backbone.begin(backbone.embed(ids), sight.where)
        inputs, keys, values, means, received, chosen, queue = ([] for _ in range(7))  # type: ignore[var-annotated]
        for layer in range(backbone.layers):
            inputs.append(hidden)
            q, k, v = backbone.project(layer, backbone.norm_input(layer, hidden), sight.mask)
            far = backbone.rotate(q, sight.turn_far[layer])
            mean = self._mean(far, sight.mask, state.query[:, layer])
            times, kept = self._chosen(state, layer, far, mean, part, widest[2])
            attended, weights = self._attend(layer, (q, far, k, v), store, sight, times, widest[0])
            hidden = backbone.close(layer, hidden, attended)
            for made, what in zip(
                (keys, values, means, received, chosen, queue), (k, v, mean, weights, times, kept), strict=True
            ):
                made.append(what)
        done = Pass(part, ids, backbone.end(hidden), tuple(inputs), tuple(chosen), tuple(queue))
        if not write:
            return done, state
        written = store.write(keys, values, part.mask).attended(received, store.host_read, part.mask)
        after = replace(state, store=written, query=torch.stack(means, dim=1))
        return done, self.remember(state, after, done)

    @staticmethod
    def _mean(queries: Tensor, mask: Tensor, before: Tensor) -> Tensor:
        """``[rows, heads, head]`` float32: the mean of a row's real queries; of none, what it was before."""
        weights = mask[:, None, :, None].float()
        count = weights.sum(dim=2)
        mean = (queries.detach().float() * weights).sum(dim=2) / count.clamp(min=1)
        return torch.where(count > 0, mean, before)

    @torch.no_grad()
    def _chosen(
        self, state: S, layer: int, far: Tensor, mean: Tensor, part: Execution, scored: int
    ) -> tuple[Tensor, Any]:
        """What `choose` answers to the scores of `BlockOptions.selection`."""
        store, config = state.store, self.config
        rows, blocks = store.host_sizes.shape
        tokens = part.mask.sum(dim=1)
        there = (store.host_sizes > 0).to(far.device)[:, None, None]
        if config.selection == "random":
            scores = self._random(state, layer).to(far.device)[:, None, None]
        elif not scored:
            scores = torch.zeros(rows, 1, 1, blocks, device=far.device)
        elif config.selection == "token":
            scores = self._scores(state, layer, far.float(), scored)
        else:
            query = mean
            if config.selection == "causal" and config.execution_block > 1:
                query = torch.where(part.given.to(far.device)[:, None, None], mean, state.query[:, layer])
            scores = self._scores(state, layer, query[:, :, None], scored)
        return self.choose(state, layer, scores.masked_fill(~there, -torch.inf), tokens)

    def _widest(self, store: BlockStore, part: Execution) -> tuple[int, int, int]:
        """The largest `widths` of all rows."""
        pairs = zip(store.host_read.tolist(), part.mask.sum(dim=1).tolist(), strict=True)
        chosen, pending, scored = zip(*(self.widths(read, new) for read, new in pairs), strict=True)
        return max(chosen), max(pending), max(scored)

    def _scores(self, state: S, layer: int, queries: Tensor, scored: int) -> Tensor:
        """``[rows, 1 or heads, queries, blocks]``: products with representatives, summed over heads."""
        found = state.store.representatives[layer]
        # The number of blocks may depend on the text; what is computed does not.
        padded = torch.nn.functional.pad(found, (0, 0, 0, max(0, scored - found.shape[2])))
        scores = (queries @ padded.transpose(2, 3))[..., : found.shape[2]]
        return scores if self.per_head else scores.sum(dim=1, keepdim=True)

    def _random(self, state: S, layer: int) -> Tensor:
        """``[rows, blocks]``: numbers of the row's seed and place."""
        store = state.store
        drawn = torch.zeros(store.host_sizes.shape)
        places = zip(state.host_seeds.tolist(), store.host_read.tolist(), store.counts.tolist(), strict=True)
        for row, (seed, read, blocks) in enumerate(places):
            drawn[row, :blocks] = torch.rand(blocks, generator=row_generator(seed, read, 2 + layer))
        return drawn

    def _attend(
        self,
        layer: int,
        made: tuple[Tensor, Tensor, Tensor, Tensor],
        store: BlockStore,
        sight: Sight,
        times: Tensor,
        width: int,
    ) -> tuple[Tensor, Tensor]:
        """Attention ``[rows, tokens, heads * head]`` and what local keys received ``[rows, heads, past + tokens]``."""
        backbone = self.backbone
        q, far, k, v = made
        scale = backbone.head_width**-0.5
        keys = torch.cat([_take(store.keys[layer], sight.past), k], dim=2)
        values = torch.cat([_take(store.values[layer], sight.past), v], dim=2)
        turned = backbone.rotate(keys, sight.turn_keys[layer])
        near_seen = sight.near_seen[layer]
        assert near_seen is not None  # a mask was given
        local = Side(backbone.rotate(q, sight.turn[layer]) * scale, turned, values, near_seen)
        index, seen = self._far_tokens(sight, times, width)
        far_keys, far_values = (
            torch.cat([_spread(x, _take(x, index)), _spread(x, _take(x, sight.fixed), index)], dim=2)
            for x in (store.keys[layer], store.values[layer])
        )
        far_keys = backbone.rotate(far_keys, sight.turn_zero[layer])
        fixed_seen = sight.fixed_seen.expand(-1, seen.shape[1], -1, -1)
        beyond = Side(far * scale, far_keys, far_values, torch.cat([seen, fixed_seen], dim=3))
        out, received = joint_attention(local, beyond, sight.mask)
        return out.transpose(1, 2).flatten(2), received

    def _far_tokens(self, sight: Sight, times: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Tokens of blocks ``[rows, (heads,) n]``, and who sees them ``[rows, 1 or heads, tokens, n]``."""
        tokens = sight.where.shape[1]
        if self.config.selection == "token" and times.shape[2] > 1 and times.shape[3]:
            index, block, there = spans(sight.starts, sight.sizes, (sight.sizes > 0).long(), width)
            block = block[:, None, None].expand(-1, *times.shape[1:3], -1)
            return index, (times.gather(3, block) > 0) & there[:, None, None]
        heads = times.shape[1]
        starts, sizes = (x[:, None].expand(-1, heads, -1) for x in (sight.starts, sight.sizes))
        index, _, there = spans(starts, sizes, times[:, :, 0], width)
        return index if heads > 1 else index[:, 0], there[:, :, None].expand(-1, -1, tokens, -1)

    def _continue(self, state: S, prompt: Segment, plan: DecodePlan) -> Tensor:
        """As `MemoryModel._continue`; a question that is given is an execution block of its own and read once."""
        given = prompt.mask if prompt.given is None else prompt.given & prompt.mask
        if self.config.selection != "causal" or not bool(given[:, -1].all()):
            return super()._continue(state, prompt, plan)
        readout, state = self.step(state, Segment(prompt.ids, prompt.mask, given))
        ids, before, new = prompt.ids[:, :0], prompt.ids.shape[1], list[Tensor]()
        while len(new) < plan.new_tokens:
            if new:
                full = plan.fold and before + ids.shape[1] >= self.config.segment
                readout, state = self.step(state, Segment.full(ids), write=full)
                ids, before = (ids[:, :0], 0) if full else (ids, before)
            elif plan.fold and before >= self.config.segment:
                before = 0
            token = readout.logits(-1)[:, 0].argmax(dim=-1)
            if new and plan.stop_ids:
                ended = torch.isin(new[-1], torch.tensor(plan.stop_ids, device=token.device))
                token = torch.where(ended, new[-1], token)
            new.append(token)
            ids = torch.cat([ids, token[:, None]], dim=1)
        return torch.stack(new, dim=1) if new else prompt.ids[:, :0]

    def flops(self, tokens: int, remembered: int) -> int:
        """See `MemoryModel.flops`; what is computed and masked counts."""
        return self.backbone.flops(tokens, 0) + sum(sum(pair) for pair in self._memory_flops(tokens, remembered))

    def detached_flops(self, tokens: int, remembered: int) -> int:
        """See `MemoryModel.detached_flops`: the scores of blocks."""
        return sum(scores for _, scores in self._memory_flops(tokens, remembered))

    def _memory_flops(self, tokens: int, remembered: int) -> list[tuple[int, int]]:
        """Of attention and of the scores of blocks, in every execution block."""
        backbone, config, found = self.backbone, self.config, []
        unit = backbone.layers * backbone.heads * backbone.head_width
        for start in range(0, tokens, config.execution_block):
            new, read = min(config.execution_block, tokens - start), remembered + start
            chosen, pending, scored = self.widths(read, new)
            sinks = max(0, min(config.sink_tokens, read - config.local_window))
            keys = min(config.local_window, read) + new + chosen + sinks + pending
            asking = 0 if config.selection == "random" else new if config.selection == "token" else 1
            found.append((4 * unit * new * keys, 2 * unit * asking * scored))
        return found


ABLATIONS: Mapping[str, Mapping[str, Any]] = {"random selection": {"selection": "random"}}
"""The control of every memory that retrieves: as much of the same text, chosen by chance."""


def _take(entries: Tensor, index: Tensor) -> Tensor:
    """Tokens `index` ``[rows, (heads,) n]`` of `entries` ``[rows, kv_heads, slots, head]``, per (kv) head."""
    rows, kv_heads, _, width = entries.shape
    if index.dim() == 2:
        return entries.gather(2, index[:, None, :, None].expand(-1, kv_heads, -1, width))
    row = torch.arange(rows, device=index.device).view(-1, 1, 1)
    head = torch.arange(index.shape[1], device=index.device) // (index.shape[1] // kv_heads)
    return entries[row, head.view(1, -1, 1), index]


def _spread(entries: Tensor, taken: Tensor, beside: Tensor | None = None) -> Tensor:
    """`taken` with as many heads as what it is joined to: tokens that every head chose alone have all heads."""
    if beside is None or beside.dim() == 2:
        return taken
    return taken.repeat_interleave(beside.shape[1] // entries.shape[1], dim=1)
