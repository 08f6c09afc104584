"""How a state grows with the tokens read: not, by so many bytes a token, or by so many each time the tokens double."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

FEWEST, RANGE = 4, 4.0  # points, and how many times as many tokens the last has as the first, for anything to be said
Kind = Literal["constant", "logarithmic", "linear"]
KINDS: tuple[Kind, ...] = ("constant", "logarithmic", "linear")


@dataclass(frozen=True, slots=True)
class Growth:
    """The form that fits the sizes of a state.

    Attributes:
        kind: see `fit_growth`.
        bytes_per_token: where it is linear.
        bytes_per_doubling: where it is logarithmic: bytes whenever the tokens double.
        points: (tokens, bytes of a row's state) that it was fitted to.
    """

    kind: Kind
    bytes_per_token: float | None
    bytes_per_doubling: float | None
    points: tuple[tuple[int, int], ...]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Growth":
        """Of a record's ``state_growth``."""
        return cls(**{**data, "points": tuple((int(tokens), int(size)) for tokens, size in data["points"])})

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @property
    def rank(self) -> tuple[int, float]:
        """Greater for what grows faster."""
        return KINDS.index(self.kind), self.bytes_per_token or self.bytes_per_doubling or 0.0


def fit_growth(points: Sequence[tuple[int, int]]) -> Growth | None:
    """Which of three forms the sizes of a state have: constant, a + b·log2(tokens) or a + b·tokens.

    Constant is a state that has stopped growing (a ring that is full) or only goes up and down: its largest size in the
    second half of the tokens is above that in the first half by no more than it shrank in between. Of the other two
    forms, fitted by least squares, the one with the smaller error counts; a state that shrinks is constant.

    Args:
        points: (tokens read, bytes) in any order.

    Returns:
        None where the points are too few, or too close, to tell.
    """
    found = sorted(points)
    if len(found) < FEWEST or found[-1][0] < RANGE * max(1, found[0][0]):
        return None
    tokens, sizes = (np.array(column, dtype=float) for column in zip(*found, strict=True))
    late = tokens > tokens[-1] / 2
    shrank = float(np.maximum(0.0, -np.diff(sizes[late])).sum())
    kept = tuple(found)
    if sizes[late].max() - sizes[~late].max() <= shrank:
        return Growth("constant", None, None, kept)
    fits = {kind: _line(x, sizes) for kind, x in (("linear", tokens), ("logarithmic", np.log2(np.maximum(1, tokens))))}
    slope, error = fits["linear"]
    doubling, other = fits["logarithmic"]
    linear = error <= other
    if (slope if linear else doubling) <= 0 or not math.isfinite(error + other):
        return Growth("constant", None, None, kept)
    return Growth("linear", slope, None, kept) if linear else Growth("logarithmic", None, doubling, kept)


def _line(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Slope and sum of squared errors of the least-squares line."""
    centred = x - x.mean()
    slope = float(centred @ (y - y.mean()) / (centred @ centred))
    left = y - y.mean() - slope * centred
    return slope, float(left @ left)
