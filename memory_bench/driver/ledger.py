"""The bytes of a cell's tensors, by what they are for: a sum that no allocator, library or idle page blurs.

A process's resident memory has gaps that tensors fill unseen: what was freed while things were loaded. And weights
that a file is mapped for count only once they are touched. So the tensors are counted too, at every step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

MOMENTS = 2  # that Adam keeps of every weight


@dataclass(slots=True)
class Ledger:
    """Bytes that are held now.

    Attributes:
        weights: parameters and buffers of the model, each storage once.
        optimiser: the moments of the weights that are trained.
        gradients: of the same weights.
        saved: what a training step keeps for its backward pass, weights excepted: as counted in the first step of its
            kind (`saving`), zero outside training.
        state: of the model's memory while nothing is trained (in training it is among `saved`).
    """

    weights: int = 0
    optimiser: int = 0
    gradients: int = 0
    saved: int = 0
    state: int = 0
    _own: set[int] = field(default_factory=set)
    _model: "ref[nn.Module] | None" = None

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.optimiser + self.gradients + self.saved + self.state

    def hold(self, model: nn.Module) -> None:
        """Count the weights of the model that is at work; another one takes its place."""
        if self._model is not None and self._model() is model:
            return
        tensors = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
        sizes = {t.data_ptr(): t.nbytes() for t in tensors}
        self._model, self._own, self.weights = ref(model), set(sizes), sum(sizes.values())

    def train(self, trained: list[nn.Parameter]) -> None:
        """Count what the first optimiser step of these weights leaves: their gradients and moments."""
        self.gradients = sum(p.nbytes for p in trained)
        self.optimiser = MOMENTS * self.gradients

    def rest(self) -> None:
        """Training is over: nothing is kept for it."""
        self.optimiser = self.gradients = self.saved = 0

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Count what the forward pass inside keeps for its backward pass, while it grows."""
        seen: set[int] = set(self._own)
        self.saved = 0

        def keep(tensor: Tensor) -> Any:
            storage = tensor.untyped_storage()
            if (place := storage.data_ptr()) not in seen:
                seen.add(place)
                self.saved += storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
            yield
