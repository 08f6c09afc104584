"""Runs episodes through a model and writes down what was observed: the rows of ``samples.parquet``."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from memory_bench.cell import digest
from memory_bench.corpus import Line
from memory_bench.episode import Ask, Encode, Episode, Read
from memory_bench.protocol import MemoryModel, State
from memory_bench.stream import Memory, Progress, Watcher, cut, line_nll, open_lines, segment_length, walk

Row = dict[str, Any]
BATCH_TOKENS = 8192
MAX_ROWS = 32


@dataclass(frozen=True, slots=True)
class Question:
    """An `Ask`, encoded: `at` is its place in the stream (tokens read before it)."""

    ask: Ask
    event: int
    at: int
    distance_tokens: int
    distance_bytes: int
    evidence: Tensor
    prompt: Tensor
    choices: tuple[Tensor, ...]

    def line(self, head: Tensor, choice: int, seed: int) -> Line:
        """`head` (what is read, unscored), the prompt, and one choice, of which only the choice is scored."""
        answer = self.choices[choice]
        ids = torch.cat([head, self.prompt, answer])
        scored = torch.zeros(len(ids), dtype=torch.bool)
        scored[len(ids) - len(answer) :] = True
        given = torch.zeros_like(scored)
        given[len(head) : len(ids) - len(answer)] = True
        return Line(ids, scored, given, seed)


@dataclass(frozen=True, slots=True)
class Stream:
    """An episode, encoded.

    Attributes:
        episode: where it comes from.
        line: all that is read; scored where a `Read` is.
        nbytes: UTF-8 bytes of each token.
        words: words that end in each token.
        events: event index of each token.
        questions: in order of their place.
    """

    episode: Episode
    line: Line
    nbytes: Tensor
    words: Tensor
    events: Tensor
    questions: tuple[Question, ...]


def word_ends(text: str, nbytes: Sequence[int]) -> list[int]:
    """How many words (runs of non-blanks) end in each token, from the bytes each token covers."""
    ends = [m.end() for m in re.finditer(rb"\S+", text.encode())]
    borders = list(accumulate(nbytes))
    before = [bisect_right(ends, border) for border in [0, *borders]]
    return [after - at for at, after in pairwise(before)]


def encode_episode(episode: Episode, encode: Encode, seed: int) -> Stream:
    """Token ids, bytes and places of everything in an episode; the row's seed comes from its id and `seed`."""
    ids: list[int] = []
    nbytes: list[int] = []
    words: list[int] = []
    events: list[int] = []
    scored: list[bool] = []
    ends: dict[str, tuple[int, int, list[int]]] = {}
    questions: list[Question] = []
    for number, event in enumerate(episode.events):
        if isinstance(event, Read):
            new, sizes = encode(event.text)
            ids += new
            nbytes += sizes
            words += word_ends(event.text, sizes)
            events += [number] * len(new)
            scored += [event.scored] * len(new)
            if event.tag:
                ends[event.tag] = (len(ids), sum(nbytes), new)
        else:
            end, byte_end, evidence = ends.get(event.evidence, (-1, -1, []))
            questions.append(
                Question(
                    ask=event,
                    event=number,
                    at=len(ids),
                    distance_tokens=len(ids) - end if end >= 0 else -1,
                    distance_bytes=sum(nbytes) - byte_end if end >= 0 else -1,
                    evidence=torch.tensor(evidence, dtype=torch.long),
                    prompt=torch.tensor(encode(event.prompt)[0], dtype=torch.long),
                    choices=tuple(torch.tensor(encode(c)[0], dtype=torch.long) for c in event.choices),
                )
            )
    if scored:
        scored[0] = False
    row_seed = int(digest({"episode": episode.id, "seed": seed})[:7], 16)
    line = Line(torch.tensor(ids, dtype=torch.long), torch.tensor(scored, dtype=torch.bool), seed=row_seed)
    return Stream(episode, line, torch.tensor(nbytes), torch.tensor(words), torch.tensor(events), tuple(questions))


