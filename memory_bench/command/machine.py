"""What this machine has: for `memory-bench doctor`."""

import importlib.util
import os
from pathlib import Path

import psutil

from memory_bench.data.library import Library
from memory_bench.errors import UserError
from memory_bench.record import versions

EXTRAS = ("lm_eval", "mlflow", "ray")


def facts(data: Path | None, cache: Path, *, hub: bool) -> list[tuple[str, str]]:
    """(name, value) lines about devices, memory, data sources and extras."""
    import torch

    memory = psutil.virtual_memory()
    found = [(name, value) for name, value in versions().items()]
    found.append(
        ("processor", f"{os.cpu_count()} cores, {memory.total / 1e9:.0f} GB ({memory.available / 1e9:.0f} GB free)")
    )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found.append((f"cuda:{index}", f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"))
    else:
        found.append(("cuda", "none; the default backbone is tiny"))
    library = Library(data, cache, hub=hub)
    for need in ("books", "pubmedqa", "wikitext103"):
        try:
            source = library.source(need)
            found.append((need, f"{source.label} (from {source.origin})"))
        except UserError as error:
            found.append((need, f"not available: {error}"))
    for name in EXTRAS:
        there = importlib.util.find_spec(name) is not None
        found.append((name.replace("_", "-"), "installed" if there else "not installed (optional)"))
    return found
