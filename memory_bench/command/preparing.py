"""Before a run's work starts: every mistake is found, and what is to be done becomes jobs. Loads torch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from memory_bench.backbone.small import CLOSED
from memory_bench.cell import Cell, digest, to_json
from memory_bench.command.foretelling import foretold
from memory_bench.command.jobs import RUNS, Work, check_processes, cuda_here, make_job, threads_for, workers_for
from memory_bench.data.library import Library
from memory_bench.driver.every import parse_every
from memory_bench.errors import UserError, unknown
from memory_bench.running.budgets import load_budgets
from memory_bench.running.console import error
from memory_bench.running.firststep import refuse_below_one_step
from memory_bench.running.grid import Grid, Request, make_task, plan_grid, split_names
from memory_bench.running.naming import completed
from memory_bench.running.options import Options, parse_limits, parse_processes, parse_seeds, parse_settings, with_suite
from memory_bench.running.preflight import check_episodes
from memory_bench.running.superseded import FOLDER as ASIDE
from memory_bench.running.superseded import set_aside
from memory_bench.store import Store
from memory_bench.zoo.named import Backbones


def _note(sentence: str) -> None:
    error(f"Note: {sentence}")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run, ready: nothing was trained, every mistake was found."""

    request: Request
    grid: Grid
    library: Library
    backbones: Backbones
    out: Path


def prepare(options: Options) -> Prepared:
    """Everything that can be checked before work starts.

    Raises:
        UserError: any mistake in names, options, data or folders.
    """
    options = with_suite(options)
    if options.retry not in ("", "failed"):
        raise unknown("value of --retry", options.retry, ["failed"])
    parse_every(options.checkpoint_every)
    if not options.models or not options.tasks:
        raise UserError(
            "Give --models and --tasks (or --suite); `memory-bench list models` and `list tasks` show them. To begin: "
            "memory-bench run --suite tiny"
        )
    processes = parse_processes(options.processes)
    check_processes(processes, options.executor)
    cuda = cuda_here()
    backbone = options.backbone or ("smollm2-135m" if cuda else "tiny")
    small = backbone == "tiny"
    budgets = load_budgets(options.budget or ("cpu-minutes" if small else "gpu-minutes" if cuda else "cpu-smol"))
    requests = [
        completed(
            Request(
                models=split_names(options.models),
                tasks=split_names(options.tasks),
                backbone=backbone,
                budget=budget,
                seeds=parse_seeds(options.seeds, budget.seeds),
                limits=parse_limits(options.limit),
                settings=parse_settings(options.settings),
                controls=options.controls,
                processes=processes,
            )
        )
        for budget in budgets
    ]
    library = Library(options.data, options.cache, stand_ins=options.stand_ins, hub=options.hub, notice=_note)
    say = (lambda sentence: None) if options.quiet else error
    backbones = Backbones(library, options.cache, hub=options.hub, report=say, notice=_note)
    grid = joined([plan_grid(request, library, backbones) for request in requests])
    refuse_below_one_step(grid.cells, library, backbones)
    if not options.quiet:
        for need in _needs(grid):
            source = library.source(need)
            if source.stand_in:
                error(
                    f"Note: no real data for {need}; using {source.label}. Its numbers are not those of the real data."
                )
    return Prepared(requests[0], grid, library, backbones, _out_folder(options, requests[0], grid))


def joined(grids: Sequence[Grid]) -> Grid:
    """The cells of all grids, asked ones first, each once."""
    cells = {cell.key: cell for grid in grids for cell in grid.cells}
    skipped = dict.fromkeys(s for grid in grids for s in grid.skipped)
    return Grid(tuple(sorted(cells.values(), key=lambda cell: cell.role)), tuple(skipped))


def _needs(grid: Grid) -> list[str]:
    """The data that a grid's tasks, trainings and backbones are made of."""
    tasks = [make_task(cell.task) for cell in grid.cells]
    needs = {need for task in tasks for need in (task.needs, *task.beside) if need}
    trainings = [cell.training for cell in grid.cells]
    books = any(t.corpus.name == "books" or t.backbone.name == "tiny" for t in trainings)
    return sorted(needs | ({"books"} if books else set()))


