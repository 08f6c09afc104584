"""Retention: a passage is read, then unrelated ones, and a question about it is asked after more and more of them.

After MemoryLLM's knowledge retention (Wang et al. 2024, arXiv:2402.04624, test_qa_memory.py) on SQuAD and Natural
Questions. Unusual here:

- A stream is read once. At every step all questions that are due are answered on forks, so what was asked cannot be
  remembered, and twelve distances cost little more than one.
- Every text is a chunk of the same number of tokens, whatever the tokenizer: distances are exact, and streams stay in
  step. The passage stands at the end of its chunk, behind unrelated text (`aligned`; off: it is the first thing read).
- Items are independent: every stream starts with a fresh memory (`carry_over` is the original's habit).
- Unrelated passages are of other articles, hold no accepted answer, and are drawn for every item; those of a step are
  the first of those of the next.
- The original keeps answers of at most 3 or 4 tokens. A task knows no tokenizer, so here it is words and characters;
  how many tokens an answer had is a column of the samples.
- Questions that are answered without any memory are kept, and `control:wiped` says how many they are (the paper's
  borderline).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from random import Random
from typing import ClassVar, Literal

from memory_bench.data import Library, Passage
from memory_bench.episode import Ask, Episode, Read
from memory_bench.errors import UserError

from .answers import BYTES_PER_TOKEN, Retention

MOST_STEPS = 312  # 160k tokens in chunks of 512, as far as M+ was tested
ANSWER_WORDS = 3
ANSWER_CHARACTERS = (4, 24)  # shorter ones are in every text by chance
PASSAGE_BYTES = (100, 2000)  # about 20 to 500 tokens


@dataclass(frozen=True, slots=True)
class RetentionConfig:
    """Options of the task."""

    # After how many unrelated chunks the question is asked.
    steps: tuple[int, ...] = (0, 1, 2, 5, 10, 20)
    # Tokens of a chunk.
    chunk: int = 512
    # Questions, one a passage.
    questions: int = 100
    # Tokens of an answer.
    max_tokens: int = 10
    # The passage ends its chunk, behind unrelated text; off: nothing is before it.
    aligned: bool = True
    # All items in one stream, as the original does without --backup_memory: one document, so no intervals.
    carry_over: bool = False
    # official: "Context: ..." and "Questions: ... Answer:".
    wording: Literal["plain", "official"] = "plain"
    # Of the choice of questions and of unrelated passages.
    seed: int = 0

    def __post_init__(self) -> None:
        steps = self.steps
        if not steps or list(steps) != sorted(set(steps)) or steps[0] < 0 or steps[-1] > MOST_STEPS:
            raise UserError(f"retention: steps must be increasing numbers from 0 to {MOST_STEPS}, not {steps}.")
        if min(self.chunk, self.questions, self.max_tokens) < 1:
            raise UserError("retention: chunk, questions and max_tokens must be at least 1.")


class PassageRetention(Retention):
    """What SQuAD and Natural Questions share."""

    Config = RetentionConfig
    version = 1
    mark: ClassVar[str] = ""

    def __init__(self, config: RetentionConfig | None = None) -> None:
        self.config = config or self.Config()

    def episodes(self, library: Library, limit: int | None) -> Iterator[Episode]:
        """One stream an item; `limit` counts items."""
        config = self.config
        found = self._items(library, limit)
        if not config.carry_over:
            yield from found
            return
        yield Episode("all", tuple(event for item in found for event in item.events))

    def _items(self, library: Library, limit: int | None) -> Iterator[Episode]:
        config = self.config
        others = Others(library.passages(self.needs, "train"), config.chunk * BYTES_PER_TOKEN)
        wanted = config.questions if limit is None else min(limit, config.questions)
        made = 0
        for item in chosen(library.passages(self.needs, "test"), Random(f"questions {config.seed}")):
            if made == wanted:
                return
            texts = others.chunks(item, 1 + config.steps[-1], Random(f"others {config.seed} {item.id}"))
            if texts is not None:
                made += 1
                yield self._episode(item, texts)
        if not made:
            raise UserError(f"{self.needs}: no question has enough unrelated text for {config.steps[-1]} steps.")

    def _episode(self, item: Passage, texts: Sequence[str]) -> Episode:
        """The passage, and before every step the chunks that it is after."""
        config, official = self.config, self.config.wording == "official"
        context = f"Context: {item.text}" if official else item.text
        asked = item.question.removesuffix(self.mark) + self.mark
        prompt = f" Questions: {asked} Answer:" if official else f"\n\nQuestion: {asked}\nAnswer:"
        lead, *between = texts
        tag = f"passage {item.id}"
        start = f"\n\n{context}" if config.aligned else context
        events: list[Read | Ask] = [Read(start, tag=tag, tokens=config.chunk, lead=lead if config.aligned else "")]
        done = 0
        for step in config.steps:
            events += [Read(f"\n\n{text}", tokens=config.chunk) for text in between[done:step]]
            done = step
            label = f"distance={step * config.chunk}"
            answer = f" {item.answers[0]}"
            events.append(Ask(prompt, (), answer, tag, label, config.max_tokens, item.answers))
        return Episode(item.id, tuple(events))


class SquadRetention(PassageRetention):
    """Questions of SQuAD after up to 312 unrelated passages."""

    needs = "squad"
    source = "Rajpurkar et al. 2016 (arXiv:1606.05250), asked as in MemoryLLM (arXiv:2402.04624)"


class NQRetention(PassageRetention):
    """Questions of Natural Questions (NQ-open with its passages) after up to 312 unrelated passages."""

    needs = "nq"
    mark = "?"
    source = "Kwiatkowski et al. 2019, NQ-open with gold passages, asked as in MemoryLLM (arXiv:2402.04624)"


def chosen(passages: Sequence[Passage], rng: Random) -> list[Passage]:
    """Questions with short answers, one a passage, in turn from all articles; `rng` orders articles and passages."""
    titles: dict[str, dict[str, list[Passage]]] = {}
    for p in passages:
        if usable(p):
            titles.setdefault(p.title, {}).setdefault(p.text, []).append(p)
    order = sorted(titles)
    rng.shuffle(order)
    per_title = []
    for title in order:
        texts = [rng.choice(same) for same in titles[title].values()]
        rng.shuffle(texts)
        per_title.append(texts)
    return [p for p in chain.from_iterable(zip_longest(*per_title)) if p is not None]


def usable(item: Passage) -> bool:
    """Whether passage and answers have the right lengths."""
    (low, high), (least, most) = PASSAGE_BYTES, ANSWER_CHARACTERS
    first = item.answers[0] if item.answers else ""
    return (
        low <= len(item.text.encode()) <= high
        and first in item.text
        and len(first.split()) <= ANSWER_WORDS
        and least <= len(first) <= most
        and all(len(answer) >= least for answer in item.answers)
    )


class Others:
    """Passages to read between a passage and its question.

    Args:
        passages: of a split.
        size: bytes of a chunk, more than its tokens need.
    """

    def __init__(self, passages: Sequence[Passage], size: int) -> None:
        texts = {p.text: p for p in passages}
        self.passages = list(texts.values())
        self.lower = [p.text.lower() for p in self.passages]
        self.sizes = [len(p.text.encode()) + 1 for p in self.passages]
        self.size = size

    def chunks(self, item: Passage, count: int, rng: Random) -> list[str] | None:
        """`count` chunks of whole passages unrelated to `item`, drawn with `rng`; fewer begin with the same ones.

        None if there are not so many.
        """
        order = list(range(len(self.passages)))
        rng.shuffle(order)
        answers = [answer.lower() for answer in item.answers]
        found: list[str] = []
        held: list[str] = []
        room = self.size
        for n in order:
            other = self.passages[n]
            if other.text == item.text or (item.title and other.title == item.title):
                continue
            if any(answer in self.lower[n] for answer in answers):
                continue
            held.append(other.text)
            room -= self.sizes[n]
            if room <= 0:
                found.append("\n".join(held))
                held, room = [], self.size
                if len(found) == count:
                    return found
        return None
