"""LoCoMo: a conversation of many sessions is read, and questions about it are asked at its end.

After Maharana et al. 2024 (arXiv:2402.17753). Unusual here:

- No judge: an answer counts where the right one stands in it (*accuracy*), and the overlap of words with its first line
  is measured (*F1*, as SQuAD's script does; the original stems words and takes lists apart, so its F1 is another).
- Adversarial questions, which have no answer, are left out. A conversation is read once, and all questions are asked on
  forks of it; intervals are over conversations, of which there are ten.
- The distance is measured from the last turn that is needed, and the ceiling has this turn in its prompt: for a
  question that needs several it is no ceiling. By distance means up to the next power of two; there is no half-life.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

import numpy as np
import pandas as pd

from memory_bench.data import Library
from memory_bench.data.conversations import CATEGORIES, Conversation, Turn, Wanted
from memory_bench.episode import Ask, Episode, Estimate, Read
from memory_bench.errors import UserError
from memory_bench.finite import check_samples, unanswered

from .answers import CONTROLS, Retention, average, normalise

ADVERSARIAL = max(CATEGORIES)
OFFICIAL = (
    "\nBased on the above context, write an answer in the form of a short phrase for the following question. "
    "Answer with exact words from the context whenever possible.\n\nQuestion: {} Short answer:"
)


class Locomo(Retention):
    """Questions about long conversations, or about invented ones where LoCoMo's file is not there."""

    @dataclass(frozen=True, slots=True)
    class Config:
        """Options of the task."""

        # LoCoMo's categories: 1 several turns, 2 time, 3 common knowledge, 4 one turn.
        categories: tuple[int, ...] = (1, 2, 3, 4)
        # Questions of every conversation, drawn; 0: all of them.
        questions: int = 20
        # Tokens of an answer.
        max_tokens: int = 32
        # official: the original's prompt.
        wording: Literal["plain", "official"] = "plain"
        # Of the choice of questions.
        seed: int = 0

        def __post_init__(self) -> None:
            known = set(CATEGORIES) - {ADVERSARIAL}
            if not self.categories or not set(self.categories) <= known:
                raise UserError(f"locomo: categories are numbers from 1 to {max(known)}, not {self.categories}.")
            if self.questions < 0 or self.max_tokens < 1:
                raise UserError("locomo: questions must not be negative (0: all), and max_tokens be at least 1.")

    version = 1
    needs = "locomo"
    source = "Maharana et al. 2024 (arXiv:2402.17753); adversarial questions left out, no judge"

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()

    def episodes(self, library: Library, limit: int | None) -> Iterator[Episode]:
        """One episode a conversation; `limit` counts them."""
        made = 0
        for conversation in library.conversations():
            if made == limit:
                return
            if asked := self._chosen(conversation):
                made += 1
                yield Episode(conversation.id, (*_reads(conversation), *map(self._ask, asked)))
        if not made:
            raise UserError(f"locomo: no conversation has questions of categories {self.config.categories}.")

    def _chosen(self, conversation: Conversation) -> list[Wanted]:
        """The questions asked, in the order of the file."""
        own = self.config
        found = [q for q in conversation.questions if q.category in own.categories]
        if not own.questions or own.questions >= len(found):
            return found
        places = Random(f"locomo {own.seed} {conversation.id}").sample(range(len(found)), own.questions)
        return [found[place] for place in sorted(places)]

    def _ask(self, wanted: Wanted) -> Ask:
        plain = self.config.wording == "plain"
        prompt = f"\n\nQuestion: {wanted.question}\nAnswer:" if plain else OFFICIAL.format(wanted.question)
        evidence = f"turn {wanted.evidence[-1]}" if wanted.evidence else ""
        label = f"category={wanted.category},turns={len(wanted.evidence)}"
        return Ask(prompt, (), f" {wanted.answer}", evidence, label, self.config.max_tokens, (wanted.answer,))

    def metrics(self, samples: pd.DataFrame, seed: int = 0) -> list[Estimate]:
        """As `Retention.metrics`, and F1, which is not given where some questions are unanswered."""
        asks = check_samples(samples)[samples["kind"] == "ask"].reset_index(drop=True)
        # No half-life: every question has a distance of its own.
        found = super().metrics(asks.assign(measured=asks["distance_tokens"], distance_tokens=-1), seed)
        asks = asks.assign(measured=asks["distance_tokens"], f1=[_f1(*pair) for pair in _pairs(asks)])
        main = asks[asks["control"] == ""]
        if main.empty or unanswered(main).any():
            return found
        parts = {"": main, **self.parts(main)}
        parts |= {f"control:{c}": part for c in CONTROLS if len(part := asks[asks["control"] == c])}
        return found + [average("f1", part, "f1", "share", seed, name) for name, part in parts.items()]

    def parts(self, asks: pd.DataFrame) -> Mapping[str, pd.DataFrame]:
        """By category, and by measured distance up to the next power of two, where the turn is known."""
        category = asks["label"].str.extract(r"category=(\d+)", expand=False).astype(int)
        found = {f"category={n}": asks[category == n] for n in sorted(category.unique())}
        far = asks["measured"].to_numpy()
        upper = np.where(far >= 0, 2 ** np.ceil(np.log2(np.maximum(far, 1))).astype(int), -1)
        return found | {f"distance={high}": asks[upper == high] for high in np.unique(upper) if high >= 0}


def _pairs(asks: pd.DataFrame) -> Iterator[tuple[str, Sequence[str]]]:
    """What was written, and what counts as right."""
    for generated, accepted in zip(asks["generated"], asks["accepted"], strict=True):
        yield generated if isinstance(generated, str) else "", () if accepted is None else accepted


def _f1(generated: str, accepted: Sequence[str]) -> float:
    """The overlap of words, as F1, of the first line that was written with the answer that fits it best."""
    lines = generated.strip().splitlines()
    return max((f1(lines[0] if lines else "", answer) for answer in accepted), default=0.0)


def f1(said: str, answer: str) -> float:
    """F1 of the words of `said` and of `answer`, both normalised; 0 without a common word."""
    first, second = (Counter(normalise(text).split()) for text in (said, answer))
    common = (first & second).total()
    return 2 * common / (first.total() + second.total()) if common else 0.0


def _reads(conversation: Conversation) -> Iterator[Read]:
    """Every session with its date, every turn with its speaker; a turn is a text of its own, so that it has a name."""
    for number, session in enumerate(conversation.sessions):
        yield Read(f"{'' if not number else chr(10)}DATE: {session.date}\nCONVERSATION:\n")
        for turn in session.turns:
            yield Read(_said(turn), tag=f"turn {turn.id}")


def _said(turn: Turn) -> str:
    """A turn as the original writes it."""
    shows = f" and shared {turn.shows}." if turn.shows else ""
    return f'{turn.speaker} said, "{turn.text}"{shows}\n'
