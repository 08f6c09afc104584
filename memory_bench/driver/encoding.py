"""Episodes as tokens: what is read, how many bytes and words each token covers, and where the questions stand.

Everything is encoded as it stands in its text:

- A text that is read goes on with the one before: a mark that a tokenizer puts before texts stands at the beginning
  only. No token spans two texts that are read, so that what is read, cut and scored has its own tokens.
- A question is asked on a fork, so prompt and choices are encoded together with the text before them, as evaluation
  harnesses do: the choice is what comes after as many tokens as the text has without it, and blanks that end a prompt
  belong to the choices. Where a token spans text and prompt, the fork begins before it.
- Behind a text that was cut to a number of tokens there is nothing to encode together with.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from memory_bench.backbone.tokenizer import Tokens
from memory_bench.cell import digest
from memory_bench.corpus import Line
from memory_bench.episode import Ask, Encode, Episode, Read
from memory_bench.errors import DataError


@dataclass(frozen=True, slots=True)
class Question:
    """An `Ask`, encoded: `at` is its place in the stream (tokens read before it).

    Where the answer is generated, the right one is the only choice. `apart` is the prompt behind any other text than
    the stream's.
    """

    ask: Ask
    event: int
    at: int
    distance_tokens: int
    distance_bytes: int
    evidence: Tensor
    prompt: Tensor
    apart: Tensor
    choices: tuple[Tensor, ...]

    def elsewhere(self) -> "Question":
        """The question behind another text than the stream's."""
        return replace(self, prompt=self.apart)

    @property
    def new_tokens(self) -> int:
        """Tokens to generate; 0 for a question with choices."""
        return 0 if self.ask.choices else max(self.ask.max_tokens, len(self.choices[0]))

    def place(self, length: int) -> int:
        """How many segments of `length` tokens are remembered when it is asked.

        Without a prompt the answer is predicted by the text's last token, so the segment of that token is still open.
        """
        return max(0, self.at - (not len(self.prompt))) // length

    def line(self, head: Tensor, choice: int, seed: int) -> Line:
        """`head` (what is read, unscored), the prompt, and one choice, of which only the choice is scored."""
        answer = self.choices[choice]
        ids = torch.cat([head, self.prompt, answer])
        scored = torch.zeros(len(ids), dtype=torch.bool)
        scored[len(ids) - len(answer) :] = True
        given = torch.zeros_like(scored)
        given[len(head) : len(ids) - len(answer)] = True
        return Line(ids, scored, given, seed)


@dataclass(frozen=True, slots=True)
class Stream:
    """An episode, encoded.

    Attributes:
        episode: where it comes from.
        line: all that is read; scored where a `Read` is.
        nbytes: UTF-8 bytes of each token.
        words: words that end in each token.
        events: event index of each token.
        questions: in order of their place.
    """

    episode: Episode
    line: Line
    nbytes: Tensor
    words: Tensor
    events: Tensor
    questions: tuple[Question, ...]

    @property
    def identity(self) -> dict[str, str]:
        """The columns that say which episode a row belongs to."""
        return {"episode": self.episode.id, "cluster": self.episode.cluster or self.episode.id}


def word_ends(text: str, nbytes: Sequence[int]) -> list[int]:
    """How many words (runs of non-blanks) end in each token, from the bytes each token covers."""
    ends = [m.end() for m in re.finditer(rb"\S+", text.encode())]
    borders = list(accumulate(nbytes))
    before = [bisect_right(ends, border) for border in [0, *borders]]
    return [after - at for at, after in pairwise(before)]


@dataclass(frozen=True, slots=True)
class Before:
    """What stands before a text, as far as it matters for how that is encoded.

    Attributes:
        text: what was read last and whole; empty where it was cut to a number of tokens, or nothing was read.
        first: `text`, or what comes where it is empty, is the beginning of all.
    """

    text: str = ""
    first: bool = True

    def encode(self, encode: Encode, more: str = "") -> tuple[list[int], list[int]]:
        """Token ids and bytes of `text` and `more` in one."""
        whole = self.text + more
        return encode(whole) if self.first or not isinstance(encode, Tokens) else encode.within(whole)


