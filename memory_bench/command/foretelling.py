"""What is known of a run beforehand: the plan that is shown, and what its cells are told."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from memory_bench.cell import Cell
from memory_bench.command.jobs import cuda_here, make_job, threads_for, workers_for
from memory_bench.record import Record
from memory_bench.running.console import error, show
from memory_bench.running.grid import Grid
from memory_bench.running.job import Job
from memory_bench.running.options import Options
from memory_bench.running.remaining import Remaining
from memory_bench.zoo.named import Backbones

if TYPE_CHECKING:
    from memory_bench.running.calibration import Calibrations
    from memory_bench.running.planning import Planner


class _Once:
    """Says a note once, however often it is told."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def tell(self, sentence: str) -> None:
        """A note on standard error."""
        if sentence not in self._said:
            self._said.add(sentence)
            error(f"Note: {sentence}")


def calibrations_of(options: Options) -> "Calibrations":
    """What was measured on this machine, from the user's cache; what is damaged there is said once."""
    from memory_bench.running.calibration import Calibrations

    return Calibrations(options.cache, "cuda" if cuda_here() else "cpu", notice=_Once().tell)


def planner_of(cells: Iterable[Cell], backbones: Backbones, options: Options, *, measure: bool) -> "Planner":
    """What plans cells on this machine; with `measure`, what is not measured yet is."""
    from memory_bench.running.planning import Planner

    calibrations, jobs = calibrations_of(options), {}
    for cell in cells:
        threads = threads_for(backbones.card(cell.training.backbone.name), calibrations.device)
        jobs[cell.key] = make_job(cell, Path(), options, threads)
    say = (lambda sentence: None) if options.quiet else error
    return Planner(backbones, calibrations, jobs, measure=measure, say=say)


def show_plan(grid: Grid, backbones: Backbones, options: Options, *, measure: bool = True) -> int:
    """Print what the cells of a grid would cost; with `measure`, what is not measured yet on this machine is."""
    from memory_bench.running.planning import table, totals

    planner = planner_of(grid.cells, backbones, options, measure=measure)
    rows = planner.rows(grid.cells)
    cards = {name: backbones.card(name) for name in {cell.training.backbone.name for cell in grid.cells}}
    device = planner.calibrations.device
    workers = workers_for(cards.values(), device) if options.executor == "local" else 1
    total = totals(rows, workers, max(threads_for(card, device) for card in cards.values()))
    if options.as_json:
        show(json.dumps({"cells": rows, "total": total, "skipped": [asdict(s) for s in grid.skipped]}, indent=1))
    else:
        show(table(rows, total))
        for s in grid.skipped:
            show(f"Skipped: {s.model} on {s.task}: {s.reason}.")
    return 0


def foretold(jobs: Sequence[Job], options: Options, workers: int) -> tuple[list[Job], Remaining]:
    """The jobs with what is known beforehand, from the cache alone: peak, seconds, a deadline where there is no limit.

    Nothing is measured for it, and tokens are not counted anew: of cells that were neither planned nor run here before
    nothing is known, and they weigh as much as the others.
    """
    from memory_bench.running.planning import deadline_of, foretell

    known_here = calibrations_of(options)
    told = {job.cell.key: foretell(known_here, job.cell) for job in jobs}
    ready = []
    for job in jobs:
        plan = told[job.cell.key]
        ready.append(replace(job, plan=plan or {}, deadline=deadline_of(job.cell, plan)))
    weights, trained = dict[str, float](), set[str]()
    for job in jobs:  # a training that several cells share weighs once
        key, plan = job.cell.training.key, told[job.cell.key] or {}
        again = float(plan.get("train_seconds") or 0.0) if key in trained else 0.0
        weights[job.cell.key] = max(0.0, float(plan.get("seconds", 0.0)) - again)
        trained.add(key)
    known = any(weights.values())
    side = {"local": workers, "inline": 1}.get(options.executor, 0)
    return ready, Remaining(weights, side, seconds=known)


def learn(records: Iterable[Record], options: Options) -> None:
    """Keep what cells took on this machine, for the next plan."""
    known = calibrations_of(options)
    for record in records:
        known.learn(record)
