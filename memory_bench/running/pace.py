"""Seconds of a call of a model, fitted to calls that were timed: so many for a call, and so many for its FLOPs.

FLOPs of the segment itself and those that grow with the text before it have a price each, since a long cache is read
at another rate than matrices are multiplied. Kinds of calls, and controls, are fitted apart.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from memory_bench.driver.hollow import Call
from memory_bench.protocol import MemoryModel

GIGA = 1e9
ANY = "any"  # all kinds together, for one that was not timed


@dataclass(frozen=True, slots=True)
class Stretch:
    """What the largest batch held and took when it was cut to `tokens` tokens.

    Attributes:
        tokens: read by the longest row.
        peak: bytes above the start.
        state: bytes that a row remembered at most.
        seconds: of the device, controls included.
    """

    tokens: int
    peak: int
    state: int
    seconds: float

    def to_json(self) -> dict[str, float]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Sample:
    """A call that was timed: its kind, GFLOPs of the segment itself and of what came before, and seconds."""

    kind: str
    own: float
    grown: float
    seconds: float

    @classmethod
    def of(cls, noted: Any, model: MemoryModel[Any], seconds: float = 0.0) -> "Sample":
        """The sample of a call (`memory_bench.running.counting.Noted`) of `model`."""
        return cls(kind_of(noted), *gigaflops(noted.call, model), seconds)


def kind_of(noted: Any) -> str:
    """Calls of one kind have one price."""
    return f"{noted.call.kind}{'*' if noted.control else ''}"


def gigaflops(call: Call, model: MemoryModel[Any]) -> tuple[float, float]:
    """(of the segment itself, more for what came before it), for all rows."""
    formula = model.absorb_flops if call.kind == "absorb" else model.flops
    own = formula(call.tokens, 0)
    return call.rows * own / GIGA, call.rows * max(0, formula(call.tokens, call.before) - own) / GIGA


def fit_paces(samples: Sequence[Sample]) -> dict[str, list[float]]:
    """Per kind the seconds of (a call, a GFLOP of its own, a GFLOP of what came before)."""
    kinds = {s.kind for s in samples}
    paces = {kind: _fit([s for s in samples if s.kind == kind]) for kind in sorted(kinds)}
    return paces | ({ANY: _fit(samples)} if samples else {})


def _fit(samples: Sequence[Sample]) -> list[float]:
    """Least squares without negative prices: of all subsets of the three the best whose prices are none."""
    x = np.array([[1.0, s.own, s.grown] for s in samples])
    y = np.array([s.seconds for s in samples])
    best, prices = np.inf, [float(y.mean()), 0.0, 0.0]
    for size in (1, 2, 3):
        for chosen in combinations(range(3), size):
            part = x[:, chosen]
            found = np.linalg.lstsq(part, y, rcond=None)[0]
            left = float(((y - part @ found) ** 2).sum())
            if (found >= 0).all() and np.linalg.matrix_rank(part) == size and left < best * (1 - 1e-6):
                best, prices = left, [0.0, 0.0, 0.0]
                for place, price in zip(chosen, found, strict=True):
                    prices[place] = float(price)
    return prices


def seconds_of(calls: Iterable[Any], model: MemoryModel[Any], paces: dict[str, list[float]]) -> tuple[float, float]:
    """Seconds that `calls` would take: (those of the model, those of controls)."""
    total = [0.0, 0.0]
    for noted in calls:
        own, grown = gigaflops(noted.call, model)
        kind = kind_of(noted)
        a, b, c = paces.get(kind) or paces.get(kind.rstrip("*")) or paces[ANY]
        total[noted.control] += a + b * own + c * grown
    return total[0], total[1]
