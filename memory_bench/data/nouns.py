"""Lists of nouns that are read twice, with a delay between: made by a program, in two wordings.

After Armeni et al. 2022 (arXiv:2210.13569): a text reads a list of nouns, goes on, and reads a list again, which is the
same one, the same in another order, or a new one. What a model retrieves shows in how much less the second reading of
the same list surprises it, noun by noun.

- ``words``: a closed vocabulary of 24 nouns and 16 fillers, one word a token, for models trained from scratch.
- ``prose``: English sentences and 60 nouns, for pretrained models.

Splits and seeds have separate random streams; the same list is read again after every delay.
"""

import hashlib
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from memory_bench.data.facts import FILLERS, SEGMENT
from memory_bench.data.studies import OBJECTS, SUBJECTS, TIMES, VERBS, sentences


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


VERSION = 1
NOUNS = _words(
    "anchor barrel candle dragon engine falcon garden hammer island jacket kitten ladder magnet needle orchid pepper "
    "quiver ribbon saddle temple urchin velvet walnut zipper"
)
PROSE_NOUNS = NOUNS + _words(
    "arrow bakery blanket bridge camel canyon castle cherry cliff cradle desert donkey feather forest fountain hotel "
    "jungle lantern lemon meadow mirror monkey mountain oven palace parrot pencil piano rocket shovel "
    "spider statue thunder tunnel whistle"
)
FIRST, AGAIN = "list", "again"
WORDS: tuple[str, ...] = tuple(sorted({*NOUNS, *FILLERS, FIRST, AGAIN}))
"""The closed vocabulary of ``words``."""
REVISION = hashlib.sha256(
    repr((VERSION, SEGMENT, PROSE_NOUNS, FILLERS, FIRST, AGAIN, SUBJECTS, VERBS, OBJECTS, TIMES)).encode()
).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Reading:
    """A second reading of a list: the text before it and its nouns, each beginning with a blank.

    Attributes:
        kind: ``same``, ``shuffled`` or ``novel``.
        opening: begins with a blank; in ``words`` it is one token.
        nouns: in the order in which they are read.
    """

    kind: str
    opening: str
    nouns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NounEpisode:
    """A list, delays, and what may be read after each of them.

    Attributes:
        id: split and number.
        first: the first reading.
        fillers: texts between, one for each delay; they follow each other. Begin with a blank.
        readings: the possible second readings, the same after every delay.
    """

    id: str
    first: Reading
    fillers: tuple[str, ...]
    readings: tuple[Reading, ...]


def make_nouns(rng: Random, wording: str, length: int, delays: tuple[int, ...], name: str = "") -> NounEpisode:
    """An episode drawn with `rng`.

    Args:
        rng: of all draws.
        wording: ``words`` or ``prose``.
        length: nouns in a list.
        delays: increasing; in segments of `SEGMENT` words from the list's segment to that of the second reading.
        name: of the episode.
    """
    prose = wording == "prose"
    drawn = rng.sample(PROSE_NOUNS if prose else NOUNS, 2 * length)
    nouns, novel = drawn[:length], drawn[length:]
    shuffled = nouns
    while shuffled == nouns:
        shuffled = rng.sample(nouns, length)
    opening = " Then the teacher read a list of words aloud:" if prose else f" {FIRST}"
    again = " After that the teacher read the list of words aloud again:" if prose else f" {AGAIN}"
    first = Reading("first", opening, _enumerate(nouns, prose))
    seconds = {"same": nouns, "shuffled": shuffled, "novel": novel}
    readings = tuple(Reading(kind, again, _enumerate(order, prose)) for kind, order in seconds.items())
    # What is read again fills the end of its segment, so that it never crosses a border of the scratch models.
    starts = [SEGMENT * delay + SEGMENT - 1 - length for delay in (0, *delays)]
    starts[0] = 1 + length
    fillers = tuple(_filler(rng, after - before, prose) for before, after in pairwise(starts))
    return NounEpisode(name, first, fillers, readings)


def noun_episodes(
    split: str, n: int, wording: str, length: int, delays: tuple[int, ...], seed: int = 0
) -> list[NounEpisode]:
    """The first `n` episodes of a split; more begin with the same ones."""
    return [
        make_nouns(Random(f"{split} {seed} {wording} {i}"), wording, length, delays, f"{split}-{i:04d}")
        for i in range(n)
    ]


def _enumerate(nouns: list[str], prose: bool) -> tuple[str, ...]:
    """The nouns as they continue a text; in prose, commas part them."""
    return tuple(f"{',' if prose and i else ''} {noun}" for i, noun in enumerate(nouns))


def _filler(rng: Random, words: int, prose: bool) -> str:
    """About `words` words (exactly, without prose) that begin with a blank; prose ends its list and its sentences."""
    if not prose:
        return "".join(f" {rng.choice(FILLERS)}" for _ in range(words))
    return f". {sentences(rng, words)}".rstrip()
