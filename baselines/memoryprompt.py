"""MemoryPrompt: beside a frozen backbone, a small recurrent net writes the vectors that stand before the next segment.

Unusual here:

- Memory is made of one vector a segment, the final hidden state of its last token, by two layers and an LSTM whose
  shown state is cut into prompt vectors.
- A first segment has no prompt. Positions count prompt and text.
- The vectors' length is part of the training loss (`norm_penalty`), from where on the recipe says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memory_bench.axes import Axes
from memory_bench.backbone.model import Backbone
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.errors import UserError
from memory_bench.protocol import MemoryModel, Readout, Segment, State, Traits

from .parts.lstm import LSTMCell, uniform

GAIN = 1e-4  # of the first weights of the two layers (official)
SIZES = ((5, 1024), (2, 64))  # prompt vectors and width at most: official, and of a small backbone


@dataclass(frozen=True, slots=True)
class MemoryPromptConfig:
    """Hyper-parameters of MemoryPrompt."""

    segment: int | None = (
        512  # text tokens per step; official: a turn of a conversation; None: whatever a step is given
    )
    prompt_tokens: int = 5  # vectors before a segment; paper: P; 0: there is no memory
    width: int = 1024  # of both layers before the LSTM
    norm_penalty: float = 0.1  # of the mean length of the vectors, in the training loss; 0: none

    def __post_init__(self) -> None:
        if self.width < 1 or self.prompt_tokens < 0 or (self.segment is not None and self.segment < 1):
            raise UserError("memoryprompt: segment and width must be at least 1, and prompt_tokens not negative.")
        if self.norm_penalty < 0:
            raise UserError("memoryprompt: norm_penalty must not be negative.")

    @classmethod
    def official(cls) -> "MemoryPromptConfig":
        """The repository's sizes at commit 4ae266f: the defaults."""
        return cls()


@dataclass(frozen=True, slots=True)
class MemoryPromptState(State):
    """The state of the recurrent net.

    Attributes:
        shown: ``[rows, prompt_tokens * width of the backbone]``, the next prompt; LSTM: h.
        kept: same shape; LSTM: c.
        known: ``[rows]`` bool, something has been read.
    """

    shown: Tensor
    kept: Tensor
    known: Tensor


