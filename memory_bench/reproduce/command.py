"""`memory-bench reproduce`: published claims, tested on this machine, with what was reported beside.

The rows that tests compare are cells like those of any run, in a folder like that of any run: an interrupted command
continues, and the folder can be reported. What is counted on a model itself is kept beside them, under ``counted``.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from memory_bench.budget import load_budget
from memory_bench.cell import Cell, digest
from memory_bench.command import commands
from memory_bench.command.foretelling import show_plan
from memory_bench.command.jobs import RUNS, make_job
from memory_bench.command.preparing import Prepared
from memory_bench.data.library import Library
from memory_bench.episode import Read
from memory_bench.files.artefacts import Damaged, read_json, write_atomically, write_json
from memory_bench.files.shapes import conform
from memory_bench.published.claims import Setup, Test, claims_file, read_claims
from memory_bench.record import now, provenance
from memory_bench.reproduce import probes
from memory_bench.reproduce.verdicts import Finding, Verdict, markdown
from memory_bench.running.console import error, show
from memory_bench.running.grid import Grid, Request, make_task, plan_grid
from memory_bench.running.options import Options, parse_seeds
from memory_bench.running.worker import load_trained
from memory_bench.statistics.effects import (
    HOLDS,
    MEASURED,
    NOT_RUN,
    decide,
    mean_effect,
    perplexity_effect,
    share_effect,
)
from memory_bench.store import Store
from memory_bench.zoo.named import Backbones

VERSION = 1  # raised when what is counted may change


@dataclass(frozen=True)
class Counted:
    """What a file of ``counted`` must hold."""

    key: str
    values: list[list[float]]


@dataclass(frozen=True)
class _Bench:
    """What tests are judged with; cells are those of a model's label on a task, by seed."""

    cells: dict[tuple[str, str], dict[int, Cell]]
    store: Store
    options: Options
    library: Library
    seeds: tuple[int, ...]

    def of(self, label: str, task: str) -> dict[int, Cell]:
        """The cells of a row."""
        return self.cells.get((label, task), {})


def reproduce(names: Sequence[str], options: Options, *, dry_run: bool = False) -> int:
    """0 all that ran hold, 1 some do not. Writes ``claims.md`` and ``claims.json`` into the folder.

    Raises:
        UserError: an unknown claim, or no real data.
    """
    known = read_claims(claims_file())
    chosen, seeds = known.select(names), parse_seeds(options.seeds, known.setup.seeds)
    library = Library(options.data, options.cache, stand_ins=False, hub=options.hub, notice=error)
    say = (lambda sentence: None) if options.quiet else error
    backbones = Backbones(library, options.cache, hub=options.hub, report=say, notice=error)
    requests = make_requests([test for claim in chosen for test in claim.test], known.setup, seeds)
    cells = {cell.key: cell for request in requests for cell in plan_grid(request, library, backbones).cells}
    out = options.out or RUNS / "claims"
    whole = Grid(tuple(cells.values()), ())
    if dry_run:
        return show_plan(whole, backbones, options, measure=False)
    store = Store.open_or_create(out)
    lost = 0
    if requests:
        prepared = Prepared(_joined(requests), whole, library, backbones, out)
        store.write_run(commands.grid_json(prepared))
        lost = commands.carry_out(prepared, store, options)
    rows: dict[tuple[str, str], dict[int, Cell]] = {}
    for cell in whole.cells:
        rows.setdefault((cell.label, cell.task.name), {})[cell.training.seed] = cell
    bench = _Bench(rows, store, options, library, seeds)
    verdicts = [Verdict(claim, tuple(f for test in claim.test for f in judge(test, bench))) for claim in chosen]
    data = sorted({str(cell.task.config["data"]) for cell in whole.cells})
    text = markdown(verdicts, known.setup, {"data": ", ".join(data)} if data else {})
    found = [verdict.to_json() for verdict in verdicts]
    write_atomically(out / "claims.md", text)
    write_json(out / "claims.json", {"schema": 1, "setup": asdict(known.setup), "claims": found})
    show(json.dumps(found, indent=1) if options.as_json else text)
    return 0 if not lost and all(verdict.word in (HOLDS, MEASURED, NOT_RUN) for verdict in verdicts) else 1


