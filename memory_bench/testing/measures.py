"""Instruments of the conformance suite: reading a stream, comparing, measuring look-ahead, counting operations."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from memory_bench.protocol import MemoryModel, Segment
from memory_bench.testing.operations import FORMULAS

Build = Callable[[], MemoryModel[Any]]
Check = Callable[[Build], None]

WHOLE = 8  # tokens per step for models that take any length
CLOSE = 2e-4  # differences of float32 logits, relative to their largest, that other shapes may cause by rounding


def segment_tokens(model: MemoryModel[Any]) -> int:
    """Tokens per step of a configured model."""
    return model.traits.segment or WHOLE


def random_text(model: MemoryModel[Any], rows: int, tokens: int, seed: int = 0) -> Tensor:
    """``[rows, tokens]`` random ids of the model's vocabulary."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(model.backbone.vocab, (rows, tokens), generator=rng).to(model.backbone.device)


def read(
    model: MemoryModel[Any], state: Any, ids: Tensor, mask: Tensor | None = None, *, cut: int | None = None
) -> tuple[Tensor, Any]:
    """Step through `ids` ``[rows, tokens]``, writing every piece.

    Args:
        model: the model.
        state: where to start.
        ids: the text.
        mask: real tokens; None: all.
        cut: tokens per piece; None: the model's segment.

    Returns:
        Logits ``[rows, tokens, vocab]`` and the state after the text.
    """
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    size = segment_tokens(model) if cut is None else cut
    logits: list[Tensor] = []
    for start in range(0, ids.shape[1], size):
        span = slice(start, start + size)
        readout, state = model.step(state, Segment(ids[:, span], mask[:, span]))
        logits.append(readout.logits())
    return torch.cat(logits, dim=1), state


def peek(model: MemoryModel[Any], state: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits ``[rows, tokens, vocab]`` of `ids` as one piece that is not written."""
    segment = Segment.full(ids) if mask is None else Segment(ids, mask)
    return model.step(state, segment, write=False)[0].logits()


@torch.no_grad()
def measure_look_ahead(
    model: MemoryModel[Any],
    *,
    given: int = 0,
    tokens: int | None = None,
    before: int = 12,
    seeds: Sequence[int] = (0, 1, 2, 3),
    tolerance: float = 1e-4,
) -> int:
    """How many tokens past the predicting position a prediction was seen to depend on; 0 is causal.

    In a segment read after others, each token in turn is replaced (by two others), and every earlier prediction is
    compared. What is found is a lower bound: memory that is chosen by a ranking need not change every time.

    Args:
        model: the model, in evaluation mode.
        given: so many tokens at the segment's start are handed over as a condition; they may be looked at freely, so
            only later predictions and later tokens count.
        tokens: length of the segment; None: the model's own.
        before: segments read before it: enough that memories must be chosen from.
        seeds: of the texts tried.
        tolerance: smaller differences of logits, relative to their largest, are rounding.
    """
    length = tokens or segment_tokens(model)
    found = 0
    for seed in seeds:
        text = random_text(model, 1, before * segment_tokens(model) + length, seed)
        _, state = read(model, model.open(1), text[:, :-length])
        last = text[:, -length:]
        variants = [last]
        for at in range(given, length):
            for other in (1, 7):
                variant = last.clone()
                variant[0, at] = (variant[0, at] + other) % model.backbone.vocab
                variants.append(variant)
        ids = torch.cat(variants)
        condition = None
        if given:
            condition = torch.zeros_like(ids, dtype=torch.bool)
            condition[:, :given] = True
        copies = state.rows(torch.zeros(len(ids), dtype=torch.long))
        logits = model.step(copies, Segment.full(ids, condition), write=False)[0].logits().float()
        change = (logits[1:] - logits[:1]).abs().amax(dim=2) > tolerance * logits[0].abs().max()  # [variants, tokens]
        for number, moved in enumerate(change.tolist()):
            at = given + number // 2
            found = max([found, *(at - p for p in range(max(0, given - 1), at) if moved[p])])
    return found


def measured_flops(run: Callable[[], object]) -> int:
    """Operations of all matrix products in `run()` (multiply-add = 2), attention and vectors included.

    PyTorch's counter knows no formula for some of the CPU's kernels and would count them as nothing.
    """
    with FlopCounterMode(display=False, custom_mapping=dict(FORMULAS)) as counter:
        run()
    return int(counter.get_total_flops())


def require(holds: bool, promise: str) -> None:
    """Raise an `AssertionError` that says `promise` unless it `holds`."""
    if not holds:
        raise AssertionError(promise)


def require_close(got: Tensor, expected: Tensor, promise: str, tolerance: float = CLOSE) -> None:
    """Raise unless two tensors agree up to `tolerance` times the largest expected entry; 0: exactly."""
    require(got.shape == expected.shape, f"{promise} (shape {list(got.shape)} instead of {list(expected.shape)})")
    if not got.numel():
        return
    error = float((got.double() - expected.double()).abs().max())
    allowed = tolerance * max(1.0, float(expected.double().abs().max()))
    require(error <= allowed, f"{promise} (largest difference {error:.2g})")  # NaN is never within


def snapshot(state: Any) -> list[tuple[str, Tensor]]:
    """Names and copies of a state's tensors."""
    return [(name, tensor.detach().clone()) for name, tensor in state.tensors()]


def require_same(got: Any, expected: list[tuple[str, Tensor]], promise: str, tolerance: float = 0.0) -> None:
    """Raise unless the tensors of `got` are those of a `snapshot`."""
    found = got.tensors()
    require([n for n, _ in found] == [n for n, _ in expected], f"{promise} (the state has other tensors)")
    for (name, ours), (_, theirs) in zip(found, expected, strict=True):
        require_close(ours.detach(), theirs, f"{promise} (state.{name})", tolerance)


def prepared(build: Build, segments: int = 3, rows: int = 2) -> tuple[MemoryModel[Any], Tensor]:
    """A model in evaluation mode and ``[rows, segments * segment]`` random text."""
    model = build().eval()
    return model, random_text(model, rows, segments * segment_tokens(model))
