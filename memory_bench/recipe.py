"""Training recipes as data: stages, optimiser, schedule. Lengths are shares of the budget or fixed numbers of steps."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

from memory_bench.card import ADAPTED
from memory_bench.errors import UserError, unknown


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a training with examples of one length.

    Attributes:
        segments: segments in an example.
        rows: examples in a batch.
        share: share of the budget's tokens, FLOPs or seconds spent here; ignored with `steps`.
        steps: a fixed number of optimiser steps (curricula that all models must see alike).
        model: config fields of the model that differ in this stage, for example ``{"recall": False}``; names that a
            model does not have are ignored, so that one recipe serves all.
    """

    segments: int
    rows: int
    share: float = 1.0
    steps: int | None = None
    model: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is trained; the same for all models of a comparison.

    Attributes:
        name: as in `RECIPES`.
        stages: in order; one schedule spans them all, and one optimiser as long as the model's config stays.
        lr: peak learning rate (AdamW).
        betas, weight_decay, clip: of the optimiser; decay on matrices only; clip is a gradient norm.
        warmup: steps of linear warm-up.
        decay_from: share of the training after which the rate falls linearly.
        floor: the last rate as a share of the peak.
        bptt: segments between two detachments of the state; None: gradients flow through the whole example.
        memory_lr: learning rate of what the method adds to its backbone, as a multiple of `lr`.
        trains: ``all`` weights or only the ``memory`` (what the method adds, and the adapters).
        lora_rank: of the low-rank adapters that every model's backbone gets, the window's too, so that a method is not
            praised for what is mere adaptation; 0: none. Only where not all weights train.
        lora_alpha: an adapter's update is scaled by ``lora_alpha / lora_rank``.
        lora_targets: what has an adapter, of `ADAPTED`.
        lora_lr: learning rate of the adapters, as a multiple of `lr`.
        checkpoint: recompute each segment in the backward pass instead of keeping its activations.
        aux_from: share of the training after which a model's own auxiliary loss is added.
        shortest: the shortest segment of an example as a share of the model's: below 1 their lengths are drawn, anew
            for every optimiser step and alike for all models, uniformly from there to the model's (0: from 2 tokens).
        version: raised when numbers may change.
    """

    name: str
    stages: tuple[Stage, ...]
    lr: float
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup: int = 20
    decay_from: float = 0.4
    floor: float = 0.03
    bptt: int | None = None
    memory_lr: float = 1.0
    trains: str = "all"
    checkpoint: bool = False
    aux_from: float = 2 / 3
    lora_rank: int = 0
    lora_alpha: float = 32.0
    lora_targets: tuple[str, ...] = ADAPTED
    lora_lr: float = 1.0
    version: int = 1
    shortest: float = 1.0

    def __post_init__(self) -> None:
        if self.lora_rank < 0 or self.lora_alpha <= 0 or self.lora_lr < 0:
            raise UserError(
                f"Recipe {self.name}: lora_rank and lora_lr must not be negative, and lora_alpha must be above zero."
            )
        if self.lora_rank and (self.trains == "all" or not self.lora_targets):
            why = "all weights train anyway (trains = all)" if self.trains == "all" else "lora_targets names nothing"
            raise UserError(f"Recipe {self.name}: adapters of rank {self.lora_rank} have no use, since {why}.")
        if not 0 <= self.shortest <= 1:
            raise UserError(f"Recipe {self.name}: shortest must be a share from 0 to 1, not {self.shortest}.")
        for target in self.lora_targets:
            if target not in ADAPTED:
                raise unknown("target in lora_targets", target, ADAPTED)

    def lengths(self, segment: int, seed: int, step: int) -> Iterator[int] | None:
        """Lengths of the segments of optimiser step `step` without end; None: all are `segment` tokens long.

        They depend on nothing but what is given, so a training that is continued goes on as if it had not stopped.
        """
        if self.shortest >= 1:
            return None
        low, rng = min(segment, max(2, math.ceil(self.shortest * segment))), Random(f"lengths {seed} {step}")
        return iter(lambda: rng.randint(low, segment), None)

    def rate(self, done: float, step: int) -> float:
        """Learning rate when the share `done` (0 to 1) of the training is over, at optimiser step `step` (from 0)."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        if done <= self.decay_from:
            return self.lr * warm
        left = (1 - min(done, 1.0)) / (1 - self.decay_from)
        return self.lr * warm * (self.floor + (1 - self.floor) * left)


def _growing(last: int) -> tuple[Stage, ...]:
    """A curriculum of distances: 1, 2 and 4 segments for 100 steps each, then 8 for `last`."""
    return tuple(Stage(segments=n, rows=32, steps=steps) for n, steps in ((1, 100), (2, 100), (4, 100), (8, last)))


