"""Invented conversations in the layout of LoCoMo: the stand-in where its file is not there.

Two invented persons talk in eight sessions. In every session each of them tells two things among small talk; nobody
tells a thing twice, and what is told is drawn. Questions ask for one thing (category 4), for the day on which it was
told (2), and for two things that a person told in different turns (1).
"""

import hashlib
from dataclasses import dataclass
from random import Random

from memory_bench.data.conversations import Conversation, Session, Turn, Wanted
from memory_bench.data.entities import CODAS, ONSETS, VOWELS, invented


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


@dataclass(frozen=True, slots=True)
class Topic:
    """A thing to tell: what is said, the question for it, the question for its day, and what it may be."""

    told: str
    question: str
    day: str
    values: tuple[str, ...]


VERSION = 1
COUNT, SESSIONS, TOLD = 8, 8, 2
TOPICS = (
    Topic("I planted {} behind the house.", "What did {} plant behind the house?", "When did {} plant something?",
          _words("tulips carrots roses pumpkins lavender beans lilies garlic")),
    Topic("I baked a cake with {} for the neighbours.", "With what did {} bake a cake?", "When did {} bake a cake?",
          _words("apricots almonds cherries walnuts lemons raisins plums ginger")),
    Topic("My brother is moving to {}.", "Where is the brother of {} moving?",
          "When did {} tell of a brother?", _words("Denmark Portugal Iceland Chile Norway Kenya Peru Malta")),
    Topic("I started to learn {} in the evenings.", "What did {} start to learn in the evenings?",
          "When did {} start to learn something?", _words("chess sailing pottery archery weaving fencing carving")),
    Topic("We painted the kitchen {}.", "In which colour did {} paint the kitchen?", "When did {} paint the kitchen?",
          _words("yellow green purple orange turquoise white crimson beige")),
    Topic("I found a {} in the attic.", "What did {} find in the attic?", "When did {} find something in the attic?",
          _words("telescope trumpet diary typewriter sword compass globe cradle")),
    Topic("My doctor told me to eat more {}.", "What should {} eat more of?", "When did {} see the doctor?",
          _words("spinach oats lentils fish yoghurt broccoli seeds berries")),
    Topic("I sold my {} last week.", "What did {} sell?", "When did {} tell of selling something?",
          _words("motorbike piano caravan tractor canoe tent drums camera")),
    Topic("We named the new kitten {}.", "What is the kitten of {} called?", "When did {} name a kitten?",
          _words("Biscuit Pepper Comet Pickle Shadow Clover Button Waffle")),
    Topic("I read a long book about {}.", "What was the book about that {} read?", "When did {} tell of a book?",
          _words("volcanoes whales pyramids glaciers castles comets vikings bees")),
    Topic("My cousin works in a {} now.", "Where does the cousin of {} work?", "When did {} tell of a cousin?",
          _words("bakery shipyard museum quarry library brewery circus mill")),
    Topic("I won a {} at the fair.", "What did {} win at the fair?", "When did {} win something at the fair?",
          _words("goose blanket lantern teapot bicycle clock rabbit basket")),
    Topic("We are saving for a {}.", "For what is {} saving?", "When did {} tell of saving for something?",
          _words("boat greenhouse fireplace balcony sauna workshop windmill barn")),
    Topic("I broke my {} on Monday.", "What did {} break?", "When did {} tell of breaking something?",
          _words("wrist glasses umbrella ankle phone tooth finger mirror")),
    Topic("My aunt sent me a parcel of {}.", "What did the aunt of {} send?", "When did {} get a parcel?",
          _words("honey coffee socks candles stamps buttons soap cheese")),
    Topic("I joined a club for {}.", "What is the club for that {} joined?", "When did {} join a club?",
          _words("hikers singers swimmers poets painters runners dancers stargazers")),
)  # fmt: skip
TALK = (
    "How are you today?", "The weather has been so odd.", "That sounds nice.", "I slept badly again.", "Tell me more.",
    "Time flies, does it not?", "I have to go soon.", "It is good to hear from you.", "Work was quiet this week.",
    "I hope the bus comes on time.", "Nothing much is new here.", "You always make me laugh.",
)  # fmt: skip
MONTHS = _words("January February March April May June July August")
REVISION = hashlib.sha256(
    repr((VERSION, COUNT, SESSIONS, TOLD, TOPICS, TALK, MONTHS, ONSETS, VOWELS, CODAS)).encode()
).hexdigest()[:16]


def talks(count: int = COUNT) -> list[Conversation]:
    """The first `count` conversations; more begin with the same ones."""
    return [_talk(f"talk-{number:02d}", Random(f"talk {number}")) for number in range(count)]


@dataclass(frozen=True, slots=True)
class _Told:
    """A thing that was told: by whom, its topic and value, the turn and the day."""

    speaker: str
    topic: Topic
    value: str
    turn: str
    day: str
    session: int


def _talk(name: str, rng: Random) -> Conversation:
    speakers = [invented(rng, ONSETS) for _ in range(2)]
    topics = {speaker: rng.sample(TOPICS, SESSIONS * TOLD) for speaker in speakers}
    sessions, told = [], []
    for number in range(SESSIONS):
        day = f"{rng.randint(1, 28)} {MONTHS[number]}, 2023"
        things = [(s, topic) for s in speakers for topic in topics[s][number * TOLD : (number + 1) * TOLD]]
        lines = [(speaker, topic) for speaker, topic in rng.sample(things, len(things))]
        turns: list[Turn] = []
        for speaker, topic in lines:
            for talker in rng.sample(speakers, 2):
                turns.append(Turn(f"D{number + 1}:{len(turns) + 1}", talker, rng.choice(TALK)))
            value = rng.choice(topic.values)
            turn = Turn(f"D{number + 1}:{len(turns) + 1}", speaker, topic.told.format(value))
            turns.append(turn)
            told.append(_Told(speaker, topic, value, turn.id, day, number))
        sessions.append(Session(f"{rng.randint(1, 11)}:{rng.randint(10, 59)} pm on {day}", tuple(turns)))
    return Conversation(name, tuple(sessions), tuple(_questions(rng, told, speakers)))


def _questions(rng: Random, told: list[_Told], speakers: list[str]) -> list[Wanted]:
    """One for every thing, for the day of every fourth, and four for two things."""
    asked = [Wanted(t.topic.question.format(t.speaker), t.value, (t.turn,), 4) for t in told]
    asked += [Wanted(t.topic.day.format(t.speaker), t.day, (t.turn,), 2) for t in rng.sample(told, len(told) // 4)]
    for speaker in speakers * 2:
        first, last = sorted(rng.sample([t for t in told if t.speaker == speaker], 2), key=lambda t: t.session)
        both = [t.topic.question.format(speaker) for t in (first, last)]
        question = f"{both[0].removesuffix('?')}, and {both[1][0].lower()}{both[1][1:]}"
        asked.append(Wanted(question, f"{first.value}, {last.value}", (first.turn, last.turn), 1))
    rng.shuffle(asked)
    return asked
