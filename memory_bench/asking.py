"""Asks questions on forks of a stream: the stream is read once, every question leaves it as it was.

What the choices of a question share (the unfinished segment and the prompt) is read once, as far as it fills segments;
only what is left of it runs once for every choice.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from memory_bench.corpus import Line
from memory_bench.encoding import Question, Stream
from memory_bench.protocol import MemoryModel, State
from memory_bench.stream import Watcher, charged, cut, line_nll, open_lines, segment_length

Row = dict[str, Any]
Due = tuple[int, Stream, Question]
"""A question that is due: (row in the state, its stream, the question)."""

CHOICE_TOKENS = 8192  # tokens of one batch of choices
CEILING_WINDOWS = 8  # segments of evidence that the ceiling puts before the question: as many as a training example has


def ask(model: MemoryModel[Any], streams: Sequence[Stream], watcher: Watcher | None, *, controls: bool) -> list[Row]:
    """Rows for every question of `streams`, each asked where it stands.

    Args:
        model: in evaluation mode.
        streams: read side by side.
        watcher: told of the steps of the main pass.
        controls: also ask with memory wiped, foreign, and with the evidence in the prompt.
    """
    length = segment_length(model)
    asked = [s for s in streams if s.questions]
    if not asked:
        return []
    rows: list[Row] = []
    # Reading stops at the last full segment before a stream's last question.
    stops = [s.questions[-1].place(length) for s in asked]
    alive = sorted(range(len(asked)), key=lambda i: -stops[i])
    state = open_lines(model, [asked[i].line for i in alive])
    for number in range(max(stops) + 1):
        due: list[Due] = [
            (row, asked[i], q) for row, i in enumerate(alive) for q in asked[i].questions if q.place(length) == number
        ]
        if due:
            rows += _answer(model, state, due, number * length, watcher)
            if controls:
                with charged(None, watcher):
                    rows += _controls(model, state, len(alive), due, number * length)
        going = [i for i in alive if stops[i] > number]
        if not going:
            break
        if len(going) < len(alive):
            state, alive = state.rows(torch.arange(len(going))), going
        state = _absorb(model, state, [asked[i].line for i in alive], number * length, number * length, watcher)
    return rows


def _absorb(
    model: MemoryModel[Any], state: State, lines: Sequence[Line], start: int, before: int, watcher: Watcher | None
) -> State:
    """Write the full segment at `start` of every line; `before` tokens were read before it."""
    segment, _ = cut(lines, start, segment_length(model), model.backbone.device)
    after: State = model.absorb(state, segment)
    if watcher is not None:
        real = int(segment.mask.sum())
        watcher.stepped(model, len(lines), segment.ids.shape[1], before, real, absorbed=True)
        watcher.state(after, len(lines))
    return after


def _answer(
    model: MemoryModel[Any], state: State, due: Sequence[Due], start: int, watcher: Watcher | None
) -> list[Row]:
    """Score the choices of the questions that stand in the segment at `start`, from `state` there."""
    place = torch.tensor([row for row, _, _ in due])
    return _score(model, state.rows(place), due, _heads(due, start), "", start, watcher)


def _controls(model: MemoryModel[Any], state: State, alive: int, due: Sequence[Due], start: int) -> list[Row]:
    """The same from fresh states, from the next of the `alive` rows of `state`, and with the evidence in the prompt."""
    fresh = open_lines(model, [s.line for _, s, _ in due])
    rows = _score(model, fresh, due, _heads(due, start), "wiped", 0, None)
    if alive > 1:
        others = torch.tensor([(row + 1) % alive for row, _, _ in due])
        rows += _score(model, state.rows(others), due, _heads(due, start), "foreign", start, None)
    if all(len(q.evidence) for _, _, q in due):
        rows += _score(model, fresh, due, [_fit(q, model) for _, _, q in due], "ceiling", 0, None)
    return rows


def _heads(due: Sequence[Due], start: int) -> list[Tensor]:
    """What every question's stream has read since `start`: its open segment."""
    return [stream.line.ids[start : q.at] for _, stream, q in due]


