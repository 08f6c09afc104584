"""What the commands do; `memory_bench.cli` parses, this works. Every function returns an exit code.

What loads torch is imported where it is needed: a report needs none, and a run waits without it.
"""

import json
import signal
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory_bench import axes, plugins
from memory_bench.card import HELPERS, NAMED
from memory_bench.cell import Choice
from memory_bench.command.engines import CLUSTERS, engine
from memory_bench.command.jobs import RUNS, Work
from memory_bench.data.library import LABELS, Library
from memory_bench.errors import MachineError, UserError, unknown
from memory_bench.files.artefacts import write_json
from memory_bench.record import Record
from memory_bench.running.console import Display, error, show
from memory_bench.running.forks import here, in_fork
from memory_bench.running.options import Options
from memory_bench.shipped import THIRD_PARTY, parity_folder, parity_text, read_certificates
from memory_bench.store import Store, link_latest

if TYPE_CHECKING:
    from memory_bench.command.preparing import Prepared

ENDINGS = ("SIGTERM", "SIGHUP", "SIGQUIT")


def _note(sentence: str) -> None:
    error(f"Note: {sentence}")


def prepare(options: Options) -> "Prepared":
    """Everything that can be checked before work starts.

    Raises:
        UserError: any mistake in names, options, data or folders.
    """
    from memory_bench.command import preparing

    engine(options, 1, options.out or RUNS)
    return preparing.prepare(options)


def grid_json(prepared: "Prepared") -> dict[str, Any]:
    """What ``run.json`` holds of a run."""
    from memory_bench.command import preparing

    return preparing.grid_json(prepared)


def run(options: Options) -> int:
    """`memory-bench run`: 0 every cell has a result, 1 some cell failed or was lost.

    With a process per cell this one only waits: planning and reporting, which load torch and pandas, are in forks.
    """
    inside = here if options.executor == "inline" else in_fork
    with _terminable():
        work, asked = inside(lambda: _begin(options))
    records = perform(work, options)
    return inside(lambda: _finish(work, records, asked, options))


def _begin(options: Options) -> tuple[Work, list[Choice]]:
    """What is to be done, and the tasks that were asked for; the folder of the run is there then."""
    from memory_bench.command import preparing

    prepared = prepare(options)
    if options.mlflow is not None:
        from memory_bench.mlflow.place import reach

        reach(options.mlflow)
    store = Store.open_or_create(prepared.out)
    store.write_run(grid_json(prepared))
    if prepared.out.resolve().parent == RUNS.resolve():
        link_latest(RUNS, prepared.out)
    tasks: list[Choice] = []
    for cell in prepared.grid.cells:
        if cell.task not in tasks:
            tasks.append(cell.task)
    return preparing.outstanding(prepared, store, options), tasks


def _finish(work: Work, records: Sequence[Record], asked: Collection[Choice], options: Options) -> int:
    """The report of what is there now, and the exit code."""
    from memory_bench.command.foretelling import learn

    if records and options.executor not in CLUSTERS:  # of other machines nothing is learned for this one
        learn(records, options)
    try:
        code = report(work.out, quiet=options.quiet, as_json=options.as_json, asked=asked, cache=options.cache)
    except MachineError as trouble:  # what was computed is there, and a report is made from it alone
        error(f"Error: no report: {trouble}")
        return 1
    if options.mlflow is not None:
        from memory_bench.mlflow.sync import after_run

        code = code or after_run(work.out, options.mlflow, quiet=options.quiet, asked=asked)
    done, lost = Store(work.out).statuses(work.keys), len(work.jobs) - len(records)
    return 1 if code or lost or any(done.get(key, "failed") == "failed" for key in work.keys) else 0


def carry_out(prepared: "Prepared", store: Store, options: Options) -> int:
    """Run the cells that have no result yet; how many were lost (`memory_bench.running.apart.lost`)."""
    from memory_bench.command import preparing
    from memory_bench.command.foretelling import learn

    with _terminable():
        work = preparing.outstanding(prepared, store, options)
    records = perform(work, options)
    if options.executor not in CLUSTERS:
        learn(records, options)
    return len(work.jobs) - len(records)


def perform(work: Work, options: Options) -> list[Record]:
    """Run jobs, and show how they go; the records of those that were not lost."""
    if not work.jobs:
        return []
    with _terminable(), closing(engine(options, work.workers, work.out).run(work.jobs)) as events:
        return Display(len(work.jobs), quiet=options.quiet, remaining=work.remaining).follow(events)


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


def plan(options: Options) -> int:
    """`memory-bench plan`: what a run would cost. Trains nothing."""
    from memory_bench.command.foretelling import show_plan
    from memory_bench.running.preflight import check_episodes

    prepared = prepare(options)
    check_episodes(prepared.grid.cells, prepared.library, fetch=False)
    return show_plan(prepared.grid, prepared.backbones, options)


def report(
    out: Path, *, quiet: bool = False, as_json: bool = False, asked: Collection[Choice] = (), axis: str = "",
    cache: Path | None = None,
) -> int:  # fmt: skip
    """`memory-bench report`: tables, plots and page from the records alone; `asked` are tasks named in the command."""
    from memory_bench.report.build import build
    from memory_bench.report.libraries import find_libraries
    from memory_bench.report.scorers import scorers

    if axis and axis not in axes.NAMES:
        raise unknown("axis", axis, axes.NAMES)
    store = Store.open(out)
    tasks = scorers([store], asked)
    texts = {name: parity_text(certificate) for name, certificate in read_certificates().items()}
    built = build(store, tasks, certificates=texts, axis=axis, libraries=find_libraries(cache, _note))
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
    from memory_bench.report.scorers import scorers

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
    from memory_bench.zoo.compared import check_agreement
    from memory_bench.zoo.named import Backbones

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
