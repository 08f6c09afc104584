"""What a run would cost: one row per cell, with tokens, FLOPs, peak and seconds, and whether its budget allows them.

Tokens and FLOPs are counted (`counting`), peak and seconds come from a calibration on this machine (`calibration`) or
from what the same cell spent here before; of devices that are not there the peak is computed from shapes (`computing`).
Every number says how it was got: ``counted``, ``measured here``, ``computed, not measured`` or ``unknown``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import psutil

from memory_bench.budget import Budget, amount
from memory_bench.cell import Cell
from memory_bench.errors import UserError
from memory_bench.running.calibration import Calibrations, Prediction, peak_of, step_seconds
from memory_bench.running.computing import computed_peak
from memory_bench.running.counting import Counted, Counter
from memory_bench.running.pace import seconds_of
from memory_bench.running.recipes import trains
from memory_bench.zoo.named import Backbones

HERE, COMPUTED, UNKNOWN = "measured here", "computed, not measured", "unknown"
DEADLINE_SECONDS = 600.0
SMALL_FLOPS = 1e10  # a second or less, beside the seconds that a process takes to begin
Say = Callable[[str], None]


@dataclass(slots=True)
class Planner:
    """Plans cells.

    Args:
        backbones: where backbones come from.
        calibrations: of this machine.
        jobs: of the cells, by key (`memory_bench.running.job.Job`).
        measure: measure what is not measured yet.
        say: told of slow steps.
    """

    backbones: Backbones
    calibrations: Calibrations
    jobs: Mapping[str, Any]
    measure: bool = True
    say: Say = lambda sentence: None
    counter: Counter = field(init=False)
    _failed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.counter = Counter(self.backbones)

    def rows(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        """One row per cell. A training that several cells share is charged to the first of them."""
        seen: set[str] = set()
        rows = []
        for number, cell in enumerate(cells):
            rows.append(self.row(cell, shared=cell.training.key in seen, place=f"{number + 1}/{len(cells)}"))
            seen.add(cell.training.key)
        return rows

    def row(self, cell: Cell, *, shared: bool = False, place: str = "") -> dict[str, Any]:
        """What `cell` would cost; with `shared`, its training's seconds are another cell's."""
        found = self._found(cell, place)
        counted = self.counter.count(cell, self._pace(cell, found))
        told = self._prediction(cell, counted, found)
        peak, how_peak = (told.peak_bytes, told.how) if told is not None else self._computed(cell)
        row = {
            "key": cell.key,
            "model": cell.label or cell.training.model.name,
            "task": cell.task.name,
            "data": cell.task.config["data"],
            "budget": cell.training.budget.name,
            "seed": cell.training.seed,
            "role": cell.role,
            "train_tokens": counted.usage.train_tokens,
            "train_flops": counted.usage.train_flops,
            "eval_tokens": counted.usage.eval_tokens,
            "eval_flops": counted.usage.eval_flops,
            "peak_bytes": peak,
            "train_seconds": None if told is None else told.train_seconds,
            "eval_seconds": None if told is None else told.eval_seconds,
            "control_seconds": None if told is None else told.control_seconds,
            "start_seconds": None if told is None else told.start_seconds,
            "seconds": None if told is None else told.seconds - (told.train_seconds if shared else 0.0),
            "shared": shared,
            "how": {
                "tokens": "counted" if counted.exact else COMPUTED,
                "peak_bytes": how_peak,
                "seconds": UNKNOWN if told is None else told.how,
            },
        }
        if told is not None:
            names = ("peak_bytes", "train_seconds", "eval_seconds", "control_seconds", "start_seconds")
            self.calibrations.keep(cell, {n: row[n] for n in names} | {"seconds": told.seconds, "how": told.how})
        added = self.counter.model(cell.training).added_parameters()
        start_bytes = None if found is None else int(found["start_bytes"])
        row["why_not"] = broken_limits(cell.training.budget, row, added, start_bytes)
        row["fits"] = None if peak is None and not row["why_not"] else not row["why_not"]
        return row

    def _found(self, cell: Cell, place: str) -> dict[str, Any] | None:
        """The calibration of a cell, made now if it may be."""
        if cell.training.processes > 1:  # one process was measured
            return None
        job, trained = self.jobs[cell.key], trains(cell.training)
        key = self.calibrations.key(cell, job.threads, trained=trained)
        found = self.calibrations.find(cell, job.threads, trained=trained)
        if found is None and self.measure and key not in self._failed and self._here(cell) and self._worth(cell):
            self.say(
                f"Measuring a few steps of {cell.title} ({place}; at most 20 s of the processor, kept in the cache)"
            )
            found = self.calibrations.make(job, trained=trained)
            if found is None:
                self._failed.add(key)
        return found

    def _worth(self, cell: Cell) -> bool:
        """Measuring a few steps of the cell takes less than the cell."""
        used = self.counter.count(cell).usage
        return used.train_flops + used.eval_flops >= SMALL_FLOPS

    def _here(self, cell: Cell) -> bool:
        """The cell could be measured: its device is this machine's, and its backbone is ready."""
        if absent(cell.training.budget, self.calibrations.device):
            return False
        return self.counter.encoder(cell.training.backbone.name)[1]

    @staticmethod
    def _pace(cell: Cell, found: dict[str, Any] | None) -> float | None:
        """Seconds of a training FLOP where a clock may end the training."""
        if found is None or not found["train"] or cell.training.budget.train_seconds is None:
            return None
        return float(sum(s["seconds"] for s in found["train"]) / max(1.0, sum(s["flops"] for s in found["train"])))

    def _prediction(self, cell: Cell, counted: Counted, found: dict[str, Any] | None) -> Prediction | None:
        spent = self.calibrations.spent(cell)
        if found is None or (counted.steps and not found["train"]):
            if spent is None:
                return None
            return Prediction(**asdict(spent), start_seconds=0.0)
        own, control = seconds_of(counted.calls, self.counter.model(cell.training, cell.scored_with), found["paces"])
        longest = max(len(s.line) for s in self.counter.streams(cell))
        told = Prediction(
            peak_bytes=peak_of(found, longest),
            train_seconds=sum(step_seconds(found, s.segments, s.flops) for s in counted.steps),
            eval_seconds=own + found["encode_seconds"],
            control_seconds=control,
            start_seconds=found["start_seconds"],
        )
        if spent is None:
            return told
        return replace(told, **asdict(spent))

    def _computed(self, cell: Cell) -> tuple[int | None, str]:
        if cell.training.processes > 1:
            return None, UNKNOWN
        try:
            return computed_peak(self.counter, cell), COMPUTED
        except (UserError, RuntimeError, NotImplementedError, ValueError) as error:
            self.say(f"The memory of {cell.title} cannot be computed: {error}")
            return None, UNKNOWN


