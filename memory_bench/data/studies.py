"""Invented studies: the stand-in for PubMedQA, in a closed vocabulary of 160 words.

A study opens with two findings about two different drugs, each with an outcome drawn independently from yes, no and
maybe; filler follows; the question names one of the drugs with its last word::

    patients given zelvorin improved quickly . taken daily dumabex remained doubtful .   (12 words, segment 0)
    the nurse measured the room again . the clerk …                                       (filler)
    did the trial show a benefit from dumabex                                             (8 words)
    maybe                                                                                 (the answer)

- One word is one token, and words are separated by single blanks; texts that follow others begin with the blank.
- Everything before the answer fills a whole number of segments of `SEGMENT` words, so the question ends a segment and
  the answer is the first word of the next. A driver that cuts every `SEGMENT` words predicts it from the question's
  last word (the prediction is carried over the border).
- The word that tells the outcome follows the drug's name directly, and the lead before it tells nothing of it. The
  first finding and the second have their own phrasings, so that what is remembered of one can be told from the other:
  with eight drugs this lets a small recurrent memory learn in minutes whose outcome is whose; with 32 drugs and common
  phrasings none got beyond 2/3 in the same time.
- Who remembers both outcomes but not whose they are reaches 2/3; chance is 1/3.
- Splits, seeds and distances have separate random streams.
"""

import hashlib
from dataclasses import dataclass
from random import Random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SEGMENT = 24
VERSION = 1
ANSWERS = ("yes", "no", "maybe")
DRUGS = _words("abrinol cortuvex dumabex jantovil morvatin quorvane soltrexa zelvorin")
PHRASINGS = {
    "yes": (
        ("patients given {} improved quickly .", "treatment with {} helped most ."),
        ("in adults {} relieved pain .", "taken daily {} worked well ."),
    ),
    "no": (
        ("patients given {} worsened slowly .", "treatment with {} failed entirely ."),
        ("in adults {} changed nothing .", "taken daily {} harmed some ."),
    ),
    "maybe": (
        ("patients given {} varied widely .", "treatment with {} seemed unclear ."),
        ("in adults {} divided opinion .", "taken daily {} remained doubtful ."),
    ),
}
"""The twelve phrasings: for every outcome two of the first and two of the second finding, six words each."""
QUESTION = "did the trial show a benefit from {}"
SUBJECTS = _words(
    "nurse clerk doctor driver visitor manager porter student cook guard teacher writer farmer painter lawyer baker "
    "sailor singer priest miner pilot judge mayor poet weaver dancer"
)
VERBS = _words(
    "measured counted moved opened cleaned painted checked closed carried noted weighed found sold bought lifted "
    "dropped saved repaired ordered polished wrapped covered packed dusted rented borrowed carved"
)
OBJECTS = _words(
    "room chart window table chair lamp letter bottle door paper basket box clock book bag coat map phone kettle "
    "mirror ladder carpet pillow curtain bucket helmet violin jar"
)
TIMES = _words(
    "again today early late twice often once weekly monthly rarely alone outside upstairs downstairs indoors nearby "
    "elsewhere together soon briefly gladly quietly slyly calmly upstream abroad tonight yesterday"
)
FILLER = "the {} {} the {} {} ."

WORDS: tuple[str, ...] = tuple(
    sorted(
        {
            *DRUGS,
            *ANSWERS,
            *(w for places in PHRASINGS.values() for group in places for text in group for w in text.split()),
            *QUESTION.split(),
            *FILLER.split(),
            *SUBJECTS,
            *VERBS,
            *OBJECTS,
            *TIMES,
        }
        - {"{}"}
    )
)
"""The closed vocabulary."""
REVISION = hashlib.sha256(
    repr((VERSION, SEGMENT, DRUGS, PHRASINGS, QUESTION, SUBJECTS, VERBS, OBJECTS, TIMES, FILLER)).encode()
).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class InventedStudy:
    """One episode's text: ``evidence + filler + question + " " + answer``.

    Attributes:
        id: split, distance and number.
        evidence: the two findings, at the start of segment 0.
        filler: everything up to the question; begins with a blank.
        question: ends with the drug's name; begins with a blank.
        answer: ``yes``, ``no`` or ``maybe``.
        distance: segments from the findings' segment to the question's; 0 if they share one.
    """

    id: str
    evidence: str
    filler: str
    question: str
    answer: str
    distance: int


def invent(rng: Random, distance: int, name: str = "") -> InventedStudy:
    """A study drawn with `rng` whose question comes `distance` segments after the findings."""
    drugs = rng.sample(DRUGS, 2)
    outcomes = [rng.choice(ANSWERS) for _ in drugs]
    findings = [rng.choice(PHRASINGS[outcomes[place]][place]).format(drugs[place]) for place in (0, 1)]
    asked = rng.randrange(2)
    evidence, question = " ".join(findings), QUESTION.format(drugs[asked])
    room = SEGMENT * (distance + 1) - len(evidence.split()) - len(question.split())
    filler: list[str] = []
    while len(filler) < room:
        filler += FILLER.format(*(rng.choice(part) for part in (SUBJECTS, VERBS, OBJECTS, TIMES))).split()
    return InventedStudy(name, evidence, f" {' '.join(filler[:room])}", f" {question}", outcomes[asked], distance)


def studies(split: str, n: int, distance: int, seed: int = 0) -> list[InventedStudy]:
    """The first `n` studies of a split, `distance` segments between findings and question.

    Args:
        split: ``train`` or ``test``.
        n: how many; more begin with the same ones.
        distance: in segments of `SEGMENT` words.
        seed: another stream of studies.
    """
    return [invent(Random(f"{split} {seed} {distance} {i}"), distance, f"{split}-{distance}-{i:04d}") for i in range(n)]


def sentences(rng: Random, words: int) -> str:
    """Sentences of filler as prose, of at least `words` words together, drawn with `rng`."""
    found: list[str] = []
    count = 0
    while count < words:
        text = FILLER.format(*(rng.choice(part) for part in (SUBJECTS, VERBS, OBJECTS, TIMES)))
        found.append(text.removesuffix(" .").capitalize() + ".")
        count += len(text.split()) - 1
    return " ".join(found)
