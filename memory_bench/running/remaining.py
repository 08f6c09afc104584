"""How long a run still takes: cells by what was planned of them, corrected by what those that ended took."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Clock = Callable[[], float]
NOISE = 6.0  # seconds by which any cell may miss its prediction, which say nothing of the others


@dataclass(slots=True)
class Remaining:
    """Follows the cells of a run.

    A cell weighs its predicted seconds, or its planned FLOPs where none are known; what a unit of weight takes is
    learned from the cells that have ended. Cells that are running count with what they have left.

    Args:
        weights: of every cell, by key; all in the same unit. A cell without one weighs as much as the others' mean.
        workers: cells that run at once; 0: nobody knows, and so how long they take.
        seconds: the weights are seconds: believed until cells have ended that outweigh `NOISE`.
        now: the time in seconds.
    """

    weights: Mapping[str, float]
    workers: int = 1
    seconds: bool = False
    now: Clock = time.monotonic
    _begun: dict[str, float] = field(default_factory=dict)
    _took: dict[str, float] = field(default_factory=dict)
    _usual: float = field(init=False)

    def __post_init__(self) -> None:
        known = [w for w in self.weights.values() if w > 0]
        self._usual = sum(known) / len(known) if known else 1.0

    def begin(self, key: str) -> None:
        """A cell was started."""
        self._begun.setdefault(key, self.now())

    def end(self, key: str) -> None:
        """A cell has ended."""
        self._took[key] = self.now() - self._begun.get(key, self.now())

    def left(self) -> float | None:
        """Seconds until the last cell has ended; None: nothing is known yet."""
        rate = self._rate()
        if rate is None or not self.workers:
            return None
        now = self.now()
        free = [0.0] * self.workers
        running = [key for key in self._begun if key not in self._took]
        for place, key in enumerate(running[: len(free)]):
            free[place] = max(0.0, self._weight(key) * rate - (now - self._begun[key]))
        for key in self.weights:
            if key not in self._begun and key not in self._took:
                first = min(range(len(free)), key=free.__getitem__)
                free[first] += self._weight(key) * rate
        return max(free)

    def _weight(self, key: str) -> float:
        own = self.weights.get(key, 0.0)
        return own if own > 0 else self._usual

    def _rate(self) -> float | None:
        """Seconds of a unit of weight: of the cells that ended, and of those that already run longer than that."""
        spent, weight = sum(self._took.values()), sum(map(self._weight, self._took))
        if self.seconds:
            spent, weight = spent + NOISE, weight + NOISE
        elif not self._took or spent <= 0:
            return None
        now, rate = self.now(), spent / weight
        late = {key: now - begun for key, begun in self._begun.items() if key not in self._took}
        late = {key: passed for key, passed in late.items() if passed > self._weight(key) * rate}
        return (spent + sum(late.values())) / (weight + sum(map(self._weight, late)))
