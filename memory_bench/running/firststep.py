"""Refuses limits on tokens and FLOPs below one optimiser step, before anything trains.

What a step reads and computes is the model's own: rows and segments of the recipe's first stage, cut as the model reads
them, FLOPs by its own formula. Limits far above a rough estimate are not looked at closely.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from memory_bench.backbone.outline import outline
from memory_bench.backbone.small import CLOSED
from memory_bench.budget import Budget, amount
from memory_bench.card import BackboneCard
from memory_bench.data.library import Library
from memory_bench.driver.meter import TRAIN_PASSES, training_flops
from memory_bench.driver.stream import segment_length
from memory_bench.driver.train import stage_config, trained_parameters, untrained
from memory_bench.episode import Task, TrainingPlan
from memory_bench.errors import UserError
from memory_bench.protocol import MemoryModel
from memory_bench.recipe import Recipe, Stage, fixed_steps
from memory_bench.zoo.named import Backbones

FAR = 10  # times the rough estimate; no method here costs as many times its backbone


@dataclass(frozen=True, slots=True)
class Trainer:
    """What a model's training on a task is made of, as far as it is planned."""

    label: str
    cls: type[MemoryModel[Any]]
    config: Any
    recipe: Recipe
    card: BackboneCard
    task_name: str
    task: Task
    plan: TrainingPlan

    @property
    def first(self) -> Stage:
        """The stage with the first step."""
        return next((s for s in self.recipe.stages if s.steps != 0), self.recipe.stages[0])


def refuse_below_one_step(
    trainer: Trainer, budget: Budget, seeds: Sequence[int], library: Library, backbones: Backbones
) -> None:
    """Refuse a budget that ends a training within its first step.

    Raises:
        UserError: naming the limit and what one step needs.
    """
    recipe, stage = trainer.recipe, trainer.first
    if untrained(budget, recipe) or not budget.counts or (fixed_steps(recipe) and budget.own_curriculum):
        return
    card = trainer.card
    tokens = stage.rows * max(1, stage.segments) * int(getattr(trainer.config, "segment", None) or card.window)
    rough = {"train_tokens": FAR * tokens, "train_flops": FAR * 2 * TRAIN_PASSES * tokens * card.parameters}
    if all((limit := getattr(budget, name)) is None or limit > far for name, far in rough.items()):
        return
    model = trainer.cls(outline(card, full=True), stage_config(trainer.config, stage), torch.Generator())
    if not trained_parameters(model, recipe):
        return
    for seed in seeds:
        lengths = _lengths(trainer, segment_length(model), seed, library, backbones)
        for name, need in needs(model, lengths, TRAIN_PASSES + int(recipe.checkpoint)).items():
            limit = getattr(budget, name)
            if limit is not None and need > limit:
                own = ", or own_curriculum = true for the data's own steps" if fixed_steps(recipe) else ""
                raise UserError(
                    f"Budget '{budget.name}': {name} = {amount(name, limit)} is below one optimiser step of "
                    f"{trainer.label} on {trainer.task_name} (recipe {recipe.name}), which needs {amount(name, need)}: "
                    f"allow that, or 0 for no training{own}."
                )


def needs(model: MemoryModel[Any], lengths: Sequence[int], passes: int) -> dict[str, float]:
    """Tokens and FLOPs of one optimiser step on lines of `lengths` tokens; nothing where there are none."""
    step, flops = segment_length(model), 0.0
    for start in range(0, max(lengths, default=0), step):
        left = [min(length - start, step) for length in lengths if length > start]
        flops += training_flops(model, len(left), max(left), start, passes)
    return {"train_tokens": sum(lengths), "train_flops": flops}


def _lengths(trainer: Trainer, segment: int, seed: int, library: Library, backbones: Backbones) -> list[int]:
    """Tokens of every line of the first batch; none where only the data say, which the worker looks at."""
    stage, name = trainer.first, trainer.card.name
    if name in CLOSED:  # lines are made, not read, and their tokenizer is a list of words
        corpus = trainer.task.corpus(library, trainer.plan, backbones.load(name).encode)
        rng = torch.Generator().manual_seed(seed)
        return [len(line) for line in corpus.batch(stage.rows, stage.segments, segment, rng)]
    return [stage.segments * segment] * stage.rows if trainer.plan.corpus == "books" else []