def observe(
    model: MemoryModel[Any],
    episodes: Sequence[Episode],
    encode: Encode,
    *,
    seed: int,
    controls: bool = True,
    watcher: Watcher | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Everything that can be seen of `model` on `episodes`: one row a scored segment or question.

    Args:
        model: trained, in evaluation mode.
        episodes: of a task.
        encode: the backbone's tokenizer.
        seed: of the cell; with an episode's id it seeds the row's random draws.
        controls: also observe with memory wiped and foreign, and with the evidence in the prompt.
        watcher: told of the steps of the main pass (controls are not charged to the model).
        progress: told (episodes done, all).
    """
    streams = [encode_episode(episode, encode, seed) for episode in episodes]
    streams.sort(key=lambda s: -len(s.line))
    rows: list[Row] = []
    size = max(1, min(MAX_ROWS, BATCH_TOKENS // segment_length(model)))
    with torch.no_grad():
        for first in range(0, len(streams), size):
            batch = streams[first : first + size]
            rows += _read(model, batch, watcher, controls)
            rows += _ask(model, batch, watcher, controls)
            if progress is not None:
                progress(min(first + size, len(streams)), len(streams))
    order = {e.id: i for i, e in enumerate(episodes)}
    rows.sort(key=lambda r: (r["control"], order[r["episode"]], r["event"], r["start"]))
    return [{"seed": seed, **row} for row in rows]


def _read(model: MemoryModel[Any], streams: Sequence[Stream], watcher: Watcher | None, controls: bool) -> list[Row]:
    """Scored reading: the main pass and its controls."""
    scored = [s for s in streams if bool(s.line.scored.any())]
    if not scored:
        return []
    rows: list[Row] = []
    ways: list[Memory] = ["own", "wiped", "foreign"] if controls else ["own"]
    for memory in ways:
        own = memory == "own"
        for piece in walk(model, [s.line for s in scored], memory=memory, watcher=watcher if own else None):
            sums = piece.nll.double().sum(dim=1).tolist()
            for at, nll in zip(piece.lines, sums, strict=True):
                row = _read_row(scored[at], piece.start, piece.scored.shape[1], nll)
                if row is not None and bool(piece.scored[piece.lines.index(at)].any()):
                    rows.append({**row, "control": "" if own else memory})
    return rows


def _read_row(stream: Stream, start: int, length: int, nll: float) -> Row | None:
    span = slice(start, start + length)
    scored = stream.line.scored[span]
    if not bool(scored.any()):
        return None
    return {
        **_identity(stream.episode),
        "event": int(stream.events[span][scored][0]),
        "kind": "read",
        "start": start + int(scored.nonzero()[0]),
        "tokens": int(scored.sum()),
        "nbytes": int(stream.nbytes[span][scored].sum()),
        "words": int(stream.words[span][scored].sum()),
        "nll": nll,
        "distance_tokens": -1,
        "distance_bytes": -1,
        "choice_nll": None,
        "predicted": "",
        "answer": "",
        "label": "",
    }


def _identity(episode: Episode) -> Row:
    return {"episode": episode.id, "cluster": episode.cluster or episode.id}


def _ask(model: MemoryModel[Any], streams: Sequence[Stream], watcher: Watcher | None, controls: bool) -> list[Row]:
    """Every question, on a fork of the state at its place; the stream is read once."""
    length = segment_length(model)
    asked = [s for s in streams if s.questions]
    if not asked:
        return []
    rows: list[Row] = []
    # Reading stops at the last full segment before a stream's last question.
    stops = [s.questions[-1].at // length for s in asked]
    alive = sorted(range(len(asked)), key=lambda i: -stops[i])
    state = open_lines(model, [asked[i].line for i in alive])
    for number in range(max(stops) + 1):
        due = [
            (place, asked[i], q)
            for place, i in enumerate(alive)
            for q in asked[i].questions
            if q.at // length == number
        ]
        if due:
            rows += _answer(model, state, due, number * length, watcher, controls)
        going = [i for i in alive if stops[i] > number]
        if not going:
            break
        state = state.rows(torch.arange(len(going)))
        alive = going
        lines = [replace(asked[i].line, scored=torch.zeros_like(asked[i].line.scored)) for i in alive]
        state = _absorb(model, state, lines, number * length, length, watcher)
    return rows


def _absorb(
    model: MemoryModel[Any], state: State, lines: Sequence[Line], start: int, length: int, watcher: Watcher | None
) -> State:
    segment, _ = cut(lines, start, length, model.backbone.device)
    after: State = model.absorb(state, segment)
    if watcher is not None:
        watcher.stepped(model, len(lines), segment.ids.shape[1], start, int(segment.mask.sum()))
        watcher.state(after, len(lines))
    return after


def _answer(
    model: MemoryModel[Any],
    state: State,
    due: Sequence[tuple[int, Stream, Question]],
    start: int,
    watcher: Watcher | None,
    controls: bool,
) -> list[Row]:
    """Score the choices of the questions that fall into the segment at `start`.

    Args:
        model: the model.
        state: at `start`.
        due: (row in `state`, stream, question).
        start: tokens written so far.
        watcher: for the main pass.
        controls: also ask with memory wiped, foreign, and with the evidence in the prompt.
    """
    place = torch.tensor([row for row, _, _ in due])
    others = place.roll(1) if len({s.episode.id for _, s, _ in due}) == len(due) > 1 else None
    fresh = open_lines(model, [s.line for _, s, _ in due])
    ways: list[tuple[str, State, bool]] = [("", state.rows(place), False)]
    if controls:
        ways.append(("wiped", fresh, False))
        ways += [("foreign", state.rows(others), False)] if others is not None else []
        ways += [("ceiling", fresh, True)] if any(len(q.evidence) for _, _, q in due) else []
    rows: list[Row] = []
    for control, read_from, in_prompt in ways:
        lines: list[Line] = []
        owner: list[int] = []
        for n, (_, stream, question) in enumerate(due):
            head = question.evidence if in_prompt else stream.line.ids[start : question.at]
            head = _fit(head, question, model) if in_prompt else head
            lines += [question.line(head, c, stream.line.seed) for c in range(len(question.choices))]
            owner += [n] * len(question.choices)
        whole = max(len(line) for line in lines) if in_prompt else None
        values = _in_batches(model, lines, owner, read_from, whole, watcher if not control else None)
        for n, (_, stream, question) in enumerate(due):
            nll = [v for v, o in zip(values, owner, strict=True) if o == n]
            rows.append(_ask_row(stream, question, control, nll))
    return rows


def _fit(head: Tensor, question: Question, model: MemoryModel[Any]) -> Tensor:
    """The end of the evidence that fits before the question where positions are limited."""
    limit = model.backbone.max_positions
    if limit is None:
        return head
    room = limit - len(question.prompt) - max(len(c) for c in question.choices) - 64  # memory tokens need room too
    return head[-max(1, room) :]


def _in_batches(
    model: MemoryModel[Any],
    lines: Sequence[Line],
    owner: Sequence[int],
    state: State,
    whole: int | None,
    watcher: Watcher | None,
) -> list[float]:
    size = max(1, min(3 * MAX_ROWS, BATCH_TOKENS // (whole or segment_length(model))))
    values: list[float] = []
    for first in range(0, len(lines), size):
        rows = torch.tensor(owner[first : first + size])
        part = lines[first : first + size]
        values += line_nll(model, part, state=state.rows(rows), length=whole, watcher=watcher)
    return values


def _ask_row(stream: Stream, question: Question, control: str, nll: list[float]) -> Row:
    ask = question.ask
    right = ask.choices.index(ask.answer)
    return {
        **_identity(stream.episode),
        "event": question.event,
        "kind": "ask",
        "control": control,
        "start": question.at,
        "tokens": len(question.choices[right]),
        "nbytes": len(ask.answer.encode()),
        "words": len(ask.answer.split()),
        "nll": nll[right],
        "distance_tokens": question.distance_tokens,
        "distance_bytes": question.distance_bytes,
        "choice_nll": nll,
        "predicted": ask.choices[min(range(len(nll)), key=nll.__getitem__)],
        "answer": ask.answer,
        "label": ask.label,
    }
