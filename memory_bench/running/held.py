"""Main memory that a worker and its children hold now, as seen from outside. Loads no torch."""

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from memory_bench.running.fence import PAGE


def resident_bytes(pid: int) -> tuple[int, int]:
    """Bytes that a process has resident, and those of them that belong to files."""
    try:
        _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()
        return int(resident) * PAGE, int(shared) * PAGE
    except (OSError, ValueError):
        return int(psutil.Process(pid).memory_info().rss), 0


def children_bytes(pid: int, resident: int, children: Collection[int]) -> tuple[int, int]:
    """What the children of a worker hold besides what it has `resident`; pages shared by several count once.

    The second number is how much of it they share by maps, which may be files that count already.

    Of each child what is its own alone; or, where that is more, the group's proportional sizes less the worker's
    (memory that children share with each other). One that is about to start a program still runs in its parent's
    memory (``vfork``), which is none of its own: all that the kernel says of both is then the same.
    """
    if not children:
        return 0, 0
    worker = _rollup(pid)
    seen, sizes = {worker.space}, list[_Rollup]()
    for child in children:
        own = _rollup(child)
        if own.space and own.space in seen:
            continue
        seen.add(own.space)
        sizes.append(own)
    proportional = worker.proportional + sum(s.proportional for s in sizes) - resident
    return max(0, sum(s.private for s in sizes), proportional), sum(s.shared for s in sizes)


def own_bytes(pid: int) -> int:
    """Bytes that are a process's own alone; its resident size where nothing says."""
    return _rollup(pid).private


class _Rollup(NamedTuple):
    """Bytes that are a process's own alone, its proportional size, and its part of maps that are shared.

    `space` is the same for two processes in one address space.
    """

    private: int
    proportional: int
    shared: int = 0
    space: tuple[str, ...] = ()


def _rollup(pid: int) -> _Rollup:
    """Of a process; its resident size where nothing says."""
    try:
        span, *lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
        sizes = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)}
        space = (span, *(str(sizes[name]) for name in ("Rss", "Anonymous", "Private_Dirty", "Shared_Dirty")))
        return _Rollup(sizes["Private_Clean"] + sizes["Private_Dirty"], sizes["Pss"], sizes.get("Pss_Shmem", 0), space)
    except (OSError, ValueError, IndexError, KeyError):
        with suppress(psutil.Error):
            size = int(psutil.Process(pid).memory_info().rss)
            return _Rollup(size, size)
        return _Rollup(0, 0)
