"""Rows: the records and samples of one model's seeds, and the metrics computed from them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from memory_bench.axes import UNSAID
from memory_bench.episode import Estimate
from memory_bench.errors import NotFinite
from memory_bench.finite import check_samples
from memory_bench.record import STATUSES, Record
from memory_bench.statistics import pairing, retention

if TYPE_CHECKING:
    import pandas as pd

Samples = Mapping[str, "pd.DataFrame | None"]
EVENT = ["episode", "event"]
PRETRAINED, OVER = "pretrained", "over_budget"


class Scorer(Protocol):
    """What a report needs of a task."""

    @property
    def headline(self) -> str:
        """The leaderboard's metric."""

    def metrics(self, samples: "pd.DataFrame", seed: int = 0) -> list[Estimate]:
        """All metrics and slices; the headline comes first."""

    def headline_rows(self, samples: "pd.DataFrame") -> "pd.DataFrame":
        """The rows that the headline counts, controls included."""


@dataclass(frozen=True)
class Row:
    """One model on a board, over its seeds.

    Attributes:
        label: shown in tables; unique on the board.
        records: one a seed, in the order of seeds.
        samples: of all seeds, those that the headline counts; None where not every seed with metrics has them, or where
            the task is not here to say which.
        estimates: computed from the samples, or (without them) averaged over the records.
        metric: the headline's name.
        notes: what was done to make the row, for example unanswered questions that were counted.
    """

    label: str
    records: tuple[Record, ...]
    samples: "pd.DataFrame | None"
    estimates: tuple[Estimate, ...]
    metric: str
    notes: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        """Name of the model's plug-in."""
        return self.records[0].cell.training.model.name

    @property
    def role(self) -> str:
        """``asked`` if any of the cells was asked for."""
        return "asked" if any(r.cell.role == "asked" for r in self.records) else "control"

    @property
    def status(self) -> str:
        """The worst of the seeds'."""
        order = [STATUSES.index(s) for s in ("ok", "skipped", "over_budget", "failed")]
        return STATUSES[max((STATUSES.index(r.status) for r in self.records), key=order.index)]

    @property
    def look_ahead(self) -> int:
        """Tokens past the predicting position that a prediction could see."""
        return max(r.look_ahead for r in self.records)

    @property
    def pretrained(self) -> str:
        """The checkpoint it was loaded from instead of being trained under the budget; empty for what was trained."""
        return str(self.records[0].cell.training.model.config.get("checkpoint") or "")

    def on_axis(self, axis: str) -> str:
        """Where its memory stands on an axis of `memory_bench.axes.Axes`."""
        value = (self.records[0].provenance.get("axes") or {}).get(axis, UNSAID)
        return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)

    @property
    def trained(self) -> bool:
        """Seeds trained any part of it: their noise is then in its numbers."""
        return not self.pretrained and any(record.usage.train_tokens for record in self.records)

    def marked(self, slice_: str) -> str:
        """A slice's name with the row's marks; see `marked`."""
        return marked(slice_, self.look_ahead, bool(self.pretrained))

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the records."""
        return tuple(r.cell.training.seed for r in self.records)

    @cached_property
    def seed_values(self) -> tuple[float, ...]:
        """The headline of each seed that finished; what ran over budget has scored something else.

        A record with a headline that is no number has failed (`Store.record`).
        """
        whole = [r for r in self.records if r.status != OVER]
        own = [m.value for r in whole for m in r.metrics if m.metric == self.metric and not plain(m.slice)]
        return tuple(value for value in own if np.isfinite(value))

    @property
    def seed_spread(self) -> float | None:
        """Standard deviation of the headline between seeds; None for fewer than two."""
        return float(np.std(self.seed_values, ddof=1)) if len(self.seed_values) > 1 else None

    @property
    def headline(self) -> Estimate | None:
        """The number the board ranks by."""
        return self.find(self.metric)

    def find(self, metric: str, slice_: str = "") -> Estimate | None:
        """An estimate by name, None where it is missing or not a number."""
        named = (e for e in self.estimates if e.metric == metric and e.slice == slice_ and np.isfinite(e.value))
        return next(named, None)

    @property
    def reasons(self) -> list[str]:
        """Why seeds are not ok, each reason once, with its seeds."""
        found: dict[str, list[int]] = {}
        for record in self.records:
            if record.status != "ok":
                found.setdefault(record.detail or record.status, []).append(record.cell.training.seed)
        every = len(self.records)
        return [text if len(s) == every else f"{text} (seed {', '.join(map(str, s))})" for text, s in found.items()]


def plain(slice_: str) -> str:
    """A slice's name without the marks of `marked`."""
    parts = slice_.split(";")
    return ";".join(part for part in parts if part != PRETRAINED and not part.startswith("look_ahead="))


def marked(slice_: str, look_ahead: int, pretrained: bool = False) -> str:
    """A slice's name with the marks of numbers that are no headline.

    They are those of a model that sees `look_ahead` tokens of what it predicts, or that came trained (`pretrained`).
    """
    marks = (f"look_ahead={look_ahead}" if look_ahead else "", PRETRAINED if pretrained else "")
    return ";".join(part for part in (*marks, plain(slice_)) if part)


