"""Greedy continuations of contexts for lm-eval, written in pieces so that stop sequences can end them.

A context is read as in `memory_bench.lm_eval.reading`; `MemoryModel.decode` writes from its open segment on. After each
piece, what has filled segments is read into memory as decoding itself does, and rows that have ended leave.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from memory_bench.errors import NotFinite
from memory_bench.lm_eval.reading import Ids, Reader
from memory_bench.protocol import DecodePlan, Segment, State

PIECE = 32  # tokens between two looks for a stop sequence

Ended = Callable[[list[int]], bool]
"""Whether what was written so far is to be continued no more."""


@dataclass(slots=True)
class _Row:
    """A continuation in the making: the open segment's ids, how many of them are the context's, and what is written."""

    context: int
    ids: Ids
    given: int
    written: list[int]


@torch.no_grad()
def write(
    reader: Reader, contexts: Sequence[Ids], tokens: int, ended: Ended, stop_ids: tuple[int, ...] = ()
) -> Iterator[tuple[int, list[int]]]:
    """(index of a context, up to `tokens` ids of its greedy continuation); a stop id is the last of them.

    Args:
        reader: of the model.
        contexts: token ids, at least one each.
        tokens: written at most.
        ended: asked after every piece.
        stop_ids: end a continuation.
    """
    for fork in reader.forks(contexts):
        rows = [_Row(i, contexts[i][fork.read :], len(contexts[i]) - fork.read, []) for i in fork.contexts]
        waiting = [(fork.state, rows, fork.read)]
        while waiting:
            state, rows, before = waiting.pop()
            _continue(reader, state, rows, before, tokens, stop_ids)
            going = [n for n, row in enumerate(rows) if len(row.written) < tokens and not _over(row, ended, stop_ids)]
            yield from ((row.context, row.written) for n, row in enumerate(rows) if n not in going)
            for filled in sorted({reader.open_from(rows[n].ids) for n in going}):
                group = [n for n in going if reader.open_from(rows[n].ids) == filled]
                own = [rows[n] for n in group]
                after = _fold(reader, state.rows(torch.tensor(group)), own, filled, before)
                waiting.append((after, own, before + filled))


def _over(row: _Row, ended: Ended, stop_ids: tuple[int, ...]) -> bool:
    return (bool(row.written) and row.written[-1] in stop_ids) or ended(row.written)


def _continue(
    reader: Reader, state: State, rows: Sequence[_Row], before: int, tokens: int, stop_ids: tuple[int, ...]
) -> None:
    """Write a piece onto every row."""
    device = reader.model.backbone.device
    real = [torch.ones(len(row.ids), dtype=torch.bool) for row in rows]
    mask = pad_sequence(real, batch_first=True).to(device)  # [rows, tokens]
    ids = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True).to(device)
    given = torch.arange(ids.shape[1], device=device) < torch.tensor([[row.given] for row in rows], device=device)
    piece = min(PIECE, max(tokens - len(row.written) for row in rows))
    with reader.model.backbone.watched() as finite:
        new = reader.model.decode(state, Segment(ids, mask, given), DecodePlan(piece, stop_ids))
    if not all(map(bool, finite)):
        raise NotFinite(
            f"non-finite logits in an answer that is written after token {before + ids.shape[1]:,} of a text"
        )
    reader.watcher.stepped(reader.model, len(rows), ids.shape[1] + piece, before, int(mask.sum()) + new.numel())
    for row, found in zip(rows, new.tolist(), strict=True):
        stops = [n for n, token in enumerate(found) if token in stop_ids]
        kept = found[: stops[0] + 1 if stops else tokens - len(row.written)]
        row.written += kept
        row.ids += tuple(kept)


def _fold(reader: Reader, state: State, rows: Sequence[_Row], filled: int, before: int) -> State:
    """Read the full segments of rows that have equally many into memory; they are cut off."""
    device, length = reader.model.backbone.device, reader.length
    for start in range(0, filled, length):
        ids = torch.tensor([row.ids[start : start + length] for row in rows], device=device)
        places = torch.arange(start, start + length, device=device)
        given = places < torch.tensor([[row.given] for row in rows], device=device)
        state = reader.model.absorb(state, Segment.full(ids, given))
        reader.watcher.stepped(reader.model, len(rows), length, before + start, ids.numel(), absorbed=True)
        reader.watcher.state(state, len(rows))
    for row in rows:
        row.ids, row.given = row.ids[filled:], max(0, row.given - filled)
    return state
