"""lm-eval's own metrics, computed from our samples: its filters, its judgement of each document, its aggregation.

The samples hold the documents (`memory_bench.lm_eval.documents`), so no data are read here. Every number gets an
interval over documents; the seeds of a document count together.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from memory_bench.episode import Estimate
from memory_bench.finite import check_samples, checked
from memory_bench.statistics.stats import Interval, mean_interval, ratio_interval, scored_units, statistic_interval

DRAWS = 300  # bootstrap samples where a metric is no mean
UNITS = {"bits_per_byte": "bits/byte", "accuracy": "share", "acc": "share", "acc_norm": "share", "exact_match": "share"}


@dataclass(frozen=True, slots=True)
class Item:
    """What a document gives to a metric: `value` is what lm-eval's own aggregation takes."""

    document: str
    metric: str
    value: Any


def asked_items(task: Any, samples: pd.DataFrame, *, wrong: str = "") -> list[Item]:
    """The items of questions of one control, seed by seed.

    Args:
        task: a `ConfigurableTask`.
        samples: rows of questions.
        wrong: the metric that counts 0 for a document that was not finished; other metrics are left out then.

    Raises:
        NotFinite: see `check_samples`.
    """
    check_samples(samples)
    finished = True
    found: list[Item] = []
    for _, one in samples.groupby("seed"):
        for document, rows in one.groupby("cluster", sort=False):
            fields, results = _results(task.OUTPUT_TYPE, rows)
            unfinished = [(wrong, 0.0)] if wrong else []
            values = _judged(task, fields, results) if results else unfinished
            finished = finished and bool(results)
            found += [Item(str(document), metric, value) for metric, value in values]
    return found if finished else [item for item in found if item.metric == wrong]


def _results(kind: str, rows: pd.DataFrame) -> tuple[Any, list[Any]]:
    """A document and the answers to its requests, in their order; no answers where one is missing."""
    results: dict[int, Any] = {}
    fields: Any = None
    for row in rows.itertuples():
        label = json.loads(str(row.label))
        fields = label["fields"]
        if not math.isfinite(float(row.nll)):  # type: ignore[arg-type]
            return fields, []
        for place, answer in zip(label["asked"], _answers(kind, row, label), strict=True):
            results.update(dict.fromkeys(place, answer))
    return fields, [results[idx] for idx in sorted(results)]


def _answers(kind: str, row: Any, label: dict[str, Any]) -> list[Any]:
    """What lm-eval's model would have answered: (log-likelihood, greedy) of every choice, or a text."""
    if kind == "generate_until":
        text = str(row.generated)
        return [text[: min((text.find(u) for u in label["until"] if u and u in text), default=len(text))]]
    if kind == "loglikelihood":
        # Token by token, as lm-eval's models tell it: texts can be alike where tokens are not. Samples of the first
        # version of the task have the text only.
        alike = str(row.generated).strip() == str(row.answer).strip()
        return [(-float(row.nll), bool(getattr(row, "greedy", alike)))]
    nll = [float(value) for value in row.choice_nll]
    nll[label["right"]] = float(row.nll)
    return [(-value, False) for value in nll]


def _judged(task: Any, fields: Any, results: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """(metric, item) of one document; metrics behind a second filter carry its name."""
    from lm_eval.api.instance import Instance

    made = [Instance("loglikelihood", fields, ("", ""), i, ("", 0, 1)) for i in range(len(results))]
    for instance, result in zip(made, results, strict=True):
        instance.resps.append(result)
    task._instances = made
    task.apply_filters()
    for number, name in enumerate(made[0].filtered_resps):
        values = task.process_results(fields, [instance.filtered_resps[name] for instance in made])
        yield from ((metric if not number else f"{metric}@{name}", value) for metric, value in values.items())


def text_items(samples: pd.DataFrame) -> list[Item]:
    """The items of scored texts of one control: (log-likelihood, what it is divided by); see `check_samples`."""
    check_samples(samples)
    found: list[Item] = []
    for (document, episode, _), rows in samples.groupby(["cluster", "episode", "seed"], sort=False):
        sizes = json.loads(str(episode).split(" ", 1)[1])
        likelihood = -float(rows["nll"].sum())
        found += [Item(str(document), metric, (likelihood, size)) for metric, size in sizes.items()]
    return found


def text_bits(samples: pd.DataFrame, seed: int, name: str) -> Estimate:
    """Bits per byte of scored texts, over documents, or parts of them where there are few; see `check_samples`."""
    check_samples(samples)
    columns = [samples[c].to_numpy() for c in ("cluster", "episode", "start", "tokens")]
    units = scored_units(columns[0].astype(str), columns[1].astype(str), *columns[2:])
    sums = samples[["nll", "nbytes"]].groupby(units).sum()
    value, low, high = ratio_interval(sums["nll"] / math.log(2), sums["nbytes"], seed=seed)
    return Estimate("bits_per_byte", value, low, high, len(sums), name, UNITS["bits_per_byte"], False)


def estimate(
    metric: str, items: Sequence[Item], aggregate: Callable[[list[Any]], Any], better: bool, seed: int, name: str
) -> Estimate:
    """One of lm-eval's numbers with its interval over documents, under its own name.

    Args:
        metric: which items count.
        items: of `asked_items` or `text_items`.
        aggregate: lm-eval's function from items to the number.
        better: whether higher is.
        seed: of the bootstrap.
        name: of the slice.
    """
    own = [item for item in items if item.metric == metric]
    values, documents = [item.value for item in own], np.array([item.document for item in own])
    value, low, high = _interval(values, documents, aggregate, seed)
    plain = metric.split("@")[0]
    return Estimate(metric, value, low, high, len(set(documents.tolist())), name, UNITS.get(plain, ""), better)


def _interval(values: list[Any], documents: NDArray[Any], aggregate: Callable[[list[Any]], Any], seed: int) -> Interval:
    """Exact sums for means, perplexities and bits; otherwise the metric of resampled documents.

    Raises:
        NotFinite: an item is not finite.
    """
    numbers = [x for value in values for x in (value if isinstance(value, list | tuple) else [value])]
    checked([x for x in numbers if isinstance(x, int | float)], "the documents' values")
    kind = getattr(aggregate, "__name__", "")
    if kind == "mean":
        return mean_interval(np.array(values, dtype=float), documents, seed=seed)
    if kind == "perplexity":
        return _exponential(mean_interval(-np.array(values, dtype=float), documents, seed=seed))
    if kind in ("weighted_perplexity", "bits_per_byte"):
        by = pd.DataFrame(values, columns=["likelihood", "size"]).groupby(documents).sum()
        found = ratio_interval(-by["likelihood"], by["size"], seed=seed)
        return _exponential(found) if kind == "weighted_perplexity" else _scaled(found, 1 / math.log(2))
    return statistic_interval(
        lambda rows: float(aggregate([values[i] for i in rows])), documents, seed=seed, draws=DRAWS
    )


def _exponential(found: Interval) -> Interval:
    value, low, high = found
    return (
        float(np.exp(value)),
        None if low is None else float(np.exp(low)),
        None if high is None else float(np.exp(high)),
    )


def _scaled(found: Interval, factor: float) -> Interval:
    value, low, high = found
    return value * factor, None if low is None else low * factor, None if high is None else high * factor