class MemoryPrompt(MemoryModel[MemoryPromptState]):
    """Rakotonirina and Baroni, *MemoryPrompt: A Light Wrapper to Improve Context Tracking* (LREC-COLING 2024).

    Attributes: ``layers`` (two matrices with biases) and ``cell``, all the parameters it adds.

    Raises:
        UserError: the backbone has fewer positions than prompt and segment need.
    """

    Config = MemoryPromptConfig
    version: ClassVar[int] = 1
    frozen_backbone: ClassVar[bool] = True
    source: ClassVar[str] = (
        "arXiv:2402.15268; ncarraz/MemoryPrompt@4ae266f. Deviations by default: segments of one length, trained on the "
        "next token (official: the first token of the answers to a conversation's last questions), padding on either "
        "side, a row without text keeps its state. Its training is the recipe `memoryprompt`."
    )
    axes = Axes(
        unit="segment vectors", capacity="fixed", overflow="merge", write="separate module",
        written_with_gradient=True, read="all", inject="input", fusion="prefix", order="lost", trained="added parts",
    )  # fmt: skip

    def __init__(self, backbone: Backbone, config: MemoryPromptConfig, rng: torch.Generator) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config
        needed, room = (config.segment or 1) + config.prompt_tokens, backbone.max_positions
        if room is not None and needed > room:
            raise UserError(
                f"memoryprompt needs {needed} positions for segment = {config.segment}, but the backbone has {room}: "
                f"use segment = {room - config.prompt_tokens} or less."
            )
        self.traits = Traits(segment=config.segment)
        widths = (backbone.width, config.width, config.width)
        self.layers = nn.ParameterDict()
        self.cell: LSTMCell | None = None
        if config.prompt_tokens:
            for number, (inside, outside) in enumerate(pairwise(widths), start=1):
                bound = GAIN * (6 / (inside + outside)) ** 0.5  # Xavier's, uniform
                self.layers[f"weight_{number}"] = uniform((outside, inside), bound, backbone, rng)
                self.layers[f"bias_{number}"] = nn.Parameter(torch.zeros_like(self.layers[f"weight_{number}"][:, 0]))
            self.cell = LSTMCell(config.width, config.prompt_tokens * backbone.width, backbone, rng)

    @classmethod
    def fit(cls, card: BackboneCard, budget: Budget) -> MemoryPromptConfig:
        """The most prompt vectors, and then the widest layers, that the budget's added parameters allow."""
        most, widest = SIZES[card.small]
        allowed = budget.added_parameters
        sizes = [(p, m) for p in range(most, 0, -1) for m in _halved(widest)]
        fitting = (s for s in sizes if allowed is None or added(card.width, *s) <= allowed)
        prompt, width = next(fitting, (0, widest))
        segment = card.window
        if card.max_positions is not None:
            segment = max(1, min(segment, card.max_positions - prompt))
        return MemoryPromptConfig(segment=segment, prompt_tokens=prompt, width=width)

    def open(self, rows: int, *, seeds: Sequence[int] | None = None) -> MemoryPromptState:
        """See `MemoryModel.open`; nothing is drawn."""
        del seeds
        backbone = self.backbone
        size = self.config.prompt_tokens * backbone.width
        nothing = torch.zeros(rows, size, device=backbone.device, dtype=backbone.dtype)
        return MemoryPromptState(nothing, nothing.clone(), torch.zeros(rows, dtype=torch.bool, device=backbone.device))

    def step(
        self, state: MemoryPromptState, segment: Segment, *, write: bool = True
    ) -> tuple[Readout, MemoryPromptState]:
        """Predict a segment behind its prompt, and write the next. See `MemoryModel.step`."""
        backbone, rows = self.backbone, len(segment.ids)
        some = self.cell is not None and bool(state.known.any())
        prompt = state.shown.view(rows, -1, backbone.width)[:, : None if some else 0]
        count = prompt.shape[1]
        embeds = torch.cat([prompt, backbone.embed(segment.ids)], dim=1)
        seen = torch.cat([state.known[:, None].expand(-1, count), segment.mask], dim=1)
        hidden = backbone.run(embeds, seen, text=F.pad(segment.mask, (count, 0), value=False))[:, count:]
        if self.training and self.cell is not None and not some:
            hidden = hidden + 0.0 * self.cell.bias_ih[0]  # a text of one segment teaches nothing, and has a gradient
        loss = None
        if write:
            state, loss = self._written(state, hidden, segment.mask)
        return Readout(hidden, backbone.head, loss if self.training else None), state

    def _written(
        self, state: MemoryPromptState, hidden: Tensor, mask: Tensor
    ) -> tuple[MemoryPromptState, Tensor | None]:
        """The state after a segment with final hidden states ``[rows, tokens, width]``, and its part of the loss."""
        real = mask.any(dim=1)
        if self.cell is None or not mask.shape[1]:
            return MemoryPromptState(state.shown, state.kept, state.known | real), None
        places = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask, places, 0).amax(dim=1)  # [rows], the last real token
        x = hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0]
        x = F.linear(x, self.layers["weight_1"], self.layers["bias_1"]).relu()
        x = F.linear(x, self.layers["weight_2"], self.layers["bias_2"])
        shown, kept = self.cell(x, state.shown, state.kept)
        of_row = real[:, None]
        after = MemoryPromptState(
            torch.where(of_row, shown, state.shown), torch.where(of_row, kept, state.kept), state.known | real
        )
        loss = None
        if self.config.norm_penalty and self.training and bool(real.any()):
            vectors = shown.view(len(shown), -1, self.backbone.width)[real]
            loss = self.config.norm_penalty * vectors.float().norm(dim=-1).mean()
        return after, loss

    def flops(self, tokens: int, remembered: int) -> int:
        """One pass over prompt and text, the two layers and the LSTM."""
        inputs = tokens + (self.config.prompt_tokens if remembered else 0)
        passed = self.backbone.flops(inputs, inputs, predicted=tokens)
        if self.cell is None:
            return passed
        layers: int = self.layers["weight_1"].numel() + self.layers["weight_2"].numel()
        return passed + 2 * layers + self.cell.flops()


def added(width: int, prompt: int, inner: int) -> int:
    """Parameters beside a backbone of that width."""
    shown = prompt * width
    return inner * (width + inner + 2) + 4 * shown * (inner + shown + 2)


def _halved(most: int) -> list[int]:
    """`most`, half of it, and so on to 1."""
    return [most >> n for n in range(most.bit_length())]
