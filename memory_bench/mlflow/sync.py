"""Writes records to MLflow. The records are the truth: what MLflow shows can be thrown away and is written anew.

A run in MLflow is known by its tags: ``mb.run`` (the name of the results folder), ``mb.key`` (the cell) and ``mb.mark``
(a hash of everything it shows, set when it is complete). A run with the right mark is left alone. MLflow keeps every
number it was ever given, so a run whose mark differs, or that has none because its writing was interrupted, is written
anew and the old one deleted. Cells that are gone are deleted from the folder's own database only: on a server they may
be another machine's part of the same grid. Only this process writes, and nothing of MLflow's own state (active run,
tracking URI) is touched.
"""

import json
import re
import shlex
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memory_bench.cell import Choice
from memory_bench.errors import UserError, unknown
from memory_bench.mlflow.pages import pages
from memory_bench.mlflow.place import NotSynced, artifacts, check, default_place, serve, shown, site, talking
from memory_bench.mlflow.view import View, cell_view, run_view
from memory_bench.running.console import error, show
from memory_bench.store import Store

MARK, PARENT = "mb.mark", "mlflow.parentRunId"


@dataclass(frozen=True)
class Synced:
    """What `sync` did.

    Attributes:
        experiment: its name.
        new, replaced, unchanged, removed: number of cells.
        pages: what is shown to the address: per task (and seed, where there are many cells) a comparison and a curve.
        serve: the command that shows a database; empty for a server.
    """

    experiment: str
    new: int
    replaced: int
    unchanged: int
    removed: int
    pages: dict[str, str]
    serve: str

    def lines(self) -> list[str]:
        """For a person."""
        counts = {n: getattr(self, n) for n in ("new", "replaced", "unchanged", "removed")}
        said = ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none"
        found = [f"MLflow experiment {self.experiment}, cells: {said}."]
        found += [f"To look at it: {self.serve}"] if self.serve else []
        return found + [f"{what}: {link}" for what, link in self.pages.items()]


def sync(store: Store, uri: str = "", asked: Collection[Choice] = ()) -> Synced:
    """Make MLflow show what is in a store; a second time changes nothing.

    Args:
        store: of the run; its report is built where it is missing or older than a record.
        uri: of a server or database; empty: ``mlflow.db`` and ``mlartifacts`` in the store's folder.
        asked: tasks that the user has named in this command.

    Raises:
        UserError: as of `mlflow_place.check`, or the folder was moved.
        NotSynced: MLflow failed or does not answer.
    """
    folder = store.folder.resolve()
    check(uri)
    place = uri or default_place(folder)
    name = re.sub(r"[^\w+.=-]", "_", folder.name)
    experiment = re.sub(r"-[0-9a-f]{6}$", "", name)  # so that all grids of a suite can be compared
    _report(store, asked)
    with tempfile.TemporaryDirectory() as scratch, store.lock("mlflow"):
        cells = [cell_view(record, store, name) for record in store.records()]
        parent = run_view(store, name, cells, _long_form(folder / "leaderboard.csv", Path(scratch)))
        with talking(place) as client:
            shelf = _Shelf(client, _experiment(client, experiment, artifacts(place, folder), own=not uri))
            ids, counts = _write_all(shelf, name, parent, cells, mirror=not uri)
    runs = [(ids[cell.tags["mb.key"]], cell) for cell in cells]
    return Synced(experiment, **counts, pages=pages(site(place), shelf.experiment, runs), serve=serve(place))


def _write_all(
    shelf: "_Shelf", name: str, parent: View, cells: Sequence[View], *, mirror: bool
) -> tuple[dict[str, str], dict[str, int]]:
    """The id of every cell's run by key, and how many were new, replaced, unchanged and removed."""
    parents, old = shelf.find("run", name), shelf.find("cell", name)
    parent_id, begun = shelf.put(parent, [run for run in parents if _right(run, parent)])
    ids: dict[str, str] = {}
    counts = dict.fromkeys(("new", "replaced", "unchanged"), 0)
    for cell in cells:
        key = cell.tags["mb.key"]
        same = [run for run in old if run.data.tags.get("mb.key") == key]
        ids[key], written = shelf.put(cell, [run for run in same if _right(run, cell)], parent_id)
        counts["unchanged" if not written else "replaced" if same else "new"] += 1
    gone = [run for run in old if run.data.tags.get("mb.key") not in ids]
    counts["removed"] = len(gone) if mirror else 0
    spared = {parent_id, *ids.values()} if mirror else {parent_id, *ids.values(), *(run.info.run_id for run in gone)}
    for run in () if mirror else gone:
        shelf.adopt(run, parent_id)
    shelf.remove(run for run in (*parents, *old) if run.info.run_id not in spared)
    if begun:
        shelf.complete(parent_id, parent)
    return ids, counts


def after_run(out: Path, uri: str, *, quiet: bool, asked: Collection[Choice] = ()) -> int:
    """`sync` at the end of `run`, whose results stand whatever happens here: 0, or 1 where MLflow was not written."""
    again = f"memory-bench sync mlflow {shlex.quote(str(out))}" + (f" --uri {shlex.quote(shown(uri))}" if uri else "")
    try:
        lines = sync(Store.open(out), uri, asked).lines()
    except (NotSynced, UserError) as problem:
        error(f"{problem} The results are complete without it; repeat with `{again}`.")
        return 1
    for line in () if quiet else lines:
        error(line)
    return 0


