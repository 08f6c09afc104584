"""Where a training stands between two optimiser steps, as tensors in a file: weights, moments, generators.

Weights are those that train and all that stands beside the backbone, with every buffer. A backbone that does not train
is where it came from.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memory_bench.driver import randomness
from memory_bench.driver.tensor_file import Entry, entries, read_tensors
from memory_bench.files.artefacts import Damaged
from memory_bench.protocol import MemoryModel, is_added

WEIGHTS, MOMENTS, RANDOM, CORPUS = "weights.", "optimizer.", "random.", "corpus"
COUNT = "step"  # of the optimiser: a number on the CPU, wherever the weights are


@dataclass(frozen=True, slots=True)
class Standing:
    """What moves in a training.

    Attributes:
        model: at work.
        trained: its parameters that train, by name.
        optimizer: of these.
        rng: that the corpus is drawn with.
    """

    model: MemoryModel[Any]
    trained: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    rng: torch.Generator

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return self.model.backbone.device

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, sharing memory with what is at work."""
        moments = {
            f"{MOMENTS}{name}.{key}": value
            for name, parameter in self.trained.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        return {**self._weights(), **moments, **self._random(), CORPUS: self.rng.get_state()}

    def put_back(self, file: Path) -> None:
        """Be as `tensors` was when it was written to `file`.

        Raises:
            Damaged: the file holds something else than this model and its optimiser have, or the corpus has drawn
                otherwise; nothing was changed then.
        """
        there = entries(file)
        moments = {name: self._empty(name, entry) for name, entry in there.items() if name.startswith(MOMENTS)}
        random, drawn = {n: s.clone() for n, s in self._random().items()}, self.rng.get_state().clone()
        read_tensors(file, {CORPUS: drawn})
        if not torch.equal(drawn, self.rng.get_state()):
            raise Damaged("the corpus does not draw again what it drew before")
        targets = {**self._weights(), **moments, **random}
        if strange := sorted(there.keys() ^ {*targets, CORPUS}):
            raise Damaged(f"it does not hold what the model has ({strange[0]})")
        read_tensors(file, targets)
        for name, parameter in self.trained.items():
            own = f"{MOMENTS}{name}."
            if kept := {n.removeprefix(own): t for n, t in moments.items() if n.rpartition(".")[0] == own[:-1]}:
                self.optimizer.state[parameter] = kept
        randomness.put_back_tensors({n.removeprefix(RANDOM): s for n, s in random.items()}, self.model, self.device)

    def _weights(self) -> dict[str, Tensor]:
        named = self.model.named_parameters()
        kept = {f"{WEIGHTS}{n}": p.detach() for n, p in named if is_added(n) or n in self.trained}
        return kept | {f"{WEIGHTS}{name}": buffer for name, buffer in self.model.named_buffers()}

    def _random(self) -> dict[str, Tensor]:
        states = randomness.tensors(self.model, self.device)
        return {f"{RANDOM}{name}": state for name, state in states.items()}

    def _empty(self, name: str, entry: Entry) -> Tensor:
        """Room for what the optimiser keeps of a parameter."""
        parameter, _, key = name.removeprefix(MOMENTS).rpartition(".")
        own = self.trained.get(parameter)
        if own is None:
            raise Damaged(f"it does not hold what the model has ({name})")
        if key == COUNT or entry.shape != tuple(own.shape):
            return torch.empty(entry.shape, dtype=entry.dtype)
        return torch.empty_like(own, dtype=entry.dtype, requires_grad=False)