RECIPES: dict[str, Recipe] = {
    r.name: r
    for r in (
        Recipe("tiny-pretrain", (Stage(segments=8, rows=8, steps=280),), lr=3e-3),
        Recipe("tiny", (Stage(segments=8, rows=8),), lr=1.5e-3),
        # As many tokens a step as `tiny`, for a model that reads four times as long a window.
        Recipe("tiny-wide", (Stage(segments=2, rows=8),), lr=1.5e-3),
        Recipe("tiny-qa", (Stage(segments=0, rows=8),), lr=1.5e-3),
        Recipe(
            "invented-studies",
            (
                # Recurrent memories learn whose outcome is whose late in the second stage: it must not be short.
                Stage(segments=1, rows=32, steps=100),
                Stage(segments=2, rows=32, steps=260),
                Stage(segments=4, rows=32, steps=130),
            ),
            lr=3e-3,
            warmup=50,
            decay_from=0.6,
        ),
        *(
            Recipe(name, _growing(last), lr=3e-3, weight_decay=0.01, warmup=50, decay_from=0.6)
            for name, last in (("key-value", 150), ("fact-updates", 150), ("noun-recall", 200))
        ),
        # One fact over one border: seconds, and yet a memory that is not written is at chance.
        Recipe(
            "key-value-short",
            (Stage(segments=1, rows=16, steps=40), Stage(segments=2, rows=16, steps=110)),
            lr=3e-3,
            weight_decay=0.01,
            decay_from=0.6,
        ),
        # Rank and learning rate as in the official HMT and MemoryLLM trainings with LoRA.
        Recipe(
            "adapt", (Stage(segments=4, rows=8),), lr=1e-4, trains="memory", checkpoint=True, lora_rank=16, version=2
        ),
        # A pretrained backbone moves little while a gate must open: its rate is 10 to 100 times that of the weights.
        Recipe("finetune", (Stage(segments=4, rows=8),), lr=2e-5, memory_lr=50.0, checkpoint=True),
        Recipe(
            "hmt-two-stage",
            (
                Stage(segments=2, rows=8, share=0.3, model={"recall": False}),
                Stage(segments=8, rows=8, share=0.7),
            ),
            lr=1.5e-3,
        ),
        # No gradients through every second border; uneven segments, none shorter than half (official: from 2 tokens,
        # `shortest` = 0). Officially what lies between two such borders has a loss of its own without its first token.
        Recipe("autocompressor", (Stage(segments=4, rows=8),), lr=1.5e-3, bptt=2, shortest=0.5),
        # The same with the rates of the official OPT-2.7B training: slow, long warm-up, straight down, no decay.
        Recipe(
            "autocompressor-finetune",
            (Stage(segments=4, rows=16),),
            lr=2e-5,
            betas=(0.9, 0.999),
            weight_decay=0.0,
            warmup=1000,
            decay_from=0.0,
            floor=0.0,
            bptt=2,
            shortest=0.5,
            checkpoint=True,
        ),
        # Adam moves a gate by its rate a step: with the weights' own it stays where it began. The paper's rate is 0.01.
        # Many segments: an example of a few hardly needs its memory.
        Recipe("infini-attention", (Stage(segments=16, rows=4),), lr=1.5e-3, memory_lr=7.0),
        Recipe(
            "infini-attention-adapt",
            (Stage(segments=16, rows=2),),
            lr=1e-4,
            trains="memory",
            memory_lr=100.0,
            checkpoint=True,
            lora_rank=16,
        ),
        # The vectors' length is part of the loss from the start. Official: 7e-5, on a backbone of 125M parameters; with
        # it the net of a small one stays where it began.
        Recipe("memoryprompt", (Stage(segments=8, rows=8),), lr=1.5e-3, weight_decay=0.01, aux_from=0.0),
        Recipe(
            "memlong-two-stage",  # as published: without memory first, then only what is above the stored keys
            (
                Stage(segments=8, rows=8, share=0.3, model={"retrieved_chunks": 0}),
                Stage(segments=8, rows=8, share=0.7, model={"freeze_below": True}),
            ),
            lr=1.5e-3,
        ),
    )
}


def fixed_steps(recipe: Recipe) -> int:
    """Total optimiser steps of a recipe that brings its own number (a stand-in's curriculum); else 0."""
    steps = [stage.steps for stage in recipe.stages]
    return 0 if any(s is None for s in steps) else sum(s or 0 for s in steps)


def find_recipe(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
        UserError: no such recipe.
    """
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]
