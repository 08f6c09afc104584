"""Key-value: facts are stated once, then asked for after more and more text.

Unusual here:

- Everything is made by a program (`memory_bench.data.facts`) in a closed vocabulary, with a small backbone of its own
  that is trained from scratch on such episodes: minutes on two cores, and no model can know the facts beforehand.
- Every distance has episodes of its own, and the questions come in the last segment only: a question asked on the way
  would refresh what it asks for.
- Training sees distances up to seven segments; the test asks for up to 32. What lies beyond is extrapolation.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from random import Random

import torch

from memory_bench.corpus import Corpus, Line
from memory_bench.data import Library
from memory_bench.data.facts import SEGMENT, VALUES, FactEpisode, Setting, fact_episodes, make_facts
from memory_bench.episode import Ask, Encode, Episode, Read, TrainingPlan
from memory_bench.errors import UserError

from .answers import Retention, asked_line

CHOICES = tuple(f" {value}" for value in VALUES)


class KeyValue(Retention):
    """Facts about keys, asked for at several distances; from scratch, on a backbone of its own."""

    @dataclass(frozen=True, slots=True)
    class Config:
        """Options of the task; those of the facts change the training as well."""

        # Segments of 16 words between the facts and the questions.
        distances: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
        # Episodes per distance.
        episodes: int = 100
        # Facts stated in an episode.
        load: int = 2
        # Of them that are asked for.
        asked: int = 2
        # Facts about other keys in every segment between.
        distractors: int = 0
        # Of the facts, how many had another value before.
        outdated: int = 0

        def __post_init__(self) -> None:
            if not self.distances or min(self.distances) < 0 or len(set(self.distances)) < len(self.distances):
                raise UserError(f"key-value: distances must be different numbers of segments, not {self.distances}.")
            if self.episodes < 1:
                raise UserError(f"key-value: episodes must be at least 1, not {self.episodes}.")
            if problem := self.setting.problem():
                raise UserError(f"key-value: {problem}.")

        @property
        def setting(self) -> Setting:
            """What the facts are like."""
            return Setting(self.load, self.asked, self.distractors, self.outdated)

    version = 1
    needs = "key-value"
    chance = 1 / len(VALUES)
    source = "made by a program; after the associative-recall tasks of the recurrent-memory papers"

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()

    def episodes(self, library: Library, limit: int | None) -> Iterator[Episode]:
        """`limit` counts episodes, which come in turn from the distances."""
        setting = self.config.setting
        groups = [fact_episodes("test", self.config.episodes, setting, d) for d in self.config.distances]
        yield from map(episode, list(chain.from_iterable(zip(*groups, strict=True)))[:limit])

    def plan(self, library: Library, *, pretrained: bool) -> TrainingPlan:
        """Its own backbone and curriculum, whatever backbone was chosen."""
        changed = {k: v for k, v in asdict(self.config.setting).items() if v != asdict(Setting())[k]}
        name = "key-value" + "".join(f",{k}={v}" for k, v in changed.items())
        return TrainingPlan(name, recipe="key-value", backbone="key-value")

    def corpus(self, library: Library, plan: TrainingPlan, encode: Encode) -> Corpus:
        """See `Task.corpus`."""
        return FactsCorpus(encode, self.config.setting)

    def levels(self, library: Library) -> Mapping[str, float]:
        """A guess among the values."""
        return {"chance": self.chance}


def episode(made: FactEpisode) -> Episode:
    """The facts, filler up to the questions, and every question on its own."""
    label = f"distance={made.distance * SEGMENT}"
    asks = [Ask(question, CHOICES, answer, "evidence", label) for question, answer in made.questions]
    return Episode(made.id, (Read(made.evidence, tag="evidence"), Read(made.filler), *asks))


class FactsCorpus:
    """Fresh episodes in every batch, all of the batch's length, with their questions and answers in the last segment.

    Args:
        encode: the tokenizer, one token per word.
        setting: how hard the facts are.
    """

    def __init__(self, encode: Encode, setting: Setting) -> None:
        self.encode = encode
        self.setting = setting

    def batch(self, rows: int, segments: int, segment: int, rng: torch.Generator) -> list[Line]:
        """See `Corpus.batch`; the length of a segment is the task's own."""
        del segment
        seeds = torch.randint(0, 2**31 - 1, (rows,), generator=rng).tolist()
        return [self._line(make_facts(Random(f"train {seed}"), self.setting, segments - 1), seed) for seed in seeds]

    def _line(self, made: FactEpisode, seed: int) -> Line:
        return asked_line(self.encode, made.evidence + made.filler, made.questions, seed)
