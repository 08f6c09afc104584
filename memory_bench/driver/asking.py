"""Asks questions on forks of a stream: the stream is read once, every question leaves it as it was.

What the choices of a question share (the unfinished segment and the prompt) is read once, as far as it fills segments;
only what is left of it runs once for every choice. Where there are no choices the answer is generated
(`memory_bench.driver.generating`).

Without choices, a control into which no memory enters is observed once per question and stands in a row for every place
where the question is asked: the ceiling, and the wiped memory, which then means that nothing of the stream was read.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from memory_bench.corpus import Line
from memory_bench.driver.encoding import Question, Stream
from memory_bench.driver.generating import generate
from memory_bench.driver.stream import (
    Watcher,
    check_state,
    control,
    cut,
    line_nll,
    open_lines,
    segment_length,
    stepping,
    within,
)
from memory_bench.episode import Ask, Decode
from memory_bench.errors import NotFinite
from memory_bench.protocol import MemoryModel, State

Row = dict[str, Any]
Due = tuple[int, Stream, Question]
"""A question that is due: (row in the state, its stream, the question)."""

CHOICE_TOKENS = 8192  # tokens of one batch of choices
CEILING_WINDOWS = 8  # segments of evidence that the ceiling puts before the question: as many as a training example has


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a question: the surprisal of each choice (or of the right answer), and the ids generated."""

    nll: list[float]
    generated: list[int] = field(default_factory=list)


Known = dict[tuple[str, str, Ask], Outcome]
"""Outcomes of controls that do not depend on the place: by control, episode and question."""


def ask(
    model: MemoryModel[Any],
    streams: Sequence[Stream],
    watcher: Watcher | None,
    *,
    controls: bool,
    decode: Decode | None = None,
    answered: Collection[str] = (),
    number: int = 0,
    total: int = 0,
) -> Iterator[Row]:
    """Rows for every question of `streams`, each asked where it stands.

    Args:
        model: in evaluation mode.
        streams: read side by side.
        watcher: told of the steps; those of controls are not charged to the model.
        controls: also ask with memory wiped, foreign, and with the evidence in the prompt.
        decode: the backbone's tokenizer, backwards, for questions without choices.
        answered: episodes whose questions have been asked already: only their controls are left, and their reading has
            been charged.
        number: questions that were asked before, of `total`.
        total: see number; default: those of `streams`.

    Raises:
        NotFinite: a choice, an answer or what was read is not finite.
    """
    length = segment_length(model)
    asked = [s for s in streams if s.questions]
    if not asked:
        return
    known: Known = {}
    total = total or sum(len(s.questions) for s in asked)
    # Reading stops at the last full segment before a stream's last question.
    stops = [max(q.place(length) for q in s.questions) for s in asked]
    alive = sorted(range(len(asked)), key=lambda i: -stops[i])
    state = open_lines(model, [asked[i].line for i in alive])
    for place in range(max(stops) + 1):
        due: list[Due] = [
            (row, asked[i], q) for row, i in enumerate(alive) for q in asked[i].questions if q.place(length) == place
        ]
        new = [d for d in due if d[1].episode.id not in answered]
        with within(watcher, f"question {min(number + 1, total)}/{total}") if due else nullcontext():
            if new:
                yield from _rows(new, "", _answer(model, state, new, place * length, watcher), decode)
            if due and controls:
                for name, outcomes in _controls(model, state, len(alive), due, place * length, known, watcher):
                    yield from _rows(due, name, outcomes, decode)
        number += len(new)
        going = [i for i in alive if stops[i] > place]
        if not going:
            break
        if len(going) < len(alive):
            state, alive = state.rows(torch.arange(len(going))), going
        lines, names = [asked[i].line for i in alive], [asked[i].episode.id for i in alive]
        charged = [name not in answered for name in names]
        if watcher is not None:
            watcher.at(place + 1, max(stops), names[0] if len(names) == 1 else "")
        state = _absorb(model, state, lines, place * length, place * length, watcher, names, charged)


def _rows(due: Sequence[Due], control: str, outcomes: Sequence[Outcome], decode: Decode | None) -> Iterator[Row]:
    _check(due, control, outcomes)
    for d, outcome in zip(due, outcomes, strict=True):
        yield _row(d, control, outcome, decode)


def _check(due: Sequence[Due], control: str, outcomes: Sequence[Outcome]) -> None:
    """Refuse answers whose likelihood, or logits while they were written, are not finite."""
    for d, outcome in zip(due, outcomes, strict=True):
        if not all(map(math.isfinite, outcome.nll)):
            raise NotFinite(f"non-finite from {_called(d)}{f' (control {control})' if control else ''}")


