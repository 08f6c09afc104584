"""Trains the tiny backbone as a plain language model: stage 1 of every comparison, done once and cached."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memory_bench.backbone.model import Backbone
from memory_bench.backbone.tokenizer import Tokens
from memory_bench.budget import Budget
from memory_bench.corpus import TextCorpus
from memory_bench.data.library import Library
from memory_bench.driver.meter import Meter
from memory_bench.driver.train import train
from memory_bench.episode import Encode
from memory_bench.protocol import MemoryModel, Nothing, Readout, Segment, Traits
from memory_bench.recipe import find_recipe


@dataclass(frozen=True, slots=True)
class WindowConfig:
    """The plain window's only option."""

    segment: int


class Window(MemoryModel[Nothing]):
    """The backbone alone, one segment at a time: what `pretrain` trains.

    The `truncation` baseline is the same thing as a plug-in; the harness imports no plug-ins.
    """

    Config = WindowConfig

    def __init__(self, backbone: Backbone, config: WindowConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.traits = Traits(segment=config.segment)

    def open(self, rows: int, *, seeds: Sequence[int] | None = None) -> Nothing:
        """See `MemoryModel.open`."""
        return Nothing()

    def step(self, state: Nothing, segment: Segment, *, write: bool = True) -> tuple[Readout, Nothing]:
        """See `MemoryModel.step`."""
        hidden = self.backbone.run(self.backbone.embed(segment.ids), segment.mask)
        return Readout(hidden, self.backbone.head), state

    def flops(self, tokens: int, remembered: int) -> int:
        """See `MemoryModel.flops`."""
        return self.backbone.flops(tokens, tokens)


def encode_documents(texts: Sequence[str], encode: Encode) -> list[Tensor]:
    """Token ids ``[tokens]`` of each text."""
    if isinstance(encode, Tokens):
        return encode.documents(texts)
    return [torch.tensor(encode(text)[0], dtype=torch.long) for text in texts]


def pretrain(
    backbone: Backbone, encode: Encode, library: Library, *, window: int = 32, seed: int = 0
) -> dict[str, Any]:
    """Train `backbone` in place on the training books with the recipe ``tiny-pretrain``.

    Returns:
        Facts for its card: tokens, steps, seconds, losses.
    """
    started = time.monotonic()
    corpus = TextCorpus(encode_documents([d.text for d in library.books("train")], encode))
    meter = Meter(Budget("pretraining"), torch.device("cpu"))
    recipe = find_recipe("tiny-pretrain")
    with meter.phase("train"):
        done = train(lambda c: Window(backbone, c), WindowConfig(window), recipe, corpus, meter, seed=seed)
    losses = [loss for _, loss in done.curve]
    return {
        "recipe": recipe.name,
        "data": library.source("books").label,
        "train_tokens": meter.usage.train_tokens,
        "steps": meter.usage.train_steps,
        "seconds": round(time.monotonic() - started, 1),
        "first_loss": losses[0],
        "last_loss": sum(losses[-20:]) / len(losses[-20:]),
    }