def _out_folder(options: Options, request: Request, grid: Grid) -> Path:
    if options.out is not None:
        if (options.out / "config.json").is_file():  # whose files count, so that results would change the backbone
            raise UserError(f"--out {options.out} is the folder of a model: give the results one of their own.")
        return options.out
    title = Path(options.suite).stem if options.suite else f"{'+'.join(request.models)}-{'+'.join(request.tasks)}"
    name = "".join(c if c.isalnum() or c in "+-_.=" else "_" for c in title)[:80]
    return RUNS / f"{name}-{digest([cell.key for cell in grid.cells])[:6]}"


def outstanding(prepared: Prepared, store: Store, options: Options) -> Work:
    """The cells that have no result yet, as jobs, with what is known of them beforehand."""
    if (old := set_aside(store, prepared.grid.cells)) and not options.quiet:
        error(f"{old} results are set aside ({prepared.out}/{ASIDE}): backbone, data or sources have changed since.")
    stamps = {cell.key: store.stamp(cell.key) for cell in prepared.grid.cells}  # before the records are read
    todo = _todo(prepared.grid.cells, store, options)
    for warning in store.warnings:
        _note(warning)
    for need in _needs(prepared.grid) if todo else ():
        prepared.library.prepare(need)
    check_episodes(todo, prepared.library)
    if not options.quiet:
        error(f"{len(prepared.grid.cells) - len(todo)} cells done, {len(todo)} to run, results in {prepared.out}")
        for s in prepared.grid.skipped:
            error(f"Skipped: {s.model} on {s.task}: {s.reason}.")
    cards = {c.training.backbone.name: prepared.backbones.card(c.training.backbone.name) for c in todo}
    device = "cuda" if cuda_here() else "cpu"
    workers, threads = (
        workers_for(cards.values(), device, prepared.request.processes),
        {n: threads_for(c, device) for n, c in cards.items()},
    )
    jobs = [
        replace(
            make_job(cell, prepared.out, options, threads[cell.training.backbone.name]),
            before=stamps[cell.key],
            superseded=_superseded(cell, todo, store) if options.force else {},
        )
        for cell in todo
    ]
    jobs, remaining = foretold(jobs, options, workers)
    return Work(prepared.out, tuple(cell.key for cell in prepared.grid.cells), jobs, remaining, workers)


def _superseded(cell: Cell, todo: Sequence[Cell], store: Store) -> dict[str, str]:
    """Checkpoints that are there and shall be made anew: a cell's own, and of a backbone trained here those on it.

    They stay until the new ones are whole.
    """
    backbone = cell.training.backbone
    keys = {cell.training.key} | {
        c.training.key for c in todo if backbone.name in CLOSED and c.training.backbone == backbone
    }
    places = {key: store.checkpoint_stamp(key) for key in keys}
    places |= {f"unfinished/{key}": store.unfinished_stamp(key) for key in keys}
    return {place: found for place, found in places.items() if found}


def _todo(cells: tuple[Cell, ...], store: Store, options: Options) -> list[Cell]:
    """The cells without a usable record, given --force and --retry."""
    done = {} if options.force else store.statuses(cell.key for cell in cells)
    again = {"failed"} if options.retry == "failed" else set()
    return [cell for cell in cells if done.get(cell.key) is None or done[cell.key] in again]


def grid_json(prepared: Prepared) -> dict[str, Any]:
    """What ``run.json`` holds of a run."""
    request = asdict(prepared.request)
    return {
        "request": request,
        "cells": [cell.key for cell in prepared.grid.cells],
        "roles": {cell.key: [cell.role, cell.label] for cell in prepared.grid.cells},
        "skipped": [asdict(s) for s in prepared.grid.skipped],
        "data": {
            need: asdict(prepared.library.source(need))
            for need in sorted({make_task(cell.task).needs for cell in prepared.grid.cells} - {""})
        },
        "budget": asdict(prepared.request.budget),
        "first_cell": to_json(prepared.grid.cells[0]),
    }
