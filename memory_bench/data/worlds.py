"""A small simulated world in the format of bAbI's tasks 1 to 5: the stand-in where bAbI's files are not there.

People walk between rooms, pick things up, put them down and hand them over. The questions of a task are those of
Weston et al. 2015 (arXiv:1502.05698): where somebody is (1), where a thing is (2), where a thing was before (3), which
room lies where (4), who gave what to whom (5). The names are other ones, so that nothing can be known from the
original.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from memory_bench.data.passages import Story

VERSION = 1
PEOPLE = ("Alda", "Bruno", "Celia", "Dario", "Edda", "Florian")
ROOMS = ("attic", "cellar", "library", "pantry", "stable", "workshop")
THINGS = ("lantern", "basket", "hammer", "violin")
WALKS = ("went to", "moved to", "walked to", "hurried to")
SIDES = {"north": "south", "south": "north", "east": "west", "west": "east"}
REVISION = hashlib.sha256(repr((VERSION, PEOPLE, ROOMS, THINGS, WALKS)).encode()).hexdigest()[:16]


@dataclass(slots=True)
class World:
    """What is the case, and the facts that say so (by index)."""

    rng: Random
    facts: list[str] = field(default_factory=list)
    where: dict[str, tuple[str, int]] = field(default_factory=dict)
    held: dict[str, tuple[str, int]] = field(default_factory=dict)
    lies: dict[str, str] = field(default_factory=dict)
    been: dict[str, list[tuple[str, tuple[int, ...]]]] = field(default_factory=dict)

    def say(self, fact: str) -> int:
        """Add a fact; its index."""
        self.facts.append(fact)
        return len(self.facts) - 1

    def walk(self, who: str) -> None:
        """`who` goes to another room, with what they hold."""
        room = self.rng.choice([r for r in ROOMS if r != self.where.get(who, ("", 0))[0]])
        self.where[who] = (room, self.say(f"{who} {self.rng.choice(WALKS)} the {room}."))
        for thing, (holder, _) in self.held.items():
            if holder == who:
                self.note(thing)

    def take(self, who: str) -> None:
        """`who`, who is somewhere, picks up a thing that may lie there, or puts down one of theirs."""
        room, came = self.where[who]
        free = [t for t in THINGS if t not in self.held and self.lies.get(t, room) == room]
        mine = [t for t, (holder, _) in self.held.items() if holder == who]
        if mine and (not free or self.rng.random() < 0.3):
            thing = self.rng.choice(mine)
            index = self.say(f"{who} put down the {thing}.")
            del self.held[thing]
            self.lies[thing] = room
            self.been[thing][-1] = (room, (came, index))
        elif free:
            thing = self.rng.choice(free)
            self.held[thing] = (who, self.say(f"{who} picked up the {thing}."))
            self.note(thing)

    def note(self, thing: str) -> None:
        """The thing is where its holder is."""
        holder, taken = self.held[thing]
        room, came = self.where[holder]
        rooms = self.been.setdefault(thing, [])
        if not rooms or rooms[-1][0] != room:
            rooms.append((room, (taken, came)))


Asked = tuple[tuple[str, ...], str, str, tuple[int, ...]]
"""Facts, question, answer, support."""


def _moves(rng: Random, events: int) -> World:
    world = World(rng)
    for _ in range(events):
        who = rng.choice(PEOPLE[:4])
        if who in world.where and rng.random() < 0.45:
            world.take(who)
        else:
            world.walk(who)
    return world


def where_is_somebody(rng: Random) -> Asked:
    """Task 1."""
    world = World(rng)
    for _ in range(rng.randint(2, 10)):
        world.walk(rng.choice(PEOPLE[:4]))
    who = rng.choice(sorted(world.where))
    room, index = world.where[who]
    return tuple(world.facts), f"Where is {who}?", room, (index,)


def where_is_a_thing(rng: Random) -> Asked:
    """Task 2."""
    while True:
        world = _moves(rng, rng.randint(6, 20))
        if world.been:
            thing = rng.choice(sorted(world.been))
            room, support = world.been[thing][-1]
            return tuple(world.facts), f"Where is the {thing}?", room, tuple(sorted(support))


def where_was_a_thing(rng: Random) -> Asked:
    """Task 3."""
    while True:
        world = _moves(rng, rng.randint(12, 40))
        moved = sorted(t for t, rooms in world.been.items() if len(rooms) > 1)
        if moved:
            thing = rng.choice(moved)
            (before, first), (room, last) = world.been[thing][-2:]
            support = tuple(sorted({*first, *last}))
            return tuple(world.facts), f"Where was the {thing} before the {room}?", before, support


def which_room_lies_where(rng: Random) -> Asked:
    """Task 4."""
    left, middle, right = rng.sample(ROOMS, 3)
    first, second = rng.sample(sorted(SIDES), 2)
    while SIDES[first] == second:  # the room in the middle would have two neighbours on the same side
        first, second = rng.sample(sorted(SIDES), 2)
    facts = (f"The {left} is {first} of the {middle}.", f"The {right} is {second} of the {middle}.")
    asked = rng.randrange(2)
    side, room = ((first, left), (second, right))[asked]
    if rng.random() < 0.5:
        return facts, f"What is {side} of the {middle}?", room, (asked,)
    return facts, f"What is the {room} {side} of?", middle, (asked,)


def who_gave_what(rng: Random) -> Asked:
    """Task 5."""
    world, gifts = World(rng), list[tuple[int, str, str, str]]()
    holder = {thing: rng.choice(PEOPLE[:4]) for thing in rng.sample(THINGS, 2)}
    for thing, who in holder.items():
        world.say(f"{who} picked up the {thing}.")
    for _ in range(rng.randint(2, 12)):
        if rng.random() < 0.4:
            world.walk(rng.choice(PEOPLE[:4]))
        else:
            thing = rng.choice(sorted(holder))
            giver = holder[thing]
            taker = holder[thing] = rng.choice([p for p in PEOPLE[:4] if p != giver])
            gifts.append((world.say(f"{giver} gave the {thing} to {taker}."), giver, thing, taker))
    if not gifts:
        return who_gave_what(rng)
    index, giver, thing, taker = gifts[-1]
    question, answer = rng.choice(
        (
            (f"What did {giver} give to {taker}?", thing),
            (f"Who gave the {thing} to {taker}?", giver),
            (f"Who did {giver} give the {thing} to?", taker),
            (f"Who received the {thing}?", taker),
        )
    )
    return tuple(world.facts), question, answer, (index,)


TASKS: dict[int, Callable[[Random], Asked]] = {
    1: where_is_somebody,
    2: where_is_a_thing,
    3: where_was_a_thing,
    4: which_room_lies_where,
    5: who_gave_what,
}


def stories(task: int, count: int) -> list[Story]:
    """The first `count` stories of a task; more begin with the same ones."""
    made = (TASKS[task](Random(f"world {task} {number}")) for number in range(count))
    return [
        Story(f"world{task}-{number:04d}", task, facts, question, answer, support)
        for number, (facts, question, answer, support) in enumerate(made)
    ]
