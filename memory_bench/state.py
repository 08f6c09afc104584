"""States as values: what a memory model remembers, as immutable dataclasses of tensors."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class StateSize:
    """Bytes a state occupies on the accelerator (or, without one, in main memory), on the host beside it, on disk."""

    device: int = 0
    host: int = 0
    disk: int = 0

    @property
    def total(self) -> int:
        """Wherever they are."""
        return self.device + self.host + self.disk


Place = Literal["device", "host", "disk"]


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
    with ``host_`` stay in main memory; what is mapped from a file is on disk, as is a file that a field names by a
    `Path`. A state is never changed in place, so sharing is safe. Its numbers are finite:
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

    def holdings(self) -> dict[object, tuple[Place, int]]:
        """What the state keeps alive: place and bytes of every storage, by what tells storages apart.

        A storage counts once, however many tensors lie in it, and whole, also where they show a part of it: the part
        keeps all of it. Rows that share one (an expanded tensor) count as if each had its own. The keys are good as
        long as the state lives.
        """
        found: dict[object, tuple[Place, int]] = {}
        leaves: list[tuple[Tensor | Path, bool]] = []
        _gather(self, False, leaves)
        accelerated = any(isinstance(leaf, Tensor) and not leaf.is_cpu for leaf, _ in leaves)
        for leaf, on_host in leaves:
            if isinstance(leaf, Path):
                found[leaf] = ("disk", _file_bytes(leaf))
                continue
            storage = leaf.untyped_storage()
            key, size = storage._cdata, max(storage.nbytes(), leaf.nbytes)
            if key in found and found[key][1] >= size:
                continue
            if not storage.resizable() and _from_file(storage):  # what torch allocates itself can be resized
                found[key] = ("disk", size)
            else:
                found[key] = ("host" if on_host or (accelerated and leaf.is_cpu) else "device", size)
        return found

    def size(self) -> StateSize:
        """Bytes held, see `holdings`."""
        return size_of(self.holdings())


def size_of(holdings: dict[object, tuple[Place, int]]) -> StateSize:
    """The sums of `State.holdings`."""
    sums: dict[Place, int] = {"device": 0, "host": 0, "disk": 0}
    for place, size in holdings.values():
        sums[place] += size
    return StateSize(**sums)


@cache
def _fields(kind: Any) -> tuple[tuple[str, bool], ...]:
    """A dataclass's fields, and whether their names say that they stay on the host."""
    named = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    return tuple((f.name, f.name.startswith("host_")) for f in named)


def _gather(value: Any, on_host: bool, leaves: list[tuple[Tensor | Path, bool]]) -> None:
    """Add tensors and paths of a state, and whether their names say that they are on the host."""
    if isinstance(value, Tensor | Path):
        leaves.append((value, on_host))
    elif isinstance(value, tuple | list):
        for item in value:
            _gather(item, on_host, leaves)
    else:
        for name, stays in _fields(value.__class__):
            _gather(getattr(value, name), on_host or stays, leaves)


def _from_file(storage: torch.UntypedStorage) -> bool:
    """Whether a storage shows a file (``torch.from_file``, a numpy memmap, a mapped checkpoint)."""
    if storage.device.type != "cpu":
        return False
    if storage.filename is not None:
        return True
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    for line in maps:
        parts = line.split(maxsplit=5)
        low, high = (int(end, 16) for end in parts[0].split("-"))
        if low <= storage.data_ptr() < high:  # shared memory has a name below /dev or in brackets, and no disk
            return len(parts) == 6 and parts[5].startswith("/") and not parts[5].startswith(("/dev/", "/memfd:"))
    return False


def _file_bytes(path: Path) -> int:
    """Of a file, or of all files in a folder; 0 where there is none."""
    files = [path] if path.is_file() else path.rglob("*") if path.is_dir() else ()
    return sum(file.stat().st_size for file in files if file.is_file())


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