def _score(
    model: MemoryModel[Any],
    state: State,
    due: Sequence[Due],
    heads: Sequence[Tensor],
    control: str,
    before: int,
    watcher: Watcher | None,
) -> list[Row]:
    """One row per question: the surprisal of its choices after `heads` and the prompt, read from `state`.

    The ceiling keeps evidence and question in one segment: nothing of them has to go through memory.
    """
    length = segment_length(model)
    whole = control == "ceiling"
    common = [max(0, len(head) + len(q.prompt) - 1) for head, (_, _, q) in zip(heads, due, strict=True)]
    shared = [0 if whole else tokens // length for tokens in common]
    rows: list[Row] = []
    for segments in sorted(set(shared)):  # questions whose shared part fills equally many segments go together
        group = [n for n, count in enumerate(shared) if count == segments]
        lines = [_choice_lines(due[n], heads[n]) for n in group]
        after = state.rows(torch.tensor(group))
        for number in range(segments):
            first = [choices[0] for choices in lines]
            after = _absorb(model, after, first, number * length, before + number * length, watcher)
        left = [[_from(line, segments * length) for line in choices] for choices in lines]
        surprisal = _in_batches(model, left, after, before + segments * length, whole, watcher)
        rows += [_row(due[n], control, nll) for n, nll in zip(group, surprisal, strict=True)]
    return rows


def _choice_lines(due: Due, head: Tensor) -> list[Line]:
    _, stream, question = due
    return [question.line(head, choice, stream.line.seed) for choice in range(len(question.choices))]


def _from(line: Line, start: int) -> Line:
    given = None if line.given is None else line.given[start:]
    return replace(line, ids=line.ids[start:], scored=line.scored[start:], given=given)


def _fit(question: Question, model: MemoryModel[Any]) -> Tensor:
    """The end of the evidence that the ceiling can hold: `CEILING_WINDOWS` segments, or what positions allow."""
    room = CEILING_WINDOWS * segment_length(model)
    limit = model.backbone.max_positions
    if limit is not None:
        asked = len(question.prompt) + max(len(c) for c in question.choices)
        room = min(room, limit - asked - 64)  # memory tokens take positions too
    return question.evidence[-max(1, room) :]


def _in_batches(
    model: MemoryModel[Any],
    lines: Sequence[Sequence[Line]],
    state: State,
    before: int,
    whole: bool,
    watcher: Watcher | None,
) -> list[list[float]]:
    """Surprisal of every choice of every question; row i of `state`, `before` tokens in, belongs to ``lines[i]``."""
    longest = max(len(line) for choices in lines for line in choices)
    step = longest if whole else min(longest, segment_length(model))
    size = max(1, CHOICE_TOKENS // (step * max(len(choices) for choices in lines)))
    found: list[list[float]] = []
    for first in range(0, len(lines), size):
        part = lines[first : first + size]
        owner = torch.tensor([first + n for n, choices in enumerate(part) for _ in choices])
        flat = [line for choices in part for line in choices]
        own, size_of_step = state.rows(owner), step if whole else None
        values = iter(line_nll(model, flat, state=own, length=size_of_step, before=before, watcher=watcher))
        found += [[next(values) for _ in choices] for choices in part]
    return found


def _row(due: Due, control: str, nll: list[float]) -> Row:
    _, stream, question = due
    asked = question.ask
    right = asked.choices.index(asked.answer)
    return {
        **stream.identity,
        "event": question.event,
        "kind": "ask",
        "control": control,
        "start": question.at,
        "tokens": len(question.choices[right]),
        "nbytes": len(asked.answer.encode()),
        "words": len(asked.answer.split()),
        "nll": nll[right],
        "distance_tokens": question.distance_tokens,
        "distance_bytes": question.distance_bytes,
        "choice_nll": nll,
        "predicted": asked.choices[min(range(len(nll)), key=nll.__getitem__)],
        "answer": asked.answer,
        "label": asked.label,
    }
