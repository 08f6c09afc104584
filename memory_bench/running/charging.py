"""What a cell is charged with: from its backbone and model on, until it has been observed.

The system refuses a worker what its budget does not allow; whatever error comes of that is a limit that was passed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from memory_bench.budget import Budget, BudgetExceeded
from memory_bench.driver.beacon import Beacon, Place
from memory_bench.driver.meter import Meter
from memory_bench.driver.others import Others
from memory_bench.running.fence import Bound, DataLimit, FileLimit, next_limit
from memory_bench.running.refusals import refused, too_large
from memory_bench.running.starting import settle


@contextmanager
def metered(
    budget: Budget, device: str, beacon: Beacon | None, held: int = 0
) -> Iterator[tuple[Meter, Bound | None, FileLimit | None]]:
    """Charges what happens inside; in a process of its own, the system refuses what is not allowed.

    What other processes of a training `held` before, nobody is charged with.

    Raises:
        BudgetExceeded: instead of whatever error says that memory was refused.
    """
    settle()
    meter = Meter(budget, torch.device(device), beacon, Others(held))
    bound = next_limit(budget, device, meter.held + held) if beacon is not None else None
    if beacon is not None:
        beacon.await_watcher()
    limit = None if bound is None or not device.startswith("cpu") else DataLimit(bound.left)
    files = None if bound is None or budget.host_bytes is None else FileLimit(budget.host_bytes - meter.held)
    try:
        with refusals(meter, bound):
            yield meter, bound, files
    finally:
        for fence in (limit, files):
            if fence is not None:
                fence.lift()
        if beacon is not None:
            beacon.tell(Place("end", meter.where))


@contextmanager
def refusals(meter: Meter, bound: Bound | None) -> Iterator[None]:
    """An error that says that memory was refused is a limit that was passed."""
    try:
        yield
    except BudgetExceeded:
        raise
    except Exception as error:
        if too_large(error) and meter.budget.host_bytes is not None:
            raise BudgetExceeded("host_bytes", meter.budget.host_bytes, None, meter.where) from error
        if not refused(error):
            raise
        meter.read_memory()
        name, allowed = "device_bytes", meter.budget.device_bytes
        if bound is not None and meter.device.type == "cpu":
            name, allowed = bound.name, bound.limit
        raise BudgetExceeded(name, allowed, None, meter.where) from error
