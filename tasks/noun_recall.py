"""Noun recall: a list is read, then, after a delay, read again. How much less does it surprise?

After Armeni et al. 2022 (arXiv:2210.13569). The measure is the drop in surprisal (nats per noun) from the first reading
to the second. Two controls tell memory for the list from other reasons: the same nouns shuffled (what was read, but not
in which order) and a new list (neither).

Unusual here:

- The stream is read once; the list is read again on forks of it, after every delay, noun by noun: each noun is a
  question whose prompt is the list up to it.
- ``words`` (the default) has a closed vocabulary, a backbone of its own and a training of its own, from scratch;
  ``prose`` is English for the chosen backbone, which needs to have been trained on some.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Literal

import pandas as pd
import torch

from memory_bench.corpus import Corpus, Line
from memory_bench.data import Library
from memory_bench.data.facts import SEGMENT
from memory_bench.data.nouns import NounEpisode, Reading, make_nouns, noun_episodes
from memory_bench.episode import Ask, Encode, Episode, Estimate, Read, Task, TrainingPlan
from memory_bench.errors import UserError
from memory_bench.finite import check_samples, unanswered

from .answers import average
from .language_modeling import books_corpus

LONGEST = (SEGMENT - 3) // 2  # nouns: both readings of a list share a segment in the first stage of training


class NounRecall(Task):
    """A list of nouns is read again after several delays; the drop in surprisal is what was kept."""

    @dataclass(frozen=True, slots=True)
    class Config:
        """Options of the task."""

        # words: a closed vocabulary, trained from scratch; prose: English for a pretrained backbone.
        wording: Literal["words", "prose"] = "words"
        # Nouns in a list.
        length: int = 5
        # Segments of 16 words between the two readings.
        delays: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
        # Lists.
        episodes: int = 50

        def __post_init__(self) -> None:
            if list(self.delays) != sorted(set(self.delays)) or not self.delays or self.delays[0] < 1:
                raise UserError(f"noun-recall: delays must be increasing numbers from 1, not {self.delays}.")
            if not 2 <= self.length <= LONGEST or self.episodes < 1:
                raise UserError(f"noun-recall: length must be from 2 to {LONGEST} and episodes at least 1.")

    version = 1
    headline = "surprisal_drop"
    needs = "nouns"
    source = "made by a program, after Armeni et al. 2022 (arXiv:2210.13569)"

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()

    def episodes(self, library: Library, limit: int | None) -> Iterator[Episode]:
        """`limit` counts lists."""
        own = self.config
        yield from map(episode, noun_episodes("test", own.episodes, own.wording, own.length, own.delays)[:limit])

    def plan(self, library: Library, *, pretrained: bool) -> TrainingPlan:
        """A backbone and curriculum of its own for ``words``; books for ``prose``."""
        if self.config.wording == "prose":
            return TrainingPlan("books")
        return TrainingPlan(f"noun-recall,length={self.config.length}", recipe="noun-recall", backbone="noun-recall")

    def corpus(self, library: Library, plan: TrainingPlan, encode: Encode) -> Corpus:
        """See `Task.corpus`."""
        return books_corpus(library, encode) if plan.corpus == "books" else NounCorpus(encode, self.config.length)

    def metrics(self, samples: pd.DataFrame, seed: int = 0) -> list[Estimate]:
        """The drop for the same list, its accuracy and the share of surprisal left; by delay and position; controls.

        Intervals are over lists; the seeds of a noun are averaged first.
        """
        check_samples(samples)
        # What only an answer has cannot be averaged over those that there are: the others may be harder.
        whole = samples[~unanswered(samples)]
        if len(whole) < len(samples):
            return []
        pairs = drops(samples)
        same = pairs[(pairs["control"] == "") & (pairs["kind"] == "same")]
        if same.empty:
            return []
        found = [average("surprisal_drop", same, "drop", "nats", seed)]
        found.append(average("surprisal", same, "nll", "nats", seed, higher_is_better=False))
        for value, part in same.groupby("delay"):
            found.append(average("surprisal_drop", part, "drop", "nats", seed, f"delay={value}"))
        for value, part in same.groupby("position"):
            found.append(average("surprisal_drop", part, "drop", "nats", seed, f"position={value}"))
        for kind in ("shuffled", "novel"):
            part = pairs[(pairs["control"] == "") & (pairs["kind"] == kind)]
            found.append(average("surprisal_drop", part, "drop", "nats", seed, f"list={kind}"))
            for value, late in part.groupby("delay"):
                found.append(average("surprisal_drop", late, "drop", "nats", seed, f"list={kind},delay={value}"))
        for control in ("wiped", "foreign", "ceiling"):
            part = pairs[(pairs["control"] == control) & (pairs["kind"] == "same")]
            if not part.empty:
                found.append(average("surprisal_drop", part, "drop", "nats", seed, f"control:{control}"))
        return found

    def headline_rows(self, samples: pd.DataFrame) -> pd.DataFrame:
        """The second readings of the same list."""
        return samples[samples["label"].str.startswith("same:")]

    def levels(self, library: Library) -> Mapping[str, float]:
        """Nothing kept: the second reading surprises as much as the first."""
        return {"nothing kept": 0.0}


def episode(made: NounEpisode) -> Episode:
    """The first reading is asked before it is read; the second ones after every filler."""
    events: list[Read | Ask] = [*asks(made.first)]
    events.append(Read(made.first.opening + "".join(made.first.nouns), tag="list"))
    for filler in made.fillers:
        events.append(Read(filler))
        events += [ask for reading in made.readings for ask in asks(reading)]
    return Episode(made.id, tuple(events))


def asks(reading: Reading) -> list[Ask]:
    """One question a noun: what comes after the list up to it? The label says ``kind:position``."""
    before = [reading.opening + "".join(reading.nouns[:i]) for i in range(len(reading.nouns))]
    return [
        Ask(text, (), noun, "" if reading.kind == "first" else "list", f"{reading.kind}:{i + 1}", max_tokens=1)
        for i, (text, noun) in enumerate(zip(before, reading.nouns, strict=True))
    ]


def drops(samples: pd.DataFrame) -> pd.DataFrame:
    """One row a noun of a second reading: ``kind``, ``position``, ``delay`` (tokens), ``nll`` and its ``drop``.

    The first reading it is compared with is the same model's of the noun at that position, memory empty.
    """
    table = samples[samples["kind"] == "ask"]
    table = table.assign(
        kind=table["label"].str.split(":").str[0], position=table["label"].str.split(":").str[1].astype(int)
    )
    read = table[(table["kind"] == "first") & (table["control"] == "")]
    first = read.set_index(["seed", "episode", "position"])["nll"].rename("first")
    second = table[table["kind"] != "first"].assign(delay=table["distance_tokens"])
    second = second.join(first, on=["seed", "episode", "position"])
    return second.assign(drop=second["first"] - second["nll"])


class NounCorpus:
    """Fresh lists in every batch, read again in the last segment; only the second reading is scored.

    Args:
        encode: the tokenizer, one token per word.
        length: nouns in a list.
    """

    def __init__(self, encode: Encode, length: int) -> None:
        self.encode = encode
        self.length = length

    def batch(self, rows: int, segments: int, segment: int, rng: torch.Generator) -> list[Line]:
        """See `Corpus.batch`; the length of a segment is the task's own."""
        del segment
        seeds = torch.randint(0, 2**31 - 1, (rows,), generator=rng).tolist()
        return [
            self._line(make_nouns(Random(f"train {seed}"), "words", self.length, (segments - 1,)), seed)
            for seed in seeds
        ]

    def _line(self, made: NounEpisode, seed: int) -> Line:
        same = made.readings[0]
        ids = self.encode(made.first.opening + "".join(made.first.nouns) + made.fillers[0] + same.opening)[0]
        again = self.encode("".join(same.nouns))[0]
        scored = torch.zeros(len(ids) + len(again), dtype=torch.bool)
        scored[len(ids) :] = True
        return Line(torch.tensor(ids + again), scored, seed=seed)
