"""Full context: the backbone attends to everything read so far. The ceiling, at a cost that grows with the text."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memory_bench.axes import Axes
from memory_bench.backbone.model import Backbone, Past
from memory_bench.budget import Budget, BudgetExceeded
from memory_bench.card import BackboneCard
from memory_bench.errors import UserError
from memory_bench.protocol import MemoryModel, Readout, Segment, State, Traits

LONG = 16_384  # tokens: a limit that leaves room for more is left to the run, since no shipped text is longer
FLOATS = 4  # bytes


@dataclass(frozen=True, slots=True)
class FullContextConfig:
    """Options of `FullContext`."""

    segment: int = 512  # tokens per step; without influence on predictions, unless the backbone shifts keys
    rotary: bool | None = None  # rotary positions on or off; None: as the backbone has them
    # Longest text that the budget's memory holds, in tokens; a longer one is over the budget there. None: no limit.
    context: int | None = field(default=None, metadata={"left_out": True})

    def __post_init__(self) -> None:
        if self.context is not None and self.context < 1:
            raise UserError("full-context: context must be at least 1; leave it out for no limit.")


@dataclass(frozen=True, slots=True)
class Transcript(State):
    """Keys and values of all text, in the pieces it came in: a longer transcript shares them instead of copying.

    Attributes:
        parts: cached pieces, oldest first.
        seen: ``[rows]`` int64, real tokens so far.
    """

    parts: tuple[Past, ...]
    seen: Tensor


class FullContext(MemoryModel[Transcript]):
    """The backbone over the whole stream.

    With learned positions (GPT-2, OPT) a stream can be as long as the backbone has positions. The `tiny` backbone's
    key shift sees one step's input only, so with it predictions depend slightly on the cut.
    """

    Config = FullContextConfig
    source = "The backbone as published, with a cache of all keys and values."
    axes = Axes(
        unit="token kv", capacity="grows", write="direct", read="all", inject="all layers",
        fusion="one softmax", order="kept",
    )  # fmt: skip

    def __init__(self, backbone: Backbone, config: FullContextConfig, rng: torch.Generator) -> None:
        super().__init__()
        del rng  # nothing to initialise
        if config.rotary is not None:
            if backbone.family != "llama":
                raise UserError(f"full-context: the {backbone.family} backbone has no rotary positions to switch.")
            backbone.rotary = config.rotary
        self.backbone = backbone
        self.config = config
        self.traits = Traits(segment=config.segment, bounded=False, chunk_invariant=not len(backbone.key_shift))

    @classmethod
    def fit(cls, card: BackboneCard, budget: Budget) -> FullContextConfig:
        """Steps of the backbone's own window, and the longest context that the budget's memory holds.

        Of one text in float32, beside the weights and, where all are trained, their gradients and moments: its keys and
        values, once more for the control that reads another text's, and the joined and turned ones of one layer.
        """
        context = None
        if budget.device_bytes is not None:
            weights = FLOATS * card.parameters * (4 if budget.trains and not card.pretrained else 1)
            token = 2 * FLOATS * card.layers * card.kv_heads * card.head_width
            held = token * (2 + 4 / card.layers)
            fits = max(card.window, int((budget.device_bytes - weights) / held))
            context = fits if fits < LONG else None
        return FullContextConfig(segment=card.window, context=context)

    def open(self, rows: int, *, seeds: Sequence[int] | None = None) -> Transcript:
        """See `MemoryModel.open`."""
        del seeds
        return Transcript((), torch.zeros(rows, dtype=torch.long, device=self.backbone.device))

    def step(self, state: Transcript, segment: Segment, *, write: bool = True) -> tuple[Readout, Transcript]:
        """See `MemoryModel.step`.

        Raises:
            UserError: the stream is longer than the backbone has learned positions.
            BudgetExceeded: it is longer than the budget's memory holds.
        """
        seen = state.seen + segment.lengths
        limit = self.backbone.max_positions
        if limit is not None and int(seen.max()) > limit:
            raise UserError(
                f"full-context cannot read more than {limit} tokens with this {self.backbone.family} backbone, "
                "which has no further positions. Limit the text or choose a backbone with rotary positions."
            )
        allowed = self.config.context
        if allowed is not None and (reached := int(seen.max())) > allowed:
            raise BudgetExceeded("context", allowed, reached, f"token {allowed + 1:,}")
        where = state.seen[:, None] + self.backbone.positions(segment.mask)
        if limit is not None:
            where = where.clamp(max=limit - 1)  # padding of a row that is exactly full points one further
        embeds = self.backbone.embed(segment.ids)
        hidden, own = self.backbone.run_cached(embeds, segment.mask, state.parts, positions=where, keep=write)
        if own is not None:
            state = Transcript((*state.parts, own), seen)
        return Readout(hidden, self.backbone.head), state

    def flops(self, tokens: int, remembered: int) -> int:
        """See `MemoryModel.flops`."""
        return self.backbone.flops(tokens, keys=remembered + tokens)
