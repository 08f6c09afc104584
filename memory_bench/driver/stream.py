"""The driver: cuts streams into segments, scores every token once, asks questions on forks. Nothing else does.

- Every row is cut left to right into segments of ``traits.segment`` tokens. The prediction of a segment's first token
  is carried over from the last position of the segment before, so each token but a stream's first is scored exactly
  once for any segment length.
- Rows leave the batch when they end; only the last segment of a row is ever padded, and it is never remembered.
- A question is asked on a fork of (state, unfinished segment): it sees the tail as local context, and the stream goes
  on as if nobody had asked.
- Nothing of a segment is kept once it is scored but its numbers, so memory does not grow with the text.

Controls (`Memory`): ``wiped`` reads every segment (or question) from a fresh state; ``foreign`` from the state of the
next row, at the same place of another document; ``ceiling`` puts the evidence directly before the question.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memory_bench.corpus import Line
from memory_bench.errors import NotFinite
from memory_bench.protocol import MemoryModel, Readout, Segment, State

Memory = Literal["own", "wiped", "foreign"]
WHOLE = 512  # tokens per step for models that take any length


class Watcher:
    """Told of every step by the driver; the meter overrides it."""

    def at(self, number: int, total: int, name: str = "") -> None:
        """The next step is segment `number` (from 1) of `total`, of the text called `name` where it is read alone."""

    def stepped(
        self, model: MemoryModel[Any], rows: int, tokens: int, before: int, real: int, *, absorbed: bool = False
    ) -> None:
        """`rows` rows of `tokens` positions (`real` real tokens in all) were stepped after `before` tokens each.

        With `absorbed` they were only written, not predicted.
        """

    def ticked(self) -> None:
        """The model goes on with what it was last told to do: one token more of an answer is written."""

    def state(self, state: State, rows: int) -> None:
        """A state of `rows` rows exists."""

    def within(self, place: str) -> AbstractContextManager[None]:
        """The steps inside are of `place`: ``question 4/200``."""
        del place
        return nullcontext()

    def control(self, name: str) -> AbstractContextManager[None]:
        """What happens inside is the harness's own (the control `name`): nothing of it is charged to the model."""
        del name
        return nullcontext()

    def stepping(self, rows: int) -> AbstractContextManager[Any]:
        """The step of `rows` rows runs inside."""
        del rows
        return nullcontext()

    def wrote(self, before: State, after: State, rows: int, read: int) -> None:
        """A step made `after` of `before`; `read` tokens of each of the `rows` rows have gone into it."""


class _Later(Watcher):
    """Passes on what it is told of a text that begins `before` tokens into its stream."""

    def __init__(self, watcher: Watcher, before: int) -> None:
        self.watcher, self.before = watcher, before

    def at(self, number: int, total: int, name: str = "") -> None:
        """See `Watcher.at`."""
        self.watcher.at(number, total, name)

    def stepped(
        self, model: MemoryModel[Any], rows: int, tokens: int, before: int, real: int, *, absorbed: bool = False
    ) -> None:
        """See `Watcher.stepped`."""
        self.watcher.stepped(model, rows, tokens, self.before + before, real, absorbed=absorbed)

    def state(self, state: State, rows: int) -> None:
        """See `Watcher.state`."""
        self.watcher.state(state, rows)

    def stepping(self, rows: int) -> AbstractContextManager[Any]:
        """See `Watcher.stepping`."""
        return self.watcher.stepping(rows)

    def wrote(self, before: State, after: State, rows: int, read: int) -> None:
        """See `Watcher.wrote`."""
        self.watcher.wrote(before, after, rows, self.before + read)


def within(watcher: Watcher | None, place: str) -> AbstractContextManager[None]:
    """See `Watcher.within`."""
    return nullcontext() if watcher is None else watcher.within(place)


def control(watcher: Watcher | None, name: str) -> AbstractContextManager[None]:
    """See `Watcher.control`; without a name it is the main pass."""
    return nullcontext() if watcher is None or not name else watcher.control(name)


