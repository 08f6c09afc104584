"""Links into MLflow's pages: what to look at first, for every task of a run."""

import json
from collections.abc import Sequence

from memory_bench.mlflow.view import AXES, View

COMPARED = 12  # runs on one page; more columns fit no screen
Run = tuple[str, View]
"""A run's id in MLflow, and what it shows."""


def pages(site: str, experiment: str, cells: Sequence[Run]) -> dict[str, str]:
    """What is shown to its address: per task the comparison of its cells and, where its headline has one, the curve.

    Args:
        site: address of MLflow's pages.
        experiment: id.
        cells: runs of all cells.
    """
    found = {}
    for task, runs in _by_task(cells).items():
        these = f"runs={_quoted([run for run, _ in runs])}&experiments={_quoted([experiment])}"
        found[f"Compare {task}"] = f"{site}/#/compare-runs?{these}"
        names = [point.name for _, view in runs for point in view.points]
        headline = next((name for name in names if "/" not in name), "")
        # As in the report's plots, losses by position are in nats per token where a task gives them.
        wanted = [f"by_{axis}/{metric}" for axis in AXES for metric in (headline, "nll")]
        for curve in [name for name in wanted if name in names][:1]:
            drawn = f"metric=%22{curve}%22&plot_metric_keys={_quoted([curve])}&x_axis=step&show_point=true"
            found[f"Curve of {task}"] = f"{site}/#/metric?{these}&{drawn}"
    return found


def _by_task(cells: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs with a result by task, in the order of their names; of many, those of the first seed."""
    named: dict[str, list[Run]] = {}
    for run, view in sorted(cells, key=lambda pair: pair[1].name):
        if view.tags["mb.status"] == "ok":
            named.setdefault(view.params["task"], []).append((run, view))
    found: dict[str, list[Run]] = {}
    for task, runs in sorted(named.items()):
        few, first = len(runs) <= COMPARED, min(int(view.params["seed"]) for _, view in runs)
        kept = [(run, view) for run, view in runs if few or int(view.params["seed"]) == first]
        found[task if few else f"{task}, seed {first}"] = kept
    return found


def _quoted(names: Sequence[str]) -> str:
    """A JSON list as a browser writes it in its address, so that a terminal takes it for one link."""
    return json.dumps(list(names), separators=(",", ":")).replace('"', "%22")
