"""How often a training on its way is kept: after so many optimiser steps, or so many seconds. Loads no torch."""

import re
from dataclasses import dataclass

from memory_bench.errors import UserError

UNITS = {"s": 1, "m": 60, "h": 3600}
WRITTEN = re.compile(r"(?P<steps>\d{1,9})|(?P<time>\d{1,6}(\.\d{1,3})?)(?P<unit>[smh])")


@dataclass(frozen=True, slots=True)
class Every:
    """A number of optimiser steps, or seconds; the other is 0.

    Steps fall at the same places on every machine, so what a kill costs can be repeated; seconds bound that cost, and
    trainings that are shorter are never kept.
    """

    steps: int = 0
    seconds: float = 0.0

    def due(self, steps: int, seconds: float) -> bool:
        """Whether to keep a training that has made so many `steps`, so many `seconds` after it was last kept."""
        return steps % self.steps == 0 if self.steps else seconds >= self.seconds


def parse_every(text: str) -> Every | None:
    """`500` (optimiser steps), `90s`, `10m` or `2h`; None for an empty text.

    Raises:
        UserError: it is none of these, or nothing.
    """
    if not text:
        return None
    found = WRITTEN.fullmatch(text.strip())
    every = None
    if found is not None:
        steps, time, unit = found["steps"], found["time"], found["unit"]
        every = Every(steps=int(steps)) if steps else Every(seconds=float(time) * UNITS[unit])
    if every is None or not (every.steps or every.seconds):
        raise UserError(
            f"--checkpoint-every {text[:40]!r}: give a number of optimiser steps, like 500, or a time, like 90s or 10m."
        )
    return every
