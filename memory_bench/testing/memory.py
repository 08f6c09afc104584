"""Promises about memory: states are values, streams and rows are apart, padding is nothing, size is honest."""

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memory_bench.protocol import Segment
from memory_bench.state import size_of
from memory_bench.testing.measures import (
    Build,
    peek,
    prepared,
    random_text,
    read,
    require,
    require_close,
    require_same,
    segment_tokens,
    snapshot,
)

LONG_STREAM = 512  # segments after which a bounded state must have reached its size
FULL = 16  # writes that leave the size as it was, after which a state counts as full


@torch.no_grad()
def reopening_repeats(build: Build) -> None:
    """Reading a stream twice gives the same numbers."""
    model, text = prepared(build)
    first, _ = read(model, model.open(2, seeds=[3, 4]), text)
    again, _ = read(model, model.open(2, seeds=[3, 4]), text)
    require_close(again, first, "reading a stream again must give the same numbers", 0.0)


@torch.no_grad()
def documents_do_not_leak(build: Build) -> None:
    """A document read after another one gives the numbers of reading it alone."""
    model, text = prepared(build)
    alone, _ = read(build().eval(), model.open(2), text)
    read(model, model.open(2), random_text(model, 2, text.shape[1], seed=9))
    after, _ = read(model, model.open(2), text)
    require_close(after, alone, "a fresh stream must not know of documents read before it", 0.0)


