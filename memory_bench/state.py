"""States as values: what a memory model remembers, as immutable dataclasses of tensors."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class StateSize:
    """Bytes a state occupies on the accelerator (or, without one, in main memory), and on the host beside it."""

    device: int = 0
    host: int = 0


def _over_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in its dataclasses, tuples and lists replaced by ``change(tensor)``."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(_over_tensors(item, change) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _over_tensors(getattr(value, f.name), change) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


class State:
    """Everything a model remembers of its streams. Subclasses are frozen dataclasses of tensors.

    Every tensor's first axis is the row; whatever is not a tensor is the same for all rows. Fields whose name starts
    with ``host_`` stay in main memory. A state is never changed in place, so sharing is safe. Its numbers are finite:
    what is empty or hidden is said by a mask, not by NaN or an infinity.
    """

    def fork(self) -> Self:
        """An independent continuation. Free, because states are values."""
        return self

    def rows(self, index: Tensor) -> Self:
        """The state of the chosen rows; `index` ``[n]`` int64, repeats allowed. All rows in order: the state itself."""
        if index.tolist() == list(range(self._row_count())):
            return self
        return cast(Self, _over_tensors(self, lambda t: t[index.to(t.device)]))

    def _row_count(self) -> int:
        return next((len(tensor) for _, tensor in self.tensors()), -1)

    def detach(self) -> Self:
        """The same values without their history of gradients."""
        return cast(Self, _over_tensors(self, Tensor.detach))

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Every tensor with its dotted name."""
        return _named_tensors(self, "")

    def broken_rows(self) -> list[int]:
        """The rows in which a number is not finite."""
        floating = [t for _, t in self.tensors() if t.is_floating_point() and t.numel()]
        # A sum is not finite where a number is not, and reads a large cache many times as fast as a test of each.
        sums = [t.detach().sum(dtype=torch.float32 if t.itemsize < 4 else None) for t in floating]
        if not sums or bool(torch.stack([torch.isfinite(s).to(sums[0].device) for s in sums]).all()):
            return []
        good = [torch.isfinite(t).reshape(len(t), -1).all(dim=1).cpu() for t in floating]
        return [int(row) for row in (~torch.stack(good).all(dim=0)).nonzero()[:, 0]]

    def size(self) -> StateSize:
        """Bytes held, counted over the tensors."""
        host = sum(t.nbytes for name, t in self.tensors() if ".host_" in f".{name}")
        return StateSize(device=sum(t.nbytes for _, t in self.tensors()) - host, host=host)


def _named_tensors(value: Any, prefix: str) -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(prefix, value)]
    pairs: list[tuple[str, Any]] = []
    if isinstance(value, tuple | list):
        pairs = [(str(i), item) for i, item in enumerate(value)]
    elif dataclasses.is_dataclass(value):
        pairs = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    return [found for name, item in pairs for found in _named_tensors(item, f"{prefix}.{name}" if prefix else name)]


@dataclass(frozen=True, slots=True)
class Nothing(State):
    """The state of a model that remembers nothing."""
