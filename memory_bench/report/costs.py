"""What a row of a board spent and held, and whether its training taught the memory anything."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from memory_bench.budget import Usage, amount
from memory_bench.report.rows import Row
from memory_bench.statistics.growth import Growth


@dataclass(frozen=True, slots=True)
class Cost:
    """What a row spent: means over its seeds, peaks as maxima; None where nothing was measured."""

    added_parameters: int | None
    added_fraction: float | None
    train_tokens: int | None
    train_flops: float | None
    train_seconds: float | None
    eval_tokens: int | None
    eval_flops_per_token: float | None
    eval_tokens_per_second: float | None
    peak_device_bytes: int | None
    peak_host_bytes: int | None
    state_bytes: int | None
    scored_tokens: int | None
    weight_bytes: int | None = None
    optimizer_bytes: int | None = None
    activation_bytes: int | None = None
    gradient_bytes: int | None = None
    state_device_bytes: int | None = None
    state_host_bytes: int | None = None
    state_disk_bytes: int | None = None
    state_read_bytes: int | None = None
    state_written_bytes: int | None = None
    growth: Growth | None = None
    train_joules: float | None = None
    eval_joules: float | None = None
    control_seconds: float | None = None

    @property
    def state_growth(self) -> str | None:
        """How the state grows with the tokens read, for a column."""
        return None if self.growth is None else growth_text(self.growth, plain=True)


def cost(row: Row) -> Cost:
    """The columns of spend; of cells that were ended from outside, what was seen from there."""
    used = [r.usage for r in row.records if r.usage.parameters]
    seen = [r.usage for r in row.records if r.usage.parameters or r.usage.peak_device_bytes]
    trained = [u for u in seen if u.parameters or u.training_ended_by]
    read = [u for u in used if u.eval_tokens]

    def over(pick: Callable[[Usage], float | None], usages: Sequence[Usage] = used, how: Any = np.mean) -> float | None:
        values = [value for value in map(pick, usages) if value is not None]  # of what was measured
        found = float(how(values)) if values else math.nan
        return found if math.isfinite(found) else None

    def most(pick: Callable[[Usage], float | None]) -> int | None:
        return whole(over(pick, how=np.max))

    def whole(value: float | None) -> int | None:
        return None if value is None else round(value)

    tokens, flops = over(lambda u: u.eval_tokens, read, np.sum), over(lambda u: u.eval_flops, read, np.sum)
    seconds = over(lambda u: u.eval_seconds, read, np.sum)
    placed = [u for u in used if u.state_disk_bytes is not None]  # older records do not tell places apart
    return Cost(
        added_parameters=whole(over(lambda u: u.added_parameters)),
        added_fraction=over(lambda u: u.added_parameters / max(1, u.parameters - u.added_parameters)),
        # What a released model's training took is not known; it was no part of this run.
        train_tokens=None if row.pretrained else whole(over(lambda u: u.train_tokens, trained)),
        train_flops=None if row.pretrained else over(lambda u: u.train_flops, trained),
        train_seconds=None if row.pretrained else over(lambda u: u.train_seconds, trained),
        eval_tokens=whole(over(lambda u: u.eval_tokens)),
        eval_flops_per_token=flops / tokens if flops and tokens else None,
        eval_tokens_per_second=tokens / seconds if seconds and tokens else None,
        peak_device_bytes=whole(over(lambda u: u.peak_device_bytes, seen, np.max)),
        peak_host_bytes=whole(over(lambda u: u.peak_host_bytes, seen, np.max)),
        state_bytes=most(lambda u: u.state_bytes + u.state_host_bytes + (u.state_disk_bytes or 0)),
        scored_tokens=whole(over(lambda u: u.scored_tokens)),
        weight_bytes=most(lambda u: u.weight_bytes),
        optimizer_bytes=most(lambda u: u.optimizer_bytes),
        activation_bytes=most(lambda u: u.activation_bytes),
        gradient_bytes=most(lambda u: u.gradient_bytes),
        state_device_bytes=whole(over(lambda u: u.state_bytes, placed, np.max)),
        state_host_bytes=whole(over(lambda u: u.state_host_bytes, placed, np.max)),
        state_disk_bytes=whole(over(lambda u: u.state_disk_bytes, placed, np.max)),
        state_read_bytes=whole(over(lambda u: u.state_read_bytes)),
        state_written_bytes=whole(over(lambda u: u.state_written_bytes)),
        growth=max(_growths(row), key=lambda growth: growth.rank, default=None),
        train_joules=None if row.pretrained else over(lambda u: u.train_joules),
        eval_joules=over(lambda u: u.eval_joules),
        control_seconds=over(lambda u: u.control_seconds, [u for u in used if u.control_seconds]),
    )


def _growths(row: Row) -> list[Growth]:
    """Of the row's states, a cell each; where seeds differ, the fastest counts."""
    told = [r.provenance.get("state_growth") for r in row.records]
    return [Growth.from_json(growth) for growth in told if growth]


def growth_text(growth: Growth, *, plain: bool = False) -> str:
    """``constant``, ``+1.5 kB/token`` or ``+12 kB/doubling`` (of the tokens read); `plain`: bytes in full."""
    if growth.kind == "constant":
        return "constant"
    step, by = growth.bytes_per_token, "token"
    if growth.kind == "logarithmic":
        step, by = growth.bytes_per_doubling, "doubling"
    if plain:
        return f"{growth.kind}: {step:.6g} bytes/{by}"
    return f"+{amount('state_bytes', step or 0.0)}/{by}"


def learned(row: Row) -> str:
    """Whether training taught the model to use its memory, over its seeds: ``learned`` or ``learned (1 of 2)``."""
    verdicts = [str(r.learned["verdict"]) for r in row.records if r.learned]
    if not verdicts:
        return ""
    most = max(dict.fromkeys(verdicts), key=verdicts.count)
    if "learned" in verdicts and len(set(verdicts)) > 1:
        return f"learned ({verdicts.count('learned')} of {len(verdicts)})"
    return most