@torch.no_grad()
def peeking_is_pure(build: Build) -> None:
    """A step without writing returns the state as it was and changes nothing later."""
    model, text = prepared(build)
    size = segment_tokens(model)
    _, state = read(model, model.open(2), text[:, :-size])
    before = snapshot(state)
    expected, _ = read(model, state, text[:, -size:])
    _, returned = model.step(state, Segment.full(random_text(model, 2, size, seed=9)), write=False)
    require_same(returned, before, "a peek must return the state it was given")
    peek(model, state, random_text(model, 2, max(1, size // 2), seed=8))
    later, _ = read(model, returned, text[:, -size:])
    require_close(later, expected, "a peek must not change later predictions", 0.0)


@torch.no_grad()
def states_are_values(build: Build) -> None:
    """Steps never change a state in place, so forks are isolated."""
    model, text = prepared(build)
    size = segment_tokens(model)
    _, state = read(model, model.open(2), text[:, :-size])
    before = snapshot(state)
    expected, _ = read(model, state, text[:, -size:])
    read(model, state.fork(), random_text(model, 2, 2 * size, seed=9))
    model.absorb(state.fork(), Segment.full(random_text(model, 2, size, seed=8)))
    require_same(state, before, "a step must not change the state it was given")
    after, _ = read(model, state, text[:, -size:])
    require_close(after, expected, "what happens to a fork must not change the original", 0.0)


@torch.no_grad()
def nothing_stays_on_the_module(build: Build) -> None:
    """Parameters, buffers and attributes of the module are what they were before reading."""
    model, text = prepared(build)
    before, modules = dict(_belongings(model)), set(dict(model.named_modules()))
    _, state = read(model, model.open(2), text)
    model.absorb(state, Segment.full(text[:, : segment_tokens(model)]))
    peek(model, state, text[:, :3])
    after = dict(_belongings(model))
    new = sorted(set(dict(model.named_modules())) - modules)
    require(not new, f"a step must leave nothing on the module, but it made {', '.join(new)}: make modules when built")
    for name in sorted(set(before) | set(after)):
        require(before.get(name) == after.get(name), f"a step must leave nothing on the module, but {name} changed")


def _belongings(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Everything a module holds that can be compared, with its place."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name != "_modules":
                yield from _leaves(value, f"{path}.{name}".lstrip("."))


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor):
        yield name, (value.shape, value.dtype, value.detach().double().sum().item(), value._version)
    elif isinstance(value, dict):
        yield name, len(value)
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        yield name, len(value)
        for index, item in enumerate(value):
            yield from _leaves(item, f"{name}.{index}")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name, None), f"{name}.{field.name}")
    elif isinstance(value, torch.Generator):
        yield name, bytes(value.get_state().numpy())
    elif isinstance(value, bool | int | float | str | bytes | type(None)):
        yield name, value


def random_state_is_untouched(build: Build) -> None:
    """Building and stepping draw nothing from the global generators."""

    def states() -> dict[str, object]:
        numpy = repr(np.random.get_state(legacy=False))
        return {"torch": bytes(torch.get_rng_state().numpy()), "Python": random.getstate(), "NumPy": numpy}

    def untouched(what: str) -> None:
        touched = [name for name, state in states().items() if state != before[name]]
        require(
            not touched, f"{what} must not touch the global random state, but that of {' and '.join(touched)} changed"
        )

    kept = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        # A state that nobody sets by a seed: setting it again would leave a seeded one as it was.
        torch.rand(7), random.random(), np.random.rand(7)
        before = states()
        model = build().train()
        untouched("building a model")
        _, state = read(model, model.open(2, seeds=[1, 2]), random_text(model, 2, 2 * segment_tokens(model)))
        peek(model.eval(), state, random_text(model, 2, 3))
        untouched("a step")
    finally:
        torch.set_rng_state(kept[0])
        random.setstate(kept[1])
        np.random.set_state(kept[2])


@torch.no_grad()
def rows_are_independent(build: Build) -> None:
    """A row's numbers do not depend on the rows beside it; its random draws come from its own seed."""
    model, text = prepared(build, rows=3)
    seeds = [5, 6, 5]
    together, _ = read(model, model.open(3, seeds=seeds), text)
    for row, seed in enumerate(seeds):
        alone, _ = read(model, model.open(1, seeds=[seed]), text[row : row + 1])
        require_close(together[row : row + 1], alone, "a row must not depend on the rows beside it")


@torch.no_grad()
def rows_can_be_selected(build: Build) -> None:
    """Rows of a state can be chosen, repeated and reordered."""
    model, text = prepared(build, rows=3)
    size = segment_tokens(model)
    _, state = read(model, model.open(3, seeds=[5, 6, 7]), text[:, :-size])
    expected, _ = read(model, state, text[:, -size:])
    index = torch.tensor([2, 0, 2, 1])
    chosen, _ = read(model, state.rows(index), text[index, -size:])
    require_close(chosen, expected[index], "state.rows must give the chosen rows, in order and with repeats")


@torch.no_grad()
def padding_has_no_influence(build: Build) -> None:
    """Rows padded on either side give the numbers and the memory of the same rows alone."""
    model, text = prepared(build, segments=3, rows=3)
    size = segment_tokens(model)
    keep = [size, max(2, size // 2), 1]
    for side in ("left", "right"):
        mask = torch.ones_like(text, dtype=torch.bool)
        for row, real in enumerate(keep):  # the middle segment is ragged
            start = size if side == "right" else 2 * size - real
            mask[row, size : 2 * size] = False
            mask[row, start : start + real] = True
        padded, _ = read(model, model.open(3), text, mask)
        other = torch.where(mask, text, (text + 11) % model.backbone.vocab)
        same, _ = read(model, model.open(3), other, mask)
        require_close(same[mask], padded[mask], f"the ids of {side} padding must have no influence")
        for row in range(3):
            pieces = [text[row : row + 1, s : s + size][:, mask[row, s : s + size]] for s in range(0, 3 * size, size)]
            state, logits = model.open(1), []
            for piece in pieces:
                readout, state = model.step(state, Segment.full(piece))
                logits.append(readout.logits()[0])
            require_close(padded[row][mask[row]], torch.cat(logits), f"{side} padding must not change a row's numbers")


@torch.no_grad()
def empty_rows_keep_their_memory(build: Build) -> None:
    """A row of nothing but padding is not written, and nothing becomes NaN."""
    model, text = prepared(build)
    size = segment_tokens(model)
    _, state = read(model, model.open(2), text[:, :size])
    mask = torch.ones_like(text[:, :size], dtype=torch.bool)
    mask[1] = False
    _, after = read(model, state, text[:, size : 2 * size], mask)
    got = peek(model, after, text[:, -size:])
    require(bool(got.isfinite().all()), "a row of nothing but padding must not make numbers infinite or NaN")
    expected = peek(model, state, text[:, -size:])
    require_close(got[1], expected[1], "a row of nothing but padding must keep its memory")


@torch.no_grad()
def size_is_honest(build: Build) -> None:
    """``size()`` is the bytes of what is held, and stops growing where the model says that it is bounded."""
    model, text = prepared(build, segments=4, rows=1)
    pieces = [Segment.full(ids) for ids in text.split(segment_tokens(model), dim=1)]
    state, sizes = model.open(1), []
    for number in range(LONG_STREAM if model.traits.bounded else len(pieces)):
        state = model.absorb(state, pieces[number % len(pieces)])
        said, held = state.size(), size_of(state.holdings()).total
        require(said.total == held, f"size() must be the bytes of what is held, {held}, not {said}")
        sizes.append(held)
        if number > FULL and len(set(sizes[-FULL:])) == 1:
            return
    if model.traits.bounded:  # a store that is thinned out from time to time never keeps exactly one size
        early, late = max(sizes[: LONG_STREAM // 2]), max(sizes[LONG_STREAM // 2 :])
        require(late <= 1.05 * early, f"a bounded state must stop growing, but it went from {early} to {late} bytes")