def foretell(calibrations: Calibrations, cell: Cell) -> dict[str, Any] | None:
    """What is known of a cell from the plan that was made of it, or from its last run; a moment's work.

    Returns:
        The fields of `Prediction`, and ``seconds``, all of them; None: nothing is known.
    """
    known, spent = calibrations.planned(cell), calibrations.spent(cell)
    if spent is None:
        return known
    told = Prediction(**asdict(spent), start_seconds=(known or {}).get("start_seconds") or 0.0)
    return asdict(told) | {"seconds": told.seconds}


def deadline_of(cell: Cell, plan: Mapping[str, Any] | None) -> float | None:
    """Seconds after which a cell without limits of time is ended: three times the planned ones, at least 600."""
    budget = cell.training.budget
    limited = budget.train_seconds is not None or not trains(cell.training)
    if not plan or (limited and budget.eval_seconds is not None):
        return None
    return max(DEADLINE_SECONDS, 3 * float(plan["seconds"]))


def absent(budget: Budget, device: str) -> bool:
    """The budget is of a device that is not this machine's: more memory than there is, or a GPU."""
    if device != "cpu":
        return False
    large = budget.device_bytes is not None and budget.device_bytes > psutil.virtual_memory().total
    return large or budget.name.startswith("gpu-")


def broken_limits(budget: Budget, row: Mapping[str, Any], added: int, start_bytes: int | None) -> list[str]:
    """The limits that a planned cell would break: ``device_bytes 150 MB, about 240 MB``."""
    peak = row["peak_bytes"]
    used = {
        "device_bytes": peak,
        "host_bytes": None if peak is None or start_bytes is None else start_bytes + peak,
        "eval_seconds": row["eval_seconds"],
        "added_parameters": added,
    }
    if budget.counts:  # those that a clock must not cut short
        used["train_seconds"] = row["train_seconds"]
    found = []
    for name, value in used.items():
        limit = getattr(budget, name)
        if limit is not None and value is not None and value > limit:
            found.append(f"{name} {amount(name, limit)}, about {amount(name, value)}")
    return found


