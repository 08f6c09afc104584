"""Where a cell is, told to whoever watches it from outside; it survives the process that told it.

A worker writes one line into a small file that both have mapped, at every step; the watcher reads it ten times a second
and once more when it has killed the process. Loads no torch: the watcher does not need it.
"""

import json
import mmap
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from memory_bench.driver.clock import Reading

SIZE = 4096
SEEN = SIZE - 1  # where the watcher acknowledges


@dataclass(frozen=True, slots=True)
class Place:
    """Where a cell is.

    Attributes:
        phase: ``start`` (before anything is charged), ``train``, ``eval``, ``control`` or ``end``.
        where: the place in the work, for a person: ``segment 37/391 of hamlet``.
        began: reading of the cell's clock (`memory_bench.driver.clock.Clock`) from which this phase's seconds count:
            a watcher's ``clock.since(place.began)`` is what the phase has spent, earlier ones of its name included.
        held: bytes that the process held before the model was built, and that it is not charged with.
    """

    phase: str = "start"
    where: str = ""
    began: Reading = field(default_factory=Reading)
    held: int = 0


class Beacon:
    """One file, mapped by a worker and its watcher.

    Args:
        path: of the file; made where it is missing.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(b"\0" * SIZE)
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), SIZE)

    def tell(self, place: Place) -> None:
        """Replace what is told."""
        text = _encoded(place, place.where)
        if len(text) >= SEEN:
            text = _encoded(place, place.where[:200])
        self._map[: len(text) + 1] = text + b"\0"

    def read(self) -> Place | None:
        """What was told last; None: nothing yet, or it is being written."""
        text = self._map[:SEEN].partition(b"\0")[0]
        try:
            if not text:
                return None
            told = json.loads(text)
            return Place(**{**told, "began": Reading(*told["began"])})
        except (ValueError, TypeError, KeyError):
            return None

    def acknowledge(self) -> None:
        """The watcher has seen from where the cell is charged, and watches."""
        self._map[SEEN] = 1

    def await_watcher(self, patience: float = 2.0) -> None:
        """Wait until the watcher has acknowledged, if it does: what is not watched yet is not begun."""
        ends = time.monotonic() + patience
        while not self._map[SEEN] and time.monotonic() < ends:
            time.sleep(0.005)

    def close(self) -> None:
        """Let the file go."""
        self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _encoded(place: Place, where: str) -> bytes:
    told = {"phase": place.phase, "where": where, "began": place.began, "held": place.held}
    return json.dumps(told).encode()
