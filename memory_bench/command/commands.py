"""What the commands do; `memory_bench.cli` parses, this works. Every function returns an exit code."""

import json
import signal
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory_bench import axes, plugins
from memory_bench.backbone.small import CLOSED
from memory_bench.card import HELPERS, NAMED
from memory_bench.cell import Cell, Choice, digest, to_json
from memory_bench.command.foretelling import foretold, learn, show_plan
from memory_bench.command.jobs import cuda_here, make_job, threads_for, workers_for
from memory_bench.data.library import LABELS, Library
from memory_bench.driver.every import parse_every
from memory_bench.errors import MachineError, UserError, unknown
from memory_bench.files.artefacts import write_json
from memory_bench.record import Record
from memory_bench.report.scorers import scorers
from memory_bench.running.budgets import load_budgets
from memory_bench.running.console import Display, error, show
from memory_bench.running.executors import Executor, Inline, Local
from memory_bench.running.firststep import refuse_below_one_step
from memory_bench.running.grid import Grid, Request, make_task, plan_grid, split_names
from memory_bench.running.naming import completed
from memory_bench.running.options import Options, parse_limits, parse_seeds, parse_settings, with_suite
from memory_bench.running.preflight import check_episodes
from memory_bench.running.superseded import FOLDER as ASIDE
from memory_bench.running.superseded import set_aside
from memory_bench.shipped import THIRD_PARTY, parity_folder, parity_text, read_certificates
from memory_bench.store import Store, link_latest
from memory_bench.zoo.compared import check_agreement
from memory_bench.zoo.named import Backbones

if TYPE_CHECKING:
    pass

RUNS = Path("results/runs")
ENDINGS = ("SIGTERM", "SIGHUP", "SIGQUIT")


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
    _executor(options.executor, 1)
    parse_every(options.checkpoint_every)
    if not options.models or not options.tasks:
        raise UserError(
            "Give --models and --tasks (or --suite); `memory-bench list models` and `list tasks` show them. To begin: "
            "memory-bench run --suite tiny"
        )
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


def _executor(name: str, workers: int) -> Executor:
    if name == "inline":
        return Inline()
    if name == "local":
        return Local(workers)
    raise unknown("executor", name, ["inline", "local"], "slurm and ray are not available in this version.")


def run(options: Options) -> int:
    """`memory-bench run`: 0 every cell has a result, 1 some cell failed or was lost."""
    prepared = prepare(options)
    if options.mlflow is not None:
        from memory_bench.mlflow.place import reach

        reach(options.mlflow)
    store = Store.open_or_create(prepared.out)
    store.write_run(grid_json(prepared))
    if prepared.out.resolve().parent == RUNS.resolve():
        link_latest(RUNS, prepared.out)
    lost = carry_out(prepared, store, options)
    asked = [cell.task for cell in prepared.grid.cells]
    try:
        code = report(prepared.out, quiet=options.quiet, as_json=options.as_json, asked=asked)
    except MachineError as trouble:  # what was computed is there, and a report is made from it alone
        error(f"Error: no report: {trouble}")
        return 1
    if options.mlflow is not None:
        from memory_bench.mlflow.sync import after_run

        code = code or after_run(prepared.out, options.mlflow, quiet=options.quiet, asked=asked)
    wanted = [store.record(cell.key) for cell in prepared.grid.cells]
    return 1 if code or lost or any(r is None or r.status == "failed" for r in wanted) else 0


def carry_out(prepared: Prepared, store: Store, options: Options) -> int:
    """Run the cells that have no result yet; how many were lost (`memory_bench.running.executors.lost`)."""
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
    workers, threads = workers_for(cards.values(), device), {n: threads_for(c, device) for n, c in cards.items()}
    jobs = [
        replace(
            make_job(cell, prepared.out, options, threads[cell.training.backbone.name]),
            before=stamps[cell.key],
            superseded=_superseded(cell, todo, store) if options.force else {},
        )
        for cell in todo
    ]
    if jobs:
        with _terminable():
            jobs, remaining = foretold(jobs, options, workers)
        with _terminable(), closing(_executor(options.executor, workers).run(jobs)) as events:
            records = Display(len(jobs), quiet=options.quiet, remaining=remaining).follow(events)
        learn(records, options)
        return len(jobs) - len(records)
    return 0