def _called(due: Due) -> str:
    """A question for a person; tokens count from 1."""
    _, stream, question = due
    return f"the question at token {question.at + 1:,} of {stream.episode.id} (event {question.event})"


def _absorb(
    model: MemoryModel[Any],
    state: State,
    lines: Sequence[Line],
    start: int,
    before: int,
    watcher: Watcher | None,
    names: Sequence[str],
    charged: Sequence[bool] | None = None,
) -> State:
    """Write the full segment at `start` of every line; `before` tokens were read before it. `names` are the lines'.

    Lines that are not `charged` have been read before, and are read again for what is beside them.
    """
    segment, _ = cut(lines, start, segment_length(model), model.backbone.device)
    with stepping(watcher, len(lines)):
        after: State = model.absorb(state, segment)
    if watcher is not None:
        own = segment.mask if charged is None else segment.mask[torch.tensor(charged)]
        watcher.stepped(model, len(own), segment.ids.shape[1], before, int(own.sum()), absorbed=True)
        watcher.state(after, len(lines))
        watcher.wrote(state, after, len(lines), before + segment.ids.shape[1])
    check_state(after, before, names)
    return after


def _answer(
    model: MemoryModel[Any], state: State, due: Sequence[Due], start: int, watcher: Watcher | None
) -> list[Outcome]:
    """Answers to the questions that stand in the segment at `start`, from `state` there."""
    place = torch.tensor([row for row, _, _ in due])
    return _score(model, state.rows(place), due, _heads(due, start), start, watcher)


def _controls(
    model: MemoryModel[Any],
    state: State,
    alive: int,
    due: Sequence[Due],
    start: int,
    known: Known,
    watcher: Watcher | None,
) -> Iterator[tuple[str, list[Outcome]]]:
    """The same from fresh states, from the next of the `alive` rows of `state`, and with the evidence in the prompt."""
    anywhere = [q.new_tokens > 0 and len(q.prompt) > 0 for _, _, q in due]  # without choices: the same at every place

    def fresh(name: str, heads: Sequence[Tensor]) -> list[Outcome]:
        names = [(name, stream.episode.id, q.ask) for _, stream, q in due]
        first = {known_as: n for n, known_as in reversed(list(enumerate(names)))}
        new = [n for n, one in enumerate(names) if not anywhere[n] or (one not in known and first[one] == n)]
        # Without the stream's own text before it, the prompt is as it would be behind any other.
        chosen = [
            (row, s, q.elsewhere() if name == "ceiling" or anywhere[n] else q) for n in new for row, s, q in [due[n]]
        ]
        states = open_lines(model, [s.line for _, s, _ in chosen]) if chosen else state
        own = [heads[n] for n in new]
        found = dict(zip(new, _score(model, states, chosen, own, 0, watcher, whole=name == "ceiling"), strict=True))
        known.update({names[n]: outcome for n, outcome in found.items() if anywhere[n]})
        return [known[one] if anywhere[n] else found[n] for n, one in enumerate(names)]

    heads = _heads(due, start)
    with control(watcher, "wiped"):
        wiped = fresh("wiped", [head[:0] if alone else head for head, alone in zip(heads, anywhere, strict=True)])
    yield "wiped", wiped
    if alive > 1:
        with control(watcher, "foreign"):
            others = torch.tensor([(row + 1) % alive for row, _, _ in due])
            foreign = _score(model, state.rows(others), due, heads, start, watcher)
        yield "foreign", foreign
    if all(len(q.evidence) for _, _, q in due):
        with control(watcher, "ceiling"):
            ceiling = fresh("ceiling", [_fit(q, model) for _, _, q in due])
        yield "ceiling", ceiling


def _heads(due: Sequence[Due], start: int) -> list[Tensor]:
    """What every question's stream has read since `start`: its open segment."""
    return [stream.line.ids[start : q.at] for _, stream, q in due]


