"""Made-up results for tests of the store and the report: cells, samples with known effects, and two small tasks."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from memory_bench.budget import PRESETS, Usage
from memory_bench.cell import Cell, Choice, Training
from memory_bench.episode import Estimate
from memory_bench.record import Record
from memory_bench.statistics.stats import mean_interval, ratio_interval, text_units
from memory_bench.store import Store

TEXT_DATA = "pg19 (stand-in: Shakespeare and Milton)"
QUESTION_DATA = "pubmedqa (stand-in: invented studies)"


def make_cell(model: str, task: str = "pg19", seed: int = 0, *, budget: str = "cpu-minutes", **options: Any) -> Cell:
    """A cell of `model` on `task`; `options` are the model's, except ``role`` and ``label``."""
    role, label = options.pop("role", "asked"), options.pop("label", model)
    data = TEXT_DATA if task == "pg19" else QUESTION_DATA
    training = Training(
        Choice(model, config=options), Choice("tiny"), Choice(task), Choice("tiny-stage-2"), PRESETS[budget], seed
    )
    return Cell(training, Choice(task, config={"data": data, "extent": "excerpt"}), role=role, label=label)


def text_samples(seed: int, gain: float, *, documents: int = 24, segment: int = 32, wiped: float = 0.0) -> pd.DataFrame:
    """Scored reading of `documents` books; `gain` is in bits per byte against a window of about 2.5."""
    books = np.random.default_rng(0)  # the same books for every model
    noise = np.random.default_rng([seed, round(1000 * (gain + 1))])
    hard = books.normal(2.5, 0.12, size=documents)
    rows = []
    for control, loss in (("", -gain), ("wiped", wiped), ("foreign", wiped + 0.002)):
        shift = noise.normal(0, 0.001)
        for book, level in enumerate(hard):
            for start in range(0, 256, segment):
                nbytes = 11 * segment // 4
                bits = level + loss + shift + noise.normal(0, 0.02) + 0.5 * math.exp(-(start // 64) / 2)
                name = f"book-{book:02}"
                rows.append(
                    _row(
                        seed,
                        name,
                        control,
                        start,
                        segment,
                        nbytes=nbytes,
                        words=nbytes // 6,
                        nll=bits * nbytes * math.log(2),
                    )
                )
    return pd.DataFrame(rows)


def question_samples(seed: int, right: Mapping[int, float], *, questions: int = 60) -> pd.DataFrame:
    """Questions at several distances, answered rightly with a probability each; wiped is at chance, the ceiling .97."""
    rng = np.random.default_rng([seed, 7])
    rows = []
    for control in ("", "wiped", "ceiling"):
        for distance, share in right.items():
            for number in range(questions):
                answer = ("yes", "no", "maybe")[number % 3]
                chance = {"": share, "wiped": 0.33, "ceiling": 0.97}[control]
                said = answer if rng.random() < chance else ("yes", "no", "maybe")[(number + 1) % 3]
                rows.append(_row(
                    seed, f"study-{number:03}-{distance}", control, distance, 1, cluster=f"study-{number:03}", event=2,
                    kind="ask", nll=rng.exponential(), distance_tokens=distance, distance_bytes=3 * distance,
                    choice_nll=[float(x) for x in rng.exponential(size=3)], predicted=said, answer=answer, label=answer,
                ))  # fmt: skip
    return pd.DataFrame(rows)


def _row(seed: int, episode: str, control: str, start: int, tokens: int, **values: Any) -> dict[str, Any]:
    return {
        "seed": seed, "episode": episode, "cluster": episode, "event": 0, "kind": "read", "control": control,
        "start": start, "tokens": tokens, "nbytes": 3, "words": 1, "nll": 0.0, "distance_tokens": -1,
        "distance_bytes": -1, "choice_nll": None, "predicted": "", "answer": "", "label": "", **values,
    }  # fmt: skip


class TextTask:
    """Language modelling's metrics."""

    headline = "bits_per_byte"

    def headline_rows(self, samples: pd.DataFrame) -> pd.DataFrame:
        """All of them."""
        return samples

    def metrics(self, samples: pd.DataFrame, seed: int = 0) -> list[Estimate]:
        """The headline, its controls, perplexity, and loss by position."""
        found = []
        for control in ("", "wiped", "foreign"):
            part = samples[samples.control == control]
            name = f"control:{control}" if control else ""
            found.append(self._rate(part, "bits_per_byte", name, part.nbytes * math.log(2), seed, "bits"))
        main = samples[samples.control == ""]
        nll = self._rate(main, "nll", "", main.tokens, seed, "nats")
        found += [nll, Estimate("ppl_token", math.exp(nll.value), None, None, nll.n, "", "", False)]
        for first in range(0, 256, 64):
            part = main[(main.start >= first) & (main.start < first + 64)]
            found.append(self._rate(part, "nll", f"position={first}-{first + 64}", part.tokens, seed, "nats"))
        return found

    def _rate(
        self, part: pd.DataFrame, metric: str, slice_: str, by: "pd.Series[Any]", seed: int, unit: str
    ) -> Estimate:
        units = text_units(part.cluster, part.start, part.tokens)
        value, low, high = ratio_interval(
            np.bincount(units, part.nll), np.bincount(units, np.asarray(by, float)), seed=seed, draws=400
        )
        return Estimate(metric, value, low, high, len(np.unique(units)), slice_, unit, higher_is_better=False)


class QuestionTask:
    """Question answering's metrics."""

    headline = "accuracy"

    def headline_rows(self, samples: pd.DataFrame) -> pd.DataFrame:
        """All of them."""
        return samples

    def metrics(self, samples: pd.DataFrame, seed: int = 0) -> list[Estimate]:
        """Accuracy, its controls, and accuracy by distance."""
        found = [self._accuracy(samples[samples.control == ""], "", seed)]
        for control in ("wiped", "ceiling"):
            found.append(self._accuracy(samples[samples.control == control], f"control:{control}", seed))
        main = samples[samples.control == ""]
        for distance, part in main.groupby("distance_tokens"):
            found.append(self._accuracy(part, f"distance={distance}", seed))
        return found

    def _accuracy(self, part: pd.DataFrame, slice_: str, seed: int) -> Estimate:
        right = np.asarray(part.predicted == part.answer, float)
        value, low, high = mean_interval(right, part.cluster, seed=seed, draws=400)
        return Estimate("accuracy", value, low, high, part.cluster.nunique(), slice_, "", higher_is_better=True)


TASKS: dict[str, TextTask | QuestionTask] = {"pg19": TextTask(), "pubmedqa": QuestionTask()}


def make_record(
    cell: Cell, samples: pd.DataFrame | None, status: str = "ok", detail: str = "", look_ahead: int = 0
) -> Record:
    """The record of `samples` with plausible costs."""
    tokens = 204_800
    dear = {"truncation": 1.0, "hmt": 1.8, "rmt": 1.4, "mplus": 2.1}.get(cell.training.model.name, 1.2)
    usage = Usage(
        parameters=540_000, added_parameters=int(15_000 * dear), trained_parameters=540_000, train_tokens=tokens,
        train_steps=100, train_flops=3 * dear * 1.05e6 * tokens, train_seconds=25 * dear, eval_tokens=60_000,
        scored_tokens=59_000, eval_flops=dear * 1.05e6 * 60_000, eval_seconds=5 * dear, peak_device_bytes=310_000_000,
        peak_host_bytes=700_000_000, state_bytes=int(2048 * dear), training_ended_by="train_tokens",
    )  # fmt: skip
    text = cell.task.name == "pg19"
    metrics = () if samples is None else tuple(TASKS[cell.task.name].metrics(samples))
    learned = {"verdict": "learned", "lift": 0.02, "low": 0.01, "high": 0.03, "against": "control:wiped"}
    if cell.training.model.name == "truncation":
        learned = {"verdict": "no memory", "lift": None, "low": None, "high": None, "against": "control:wiped"}
    return Record(
        cell=cell, status=status, detail=detail, metrics=metrics, usage=usage if status != "skipped" else Usage(),
        provenance={"look_ahead": look_ahead, "finished": "2026-01-01T00:00:00+00:00"},
        learned=None if samples is None else learned,
        levels={} if text else {"chance": 1 / 3, "majority": 0.36},
    )  # fmt: skip


def make_store(folder: Path, budget: str = "cpu-minutes") -> Store:
    """Two tasks, five models, a look-ahead row, and one cell each that ran over budget, failed and was skipped."""
    store = Store.open_or_create(folder)
    store.write_run({"models": ["hmt", "rmt", "mplus"], "tasks": ["pg19", "pubmedqa"]})

    def put(
        cell: Cell, samples: pd.DataFrame | None, status: str = "ok", detail: str = "", look_ahead: int = 0
    ) -> None:
        store.write_record(make_record(cell, samples, status, detail, look_ahead), samples)

    for seed in (0, 1):
        for name, gain in (("truncation", 0.0), ("xl-cache", 0.028), ("hmt", 0.025), ("rmt", 0.011), ("mplus", 0.003)):
            role = "control" if name in ("truncation", "xl-cache") else "asked"
            cell = make_cell(name, seed=seed, budget=budget, role=role)
            samples = text_samples(
                seed, gain, segment=64 if name == "rmt" else 32, wiped=0.004 * (name != "truncation")
            )
            if name == "mplus" and seed == 1:
                put(cell, samples[samples.episode < "book-16"], "over_budget", "eval_seconds@segment 6/8")
            else:
                put(cell, samples)
        ahead = make_cell(
            "hmt", seed=seed, budget=budget, label="hmt recall_query=current-half", recall_query="current-half"
        )
        put(ahead, text_samples(seed, 0.0251), look_ahead=16)
        for name, near, far in (("truncation", 0.33, 0.33), ("hmt", 0.66, 0.63), ("rmt", 0.89, 0.53)):
            cell = make_cell(name, "pubmedqa", seed, budget=budget, role="control" if name == "truncation" else "asked")
            put(cell, question_samples(seed, {16: near, 64: (near + far) / 2, 256: far}))
    put(make_cell("mplus", "pubmedqa", 0, budget=budget), None, "failed", "RuntimeError: the pool is empty")
    put(make_cell("longmem", budget=budget), None, "skipped", "needs a GPT-2 backbone")
    return store


def real_questions(folder: Path, models: tuple[str, ...] = ("truncation", "rmt")) -> Store:
    """As `few_questions`, with options that the installed task has, so that commands compute its metrics."""
    store = Store.open_or_create(folder)
    for name in models:
        cell = make_cell(name, "pubmedqa")
        cell = replace(cell, task=Choice("pubmedqa", config={"data": QUESTION_DATA}))
        share = 0.33 if name == "truncation" else 0.9
        samples = question_samples(0, {16: share, 64: share}, questions=9).assign(label="")
        store.write_record(replace(make_record(make_cell(name, "pubmedqa"), samples), cell=cell), samples)
    return store


def few_questions(folder: Path, models: tuple[str, ...] = ("truncation", "rmt")) -> Store:
    """One or two models on a few questions: quick to draw."""
    store = Store.open_or_create(folder)
    for name in models:
        share = 0.33 if name == "truncation" else 0.9
        samples = question_samples(0, {16: share, 64: share}, questions=9)
        store.write_record(make_record(make_cell(name, "pubmedqa"), samples), samples)
    return store