def stepping(watcher: Watcher | None, rows: int) -> AbstractContextManager[Any]:
    """See `Watcher.stepping`."""
    return nullcontext() if watcher is None else watcher.stepping(rows)


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step gave.

    Attributes:
        lines: indices of the lines in the batch, ``rows`` of them.
        start: offset of the segment in every line.
        nll: ``[rows, tokens]`` float32 nats; 0 where nothing was scored.
        scored: ``[rows, tokens]`` bool.
        aux: the model's own training loss, or None.
    """

    lines: list[int]
    start: int
    nll: Tensor
    scored: Tensor
    aux: Tensor | None


def segment_length(model: MemoryModel[Any]) -> int:
    """Tokens per step."""
    return model.traits.segment or WHOLE


def open_lines(model: MemoryModel[Any], lines: Sequence[Line]) -> State:
    """Fresh states, each row with its line's seed."""
    opened: State = model.open(len(lines), seeds=[line.seed for line in lines])
    return opened


def cut(lines: Sequence[Line], start: int, length: int, device: torch.device) -> tuple[Segment, Tensor]:
    """Tokens ``start … start + length`` of every line, padded right, and where they are scored ``[rows, tokens]``."""
    parts = [line.ids[start : start + length] for line in lines]
    tokens = max(len(part) for part in parts)
    ids = torch.zeros(len(parts), tokens, dtype=torch.long)
    mask, scored, given = (torch.zeros(len(parts), tokens, dtype=torch.bool) for _ in range(3))
    for row, (line, part) in enumerate(zip(lines, parts, strict=True)):
        ids[row, : len(part)] = part
        mask[row, : len(part)] = True
        scored[row, : len(part)] = line.scored[start : start + length]
        if line.given is not None:
            given[row, : len(part)] = line.given[start : start + length]
    some_given = given.to(device) if bool(given.any()) else None
    return Segment(ids.to(device), mask.to(device), some_given), scored.to(device)


def score(readout: Readout, carry: Tensor | None, segment: Segment, scored: Tensor) -> Tensor:
    """Surprisal ``[rows, tokens]`` (nats) of the scored tokens of a segment, 0 elsewhere.

    Args:
        readout: of the segment.
        carry: ``[rows, 1, width]`` final hidden state of the token before the segment; None at a stream's start.
        segment: the segment.
        scored: ``[rows, tokens]`` bool.
    """
    first = torch.zeros_like(readout.hidden[:, :1]) if carry is None else carry
    before = torch.cat([first, readout.hidden[:, :-1]], dim=1)  # [rows, tokens, width]: position t predicts token t
    nll = torch.zeros(segment.ids.shape, device=segment.ids.device)
    if bool(scored.any()):
        picked = Readout(before[scored][None], readout.head)
        nll = nll.masked_scatter(scored, -picked.logprobs(segment.ids[scored][None])[0])
    return nll


def _advance(
    model: MemoryModel[Any], state: State, carry: Tensor | None, segment: Segment, scored: Tensor, write: bool
) -> tuple[Tensor, Tensor, Tensor | None, State]:
    """One step: surprisal, the hidden state to carry over, the auxiliary loss, the state after."""
    readout, after = model.step(state, segment, write=write)
    return score(readout, carry, segment, scored), readout.hidden[:, -1:], readout.aux_loss, after


def _read_from(model: MemoryModel[Any], state: State, lines: Sequence[Line], memory: Memory) -> State:
    """The state a control reads from: fresh ones, or the next row's."""
    if memory == "wiped":
        return open_lines(model, lines)
    return state.rows(torch.arange(1, len(lines) + 1) % len(lines))


def _broken_row(nll: Tensor) -> int | None:
    """The first row whose surprisal ``[rows, tokens]`` is not finite."""
    bad = ~torch.isfinite(nll).all(dim=1)
    return int(bad.nonzero()[0]) if bool(bad.any()) else None


def _culprit(model: MemoryModel[Any], state: State, carry: Tensor | None, segment: Segment, scored: Tensor) -> int:
    """How many tokens of a row's `segment` are read, from `state`, until a score or hidden state is not finite.

    In a pass over the whole segment one such token spoils those before it too, by weights of 0 times NaN. So its
    beginnings are read, by bisection.
    """
    low, high = 0, int(segment.lengths[0])
    while high - low > 1:
        middle = (low + high) // 2
        given = None if segment.given is None else segment.given[:, :middle]
        part = Segment(segment.ids[:, :middle], segment.mask[:, :middle], given)
        readout, _ = model.step(state, part, write=False)
        nll = score(readout, carry, part, scored[:, :middle])
        good = bool(torch.isfinite(nll).all() & torch.isfinite(readout.hidden).all())
        low, high = (middle, high) if good else (low, middle)
    return high


