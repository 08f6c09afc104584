"""Made-up results of retention tasks, with known half-lives: for tests of tables, comparisons and plots."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from memory_bench.cell import Cell, Choice
from memory_bench.episode import Estimate
from memory_bench.record import Record
from memory_bench.statistics.retention import distances, half_life_estimates
from memory_bench.statistics.stats import mean_interval
from memory_bench.store import Store
from synthetic import QuestionTask, make_cell, make_record

DISTANCES = (0, 512, 1024, 2048, 4096, 8192, 16384)
LENGTHS, DEPTHS = (1024, 2048, 4096, 8192), (0.0, 0.25, 0.5, 0.75, 1.0)


class RetentionTask(QuestionTask):
    """Accuracy, by distance, half-life."""

    def metrics(self, samples: pd.DataFrame, seed: int = 0) -> list[Estimate]:
        """As a task of retention gives them; the needle's grid where labels name depth and length."""
        main = samples[samples.control == ""]
        found = [self._accuracy(main, "", seed)]
        for control in ("wiped", "ceiling"):
            found.append(self._accuracy(samples[samples.control == control], f"control:{control}", seed))
        if main.label.str.startswith("depth=").any():
            return found + [self._accuracy(part, str(label), seed) for label, part in main.groupby("label")]
        for far in np.unique(distances(main)):
            found.append(self._accuracy(main[distances(main) == far], f"distance={far}", seed))
        return found + half_life_estimates(samples, 0.0, seed)


class ListTask(QuestionTask):
    """Drop in surprisal by delay."""

    headline = "surprisal_drop"

    def metrics(self, samples: pd.DataFrame, seed: int = 0) -> list[Estimate]:
        """The mean, and by delay."""
        parts = [("", samples), *((f"delay={d}", p) for d, p in samples.groupby("distance_tokens"))]
        return [
            Estimate("surprisal_drop", *mean_interval(p.nll, p.cluster, seed=seed, draws=300), p.cluster.nunique(),
                     name, "nats")
            for name, p in parts
        ]  # fmt: skip


TASKS = {"squad-retention": RetentionTask(), "passkey": RetentionTask(), "noun-recall": ListTask()}


def task_cell(model: str, task: str, seed: int = 0, **options: Any) -> Cell:
    """A cell of a retention task."""
    cell = make_cell(model, "pubmedqa", seed, **options)
    return replace(cell, task=Choice(task, config={"data": f"{task} (stand-in: invented facts)"}))


def answers(seed: int, half: float, *, start: float = 0.9, documents: int = 40, wiped: float = 0.05) -> pd.DataFrame:
    """One question a document and distance; `half` 0 is a model without memory. Difficulty is shared by models."""
    shared = np.random.default_rng(3).normal(size=(documents, 1, 1))
    noise = np.random.default_rng([seed, round(half), round(100 * start)]).normal(size=(documents, len(DISTANCES), 3))
    order = 0.6 * shared + 0.8 * noise
    rank = order.argsort(axis=None).argsort().reshape(order.shape) / order.size
    share = 2.0 ** (-np.array(DISTANCES) / half) if half else np.zeros(len(DISTANCES))
    chance = np.stack([wiped + (start - wiped) * share, np.full(len(share), wiped), np.full(len(share), 0.96)], axis=1)
    rows = [
        _row(seed, d, far, control, right=bool(rank[d, i, c] < chance[i, c]))
        for d in range(documents)
        for i, far in enumerate(DISTANCES)
        for c, control in enumerate(("", "wiped", "ceiling"))
    ]
    return pd.DataFrame(rows)


