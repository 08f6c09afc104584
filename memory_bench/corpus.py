"""Training data as the trainer asks for it: batches of token lines cut exactly as the evaluation cuts them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Line:
    """The tokens of one stream.

    Attributes:
        ids: ``[tokens]`` int64.
        scored: ``[tokens]`` bool, whose surprisal counts (never the first of a stream without a carried prediction).
        given: ``[tokens]`` bool, handed over as a condition; None: none.
        seed: of the row's random draws.
    """

    ids: Tensor
    scored: Tensor
    given: Tensor | None = None
    seed: int = 0

    def __len__(self) -> int:
        return int(self.ids.shape[0])


class Corpus(Protocol):
    """Something batches can be drawn from."""

    def batch(self, rows: int, segments: int, segment: int, rng: torch.Generator) -> list[Line]:
        """`rows` lines of about `segments` segments of `segment` tokens, drawn with `rng`."""
        ...


class TextCorpus:
    """Windows of running text for language modelling; every token but a window's first is scored.

    A window starts anywhere in the documents laid end to end (documents shorter than a window are joined by that).

    Args:
        documents: token ids of each document, ``[tokens]``.
    """

    def __init__(self, documents: Sequence[Tensor]) -> None:
        self.tokens = torch.cat(list(documents))

    def batch(self, rows: int, segments: int, segment: int, rng: torch.Generator) -> list[Line]:
        """See `Corpus.batch`."""
        length = min(segments * segment, len(self.tokens))
        starts = torch.randint(0, len(self.tokens) - length + 1, (rows,), generator=rng)
        seeds = torch.randint(0, 2**31 - 1, (rows,), generator=rng)
        scored = torch.ones(length, dtype=torch.bool)
        scored[0] = False
        return [
            Line(self.tokens[s : s + length], scored, seed=int(seed))
            for s, seed in zip(starts.tolist(), seeds.tolist(), strict=True)
        ]


class LineCorpus:
    """Ready lines (questions with their contexts), drawn without replacement until all were seen.

    Args:
        lines: the examples; a batch ignores the asked number of segments.
    """

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = list(lines)
        self._order: list[int] = []

    def batch(self, rows: int, segments: int, segment: int, rng: torch.Generator) -> list[Line]:
        """See `Corpus.batch`."""
        del segments, segment
        while len(self._order) < rows:
            self._order += torch.randperm(len(self.lines), generator=rng).tolist()
        chosen, self._order = self._order[:rows], self._order[rows:]
        return [self.lines[i] for i in chosen]
