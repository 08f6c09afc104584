"""PubMedQA: an abstract is read, then a question about it is answered with yes, no or maybe.

Unusual here:

- The abstract goes through memory; only the question (and the unfinished segment) is in the window.
- Answers are scored by the likelihood of the three words, not generated.
- Without the data a stand-in is used that a small model can learn in seconds (`memory_bench.data.studies`), with its
  own small backbone, training and distances. It is another task, and is labelled as such everywhere.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from random import Random

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from memory_bench.corpus import Corpus, Line, LineCorpus
from memory_bench.data import Library, Study
from memory_bench.data.studies import SEGMENT, InventedStudy, invent, studies
from memory_bench.driver.encoding import Before, encode_asked
from memory_bench.episode import Ask, Encode, Episode, Estimate, Read, Task, TrainingPlan
from memory_bench.errors import UserError
from memory_bench.finite import check_samples, unanswered
from memory_bench.statistics.stats import macro_f1, statistic_interval

from .answers import average, likelihood
from .language_modeling import books_corpus

CHOICES = (" yes", " no", " maybe")
CONTROLS = ("wiped", "foreign", "ceiling")
OTHER_DISTANCES = (1, 16)  # segments; of the stand-in, beside the headline's
TRAIN_CONTEXT = 256  # tokens of an abstract that a training line keeps: its end, where results and conclusions stand


class PubMedQA(Task):
    """The official 500 test questions, or the stand-in's."""

    @dataclass(frozen=True, slots=True)
    class Config:
        """Options of the task."""

        # Abstracts read before the questions about all of them are asked (HMT: 2 to 10). Real data only.
        fused: int = 1
        # Segments between findings and question in the headline number. Stand-in only; 1 and 16 are asked besides.
        distance: int = 4
        # Questions per distance. Stand-in only.
        questions: int = 200

        def __post_init__(self) -> None:
            for name in ("fused", "distance", "questions"):
                value = getattr(self, name)
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise UserError(f"pubmedqa: {name} must be a whole number above 0, not {value!r}.")

    version = 1
    headline = "accuracy"
    needs = "pubmedqa"
    source = "Jin et al. 2019 (arXiv:1909.06146), expert-labelled questions, official test split"

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()

    def episodes(self, library: Library, limit: int | None) -> Iterator[Episode]:
        """`limit` counts questions; those of the stand-in come in turn from its distances, the headline's first."""
        if self._stand_in(library):
            distances = dict.fromkeys((self.config.distance, *OTHER_DISTANCES))
            groups = [studies("test", self.config.questions, distance) for distance in distances]
            yield from map(invented_episode, list(chain.from_iterable(zip(*groups, strict=True)))[:limit])
            return
        found = library.pubmedqa("test")[:limit]
        for first in range(0, len(found), self.config.fused):
            yield fused_episode(found[first : first + self.config.fused])

    def plan(self, library: Library, *, pretrained: bool) -> TrainingPlan:
        """The stand-in's own training; otherwise books for a pretrained backbone (zero-shot), else labelled studies."""
        if self._stand_in(library):
            return TrainingPlan("invented-studies", recipe="invented-studies", backbone="invented-studies")
        return TrainingPlan("books") if pretrained else TrainingPlan("pubmedqa", recipe="tiny-qa")

    def corpus(self, library: Library, plan: TrainingPlan, encode: Encode) -> Corpus:
        """See `Task.corpus`."""
        if plan.corpus == "invented-studies":
            return InventedCorpus(encode)
        if plan.corpus == "books":
            return books_corpus(library, encode)
        lines = [training_line(s, encode, number) for number, s in enumerate(library.pubmedqa("train"))]
        return LineCorpus(lines)

    def levels(self, library: Library) -> Mapping[str, float]:
        """Chance, and what can be had without the evidence or without knowing whose it is."""
        if self._stand_in(library):
            return {"chance": 1 / 3, "both outcomes, not whose": 2 / 3}
        answers = [s.answer for s in library.pubmedqa("test")]
        return {"chance": 1 / 3, "majority": max(map(answers.count, set(answers))) / len(answers)}

    def metrics(self, samples: pd.DataFrame, seed: int = 0) -> list[Estimate]:
        """Accuracy, macro F1 and the answer's log-probability; accuracy by label, distance and control; memory lift.

        Intervals are over clusters (what questions share); the seeds of a question are averaged first. The headline is
        over the configured distance where an episode says one (stand-in).
        """
        asks = check_samples(samples)[samples["kind"] == "ask"]
        asks = asks.assign(correct=(asks["predicted"] == asks["answer"]).astype(float), logprob=-asks["nll"])
        main, counted = asks[asks["control"] == ""], self.headline_rows(asks)
        head = counted[counted["control"] == ""]
        if head.empty:
            return []
        found = [average("accuracy", head, "correct", "share", seed), _macro_f1(head, seed)]
        found += likelihood("answer_logprob", head, "logprob", "nats", seed)
        parts = [(f"label={c.strip()}", head[head["answer"] == c]) for c in CHOICES]
        parts += [(n, main[main["label"] == n]) for n in _in_order(main["label"])]
        parts += self._by_distance(head) if self.config.fused > 1 else []
        parts += [(f"control:{c}", counted[counted["control"] == c]) for c in CONTROLS]
        found += [average("accuracy", part, "correct", "share", seed, name) for name, part in parts if not part.empty]
        return found + _lift(counted, seed)

    def headline_rows(self, samples: pd.DataFrame) -> pd.DataFrame:
        """Questions at the configured distance, and those whose episode names none (real data)."""
        return samples[samples["label"].isin({"", distance_label(self.config.distance)})]

    def _by_distance(self, asks: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
        """Slices of the distance to the evidence in tokens, up to the next power of two."""
        upper = 2 ** np.ceil(np.log2(np.maximum(asks["distance_tokens"].to_numpy(), 1))).astype(int)
        return [(f"distance={high}", asks[upper == high]) for high in np.unique(upper)]

    def _stand_in(self, library: Library) -> bool:
        stand_in = library.source("pubmedqa").stand_in
        if stand_in and self.config.fused > 1:
            raise UserError("pubmedqa: fused needs the real data; the stand-in has 'distance' instead.")
        return stand_in


def prompt(question: str) -> str:
    """What is put before the answer."""
    return f"\nQuestion: {question}\nAnswer:"


def fused_episode(group: Sequence[Study]) -> Episode:
    """All abstracts of the group, then the question about each (a question leaves no trace for the next)."""
    tags = ["evidence" if len(group) == 1 else f"evidence-{n}" for n in range(len(group))]
    reads = [
        Read(("\n\n" if n else "") + "\n".join(s.contexts), tag=tag)
        for n, (s, tag) in enumerate(zip(group, tags, strict=True))
    ]
    asks = [Ask(prompt(s.question), CHOICES, f" {s.answer}", tag) for s, tag in zip(group, tags, strict=True)]
    return Episode("+".join(s.id for s in group), (*reads, *asks))


def distance_label(segments: int) -> str:
    """``distance=`` in tokens, for a stand-in's distance in segments."""
    return f"distance={segments * SEGMENT}"


def invented_episode(study: InventedStudy) -> Episode:
    """Findings, filler up to the question, the question; all in whole segments of the stand-in's backbone."""
    ask = Ask(study.question, CHOICES, f" {study.answer}", "evidence", label=distance_label(study.distance))
    return Episode(study.id, (Read(study.evidence, tag="evidence"), Read(study.filler), ask))


def training_line(study: Study, encode: Encode, seed: int) -> Line:
    """The last `TRAIN_CONTEXT` tokens of the abstract, the question and the right answer; only the answer is scored."""
    text = "\n".join(study.contexts)
    back, question, (answer,) = encode_asked(encode, Before(text), prompt(study.question), [f" {study.answer}"])
    context = encode(text)[0]
    return line(context[: len(context) - back][-TRAIN_CONTEXT:], question, answer, seed)


def line(context: list[int], question: list[int], answer: list[int], seed: int) -> Line:
    """A training example of token ids."""
    ids = torch.tensor(context + question + answer, dtype=torch.long)
    scored, given = torch.zeros(len(ids), dtype=torch.bool), torch.zeros(len(ids), dtype=torch.bool)
    scored[len(ids) - len(answer) :] = True
    given[len(context) : len(ids) - len(answer)] = True
    return Line(ids, scored, given, seed)


class InventedCorpus:
    """Fresh invented studies in every batch.

    In a batch of `segments` segments half of the lines have that length and the others any length up to it: a model
    whose memory does not reach that far would otherwise unlearn to read, and its ceiling with it. Lines have one token
    more than whole segments of `SEGMENT`: the answer, predicted from the question's last word.

    Args:
        encode: the stand-in's tokenizer, one token per word.
    """

    def __init__(self, encode: Encode) -> None:
        self.encode = encode

    def batch(self, rows: int, segments: int, segment: int, rng: torch.Generator) -> list[Line]:
        """See `Corpus.batch`; the length of a segment is the stand-in's own."""
        del segment
        seeds = torch.randint(0, 2**31 - 1, (rows,), generator=rng).tolist()
        shorter = torch.randint(0, segments, (rows,), generator=rng).tolist()
        distances = [segments - 1 if row % 2 == 0 else shorter[row] for row in range(rows)]
        return [
            self._line(invent(Random(f"train {seed}"), distance), seed)
            for seed, distance in zip(seeds, distances, strict=True)
        ]

    def _line(self, study: InventedStudy, seed: int) -> Line:
        texts = (study.evidence + study.filler, study.question, f" {study.answer}")
        context, question, answer = (self.encode(text)[0] for text in texts)
        return line(context, question, answer, seed)


def _in_order(labels: "pd.Series[str]") -> list[str]:
    """The distances that occur, nearest first."""
    found = {str(name) for name in labels if str(name).startswith("distance=")}
    return sorted(found, key=lambda name: int(name.removeprefix("distance=")))


def _macro_f1(asks: pd.DataFrame, seed: int) -> Estimate:
    """Macro F1 of every seed, averaged over seeds."""
    predicted, answer, run = (asks[c].to_numpy() for c in ("predicted", "answer", "seed"))
    runs = np.unique(run)

    def score(rows: NDArray[np.intp]) -> float:
        parts = [rows[run[rows] == r] for r in runs]
        return float(np.mean([macro_f1(predicted[part], answer[part]) for part in parts if len(part)]))

    value, low, high = statistic_interval(score, asks["cluster"].to_numpy(dtype=str), seed=seed)
    return Estimate("macro_f1", value, low, high, asks["cluster"].nunique(), "", "share")


def _lift(asks: pd.DataFrame, seed: int) -> list[Estimate]:
    """(score - floor) / (ceiling - floor); nothing where a control is missing or the ceiling is no higher.

    Nothing also where questions are unanswered, of which there are no controls; else a question without one of the
    controls (its evidence is none) is in none of the three.
    """
    if unanswered(asks).any():
        return []
    table = asks.pivot_table(index=["cluster", "episode", "event"], columns="control", values="correct", aggfunc="mean")
    if not {"", "wiped", "ceiling"} <= set(table.columns):
        return []
    table = table[["", "wiped", "ceiling"]].dropna()
    score, floor, ceiling = (table[c].to_numpy() for c in ("", "wiped", "ceiling"))
    if not len(table) or ceiling.mean() <= floor.mean():
        return []

    def lift(rows: NDArray[np.intp]) -> float:
        room = ceiling[rows].mean() - floor[rows].mean()
        return float((score[rows].mean() - floor[rows].mean()) / room) if room > 0 else float("nan")

    clusters = table.index.get_level_values("cluster").to_numpy(dtype=str)
    value, low, high = statistic_interval(lift, clusters, seed=seed)
    return [Estimate("memory_lift", value, low, high, len(np.unique(clusters)), "", "share")]
