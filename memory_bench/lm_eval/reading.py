"""Reads token streams for lm-eval: every context once, every continuation on a fork of the memory after it.

- A stream is cut left to right into segments. All full segments before the last context token are read into memory, and
  contexts that begin alike share that reading as far as whole segments agree.
- What is left of a context (its open segment) is looked at together with a continuation, on a fork; continuations that
  differ in their last token only are scored by one look. The open segment's context is marked as given.
- Rows of unequal length leave the batch when they end. Only a row's last segment is ever padded, and what it writes is
  thrown away with the row.
- A row's seed is that of its first segment, so its random draws do not depend on what is read beside it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from memory_bench.cell import digest
from memory_bench.corpus import Line
from memory_bench.driver.stream import Watcher, check_state, cut, segment_length
from memory_bench.errors import NotFinite
from memory_bench.protocol import LOGIT_SLICE, MemoryModel, Segment, State

Ids = tuple[int, ...]
Likelihood = tuple[float, bool]
"""Log-likelihood in nats, and whether greedy decoding would have given the same tokens."""


@dataclass(frozen=True, slots=True)
class Fork:
    """Contexts whose full segments have all been read.

    Attributes:
        state: after them, a row for each of `contexts`.
        contexts: their places in the list that was read.
        read: tokens read of each.
    """

    state: State
    contexts: list[int]
    read: int


@dataclass(frozen=True, slots=True)
class _Front:
    """Rows that go on from rows of a state: each stands for the contexts that share what it will have read."""

    before: State | None
    parents: list[int]
    members: list[list[int]]
    depth: int


@dataclass(frozen=True, slots=True)
class _Tail:
    """The end of a stream: context, from `first` on continuation, and the tokens that are wanted after it."""

    ids: Ids
    first: int
    lasts: tuple[int, ...]

    def inputs(self, *, given: bool) -> Line:
        """What runs through the model: a position is scored where the token after it belongs to the continuation.

        The last position is not scored here: what follows it is scored for each of `lasts`.
        """
        places = torch.arange(len(self.ids))
        scored = (places >= self.first - 1) & (places < len(self.ids) - 1)
        return Line(torch.tensor(self.ids), scored, places < self.first if given else None)

    def targets(self) -> Line:
        """The token after each position."""
        return Line(torch.tensor([*self.ids[1:], self.lasts[0]]), torch.zeros(len(self.ids), dtype=torch.bool))


class Counts(Watcher):
    """What was read, and the largest state."""

    def __init__(self) -> None:
        self.tokens, self.state_bytes, self.state_host_bytes = 0, 0, 0

    def stepped(
        self, model: MemoryModel[Any], rows: int, tokens: int, before: int, real: int, *, absorbed: bool = False
    ) -> None:
        """See `Watcher.stepped`."""
        del model, rows, tokens, before, absorbed
        self.tokens += real

    def state(self, state: State, rows: int) -> None:
        """See `Watcher.state`; bytes are those of one stream."""
        size = state.size()
        self.state_bytes = max(self.state_bytes, size.device // rows)
        self.state_host_bytes = max(self.state_host_bytes, size.host // rows)


class Reader:
    """A model that reads token streams.

    Args:
        model: in evaluation mode.
        rows: streams side by side.
        seed: of the rows' random draws, with their text.
        watcher: told of every step.
    """

    def __init__(self, model: MemoryModel[Any], *, rows: int, seed: int, watcher: Watcher) -> None:
        self.model, self.rows, self.seed, self.watcher = model, rows, seed, watcher
        self.length = segment_length(model)

    def open_from(self, context: Ids) -> int:
        """How many tokens of a context are read into memory; what is left holds its last token."""
        return (len(context) - 1) // self.length * self.length

    @torch.no_grad()
    def forks(self, contexts: Sequence[Ids]) -> Iterator[Fork]:
        """The states after the full segments of all `contexts`, which have at least one token each."""
        waiting = self._continued(None, [(0, list(range(len(contexts))))], contexts, 0)
        while waiting:
            front = waiting.pop()
            state = self._enter(front, contexts)
            places = [(row, i) for row, members in enumerate(front.members) for i in members]
            read = front.depth * self.length
            due = [(row, i) for row, i in places if self.open_from(contexts[i]) == read]
            for start in range(0, len(due), self.rows):
                part = due[start : start + self.rows]
                rows = torch.tensor([row for row, _ in part])
                yield Fork(state.rows(rows), [i for _, i in part], read)
            left = [(r, [i for i in m if self.open_from(contexts[i]) > read]) for r, m in enumerate(front.members)]
            waiting += self._continued(state, left, contexts, front.depth)

    def _continued(
        self, state: State | None, rows: Sequence[tuple[int, list[int]]], contexts: Sequence[Ids], depth: int
    ) -> list[_Front]:
        """The fronts that follow `state`: contexts of a row stay together as long as their next segments agree."""
        found: dict[tuple[int, Ids], list[int]] = {}
        start = depth * self.length
        for row, members in rows:
            for i in members:
                found.setdefault((row, contexts[i][start : start + self.length]), []).append(i)
        children = [(row, members) for (row, _), members in found.items()]
        parts = [children[first : first + self.rows] for first in range(0, len(children), self.rows)]
        after = 0 if state is None else depth + 1
        return [_Front(state, [row for row, _ in part], [m for _, m in part], after) for part in reversed(parts)]

    def _enter(self, front: _Front, contexts: Sequence[Ids]) -> State:
        """The state of a front: fresh at the beginning, else after one more segment."""
        firsts = [contexts[members[0]] for members in front.members]
        if front.before is None:
            return self._open(firsts)
        start = (front.depth - 1) * self.length
        ids = torch.tensor([context[start : start + self.length] for context in firsts])
        segment = Segment.full(ids.to(self.model.backbone.device))
        state: State = self.model.absorb(front.before.rows(torch.tensor(front.parents)), segment)
        self.watcher.stepped(self.model, len(firsts), self.length, start, ids.numel(), absorbed=True)
        self.watcher.state(state, len(firsts))
        check_state(state, start, [f"the text that begins {list(context[:8])}" for context in firsts])
        return state

    def _open(self, texts: Sequence[Ids]) -> State:
        seeds = [int(digest([self.seed, list(ids[: self.length])])[:7], 16) for ids in texts]
        opened: State = self.model.open(len(texts), seeds=seeds)
        return opened

    def texts(self, texts: Sequence[Ids]) -> Iterator[Likelihood]:
        """The likelihood of each text but its first token, of two tokens at least; nothing of it is given."""
        for first in range(0, len(texts), self.rows):
            part = texts[first : first + self.rows]
            tails = [_Tail(ids[:-1], 1, ids[-1:]) for ids in part]
            yield from (found[0] for found in self._look(self._open(part), tails, 0, given=False))

    def likelihoods(self, asked: Mapping[Ids, Sequence[Ids]]) -> Iterator[tuple[Ids, Ids, Likelihood]]:
        """(context, continuation, likelihood) for every continuation of every context; both have tokens."""
        contexts = list(asked)
        for fork in self.forks(contexts):
            rows: list[int] = []
            tails: list[_Tail] = []
            for row, i in enumerate(fork.contexts):
                open_segment = contexts[i][fork.read :]
                alike: dict[Ids, list[int]] = {}
                for continuation in dict.fromkeys(asked[contexts[i]]):
                    alike.setdefault(continuation[:-1], []).append(continuation[-1])
                for begun, lasts in alike.items():
                    rows.append(row)
                    tails.append(_Tail(open_segment + begun, len(open_segment), tuple(lasts)))
            for first in range(0, len(tails), self.rows):
                part = tails[first : first + self.rows]
                state = fork.state.rows(torch.tensor(rows[first : first + self.rows]))
                looked = self._look(state, part, fork.read, given=True)
                for row, tail, found in zip(rows[first:], part, looked, strict=False):
                    for last, likelihood in zip(tail.lasts, found, strict=True):
                        yield contexts[fork.contexts[row]], (*tail.ids[tail.first :], last), likelihood

    @torch.no_grad()
    def _look(self, state: State, tails: Sequence[_Tail], before: int, *, given: bool) -> list[list[Likelihood]]:
        """Per tail the likelihood of its continuation with each of its last tokens; row i of `state` is tail i's."""
        lines, targets = [tail.inputs(given=given) for tail in tails], [tail.targets() for tail in tails]
        total, greedy = torch.zeros(len(tails), dtype=torch.float64), torch.ones(len(tails), dtype=torch.bool)
        found: list[list[Likelihood]] = [[] for _ in tails]
        alive = sorted(range(len(tails)), key=lambda i: -len(lines[i]))
        state, start = state.rows(torch.tensor(alive)), 0
        while alive:
            segment, wanted = cut([lines[i] for i in alive], start, self.length, self.model.backbone.device)
            wished = cut([targets[i] for i in alive], start, self.length, segment.ids.device)[0].ids
            left = sum(len(lines[i]) > start + self.length for i in alive)
            readout, after = self.model.step(state, segment, write=left > 0)
            self._told(segment, before + start, after if left else state)
            nats, best = _scores(readout.head, readout.hidden[wanted], wished[wanted])
            owners = torch.tensor(alive)[wanted.nonzero()[:, 0].cpu()]
            total.index_add_(0, owners, nats)
            greedy[owners[~best]] = False
            for row, i in enumerate(alive[left:], left):
                logits = readout.head(readout.hidden[row, segment.lengths[row] - 1]).float()  # [vocab]
                logprobs, top = logits.log_softmax(dim=-1), int(logits.argmax())
                begun = float(total[i]), bool(greedy[i])
                found[i] = [(begun[0] + float(logprobs[t]), begun[1] and top == t) for t in tails[i].lasts]
                if not all(math.isfinite(likelihood) for likelihood, _ in found[i]):
                    raise NotFinite(
                        f"non-finite likelihood of what follows token {before + tails[i].first:,} of a text"
                    )
            alive, start = alive[:left], start + self.length
            state = after.rows(torch.arange(left)) if left else after
        return found

    def _told(self, segment: Segment, before: int, state: State) -> None:
        rows, tokens = segment.ids.shape
        self.watcher.stepped(self.model, rows, tokens, before, int(segment.mask.sum()))
        self.watcher.state(state, rows)


def _scores(head: Any, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (nats, float64) of `targets` ``[n]`` and whether each is the likeliest; on the CPU."""
    if not len(targets):
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.bool)
    size = max(1, LOGIT_SLICE // head(hidden[:1]).shape[-1])
    nats, best = [], []
    for part, wished in zip(hidden.split(size), targets.split(size), strict=True):
        logits = head(part).float()  # [n, vocab]
        nats.append(-cross_entropy(logits, wished, reduction="none"))
        best.append(logits.argmax(dim=-1) == wished)
    return torch.cat(nats).double().cpu(), torch.cat(best).cpu()
