"""Fact updates: keys are stated again with other values, and the newest one counts.

After the fact-update task of MemoryPrompt (Rakotonirina and Baroni 2024, arXiv:2402.15268), made by a program
(`memory_bench.data.updates`). Unusual here:

- Every answer is the newest value (*accuracy*), an older one of the same key (*stale*), or foreign (*alien*: another
  key's, or never stated): the three rates add up to one. No two statements of an episode share a value, and a question
  has a fixed number of choices, so the rate of a guess is known for each: `stale_chance` and `alien_chance`, which
  change with the number of updates, stand beside them.
- Who remembers the values of a key, but not their order, reaches 1 / (1 + updates).
- Every number of updates comes with every distance equally often; distance counts from the newest statement.
- ``words``: the closed vocabulary and the backbone of key-value, trained from scratch on such episodes, up to eight
  segments long. ``prose``: English about invented persons and places, for pretrained backbones.
- The ceiling has the newest statement in the prompt, and no older one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

import pandas as pd
import torch

from memory_bench.corpus import Corpus, Line
from memory_bench.data import Library
from memory_bench.data.facts import SEGMENT, VALUES
from memory_bench.data.lives import FEWEST
from memory_bench.data.updates import (
    PROSE_CHOICES,
    Asked,
    Statement,
    UpdateEpisode,
    balanced_cases,
    drawn_cases,
    make_updates,
)
from memory_bench.episode import Ask, Encode, Episode, Estimate, Read, TrainingPlan
from memory_bench.errors import UserError
from memory_bench.finite import check_samples, unanswered
from memory_bench.statistics.retention import half_life_estimates

from .answers import CONTROLS, Retention, asked_line, average
from .language_modeling import books_corpus

MOST_KEYS = 3  # questions and statements of all keys fit one segment
STATEMENT = 64  # tokens that a statement in prose may have at most


class FactUpdates(Retention):
    """Facts that are replaced, asked for after several updates and at several distances."""

    @dataclass(frozen=True, slots=True)
    class Config:
        """Options of the task; what changes the facts changes the training as well."""

        # words: a closed vocabulary, trained from scratch; prose: English for a pretrained backbone.
        wording: Literal["words", "prose"] = "words"
        # How often a key is stated again.
        updates: tuple[int, ...] = (0, 1, 2, 4)
        # Segments between a key's last statement and the questions.
        distances: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
        # Episodes for every number of updates and distance.
        repeats: int = 25
        # Keys of an episode, each of which is asked for.
        keys: int = 2
        # A key's earlier statements are within so many segments before its last.
        spread: int = 8
        # Tokens of a segment in prose; in words it is 16.
        chunk: int = 128

        def __post_init__(self) -> None:
            for name, least in (("updates", 0), ("distances", 0)):
                numbers = getattr(self, name)
                if not numbers or min(numbers) < least or len(set(numbers)) < len(numbers):
                    raise UserError(f"fact-updates: {name} must be different numbers from {least}, not {numbers}.")
            if not 1 <= self.keys <= MOST_KEYS or self.repeats < 1:
                raise UserError(f"fact-updates: keys must be from 1 to {MOST_KEYS} and repeats at least 1.")
            if self.spread < max(1, *self.updates):
                raise UserError(f"fact-updates: spread must be at least the most updates, {max(1, *self.updates)}.")
            most, words = self.keys * (1 + max(self.updates)), self.wording == "words"
            if most > (room := len(VALUES) if words else FEWEST) or max(self.updates) >= self.choices:
                raise UserError(f"fact-updates: keys * (1 + updates) must be at most {room}, not {most}.")
            if not words and self.chunk < STATEMENT * self.keys:
                raise UserError(f"fact-updates: chunk must be at least {STATEMENT} a key, {STATEMENT * self.keys}.")

        @property
        def choices(self) -> int:
            """Of every question."""
            return len(VALUES) if self.wording == "words" else PROSE_CHOICES

        @property
        def segment(self) -> int:
            """Tokens of a segment."""
            return SEGMENT if self.wording == "words" else self.chunk

    version = 1
    needs = "fact-updates"
    source = "made by a program, after the fact updates of MemoryPrompt (arXiv:2402.15268)"

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()
        self.chance = 1 / self.config.choices

    def episodes(self, library: Library, limit: int | None) -> Iterator[Episode]:
        """`limit` counts episodes; whole rounds of them have all numbers of updates with all distances."""
        own = self.config
        count = own.repeats * len(own.updates) * len(own.distances)
        prose = own.chunk if own.wording == "prose" else 0
        cases = balanced_cases(own.updates, own.distances, own.keys, count)
        for number, case in enumerate(cases[:limit]):
            rng = Random(f"test {own.wording} {number}")
            yield episode(
                make_updates(rng, case, own.spread, prose=prose, name=f"test-{number:04d}"), own.segment, prose
            )

    def plan(self, library: Library, *, pretrained: bool) -> TrainingPlan:
        """The backbone of key-value and a curriculum of its own for ``words``; books for ``prose``."""
        own, usual = self.config, self.Config()
        if own.wording == "prose":
            return TrainingPlan("books")
        changed = [name for name in ("updates", "keys", "spread") if getattr(own, name) != getattr(usual, name)]
        name = "fact-updates" + "".join(f",{name}={getattr(own, name)}" for name in changed)
        return TrainingPlan(name.replace(" ", ""), recipe="fact-updates", backbone="key-value")

    def corpus(self, library: Library, plan: TrainingPlan, encode: Encode) -> Corpus:
        """See `Task.corpus`."""
        return books_corpus(library, encode) if plan.corpus == "books" else UpdatesCorpus(encode, self.config)

    def levels(self, library: Library) -> Mapping[str, float]:
        """A guess among the choices, and one among the values that the key has had."""
        own = self.config.updates
        return {"chance": self.chance, "any value of the key": sum(1 / (1 + n) for n in own) / len(own)}

    def metrics(self, samples: pd.DataFrame, seed: int = 0) -> list[Estimate]:
        """As `Retention.metrics`, and stale and alien rates with their chance; half-lives by number of updates.

        The rates are of all questions, and are not given where some are unanswered.
        """
        found = super().metrics(samples, seed)
        asks = check_samples(samples)[samples["kind"] == "ask"].reset_index(drop=True)
        main = asks[asks["control"] == ""]
        if main.empty or unanswered(main).any():
            return found
        asks = told_apart(asks)
        main = asks[asks["control"] == ""]
        for name, part in {"": main, **self.parts(main)}.items():
            for rate in ("stale", "alien"):
                found.append(average(f"{rate}_rate", part, rate, "share", seed, name, higher_is_better=False))
                found.append(replace(_chance(part, rate), slice=name))
        for kind, name in (("other", "value=another key's"), ("unstated", "value=never stated")):
            found.append(average("alien_rate", main, kind, "share", seed, name, higher_is_better=False))
            found.append(replace(_chance(main, "alien", kind), slice=name))
        for control in CONTROLS:
            part = asks[asks["control"] == control]
            for rate in ("stale", "alien") if len(part) else ():
                name = f"control:{control}"
                found.append(average(f"{rate}_rate", part, rate, "share", seed, name, higher_is_better=False))
        for number, part in asks.assign(correct=self.correct(asks)).groupby("updates"):
            found += [replace(e, slice=f"updates={number}") for e in half_life_estimates(part, self.chance, seed)]
        return found

    def parts(self, asks: pd.DataFrame) -> Mapping[str, pd.DataFrame]:
        """By distance, by number of updates, and by both."""
        number = asks["label"].str.extract(r"updates=(\d+)", expand=False).astype(int)
        far = asks["label"].str.extract(r"distance=(\d+)", expand=False).astype(int)
        numbers, places = sorted(number.unique()), sorted(far.unique())
        both = {f"updates={n},distance={d}": asks[(number == n) & (far == d)] for n in numbers for d in places}
        return {
            **super().parts(asks),
            **{f"updates={n}": asks[number == n] for n in numbers},
            **{name: part for name, part in both.items() if len(part)},
        }


def told_apart(asks: pd.DataFrame) -> pd.DataFrame:
    """Questions with what their labels say, and 1.0 or 0.0 for what each answer is.

    Returns:
        With columns ``updates`` and ``choices`` (numbers), ``stale``, ``alien``, of the alien ones ``other`` (another
        key's value) and ``unstated``, and ``n_other``, how many of the choices are other keys' values.
    """
    labels = asks["label"]
    older = labels.str.extract(r"older=([^,]*)", expand=False).str.split("|")
    others = labels.str.extract(r"others=([^,]*)", expand=False).str.split("|")
    said = asks["predicted"].str.strip()
    stale = [float(word in known) for word, known in zip(said, older, strict=True)]
    other = [float(word in known) for word, known in zip(said, others, strict=True)]
    right = (asks["predicted"] == asks["answer"]).astype(float)
    return asks.assign(
        updates=labels.str.extract(r"updates=(\d+)", expand=False).astype(int),
        choices=asks["choice_nll"].map(len),
        n_other=[len([word for word in known if word]) for known in others],
        stale=stale,
        other=other,
        alien=1.0 - right - stale,
        unstated=1.0 - right - stale - other,
    )


def _chance(asks: pd.DataFrame, rate: str, kind: str = "") -> Estimate:
    """The rate of a guess among the choices of these questions: known, so without an interval."""
    foreign = asks["choices"] - 1 - asks["updates"]
    counts = {
        "stale": asks["updates"],
        "alien": foreign,
        "other": asks["n_other"],
        "unstated": foreign - asks["n_other"],
    }
    value = float((counts[kind or rate] / asks["choices"]).mean())
    return Estimate(f"{rate}_chance", value, None, None, asks["cluster"].nunique(), "", "share", False)


def episode(made: UpdateEpisode, segment: int, prose: int) -> Episode:
    """What is read, segment by segment, and every question on its own; prose is cut to `segment` tokens a segment."""
    events: list[Read | Ask] = []
    for parts in made.segments:
        if not prose:
            events += [_read(part) for part in parts]
            continue
        statements = [part for part in parts if isinstance(part, Statement)]
        fillers = [part for part in parts if isinstance(part, str)]
        if not statements:
            events.append(Read(f" {fillers[0]}", tokens=segment))
        for number, (filler, statement) in enumerate(zip(fillers, statements, strict=False)):
            share = segment * (number + 1) // len(statements) - segment * number // len(statements)
            events.append(replace(_read(statement), tokens=share, lead=f" {filler}"))
    return Episode(made.id, (*events, *(_ask(asked, segment) for asked in made.questions)))


def _read(part: Statement | str) -> Read:
    """The newest statement of a key is the evidence."""
    if isinstance(part, str):
        return Read(part)
    return Read(part.text, tag=f"newest of {part.key}" if part.newest else "")


def _ask(asked: Asked, segment: int) -> Ask:
    (updates, distance), older, others = asked.case, _listed(asked.older), _listed(asked.others, asked.choices)
    label = f"updates={updates},distance={distance * segment},older={older},others={others}"
    return Ask(asked.prompt, asked.choices, asked.answer, f"newest of {asked.key}", label)


def _listed(values: tuple[str, ...], among: tuple[str, ...] | None = None) -> str:
    return "|".join(value.strip() for value in values if among is None or value in among)


class UpdatesCorpus:
    """Fresh episodes in every batch, all of the batch's length, with their questions and answers in the last segment.

    Args:
        encode: the tokenizer, one token per word.
        config: of the task.
    """

    def __init__(self, encode: Encode, config: FactUpdates.Config) -> None:
        self.encode = encode
        self.config = config

    def batch(self, rows: int, segments: int, segment: int, rng: torch.Generator) -> list[Line]:
        """See `Corpus.batch`; the length of a segment is the task's own."""
        del segment
        return [self._line(seed, segments) for seed in torch.randint(0, 2**31 - 1, (rows,), generator=rng).tolist()]

    def _line(self, seed: int, segments: int) -> Line:
        own, rng = self.config, Random(f"train {seed}")
        made = make_updates(rng, drawn_cases(rng, own.updates, own.keys, segments), own.spread, segments=segments)
        text = "".join(p if isinstance(p, str) else p.text for parts in made.segments for p in parts)
        return asked_line(self.encode, text, [(q.prompt, q.answer) for q in made.questions], seed)
