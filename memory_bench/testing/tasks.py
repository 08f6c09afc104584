"""Promises about tasks: the same episodes every time, questions that can be answered, metrics at known values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from memory_bench.backbone.model import Backbone
from memory_bench.data import Library
from memory_bench.driver.observe import observe
from memory_bench.episode import Episode, Estimate, Read, Task
from memory_bench.protocol import MemoryModel, Nothing, Readout, Segment, Traits
from memory_bench.testing.backbones import tiny_backbone
from memory_bench.testing.measures import require
from memory_bench.testing.task_shapes import check_class, check_training, episodes_of, estimates_of

BYTES = 256
BITS_PER_BYTE = 8.0  # of a uniform guess among all bytes


def check_task(task: Task, library: Library, *, limit: int = 4) -> None:
    """Run every check on the first `limit` documents, questions or episodes of a task, types first.

    Args:
        task: an instance, as ``Colours()``.
        library: where its data come from, as a run's: ``Library(folder or None, cache)`` of `memory_bench.data`. A task
            that makes its own never asks it: ``Library(None, tmp_path, hub=False)`` will do.
        limit: of what is tested.

    Raises:
        DataError: the library does not have the task's data.
        AssertionError: naming the first promise that is broken.
    """
    check_class(task)
    name, episodes = type(task).__name__, episodes_of(task, library, limit)
    require(bool(episodes), f"{name} must have episodes, but episodes(library, {limit}) gave none")
    again = episodes_of(task, library, limit)
    require(again == episodes, f"{name}'s episodes must be the same every time: {_difference(again, episodes)}")
    fewer = episodes_of(task, library, limit - 1)
    require(len(fewer) <= len(episodes), "a smaller limit must not give more episodes")
    require(fewer[:-1] == episodes[: len(fewer) - 1], "a smaller limit must give the first episodes")
    ids = [e.id for e in episodes]
    twice = sorted({i for i in ids if ids.count(i) > 1})
    require(not twice, f"episode ids must be unique, but {', '.join(map(repr, twice))} stands for several")
    for episode in episodes:
        check_episode(episode)
    check_training(task, library, as_bytes)
    check_metrics(task, episodes)


def _difference(again: Sequence[Episode], before: Sequence[Episode]) -> str:
    changed = [ours.id for ours, theirs in zip(again, before, strict=False) if ours != theirs]
    return f"episode {changed[0]!r} changed" if changed else f"there were {len(before)}, then {len(again)}"


def check_episode(episode: Episode) -> None:
    """Something is scored or asked, every question can be answered, and its evidence was read before."""
    tags: set[str] = set()
    asked = False
    for event in episode.events:
        if isinstance(event, Read):
            asked |= event.scored
            tags |= {event.tag} - {""}
            continue
        asked = True
        where = f"episode {episode.id}: "
        if event.choices:
            require(event.answer in event.choices, f"{where}the answer {event.answer!r} is not among the choices")
            distinct = len(event.choices) > 1 and len(set(event.choices)) == len(event.choices)
            require(distinct, f"{where}a question needs two or more different choices")
        else:
            require(event.max_tokens > 0, f"{where}a question without choices must say how many tokens to generate")
            require(bool(event.answer.strip()), f"{where}a question needs an answer")
        read_before = event.evidence == "" or event.evidence in tags
        require(read_before, f"{where}the evidence {event.evidence!r} must be read before its question")
    require(asked, f"episode {episode.id}: nothing is scored and nothing is asked")


def check_metrics(task: Task, episodes: Sequence[Episode]) -> None:
    """The headline of an oracle and of a model that knows nothing are what they must be."""
    rows = observe(UniformModel(tiny_backbone("llama")), list(episodes), as_bytes, seed=0, decode=from_bytes)
    guessed = pd.DataFrame(rows)
    told = [row["kind"] == "read" or row["distance_tokens"] >= 0 for row in rows]  # evidence of the others was not read
    known = pd.DataFrame(
        [
            {
                **row,
                "nll": 0.0 if sure else row["nll"],
                "predicted": row["answer"],
                "generated": row["answer"],
                "greedy": True,
            }
            for row, sure in zip(rows, told, strict=True)
        ]
    )
    worst, best = _headline(task, guessed), _headline(task, known)
    better = best.value > worst.value if best.higher_is_better else best.value < worst.value
    require(better, f"{task.headline} must be better for an oracle ({best.value}) than for a guess ({worst.value})")
    if task.headline == "bits_per_byte":
        require(
            math.isclose(worst.value, BITS_PER_BYTE, rel_tol=1e-5), f"a uniform guess is {worst.value} bits per byte"
        )
        require(best.value == 0.0, f"an oracle has {best.value} bits per byte")
    if task.headline == "accuracy":
        require(best.value == 1.0, f"an oracle has an accuracy of {best.value}")
    chances = [e for e in (best, worst) if e.low is not None and e.high is not None]
    inside = all(e.low - 1e-9 <= e.value <= e.high + 1e-9 for e in chances if e.low is not None and e.high is not None)
    require(inside, f"the interval of {task.headline} must contain its value")


def _headline(task: Task, samples: pd.DataFrame) -> Estimate:
    found = estimates_of(task, samples)
    named = bool(found) and found[0].metric == task.headline and found[0].slice == ""
    got = f"{found[0].metric} {found[0].slice}".strip() if found else "nothing"
    require(named, f"the first metric must be the headline {task.headline}, over everything, but it is {got}")
    return found[0]


def as_bytes(text: str) -> tuple[list[int], list[int]]:
    """A tokenizer without vocabulary: one token a byte."""
    data = list(text.encode())
    return data, [1] * len(data)


def from_bytes(ids: list[int]) -> str:
    """`as_bytes` backwards."""
    return bytes(ids).decode(errors="replace")


@dataclass(frozen=True, slots=True)
class _Config:
    segment: int = 512


class UniformModel(MemoryModel[Nothing]):
    """Gives every byte the same probability, whatever was read."""

    Config = _Config
    source = "none"

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.traits = Traits(segment=512, chunk_invariant=True)

    def open(self, rows: int, *, seeds: Sequence[int] | None = None) -> Nothing:
        """See `MemoryModel.open`."""
        del rows, seeds
        return Nothing()

    def step(self, state: Nothing, segment: Segment, *, write: bool = True) -> tuple[Readout, Nothing]:
        """See `MemoryModel.step`."""
        del write
        return Readout(torch.zeros(*segment.ids.shape, 1), _flat), state

    def flops(self, tokens: int, remembered: int) -> int:
        """See `MemoryModel.flops`."""
        del tokens, remembered
        return 0

    def absorb_flops(self, tokens: int, remembered: int) -> int:
        """See `MemoryModel.absorb_flops`."""
        del tokens, remembered
        return 0


def _flat(hidden: Tensor) -> Tensor:
    return hidden.new_zeros(*hidden.shape[:-1], BYTES)
