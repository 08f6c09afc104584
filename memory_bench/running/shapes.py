"""Tensors without storage: how much a model would hold, found by running it on shapes alone.

Inside `Shapes` floating-point tensors have a shape and no numbers (torch's ``meta`` device); whole numbers and masks,
by which models decide where to go, are real. Every storage that comes to be is counted until it is let go, so that the
most that a training step holds is known for a device that is not there. What depends on a number that is not there is
refused (`NoNumber`), never guessed. Answers are computed, not measured: an allocator rounds up, kernels need room.
"""

import weakref
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

META = torch.device("meta")
ATEN = torch.ops.aten


class NoNumber(Exception):
    """What is computed next depends on a number that a tensor without storage does not have."""


class Shapes(TorchDispatchMode):
    """Runs what is inside on shapes, and counts the bytes of tensors that exist at once.

    Attributes:
        live: bytes of all tensors that were made inside and still exist.
        peak: the most that `live` was.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.peak = 0, 0
        self._known: dict[int, int] = {}

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        made = self._run(func, args, dict(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return made

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not given and not any("Tensor" in str(r.type) for r in func._schema.returns):
            return func(*args, **kwargs)
        if any(t.device == META for t in given):
            return self._on_shapes(func, args, kwargs)
        kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
        args = tree_map(lambda x: torch.device("cpu") if isinstance(x, torch.device) else x, args)
        if given and not any(t.is_floating_point() for t in given):
            made = self._made(func, args, kwargs)
            return func(*args, **kwargs) if made is None else made
        if not given and _makes_numbers(func, args, kwargs):
            return func(*args, **kwargs)
        if given:  # floats that came with values, such as a scale: their results are shapes unless they are scalars
            small = all(t.numel() <= 1 for t in given)
            return func(*args, **kwargs) if small else self._on_shapes(func, args, kwargs)
        return self._on_shapes(func, args, kwargs)

    @staticmethod
    def _made(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Floats made from whole numbers (a mask as weights): a shape; None for what stays a whole number."""
        wanted = kwargs.get("dtype")
        if wanted is None or not wanted.is_floating_point:
            return None
        return func(*tree_map(_shape_of, args), **{**tree_map(_shape_of, kwargs), "device": META})

    def _on_shapes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is ATEN._local_scalar_dense.default:
            return _scalar(args[0])
        if func in (ATEN.nonzero.default, ATEN.masked_select.default, ATEN._unique2.default):
            raise NoNumber(f"{func} of a tensor without storage")
        if func in (ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default, ATEN._index_put_impl_.default):
            args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
        args, kwargs = tree_map(_shape_of, args), tree_map(_shape_of, kwargs)
        args = tree_map(lambda x: None if isinstance(x, torch.Generator) else x, args)
        args = tree_map(lambda x: META if isinstance(x, torch.device) else x, args)
        kwargs = {k: None if isinstance(v, torch.Generator) else v for k, v in kwargs.items() if k != "pin_memory"}
        if "device" in kwargs or not any(isinstance(x, Tensor) for x in tree_leaves(args)):
            kwargs["device"] = META
        return func(*args, **kwargs)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        size = storage.nbytes()
        if self._known.get(key) == size:
            return
        if key not in self._known:
            weakref.finalize(storage, self._gone, key)
        self.live += size - self._known.get(key, 0)
        self._known[key] = size
        self.peak = max(self.peak, self.live)

    def _gone(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)


def _shape_of(value: Any) -> Any:
    return value.to(META) if isinstance(value, Tensor) and value.device != META else value


def _places(index: Tensor | None) -> list[Tensor | None]:
    """Where an index points; one that is a mask becomes a list of places for each of its axes."""
    if index is None or index.dtype != torch.bool:
        return [index]
    if index.device == META:
        raise NoNumber("a mask without storage chooses")
    return list(index.nonzero().unbind(1))


def _scalar(tensor: Tensor) -> bool | int | float:
    """A number out of a tensor without storage: that something is sound, or how large a loss is. Any will do."""
    if tensor.device != META:
        return tensor.item()
    return True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 0


def _makes_numbers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """A tensor made from nothing holds whole numbers or masks."""
    wanted = kwargs.get("dtype")
    if wanted is not None:
        return not wanted.is_floating_point
    name = func.overloadpacket.__name__
    if name == "arange":
        return all(isinstance(a, int) for a in args)
    return name in ("randperm", "randint") or (name == "full" and isinstance(args[1], int | bool))
