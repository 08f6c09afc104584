"""The memory of a cell from shapes alone: its trainer and its reader run on tensors without storage.

For devices that are not there. What is counted are tensors; allocators round up and kernels need room of their own, so
a computed peak is a little below a measured one of CUDA, and no figure of a whole process.
"""

from dataclasses import replace
from typing import Any

import torch

from memory_bench.budget import Budget
from memory_bench.cell import Cell
from memory_bench.corpus import Line
from memory_bench.driver.observe import side_by_side
from memory_bench.driver.stream import cut, segment_length, walk
from memory_bench.driver.train import stage_config, train
from memory_bench.protocol import MemoryModel
from memory_bench.recipe import Recipe
from memory_bench.running.counting import Counter, Tally
from memory_bench.running.recipes import make_recipe, trains
from memory_bench.running.shapes import Shapes

STEPS = 2  # the second has gradients and moments besides
READ_SEGMENTS = 2
GROWTH_STEPS = 64  # of reading, for what a memory grows to; longer ones are a line through the last two


class _Windows:
    """Lines of the asked length, without a text."""

    def batch(self, rows: int, segments: int, segment: int, rng: torch.Generator) -> list[Line]:
        """See `memory_bench.corpus.Corpus.batch`."""
        del rng
        return [_line(max(1, segments) * segment) for _ in range(rows)]


def _line(tokens: int) -> Line:
    scored = torch.ones(tokens, dtype=torch.bool)
    scored[0] = False
    return Line(torch.zeros(tokens, dtype=torch.long), scored)


def computed_peak(counter: Counter, cell: Cell) -> int:
    """Bytes of tensors that exist at once in a cell's training or evaluation, whichever are more.

    Raises:
        NoNumber: the model decides by a number that a tensor without storage does not have.
    """
    recipe = make_recipe(cell.training.recipe)
    longest = max(len(s.line) for s in counter.streams(cell))
    training = training_peak(counter, cell, recipe) if trains(cell.training) else 0
    return max(training, reading_peak(counter, cell, longest))


def training_peak(counter: Counter, cell: Cell, recipe: Recipe) -> int:
    """Of two optimiser steps of the largest stage."""
    stage = max(recipe.stages, key=lambda s: s.rows * max(1, s.segments))
    # Questions with their contexts are as long as they are: a stage that asks for no length gets a window's.
    short = replace(recipe, stages=(replace(stage, steps=STEPS, segments=max(1, stage.segments)),))
    config = stage_config(counter.model(cell.training).config, stage)
    with Shapes() as shapes:
        build = counter.fresh(cell.training)
        train(build, config, short, _Windows(), Tally(Budget("computed")), seed=0)
    return shapes.peak


@torch.no_grad()
def reading_peak(counter: Counter, cell: Cell, longest: int) -> int:
    """Of the largest batch: its first segments, and what its memory grows to until the end of the longest text."""
    with Shapes() as shapes:
        model = counter.fresh(cell.training)(counter.model(cell.training, cell.scored_with).config)
        model.eval().requires_grad_(False)
        length = segment_length(model)
        rows = min(side_by_side(model, longest), len(counter.streams(cell)))
        for _ in walk(model, [_line(min(longest, READ_SEGMENTS * length)) for _ in range(rows)]):
            pass
        read = shapes.peak
        sizes = _growth(model, longest, length)
    grown = max(0.0, sizes[-1] - sizes[min(READ_SEGMENTS, len(sizes)) - 1])
    return int(read + rows * 2 * grown)


def _growth(model: MemoryModel[Any], longest: int, length: int) -> list[float]:
    """Bytes of a row's memory after every segment; the last is that at the end of the text."""
    state, sizes = model.open(1), list[float]()
    line = _line(length)
    for start in range(0, longest, length):
        segment, _ = cut([line], 0, min(length, longest - start), torch.device("cpu"))
        state = model.absorb(state, segment)
        size = state.size()
        sizes.append(size.device + size.host)
        if len(sizes) == GROWTH_STEPS and start + length < longest:
            more = (longest - start - length) / length
            sizes.append(sizes[-1] + max(0.0, sizes[-1] - sizes[-2]) * more)
            break
    return sizes
