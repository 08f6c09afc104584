"""What a memory model is: three methods over an explicit state. Start reading here.

- `MemoryModel.open(rows)` gives the state of `rows` streams that have read nothing.
- `MemoryModel.step(state, segment)` predicts the segment's tokens and returns the state after it; with
  `write=False` it only looks ("peeks") and the state is returned as it was.
- `MemoryModel.flops(tokens, remembered)` says what a step costs.

Unusual here, on purpose:

- **State in, state out.** Nothing a model remembers is an attribute of the module. States are immutable: a step
  makes a new one and shares what did not change, so a fork costs nothing and questions cannot contaminate a stream.
- **One primitive.** Recurrent memories produce predictions and the new memory in the same pass; separate read and
  write verbs would charge them twice.
- **Readout instead of logits.** Log-probabilities are computed for the targets, in slices: `[rows, tokens, vocab]`
  need never exist.
- Segmentation, the target shift, padding to a batch, detaching and metering belong to the driver
  (`memory_bench.driver.stream`), never to a model.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from memory_bench.axes import Axes
from memory_bench.backbone.model import Backbone
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.state import Nothing, State, StateSize
from memory_bench.weights.transfer import Layout

__all__ = ["DecodePlan", "MemoryModel", "Nothing", "Readout", "Segment", "State", "StateSize", "Traits"]

S = TypeVar("S", bound=State)

BACKBONE, ADAPTER = "backbone.", "backbone.adapter."  # how names of weights begin
LOGIT_SLICE = 1 << 22  # floats of logits that exist at once while scoring: 16 MB in float32


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of every row.

    Attributes:
        ids: ``[rows, tokens]`` int64.
        mask: ``[rows, tokens]`` bool; False marks padding (either side), which is neither predicted nor written.
        given: ``[rows, tokens]`` bool or None; tokens handed over as a condition (a question, a prompt). They are not
            scored, so a model may choose memories by them. None: nothing is given, the text is only being read.
    """

    ids: Tensor
    mask: Tensor
    given: Tensor | None = None

    @classmethod
    def full(cls, ids: Tensor, given: Tensor | None = None) -> Self:
        """A segment without padding."""
        return cls(ids, torch.ones_like(ids, dtype=torch.bool), given)

    def rows(self, index: Tensor) -> "Segment":
        """The segment of the chosen rows."""
        return Segment(self.ids[index], self.mask[index], None if self.given is None else self.given[index])

    def right_aligned(self) -> "Segment":
        """The segment with all padding in front, and no more of it than the longest row leaves."""
        if bool(self.mask.all()):
            return self
        order = self.mask.long().argsort(dim=1, stable=True)[:, self.mask.shape[1] - int(self.lengths.max()) :]
        given = None if self.given is None else self.given.gather(1, order)
        return Segment(self.ids.gather(1, order), self.mask.gather(1, order), given)

    @property
    def lengths(self) -> Tensor:
        """``[rows]``: real tokens of each row."""
        return self.mask.sum(dim=1)


@dataclass(frozen=True, slots=True)
class Readout:
    """Next-token predictions of a segment, evaluated on demand.

    Attributes:
        hidden: ``[rows, tokens, width]``; position t predicts the token after t.
        head: maps hidden states to logits ``[..., vocab]``.
        aux_loss: a training loss of the model's own (scalar), None at evaluation.
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]
    aux_loss: Tensor | None = None

    def logprobs(self, targets: Tensor) -> Tensor:
        """Log-probability (nats, float32) of `targets` ``[rows, tokens]`` at every position."""
        rows, tokens = targets.shape
        flat, wanted = self.hidden.reshape(rows * tokens, -1), targets.reshape(-1)
        if not flat.shape[0]:
            return flat.new_zeros(rows, tokens, dtype=torch.float32)
        vocab = self.head(flat[:1]).shape[-1]
        size = max(1, LOGIT_SLICE // vocab)
        parts = [
            -nn.functional.cross_entropy(self.head(h).float(), t, reduction="none")
            for h, t in zip(flat.split(size), wanted.split(size), strict=True)
        ]
        return torch.cat(parts).view(rows, tokens)

    def logits(self, at: int | slice = slice(None)) -> Tensor:
        """``[rows, n, vocab]`` at the chosen positions."""
        return self.head(self.hidden[:, at if isinstance(at, slice) else [at]])

    def at(self, index: Tensor) -> "Readout":
        """The readout of one position per row; `index` is ``[rows]``."""
        rows = torch.arange(len(index), device=self.hidden.device)
        return Readout(self.hidden[rows, index][:, None], self.head)


@dataclass(frozen=True, slots=True)
class Traits:
    """What the driver and the reader of a table must know of a configured model.

    Attributes:
        segment: tokens of text per step; None: any length.
        look_ahead: how many tokens past the predicting position a prediction may depend on; 0 is causal.
        bounded: the state does not grow with the text read.
        chunk_invariant: predictions do not depend on where the text is cut into segments.
    """

    segment: int | None
    look_ahead: int = 0
    bounded: bool = True
    chunk_invariant: bool = False


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Greedy decoding: how many tokens, and which end it (rows that ended repeat their last token)."""

    new_tokens: int
    stop_ids: tuple[int, ...] = ()
    fold: bool = True  # write the open segment into memory once it is full


