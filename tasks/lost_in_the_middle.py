"""Lost in the middle: of many pairs of keys and values one is asked for, at several places among them.

After the key-value retrieval of Liu et al. 2023 (arXiv:2307.03172). Unusual here:

- A context is read once, and every place is asked for on a fork: places are compared on the same contexts.
- ``words``: the closed vocabulary, backbone and curriculum of key-value, two pairs a segment. ``json``: the original's
  objects of random identifiers, for pretrained backbones; the value is written, and counts where it stands in it.
- *Primacy* is the accuracy at the first place less that of the places between first and last, *recency* that at the
  last place less it: a model that loses the middle has both above zero.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Literal

import pandas as pd
import torch

from memory_bench.corpus import Corpus, Line
from memory_bench.data import Library
from memory_bench.data.facts import KEYS, SEGMENT, VALUES
from memory_bench.data.pairs import ASKED, Pairs, json_pairs, word_pairs
from memory_bench.episode import Ask, Encode, Episode, Estimate, Read, TrainingPlan
from memory_bench.errors import UserError
from memory_bench.finite import check_samples, unanswered

from .answers import Retention, asked_line, average
from .language_modeling import books_corpus

DENSEST = (SEGMENT - 3 * ASKED) // 2  # pairs that share a segment with the questions, in the first stage of training
MOST = 1000  # pairs of an object


class LostInTheMiddle(Retention):
    """One of many pairs is asked for, wherever it stands."""

    @dataclass(frozen=True, slots=True)
    class Config:
        """Options of the task."""

        # words: a closed vocabulary, trained from scratch; json: objects of identifiers for a pretrained backbone.
        wording: Literal["words", "json"] = "words"
        # Pairs in a context.
        pairs: int = 16
        # Places that are asked for, spread evenly from the first pair to the last.
        places: int = 6
        # Contexts.
        episodes: int = 100
        # Pairs in a segment of 16 words; changes the training as well.
        density: int = 2
        # Tokens of a written answer.
        max_tokens: int = 48

        def __post_init__(self) -> None:
            most = len(KEYS) if self.wording == "words" else MOST
            if not 3 <= self.pairs <= most:
                raise UserError(
                    f"lost-in-the-middle: pairs must be from 3 to {most} in {self.wording}, not {self.pairs}."
                )
            if not 3 <= self.places <= self.pairs:
                raise UserError(
                    f"lost-in-the-middle: places must be from 3 to pairs = {self.pairs}, not {self.places}."
                )
            if not ASKED <= self.density <= DENSEST or min(self.episodes, self.max_tokens) < 1:
                raise UserError(
                    f"lost-in-the-middle: density must be from {ASKED} to {DENSEST}, "
                    "episodes and max_tokens at least 1."
                )

        @property
        def asked(self) -> tuple[int, ...]:
            """Pairs before the one that is asked for, at every place."""
            return tuple(round(n * (self.pairs - 1) / (self.places - 1)) for n in range(self.places))

    version = 1
    needs = "lost-in-the-middle"
    source = "made by a program, after Liu et al. 2023 (arXiv:2307.03172)"

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()
        self.chance = 1 / len(VALUES) if self.config.wording == "words" else 0.0

    def episodes(self, library: Library, limit: int | None) -> Iterator[Episode]:
        """`limit` counts contexts."""
        for number in range(self.config.episodes)[:limit]:
            yield self._episode(f"test-{number:04d}", Random(f"test {self.config.wording} {number}"))

    def _episode(self, name: str, rng: Random) -> Episode:
        """What is read, and a question about every place."""
        own = self.config
        words = own.wording == "words"
        made = word_pairs(rng, own.pairs, own.density) if words else json_pairs(rng, own.pairs)
        stated = {made.places[place]: f"pair {place}" for place in own.asked}
        reads = [Read(text, tag=stated.get(at, "")) for at, text in enumerate(made.texts) if text]
        return Episode(name, (*reads, *(self._ask(made, place) for place in own.asked)))

    def _ask(self, made: Pairs, place: int) -> Ask:
        own, pair = self.config, made.pairs[place]
        if own.wording == "json":
            accepted = (pair.value,)
            return Ask(pair.question, (), pair.answer, f"pair {place}", f"place={place}", own.max_tokens, accepted)
        segments = -(-own.pairs // own.density) - place // own.density
        choices = tuple(f" {value}" for value in VALUES)
        label = f"place={place},distance={SEGMENT * segments}"
        return Ask(pair.question, choices, pair.answer, f"pair {place}", label)

    def plan(self, library: Library, *, pretrained: bool) -> TrainingPlan:
        """Backbone and curriculum of key-value for ``words``; books for ``json``."""
        if self.config.wording == "json":
            return TrainingPlan("books")
        changed = "" if self.config.density == self.Config().density else f",density={self.config.density}"
        return TrainingPlan(f"lost-in-the-middle{changed}", recipe="key-value", backbone="key-value")

    def corpus(self, library: Library, plan: TrainingPlan, encode: Encode) -> Corpus:
        """See `Task.corpus`."""
        return books_corpus(library, encode) if plan.corpus == "books" else PairsCorpus(encode, self.config.density)

    def levels(self, library: Library) -> Mapping[str, float]:
        """A guess among the values; of identifiers there is none."""
        return {"chance": self.chance}

    def metrics(self, samples: pd.DataFrame, seed: int = 0) -> list[Estimate]:
        """As `Retention.metrics`, by place, with primacy and recency; see above.

        Those two are differences on the same contexts, and are not given where some questions are unanswered.
        """
        if self.config.wording == "json":  # tokens between depend on the identifiers: their distances are no places
            samples = samples.assign(distance_tokens=-1)
        found = super().metrics(samples, seed)
        asks = check_samples(samples)[samples["kind"] == "ask"].reset_index(drop=True)
        main = asks.assign(correct=self.correct(asks), place=_place(asks))[asks["control"] == ""]
        if main.empty or unanswered(main).any():
            return found
        first, last = main["place"].min(), main["place"].max()
        context = ["seed", "cluster", "episode"]
        middle = main[~main["place"].isin([first, last])].groupby(context)["correct"].mean()
        for name, place in (("primacy", first), ("recency", last)):
            ends = main[main["place"] == place].groupby(context)["correct"].mean()
            gain = (ends - middle).dropna().rename("gain").reset_index().assign(event=0)
            found += [average(name, gain, "gain", "share", seed, higher_is_better=False)] if len(gain) else []
        return found

    def parts(self, asks: pd.DataFrame) -> Mapping[str, pd.DataFrame]:
        """By place, and by distance where it is known in segments."""
        place = _place(asks)
        far = super().parts(asks) if self.config.wording == "words" else {}
        return {**{f"place={n}": asks[place == n] for n in sorted(place.unique())}, **far}


def _place(asks: pd.DataFrame) -> "pd.Series[int]":
    """How many pairs stand before the one that is asked for."""
    return asks["label"].str.extract(r"place=(\d+)", expand=False).astype(int)


class PairsCorpus:
    """Fresh contexts in every batch, all of the batch's length, with questions about two of their pairs at the end.

    Args:
        encode: the tokenizer, one token per word.
        density: pairs in a segment.
    """

    def __init__(self, encode: Encode, density: int) -> None:
        self.encode = encode
        self.density = density

    def batch(self, rows: int, segments: int, segment: int, rng: torch.Generator) -> list[Line]:
        """See `Corpus.batch`; the length of a segment is the task's own."""
        del segment
        return [self._line(seed, segments) for seed in torch.randint(0, 2**31 - 1, (rows,), generator=rng).tolist()]

    def _line(self, seed: int, segments: int) -> Line:
        rng = Random(f"train {seed}")
        made = word_pairs(rng, min(len(KEYS), self.density * max(1, segments - 1)), self.density, segments=segments)
        questions = [(pair.question, pair.answer) for pair in rng.sample(made.pairs, ASKED)]
        return asked_line(self.encode, "".join(made.texts), questions, seed)
