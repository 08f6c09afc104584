"""Facts over distance, made by a program in a closed vocabulary: who can still say which value a key had?

An episode states a few facts in segment 0, fills the segments between with words that mean nothing, and asks in its
last segment only (a question asked earlier would refresh the memory)::

    amber seven basil two        the facts: keys and their values
    hum tock hum …               filler, to the end of the segment before the last and on
    ask basil                    a question; the answer is the next word

Three knobs make it harder. The **load** is the number of facts. **Distractors** are facts about other keys, strewn over
the segments between; nobody asks for them. **Outdated** values of the keys are stated before the current ones
(interference: the last statement counts).

One word is one token. Splits, seeds and distances have separate random streams. Chance is one of `VALUES`.
"""

import hashlib
from dataclasses import dataclass
from random import Random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


VERSION = 1
SEGMENT = 16
KEYS = _words(
    "amber basil cedar dahlia ebony fennel ginger hazel indigo jasmine kale laurel maple nettle olive poppy quince "
    "rosemary saffron thyme umber violet willow yarrow zinnia aspen birch clover daisy elder fern garlic"
)
VALUES = _words("one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty")
FILLERS = _words("hum tock ding whirr click buzz clank hiss thud rattle chime murmur rustle squeak plop tick")
ASK = "ask"
WORDS: tuple[str, ...] = tuple(sorted({*KEYS, *VALUES, *FILLERS, ASK}))
"""The closed vocabulary."""
REVISION = hashlib.sha256(repr((VERSION, SEGMENT, KEYS, VALUES, FILLERS, ASK)).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Setting:
    """How hard the facts are to keep.

    Attributes:
        load: facts stated in segment 0.
        asked: of them that are asked for, each on its own.
        distractors: facts about other keys in every segment between.
        outdated: of the facts, how many had another value before.
    """

    load: int = 2
    asked: int = 2
    distractors: int = 0
    outdated: int = 0

    def problem(self) -> str:
        """Why such episodes cannot be made; empty if they can."""
        if not 1 <= self.asked <= self.load:
            return f"asked must be between 1 and load = {self.load}"
        if not 0 <= self.outdated <= self.load:
            return f"outdated must be between 0 and load = {self.load}"
        if 2 * (self.load + self.outdated) + 3 * self.asked > SEGMENT:
            return f"2 * (load + outdated) + 3 * asked must fit a segment of {SEGMENT} words"
        if not 0 <= self.distractors <= SEGMENT // 2 or self.load + self.distractors > len(KEYS):
            return f"distractors must be between 0 and {SEGMENT // 2}"
        return ""


@dataclass(frozen=True, slots=True)
class FactEpisode:
    """One episode's text: ``evidence + filler``, then each question with its answer.

    Attributes:
        id: split, distance and number.
        evidence: the facts, at the start of segment 0.
        filler: everything up to the questions; begins with a blank.
        questions: (question, answer) pairs, each beginning with a blank.
        distance: segments from the facts' segment to the questions'; 0 if they share one.
    """

    id: str
    evidence: str
    filler: str
    questions: tuple[tuple[str, str], ...]
    distance: int


def make_facts(rng: Random, setting: Setting, distance: int, name: str = "") -> FactEpisode:
    """An episode drawn with `rng` whose questions come `distance` segments after the facts."""
    chosen = rng.sample(KEYS, setting.load + setting.distractors)
    keys, others = chosen[: setting.load], chosen[setting.load :]
    values = [rng.choice(VALUES) for _ in keys]
    old = [(key, rng.choice([v for v in VALUES if v != value])) for key, value in zip(keys, values, strict=True)]
    stated = [*rng.sample(old, setting.outdated), *zip(keys, values, strict=True)]
    evidence = [word for pair in stated for word in pair]
    last = SEGMENT - 3 * setting.asked  # words of the last segment before its questions
    filler = [rng.choice(FILLERS) for _ in range(SEGMENT * distance + last - len(evidence))]
    for between in range(1, distance):
        places = rng.sample(range(SEGMENT // 2), setting.distractors)
        for place, key in zip(places, others, strict=True):
            at = SEGMENT * between + 2 * place - len(evidence)
            filler[at : at + 2] = [key, rng.choice(VALUES)]
    asked = rng.sample(list(zip(keys, values, strict=True)), setting.asked)
    questions = tuple((f" {ASK} {key}", f" {value}") for key, value in asked)
    return FactEpisode(name, " ".join(evidence), f" {' '.join(filler)}", questions, distance)


def fact_episodes(split: str, n: int, setting: Setting, distance: int, seed: int = 0) -> list[FactEpisode]:
    """The first `n` episodes of a split; more begin with the same ones."""
    return [
        make_facts(Random(f"{split} {seed} {distance} {i}"), setting, distance, f"{split}-{distance}-{i:04d}")
        for i in range(n)
    ]