class Batch(Protocol):
    """The rows of a training's batch that other processes read (`memory_bench.driver.peers`)."""

    def gathered(self, tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """What each of the other processes shows of its rows in this step, without gradients.

        Args:
            tensors: what is shown of the rows here, the row first; all processes show the same kinds, once a step.
        """
        ...


class MemoryModel(nn.Module, ABC, Generic[S]):
    """A language model with memory. The class is the plug-in: an entry point in ``memory_bench.models`` names it.

    The constructor takes a `Backbone`, a config (an instance of `Config`) and a generator for the initial values; it
    touches no device, file or network. Class attributes describe the method:

    Attributes:
        Config: frozen dataclass of the hyper-parameters, defaults for comparison; `Config.official()` where a class
            method of that name switches every quirk of the official code on.
        version: raised when numbers may change; part of every cell's identity.
        families: the backbone families it works on.
        source: paper, official repository and commit, deviations.
        frozen_backbone: the method never trains its backbone, also where a recipe trains all weights.
        released: how the authors' own checkpoints are laid out; None: none are known.
        ablations: variants that a comparison needs beside the model (title to changed config fields), run as controls.
        axes: what kind of memory it has; None: the class does not say.
        beside: in a training that several processes share, the batch's rows that the others read; else None.
        divides: where something is `beside`, `Readout.aux_loss` is this process's part of that of all rows.
    """

    Config: ClassVar[type[Any]]
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2", "opt")
    source: ClassVar[str] = ""
    frozen_backbone: ClassVar[bool] = False
    released: ClassVar[Layout | None] = None
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    axes: ClassVar[Axes | None] = None
    beside: Batch | None = None
    divides: ClassVar[bool] = False

    traits: Traits
    backbone: Backbone

    @classmethod
    def fit(cls, card: BackboneCard, budget: Budget) -> Any:
        """The config sized for a backbone and a budget; its result is part of the cell. Default: the card's window.

        Args:
            card: facts about the backbone.
            budget: the limits.
        """
        names = {f.name for f in dataclasses.fields(cls.Config)}
        return cls.Config(**({"segment": card.window} if "segment" in names else {}))

    @classmethod
    def helpers(cls, config: Any) -> Mapping[str, str]:
        """Frozen models that `config` needs beside the backbone, with what to choose where one cannot be had.

        Names are those of `memory_bench.card.HELPERS`. The harness finds them before anything trains and puts them onto
        the backbone before the model is built: ``minilm`` as `Backbone.embedder`.
        """
        del config
        return {}

    @classmethod
    def unadapted(cls, config: Any) -> Any:
        """`config` without low-rank adapters of the method's own, where a recipe gives every model the same ones."""
        return config

    @abstractmethod
    def open(self, rows: int, *, seeds: Sequence[int] | None = None) -> S:
        """The state of `rows` fresh streams.

        Args:
            rows: number of streams.
            seeds: one seed a row for models that draw random numbers (default 0 for every row), so that a row's draws
                do not depend on the rows beside it.
        """

    @abstractmethod
    def step(self, state: S, segment: Segment, *, write: bool = True) -> tuple[Readout, S]:
        """Predict a segment from memory; with `write`, also remember it.

        Rows are independent, padding has no influence, the global random state is not touched.
        """

    @abstractmethod
    def flops(self, tokens: int, remembered: int) -> int:
        """Floating-point operations (multiply-add = 2) of one forward step of one row, writing included.

        The head counts for every text token of the segment.

        Args:
            tokens: text tokens in the segment.
            remembered: text tokens read before it.
        """

    def expected_retention(self, tokens: int) -> float | None:
        """The share of an evidence's memory that is left after `tokens` more tokens, where the method's rule says it.

        A report draws the accuracy this would give beside the measured one. None: the method has no such rule.
        """
        del tokens
        return None

    def recall_weights(self, state: S, segment: Segment) -> Tensor | None:
        """How a step on `segment` would weigh memories of earlier segments: ``[rows, segments]``, newest last.

        None: the method does not choose between segments, or has read nothing yet.
        """
        del state, segment
        return None

    def absorb(self, state: S, segment: Segment) -> S:
        """The state after reading, without predictions. Override only to be cheaper, and `absorb_flops` with it."""
        return self.step(state, segment)[1]

    def absorb_flops(self, tokens: int, remembered: int) -> int:
        """As `flops`, of an `absorb`. Default: of a step whose readout is dropped, so that its head never runs."""
        return self.flops(tokens, remembered) - 2 * tokens * self.backbone.width * self.backbone.vocab

    def detached_flops(self, tokens: int, remembered: int) -> int:
        """Of `flops`, what runs without gradients in training too and so has no backward pass. Default: nothing."""
        del tokens, remembered
        return 0

    @torch.no_grad()
    def decode(self, state: S, prompt: Segment, plan: DecodePlan) -> Tensor:
        """Greedy continuation ``[rows, new_tokens]`` of a prompt at most one segment long; padding plays no part.

        The open segment is peeked at for every token, and written once it is full (unless ``plan.fold`` is off). The
        prompt counts as given where it does not say what is: memories may be chosen by that, and never by what was
        generated.
        """
        out = prompt.ids.new_zeros(len(prompt.ids), plan.new_tokens)
        for index in self._in_step(prompt.lengths, plan):
            own, part = (state, prompt) if index is None else (state.rows(index), prompt.rows(index))
            with self.backbone.reusing():
                out[slice(None) if index is None else index] = self._continue(own, part.right_aligned(), plan)
        return out

    def _in_step(self, lengths: Tensor, plan: DecodePlan) -> list[Tensor | None]:
        """Rows ``[n]`` that can be continued together: those that fill their segment on the way must do so at once."""
        fills = torch.zeros_like(lengths)
        if plan.fold and self.traits.segment is not None:
            fills = torch.where(lengths + plan.new_tokens > self.traits.segment, lengths, 0)
        groups = fills.unique()
        return [None] if len(groups) == 1 else [(fills == group).nonzero()[:, 0] for group in groups]

    def _continue(self, state: S, prompt: Segment, plan: DecodePlan) -> Tensor:
        ids, mask = prompt.ids, prompt.mask
        given = mask if prompt.given is None else prompt.given & mask
        new: list[Tensor] = []
        for _ in range(plan.new_tokens):
            if plan.fold and self.traits.segment is not None and ids.shape[1] >= self.traits.segment:
                readout, state = self.step(state, Segment(ids, mask, given))
                ids, mask, given = ids[:, :0], mask[:, :0], given[:, :0]
            else:
                readout, _ = self.step(state, Segment(ids, mask, given), write=False)
            token = readout.logits(-1)[:, 0].argmax(dim=-1)
            if new and plan.stop_ids:
                ended = torch.isin(new[-1], torch.tensor(plan.stop_ids, device=token.device))
                token = torch.where(ended, new[-1], token)
            new.append(token)
            ids = torch.cat([ids, token[:, None]], dim=1)
            mask = torch.cat([mask, torch.ones_like(token[:, None], dtype=torch.bool)], dim=1)
            given = torch.cat([given, torch.zeros_like(token[:, None], dtype=torch.bool)], dim=1)
        return torch.stack(new, dim=1) if new else ids[:, :0]

    def memory_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters the method adds to its backbone."""
        return {name: p for name, p in self.named_parameters() if not name.startswith(BACKBONE)}

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Those of the adapters that the recipe gives to every model's backbone; empty without."""
        return {name: p for name, p in self.named_parameters() if name.startswith(ADAPTER)}

    def added_parameters(self) -> int:
        """How many weights stand beside the backbone: the method's, the recipe's adapters, and frozen helpers'."""
        return sum(p.numel() for p in (*self.memory_parameters().values(), *self.adapter_parameters().values()))


def is_added(name: str) -> bool:
    """A parameter or buffer of that name stands beside the backbone: the method's, or a recipe's adapter."""
    return not name.startswith(BACKBONE) or name.startswith(ADAPTER)