def make_requests(tests: Sequence[Test], setup: Setup, seeds: tuple[int, ...]) -> list[Request]:
    """What must be run for the tests: a request for each task, with the models that any of its tests needs."""
    models: dict[str, dict[str, None]] = {}
    for test in tests:
        if test.trains:
            models.setdefault(test.task, {}).update(dict.fromkeys(test.trains))
    return [
        Request(
            models=tuple(names),
            tasks=(task,),
            backbone=setup.backbone,
            budget=load_budget(setup.budget),
            seeds=seeds,
            limits={task: setup.limits[task]} if task in setup.limits else {},
            settings={task: setup.options.get(task, {})},
            controls=False,
        )
        for task, names in models.items()
    ]


def _joined(requests: Sequence[Request]) -> Request:
    """One request for ``run.json``; not every model is run on every task."""
    first = requests[0]
    return Request(
        models=tuple(dict.fromkeys(model for r in requests for model in r.models)),
        tasks=tuple(r.tasks[0] for r in requests),
        backbone=first.backbone,
        budget=first.budget,
        seeds=first.seeds,
        limits={task: n for r in requests for task, n in r.limits.items()},
        settings={task: options for r in requests for task, options in r.settings.items()},
        controls=False,
    )


def judge(test: Test, bench: _Bench) -> list[Finding]:
    """What came of a test, at each of its lengths."""
    if not test.compared:
        return [_counted(test, bench)]
    rows = {label: bench.of(label, test.task) for label in test.trains}
    cells = [cell for row in rows.values() for cell in row.values()]
    keys = tuple(cell.key for cell in cells)
    records = {cell.key: bench.store.record(cell.key) for cell in cells}
    missing = [f"{label} on {test.task}" for label, row in rows.items() if not row]
    missing += [cell.title for cell in cells if (r := records[cell.key]) is None or r.status != "ok"]
    lengths = test.lengths or (None,)
    if missing:
        return [Finding(test, length, None, NOT_RUN, why=f"no result of {missing[0]}") for length in lengths]
    loaded = [{seed: bench.store.samples(cell.key) for seed, cell in row.items()} for row in rows.values()]
    samples = [{seed: frame for seed, frame in row.items() if frame is not None} for row in loaded]
    found = []
    for length in lengths:
        effect = share_effect(*samples) if test.base else perplexity_effect(samples[0], samples[1], length)
        why = "" if effect else "no document is that long" if length else "the rows share nothing"
        found.append(Finding(test, length, effect, decide(test, effect), bench.seeds, keys, why))
    return found


def _counted(test: Test, bench: _Bench) -> Finding:
    """What is counted on a model; kept in ``counted``, so that it is counted once."""
    row = bench.of(test.left, test.task) if test.trains else {}
    identity = {"test": asdict(test), "seeds": bench.seeds, "cells": [c.key for c in row.values()], "version": VERSION}
    key = digest(identity)
    path = bench.store.folder / "counted" / f"{key}.json"
    values = _read_counted(path, key)
    if values is None:
        started = now()
        values = _count(test, bench, row)
        facts = provenance(device="cpu", threads=1, started=started)
        write_json(path, {"schema": 1, "key": key, **identity, "values": values.tolist(), "provenance": facts})
    effect = mean_effect(values, UNITS[test.kind])
    seeds = bench.seeds[: effect.count]
    return Finding(test, None, effect, decide(test, effect), seeds, (key, *(c.key for c in row.values())))


def _read_counted(path: Path, key: str) -> "np.ndarray | None":
    """The numbers in a file of ``counted``; None where there are none, or (with a notice) others than were written."""
    try:
        found = read_json(path)
        conform(Counted, found)
        if found["key"] != key:
            raise Damaged("it is of another test")
        return np.array(found["values"], dtype=float)
    except FileNotFoundError:
        return None
    except ValueError as problem:
        error(f"Note: counted/{path.name} is not used, and is counted again: {problem}.")
        return None


UNITS = {"parameters": "the backbone", "pool": "a block's rows", "recall": "recall's weight"}


def _count(test: Test, bench: _Bench, row: dict[int, Cell]) -> "np.ndarray":
    if test.kind == "parameters":
        return np.array([[probes.added_share(test.left, test.backbone)]])
    if test.kind == "pool":
        return probes.beyond_law(test.left, bench.seeds)
    found = []
    for seed, cell in row.items():
        model, loaded = load_trained(make_job(cell, bench.store.folder, bench.options, 1), error)
        episodes = make_task(cell.task).episodes(bench.library, cell.limit)
        texts = ["".join(e.text for e in episode.events if isinstance(e, Read)) for episode in episodes]
        found.append(probes.filler_preference(model, loaded.encode, texts, seed))
    return np.stack(found)