def unanswered(records: Sequence[Record], samples: Samples) -> dict[int, "pd.DataFrame"]:
    """Per seed, the questions that complete cells were asked: the denominator for those that ran over budget.

    Where no cell of a seed is complete they are all that one of them got to.
    """
    import pandas as pd

    whole: dict[int, pd.DataFrame] = {}
    partial: dict[int, list[pd.DataFrame]] = {}
    for record in records:
        frame = samples[record.key]
        if record.status not in ("ok", "over_budget") or frame is None:
            continue
        asked = frame[(frame["kind"] == "ask") & (frame["control"] == "")]
        seed = record.cell.training.seed
        if record.status == OVER:
            partial.setdefault(seed, []).append(asked)
        elif len(asked) > len(whole.get(seed, ())):
            whole[seed] = asked
    some = {s: pd.concat(f).drop_duplicates(EVENT) for s, f in partial.items() if s not in whole}
    return {**some, **whole}


def make_row(
    label: str,
    records: Sequence[Record],
    samples: Samples,
    task: Scorer | None,
    metric: str,
    questions: Mapping[int, "pd.DataFrame"],
    warnings: list[str],
) -> Row:
    """One row.

    Args:
        label: of the row.
        records: one a seed.
        samples: by key.
        task: gives the metrics; None: the records' own are averaged.
        metric: the headline.
        questions: of `unanswered`.
        warnings: sentences are added to it.
    """
    import pandas as pd

    frames, notes = [], []
    complete = True
    for record in records:
        frame = None if record.status == "failed" else samples[record.key]
        if frame is None or frame.empty:
            complete = complete and not record.metrics
            continue
        seed = record.cell.training.seed
        if record.status == OVER and seed in questions:
            frame, missing = _with_unanswered(frame, questions[seed])
            if missing:
                notes.append(f"{missing} of {len(questions[seed])} questions unanswered, counted as wrong")
        frames.append(frame.assign(seed=seed))
    # Without the task nobody knows which rows its headline counts, nor what is right: nothing is computed from them.
    joined = pd.concat(frames, ignore_index=True) if frames and complete and task is not None else None
    estimates: list[Estimate] = []
    if joined is not None and task is not None:
        try:
            whole = pairing.judged(task, check_samples(joined))
            estimates, joined = task.metrics(whole), task.headline_rows(whole)
            estimates = estimates + _lift_by_distance(estimates, whole)
        except NotFinite as error:  # the records' own numbers were computed from the same samples
            warnings.append(f"{label} on {records[0].cell.task.name} has no numbers: {error}")
            return Row(label, tuple(records), None, (), metric, ("samples that are not finite",))
        except Exception as error:  # a plug-in's fault must not cost the whole report
            warnings.append(
                f"{label} on {records[0].cell.task.name}: metrics failed ({error!r}); records are averaged."
            )
            joined = None
    estimates = estimates or _averaged(records)
    if joined is not None and not any(e.metric == "memory_lift" and not e.slice for e in estimates):
        estimates = estimates + _lift(joined)
    return Row(label, tuple(records), joined, tuple(estimates), metric, tuple(dict.fromkeys(notes)))


def _with_unanswered(frame: "pd.DataFrame", questions: "pd.DataFrame") -> tuple["pd.DataFrame", int]:
    """`frame` with the questions it did not get to, unanswered; and their number."""
    import pandas as pd

    asked = frame[(frame["kind"] == "ask") & (frame["control"] == "")]
    if asked.empty:
        return frame, 0
    had = set(zip(*(asked[c] for c in EVENT), strict=True))
    missing = questions[[pair not in had for pair in zip(*(questions[c] for c in EVENT), strict=True)]]
    if missing.empty:
        return frame, 0
    nothing: dict[str, Any] = {"predicted": "", "generated": "", "nll": math.nan, "choice_nll": None}
    blank = missing.assign(**{name: value for name, value in nothing.items() if name in missing})
    return pd.concat([frame, blank], ignore_index=True), len(missing)


def _averaged(records: Sequence[Record]) -> list[Estimate]:
    """Metrics averaged over records; an average of intervals, as seeds share their documents.

    A metric that is no number in one of them (by its note) has no average, and no interval where one has none.
    """
    found: dict[tuple[str, str], list[Estimate]] = {}
    for record in records:
        for m in record.metrics:
            found.setdefault((m.metric, plain(m.slice)), []).append(m)
    result = []
    for (metric, slice_), same in found.items():
        if not all(np.isfinite(m.value) for m in same):
            continue
        ends = [[getattr(m, end) for m in same] for end in ("low", "high")]
        low, high = (None if None in values else float(np.mean(values)) for values in ends)
        value = float(np.mean([m.value for m in same]))
        most = max(m.n for m in same)
        result.append(Estimate(metric, value, low, high, most, slice_, same[0].unit, same[0].higher_is_better))
    return result


def _lift_by_distance(estimates: Sequence[Estimate], samples: "pd.DataFrame") -> list[Estimate]:
    """Memory lift at every distance, for tasks that give a half-life and not the lifts themselves."""
    mine = any(e.metric == "memory_lift" and e.slice.startswith("distance=") for e in estimates)
    return retention.lifts(samples) if not mine and any(e.metric == retention.HALF_LIFE for e in estimates) else []


def _lift(samples: "pd.DataFrame") -> list[Estimate]:
    found = pairing.lift(samples) if (samples["kind"] == "ask").any() else None
    return [] if found is None else [Estimate("memory_lift", *found, "", "", True)]
