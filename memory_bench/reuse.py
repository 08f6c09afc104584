"""Passes that begin alike: while a text is continued token by token, only what is new is computed.

A backbone inside ``with backbone.reusing():`` keeps its last passes. A pass whose inputs begin like those of a kept
one, value by value, takes over hidden states, keys and values of that beginning, which in a causal pass do not depend
on what follows. So greedy decoding costs a model that reads with `Backbone.run` or `run_cached` what a cache of its own
would, and it need not have one. Models that write their own loop over the layers compute the open segment again.
"""

from dataclasses import dataclass

from torch import Tensor

from memory_bench.state import State

KEPT = 2  # a step may run two passes (HMT: the summary and the segment)


@dataclass(frozen=True, slots=True)
class Pass:
    """What went into a pass and what came out.

    Attributes:
        embeds: ``[rows, tokens, width]``.
        places: ``[rows, tokens]`` each: positions, mask, where there is text.
        pasts: the cached entries it read.
        keys, values: per layer ``[rows, kv_heads, tokens, head]``, unrotated.
        hidden: ``[rows, tokens, width]``, final hidden states.
    """

    embeds: Tensor
    places: tuple[Tensor, ...]
    pasts: tuple[State, ...]
    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    hidden: Tensor | None = None

    def shared(self, other: "Pass") -> int:
        """With how many of `other`'s tokens this pass begins."""
        alike = len(self.pasts) == len(other.pasts) and all(
            a is b for a, b in zip(self.pasts, other.pasts, strict=True)
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