def needles(seed: int, reach: float, documents: int = 12) -> pd.DataFrame:
    """Needles at every depth of texts of every length, found if they lie within `reach` tokens or so of the end."""
    rng = np.random.default_rng([seed, round(reach)])
    rows = []
    for d in range(documents):
        for length in LENGTHS:
            for depth in DEPTHS:
                far = round((1 - depth) * length)
                for control in ("", "wiped", "ceiling"):
                    share = {"": 1.0 * 2.0 ** (-far / reach), "wiped": 0.0, "ceiling": 1.0}[control]
                    right = bool(rng.random() < share)
                    label = f"depth={depth:g},length={length}"
                    rows.append(_row(seed, d, far, control, right=right, episode=f"{d}-{label}", label=label))
    return pd.DataFrame(rows)


def drops(seed: int, start: float, half: float, documents: int = 30) -> pd.DataFrame:
    """Drops in surprisal that fade with the delay."""
    rng = np.random.default_rng([seed, round(half)])
    places = [(d, far) for d in range(documents) for far in DISTANCES[1:]]
    return pd.DataFrame(
        [{**_row(seed, d, far, "", right=True), "nll": start * 2.0 ** (-far / half) + rng.normal(0, 0.6)}
         for d, far in places]
    )  # fmt: skip


def _row(seed: int, document: int, far: int, control: str, *, right: bool, **values: Any) -> dict[str, Any]:
    return {
        "seed": seed, "episode": f"fact-{document}", "cluster": f"text-{document}", "event": far, "kind": "ask",
        "control": control, "start": far, "tokens": 1, "nbytes": 4, "words": 1, "nll": 0.5, "distance_tokens": far,
        "distance_bytes": 3 * far, "choice_nll": None, "predicted": "right" if right else "wrong", "answer": "right",
        "label": "", **values,
    }  # fmt: skip


def result(cell: Cell, samples: pd.DataFrame | None, status: str = "ok", detail: str = "", **facts: Any) -> Record:
    """A record of a retention task."""
    record = make_record(make_cell(cell.training.model.name, "pubmedqa"), None, status, detail)
    task: Mapping[str, Any] = TASKS
    metrics = () if samples is None else tuple(task[cell.task.name].metrics(samples))
    provenance = {**record.provenance, **facts}
    levels = {} if cell.task.name == "noun-recall" else {"chance": 0.0}
    return replace(record, cell=cell, metrics=metrics, provenance=provenance, levels=levels)


def retention_store(folder: Path, seeds: tuple[int, ...] = (0, 1), documents: int = 40) -> Store:
    """Facts over distance: memory that lasts, that fades, a pool, the window, one over budget, one that failed."""
    store = Store.open_or_create(folder)
    for seed in seeds:
        for name, half, start in (("full-context", 1e9, 0.94), ("hmt", 5000, 0.9), ("memoryllm", 2000, 0.85),
                                  ("truncation", 0, 0.9), ("rmt", 12000, 0.6)):  # fmt: skip
            samples = answers(seed, half, start=start, documents=documents)
            cell = task_cell(name, "squad-retention", seed, role="control" if name == "truncation" else "asked")
            facts: dict[str, Any] = {"segment": 512}
            if name == "memoryllm":
                facts["expected_retention"] = [[d, (1 - 1 / 8) ** (d / 512)] for d in (0, *range(64, 16385, 64))]
            if name == "rmt" and seed == 1:
                part = samples[samples["episode"] < "fact-3"]
                store.write_record(result(cell, part, "over_budget", "eval_seconds@segment 20/33", **facts), part)
            else:
                store.write_record(result(cell, samples, **facts), samples)
    failed = task_cell("mplus", "squad-retention")
    store.write_record(result(failed, None, "failed", "RuntimeError: the pool is empty"), None)
    return store


def other_store(folder: Path) -> Store:
    """Needles and lists of nouns."""
    store = Store.open_or_create(folder)
    for name, reach in (("hmt", 4000), ("rmt", 1500), ("truncation", 200), ("xl-cache", 600)):
        found = needles(0, reach)
        store.write_record(result(task_cell(name, "passkey"), found), found)
        faded = drops(0, {"truncation": 0.1}.get(name, 3.0), reach)
        store.write_record(result(task_cell(name, "noun-recall"), faded), faded)
    return store
