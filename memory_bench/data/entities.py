"""Invented places, people, firms and species: passages that no model can have read before, and questions about them.

The stand-in for SQuAD and Natural Questions. A passage describes one invented thing in four to six sentences, each with
one fact; a question asks for one of them, and its answer, a name that stands nowhere else, is invented as well::

    Velmora is a harbour town in the province of Oskarin. The town was founded by Tarvin Ulbek. Its market is … .
    Who founded Velmora?   Tarvin Ulbek

- English in form, so that pretrained models can read it; without knowledge of the world, so that none can guess.
- The splits share no name.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random

from memory_bench.data.passages import Passage


def _parts(text: str) -> tuple[str, ...]:
    return tuple(text.split())


VERSION = 1
ONSETS = _parts("b br d dr f fl g gr h j k kl l m n p pl qu r s sk st t tr v w y z")
VOWELS = _parts("a e i o u ai ea ou")
CODAS = _parts("l m n r s t k th nd rn sk lm")


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of thing: how a passage begins, and (sentence, question, what answers) for every fact."""

    opening: str
    facts: tuple[tuple[str, str, str], ...]


KINDS = (
    Kind(
        "{0} is a harbour town on the northern coast, known for its narrow streets and its long winters.",
        (
            ("The town was founded by {1}, who came there with a small fleet.", "Who founded {0}?", "person"),
            ("It lies at the mouth of the river {1}.", "At the mouth of which river does {0} lie?", "name"),
            ("Every spring the people of the town hold the festival of {1}.", "Which festival is held in {0}?", "name"),
            ("Its first mayor was {1}, who ordered the harbour to be deepened.", "Who was the first mayor of {0}?",
             "person"),
            ("Most of the houses are built of a grey stone called {1}.", "Of which stone are the houses of {0} built?",
             "name"),
            ("The ferry from the town goes to the island of {1}.", "To which island does the ferry from {0} go?",
             "name"),
        ),
    ),
    Kind(
        "{0} was a painter of the old school whose works hang in several museums.",
        (
            ("The painter was born in the village of {1}.", "In which village was {0} born?", "name"),
            ("The first lessons were given by {1}, a neighbour.", "Who gave {0} the first lessons?", "person"),
            ("The best known picture shows the bridge of {1} at dawn.", "Which bridge did {0} paint at dawn?", "name"),
            ("A red pigment named {1} is found in all of the late works.", "Which pigment is in the late works of {0}?",
             "name"),
            ("The largest collection belongs to {1}, a merchant.", "To whom does the largest collection of {0} belong?",
             "person"),
            ("The last years were spent in the monastery of {1}.", "In which monastery did {0} spend the last years?",
             "name"),
        ),
    ),
    Kind(
        "{0} is a firm that makes instruments for ships and for weather stations.",
        (
            ("The firm was set up by {1} in a rented barn.", "Who set up the firm {0}?", "person"),
            ("Its head office stands in the city of {1}.", "In which city is the head office of {0}?", "name"),
            ("The first thing it sold was a compass called the {1}.", "What was the compass of {0} called?", "name"),
            ("Its fiercest rival for many years was {1}.", "Who was the rival of {0}?", "name"),
            ("Since the last election of the board it is led by {1}.", "Who leads {0}?", "person"),
            ("All of its workshops burn a local fuel known as {1}.", "Which fuel do the workshops of {0} burn?",
             "name"),
        ),
    ),
    Kind(
        "{0} is a small bird of the highlands that sings only at night.",
        (
            ("It was first described by {1} from a single feather.", "Who first described the bird {0}?", "person"),
            ("The bird builds its nest in a thorny bush called {1}.", "In which bush does the bird {0} nest?", "name"),
            ("In winter whole flocks move to the valley of {1}.", "To which valley does the bird {0} move in winter?",
             "name"),
            ("Its only enemy is a kind of weasel named {1}.", "What is the only enemy of the bird {0}?", "name"),
            ("In the songs of the shepherds it is the messenger of {1}.", "Whose messenger is the bird {0}?", "person"),
            ("The eggs have the colour of a mineral called {1}.", "Which mineral has the colour of the eggs of {0}?",
             "name"),
        ),
    ),
)  # fmt: skip
REVISION = hashlib.sha256(repr((VERSION, ONSETS, VOWELS, CODAS, KINDS)).encode()).hexdigest()[:16]


def passages(topic: str, split: str, count: int) -> list[Passage]:
    """The first `count` passages of a split, each with one question.

    Args:
        topic: another stream of things (``squad`` or ``nq``).
        split: ``test`` or ``train``; their names begin with other letters.
        count: how many; more begin with the same ones.
    """
    return list(islice(_stream(topic, split), count))


def _stream(topic: str, split: str) -> Iterator[Passage]:
    rng, used, number = Random(f"entities {topic} {split}"), set[str](), 0
    onsets = [o for n, o in enumerate(ONSETS) if n % 2 == (split == "train")]
    while True:
        kind = KINDS[number % len(KINDS)]
        subject = _fresh(rng, onsets, used, "person" if "painter" in kind.opening else "name")
        told = rng.sample(kind.facts, rng.randint(4, 6))
        names = [_fresh(rng, onsets, used, what) for _, _, what in told]
        sentences = [text.format(subject, name) for (text, _, _), name in zip(told, names, strict=True)]
        asked = rng.randrange(len(told))
        text = " ".join([kind.opening.format(subject), *sentences])
        yield Passage(f"{topic}-{split}-{number:05d}", subject, text, told[asked][1].format(subject), (names[asked],))
        number += 1


def _fresh(rng: Random, onsets: list[str], used: set[str], what: str) -> str:
    """A name (or first and last name) that was not used before."""
    while True:
        parts = [invented(rng, onsets) for _ in range(2 if what == "person" else 1)]
        name = " ".join(parts)
        if not used & {name, *parts}:
            used |= {name, *parts}
            return name


def invented(rng: Random, onsets: Sequence[str]) -> str:
    """A word that there is not, with a capital."""
    syllables = rng.randint(2, 3)
    inner = "".join(rng.choice(onsets) + rng.choice(VOWELS) for _ in range(syllables))
    return (inner + rng.choice(CODAS)).capitalize()
