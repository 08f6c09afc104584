"""One decoder layer over memory and text rows, of which only the last ones ask: positions, masks, keys."""

from dataclasses import dataclass

import torch
from torch import Tensor

from memory_bench.backbone.layers import Rotation
from memory_bench.backbone.lora import LinearFn, Projection
from memory_bench.backbone.model import Backbone


@dataclass(frozen=True, slots=True)
class Cached:
    """A layer's keys (rotated) and values so far, and the normalised input of its last text row."""

    keys: Tensor
    values: Tensor
    last: Tensor


@dataclass(frozen=True, slots=True)
class Frame:
    """Positions and masks of a pass of `length` rows of which the last `text` are text and the last `queries` ask.

    Attributes:
        length: memory and text.
        start: the first row that asks.
        turn: per layer, rotation of the queries.
        turn_keys: per layer, of all keys.
        visible: per layer, ``[1, 1, queries, length]``, added to the scores; None: plain causal.
        is_text: ``[1, length]`` bool.
    """

    length: int
    start: int
    turn: tuple[Rotation | None, ...]
    turn_keys: tuple[Rotation | None, ...]
    visible: tuple[Tensor | None, ...]
    is_text: Tensor

    @classmethod
    def of(cls, backbone: Backbone, length: int, text: int, queries: int) -> "Frame":
        """Positions 0 .. length - 1 over memory and text; a query sees everything up to itself."""
        where = torch.arange(length, device=backbone.device)[None]
        start = length - queries
        seen = None
        if start:
            seen = torch.ones(1, queries, length, dtype=torch.bool, device=backbone.device).tril(start)
        asking = where[:, start:]
        sights = backbone.windowed(seen, asking, where)
        # Made here once, where attention would make it of a bool mask in every layer.
        biases = {id(s): None if s is None else as_bias(s, backbone.dtype) for s in sights}
        turn, turn_keys = backbone.rotation(asking, queries=True), backbone.rotation(where)
        return cls(length, start, turn, turn_keys, tuple(biases[id(s)] for s in sights), where >= length - text)


def as_bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to the scores."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, -torch.inf)


def run_layer(backbone: Backbone, layer: int, full: Tensor, frame: Frame, linear: LinearFn) -> tuple[Tensor, Cached]:
    """One decoder layer over memory and text rows ``[rows, length, width]``; the output has the asking rows only."""
    normed = backbone.norm_input(layer, full)
    q, k, v = backbone.project(layer, normed, frame.is_text, asking_from(frame.start, linear))
    q, k = backbone.rotate(q, frame.turn[layer]), backbone.rotate(k, frame.turn_keys[layer])
    attended = backbone.attend(q, k, v, frame.visible[layer])
    return backbone.close(layer, full[:, frame.start :], attended, linear), Cached(k, v, normed[:, -1:])


def asking_from(start: int, linear: LinearFn) -> LinearFn:
    """`linear`, with queries computed from row `start` on: memory rows ask nothing."""

    def apply(name: str, projection: Projection, x: Tensor) -> Tensor:
        return linear(name, projection, x[:, start:] if name == "self_attn.q_proj" else x)

    return apply if start else linear
