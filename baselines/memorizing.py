"""Memorizing Transformer: a few layers attend, beside their window, to the best of thousands of stored keys.

Unusual here:

- Keys are stored before rotary (after q/k-norm), so a memory has no position; `memory_position` says how far away it
  looks to a query.
- Search is exact: an approximate index misses more of the best keys of a real model than of random vectors, on which
  such indexes are compared. Memory is found by the product that attends to it; the current segment is written after it
  was read, so the choice of memories for a token depends on earlier segments and that token's query only.
- No gradient goes into store, sinks or XL cache, nor through the choice of entries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from memory_bench.axes import Axes
from memory_bench.backbone.layers import Rotation, itself
from memory_bench.backbone.model import Backbone, Past
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.choices import check_choices
from memory_bench.errors import UserError
from memory_bench.protocol import MemoryModel, Readout, Segment, State, Traits

from .parts import knn
from .parts.cache import empty_cache, keep_recent, next_positions
from .parts.drawing import draw_slots, row_seeds
from .parts.ring import Ring

SEGMENTS = 128  # segments that the store holds at most
STORE_SHARE = 10  # a stream's store takes at most this fraction of the budget's device memory


@dataclass(frozen=True, slots=True)
class MemorizingConfig:
    """Options of the Memorizing Transformer; symbols of the paper and its code in brackets."""

    segment: int = 512  # text tokens per step
    layers: tuple[int, ...] | None = None  # layers with memory, from 0; None: one, three quarters up
    slots: int = 8192  # newest tokens stored per memory layer [N]
    top_k: int = 32  # entries retrieved per query and head [k]; 0: memory off
    search: Literal["exact", "bucketed"] = "exact"  # bucketed: the best of slots i, i + k, i + 2k … (official)
    fusion: Literal["gate", "joint"] = "gate"  # gate: two softmaxes, mixed per head; joint: one over window and memory
    gate_init: float = 0.0  # of the gate before its sigmoid [b_h]; -4 leaves a pretrained model almost as it is
    memory_position: Literal["none", "query", "constant"] = "none"  # rotary angle of queries that look at memory
    memory_distance: int | None = None  # with "constant": how far away, in tokens; None: the window
    normalise: bool = False  # queries and keys of memory layers get length 1 and a learned scale [alpha_h]
    scale_init: float = 1.0  # of that scale
    xl_cache: int = 0  # previous tokens that every layer attends to (rotary backbones only)
    sinks: int = 0  # first tokens of the stream that every layer keeps attending to
    exclude_recent: bool = False  # do not retrieve what is in the XL cache
    strict_causal: bool = False  # official: a token does not attend to itself
    mask_unwritten: bool = True  # official, off: empty slots are retrieved as zeros, and the gate always applies
    mask_cache: bool = True  # official, off: the zeros of an empty XL cache are attended to
    selection: Literal["best", "random"] = field(default="best", metadata={"left_out": True})  # random: a control

    def __post_init__(self) -> None:
        if min(self.segment, self.slots) < 1 or min(self.top_k, self.xl_cache, self.sinks) < 0:
            raise UserError("memorizing: segment and slots must be at least 1, other sizes cannot be negative.")
        if self.memory_distance is not None and self.memory_distance < 0:
            raise UserError("memorizing: memory_distance cannot be negative; leave it out for the window.")
        if self.search == "bucketed" and self.top_k and self.slots % self.top_k:
            raise UserError(f"memorizing: bucketed search needs slots = {self.slots} to be a multiple of top_k.")
        if self.exclude_recent and self.xl_cache >= self.slots:
            raise UserError("memorizing: exclude_recent leaves nothing to retrieve unless slots exceeds xl_cache.")
        check_choices("memorizing", self)

    @classmethod
    def official(cls) -> "MemorizingConfig":
        """As meliad at commit cc1aef5, with the sizes of its 8k configuration.

        Meliad normalises queries and keys of all its layers; here the layers without memory stay the backbone's.
        """
        return cls(
            top_k=128,
            search="bucketed",
            normalise=True,
            xl_cache=512,
            strict_causal=True,
            mask_unwritten=False,
            mask_cache=False,
        )

    @property
    def whole_store(self) -> bool:
        """Search all slots from the start: empty ones count, or buckets are laid out over all."""
        return not self.mask_unwritten or self.search == "bucketed"


@dataclass(frozen=True, slots=True)
class MemorizingState(State):
    """Stored keys and values of the memory layers, sinks and XL cache of all (None without), seeds of random draws."""

    store: Ring
    window: Past | None
    host_seeds: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Sight:
    """What the queries of a step may see.

    Attributes:
        turn: per layer, rotation of the queries in the window.
        turn_keys: per layer, of the window's keys, cached ones first.
        turn_far: per layer, of queries that look at memory.
        visible: per layer, ``[rows, 1, tokens, cached + tokens]`` bool; None: plain causal.
        valid: ``[rows, slots]`` bool, slots that may be retrieved; None: all.
        known: ``[rows]`` bool, rows that have such slots; None: all.
    """

    turn: tuple[Rotation | None, ...]
    turn_keys: tuple[Rotation | None, ...]
    turn_far: tuple[Rotation | None, ...]
    visible: tuple[Tensor | None, ...]
    valid: Tensor | None
    known: Tensor | None


class Memorizing(MemoryModel[MemorizingState]):
    """Wu et al., *Memorizing Transformers* (ICLR 2022).

    Attributes: ``memory_gate`` (b, ``[heads]`` per memory layer, with fusion "gate") and ``attention_scale`` (alpha,
    ``[heads]`` per memory layer, with `normalise`): all the parameters it adds.

    Raises:
        UserError: a memory layer does not exist, or the backbone has too few positions or cannot move cached keys.
    """

    Config = MemorizingConfig
    version: ClassVar[int] = 1
    source: ClassVar[str] = (
        "arXiv:2203.08913; google-research/meliad@cc1aef5. Deviations by default: exact search, k 32 as in the paper, "
        "queries and keys not normalised, empty slots masked, a token sees itself; fusion joint as in "
        "lucidrains/memorizing-transformers-pytorch@272e39b; without training as in Extended Mind Transformers "
        "(normal-computing/extended-mind-transformers@4f068c1) at InfLLM's constant distance."
    )
    axes = Axes(
        unit="token kv", capacity="fixed", overflow="drop oldest", write="direct", read="by similarity per token",
        inject="one layer", fusion="gated mix", order="lost", trained="all",
    )  # fmt: skip
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {"memory off": {"top_k": 0}}

    def __init__(self, backbone: Backbone, config: MemorizingConfig, rng: torch.Generator) -> None:
        super().__init__()
        del rng  # initial values are constants
        self.backbone = backbone
        self.config = config
        self.layers = memory_layers(config, backbone.layers)
        if config.xl_cache and backbone.max_positions is not None:
            raise UserError("memorizing: learned positions are part of a cached key: this backbone needs xl_cache = 0.")
        room = None if backbone.max_positions is None else backbone.max_positions - config.sinks
        if room is not None and config.segment > room:
            raise UserError(f"memorizing: with these positions and sinks, segment must be at most {room}.")
        self.traits = Traits(segment=config.segment)

        def per_layer(wanted: bool, value: float) -> nn.ParameterDict:
            start = torch.full((backbone.heads,), value, device=backbone.device, dtype=backbone.dtype)
            return nn.ParameterDict({str(n): nn.Parameter(start.clone()) for n in (self.layers if wanted else ())})

        self.memory_gate = per_layer(config.fusion == "gate", config.gate_init)
        self.attention_scale = per_layer(config.normalise, config.scale_init)

    @classmethod
    def fit(cls, card: BackboneCard, budget: Budget) -> MemorizingConfig:
        """One gated layer as in the paper; other ways without positions, and where nothing is trained.

        A pretrained backbone that is not trained has no gate to learn: its upper half retrieves at a constant distance
        into one softmax (Extended Mind Transformers: one layer is not enough). The small ones that are trained from
        scratch, without positions, have all their layers retrieve. `tiny` has learnt to predict from its window before
        its memory is added, so it counts as pretrained: its gate starts almost closed.
        """
        options: dict[str, Any] = {"segment": card.window}
        rotary = card.max_positions is None
        if card.pretrained:
            # A pretrained model needs its first tokens, and memories at a distance it was trained on.
            options |= {"memory_position": "constant", "sinks": 4}
        if card.pretrained and not budget.trains:
            options |= {"layers": tuple(range(card.layers // 2, card.layers)), "fusion": "joint"}
        elif card.small and card.rotary:
            options |= {"memory_position": "constant", "gate_init": -4.0, "top_k": 16}
        elif card.small:
            options |= {"layers": tuple(range(card.layers)), "fusion": "joint", "top_k": 16}
        else:
            options |= {"gate_init": -4.0 if card.pretrained else 0.0, "xl_cache": card.window if rotary else 0}
        if card.max_positions is not None:
            options["segment"] = min(card.window, card.max_positions - options.get("sinks", 0))
        slots = min(MemorizingConfig().slots, SEGMENTS * options["segment"])
        if budget.device_bytes is not None:
            slot = 2 * 4 * len(options.get("layers", (0,))) * card.kv_heads * card.head_width  # bytes, in float32
            slots = max(1, min(slots, budget.device_bytes // STORE_SHARE // slot))
        options["slots"] = slots
        return MemorizingConfig(**options)

    def open(self, rows: int, *, seeds: Sequence[int] | None = None) -> MemorizingState:
        """See `MemoryModel.open`; only a random selection draws."""
        backbone, config = self.backbone, self.config
        shape = (rows, backbone.kv_heads, backbone.head_width)
        like = torch.empty(0, device=backbone.device, dtype=backbone.dtype)
        store = Ring.empty(len(self.layers), shape, config.slots, like, whole=config.whole_store)
        window = empty_cache(backbone, rows, self._window) if self._window else None
        return MemorizingState(store, window, row_seeds(rows, seeds) if config.selection == "random" else None)

    def step(self, state: MemorizingState, segment: Segment, *, write: bool = True) -> tuple[Readout, MemorizingState]:
        """See `MemoryModel.step`."""
        hidden, own = self._read(state, segment, self.backbone.layers, self.backbone.layers)
        return Readout(hidden, self.backbone.head), self._written(state, own) if write else state

    def absorb(self, state: MemorizingState, segment: Segment) -> MemorizingState:
        """See `MemoryModel.absorb`: only as deep as keys are kept, and of the last of these layers only the keys."""
        needed = self._kept(state.window is not None and not bool(state.window.mask[:, : self.config.sinks].all()))
        return self._written(state, self._read(state, segment, needed - 1, needed)[1]) if needed else state

    def _kept(self, sinks_wanted: bool) -> int:
        """How many layers must be read for what is written."""
        if self.config.xl_cache or sinks_wanted:
            return self.backbone.layers
        return self.layers[-1] + 1 if self.layers else 0

    def _read(self, state: MemorizingState, segment: Segment, whole: int, projected: int) -> tuple[Tensor, Past]:
        """Hidden states after `whole` layers (final ones after all), keys and values of `projected` ones."""
        backbone, window, mask = self.backbone, state.window, segment.mask
        where = backbone.positions(mask) if window is None else next_positions(backbone, window, mask)
        embeds = backbone.embed(segment.ids)
        resumed = backbone.resume(embeds, (where, mask), (state,))
        first = resumed.first
        sight = self._sight(state, mask, where, first)
        hidden = backbone.begin(embeds[:, first:], where[:, first:])
        keys, values = [], []
        for layer in range(projected):
            q, k, v = backbone.project(layer, backbone.norm_input(layer, hidden), mask[:, first:])
            if self.config.normalise and layer in self.layers:
                q, k = knn.normalise(q), knn.normalise(k)
            k, v = resumed.join(k, v)
            keys.append(k)
            values.append(v)
            if layer >= whole:
                continue
            if window is not None:
                k, v = torch.cat([window.keys[layer], k], dim=2), torch.cat([window.values[layer], v], dim=2)
            hidden = backbone.close(layer, hidden, self._attend(layer, (q, k, v), state, sight, mask))
        if whole == backbone.layers:
            hidden = resumed.finish(backbone.end(hidden))
        return hidden, Past(tuple(keys), tuple(values), mask, where)

    def _sight(self, state: MemorizingState, mask: Tensor, where: Tensor, first: int) -> _Sight:
        """Of the tokens from `first` on."""
        config, window = self.config, state.window
        turn = self.backbone.rotation(where[:, first:], queries=True)
        keys_at = where if window is None else torch.cat([window.positions, where], dim=1)
        valid = state.store.valid(config.xl_cache if config.exclude_recent else 0)
        full = bool(valid.all())
        return _Sight(
            turn=turn,
            turn_keys=self.backbone.rotation(keys_at),
            turn_far=self._turn_far(turn, where),
            visible=self.backbone.windowed(self._visible(mask, window, first), where, keys_at, first),
            valid=None if full else valid,
            known=None if full or not config.mask_unwritten else valid.any(dim=1),
        )

    def _turn_far(self, turn: tuple[Rotation | None, ...], where: Tensor) -> tuple[Rotation | None, ...]:
        config = self.config
        if config.memory_position == "none":
            return (None,) * self.backbone.layers
        if config.memory_position == "query":
            return turn
        distance = self._window + config.segment if config.memory_distance is None else config.memory_distance
        return self.backbone.rotation(torch.full_like(where[:1, :1], distance), queries=True)

    def _visible(self, mask: Tensor, window: Past | None, first: int) -> Tensor | None:
        """Which of [cached; own] keys every query sees; one that would see nothing sees itself."""
        config, tokens = self.config, mask.shape[1]
        if window is None and not first and not config.strict_causal and bool(mask.all()):
            return None
        own = mask[:, None, :].expand(-1, tokens, -1).tril(-1 if config.strict_causal else 0)
        if window is not None:
            cached = window.mask if config.mask_cache else torch.ones_like(window.mask)
            own = torch.cat([cached[:, None, :].expand(-1, tokens, -1), own], dim=2)
        return itself(own)

    def _attend(
        self, layer: int, qkv: tuple[Tensor, Tensor, Tensor], state: MemorizingState, sight: _Sight, mask: Tensor
    ) -> Tensor:
        """Attention ``[rows, tokens, heads * head]`` of a layer to its window and, if it has one, its memory."""
        backbone, config, (q, keys, values) = self.backbone, self.config, qkv
        near, keys = backbone.rotate(q, sight.turn[layer]), backbone.rotate(keys, sight.turn_keys[layer])
        if layer not in self.layers:
            return backbone.attend(near, keys, values, sight.visible[layer])
        scale = self._scale(layer)
        near, far = near * scale, backbone.rotate(q, sight.turn_far[layer]) * scale
        number = self.layers.index(layer)
        gate = self.memory_gate[str(layer)] if config.fusion == "gate" else None
        here = knn.Local(near, keys, values, sight.visible[layer])
        valid, drawn, store, seeds = (sight.valid, sight.known), None, state.store, state.host_seeds
        if seeds is not None and store.slots:
            may = store.valid(config.xl_cache if config.exclude_recent else 0)
            drawn = draw_slots(may, config.top_k, mask, q.shape[1], seeds, store.written, layer)[:, :, -q.shape[2] :]
        return window_and_memory(config, here, far, store, number, valid, gate, drawn).transpose(1, 2).flatten(2)

    def _scale(self, layer: int) -> Tensor | float:
        if self.config.normalise:
            scale: Tensor = self.attention_scale[str(layer)]
            return scale.abs()[:, None, None]
        return float(self.backbone.head_width**-0.5)

    def _written(self, state: MemorizingState, own: Past) -> MemorizingState:
        """The state after a segment with the entries `own`."""
        config, window, store = self.config, state.window, state.store
        if self.layers:
            keys, values = ([entries[n] for n in self.layers] for entries in (own.keys, own.values))
            store = store.write(keys, values, own.mask)
        if window is not None and (config.xl_cache or not bool(window.mask.all())):  # sinks alone never change again
            window = keep_recent(window.extend(own.detach()), config.xl_cache, config.sinks)
        return MemorizingState(store, window, state.host_seeds)

    def flops(self, tokens: int, remembered: int) -> int:
        """See `MemoryModel.flops`; searches what was written, and computes empty slots of sinks and XL cache."""
        memory = len(self.layers) * self._memory_flops(tokens, remembered)
        return self.backbone.flops(tokens, keys=self._window + tokens) + memory

    def absorb_flops(self, tokens: int, remembered: int) -> int:
        """See `MemoryModel.absorb_flops`."""
        backbone = self.backbone
        needed = self._kept(remembered < self.config.sinks)
        if not needed:
            return 0
        whole = sum(backbone.layer_flops(layer, tokens, self._window + tokens) for layer in range(needed - 1))
        memory = sum(layer < needed - 1 for layer in self.layers) * self._memory_flops(tokens, remembered)
        around = backbone.flops(tokens, 0, predicted=0)  # beside the layers, OPT projects in and out: here only in
        around -= sum(backbone.layer_flops(layer, tokens, 0) for layer in range(backbone.layers))
        return whole + memory + backbone.project_flops(needed - 1, tokens) + around // 2

    @property
    def _window(self) -> int:
        """Slots of sinks and XL cache."""
        return self.config.sinks + self.config.xl_cache

    def _memory_flops(self, tokens: int, remembered: int) -> int:
        """Of search and attention in one memory layer."""
        config, backbone = self.config, self.backbone
        slots = config.slots if config.whole_store else min(config.slots, remembered)
        chosen = knn.flops(slots, config.top_k, bucketed=config.search == "bucketed")
        per_query = (4 * min(config.top_k, slots) if config.selection == "random" else chosen) * backbone.head_width
        return tokens * backbone.heads * per_query


def memory_layers(config: MemorizingConfig, layers: int) -> tuple[int, ...]:
    """The layers of a backbone of `layers` that have memory, in order.

    Raises:
        UserError: there is no such layer.
    """
    if not config.top_k:
        return ()
    chosen = (max(0, round(0.75 * layers) - 1),) if config.layers is None else tuple(sorted(set(config.layers)))
    if not all(0 <= layer < layers for layer in chosen):
        raise UserError(f"memorizing.layers = {list(chosen)}: this backbone has layers 0 to {layers - 1}.")
    return chosen


def window_and_memory(
    config: MemorizingConfig,
    window: knn.Local,
    far: Tensor,
    store: Ring,
    number: int,
    valid: tuple[Tensor | None, Tensor | None],
    gate: Tensor | None,
    drawn: Tensor | None = None,
) -> Tensor:
    """Attention ``[rows, heads, tokens, head]`` of a memory layer.

    Args:
        config: search and fusion.
        window: scaled queries, keys and values of the window.
        far: ``[rows, heads, tokens, head]``, scaled queries that look at memory.
        store: the memory.
        number: which of its layers.
        valid: slots that may be retrieved ``[rows, slots]``, rows that have any ``[rows]``; None: all.
        gate: ``[heads]`` before its sigmoid; None with fusion "joint".
        drawn: slots that are read, ``[rows, heads, tokens, k]``, instead of the best.
    """
    here = (window.q, window.keys, window.values, window.visible)
    if not store.slots:
        return knn.window_attention(*here)
    stored, local = (store.keys[number], store.values[number]), window if gate is None else None
    search = partial(knn.retrieve_and_attend, bucketed=config.search == "bucketed", dilute=not config.mask_unwritten)
    if drawn is not None:
        found = knn.attend_retrieved(far, *stored, drawn, local=local)
    else:
        found = search(far, *stored, config.top_k, valid=valid[0], local=local)
    return found if gate is None else knn.mix_by_gate(knn.window_attention(*here), found, gate, valid[1])