def encode_asked(
    encode: Encode, before: Before, prompt: str, continuations: Sequence[str]
) -> tuple[int, list[int], list[list[int]]]:
    """A prompt and what may continue it, as they stand behind a text.

    Returns:
        How many of the text's last tokens the prompt replaces (mostly none), its token ids, and those of every
        continuation.

    Raises:
        DataError: a continuation has no token of its own.
    """
    read = before.encode(encode)[0] if before.text else []
    known = before.encode(encode, prompt)[0] if prompt else read
    shared = next((n for n, pair in enumerate(zip(read, known, strict=False)) if pair[0] != pair[1]), len(read))
    shared = min(shared, len(known))
    found = [before.encode(encode, prompt + text)[0][len(known) :] for text in continuations]
    for text, ids in zip(continuations, found, strict=True):
        if text and not ids:
            end = (before.text + prompt)[-20:]
            raise DataError(
                f"{text!r} has no token of its own behind {end!r}: this tokenizer puts both into one. "
                "Let the answer begin with a blank."
            )
    return len(read) - shared, known[shared:], found


def _lead(read: Read, encode: Encode, first: bool, room: int) -> tuple[list[int], list[int], list[int]]:
    """The last `room` tokens of what is read before a text: their ids, bytes and words."""
    if not read.lead or room < 1:
        return [], [], []
    ids, sizes = Before(first=first).encode(encode, read.lead)
    return ids[-room:], sizes[-room:], word_ends(read.lead, sizes)[-room:]


def _question(ask: Ask, number: int, encode: Encode, before: Before, read: int, distances: tuple[int, int]) -> Question:
    """An `Ask` after `read` tokens; without its evidence."""
    asked, choices = ask.prompt, ask.choices or (ask.answer,)
    blanks = asked[len(asked.rstrip()) :] if ask.choices and asked.strip() else ""
    asked = asked.removesuffix(blanks)
    back, prompt, found = encode_asked(encode, before, asked, [blanks + choice for choice in choices])
    apart = prompt if before.first and not before.text else Before(first=False).encode(encode, asked)[0]
    return Question(
        ask=ask,
        event=number,
        at=read - back,
        distance_tokens=distances[0],
        distance_bytes=distances[1],
        evidence=torch.zeros(0, dtype=torch.long),
        prompt=torch.tensor(prompt, dtype=torch.long),
        apart=torch.tensor(apart, dtype=torch.long),
        choices=tuple(torch.tensor(ids, dtype=torch.long) for ids in found),
    )


def encode_episode(episode: Episode, encode: Encode, seed: int) -> Stream:
    """Token ids, bytes and places of everything in an episode; the row's seed comes from its id and `seed`.

    Raises:
        DataError: a choice has no token of its own behind its prompt.
    """
    ids = list(encode.beginning) if episode.begun and isinstance(encode, Tokens) else []
    nbytes, words, events, scored = [0] * len(ids), [0] * len(ids), [0] * len(ids), [False] * len(ids)
    ends: dict[str, tuple[int, int, list[int]]] = {}
    questions: list[Question] = []
    before = Before()
    for number, event in enumerate(episode.events):
        if isinstance(event, Read):
            first = event.anew or (before.first and not before.text)
            new, sizes = Before(first=first).encode(encode, event.text)
            if first and event.lead and len(new) < event.tokens:  # there is room for the lead before it
                new, sizes = Before(first=False).encode(encode, event.text)
            cut = bool(event.tokens) and len(new) > event.tokens
            new, sizes = new[: event.tokens or None], sizes[: event.tokens or None]
            lead = _lead(event, encode, first, event.tokens - len(new))
            ids += lead[0] + new
            nbytes += lead[1] + sizes
            words += lead[2] + word_ends(event.text, sizes)
            events += [number] * len(lead[0] + new)
            scored += [event.scored] * len(lead[0] + new)
            if event.tag:
                ends[event.tag] = (len(ids), sum(nbytes), ends.get(event.tag, (0, 0, []))[2] + new)
            if event.text or event.lead:
                before = Before("" if cut else event.text, first and not cut and not lead[0])
        else:
            end, byte_end, evidence = ends.get(event.evidence, (-1, -1, []))
            far = (len(ids) - end, sum(nbytes) - byte_end) if end >= 0 else (-1, -1)
            question = _question(event, number, encode, before, len(ids), far)
            questions.append(replace(question, evidence=torch.tensor(evidence, dtype=torch.long)))
    if scored:
        scored[0] = False
    row_seed = int(digest({"episode": episode.id, "seed": seed})[:7], 16)
    line = Line(torch.tensor(ids, dtype=torch.long), torch.tensor(scored, dtype=torch.bool), seed=row_seed)
    return Stream(episode, line, torch.tensor(nbytes), torch.tensor(words), torch.tensor(events), tuple(questions))
