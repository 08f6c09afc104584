"""One trainer for every model: the driver's own loop over segments, with gradients.

Unusual here:

- A training example is cut, carried over and scored by the same `walk` as the evaluation, so nothing is learned that is
  not asked, and segment borders are trained on.
- Lengths are shares of the budget: the first limit reached ends training, the schedule is a function of the share spent.
- Order of data, initial values and a model's own draws come from separate generators, so all models of a comparison
  see the same data in the same order.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memory_bench.budget import Budget
from memory_bench.corpus import Corpus
from memory_bench.meter import Meter
from memory_bench.protocol import MemoryModel
from memory_bench.recipe import Recipe, Stage
from memory_bench.stream import Progress, segment_length, walk

Build = Callable[[Any], MemoryModel[Any]]
"""Makes the model of a config over the one backbone of this training."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained model and how it went.

    Attributes:
        model: in evaluation mode.
        curve: (tokens read, mean surprisal of the batch in nats) of every optimiser step.
        ended_by: the limit that ended training, ``steps`` where the recipe did, ``none`` without training.
    """

    model: MemoryModel[Any]
    curve: list[tuple[int, float]]
    ended_by: str


def stage_config(config: Any, stage: Stage) -> Any:
    """The model's config in `stage`; fields that the model does not have are ignored."""
    own = {f.name for f in dataclasses.fields(config)}
    return dataclasses.replace(config, **{k: v for k, v in stage.model.items() if k in own})


def trained_parameters(model: MemoryModel[Any], recipe: Recipe) -> dict[str, nn.Parameter]:
    """The parameters that `recipe` trains, by name."""
    if recipe.trains == "memory":
        return model.memory_parameters()
    return dict(model.named_parameters())


def _optimizer(parameters: dict[str, nn.Parameter], recipe: Recipe) -> torch.optim.AdamW:
    trained = [p for p in parameters.values() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.lr, betas=recipe.betas)


def _carry_over(old: MemoryModel[Any], new: MemoryModel[Any]) -> None:
    """Copy what both stages' models have; the backbone is shared already."""
    wanted = new.state_dict()
    kept = {k: v for k, v in old.state_dict().items() if k in wanted and wanted[k].shape == v.shape}
    new.load_state_dict(kept, strict=False)


def train(
    build: Build,
    config: Any,
    recipe: Recipe,
    corpus: Corpus,
    meter: Meter,
    *,
    seed: int,
    progress: Progress | None = None,
) -> Trained:
    """Train the model of `config` on `corpus` until the recipe or the budget ends it.

    Args:
        build: makes the model of a config; called once a stage whose config differs.
        config: of the evaluated model.
        recipe: stages, optimiser, schedule.
        corpus: of training lines.
        meter: counts and limits; called inside its phase ``train``.
        seed: of the data order.
        progress: told (thousandths done, 1000).

    Raises:
        BudgetExceeded: a hard limit (memory) was passed.
        FloatingPointError: the loss is not finite.
    """
    rng = torch.Generator().manual_seed(seed)
    fixed = fixed_steps(recipe)
    curve: list[tuple[int, float]] = []
    model: MemoryModel[Any] | None = None
    optimizer: torch.optim.AdamW | None = None
    step, ended_by, shares = 0, "steps" if fixed else "", 0.0
    for number, stage in enumerate(recipe.stages):
        wanted = stage_config(config, stage)
        if model is None or wanted != current:
            fresh = build(wanted)
            if model is not None:
                _carry_over(model, fresh)
            model, current, optimizer = fresh.train(), wanted, None
        parameters = trained_parameters(model, recipe)
        for name, p in model.named_parameters():
            p.requires_grad_(name in parameters)
        optimizer = optimizer or _optimizer(parameters, recipe)
        shares += stage.share / sum(s.share for s in recipe.stages)
        in_stage = 0
        while True:
            share, limit = meter.spent_share(tokens=not fixed)
            done = step / fixed if fixed else share
            if share >= 1 or (stage.steps is not None and in_stage >= stage.steps) or (not fixed and share >= shares):
                ended_by = limit if share >= 1 else ended_by
                break
            rate = recipe.rate(done, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            lines = corpus.batch(stage.rows, stage.segments, segment_length(model), rng)
            loss = _step(model, lines, recipe, meter, parameters, optimizer, done >= recipe.aux_from)
            curve.append((meter.usage.train_tokens, loss))
            step, in_stage = step + 1, in_stage + 1
            if progress is not None:
                progress(int(1000 * min(1.0, (step / fixed) if fixed else share)), 1000)
        if share >= 1:
            break
    assert model is not None
    if current != config:
        final = build(config)
        _carry_over(model, final)
        model = final
    meter.usage.train_steps = step
    meter.usage.training_ended_by = ended_by if step else "none"
    for p in model.parameters():
        p.requires_grad_(False)
    return Trained(model.eval(), curve, meter.usage.training_ended_by)


def _step(
    model: MemoryModel[Any],
    lines: Any,
    recipe: Recipe,
    meter: Meter,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    with_aux: bool,
) -> float:
    """One optimiser step on a batch of lines; returns the mean surprisal of its scored tokens (nats)."""
    count = sum(int(line.scored.sum()) for line in lines)
    total: Tensor | None = None
    aux: list[Tensor] = []
    walked = walk(model, lines, detach_every=recipe.bptt, recompute=recipe.checkpoint, watcher=meter)
    for piece in walked:
        part = piece.nll.sum()
        total = part if total is None else total + part
        if with_aux and piece.aux is not None:
            aux.append(piece.aux)
    assert total is not None
    loss = total / max(1, count)
    if not math.isfinite(float(loss)):
        raise FloatingPointError(f"The training loss became {float(loss)} at optimiser step with {count} scored tokens.")
    full = loss + torch.stack(aux).mean() if aux else loss
    optimizer.zero_grad(set_to_none=True)
    full.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_([p for p in parameters.values() if p.grad is not None], recipe.clip)
    optimizer.step()
    return float(loss.detach())


def fixed_steps(recipe: Recipe) -> int:
    """Total optimiser steps of a recipe that brings its own number (a stand-in's curriculum); else 0."""
    steps = [stage.steps for stage in recipe.stages]
    return 0 if any(s is None for s in steps) else sum(s or 0 for s in steps)


def untrained(budget: Budget, recipe: Recipe) -> bool:
    """The budget leaves no room for training."""
    limits = (budget.train_tokens, budget.train_flops, budget.train_seconds)
    return not fixed_steps(recipe) and any(limit == 0 for limit in limits)
