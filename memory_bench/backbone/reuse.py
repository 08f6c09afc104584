"""Passes that begin alike: while a text is continued token by token, only what is new is computed.

A backbone inside ``with backbone.reusing():`` keeps its last passes. A pass whose inputs begin like those of a kept
one, value by value, takes over hidden states, keys and values of that beginning, which in a causal pass do not depend
on what follows. So greedy decoding costs a model what a cache of its own would, and it need not have one.

`Backbone.run` and `run_cached` do so by themselves. A model that writes its own loop over the layers begins it with
`Backbone.resume` and computes the tokens from `Resumed.first` on: outside ``reusing`` all of them.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memory_bench.state import State

KEPT = 2  # a step may run two passes (HMT: the summary and the segment)


@dataclass(frozen=True, slots=True)
class Pass:
    """What went into a pass and what came out.

    Attributes:
        embeds: ``[rows, tokens, width]``.
        places: ``[rows, tokens]`` each: what else a token enters with (position, mask, whether it is text).
        context: the cached entries or the memory that all tokens read; the same objects, not equal ones, are alike.
        keys, values: per layer ``[rows, kv_heads, tokens, head]``, unrotated.
        hidden: ``[rows, tokens, width]``, final hidden states.
    """

    embeds: Tensor
    places: tuple[Tensor, ...]
    context: tuple[State, ...]
    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    hidden: Tensor | None = None

    def shared(self, other: "Pass") -> int:
        """With how many of `other`'s tokens this pass begins."""
        alike = len(self.context) == len(other.context) and all(
            a is b for a, b in zip(self.context, other.context, strict=True)
        )
        if not alike or len(self.embeds) != len(other.embeds):
            return 0
        tokens = min(self.embeds.shape[1], other.embeds.shape[1])
        same = (self.embeds[:, :tokens] == other.embeds[:, :tokens]).all(dim=2)  # [rows, tokens]
        for mine, others in zip(self.places, other.places, strict=True):
            same = same & (mine[:, :tokens] == others[:, :tokens])
        return int(same.all(dim=0).long().cumprod(dim=0).sum())


class Passes:
    """The last passes of a backbone, newest last."""

    def __init__(self) -> None:
        self.kept: list[Pass] = []

    def longest(self, wanted: Pass) -> tuple[Pass | None, int]:
        """The kept pass that `wanted` shares the longest beginning with, and how many tokens that is."""
        found = [(wanted.shared(kept), kept) for kept in self.kept]
        tokens, best = max(found, key=lambda pair: pair[0], default=(0, None))
        return (best, tokens) if tokens else (None, 0)

    def keep(self, done: Pass, continued: Pass | None) -> None:
        """Keep a pass instead of the one it continued, or else of the oldest."""
        others = [kept for kept in self.kept if kept is not continued]
        self.kept = [*others[1 - KEPT :], done]


class Resumed:
    """A pass under way, whose beginning a kept pass may have computed.

    Its layers are run in order over the tokens from `first` on, and `join` is called once for each.

    Args:
        inputs: of the whole pass.
        passes: where it may begin and is kept; None: it begins with the first token and nothing is kept.
        overlap: tokens before the first new one that are computed again, because their neighbours look at them.
        limit: so many tokens are taken over at most. The last token is never among them.

    Attributes:
        first: the first token to compute.
    """

    def __init__(self, inputs: Pass, passes: Passes | None, *, overlap: int = 0, limit: int | None = None) -> None:
        self._inputs, self._passes = inputs, passes
        last = inputs.embeds.shape[1] - 1
        found, start = passes.longest(inputs) if passes else (None, 0)
        self._start = max(0, min(start, last if limit is None else limit, last))
        self._done = found if self._start else None
        self.first = max(0, self._start - overlap)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def join(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The next layer's keys and values ``[rows, kv_heads, tokens, head]`` of all tokens, given the computed."""
        new = self._start - self.first
        if self._done is not None:
            layer = len(self._keys)
            keys = torch.cat([self._done.keys[layer][:, :, : self._start], keys[:, :, new:]], dim=2)
            values = torch.cat([self._done.values[layer][:, :, : self._start], values[:, :, new:]], dim=2)
        if self._passes is not None:
            self._keys.append(keys)
            self._values.append(values)
        return keys, values

    def finish(self, hidden: Tensor) -> Tensor:
        """Final hidden states of all tokens ``[rows, tokens, width]``, given the computed ones; the pass is kept."""
        done = self._done
        if done is not None and done.hidden is not None:
            hidden = torch.cat([done.hidden[:, : self._start], hidden[:, self._start - self.first :]], dim=1)
        if self._passes is not None:
            whole = replace(self._inputs, keys=tuple(self._keys), values=tuple(self._values), hidden=hidden)
            self._passes.keep(whole, done)
        return hidden
