"""UniMix: recurrent tokens around every segment and, in the upper layers, a store read by position and by similarity.

Unusual here:

- One softmax over what is found by similarity, the window and the segment: no gate, and no parameters but the first
  memory vectors.
- Every position reads the store, those of the recurrent tokens too.
- Keys are stored before rotary. What is found by similarity stands at position 0, as in the official code; the window
  stands where its tokens were.
- A first segment is not preceded by memory; a look (``write=False``) has no memory behind it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from memory_bench.axes import Axes
from memory_bench.backbone.layers import Rotation, itself
from memory_bench.backbone.model import Backbone
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.choices import check_choices
from memory_bench.errors import UserError
from memory_bench.protocol import MemoryModel, Readout, Segment, State, Traits

from .parts import knn
from .parts.drawing import row_seeds
from .parts.ring import Ring
from .parts.window_and_beyond import Newest, any_of, best, beyond, newest

SEGMENTS = 16  # segments that the store holds
STORE_SHARE = 10  # a stream's store takes at most this fraction of the budget's device memory
INITIAL = 0.01  # standard deviation of the first memory vectors (official)


@dataclass(frozen=True, slots=True)
class UniMixConfig:
    """Hyper-parameters of UniMix."""

    segment: int = 512  # text tokens per step; official: 512
    memory_tokens: int = 16  # vectors handed on; official: 40; 0: none
    layers: tuple[int, ...] | None = None  # layers that read the store, from 0; None: the upper half
    store_segments: int = SEGMENTS  # segments that the store holds; official: 20
    window: int | None = None  # newest stored tokens read by position; None: as many as a segment has; 0: none
    top_k: int = 4  # stored tokens read by similarity, per query and head; 0: none
    overflow: Literal["drop oldest", "clear"] = "drop oldest"  # clear: a full store is emptied, the segment not stored
    window_position: Literal["kept", "zero"] = "kept"  # zero: official; all of the window stands at position 0
    write_from: Literal["memory", "learned"] = "memory"  # what the tokens behind a segment begin as
    # official: of a stream's first segment the first tokens are not stored, but as many memory tokens
    first_slice: Literal["text", "official"] = "text"
    retrieve_twice: bool = False  # official: while little lies beyond the window, its tokens are found as well
    selection: Literal["best", "random"] = "best"  # random: as many stored tokens by chance, a control

    def __post_init__(self) -> None:
        if min(self.segment, self.store_segments) < 1 or min(self.memory_tokens, self.top_k, self.window or 0) < 0:
            raise UserError("unimix: segment and store_segments must be at least 1, other sizes cannot be negative.")
        if (self.window or 0) > self.store_segments * self.segment:
            raise UserError(
                f"unimix: window = {self.window} is more than the store holds, {self.store_segments} segments of "
                f"{self.segment}: use window = {self.store_segments * self.segment} or less, or more store_segments."
            )
        check_choices("unimix", self)

    @classmethod
    def official(cls) -> "UniMixConfig":
        """The repository's behaviour at commit c12a8ff, with its sizes."""
        return cls(
            memory_tokens=40, store_segments=20, window_position="zero", first_slice="official", retrieve_twice=True
        )


@dataclass(frozen=True, slots=True)
class UniMixState(State):
    """What a stream remembers.

    Attributes:
        memory: ``[rows, memory_tokens, width]``; before anything is read the learned one.
        known: ``[rows]`` bool, a segment has been read.
        store: keys and values of the reading layers, before rotary.
        host_seeds: ``[rows]`` int64, of random selections; None: nothing is drawn.
    """

    memory: Tensor
    known: Tensor
    store: Ring
    host_seeds: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Sight:
    """What the queries of a step see beside each other: per layer rotations and masks, and what of the store."""

    turn: tuple[Rotation | None, ...]
    turn_keys: tuple[Rotation | None, ...]
    visible: tuple[Tensor | None, ...]
    turn_window: tuple[Rotation | None, ...]
    visible_joint: tuple[Tensor | None, ...]
    near: Newest
    beyond: Tensor | None
    seen: Tensor
    first: int


