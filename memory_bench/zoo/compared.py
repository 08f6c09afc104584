"""Every backbone is compared with its own ``forward`` before anything runs on it: once per content, then remembered.

What is compared and how is in `memory_bench.backbone.agreement`. A result is a small JSON file under ``agreement`` in
the cache folder, named by everything that it depends on: the backbone's content, its precision, the device, the code.
"""

import gc
import math
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from memory_bench.backbone import agreement
from memory_bench.backbone.agreement import Found, compare, text_length
from memory_bench.backbone.families import KNOWN
from memory_bench.backbone.model import Backbone
from memory_bench.backbone.small import CLOSED, TINY, small_model
from memory_bench.cell import digest
from memory_bench.errors import DataError, UserError
from memory_bench.files.artefacts import Damaged, Notice, held, read_json, remove, write_json
from memory_bench.weights.quiet import quietly
from memory_bench.zoo.named import Backbones

NOTED = 1e11  # operations of a pass that takes so long that it is said
SOURCES = ("agreement", "model", "families", "layers")  # files of the room `backbone` that a result depends on


def check_agreement(backbones: Backbones, name: str, dtype: str = "float32", asked: int = 0) -> None:
    """Compare a resolved backbone with its own ``forward``, unless that has been done.

    Args:
        backbones: that can load it.
        name: of the backbone.
        dtype: that it will run in.
        asked: longest input of a step, in tokens.

    Raises:
        DataError: it cannot be loaded, or deviates.
    """
    if name in CLOSED or backbones.holds_release(name):
        return  # our own modules alone; weights that go into another backbone
    card, device = backbones.card(name), "cuda" if torch.cuda.is_available() else "cpu"
    made = [version("torch"), version("transformers"), _sources()]
    file = backbones.cache / "agreement" / f"{digest([card.revision, dtype, device, *made])}.json"
    with held(file.with_suffix(".lock")):
        known = _read(file, backbones.notice)
        if known is None or (known["asked"] < asked and not known["fault"]):
            with quietly():
                found = _compared(backbones, name, dtype, device, asked)
            known = {"schema": 1, "name": name, "dtype": dtype, "device": device, "asked": asked, **asdict(found)}
            known["deviation"] = found.deviation if math.isfinite(found.deviation) else None
            with suppress(UserError, OSError):  # a cache may be read-only: then it is not remembered
                if file.is_dir():
                    remove(file)
                write_json(file, known)
    if known["fault"]:
        raise DataError(
            f"{name} ('{known['kind']}') is not a supported backbone in {dtype}: {known['fault']}; {KNOWN}."
        )


def _compared(backbones: Backbones, name: str, dtype: str, device: str, asked: int) -> Found:
    """In float32 wherever that fits; in another precision as well, held against it."""
    exact = dtype == "float32" or 3 * 4 * backbones.card(name).parameters < _memory(device)
    model = _model(backbones, name, torch.float32 if exact else getattr(torch, dtype), device)
    backbone = Backbone(model)
    tokens = text_length(backbone, asked, _memory(device) // 2)
    if backbone.flops(tokens, tokens) > NOTED:
        backbones.report(f"Comparing {name} with its own forward pass on {tokens:,} tokens (once, then remembered).")
    while True:
        try:
            found = compare(model, tokens)
            if exact and dtype != "float32" and not found.fault:
                found = compare(model, tokens, _model(backbones, name, getattr(torch, dtype), device))
            return found
        except (MemoryError, torch.OutOfMemoryError):
            if tokens <= agreement.LEAST:
                raise DataError(f"There is not enough memory to compare {name} with its own forward pass.") from None
            tokens //= 2
            gc.collect()


def _model(backbones: Backbones, name: str, dtype: torch.dtype, device: str) -> nn.Module:
    """The Hugging Face model. `tiny` is trained later: its arithmetic is that of any weights."""
    if name == "tiny":
        return small_model(TINY, torch.Generator().manual_seed(0)).model.to(device, dtype)
    return backbones.load(name, device=device, dtype=dtype).backbone.model


def _memory(device: str) -> int:
    """Free bytes."""
    return int(torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available)


@cache
def _sources() -> str:
    folder = Path(agreement.__file__).parent
    return digest([(folder / f"{name}.py").read_text(encoding="utf-8") for name in SOURCES])


def _read(file: Path, notice: Notice) -> dict[str, Any] | None:
    """A result; None where there is none, or (with a notice) none that can be read."""
    try:
        found = read_json(file)
        if not {"name", "kind", "fault", "asked", "tokens"} <= set(found):
            raise Damaged("it lacks what was found")
        return found
    except FileNotFoundError:
        return None
    except Damaged as error:
        notice(f"{file.parent.name}/{file.name} in the cache is not used and is made again: {error}.")
        return None
