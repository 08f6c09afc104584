"""What the tasks about retention share: when a generated answer is a hit, training on books, and the metrics.

A hit is judged after normalisation (lower case, without punctuation and articles, as SQuAD's script does): the words of
an accepted answer follow one another in what was generated. The original's rule, the answer as it is somewhere in the
generated text, is `raw_hit`.
"""

import re
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from memory_bench.corpus import Corpus, Line
from memory_bench.data import Library
from memory_bench.episode import Encode, Estimate, Task, TrainingPlan
from memory_bench.finite import check_samples, checked, unanswered
from memory_bench.statistics.retention import half_life_estimates, lifts
from memory_bench.statistics.stats import mean_interval

from .language_modeling import books_corpus

CONTROLS = ("wiped", "foreign", "ceiling")
BYTES_PER_TOKEN = 6  # text handed over for a chunk of tokens: enough of it for every tokenizer, which cuts it exactly
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous blanks."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def hit(generated: str, accepted: Iterable[str]) -> bool:
    """Whether the words of an accepted answer stand in `generated`, both normalised."""
    said = f" {normalise(generated)} "
    return any(f" {wanted} " in said for wanted in map(normalise, accepted) if wanted)


def raw_hit(generated: str, answer: str) -> bool:
    """Whether the answer, without blanks around it, stands in `generated` letter by letter."""
    return answer.strip() in generated


def judge_document(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """`hit` as lm-eval's ``process_results``: of a document with ``answers`` and what was written."""
    return {"accuracy": float(hit(results[0], document["answers"]))}


class Retention(Task):
    """Questions after more and more text; trained, where anything is trained, as language models on books.

    The headline is the mean over all questions at all places where they are asked.
    """

    headline = "accuracy"
    chance = 0.0

    def plan(self, library: Library, *, pretrained: bool) -> TrainingPlan:
        """Books, as for language modelling: its checkpoints are used."""
        del library, pretrained
        return TrainingPlan("books")

    def corpus(self, library: Library, plan: TrainingPlan, encode: Encode) -> Corpus:
        """See `Task.corpus`."""
        del plan
        return books_corpus(library, encode)

    def correct(self, samples: pd.DataFrame) -> "pd.Series[float]":
        """1.0 for a hit; questions with choices are right or wrong."""
        check_samples(samples)
        free = _generated(samples)
        found = (samples["predicted"] == samples["answer"]).astype(float)
        for row, generated, accepted in samples.loc[free, ["generated", "accepted"]].itertuples():
            found[row] = float(isinstance(generated, str) and accepted is not None and hit(generated, accepted))
        return found

    def metrics(self, samples: pd.DataFrame, seed: int = 0) -> list[Estimate]:
        """Accuracy, the original's hits, log-probabilities; by what labels say and by control; lift and half-life.

        Intervals are over clusters (the document that questions share); the seeds of a question are averaged first.
        """
        asks = check_samples(samples)[samples["kind"] == "ask"].reset_index(drop=True)
        asks = asks.assign(
            correct=self.correct(asks), logprob=-asks["nll"], logprob_token=-asks["nll"] / asks["tokens"].clip(lower=1)
        )
        main = asks[asks["control"] == ""]
        if main.empty:
            return []
        found = [average("accuracy", main, "correct", "share", seed)]
        free = main[_generated(main)]
        if len(free):
            pairs = zip(free["generated"], free["answer"], strict=True)
            raw = free.assign(raw=[float(raw_hit(said, answer)) for said, answer in pairs])
            found.append(average("raw_hit", raw, "raw", "share", seed))
        found += likelihood("answer_logprob", main, "logprob", "nats", seed)
        found += likelihood("answer_logprob_token", main, "logprob_token", "nats/token", seed)
        for name, part in self.parts(main).items():
            found.append(average("accuracy", part, "correct", "share", seed, name))
            found += likelihood("answer_logprob_token", part, "logprob_token", "nats/token", seed, name)
        for control in CONTROLS:
            part = asks[asks["control"] == control]
            found += [] if part.empty else [average("accuracy", part, "correct", "share", seed, f"control:{control}")]
        return found + lifts(asks) + half_life_estimates(asks, self.chance, seed)

    def parts(self, asks: pd.DataFrame) -> Mapping[str, pd.DataFrame]:
        """Slices of the questions, by name, nearest first; here by the distance that the label names."""
        far = asks["label"].str.extract(r"distance=(\d+)", expand=False).astype(int)
        return {f"distance={distance}": asks[far == distance] for distance in sorted(far.unique())}


def asked_line(encode: Encode, text: str, questions: Sequence[tuple[str, str]], seed: int) -> Line:
    """A training line: `text`, then each question with its answer; only answers are scored, questions are given."""
    ids = encode(text)[0]
    scored, given = [False] * len(ids), [False] * len(ids)
    for question, answer in questions:
        asked, right = encode(question)[0], encode(answer)[0]
        ids = ids + asked + right
        scored += [False] * len(asked) + [True] * len(right)
        given += [True] * len(asked) + [False] * len(right)
    return Line(torch.tensor(ids), torch.tensor(scored), torch.tensor(given), seed)


def _generated(samples: pd.DataFrame) -> "pd.Series[bool]":
    """Which rows had no choices (that is, the right answer alone)."""
    return samples["choice_nll"].map(lambda nll: not hasattr(nll, "__len__") or len(nll) < 2).astype(bool)


def likelihood(metric: str, asks: pd.DataFrame, column: str, unit: str, seed: int, name: str = "") -> list[Estimate]:
    """`average` of what only an answer has; nothing where questions are unanswered: the others may be easier."""
    return [] if unanswered(asks).any() else [average(metric, asks, column, unit, seed, name)]


def average(
    metric: str, asks: pd.DataFrame, column: str, unit: str, seed: int, name: str = "", *, higher_is_better: bool = True
) -> Estimate:
    """The mean of `column` over questions, seeds averaged first, with its interval over clusters, as slice `name`.

    Raises:
        NotFinite: a value is not finite.
    """
    checked(asks[column], f"values of {column}")
    each = asks.groupby(["cluster", "episode", "event"], as_index=False)[[column]].mean()
    value, low, high = mean_interval(each[column].to_numpy(), each["cluster"].to_numpy(dtype=str), seed=seed)
    return Estimate(metric, value, low, high, each["cluster"].nunique(), name, unit, higher_is_better)
