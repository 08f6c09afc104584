"""Colours: a thing's colour is told, other sentences are read, then it is asked for."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import pandas as pd
import torch

from memory_bench.corpus import Corpus, Line, LineCorpus
from memory_bench.data import Library, Source
from memory_bench.episode import Ask, Encode, Episode, Estimate, Read, Task, TrainingPlan
from memory_bench.statistics.stats import mean_interval

COLOURS = (" red", " green", " blue")


class Colours(Task):
    """Is a colour that was told still known after other sentences?"""

    @dataclass(frozen=True, slots=True)
    class Config:
        """Options of the task."""

        questions: int = 60
        between: int = 8  # sentences between the fact and the question

    headline = "accuracy"  # the first metric
    needs = ""  # no data of the library: `data` says what it is made of
    source = "An example."

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()

    def episodes(self, library: Library, limit: int | None) -> Iterator[Episode]:
        """See `Task.episodes`; `limit` counts questions."""
        for number in range(self.config.questions)[:limit]:
            fact, filler, question, answer = self.draw(f"test {number}")
            ask = Ask(question, COLOURS, answer, evidence="fact")
            yield Episode(str(number), (Read(fact, tag="fact"), Read(filler), ask))

    def draw(self, seed: str) -> tuple[str, str, str, str]:
        """Fact, filler, question and answer, the same for the same seed."""
        rng = Random(f"colours {seed}")
        thing, colour = rng.choice(("boat", "door", "coat")), rng.choice(COLOURS)
        filler = "".join(f" Then came day {rng.randrange(100)}." for _ in range(self.config.between))
        return f"The {thing} is{colour}.", filler, f" What is the {thing}? It is", colour

    def plan(self, library: Library, *, pretrained: bool) -> TrainingPlan:
        """See `Task.plan`."""
        return TrainingPlan("colours")  # what `corpus` makes; ("books" would share the trainings of pg19)

    def corpus(self, library: Library, plan: TrainingPlan, encode: Encode) -> Corpus:
        """See `Task.corpus`: other draws than the test's."""
        lines = []
        for number in range(500):
            *text, answer = self.draw(f"train {number}")
            before, after = (encode(part)[0] for part in ("".join(text), answer))
            ids = torch.tensor(before + after)
            scored = torch.arange(len(ids)) >= len(before)  # only the answer counts
            lines.append(Line(ids, scored, seed=number))
        return LineCorpus(lines)

    def metrics(self, samples: pd.DataFrame, seed: int = 0) -> list[Estimate]:
        """Accuracy, and that of every control."""
        found = []
        for control, part in samples[samples["kind"] == "ask"].groupby("control"):
            right = (part["predicted"] == part["answer"]).astype(float)
            value, low, high = mean_interval(right, part["cluster"], seed=seed)
            name = f"control:{control}" if control else ""
            found.append(Estimate("accuracy", value, low, high, part["cluster"].nunique(), name, "share"))
        return found  # "" sorts first: the headline

    def data(self, library: Library) -> Source:
        """See `Task.data`: made by this program."""
        return Source("colours", "program", "colours", "1", stand_in=False)  # "1": changed when `draw` is
