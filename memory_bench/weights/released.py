"""Released checkpoints as files: found in a folder or on the hub, listed, hashed, read one file at a time.

Safetensors are preferred; of a pickle, tensors alone are accepted. What the tensors mean is `transfer`'s business.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memory_bench.errors import DataError
from memory_bench.files.content import Hashes

Shape = tuple[int, ...]
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "I64": "int64", "U8": "uint8"}
NESTED = ("model_state_dict", "state_dict")  # where trainers' files keep the weights beside an optimiser


@dataclass(frozen=True)
class Release:
    """A released checkpoint as files; nothing but headers is read before `tensors`.

    Attributes:
        name: as the user gave it.
        files: with weights, in order.
        about: its ``config.json``, empty without one.
        listed: names that an index promises.
        reader: of the hashes of files.
    """

    name: str
    files: tuple[Path, ...]
    about: Mapping[str, Any]
    listed: tuple[str, ...] = ()
    reader: Hashes = field(default_factory=Hashes, compare=False)

    @cached_property
    def _headers(self) -> dict[str, tuple[Shape, str]]:
        found: dict[str, tuple[Shape, str]] = {}
        for file in self.files:
            for name, header in headers(file).items():
                if name in found:
                    raise DataError(f"The checkpoint {self.name} has {name} in two files.")
                found[name] = header
        if absent := [name for name in self.listed if name not in found]:
            raise DataError(f"The checkpoint {self.name} is incomplete: its index lists {few(absent)}.")
        return found

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of every tensor, by name."""
        return {name: shape for name, (shape, _) in self._headers.items()}

    def dtype(self, name: str) -> str:
        """In which a tensor is stored, for example ``bfloat16``; empty for one that is not there."""
        return self._headers[name][1] if name in self._headers else ""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name, one at a time, on the host."""
        for file in self.files:
            yield from _tensors(file)

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of every file that counts, by name."""
        config = self.files[0].parent / "config.json"
        files = [*self.files, *([config] if self.about else [])]
        return {file.name: self.reader.of(file) for file in files}

    @property
    def revision(self) -> str:
        """16 hexadecimal digits of the content of its files, whatever folder they are in."""
        return hashlib.sha256(json.dumps(self.hashes, sort_keys=True).encode()).hexdigest()[:16]


def find_release(name: str, *, hub: bool, hashes: Hashes | None = None) -> Release:
    """The checkpoint called `name`: a folder, a file of weights, or a hub id.

    Args:
        name: of it.
        hub: whether the hub may be asked.
        hashes: reads, and may remember, those of its files.

    Raises:
        DataError: it cannot be had, or holds no weights.
    """
    path = Path(name)
    if not path.exists():
        found = hub_folder(name, None, ("*.json", "*.safetensors"), hub=hub, needs=("*.safetensors",))
        found = found or hub_folder(name, None, ("*.json", "*.bin"), hub=hub, needs=("*.bin",))
        if found is None:
            raise DataError(
                f"Unknown checkpoint '{name}': it is no folder or file, and no hub model of that name with weights "
                "can be reached."
            )
        path = found
    folder = path if path.is_dir() else path.parent
    files, listed = _weight_files(name, path) if path.is_dir() else ((path,), ())
    about = _json(folder / "config.json") if path.is_dir() else {}
    return Release(name, files, about, listed, hashes or Hashes())


def hub_folder(
    repo: str, revision: str | None, patterns: Sequence[str], *, hub: bool, needs: Sequence[str] = ()
) -> Path | None:
    """The snapshot of a hub model, downloaded if the hub can be reached; None if it cannot be had.

    Args:
        repo: its id.
        revision: of it, or the newest.
        patterns: of the files that are wanted.
        hub: whether the hub may be asked.
        needs: patterns of which the snapshot must have a file.
    """
    if repo.count("/") != 1 or repo.startswith((".", "/")):
        return None
    from huggingface_hub import snapshot_download

    for local in (True, False):
        if not local and not hub:
            return None
        try:
            found = Path(snapshot_download(repo, revision=revision, local_files_only=local, etag_timeout=5,
                                           allow_patterns=list(patterns)))  # fmt: skip
        except Exception:  # the client raises a dozen kinds; any of them means: not to be had here
            continue
        if local and hub and needs and lost_shards(found):
            continue  # a download that was interrupted
        if all(any(found.glob(pattern)) for pattern in needs):
            return found
    return None


def lost_shards(folder: Path) -> list[str]:
    """Files of weights that an index in `folder` lists and that are not there."""
    for index, whole in (
        ("model.safetensors.index.json", "model.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin"),
    ):
        if (folder / whole).is_file():
            return []
        if listed := _json(folder / index).get("weight_map", {}):
            return [file for file in sorted(set(listed.values())) if not (folder / file).is_file()]
    return []


def _weight_files(name: str, folder: Path) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The files of a folder that hold the weights, safetensors first, and the names that an index lists."""
    for index, patterns in (
        ("model.safetensors.index.json", ("model.safetensors", "*.safetensors")),
        ("pytorch_model.bin.index.json", ("pytorch_model.bin", "*.bin", "*.pth", "*.pt")),
    ):
        if listed := _json(folder / index).get("weight_map", {}):
            files = tuple(folder / file for file in sorted(set(listed.values())))
            if absent := [file.name for file in files if not file.is_file()]:
                raise DataError(f"The checkpoint {name} is incomplete: it lacks {few(absent)}.")
            return files, tuple(listed)
        for pattern in patterns:
            found = tuple(sorted(folder.glob(pattern)))
            if len(found) == 1:
                return found, ()
            if len(found) > 1:
                raise DataError(f"The folder {name} has several files of weights and no index: name one of them.")
    raise DataError(f"The folder {name} holds no checkpoint: no .safetensors, .bin, .pt or .pth file.")


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read {path.name} of the checkpoint ({error}).") from error
    return read if isinstance(read, dict) else {}


def headers(file: Path) -> dict[str, tuple[Shape, str]]:
    """Shape and type of every tensor in a file of weights, by name; no values are read.

    Raises:
        DataError: it cannot be read.
    """
    if file.suffix != ".safetensors":
        found = _unpickled(file, "meta").items()
        return {n: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in found}
    from safetensors import safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
            return {n: (tuple(s.get_shape()), DTYPES.get(s.get_dtype(), s.get_dtype())) for n, s in slices.items()}
    except Exception as error:
        raise DataError(f"Cannot read the checkpoint's {file.name} ({error}).") from error


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    if file.suffix != ".safetensors":
        yield from _unpickled(file).items()
        return
    from safetensors import safe_open

    with safe_open(file, framework="pt") as handle:
        for name in handle.keys():  # noqa: SIM118 (not a dict)
            yield name, handle.get_tensor(name)


def _unpickled(file: Path, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a ``torch.save`` file; no object in it is ever built but tensors and plain containers."""
    try:
        read = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"Cannot read tensors alone from the checkpoint's {file.name}: {reason}") from error
    inner = next((read[key] for key in NESTED if isinstance(read, Mapping) and key in read), read)
    if not isinstance(inner, Mapping) or not all(isinstance(t, Tensor) for t in inner.values()):
        raise DataError(f"{file.name} holds no state dict of tensors.")
    return {name: tensor for name, tensor in inner.items() if isinstance(name, str)}


def few(names: Sequence[str]) -> str:
    """The first names of a list, for a sentence."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