def _score(
    model: MemoryModel[Any],
    state: State,
    due: Sequence[Due],
    heads: Sequence[Tensor],
    before: int,
    watcher: Watcher | None,
    *,
    whole: bool = False,
) -> list[Outcome]:
    """One outcome per question: the surprisal of its choices after `heads` and the prompt, read from `state`.

    With `whole` head and question stay in one segment (the ceiling): nothing of them has to go through memory.
    """
    length = segment_length(model)
    common = [max(0, len(head) + len(q.prompt) - 1) for head, (_, _, q) in zip(heads, due, strict=True)]
    shared = [(0 if whole else tokens // length, d[2].new_tokens > 0) for tokens, d in zip(common, due, strict=True)]
    found: dict[int, Outcome] = {}
    for segments, generates in sorted(set(shared)):  # whose shared part fills equally many segments go together
        group = [n for n, kind in enumerate(shared) if kind == (segments, generates)]
        lines = [_choice_lines(due[n], heads[n]) for n in group]
        after = state.rows(torch.tensor(group))
        for number in range(segments):
            first = [choices[0] for choices in lines]
            names = [_called(due[n]) for n in group]
            if watcher is not None:
                watcher.at(number + 1, segments + 1)
            after = _absorb(model, after, first, number * length, before + number * length, watcher, names)
        left = [[_from(line, segments * length) for line in choices] for choices in lines]
        if generates:
            questions = [(one, due[n][2]) for n, (one,) in zip(group, left, strict=True)]
            outcomes = _generated(model, questions, after, before + segments * length, whole, watcher)
        else:
            outcomes = [Outcome(n) for n in _in_batches(model, left, after, before + segments * length, whole, watcher)]
        found.update(zip(group, outcomes, strict=True))
    return [found[n] for n in range(len(due))]


def _generated(
    model: MemoryModel[Any],
    questions: Sequence[tuple[Line, Question]],
    state: State,
    before: int,
    whole: bool,
    watcher: Watcher | None,
) -> list[Outcome]:
    """Answers to questions without choices; row i of `state` belongs to line i, a prompt and the right answer."""
    size = max(1, CHOICE_TOKENS // max(len(line) for line, _ in questions))
    found: list[Outcome] = []
    for first in range(0, len(questions), size):
        part = questions[first : first + size]
        own = state if size >= len(questions) else state.rows(torch.arange(first, first + len(part)))
        answers = [(len(q.choices[0]), q.new_tokens) for _, q in part]
        made = generate(model, [line for line, _ in part], answers, own, before, whole=whole, watcher=watcher)
        found += [Outcome([nll], ids) for nll, ids in made]
    return found


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
        asked = len(question.prompt) + max(question.new_tokens, *(len(c) for c in question.choices))
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
    one_token = all(len(line) > 1 and int(line.scored.sum()) == 1 for choices in lines for line in choices)
    if one_token and model.traits.look_ahead == 0:
        return _at_once(model, lines, state, before, watcher)
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


def _at_once(
    model: MemoryModel[Any], lines: Sequence[Sequence[Line]], state: State, before: int, watcher: Watcher | None
) -> list[list[float]]:
    """`_in_batches` where every choice is one token: one look at what comes before it predicts them all.

    What comes before fills one segment at most (`_score` has read the rest), or is the ceiling's whole text.
    """
    size = max(1, CHOICE_TOKENS // max(len(choices[0]) - 1 for choices in lines))
    found: list[list[float]] = []
    for first in range(0, len(lines), size):
        part = lines[first : first + size]
        own = state if size >= len(lines) else state.rows(torch.arange(first, first + len(part)))
        asked = [_until(choices[0], len(choices[0]) - 1) for choices in part]
        segment, _ = cut(asked, 0, max(len(line) for line in asked), model.backbone.device)
        if watcher is not None:
            watcher.at(1, 1)
        readout, _ = model.step(own, segment, write=False)
        if watcher is not None:
            watcher.stepped(model, len(part), segment.ids.shape[1], before, int(segment.mask.sum()))
        nll = -readout.at(segment.lengths - 1).logits()[:, 0].float().log_softmax(dim=-1)  # [questions, vocab]
        found += [[float(nll[n, line.ids[-1]]) for line in choices] for n, choices in enumerate(part)]
    return found


def _until(line: Line, end: int) -> Line:
    given = None if line.given is None else line.given[:end]
    return replace(line, ids=line.ids[:end], scored=line.scored[:end], given=given)


def _row(due: Due, control: str, outcome: Outcome, decode: Decode | None) -> Row:
    _, stream, question = due
    asked, nll = question.ask, outcome.nll
    choices = asked.choices or (asked.answer,)
    right = choices.index(asked.answer)
    found = question.choices[right].tolist()
    generated = decode(outcome.generated) if outcome.generated and decode is not None else ""
    return {
        **stream.identity,
        "event": question.event,
        "kind": "ask",
        "control": control,
        "start": question.at,
        "tokens": len(found),
        "nbytes": len(asked.answer.encode()),
        "words": len(asked.answer.split()),
        "nll": nll[right],
        "distance_tokens": question.distance_tokens,
        "distance_bytes": question.distance_bytes,
        "choice_nll": nll,
        "predicted": choices[min(range(len(nll)), key=nll.__getitem__)] if asked.choices else generated,
        "answer": asked.answer,
        "label": asked.label,
        "generated": generated,
        "greedy": bool(outcome.generated) and outcome.generated[: len(found)] == found,
        "accepted": list(asked.accepted or (asked.answer,)),
    }
