"""Episodes as tokens: what is read, how many bytes and words each token covers, and where the questions stand."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from memory_bench.cell import digest
from memory_bench.corpus import Line
from memory_bench.episode import Ask, Encode, Episode, Read


@dataclass(frozen=True, slots=True)
class Question:
    """An `Ask`, encoded: `at` is its place in the stream (tokens read before it).

    Where the answer is generated, the right one is the only choice.
    """

    ask: Ask
    event: int
    at: int
    distance_tokens: int
    distance_bytes: int
    evidence: Tensor
    prompt: Tensor
    choices: tuple[Tensor, ...]

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


def _lead(read: Read, encode: Encode, room: int) -> tuple[list[int], list[int], list[int]]:
    """The last `room` tokens of what is read before a text: their ids, bytes and words."""
    if not read.lead or room < 1:
        return [], [], []
    ids, sizes = encode(read.lead)
    return ids[-room:], sizes[-room:], word_ends(read.lead, sizes)[-room:]


def encode_episode(episode: Episode, encode: Encode, seed: int) -> Stream:
    """Token ids, bytes and places of everything in an episode; the row's seed comes from its id and `seed`."""
    ids: list[int] = []
    nbytes: list[int] = []
    words: list[int] = []
    events: list[int] = []
    scored: list[bool] = []
    ends: dict[str, tuple[int, int, list[int]]] = {}
    questions: list[Question] = []
    for number, event in enumerate(episode.events):
        if isinstance(event, Read):
            new, sizes = (part[: event.tokens or None] for part in encode(event.text))
            before = _lead(event, encode, event.tokens - len(new))
            ids += before[0] + new
            nbytes += before[1] + sizes
            words += before[2] + word_ends(event.text, sizes)
            events += [number] * len(before[0] + new)
            scored += [event.scored] * len(before[0] + new)
            if event.tag:
                ends[event.tag] = (len(ids), sum(nbytes), ends.get(event.tag, (0, 0, []))[2] + new)
        else:
            end, byte_end, evidence = ends.get(event.evidence, (-1, -1, []))
            questions.append(
                Question(
                    ask=event,
                    event=number,
                    at=len(ids),
                    distance_tokens=len(ids) - end if end >= 0 else -1,
                    distance_bytes=sum(nbytes) - byte_end if end >= 0 else -1,
                    evidence=torch.tensor(evidence, dtype=torch.long),
                    prompt=torch.tensor(encode(event.prompt)[0], dtype=torch.long),
                    choices=tuple(
                        torch.tensor(encode(c)[0], dtype=torch.long) for c in event.choices or (event.answer,)
                    ),
                )
            )
    if scored:
        scored[0] = False
    row_seed = int(digest({"episode": episode.id, "seed": seed})[:7], 16)
    line = Line(torch.tensor(ids, dtype=torch.long), torch.tensor(scored, dtype=torch.bool), seed=row_seed)
    return Stream(episode, line, torch.tensor(nbytes), torch.tensor(words), torch.tensor(events), tuple(questions))
