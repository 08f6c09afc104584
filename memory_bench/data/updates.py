"""Facts that change, made by a program: a key is stated again with another value, and the newest one counts.

An episode has a few keys (or, in prose, invented persons and places). Each is stated once and then `updates` times
again, every time with a value that no other statement of the episode has, so that a wrong answer says what it is: an
older value of the key, another key's, or one that was never stated. A key's statements stand in different segments,
which are drawn, but for its last: that is `distance` segments before the questions, which end the episode::

    hum amber seven tock …       a statement of amber, at a random place of its segment
    ding basil two buzz …        of basil
    whirr amber nine hum …       amber again: nine counts
    hum tock ding …              filler
    … ask amber ask basil        the answers are nine and two

- ``words``: the closed vocabulary of key-value (`memory_bench.data.facts`), one word a token, segments of `SEGMENT`.
- ``prose``: sentences of `memory_bench.data.lives` in three wordings, in unrelated text that the tokenizer cuts.

Test cases come in shuffled rounds of all pairs of updates and distance, one stream of rounds for every key, so that any
number of whole rounds is balanced, and more episodes begin with the same ones.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice, product
from random import Random

from memory_bench.data import facts, lives, studies
from memory_bench.data.facts import ASK, FILLERS, KEYS, SEGMENT, VALUES
from memory_bench.data.studies import sentences

VERSION = 1
REVISION = hashlib.sha256(repr((VERSION, facts.REVISION, lives.REVISION, studies.REVISION)).encode()).hexdigest()[:16]
PROSE_CHOICES = 8
"""Of a question in prose; in the closed vocabulary all values are."""

Case = tuple[int, int]
"""Of a key: how often it is stated again, and the segments from its last statement to the questions."""


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement that is read: the place of its key among the episode's, and whether it is the newest."""

    text: str
    key: int
    newest: bool


@dataclass(frozen=True, slots=True)
class Asked:
    """The question about a key; texts begin with a blank, but for the prompt of prose.

    Attributes:
        prompt: what stands before the answer.
        answer: the newest value.
        older: the values that the key had before, oldest first.
        others: values of the episode's other keys.
        choices: the answer, the older values, and foreign ones to a fixed number.
        key: its place among the episode's keys.
        case: updates and distance.
    """

    prompt: str
    answer: str
    older: tuple[str, ...]
    others: tuple[str, ...]
    choices: tuple[str, ...]
    key: int
    case: Case


@dataclass(frozen=True, slots=True)
class UpdateEpisode:
    """One episode: for every segment what is read in it, in order (statements, and in ``words`` filler), and questions.

    Attributes:
        id: split and number.
        segments: statements and filler of each segment, as they are read; in prose a text of filler before every
            statement, and alone where there is none.
        questions: in the order in which they are asked, each on its own.
    """

    id: str
    segments: tuple[tuple[Statement | str, ...], ...]
    questions: tuple[Asked, ...]


def balanced_cases(updates: Sequence[int], distances: Sequence[int], keys: int, episodes: int) -> list[list[Case]]:
    """The cases of the first `episodes` test episodes, one a key."""
    grid = list(product(updates, distances))

    def rounds(key: int) -> list[Case]:
        found: list[Case] = []
        while len(found) < episodes:
            found += Random(f"cases {key} {len(found)}").sample(grid, len(grid))
        return found

    return [list(cases) for cases in islice(zip(*map(rounds, range(keys)), strict=True), episodes)]


def drawn_cases(rng: Random, updates: Sequence[int], keys: int, segments: int) -> list[Case]:
    """Cases that fit `segments` segments: any distance, then any of `updates` that there is room for."""
    found = []
    for _ in range(keys):
        distance = rng.randrange(segments)
        found.append((rng.choice([n for n in updates if n < segments - distance] or [0]), distance))
    return found


