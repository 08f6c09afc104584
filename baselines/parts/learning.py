"""Low-rank weights that a stream learns, one set a row, and the rules that change them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from memory_bench.state import State

SLICE = 1 << 22  # floats of logits that exist at once
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam


@dataclass(frozen=True, slots=True)
class Learned(State):
    """The update beside one projection.

    Attributes:
        a: ``[rows, rank, inputs]``.
        b: ``[rows, outputs, rank]``.
        moments: of a and b, first and second (a's first, b's first, a's second, b's second); empty without.
    """

    a: Tensor
    b: Tensor
    moments: tuple[Tensor, ...] = ()

    @classmethod
    def start(cls, a: Tensor, outputs: int, rows: int, moments: bool) -> "Learned":
        """What changes nothing yet: `a` ``[rank, inputs]`` for every row, and b zero."""
        first, second = a.expand(rows, -1, -1).clone(), a.new_zeros(rows, outputs, len(a))
        kept = tuple(torch.zeros_like(t, dtype=torch.float32) for _ in range(2) for t in (first, second))
        return cls(first, second, kept if moments else ())

    def __call__(self, x: Tensor) -> Tensor:
        """What is added to the projection of `x` ``[rows, tokens, inputs]``."""
        return torch.bmm(torch.bmm(x, self.a.transpose(1, 2)), self.b.transpose(1, 2))

    def leaf(self) -> Self:
        """The same values, for gradients."""
        return replace(self, a=self.a.detach().requires_grad_(), b=self.b.detach().requires_grad_())

    def towards(self, start: Tensor, share: float) -> Self:
        """With `share` of the distance to the start (`start` ``[rank, inputs]``, and zero) taken back."""
        return self if not share else replace(self, a=self.a + share * (start - self.a), b=(1 - share) * self.b)

    def where(self, rows: Tensor, other: "Learned") -> "Learned":
        """These weights in the chosen rows (``[rows]`` bool), `other` in the rest."""
        if bool(rows.all()):
            return self

        def pick(ours: Tensor, theirs: Tensor) -> Tensor:
            return torch.where(rows[:, None, None], ours, theirs)

        moments = tuple(pick(*pair) for pair in zip(self.moments, other.moments, strict=True))
        return Learned(pick(self.a, other.a), pick(self.b, other.b), moments)


def descend(weights: Learned, gradients: Sequence[Tensor], taken: Tensor, lr: float) -> Learned:
    """A step down the gradients of a and b."""
    del taken
    return replace(weights, a=weights.a.detach() - lr * gradients[0], b=weights.b.detach() - lr * gradients[1])


def adam(weights: Learned, gradients: Sequence[Tensor], taken: Tensor, lr: float) -> Learned:
    """A step of Adam; `taken` ``[rows]`` counts each row's steps, this one included."""
    count = taken.clamp(min=1)[:, None, None].float()
    new, first, second = [], [], []
    for old, gradient, m, v in zip(
        (weights.a, weights.b), gradients, weights.moments[:2], weights.moments[2:], strict=True
    ):
        g = gradient.float()
        m = torch.lerp(g, m, BETAS[0])
        v = torch.lerp(g.square(), v, BETAS[1])
        root = (v / (1 - BETAS[1] ** count)).sqrt() + EPSILON
        new.append((old.detach() - lr * (m / (1 - BETAS[0] ** count)) / root).to(old.dtype))
        first.append(m)
        second.append(v)
    return Learned(new[0], new[1], (*first, *second))


def loss_slope(head: Callable[[Tensor], Tensor], hidden: Tensor, ids: Tensor, pairs: Tensor, vocab: int) -> Tensor:
    """The gradient of the rows' losses by final hidden states ``[rows, tokens, width]``, same shape.

    A row's loss is the mean surprise of its tokens by those before them; rows are added, so that they do not mix.

    Args:
        head: gives logits.
        hidden: final hidden states.
        ids: ``[rows, tokens]``.
        pairs: ``[rows, tokens - 1]`` bool, where a token and the next both count.
        vocab: logits of a position.
    """
    share = (pairs / pairs.sum(dim=1, keepdim=True).clamp(min=1)).flatten()
    flat, wanted = hidden.detach()[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    found, start = [], 0
    while start < len(flat):
        end = min(len(flat), start + max(1, SLICE // vocab))
        with torch.enable_grad():
            part = flat[start:end].requires_grad_()
            given = part.view_as(part)  # hooks of PyTorch's counter take no leaf
            losses = F.cross_entropy(head(given).float(), wanted[start:end], reduction="none")
            loss = (losses * share[start:end]).sum()
        found.append(torch.autograd.grad(loss, part)[0])
        start = end
    return F.pad(torch.cat(found).view_as(hidden[:, :-1]), (0, 0, 0, 1))