def command(what: str, out: Path, uri: str) -> int:
    """`memory-bench sync`: 0, or 1 where MLflow fails or does not answer."""
    if what != "mlflow":
        raise unknown("view", what, ["mlflow"])
    store = Store.open(out)
    try:
        lines = sync(store, uri).lines()
    except NotSynced as problem:
        error(f"Error: {problem}")
        return 1
    for warning in store.warnings:
        error(f"Warning: {warning}")
    show("\n".join(lines))
    return 0


@dataclass(frozen=True)
class _Shelf:
    """The runs of an experiment."""

    client: Any
    experiment: str

    def find(self, kind: str, run: str) -> list[Any]:
        """The runs that are no others' and not deleted, newest first."""
        wanted = f"tags.`mb.kind` = '{kind}' and tags.`mb.run` = '{run}'"
        found: list[Any] = []
        token = None
        while True:
            page = self.client.search_runs([self.experiment], wanted, max_results=1000, page_token=token)
            found, token = found + list(page), page.token
            if not token:
                return found

    def put(self, view: View, kept: Sequence[Any], parent: str = "") -> tuple[str, bool]:
        """The id of the run that shows `view`, and whether it had to be written."""
        if not kept:
            return self._write(view, parent), True
        run = kept[0]
        self.adopt(run, parent)
        return str(run.info.run_id), False

    def adopt(self, run: Any, parent: str) -> None:
        """Put a cell under another parent."""
        if parent and run.data.tags.get(PARENT) != parent:
            self.client.set_tag(run.info.run_id, PARENT, parent)

    def remove(self, runs: Iterator[Any]) -> None:
        """Delete, as a person could; `mlflow gc` frees the space."""
        for run in runs:
            self.client.delete_run(run.info.run_id)

    def complete(self, run_id: str, view: View) -> None:
        """Say that everything is there."""
        self.client.set_tag(run_id, MARK, view.mark)

    def _write(self, view: View, parent: str) -> str:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

        finished = view.finished or round(time.time() * 1000)
        tags = {**view.tags, **({PARENT: parent} if parent else {})}
        run = self.client.create_run(self.experiment, view.started, tags, view.name)
        run_id = str(run.info.run_id)
        points = [Metric(p.name, p.value, finished, p.step) for p in view.points]
        params = [Param(name, value[:6000]) for name, value in view.params.items()]
        for first in range(0, len(points), 1000):
            self.client.log_batch(run_id, metrics=points[first : first + 1000])
        for first in range(0, len(params), 100):
            self.client.log_batch(run_id, params=params[first : first + 100])
        inputs = []
        for d in view.datasets:
            named = [InputTag("mlflow.data.context", d.use), *(InputTag(k, v) for k, v in d.tags.items())]
            # MLflow's own digest covers a part of the data; the revision covers all.
            data = Dataset(d.name, d.revision[:36] or "unknown", "local", json.dumps({"uri": d.name}))
            inputs.append(DatasetInput(data, named))
        if inputs:
            self.client.log_inputs(run_id, inputs)
        for file, folder in view.files:
            self.client.log_artifact(run_id, str(file), folder or None)
        self.client.set_terminated(run_id, "FINISHED", finished)
        if parent:  # a parent is complete when its children are
            self.complete(run_id, view)
        return run_id


def _right(run: Any, view: View) -> bool:
    return bool(run.data.tags.get(MARK) == view.mark)


def _experiment(client: Any, name: str, artifacts: str | None, *, own: bool) -> str:
    """The id of an experiment, made or restored.

    Raises:
        UserError: the database in the results folder was made when the folder was elsewhere.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        return str(client.create_experiment(name, artifacts))
    if own and found.artifact_location != artifacts:
        raise UserError(
            f"mlflow.db was made for files in {found.artifact_location}, but the folder has moved; delete mlflow.db "
            "and mlartifacts there and repeat: they are written anew from the records."
        )
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _report(store: Store, asked: Collection[Choice]) -> None:
    """Build the tables and plots where they are missing, changed, or older than a result, or results are damaged."""
    from memory_bench.report.build import build, is_as_written
    from memory_bench.report.libraries import find_libraries
    from memory_bench.report.scorers import scorers
    from memory_bench.shipped import parity_text, read_certificates

    store.records()  # what is damaged is among the warnings
    board = store.folder / "leaderboard.csv"
    sources = [s for s in (store.folder / "run.json", *store.cells.glob("*/*")) if s.suffix in (".json", ".parquet")]
    fresh = board.is_file() and all(s.stat().st_mtime <= board.stat().st_mtime for s in sources if s.is_file())
    if fresh and not store.warnings and is_as_written(store.folder):
        return
    certificates = {name: parity_text(certificate) for name, certificate in read_certificates().items()}
    made = build(store, scorers([store], asked), certificates=certificates, libraries=find_libraries())
    made.write(store.folder)


def _long_form(board: Path, scratch: Path) -> Path | None:
    """``leaderboard.csv`` as Parquet."""
    import pandas as pd

    table = pd.read_csv(board, keep_default_na=False, na_values=[""])  # a model may be called "null"
    if table.empty:
        return None
    path = scratch / "leaderboard.parquet"
    table.to_parquet(path, index=False)
    return path
