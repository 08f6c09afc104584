"""What a run would cost, without training: tokens and FLOPs from the models' own formulas, memory from their shapes.

The models are built on the ``meta`` device where they allow it, and small random ones are measured otherwise; nothing
is downloaded or trained. Times come from the rate at which this machine multiplies matrices, measured for an instant.
"""

import time
from typing import Any

import torch

from memory_bench.card import BackboneCard
from memory_bench.cell import Cell
from memory_bench.driver.meter import TRAIN_PASSES
from memory_bench.recipe import Recipe, fixed_steps
from memory_bench.running.grid import Grid, make_recipe
from memory_bench.zoo.named import Backbones

ADAM_BYTES = 16  # float32 weight, gradient and two moments
PYTHON_BYTES = 700_000_000  # a process with torch and transformers loaded
SMALL_MODEL_PENALTY = 8.0  # small matrices reach about an eighth of the measured rate


def matrix_rate(seconds: float = 0.2) -> float:
    """Floating-point operations per second of float32 matrix products on this machine, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a, done, started = torch.ones(512, 512), 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            a @ a
            done += 1
        return 2 * 512**3 * done / (time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)


def flops_per_token(card: BackboneCard, segment: int) -> float:
    """Forward operations per token of the backbone alone with a window of `segment`; memory comes on top."""
    embedding = card.vocab * card.width
    matrices = max(card.parameters - embedding, 0)
    return 2 * matrices + 2 * embedding + 4 * card.layers * segment * card.heads * card.head_width


def train_tokens(cell: Cell, recipe: Recipe, card: BackboneCard) -> int | None:
    """Tokens a training will read, as far as the limits say so beforehand; None: bounded by seconds alone."""
    budget = cell.training.budget
    segment = int(cell.training.model.config.get("segment") or card.window)
    found = []
    if fixed_steps(recipe):
        found.append(sum((s.steps or 0) * s.rows * s.segments * segment for s in recipe.stages))
        if budget.own_curriculum:
            return found[0]
    if budget.train_tokens is not None:
        found.append(budget.train_tokens)
    if budget.train_flops is not None:
        found.append(int(budget.train_flops / (TRAIN_PASSES * flops_per_token(card, segment))))
    return min(found) if found else None


def estimate(grid: Grid, backbones: Backbones) -> list[dict[str, Any]]:
    """One row per cell: what it would read, compute and hold. A training shared by several cells is charged once."""
    rate = matrix_rate()
    seen: set[str] = set()
    rows: list[dict[str, Any]] = []
    for cell in grid.cells:
        training = cell.training
        card, recipe = backbones.card(training.backbone.name), make_recipe(training.recipe)
        segment = int(training.model.config.get("segment") or card.window)
        loaded = training.key in seen or bool(training.model.config.get("checkpoint"))
        tokens = 0 if loaded else train_tokens(cell, recipe, card)
        seen.add(training.key)
        flops = None if tokens is None else TRAIN_PASSES * flops_per_token(card, segment) * tokens
        weights = card.parameters * (ADAM_BYTES if tokens != 0 and recipe.trains == "all" else 4)
        activations = (
            4 * 20 * card.layers * card.width * segment * max(s.rows * max(1, s.segments) for s in recipe.stages)
        )
        held = weights + (activations if tokens != 0 else activations // 8) + PYTHON_BYTES
        limit = training.budget.device_bytes
        rows.append(
            {
                "model": cell.label or training.model.name,
                "task": cell.task.name,
                "data": cell.task.config["data"],
                "seed": training.seed,
                "role": cell.role,
                "train_tokens": tokens,
                "train_flops": flops,
                "peak_bytes": held,
                "train_seconds": None if flops is None else round(flops / rate * SMALL_MODEL_PENALTY, 1),
                "fits": limit is None or held - PYTHON_BYTES <= limit,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for a person, with the sum."""
    lines = [f"{'model':<28} {'task':<12} seed  train tokens  train FLOPs  peak memory  time (1 core)  fits"]
    for r in rows:
        tokens = "by time" if r["train_tokens"] is None else f"{r['train_tokens']:,}"
        flops = "" if r["train_flops"] is None else f"{r['train_flops']:.1e}"
        seconds = "" if r["train_seconds"] is None else f"{r['train_seconds']:.0f} s"
        lines.append(
            f"{r['model']:<28} {r['task']:<12} {r['seed']:>4}  {tokens:>12}  {flops:>11}  "
            f"{r['peak_bytes'] / 1e9:>8.1f} GB  {seconds:>13}  {'yes' if r['fits'] else 'no'}"
        )
    total = sum(r["train_seconds"] or 0 for r in rows)
    lines.append(f"{len(rows)} cells; training about {total / 60:.0f} core-minutes, evaluation comes on top.")
    lines.append("Estimates: the backbone's arithmetic, without each memory's own (hmt reads about 1.5 times as much).")
    return "\n".join(lines)
