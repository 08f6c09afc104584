"""bAbI's tasks 1 to 5 with the facts scattered in the text of books, as in BABILong.

After Kuratov et al. 2024 (arXiv:2406.10149). Unusual here:

- The answer is chosen among all answers of the task by likelihood, not generated: small models know no format, and the
  chance level is known.
- `length` counts the tokens of book text, exactly and for every tokenizer; the facts come on top. The distance of a
  question is measured from the last fact that it needs.
- The ceiling has the facts that are needed before the question and nothing else.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise, product
from random import Random

import numpy as np
import pandas as pd

from memory_bench.data import Library, Story
from memory_bench.episode import Ask, Document, Episode, Read
from memory_bench.errors import UserError

from .answers import BYTES_PER_TOKEN, Retention
from .passkey import irrelevant

TASKS = (1, 2, 3, 4, 5)


class Babi(Retention):
    """Simple facts among pages of books, and a question that needs one to three of them."""

    @dataclass(frozen=True, slots=True)
    class Config:
        """Options of the task."""

        # bAbI's numbers: one, two, three supporting facts, two and three arguments.
        tasks: tuple[int, ...] = TASKS
        # Tokens of book text around the facts.
        lengths: tuple[int, ...] = (0, 512, 1024, 2048, 4096)
        # Questions for every task; the same ones at every length.
        questions: int = 20
        # Of the choice of questions, of the books and of the places.
        seed: int = 0

        def __post_init__(self) -> None:
            if not self.tasks or not set(self.tasks) <= set(TASKS):
                raise UserError(f"babi: tasks are numbers from 1 to 5, not {self.tasks}.")
            if not self.lengths or min(self.lengths) < 0 or self.questions < 1:
                raise UserError("babi: lengths must not be negative, and questions must be at least 1.")

    version = 1
    needs = "babi"
    chance = 1 / 6  # of most of them; half-lives use it where memory was not wiped
    beside = ("books",)
    source = "Weston et al. 2015 (arXiv:1502.05698), scattered as in BABILong (arXiv:2406.10149)"

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()

    def episodes(self, library: Library, limit: int | None) -> Iterator[Episode]:
        """One episode a question and length; `limit` counts them. Tasks come in turn, then lengths, then questions."""
        config = self.config
        books = library.books("test") if max(config.lengths) else []
        asked = {task: one_a_story(library.babi(task), Random(f"babi {config.seed} {task}")) for task in config.tasks}
        choices = {task: choices_of(library.babi(task)) for task in config.tasks}
        turns = product(range(config.questions), config.lengths, config.tasks)
        found = [turn for turn in turns if turn[0] < len(asked[turn[2]])]
        for number, length, task in found[:limit]:
            story = asked[task][number]
            rng = Random(f"places {config.seed} {story.id} {length}")
            yield scattered(story, length, choices[task], rng, books)

    def levels(self, library: Library) -> Mapping[str, float]:
        """Chance: one of the task's answers."""
        return {"chance": float(np.mean([1 / len(choices_of(library.babi(task))) for task in self.config.tasks]))}

    def parts(self, asks: pd.DataFrame) -> Mapping[str, pd.DataFrame]:
        """By task, by length, and by measured distance up to the next power of two."""
        found: dict[str, pd.DataFrame] = {}
        for name in ("task", "length"):
            value = asks["label"].str.extract(rf"{name}=(\d+)", expand=False).astype(int)
            found |= {f"{name}={v}": asks[value == v] for v in sorted(value.unique())}
        upper = 2 ** np.ceil(np.log2(np.maximum(asks["distance_tokens"].to_numpy(), 1))).astype(int)
        return found | {f"distance={high}": asks[upper == high] for high in np.unique(upper)}


def one_a_story(found: list[Story], rng: Random) -> list[Story]:
    """One question of every story, in an order drawn with `rng`."""
    by_story: dict[str, list[Story]] = {}
    for s in found:
        by_story.setdefault(s.id.rsplit("-", 1)[0] if s.id.count("-") > 1 else s.id, []).append(s)
    picked = [rng.choice(same) for same in by_story.values()]
    rng.shuffle(picked)
    return picked


def choices_of(found: list[Story]) -> tuple[str, ...]:
    """All answers of a task, as they continue a prompt."""
    return tuple(f" {answer}" for answer in sorted({s.answer for s in found}))


def scattered(story: Story, length: int, choices: tuple[str, ...], rng: Random, books: list[Document]) -> Episode:
    """The facts in order at random places of `length` tokens of book text, then the question."""
    places = sorted(rng.randint(0, length) for _ in story.facts)
    text = irrelevant(length, rng, books) if length else ""
    events: list[Read | Ask] = []
    for number, (start, stop) in enumerate(pairwise([0, *places, length])):
        if stop > start:  # each piece has text enough for its tokens, wherever the tokenizer ends it
            piece = text[start * BYTES_PER_TOKEN : stop * BYTES_PER_TOKEN]
            events.append(Read(piece, tokens=stop - start))
        if number < len(story.facts):
            events.append(Read(f"\n{story.facts[number]}\n", tag="needed" if number in story.support else ""))
    prompt = f"\nQuestion: {story.question}\nAnswer:"
    events.append(Ask(prompt, choices, f" {story.answer}", "needed", f"task={story.task},length={length}"))
    return Episode(f"{story.id},length={length}", tuple(events), story.id)