def make_updates(
    rng: Random, cases: Sequence[Case], spread: int, *, prose: int = 0, segments: int = 0, name: str = ""
) -> UpdateEpisode:
    """An episode drawn with `rng`.

    Args:
        rng: of all draws.
        cases: one a key; a distance of 0 has the last statement in the segment of the questions.
        spread: a key's earlier statements lie within so many segments before its last.
        prose: words of filler of every segment in ``prose``; 0: ``words``.
        segments: of the episode; 0: as many as its statements need.
        name: of the episode.
    """
    back = [
        [distance, *(distance + gap for gap in sorted(rng.sample(range(1, _reach(spread, segments, distance)), again)))]
        for again, distance in cases
    ]
    last = segments - 1 if segments else max(map(max, back))
    said, asked = (_prose if prose else _words)(rng, cases)
    places: list[list[Statement]] = [[] for _ in range(last + 1)]
    for key, ago in enumerate(back):
        texts = zip(reversed(ago), said[key], strict=True)  # the oldest stands furthest back
        for at, text in texts:
            places[last - at].append(Statement(text, key, at == ago[0]))
    rng.shuffle(asked)
    found = []
    for number, statements in enumerate(places):
        rng.shuffle(statements)
        room = SEGMENT - (3 * len(asked) if number == last else 0)  # a question and its answer are three words
        found.append(_sentences(rng, prose, statements) if prose else _segment(rng, room, statements))
    return UpdateEpisode(name, tuple(found), tuple(asked))


def _reach(spread: int, segments: int, distance: int) -> int:
    """One more than the segments before a last statement in which earlier ones may be."""
    return 1 + (min(spread, segments - 1 - distance) if segments else spread)


Made = tuple[list[list[str]], list[Asked]]
"""Per key its statements, oldest first; and the questions, one a key."""


def _words(rng: Random, cases: Sequence[Case]) -> Made:
    keys = rng.sample(KEYS, len(cases))
    values = iter(rng.sample(VALUES, sum(again + 1 for again, _ in cases)))
    own = [tuple(islice(values, again + 1)) for again, _ in cases]
    said = [[f" {key} {value}" for value in values] for key, values in zip(keys, own, strict=True)]
    choices = tuple(f" {value}" for value in VALUES)
    return said, _asked(cases, own, [f" {ASK} {key}" for key in keys], lambda key: choices)


def _prose(rng: Random, cases: Sequence[Case]) -> Made:
    lived = [lives.subject(rng) for _ in cases]
    own: list[tuple[str, ...]] = []
    for (again, _), (_, relation) in zip(cases, lived, strict=True):
        taken = {value for values in own for value in values}
        own.append(tuple(rng.sample([v for v in relation.values if v not in taken], again + 1)))
    said = [
        [f" {rng.choice(relation.wordings).format(name, value)}" for value in values]
        for (name, relation), values in zip(lived, own, strict=True)
    ]

    def choices(key: int) -> tuple[str, ...]:
        """Own values, and foreign ones of the same relation; those of other keys first, if they are of it, too."""
        values = lived[key][1].values
        others = [v for k, vs in enumerate(own) if k != key for v in vs if v in values][: PROSE_CHOICES - len(own[key])]
        free = [v for v in values if v not in own[key] and v not in others]
        more = rng.sample(free, PROSE_CHOICES - len(own[key]) - len(others))
        return tuple(f" {v}" for v in rng.sample([*own[key], *others, *more], PROSE_CHOICES))

    return said, _asked(cases, own, [relation.question.format(name) for name, relation in lived], choices)


def _asked(
    cases: Sequence[Case],
    own: Sequence[tuple[str, ...]],
    prompts: Sequence[str],
    choices: Callable[[int], tuple[str, ...]],
) -> list[Asked]:
    found = []
    for key, (case, values, prompt) in enumerate(zip(cases, own, prompts, strict=True)):
        others = tuple(f" {v}" for k, vs in enumerate(own) if k != key for v in vs)
        *older, newest = (f" {v}" for v in values)
        found.append(Asked(prompt, newest, tuple(older), others, choices(key), key, case))
    return found


def _sentences(rng: Random, words: int, statements: Sequence[Statement]) -> tuple[Statement | str, ...]:
    """A segment of prose: filler before every statement."""
    found: list[Statement | str] = []
    for statement in statements:
        found += [sentences(rng, words), statement]
    return tuple(found or [sentences(rng, words)])


def _segment(rng: Random, room: int, statements: Sequence[Statement]) -> tuple[Statement | str, ...]:
    """A segment of `room` words, its statements at random places."""
    slots = dict(zip(sorted(rng.sample(range(room // 2), len(statements))), statements, strict=True))
    parts: list[Statement | str] = []
    filler = ""
    for slot in range(room // 2):
        if slot in slots:
            parts += [filler, slots[slot]] if filler else [slots[slot]]
            filler = ""
        else:
            filler += f" {rng.choice(FILLERS)} {rng.choice(FILLERS)}"
    filler += f" {rng.choice(FILLERS)}" * (room % 2)
    return (*parts, filler) if filler else tuple(parts)