class UniMix(MemoryModel[UniMixState]):
    """Fang et al., *UniMem: Towards a Unified View of Long-Context Large Language Models* (2024): UniMix.

    Attributes: ``initial_memory`` ``[memory_tokens, width]``, all the parameters it adds.

    Raises:
        UserError: there is no such layer.
    """

    Config = UniMixConfig
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("llama",)  # learned positions are part of a stored key: no window moves
    source: ClassVar[str] = (
        "arXiv:2402.03009; thunlp/UniMem@c12a8ff. Deviations by default: the window's tokens stand where they were, "
        "the first segment's text is stored, nothing is attended to twice, a store per text, gradients through the "
        "recurrent tokens as far as the recipe says (official: train.bptt=1). Its strided window is left out."
    )
    axes = Axes(
        unit="token kv and segment vectors", capacity="fixed", overflow="drop oldest", write="direct",
        written_with_gradient=True, read="by position, and by similarity per token", inject="input and some layers",
        fusion="one softmax", order="coarse", trained="all",
    )  # fmt: skip
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "nothing retrieved": {"top_k": 0},
        "no recurrent tokens": {"memory_tokens": 0},
        "no window": {"window": 0},
        "random selection": {"selection": "random"},
    }

    def __init__(self, backbone: Backbone, config: UniMixConfig, rng: torch.Generator) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config
        self.window = config.segment if config.window is None else config.window
        self.layers = reading_layers(config, self.window, backbone.layers)
        self.traits = Traits(segment=config.segment)
        values = torch.randn(config.memory_tokens, backbone.width, generator=rng) * INITIAL
        self.initial_memory = nn.Parameter(values.to(backbone.device, backbone.dtype))

    @classmethod
    def fit(cls, card: BackboneCard, budget: Budget) -> UniMixConfig:
        """Segment and window together are as long as a pretrained backbone's own window; a small one has both twice."""
        segment = max(1, card.window // 2) if card.pretrained else card.window
        memory, stored = (4 if card.small else 16), SEGMENTS
        if budget.added_parameters is not None:
            memory = min(memory, budget.added_parameters // card.width)
        if budget.device_bytes is not None:
            reading = card.layers - card.layers // 2
            of_a_segment = 2 * 4 * reading * card.kv_heads * card.head_width * segment  # bytes, in float32
            stored = max(1, min(stored, budget.device_bytes // STORE_SHARE // of_a_segment))
        return UniMixConfig(segment=segment, memory_tokens=memory, store_segments=stored)

    @property
    def capacity(self) -> int:
        """Tokens that the store holds: no more than the window where nothing beyond it is ever read."""
        config = self.config
        whole = config.store_segments * config.segment
        return whole if config.top_k or config.overflow == "clear" else max(1, self.window)

    def open(self, rows: int, *, seeds: Sequence[int] | None = None) -> UniMixState:
        """See `MemoryModel.open`; only a random selection draws."""
        backbone = self.backbone
        like = torch.empty(0, device=backbone.device, dtype=backbone.dtype)
        store = Ring.empty(len(self.layers), (rows, backbone.kv_heads, backbone.head_width), self.capacity, like)
        known = torch.zeros(rows, dtype=torch.bool, device=backbone.device)
        drawn = row_seeds(rows, seeds) if self.config.selection == "random" else None
        return UniMixState(self.initial_memory.expand(rows, -1, -1), known, store, drawn)

    def step(self, state: UniMixState, segment: Segment, *, write: bool = True) -> tuple[Readout, UniMixState]:
        """One pass over [memory; text; memory]. See `MemoryModel.step`."""
        backbone, config, (rows, tokens) = self.backbone, self.config, segment.ids.shape
        learned = self.initial_memory.expand(rows, -1, -1)
        front = state.memory if bool(state.known.any()) else state.memory[:, :0]
        back = (state.memory if config.write_from == "memory" else learned)[:, : None if write else 0]
        m = front.shape[1]
        embeds = torch.cat([front, backbone.embed(segment.ids), back], dim=1)
        ahead, behind = state.known[:, None].expand(-1, m), state.known.new_ones(rows, back.shape[1])
        seen = torch.cat([ahead, segment.mask, behind], dim=1)
        text = torch.cat([torch.zeros_like(ahead), segment.mask, torch.zeros_like(behind)], dim=1)
        hidden, keys, values = self._read(state, embeds, seen, text)
        readout = Readout(hidden[:, m : m + tokens], backbone.head)
        if not write:
            return readout, state
        real = segment.mask.any(dim=1)
        memory = torch.where(real[:, None, None], hidden[:, m + tokens :], state.memory)
        columns = m + torch.arange(tokens, device=seen.device).expand(rows, -1)
        stored = segment.mask
        if config.first_slice == "official":
            columns = columns + (~state.known * back.shape[1])[:, None]
            stored = seen.gather(1, columns) & real[:, None]
        store = self._stored(state.store, keys, values, columns, stored)
        return readout, UniMixState(memory, state.known | real, store, state.host_seeds)

    def _stored(self, store: Ring, keys: list[Tensor], values: list[Tensor], columns: Tensor, stored: Tensor) -> Ring:
        """The store after the entries at `columns` ``[rows, tokens]`` of the pass, where `stored` says so."""
        if not self.layers:
            return store
        if self.config.overflow == "clear":
            full = store.written + stored.sum(dim=1) > store.capacity
            store, stored = store.reset(full), stored & ~full[:, None]

        def take(entries: Tensor) -> Tensor:
            index = columns[:, None, :, None].expand(-1, entries.shape[1], -1, entries.shape[3])
            return entries.gather(2, index)

        return store.write([take(k) for k in keys], [take(v) for v in values], stored)

    def _read(
        self, state: UniMixState, embeds: Tensor, seen: Tensor, text: Tensor
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Final hidden states of the whole input; keys and values of the reading layers, before rotary."""
        backbone = self.backbone
        where = backbone.positions(seen)
        resumed = backbone.resume(embeds, (where, seen, text), (state,))
        sight = self._sight(state.store, seen, where, resumed.first)
        hidden = backbone.begin(embeds[:, sight.first :], where[:, sight.first :])
        kept: tuple[list[Tensor], list[Tensor]] = ([], [])
        for layer in range(backbone.layers):
            q, k, v = backbone.project(layer, backbone.norm_input(layer, hidden), text[:, sight.first :])
            k, v = resumed.join(k, v)
            near, turned = backbone.rotate(q, sight.turn[layer]), backbone.rotate(k, sight.turn_keys[layer])
            if layer in self.layers:
                kept[0].append(k)
                kept[1].append(v)
            if layer in self.layers and state.store.slots:
                attended = self._attend(layer, knn.Local(near, turned, v), state, sight)
            else:
                attended = backbone.attend(near, turned, v, sight.visible[layer])
            hidden = backbone.close(layer, hidden, attended)
        return resumed.finish(backbone.end(hidden)), *kept

    def _sight(self, store: Ring, seen: Tensor, where: Tensor, first: int) -> _Sight:
        """What the tokens from `first` on see."""
        backbone, tokens = self.backbone, seen.shape[1]
        near = newest(store, self.window, where)
        window_at = -1 - near.age if self.config.window_position == "kept" else torch.zeros_like(near.age)
        own = itself(seen[:, None, :].expand(-1, tokens, -1).tril())
        joint = backbone.windowed(
            torch.cat([near.seen, own], dim=2), where, torch.cat([window_at, where], dim=1), first
        )
        return _Sight(
            turn=backbone.rotation(where[:, first:], queries=True),
            turn_keys=backbone.rotation(where),
            visible=backbone.visible(seen, first=first, positions=where),
            turn_window=backbone.rotation(window_at),
            visible_joint=joint,
            near=near,
            beyond=beyond(store, self.window, where) if self.config.top_k and store.slots else None,
            seen=seen,
            first=first,
        )

    def _attend(self, layer: int, own: knn.Local, state: UniMixState, sight: _Sight) -> Tensor:
        """Attention ``[rows, tokens, heads * head]`` of a reading layer to its input and the store, in one softmax."""
        config, store, number = self.config, state.store, self.layers.index(layer)
        keys, values = store.keys[number], store.values[number]
        window = self.backbone.rotate(sight.near.of(keys), sight.turn_window[layer])
        q = own.q * self.backbone.head_width**-0.5
        here = knn.Local(
            q,
            torch.cat([window, own.keys], dim=2),
            torch.cat([sight.near.of(values), own.values], dim=2),
            sight.visible_joint[layer],
        )
        if sight.beyond is None:
            out = knn.window_attention(here.q, here.keys, here.values, here.visible)
            return out.transpose(1, 2).flatten(2)
        if state.host_seeds is not None:
            heads, seeds = q.shape[1], state.host_seeds
            index = any_of(store, config.top_k, sight.beyond, sight.seen, heads, seeds, layer)[:, :, sight.first :]
        else:
            instead = store.valid() if config.retrieve_twice else None
            index = best(q, keys, config.top_k, sight.beyond[:, sight.first :], instead)
        return knn.attend_retrieved(q, keys, values, index, local=here).transpose(1, 2).flatten(2)

    def flops(self, tokens: int, remembered: int) -> int:
        """One pass over the text and both copies of the memory; the store is searched as far as it is filled."""
        config, backbone = self.config, self.backbone
        inputs = tokens + (2 if remembered else 1) * config.memory_tokens
        slots = min(self.capacity, remembered)
        found = min(config.top_k, slots)
        searched = 2 * slots if config.top_k and config.selection == "best" else 0
        per_query = (searched + 4 * (found + min(self.window, slots))) * backbone.heads * backbone.head_width
        return backbone.flops(inputs, inputs, predicted=tokens) + len(self.layers) * inputs * per_query


def reading_layers(config: UniMixConfig, window: int, layers: int) -> tuple[int, ...]:
    """The layers of a backbone of `layers` that read the store, in order; none where nothing is read.

    Raises:
        UserError: there is no such layer.
    """
    if not (config.top_k or window):
        return ()
    chosen = tuple(range(layers // 2, layers)) if config.layers is None else tuple(sorted(set(config.layers)))
    if not all(0 <= layer < layers for layer in chosen):
        raise UserError(f"unimix.layers = {list(chosen)}: this backbone has layers 0 to {layers - 1}.")
    return chosen
