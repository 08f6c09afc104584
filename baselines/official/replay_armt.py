"""Replays reference cases of the official ARMT (``AssociativeMemoryCell`` and its wrapper) with `ARMT`."""

from dataclasses import replace

import torch
from torch import Tensor

from memory_bench.parity.cases import Case
from memory_bench.parity.replaying import (
    check_described,
    check_never_detached,
    label_loss,
    replay_segments,
    segment_lengths,
)
from memory_bench.protocol import Segment

from ..armt import ARMT, EPSILON, ARMTConfig, ARMTState


def replay(case: Case) -> dict[str, Tensor]:
    """Every tensor of the case, by the names of ``expected.safetensors``.

    Raises:
        UserError: a setting is unknown or contradicts the others, or the weights do not fit.
    """
    settings = case.settings()
    config = replace(
        ARMTConfig.official(),
        segment=settings.take("segment_length"),
        memory_tokens=settings.take("memory_tokens"),
        associative_size=settings.take("associative_size"),
        nu=settings.take("feature_order_nu", 3),
        correction=settings.take("correction", True),
        extended_positions=settings.take("extended_positions"),
    )
    lengths = segment_lengths(case.tokens, config.segment, settings.take("segment_alignment", "left"))
    check_described(case, "segment_lengths", settings.take("segment_lengths"), lengths)
    check_described(case, "epsilon", settings.take("epsilon"), EPSILON)
    check_never_detached(case, settings.take("bptt", "full"))
    new_tokens = settings.take("max_new_tokens")
    settings.finish()
    model = ARMT(case.backbone(), config, torch.Generator())
    return replay_segments(case, model, lengths, look=_written, loss=label_loss, new_tokens=new_tokens)


def _written(index: int, segment: Segment, before: ARMTState, after: ARMTState) -> dict[str, Tensor]:
    """Every layer's associations after a segment."""
    return {
        f"layer.{layer}.{name}": tensor
        for layer, pair in enumerate(zip(after.matrices, after.normalisers, strict=True))
        for name, tensor in zip(("associative_matrix", "normaliser"), pair, strict=True)
    }
