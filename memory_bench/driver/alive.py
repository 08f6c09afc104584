"""Bytes of tensors that are alive at once while something is computed, by watching every operation.

An operation then costs about twice its time on small tensors, so this is switched on for single steps only. What an
operation's own kernel takes and gives back is not seen, nor what the allocator keeps in reserve.
"""

import weakref
from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Alive(TorchDispatchMode):
    """While entered, follows the storages that are made; what was there before does not count.

    Attributes:
        now: bytes made inside and still alive, also after leaving.
        peak: the most there were at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._made = self._made_at_peak = 0
        self._alive: dict[int, tuple[int, int, weakref.ref[Any]]] = {}  # storage: bytes, its number, itself

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then look at what it gave."""
        out = func(*args, **(kwargs or {}))
        if not _aliases(func):
            for item in out if isinstance(out, tuple | list) else (out,):
                if isinstance(item, Tensor):
                    self._made_one(item)
        return out

    def _made_one(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        self._made += 1
        self._alive[key] = size, self._made, weakref.ref(storage, lambda _: self._gone(key))
        self.now += size
        if self.now > self.peak:
            self.peak, self._made_at_peak = self.now, self._made

    def _gone(self, key: int) -> None:
        self.now -= self._alive.pop(key)[0]

    def peak_beside(self, kept: Iterable[Tensor]) -> int:
        """The peak without those of the `kept` tensors (alive now) that were made before it."""
        found = {tensor.untyped_storage()._cdata for tensor in kept} & self._alive.keys()
        return self.peak - sum(size for size, number, _ in map(self._alive.__getitem__, found) if self._is_in(number))

    def _is_in(self, number: int) -> bool:
        return number <= self._made_at_peak


@cache
def _aliases(func: Any) -> bool:
    """Whether an operation's results lie in its arguments' storages: views, and what is changed in place."""
    return any(value.alias_info is not None for value in func._schema.returns)
