"""Pairs of keys and values, one of which is asked for: does its place among them matter? Made by a program.

- ``words``: the closed vocabulary of key-value (`memory_bench.data.facts`), a few pairs in every segment at random
  places, filler between, and the questions in the segment after the last pair.
- ``json``: an object of random identifiers, with the lines and the wording of Liu et al. 2023 (arXiv:2307.03172)::

    {"2a8d601d-…": "703a7ce5-…",
     "bb3ba2a5-…": "…"}
"""

import hashlib
from dataclasses import dataclass
from random import Random
from uuid import UUID

from memory_bench.data import facts
from memory_bench.data.facts import ASK, FILLERS, KEYS, SEGMENT, VALUES

VERSION = 1
ASKED = 2
"""Questions at the end of a training line; the test has filler before each as if there were so many."""
BEFORE = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
PROMPT = '\n\nKey: "{}"\nCorresponding value:'
REVISION = hashlib.sha256(repr((VERSION, facts.REVISION, ASKED, BEFORE, PROMPT)).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Pair:
    """A pair: the text that states it, the question about it, and its value as it continues that."""

    text: str
    question: str
    answer: str
    value: str


@dataclass(frozen=True, slots=True)
class Pairs:
    """A context: `texts` in order, of which those at `places` state the pairs; filler and other text are the others."""

    texts: tuple[str, ...]
    pairs: tuple[Pair, ...]
    places: tuple[int, ...]


def word_pairs(rng: Random, count: int, density: int, *, segments: int = 0) -> Pairs:
    """Pairs of the closed vocabulary, in whole segments and the filler of the last one up to its questions.

    Args:
        rng: of all draws.
        count: of pairs.
        density: pairs in a segment.
        segments: of the context with its questions; 0: as many as the pairs need, and one for the questions. With 1 the
            pairs share the segment of the questions.
    """
    keys, values = rng.sample(KEYS, count), [rng.choice(VALUES) for _ in range(count)]
    pairs = tuple(
        Pair(f" {key} {value}", f" {ASK} {key}", f" {value}", value) for key, value in zip(keys, values, strict=True)
    )
    segments = segments or -(-count // density) + 1
    texts: list[str] = []
    places: list[int] = []
    left = list(pairs)
    for number in range(segments):
        last = number == segments - 1
        room = SEGMENT - (3 * ASKED if last else 0)
        here = left[:density] if segments == 1 or not last else []
        left = left[len(here) :]
        filler = [f" {rng.choice(FILLERS)}" for _ in range(room - 2 * len(here))]
        stops = sorted(rng.randint(0, len(filler)) for _ in here)
        for start, stop, pair in zip([0, *stops], stops, here, strict=False):
            texts += ["".join(filler[start:stop]), pair.text]
            places.append(len(texts) - 1)
        texts.append("".join(filler[stops[-1] if stops else 0 :]))
    return Pairs(tuple(texts), pairs, tuple(places))


def json_pairs(rng: Random, count: int) -> Pairs:
    """Pairs of an object of random identifiers, with what is said before it."""
    found, texts = [], [BEFORE]
    for number in range(count):
        key, value = (str(UUID(int=rng.getrandbits(128), version=4)) for _ in range(2))
        start, end = " " if number else "{", "}" if number == count - 1 else ",\n"
        text = f'{start}"{key}": "{value}"{end}'
        found.append(Pair(text, PROMPT.format(key), f' "{value}"', value))
        texts.append(text)
    return Pairs(tuple(texts), tuple(found), tuple(range(1, count + 1)))