def wall_seconds(rows: Sequence[Mapping[str, Any]], workers: int, threads: int = 1) -> float | None:
    """Seconds until the last of the cells is done, `workers` at a time in their order; None: some are unknown."""
    free = [0.0] * max(1, workers)
    for row in rows:
        if row["seconds"] is None:
            return None
        first = min(range(len(free)), key=free.__getitem__)
        free[first] += row["seconds"] / max(1, threads)
    return max(free)


def totals(rows: Sequence[Mapping[str, Any]], workers: int, threads: int = 1) -> dict[str, Any]:
    """Core-minutes and wall of all rows, as far as they are known."""
    known = [r["seconds"] for r in rows if r["seconds"] is not None]
    wall = wall_seconds(rows, workers, threads)
    return {
        "cells": len(rows),
        "known": len(known),
        "core_minutes": sum(known) / 60 if known else None,
        "wall_minutes": None if wall is None else wall / 60,
        "workers": workers,
    }


def table(rows: Sequence[Mapping[str, Any]], total: Mapping[str, Any]) -> str:
    """The rows for a person, with the sum."""
    heads = (
        "model",
        "task",
        "seed",
        "train tokens",
        "train FLOPs",
        "eval tokens",
        "eval FLOPs",
        "peak",
        "seconds",
        "fits",
    )
    lines = [heads]
    for r in rows:
        fits = "unknown" if r["fits"] is None else "yes" if r["fits"] else "no: " + "; ".join(r["why_not"])
        peak = "unknown" if r["peak_bytes"] is None else amount("peak_bytes", r["peak_bytes"])
        lines.append(
            (
                r["model"], r["task"], str(r["seed"]), f"{r['train_tokens']:,}", f"{r['train_flops']:.2e}",
                f"{r['eval_tokens']:,}", f"{r['eval_flops']:.2e}",
                peak + (" *" if r["how"]["peak_bytes"] == COMPUTED else ""),
                "unknown" if r["seconds"] is None else f"{r['seconds']:.0f} s", fits,
            )
        )  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    shown = [
        "  ".join(c.ljust(w) if i in (0, 1, 9) else c.rjust(w) for i, (c, w) in enumerate(zip(x, widths, strict=True)))
        for x in lines
    ]
    return "\n".join([*(line.rstrip() for line in shown), *_footnotes(rows, total)])


def _footnotes(rows: Sequence[Mapping[str, Any]], total: Mapping[str, Any]) -> list[str]:
    notes = []
    if total["known"]:
        wall = (
            ""
            if total["wall_minutes"] is None
            else f", {total['wall_minutes']:.0f} min with {total['workers']} at a time"
        )
        short = "" if total["known"] == total["cells"] else f" ({total['cells'] - total['known']} of them unknown)"
        notes.append(f"{total['cells']} cells{short}: about {total['core_minutes']:.0f} core-minutes{wall}.")
    else:
        notes.append(
            f"{total['cells']} cells; their seconds are unknown: nothing was measured of them on this machine."
        )
    notes.append("Seconds: start, training (once for all cells that share it), evaluation and controls.")
    if any(r["how"]["peak_bytes"] == COMPUTED for r in rows):
        notes.append("* computed from shapes, not measured.")
    if any(r["how"]["tokens"] != "counted" for r in rows):
        notes.append("The backbone is not trained yet: tokens are estimates (`memory-bench fetch tiny` makes it).")
    return notes
