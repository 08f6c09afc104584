"""What a row of a board spent, and whether its training taught the memory anything."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from memory_bench.budget import Usage
from memory_bench.report.rows import Row


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


def cost(row: Row) -> Cost:
    """The columns of spend; cells that never built a model do not count."""
    used = [r.usage for r in row.records if r.usage.parameters]
    read = [u for u in used if u.eval_tokens]

    def over(pick: Callable[[Usage], float], usages: Sequence[Usage] = used, how: Any = np.mean) -> float | None:
        found = float(how([pick(u) for u in usages])) if usages else math.nan
        return found if math.isfinite(found) else None

    def whole(value: float | None) -> int | None:
        return None if value is None else round(value)

    tokens, flops = over(lambda u: u.eval_tokens, read, np.sum), over(lambda u: u.eval_flops, read, np.sum)
    seconds = over(lambda u: u.eval_seconds, read, np.sum)
    return Cost(
        added_parameters=whole(over(lambda u: u.added_parameters)),
        added_fraction=over(lambda u: u.added_parameters / max(1, u.parameters - u.added_parameters)),
        # What a released model's training took is not known; it was no part of this run.
        train_tokens=None if row.pretrained else whole(over(lambda u: u.train_tokens)),
        train_flops=None if row.pretrained else over(lambda u: u.train_flops),
        train_seconds=None if row.pretrained else over(lambda u: u.train_seconds),
        eval_tokens=whole(over(lambda u: u.eval_tokens)),
        eval_flops_per_token=flops / tokens if flops and tokens else None,
        eval_tokens_per_second=tokens / seconds if seconds and tokens else None,
        peak_device_bytes=whole(over(lambda u: u.peak_device_bytes, how=np.max)),
        peak_host_bytes=whole(over(lambda u: u.peak_host_bytes, how=np.max)),
        state_bytes=whole(over(lambda u: u.state_bytes + u.state_host_bytes, how=np.max)),
        scored_tokens=whole(over(lambda u: u.scored_tokens)),
    )


def learned(row: Row) -> str:
    """Whether training taught the model to use its memory, over its seeds: ``learned`` or ``learned (1 of 2)``."""
    verdicts = [str(r.learned["verdict"]) for r in row.records if r.learned]
    if not verdicts:
        return ""
    most = max(dict.fromkeys(verdicts), key=verdicts.count)
    if "learned" in verdicts and len(set(verdicts)) > 1:
        return f"learned ({verdicts.count('learned')} of {len(verdicts)})"
    return most
