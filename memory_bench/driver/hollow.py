"""A model that reads and computes nothing: the driver walks it through a cell, so that what it would read is counted.

It cuts, asks and costs like the model it stands for (traits and formulas are that model's), and every number it
predicts is the same. Streams and corpora come with their tokens blanked, for its vocabulary has one entry.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from memory_bench.corpus import Corpus, Line
from memory_bench.driver.encoding import Question, Stream
from memory_bench.protocol import DecodePlan, MemoryModel, Readout, Segment, State

Kind = Literal["step", "peek", "absorb", "decode"]


@dataclass(frozen=True, slots=True)
class Call:
    """One thing that the driver asked of a model: `rows` rows of `tokens` positions after `before` tokens each."""

    kind: Kind
    rows: int
    tokens: int
    before: int


@dataclass(frozen=True, slots=True)
class Place(State):
    """How far streams are read.

    Attributes:
        row: ``[rows]`` int64, without meaning.
        read: tokens read by every row.
    """

    row: Tensor
    read: int = 0


class Hollow(MemoryModel[Place]):
    """Stands for `model`, which may have no weights.

    Args:
        model: whose traits and formulas count.
        note: told of everything that the driver asks for, before it is done.
    """

    def __init__(self, model: MemoryModel[Any], note: Callable[[Call], None]) -> None:
        super().__init__()
        self._of = [model]  # in a list: no submodule, so that its weights are none of this model's
        self.note, self.traits = note, model.traits
        self.frozen_backbone = model.frozen_backbone  # type: ignore[misc]
        self.backbone: Any = _Facts(model.backbone)
        self.weight = nn.Parameter(torch.zeros(1))

    def memory_parameters(self) -> dict[str, nn.Parameter]:
        """One where the method adds any: a recipe finds something to train, or not."""
        return {"weight": self.weight} if self._of[0].memory_parameters() else {}

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """One where the recipe gave the backbone adapters."""
        return {"weight": self.weight} if self._of[0].adapter_parameters() else {}

    def open(self, rows: int, *, seeds: Sequence[int] | None = None) -> Place:
        """See `MemoryModel.open`."""
        del seeds
        return Place(torch.zeros(rows, dtype=torch.long))

    def step(self, state: Place, segment: Segment, *, write: bool = True) -> tuple[Readout, Place]:
        """See `MemoryModel.step`."""
        after = self._noted("step" if write else "peek", state, segment)
        return Readout(self.weight.expand(*segment.ids.shape, 1), lambda hidden: hidden), after if write else state

    def absorb(self, state: Place, segment: Segment) -> Place:
        """See `MemoryModel.absorb`."""
        return self._noted("absorb", state, segment)

    def decode(self, state: Place, prompt: Segment, plan: DecodePlan) -> Tensor:
        """See `MemoryModel.decode`."""
        rows, tokens = prompt.ids.shape
        self.note(Call("decode", rows, tokens + plan.new_tokens, state.read))
        return prompt.ids.new_zeros(rows, plan.new_tokens)

    def _noted(self, kind: Kind, state: Place, segment: Segment) -> Place:
        rows, tokens = segment.ids.shape
        self.note(Call(kind, rows, tokens, state.read))
        return Place(state.row, state.read + tokens)

    def flops(self, tokens: int, remembered: int) -> int:
        """See `MemoryModel.flops`."""
        return self._of[0].flops(tokens, remembered)

    def absorb_flops(self, tokens: int, remembered: int) -> int:
        """See `MemoryModel.absorb_flops`."""
        return self._of[0].absorb_flops(tokens, remembered)

    def detached_flops(self, tokens: int, remembered: int) -> int:
        """See `MemoryModel.detached_flops`."""
        return self._of[0].detached_flops(tokens, remembered)


class _Facts:
    """What the driver asks of a backbone."""

    def __init__(self, backbone: Any) -> None:
        for name in ("layers", "heads", "kv_heads", "head_width", "width", "vocab", "dtype", "max_positions"):
            setattr(self, name, getattr(backbone, name))
        self.device, self.embedder = torch.device("cpu"), None
        self.model = SimpleNamespace(config=backbone.model.config)

    @contextmanager
    def reusing(self) -> Iterator[None]:
        """See `Backbone.reusing`."""
        yield

    @contextmanager
    def watched(self, told: Callable[[], None] | None = None) -> Iterator[list[Tensor]]:
        """See `Backbone.watched`: nothing happens, so nothing is told."""
        del told
        yield []


def blank(line: Line) -> Line:
    """The line with every token the first of the vocabulary."""
    return replace(line, ids=torch.zeros_like(line.ids))


def blank_stream(stream: Stream) -> Stream:
    """The stream and its questions so."""
    return replace(stream, line=blank(stream.line), questions=tuple(map(_blank_question, stream.questions)))


def _blank_question(question: Question) -> Question:
    texts: Mapping[str, Any] = {
        name: torch.zeros_like(getattr(question, name)) for name in ("evidence", "prompt", "apart")
    }
    return replace(question, **texts, choices=tuple(map(torch.zeros_like, question.choices)))


@dataclass(frozen=True, slots=True)
class BlankCorpus:
    """The batches of a corpus, blanked."""

    corpus: Corpus

    def batch(self, rows: int, segments: int, segment: int, rng: torch.Generator) -> list[Line]:
        """See `Corpus.batch`."""
        return [blank(line) for line in self.corpus.batch(rows, segments, segment, rng)]
