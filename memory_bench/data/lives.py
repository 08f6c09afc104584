"""Invented persons and places about whom something changes: eight relations, each said in three wordings.

Names are invented, so that nobody knows about them; values are common words, so that none is long to say. English in
form, for pretrained models::

    Tarvin Ulbek now lives in Prague. … Tarvin Ulbek has moved to Oslo. … Where does Tarvin Ulbek live now? …
"""

import hashlib
from dataclasses import dataclass
from random import Random

from memory_bench.data.entities import CODAS, ONSETS, VOWELS, invented


@dataclass(frozen=True, slots=True)
class Relation:
    """What may be said of a person or a place.

    Attributes:
        person: of whom; else of a place.
        wordings: of a statement, of name and value.
        question: of the name; the value continues it.
        values: single words.
    """

    person: bool
    wordings: tuple[str, str, str]
    question: str
    values: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


VERSION = 1
RELATIONS = (
    Relation(
        True,
        ("{0} now lives in {1}.", "{0} has moved to {1}.", "These days {0} is at home in {1}."),
        "\nQuestion: Where does {0} live now?\nAnswer: {0} now lives in",
        _words("Paris London Rome Berlin Madrid Vienna Prague Dublin Oslo Athens Lisbon Warsaw Cairo Delhi Tokyo Lima"),
    ),
    Relation(
        True,
        ("{0} now works as a {1}.", "{0} has found work as a {1}.", "These days {0} is a {1} by trade."),
        "\nQuestion: As what does {0} work now?\nAnswer: {0} now works as a",
        _words("barber builder butcher jockey juggler plumber potter shepherd soldier surgeon tailor tinker trader "
               "waiter sculptor wrestler"),
    ),
    Relation(
        True,
        ("{0} now plays the {1}.", "{0} has taken up the {1}.", "These days {0} performs on the {1}."),
        "\nQuestion: What does {0} play now?\nAnswer: {0} now plays the",
        _words("piano guitar flute harp trumpet cello organ banjo clarinet bassoon lute fiddle viola horn tuba bugle"),
    ),
    Relation(
        True,
        ("{0} now keeps a {1}.", "{0} has sold everything for a {1}.", "These days {0} owns a {1} only."),
        "\nQuestion: What does {0} keep now?\nAnswer: {0} now keeps a",
        _words("cat dog goat horse rabbit parrot donkey turtle snake pony hamster goose duck sheep pig hen"),
    ),
    Relation(
        False,
        ("{0} now trades in {1}.", "The market of {0} has turned to {1}.", "These days {0} lives off its {1}."),
        "\nQuestion: In what does {0} trade now?\nAnswer: {0} now trades in",
        _words("apples bread butter cheese cotton fish flour grapes honey lemons onions pepper salt silk tea wool"),
    ),
    Relation(
        False,
        ("The flag of {0} is now {1}.", "{0} has made its flag {1}.", "These days {0} flies a flag that is {1}."),
        "\nQuestion: What colour is the flag of {0} now?\nAnswer: The flag of {0} is now",
        _words("black blue brown gold green grey orange pink purple red silver white yellow scarlet violet cream"),
    ),
    Relation(
        False,
        ("{0} now teaches {1} in school.", "The school of {0} has changed to {1}.", "These days {0} learns {1}."),
        "\nQuestion: What does {0} teach in school now?\nAnswer: {0} now teaches",
        _words("Arabic Chinese Danish Dutch English French German Greek Hindi Irish Italian Latin Polish Russian "
               "Spanish Welsh"),
    ),
    Relation(
        False,
        ("{0} now celebrates in {1}.", "The feast of {0} has moved to {1}.", "These days {0} has its feast in {1}."),
        "\nQuestion: When does {0} celebrate now?\nAnswer: {0} now celebrates in",
        _words("January February March April May June July August September October November December"),
    ),
)  # fmt: skip
FEWEST = min(len(relation.values) for relation in RELATIONS)
REVISION = hashlib.sha256(repr((VERSION, ONSETS, VOWELS, CODAS, RELATIONS)).encode()).hexdigest()[:16]


def subject(rng: Random) -> tuple[str, Relation]:
    """An invented name, of a person (two words) or a place, and what is said of it."""
    relation = rng.choice(RELATIONS)
    return " ".join(invented(rng, ONSETS) for _ in range(1 + relation.person)), relation
