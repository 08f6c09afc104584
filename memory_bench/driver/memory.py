"""How much memory a process and its accelerator hold, and held at most. Read at every step, so quickly; no torch."""

import os
import resource
import sys
from contextlib import suppress
from typing import NamedTuple

import psutil

FIELDS = (b"VmRSS:", b"VmHWM:")


class Resident(NamedTuple):
    """Main memory of this process in bytes: now, and at most since it began or since `forget_peak`."""

    now: int
    peak: int


def resident() -> Resident:
    """What this process holds and has held.

    Linux hands a parent's ``ru_maxrss`` down to the programs it starts, so there the kernel's figures of this program's
    own address space are read.
    """
    try:
        file = os.open("/proc/self/status", os.O_RDONLY)
        try:
            text = os.read(file, 8192)
        finally:
            os.close(file)
        now, peak = (int(text[text.index(name) + len(name) :].split(None, 1)[0]) * 1024 for name in FIELDS)
        return Resident(now, peak)
    except (OSError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return Resident(psutil.Process().memory_info().rss, peak)


def peak_bytes() -> int:
    """The most main memory this process has held."""
    return resident().peak


def forget_peak() -> None:
    """Count the peak from now on, where the system can; else peaks of what came before stay in it."""
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
