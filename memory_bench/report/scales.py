"""Axes of costs that fill the picture: limits from the data, logarithmic where the spread asks for it, zero apart."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memory_bench.report.tables import scaled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE = 2.0
"""Costs that differ by more than this factor get a logarithmic axis."""
NARROW = 4.0
"""Logarithmic axes over less than this factor have too few round powers of ten: their ticks are evenly apart."""
PAD = 0.06
TICKS = 6


@dataclass(frozen=True, slots=True)
class Scale:
    """Where costs stand on an axis.

    Attributes:
        low, high: ends of the axis.
        logarithmic: whether it is.
        zero: where costs of 0 stand on a logarithmic axis, left of a break; None: where they belong, or there are none.
    """

    low: float
    high: float
    logarithmic: bool
    zero: float | None = None

    @classmethod
    def of(cls, costs: Sequence[float]) -> "Scale":
        """The scale of some costs, none below 0."""
        positive = sorted(cost for cost in costs if cost > 0)
        if not positive:
            return cls(-1.0, 1.0, logarithmic=False)
        first, last = positive[0], positive[-1]
        zero = len(positive) < len(costs)
        if last <= WIDE * first and not zero:
            pad = PAD * (last - first) or 0.05 * last
            return cls(first - pad, last + pad, logarithmic=False)
        if last <= WIDE * first:  # zero and its like: a plain axis shows the distance
            return cls(-PAD * last, (1 + PAD) * last, logarithmic=False)
        span = math.log10(last / first)
        place = first / 10 ** (0.18 * span) if zero else None
        pad = 10 ** (PAD * math.log10(last / (place or first)))
        return cls((place or first) / pad, last * pad, logarithmic=True, zero=place)

    def at(self, cost: float) -> float:
        """The place of a cost on the axis."""
        return self.zero if cost <= 0 and self.zero is not None else cost

    def shares(self, costs: Sequence[float]) -> list[float]:
        """Where costs stand between the ends of the axis, as shares of it."""
        places = [self.low, self.high, *map(self.at, costs)]
        low, high, *at = map(math.log10, places) if self.logarithmic else places
        return [(x - low) / (high - low) for x in at]

    def apply(self, axes: "Axes") -> None:
        """Set up the x axis, with a break before what is zero."""
        if self.logarithmic:
            axes.set_xscale("log")
        axes.set_xlim(self.low, self.high)
        axes.minorticks_off()
        ticks = self._ticks()
        names = [scaled(tick) for tick in ticks]
        if self.zero is not None:
            ticks, names = [self.zero, *ticks], ["0", *names]
        axes.set_xticks(ticks, names)
        axes.minorticks_off()
        if self.zero is not None:
            self._break(axes)

    def _ticks(self) -> list[float]:
        """Round places between the ends, few enough that their names do not touch."""
        least = self.low if self.zero is None else self.zero * 1.6
        if not self.logarithmic or self.high < NARROW * least:
            step = _round_step((self.high - least) / (TICKS + 2 * self.logarithmic))
            first = math.ceil(least / step)
            return [round(n * step, 12) for n in range(first, math.floor(self.high / step) + 1)]
        powers = range(math.floor(math.log10(least)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
            places = [digit * 10.0**power for power in powers for digit in digits]
            places = [place for place in places if least <= place <= self.high]
            if len(places) <= TICKS:
                return places
        skip = -(-len(places) // TICKS)
        return places[::-1][::skip][::-1]

    def _break(self, axes: "Axes") -> None:
        """Two strokes through the axis: between 0 and the rest nothing is to scale."""
        assert self.zero is not None
        at = (math.log10(self.zero * 1.35) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        for shift in (0.0, 0.012):
            axes.plot([at + shift - 0.006, at + shift + 0.006], [-0.02, 0.02], transform=axes.transAxes, color="black",
                      linewidth=1, clip_on=False, zorder=5)  # fmt: skip


def _round_step(rough: float) -> float:
    """1, 2 or 5 times a power of ten, not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough * (1 - 1e-9))