@contextmanager
def _terminable() -> Iterator[None]:
    """A request to end (of `timeout`, a scheduler, a closed terminal) is taken like Ctrl-C: no worker is left behind.

    What is ignored stays so, as under `nohup`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    known = (number for name in ENDINGS if (number := getattr(signal, name, None)) is not None)
    before = {number: found for number in known if (found := signal.getsignal(number)) != signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, signal.default_int_handler)
        yield
    finally:
        for number, found in before.items():
            signal.signal(number, found)


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
    todo: list[Cell] = []
    for cell in cells:
        record: Record | None = None if options.force else store.record(cell.key)
        if record is None or (options.retry == "failed" and record.status == "failed"):
            todo.append(cell)
    return todo


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


def plan(options: Options) -> int:
    """`memory-bench plan`: what a run would cost. Trains nothing."""
    prepared = prepare(options)
    check_episodes(prepared.grid.cells, prepared.library, fetch=False)
    return show_plan(prepared.grid, prepared.backbones, options)


def report(
    out: Path, *, quiet: bool = False, as_json: bool = False, asked: Collection[Choice] = (), axis: str = ""
) -> int:
    """`memory-bench report`: tables, plots and page from the records alone; `asked` are tasks named in the command."""
    from memory_bench.report.build import build

    if axis and axis not in axes.NAMES:
        raise unknown("axis", axis, axes.NAMES)
    store = Store.open(out)
    tasks = scorers([store], asked)
    texts = {name: parity_text(certificate) for name, certificate in read_certificates().items()}
    built = build(store, tasks, certificates=texts, axis=axis)
    built.write(out)
    for warning in store.warnings:
        error(f"Warning: {warning}")
    show(json.dumps(built.rows(), indent=1) if as_json else built.markdown())
    if not quiet:
        error(f"Tables, plots and page: {out}/leaderboard.html")
    return 0


def compare(names: list[str], out: Path, *, as_json: bool = False) -> int:
    """`memory-bench compare`: paired differences between models, or between runs."""
    from memory_bench.report.comparison import compare as compare_models

    folders = [Path(n) for n in names if (Path(n) / "cells").is_dir()]  # a model may be called like a folder nearby
    stores = [Store.open(f) for f in folders] or [Store.open(out)]
    models = [n for n in names if Path(n) not in folders]
    tasks = scorers(stores)
    for warning in (f"{s.folder}: {w}" if len(stores) > 1 else w for s in stores for w in s.warnings):
        error(f"Warning: {warning}")
    found = compare_models(stores if len(stores) > 1 else stores[0], models, tasks)
    show(json.dumps([c.rows() for c in found], indent=1) if as_json else "\n\n".join(c.markdown() for c in found))
    return 0


def verify(places: list[Path], *, write: bool, as_json: bool) -> int:
    """`memory-bench verify`: 0 all cases agree, 1 some do not."""
    from memory_bench.parity import cases as parity

    cases = list(parity.find_cases(places or [parity_folder()]))
    known = plugins.installed("parity")
    replays: Mapping[str, Any] = {c.model: plugins.load("parity", c.model) for c in cases if c.model in known}
    verdicts: list[parity.Verdict] = []
    for case in cases:
        if case.model not in replays:
            expected = tuple(sorted(case.tensors("expected")))
            verdict = parity.Verdict(
                case.name, case.model, False, None, (), expected, f"no replay for '{case.model}' is installed",
                case.third_party,
            )  # fmt: skip
        else:
            verdict = parity.verify(case, replays[case.model])
        verdicts.append(verdict)
        if not as_json:
            model = f"{verdict.model}, {THIRD_PARTY}" if verdict.third_party else verdict.model
            show(f"{'ok  ' if verdict.ok else 'FAIL'} {verdict.case} ({model}): {verdict.detail}")
    if as_json:
        show(json.dumps([parity.to_json(v) for v in verdicts], indent=1))
    if write:
        sources = {case.name: case.source for case in cases}
        from memory_bench.parity.measured import measure_models

        found = parity.certificates(verdicts, sources)
        write_json(parity_folder() / "certificates.json", {"schema": 1, "models": found, "measured": measure_models()})
    return 0 if all(v.ok for v in verdicts) else 1


def fetch(names: list[str], data: Path | None, cache: Path, *, stand_ins: bool, hub: bool) -> int:
    """`memory-bench fetch`: 0 everything is here, 1 something could not be had."""
    library = Library(data, cache, stand_ins=stand_ins, hub=hub, notice=_note)
    backbones = Backbones(library, cache, hub=hub, report=error, notice=_note)
    needs = tuple(LABELS)
    failed = 0
    for name in names or ["books", "pubmedqa", "tiny"]:
        if name not in (*needs, *NAMED, *HELPERS) and not Path(name).is_dir() and "/" not in name:
            raise unknown("thing to fetch", name, [*needs, *NAMED, *HELPERS])
        try:
            if name in needs:
                source = library.source(name)
                library.prepare(name)
                show(f"{name}: {source.label}, revision {source.revision}")
            else:
                resolved = backbones.resolve(name)
                backbones.prepare(resolved)
                if name not in HELPERS:
                    check_agreement(backbones, resolved)
                show(f"{resolved}: ready")
        except UserError as problem:
            failed = 1
            error(f"{name}: {problem}")
    return failed


def doctor(data: Path | None, cache: Path, *, hub: bool) -> int:
    """`memory-bench doctor`: what this machine can run."""
    from memory_bench.command.machine import facts

    for name, value in facts(data, cache, hub=hub):
        show(f"{name:<16} {value}")
    return 0
