"""What the environment says: where the data and the cache are, and whether the hub may be asked."""

import os
from pathlib import Path


def data_folder(given: Path | None = None) -> Path | None:
    """The data folder: what is given, else ``MEMORY_BENCH_DATA``."""
    if given is not None:
        return given
    named = os.environ.get("MEMORY_BENCH_DATA")
    return Path(named) if named else None


def cache_folder() -> Path:
    """``MEMORY_BENCH_CACHE``, else the user's cache folder."""
    from platformdirs import user_cache_path

    named = os.environ.get("MEMORY_BENCH_CACHE")
    return Path(named) if named else user_cache_path("memory-bench")


def hub_allowed() -> bool:
    """Whether the hub may be asked: ``HF_HUB_OFFLINE`` does not say no."""
    return os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("", "0", "false", "no")