def check_state(state: State, start: int, names: Sequence[str]) -> None:
    """Refuse a memory that is not finite after the segment at `start`; rows without a name have ended.

    Raises:
        NotFinite: the row's name and the segment's first token.
    """
    for row in state.broken_rows() if names else ():
        if row < len(names):
            raise NotFinite(f"non-finite memory from the segment at token {start + 1:,} of {names[row]}")


def walk(  # noqa: PLR0913, C901
    model: MemoryModel[Any],
    lines: Sequence[Line],
    *,
    state: State | None = None,
    memory: Memory = "own",
    length: int | None = None,
    lengths: Iterator[int] | None = None,
    detach_every: int | None = None,
    recompute: bool = False,
    watcher: Watcher | None = None,
    names: Sequence[str] | None = None,
) -> Iterator[Piece]:
    """Run ragged lines through the model from `state` (row i belongs to line i) until each has ended.

    Args:
        model: any memory model.
        lines: token streams; a line's first token is never scored.
        state: where to start; default fresh.
        memory: what the predictions are read from (controls); ``foreign`` scores nothing while one row is left.
        length: tokens per step; default the model's segment.
        lengths: of one step after another, where they differ; none above `length`.
        detach_every: cut gradients through the state after so many segments; None: never.
        recompute: gradient checkpointing, one segment at a time.
        watcher: told of every step.
        names: of the lines; with them every score and what is remembered is checked, and refused by name and token.

    Raises:
        NotFinite: see `names`.
    """
    length = length or segment_length(model)
    device = model.backbone.device
    alive = sorted(range(len(lines)), key=lambda i: -len(lines[i]))
    chosen = [lines[i] for i in alive]
    state = open_lines(model, chosen) if state is None else state.rows(torch.tensor(alive))
    carry: Tensor | None = None
    start = number = 0
    steps = max((-(-len(line) // length) for line in lines), default=0)
    while alive:
        number += 1
        length = length if lengths is None else next(lengths)
        if watcher is not None:
            watcher.at(number, max(number, steps), names[alive[0]] if names is not None and len(alive) == 1 else "")
        segment, scored = cut(chosen, start, length, device)
        left = sum(len(line) > start + length for line in chosen)  # lines are sorted: the first `left` go on
        if memory == "foreign" and len(alive) == 1:
            scored = torch.zeros_like(scored)
        advance = partial(_advance, model)
        if recompute:
            advance = partial(checkpoint, _advance, model, use_reentrant=False, preserve_rng_state=False)
        source, before = state if memory == "own" else _read_from(model, state, chosen, memory), carry
        with stepping(watcher, len(alive)):
            nll, carry, aux, after = advance(source, carry, segment, scored, memory == "own" and left > 0)
        if memory == "own":
            state = after
        elif memory == "foreign" and left:
            state = model.absorb(state, segment)
        if watcher is not None:
            watcher.stepped(model, len(alive), segment.ids.shape[1], start, int(segment.mask.sum()))
            watcher.state(state, len(alive))
            if memory == "own" and left:
                watcher.wrote(source, after, len(alive), start + length)
        if names is not None:
            if (spoilt := _broken_row(nll)) is not None:
                row = torch.tensor([spoilt])
                first = None if before is None else before[spoilt : spoilt + 1]
                read = _culprit(model, source.rows(row), first, segment.rows(row.to(device)), scored[[spoilt]])
                raise NotFinite(f"non-finite from token {start + read:,} of {names[alive[spoilt]]}")
            check_state(state, start, [names[i] for i in alive[:left]])
        yield Piece(alive, start, nll, scored, aux)
        start += length
        if left < len(alive):
            alive, chosen = alive[:left], chosen[:left]
            state, carry = state.rows(torch.arange(left)), carry[:left]
        if detach_every and number % detach_every == 0:
            state, carry = state.detach(), carry.detach()


def line_nll(
    model: MemoryModel[Any],
    lines: Sequence[Line],
    *,
    state: State | None = None,
    length: int | None = None,
    before: int = 0,
    watcher: Watcher | None = None,
) -> list[float]:
    """Summed surprisal (nats) of each line's scored tokens; the watcher is told that `before` tokens were read."""
    total = [0.0] * len(lines)
    told = _Later(watcher, before) if watcher is not None and before else watcher
    for piece in walk(model, lines, state=state, length=length, watcher=told):
        for line, value in zip(piece.lines, piece.nll.double().sum(dim=1).tolist(), strict=True):
            total[line] += value
    return total


Progress = Callable[[int, int], None]
"""Told (done, total) while long work goes on."""
