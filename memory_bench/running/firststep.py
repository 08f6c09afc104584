"""Refuses limits on tokens and FLOPs below one optimiser step, before anything trains.

What a step reads and computes is the model's own: rows and segments of the recipe's first stage, cut as the model reads
them, FLOPs by its own formula. Limits far above a rough estimate are not looked at closely.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from memory_bench import plugins
from memory_bench.backbone.outline import outline
from memory_bench.backbone.small import CLOSED
from memory_bench.budget import amount
from memory_bench.cell import Cell
from memory_bench.data.library import Library
from memory_bench.driver.meter import TRAIN_PASSES, training_flops
from memory_bench.driver.stream import segment_length
from memory_bench.driver.train import stage_config, trained_parameters, untrained
from memory_bench.errors import UserError
from memory_bench.protocol import MemoryModel
from memory_bench.recipe import Recipe, Stage, fixed_steps
from memory_bench.running.grid import make_task
from memory_bench.running.recipes import make_recipe
from memory_bench.zoo.named import Backbones

FAR = 10  # times the rough estimate; no method here costs as many times its backbone


def refuse_below_one_step(cells: Iterable[Cell], library: Library, backbones: Backbones) -> None:
    """Refuse a budget that ends a training of `cells` within its first step.

    Raises:
        UserError: naming the limit and what one step needs.
    """
    seen: set[str] = set()
    for cell in cells:
        training, budget = cell.training, cell.training.budget
        recipe = make_recipe(training.recipe)
        free = untrained(budget, recipe) or not budget.counts or (fixed_steps(recipe) and budget.own_curriculum)
        if free or training.key in seen or training.model.config.get("checkpoint"):
            continue
        seen.add(training.key)
        for name, need in _first_needs(cell, recipe, library, backbones).items():
            limit = getattr(budget, name)
            if limit is not None and need > limit:
                own = ", or own_curriculum = true for the data's own steps" if fixed_steps(recipe) else ""
                raise UserError(
                    f"Budget '{budget.name}': {name} = {amount(name, limit)} is below one optimiser step of "
                    f"{cell.label or training.model.name} on {cell.task.name} (recipe {recipe.name}), which needs "
                    f"{amount(name, need)}: allow that, or 0 for no training{own}."
                )


def _first_needs(cell: Cell, recipe: Recipe, library: Library, backbones: Backbones) -> dict[str, float]:
    """What the first step needs of each limit; empty where the limits are far above, or nothing is trained."""
    training, budget = cell.training, cell.training.budget
    card = backbones.card(training.backbone.name)
    stage = next((s for s in recipe.stages if s.steps != 0), recipe.stages[0])
    cls = plugins.load("models", training.model.name)
    config = plugins.configure(training.model.name, cls.fit(card, budget), training.model.config)
    tokens = stage.rows * max(1, stage.segments) * int(getattr(config, "segment", None) or card.window)
    rough = {"train_tokens": FAR * tokens, "train_flops": FAR * 2 * TRAIN_PASSES * tokens * card.parameters}
    if cls.helpers(config) or all((b := getattr(budget, name)) is None or b > far for name, far in rough.items()):
        return {}
    try:
        model = cls(outline(card, full=True), stage_config(config, stage), torch.Generator())
        if not trained_parameters(model, recipe):
            return {}
        lengths = _lengths(cell, stage, segment_length(model), library, backbones)
        return needs(model, lengths, TRAIN_PASSES + int(recipe.checkpoint))
    except UserError:
        raise
    except Exception:  # of a plug-in's own code: its cell fails, and says where; the others go on
        return {}


def needs(model: MemoryModel[Any], lengths: Sequence[int], passes: int) -> dict[str, float]:
    """Tokens and FLOPs of one optimiser step on lines of `lengths` tokens; nothing where there are none."""
    step, flops = segment_length(model), 0.0
    for start in range(0, max(lengths, default=0), step):
        left = [min(length - start, step) for length in lengths if length > start]
        flops += training_flops(model, len(left), max(left), start, passes)
    return {"train_tokens": sum(lengths), "train_flops": flops}


def _lengths(cell: Cell, stage: Stage, segment: int, library: Library, backbones: Backbones) -> list[int]:
    """Tokens of every line of the first batch; none where only the data say, which the trainer looks at."""
    training = cell.training
    if training.backbone.name in CLOSED:  # lines are made, not read, and their tokenizer is a list of words
        task, loaded = make_task(cell.task), backbones.load(training.backbone.name)
        corpus = task.corpus(library, task.plan(library, pretrained=loaded.card.pretrained), loaded.encode)
        rng = torch.Generator().manual_seed(training.seed)
        return [len(line) for line in corpus.batch(stage.rows, stage.segments, segment, rng)]
    return [stage.segments * segment] * stage.rows if training.corpus.name == "books" else []
