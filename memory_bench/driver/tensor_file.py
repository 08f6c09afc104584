"""Tensors to a file and back, a piece at a time: without a second copy of them in memory, nor a mapped one.

The format is safetensors', which others can read. What its own writer would take of memory (every tensor once more)
would be the harness's, and yet count as the model's.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from memory_bench.files.artefacts import Damaged

PIECE = 2**20  # bytes that are copied at once
LARGEST_HEADER = 2**27
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in NAMES.items()}


class Entry(NamedTuple):
    """A tensor in a file: its type, its shape, and the bytes from and to which it stands."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` in their order.

    Raises:
        TypeError: a type that the format (as written here) does not have.
        OSError: as of any file.
    """
    header: dict[str, Any] = {}
    place = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise TypeError(f"{name} is {tensor.dtype}, which cannot be kept")
        offsets = [place, place := place + tensor.numel() * tensor.element_size()]
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for piece in _pieces(tensor.detach().reshape(-1)):
                file.write(piece.cpu().numpy().data)


def entries(path: Path) -> dict[str, Entry]:
    """What the file at `path` holds, by name.

    Raises:
        Damaged: it is no such file.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= LARGEST_HEADER else b""
        size = file.seek(0, 2) - length - 8
    try:
        found: dict[str, Entry] = {}
        place = 0
        for name, entry in json.loads(text).items():
            dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            if begin != place or end - begin != torch.Size(shape).numel() * dtype.itemsize or min(shape, default=0) < 0:
                raise ValueError
            found[name], place = Entry(dtype, shape, begin + 8 + length, end + 8 + length), end
        if place != size:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path.name} holds no tensors") from error
    return found


def read_tensors(path: Path, targets: Mapping[str, Tensor]) -> None:
    """Fill `targets` with the tensors of their names, which have the same types and shapes.

    Raises:
        Damaged: it lacks one, or one is of another type or shape; nothing was filled then.
    """
    there = entries(path)
    for name, target in targets.items():
        if name not in there or there[name][:2] != (target.dtype, tuple(target.shape)):
            raise Damaged(f"{path.name} has no {name} of that type and shape")
    with path.open("rb") as file:
        for name, target in targets.items():
            file.seek(there[name].begin)
            own = target.detach()
            whole = own.is_contiguous()
            _fill(file, own.view(-1) if whole else (flat := own.reshape(-1)))
            if not whole:
                own.copy_(flat.view(own.shape))


def _fill(file: IO[bytes], flat: Tensor) -> None:
    for piece in _pieces(flat):
        here = piece if piece.device.type == "cpu" else torch.empty_like(piece, device="cpu")
        if file.readinto(here.numpy()) != here.numel():  # type: ignore[attr-defined]
            raise Damaged("it is too short")
        if here is not piece:
            piece.copy_(here)


def _pieces(flat: Tensor) -> Iterator[Tensor]:
    """The bytes of a flat tensor, which share its memory."""
    yield from flat.view(torch.uint8).split(PIECE) if flat.numel() else ()
