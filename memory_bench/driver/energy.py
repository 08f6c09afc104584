"""Joules that the machine says were used: NVML's counter of a GPU, RAPL's of the processors where the device is a CPU.

RAPL counts everything that the processors and their memory do, for whomever; NVML everything on that GPU. Where nothing
is offered (no counter, or none that may be read) there is no number.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

POWERCAP = Path("/sys/class/powercap")
MICRO, MILLI = 1e-6, 1e-3
OFTEN = 30.0  # seconds between two readings: a counter must not wrap around twice between them
Counter = tuple[Callable[[], float], float | None]
"""Reads joules; and the joules at which it begins again from 0 (None: never)."""


class Energy:
    """The joules of one device, counted from when this was made.

    Args:
        gpu: the GPU's identifier as torch has it; None: the processors.
        root: folder of the kernel's powercap zones.
    """

    def __init__(self, gpu: str | None = None, root: Path = POWERCAP) -> None:
        self._counters = _processors(root) if gpu is None else _graphics(gpu)
        self._last = [read() for read, _ in self._counters]
        self._joules, self._looked = 0.0, monotonic()

    def now(self) -> float | None:
        """Joules since the start; None where nothing is offered, or a counter cannot be read any more."""
        try:
            values = [read() for read, _ in self._counters]
            for value, before, (_, wraps) in zip(values, self._last, self._counters, strict=True):
                self._joules += _passed(before, value, wraps)
        except (OSError, ValueError):
            self._counters = []
        if not self._counters:
            return None
        self._last, self._looked = values, monotonic()
        return self._joules

    def tick(self) -> None:
        """To be called often; reads the counters where that is due."""
        if self._counters and monotonic() - self._looked > OFTEN:
            self.now()


def _passed(before: float, now: float, wraps: float | None) -> float:
    """Joules between two readings of a counter."""
    if now >= before:
        return now - before
    if wraps is None:
        raise ValueError("a counter that never begins again has gone back")
    return now - before + wraps


def _processors(root: Path) -> list[Counter]:
    """RAPL's zones: whole processors and their memory, not the parts of a processor, which are in it.

    All or none: without one of them the sum would be too small.
    """
    found: list[Counter] = []
    for zone in sorted(root.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text(encoding="ascii").strip()
            if not (name.startswith("package") or name == "dram"):  # "psys" has the packages in it
                continue
            wraps = int((zone / "max_energy_range_uj").read_text(encoding="ascii")) * MICRO
            read = _reader(zone / "energy_uj")
            read()
        except (OSError, ValueError):  # newer kernels let only root read
            return []
        found.append((read, wraps))
    return found


def _reader(path: Path) -> Callable[[], float]:
    return lambda: int(path.read_text(encoding="ascii")) * MICRO


def _graphics(gpu: str) -> list[Counter]:
    """NVML's counter of a GPU, where its Python package is installed and the GPU has one."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return []

    def read() -> float:
        try:
            return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) * MILLI
        except nvml.NVMLError as error:
            raise OSError(str(error)) from error

    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(gpu if gpu.startswith(("GPU-", "MIG-")) else f"GPU-{gpu}")
        read()
    except (nvml.NVMLError, OSError):
        return []
    return [(read, None)]
