"""Test-time training: what was just read is learned, by gradient steps on low-rank weights that belong to the stream.

Dynamic evaluation (Krause et al. 2018): a segment is predicted first, and then the loss of its tokens changes the
weights that predict the next.

Unusual here:

- The state is weights: every row has its own low-rank updates beside some projections of the backbone, and an
  optimiser's moments where it has some. The backbone stays as it is, and is trained as any other model's.
- A step that writes takes gradients of its own, whether or not its caller does; none of them leaves it.
- The loss is that of the tokens within a segment: its first token is predicted by the segment before, and not learned.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from memory_bench.axes import Axes
from memory_bench.backbone.lora import Projection, kinds_of
from memory_bench.backbone.model import Backbone
from memory_bench.budget import Budget
from memory_bench.card import ADAPTED, BackboneCard
from memory_bench.choices import check_choices
from memory_bench.errors import UserError, unknown
from memory_bench.protocol import MemoryModel, Readout, Segment, State, Traits

from .parts.learning import Learned, adam, descend, loss_slope

SCALE = 1.0  # of the update beside a projection
SMALL_RATE = 1e-2  # learning rate on a small backbone, a step of which reads fewer tokens
ATTENTION = 10  # operations of attention's gradient per pair of positions and channel: its scores again, four products
BELOW: dict[str, frozenset[str]] = {
    **dict.fromkeys("qkv", frozenset()),
    "o": frozenset("qkv"),
    **dict.fromkeys(("gate", "up"), frozenset("qkvo")),
    "down": frozenset((*"qkvo", "gate", "up")),
}
"""Projections of a layer that what a projection is given has gone through."""


@dataclass(frozen=True, slots=True)
class TTTConfig:
    """Options of test-time training."""

    segment: int = 512  # text tokens per step
    targets: tuple[str, ...] = ("q", "v")  # projections with an update, in every layer
    rank: int = 8  # of the updates
    optimiser: Literal["sgd", "adam"] = "adam"  # adam: its moments belong to the state
    lr: float = 5e-3  # learning rate of the steps; 0: nothing is learned
    steps: int = 1  # gradient steps per segment
    decay: float = 0.0  # share of the distance to the start that every step takes back
    # before: official `dynamic_eval` without `split_text`: what is scored is learned first, which looks ahead
    learn: Literal["after", "before"] = "after"

    def __post_init__(self) -> None:
        if min(self.segment, self.rank, self.steps) < 1:
            raise UserError("ttt: segment, rank and steps must be at least 1.")
        if self.lr < 0 or not 0 <= self.decay <= 1:
            raise UserError("ttt: lr must not be negative, and decay must be a share from 0 to 1.")
        if not self.targets:
            raise UserError(f"ttt: targets names nothing; it may name {', '.join(ADAPTED)}.")
        for target in self.targets:
            if target not in ADAPTED:
                raise unknown("target of ttt", target, ADAPTED)
        check_choices("ttt", self)


@dataclass(frozen=True, slots=True)
class TTTState(State):
    """The weights of every stream.

    Attributes:
        weights: per updated projection, in the order of `TTT.places`.
        steps: ``[rows]`` int64, gradient steps taken.
    """

    weights: tuple[Learned, ...]
    steps: Tensor


class TTT(MemoryModel[TTTState]):
    """Dynamic evaluation with low-rank weights.

    Attributes: ``places``, (layer, name of the projection) of every update; ``start_i``, buffers ``[rank, inputs]``,
    the first A of each (its B starts at zero, so that the first segment is the backbone's).
    """

    Config = TTTConfig
    version: ClassVar[int] = 1
    source: ClassVar[str] = (
        "Dynamic evaluation: Krause et al., arXiv 1709.07432; test-time training as arXiv 2305.18466, "
        "socialfoundations/tttlm@99d4e0a (dynamic_eval). Deviations by default: low-rank weights instead of all, what "
        "is scored is learned after it was scored, the optimiser's moments belong to the text, no dropout."
    )
    axes = Axes(
        unit="weights", capacity="fixed", overflow="merge", write="gradient", read="all", inject="all layers",
        fusion="weights", order="lost", trained="nothing",
    )  # fmt: skip

    def __init__(self, backbone: Backbone, config: TTTConfig, rng: torch.Generator) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config
        if backbone.max_positions is not None and config.segment > backbone.max_positions:
            raise UserError(f"ttt: with this backbone's positions, segment must be at most {backbone.max_positions}.")
        before = config.learn == "before"
        self.traits = Traits(segment=config.segment, look_ahead=config.segment - 1 if before else 0)
        wanted = set(config.targets)
        self.places: list[tuple[int, str]] = []
        self.shapes: list[tuple[int, int]] = []  # (outputs, inputs)
        self.projections = [backbone.projections(layer) for layer in range(backbone.layers)]
        for layer, own in enumerate(self.projections):
            chosen = [name for name in own if kinds_of(name) & wanted]
            self.places += [(layer, name) for name in chosen]
            self.shapes += [own[name] for name in chosen]
        for number, (_, inputs) in enumerate(self.shapes):
            drawn = (torch.rand(config.rank, inputs, generator=rng) * 2 - 1) * inputs**-0.5
            self.register_buffer(f"start_{number}", drawn.to(backbone.device, backbone.dtype))

    @classmethod
    def fit(cls, card: BackboneCard, budget: Budget) -> TTTConfig:
        """Segments of the backbone's own window; small backbones have updates of half the rank, and a higher rate.

        The rates were found on training books, of the `tiny` backbone and of a pretrained one.
        """
        del budget
        segment = card.window if card.max_positions is None else min(card.window, card.max_positions)
        return TTTConfig(segment=segment, rank=4, lr=SMALL_RATE) if card.small else TTTConfig(segment=segment)

    def open(self, rows: int, *, seeds: Sequence[int] | None = None) -> TTTState:
        """See `MemoryModel.open`; nothing is drawn."""
        del seeds
        moments = self.config.optimiser == "adam"
        weights = tuple(
            Learned.start(self.get_buffer(f"start_{number}"), outputs, rows, moments)
            for number, (outputs, _) in enumerate(self.shapes)
        )
        return TTTState(weights, torch.zeros(rows, dtype=torch.long, device=self.backbone.device))

    def step(self, state: TTTState, segment: Segment, *, write: bool = True) -> tuple[Readout, TTTState]:
        """See `MemoryModel.step`."""
        if self.config.learn == "before":
            learned = self._learned(state, segment)
            hidden = self._read(learned.weights, segment)
            return Readout(hidden, self.backbone.head), learned if write else state
        if not write:
            return Readout(self._read(state.weights, segment), self.backbone.head), state
        leaves = [w.leaf() for w in state.weights]
        wanted = torch.is_grad_enabled()
        with torch.enable_grad():
            hidden = self._read_apart(leaves, segment)
        after = self._learned(state, segment, (leaves, hidden), again=wanted)
        return Readout(hidden if wanted else hidden.detach(), self.backbone.head), after

    def _read(self, weights: Sequence[Learned], segment: Segment) -> Tensor:
        """Final hidden states ``[rows, tokens, width]`` of a segment under the weights of its rows."""
        backbone, mask = self.backbone, segment.mask
        where, embeds = backbone.positions(mask), backbone.embed(segment.ids)
        resumed = backbone.resume(embeds, (where, mask), tuple(weights), limit=self._limit)
        first = resumed.first
        turn, turn_keys = backbone.rotation(where[:, first:], queries=True), backbone.rotation(where)
        visible = backbone.visible(mask, first=first, positions=where)
        hidden = backbone.begin(embeds[:, first:], where[:, first:])
        beside = dict(zip(self.places, weights, strict=True))
        for layer in range(backbone.layers):

            def linear(name: str, projection: Projection, x: Tensor, layer: int = layer) -> Tensor:
                own = beside.get((layer, name))
                return projection(x) if own is None else projection(x) + SCALE * own(x)

            q, k, v = backbone.project(layer, backbone.norm_input(layer, hidden), mask[:, first:], linear)
            k, v = resumed.join(k, v)
            q, k = backbone.rotate(q, turn[layer]), backbone.rotate(k, turn_keys[layer])
            hidden = backbone.close(layer, hidden, backbone.attend(q, k, v, visible[layer]), linear)
        return resumed.finish(backbone.end(hidden))

    @property
    def _limit(self) -> int | None:
        return 0 if self.config.learn == "before" else None  # a beginning depends on what follows it

    def _learned(
        self,
        state: TTTState,
        segment: Segment,
        first: tuple[list[Learned], Tensor] | None = None,
        *,
        again: bool = False,
    ) -> TTTState:
        """The state after gradient steps on a segment; rows without a token to predict keep theirs.

        Args:
            state: before them.
            segment: what is learned.
            first: leaves and hidden states of a pass that was made with them; None: there is none yet.
            again: that pass is needed for other gradients, too.
        """
        pairs = segment.mask[:, 1:] & segment.mask[:, :-1]
        some = pairs.any(dim=1)
        if not bool(some.any()):
            return state
        rule = adam if self.config.optimiser == "adam" else descend
        for _ in range(self.config.steps):
            leaves, hidden = first or ([w.leaf() for w in state.weights], None)
            if hidden is None:
                with torch.enable_grad():
                    hidden = self._read_apart(leaves, segment)
            slope = loss_slope(self.backbone.head, hidden, segment.ids, pairs, self.backbone.vocab)
            flat = [t for leaf in leaves for t in (leaf.a, leaf.b)]
            keep = again and first is not None
            gradients = torch.autograd.grad(hidden, flat, slope, retain_graph=keep)
            taken, first = state.steps + some, None
            weights = []
            for n, old in enumerate(state.weights):
                new = rule(old, gradients[2 * n : 2 * n + 2], taken, self.config.lr)
                new = new.towards(self.get_buffer(f"start_{n}"), self.config.decay)
                weights.append(new.where(some, old))
            state = TTTState(tuple(weights), taken)
        return state

    def _read_apart(self, weights: Sequence[Learned], segment: Segment) -> Tensor:
        """As `_read`, never taking over what another pass computed: that has no gradients."""
        passes, self.backbone._passes = self.backbone._passes, None
        try:
            return self._read(weights, segment)
        finally:
            self.backbone._passes = passes

    def flops(self, tokens: int, remembered: int) -> int:
        """Every pass with its updates, and the gradients, which go no deeper than the lowest update."""
        del remembered
        backbone, config = self.backbone, self.config
        updates = 2 * tokens * config.rank * sum(map(sum, self.shapes))
        passed = backbone.flops(tokens, tokens, predicted=0) + updates
        head = 2 * backbone.width * backbone.vocab
        learning = config.steps * (2 * (tokens - 1) * head + self._gradient_flops(tokens)) if tokens > 1 else 0
        passes = config.steps + (config.learn == "before") if tokens > 1 else 1
        return passes * passed + tokens * head + learning

    def detached_flops(self, tokens: int, remembered: int) -> int:
        """All but one pass. See `MemoryModel.detached_flops`."""
        backbone = self.backbone
        updates = 2 * tokens * self.config.rank * sum(map(sum, self.shapes))
        return self.flops(tokens, remembered) - backbone.flops(tokens, tokens, predicted=tokens) - updates

    def _gradient_flops(self, tokens: int) -> int:
        """Of the way back from the final hidden states: as far as there is an update below."""
        backbone, rank, wanted = self.backbone, self.config.rank, set(self.config.targets)
        around = backbone.flops(tokens, 0, predicted=0)  # beside the layers, OPT projects in and out: here only out
        spent = (around - sum(backbone.layer_flops(layer, tokens, 0) for layer in range(backbone.layers))) // 2
        for layer, own in enumerate(self.projections):
            for name, (outputs, inputs) in own.items():
                kinds = kinds_of(name)
                pair = None if backbone.adapter is None else backbone.adapter.pair(layer, name)
                below = layer > 0 or bool(wanted & BELOW[min(kinds)])
                spent += 2 * tokens * (outputs * inputs + (0 if pair is None else pair.size)) * below
                if kinds & wanted:
                    spent += 2 * tokens * rank * (2 * outputs + inputs * (1 + below))
            if layer > 0 or wanted & set("qkv"):
                spent += ATTENTION * tokens * tokens * backbone.heads * backbone.head_width
        return spent
