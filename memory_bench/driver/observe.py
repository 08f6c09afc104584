"""Runs episodes through a model and writes down what was observed: the rows of ``samples.parquet``."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from memory_bench.driver.asking import Row, ask
from memory_bench.driver.encoding import Stream, encode_episode
from memory_bench.driver.stream import Memory, Progress, Watcher, control, segment_length, walk
from memory_bench.episode import Ask, Decode, Encode, Episode
from memory_bench.errors import UserError
from memory_bench.protocol import MemoryModel

BATCH_TOKENS = 8192
MAX_ROWS = 32
HELD_BYTES = 10**9  # of keys and values of streams read side by side; the foreign control holds them twice


def observe(  # noqa: PLR0913
    model: MemoryModel[Any],
    episodes: Sequence[Episode],
    encode: Encode,
    *,
    seed: int,
    controls: bool = True,
    watcher: Watcher | None = None,
    progress: Progress | None = None,
    sink: list[Row] | None = None,
    decode: Decode | None = None,
) -> list[Row]:
    """Everything that can be seen of `model` on `episodes`: one row a scored segment or question.

    Args:
        model: trained, in evaluation mode.
        episodes: of a task.
        encode: the backbone's tokenizer.
        seed: of the cell; with an episode's id it seeds the row's random draws.
        controls: also observe with memory wiped and foreign, and with the evidence in the prompt.
        watcher: told of the steps; those of controls are not charged to the model.
        progress: told (episodes done, all).
        sink: where rows are added one by one, for a caller who keeps them if this is cut short.
        decode: the backbone's tokenizer, backwards; only questions without choices need it.

    Raises:
        UserError: a question has no choices, and there is no `decode`.
        NotFinite: a score, a choice's logit, those of a generated answer or what is remembered is not finite; with
            the episode and the place where it began. Controls count as well.
    """
    if decode is None and any(isinstance(e, Ask) and not e.choices for episode in episodes for e in episode.events):
        raise UserError("Some questions have no choices: their answers can only be read with the tokenizer's decode.")
    streams = [encode_episode(episode, encode, seed) for episode in episodes]
    return observe_streams(
        model, streams, seed=seed, controls=controls, watcher=watcher, progress=progress, sink=sink, decode=decode
    )


def observe_streams(
    model: MemoryModel[Any],
    streams: Sequence[Stream],
    *,
    seed: int,
    controls: bool = True,
    watcher: Watcher | None = None,
    progress: Progress | None = None,
    sink: list[Row] | None = None,
    decode: Decode | None = None,
) -> list[Row]:
    """`observe` of episodes that are encoded already."""
    order = {s.episode.id: i for i, s in enumerate(streams)}
    streams = sorted(streams, key=lambda s: -len(s.line))
    rows: list[Row] = [] if sink is None else sink
    first = 0
    with torch.no_grad():
        while first < len(streams):
            batch = streams[first : first + side_by_side(model, len(streams[first].line))]
            questions = sum(len(s.questions) for s in streams[:first]), sum(len(s.questions) for s in streams)
            # The first stream is read alone, where somebody could cut this short: then there is something to show.
            small = watcher is not None and not first and len(batch) > 1
            parts = [batch[:1], batch] if small else [batch]
            for row in _observe_batch(model, parts, watcher, controls, decode, *questions):
                rows.append({"seed": seed, **row})
            first += len(batch)
            if progress is not None:
                progress(first, len(streams))
    rows.sort(key=lambda r: (r["control"], order[r["episode"]], r["event"], r["start"]))
    return rows


def side_by_side(model: MemoryModel[Any], longest: int) -> int:
    """How many streams of at most `longest` tokens are read at once."""
    rows = min(MAX_ROWS, BATCH_TOKENS // segment_length(model))
    if not model.traits.bounded:
        b = model.backbone
        per_token = 2 * b.layers * b.kv_heads * b.head_width * b.dtype.itemsize
        rows = min(rows, HELD_BYTES // (per_token * max(1, longest)))
    return max(1, rows)


def _observe_batch(
    model: MemoryModel[Any],
    parts: Sequence[Sequence[Stream]],
    watcher: Watcher | None,
    controls: bool,
    decode: Decode | None,
    number: int,
    total: int,
) -> Iterator[Row]:
    """Rows of a batch, as they come: the main passes over its `parts`, one after the other, and then the controls.

    A part holds what those before it do, whose main pass is not run again. The first batch begins with one stream: a
    model that many at once are too much for has been observed before it ends. `number` of `total` questions were asked.
    """
    *small, batch = parts
    done: set[str] = set()
    for part in parts:
        yield from _read(model, [s for s in part if s.episode.id not in done], watcher, "own")
        done |= {s.episode.id for s in part}
    for memory in ("wiped", "foreign") if controls else ():
        with control(watcher, memory):
            yield from _read(model, batch, watcher, memory)
    for part in small:
        yield from ask(model, part, watcher, controls=False, decode=decode, number=number, total=total)
    had = [s for part in small for s in part]
    number, answered = number + sum(len(s.questions) for s in had), {s.episode.id for s in had}
    yield from ask(
        model, batch, watcher, controls=controls, decode=decode, answered=answered, number=number, total=total
    )


def _read(model: MemoryModel[Any], streams: Sequence[Stream], watcher: Watcher | None, memory: Memory) -> Iterator[Row]:
    """Scored reading, piece by piece."""
    scored = [s for s in streams if bool(s.line.scored.any())]
    if not scored:
        return
    name = "" if memory == "own" else memory
    names = [s.episode.id + (f" (control {name})" if name else "") for s in scored]
    for piece in walk(model, [s.line for s in scored], memory=memory, watcher=watcher, names=names):
        sums = piece.nll.double().sum(dim=1).tolist()
        for place, (at, nll) in enumerate(zip(piece.lines, sums, strict=True)):
            row = _read_row(scored[at], piece.start, piece.scored.shape[1], nll)
            if row is not None and bool(piece.scored[place].any()):
                yield {**row, "control": name}


def _read_row(stream: Stream, start: int, length: int, nll: float) -> Row | None:
    span = slice(start, start + length)
    scored = stream.line.scored[span]
    if not bool(scored.any()):
        return None
    return {
        **stream.identity,
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
        "generated": "",
        "greedy": False,
        "accepted": None,
    }
