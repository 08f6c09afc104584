"""Replays reference cases of the official RMT (``MemoryCell`` and ``RecurrentWrapper``) with `RMT`."""

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

from ..rmt import RMT, RMTConfig


def replay(case: Case) -> dict[str, Tensor]:
    """Every tensor of the case, by the names of ``expected.safetensors``.

    Raises:
        UserError: a setting is unknown or contradicts the others, or the weights do not fit.
    """
    settings = case.settings()
    config = replace(
        RMTConfig.official(),
        segment=settings.take("segment_length"),
        memory_tokens=settings.take("memory_tokens"),
        legacy_write_slot=settings.take("legacy_write_slot", True),
    )
    lengths = segment_lengths(case.tokens, config.segment, settings.take("segment_alignment", "left"))
    check_described(case, "segment_lengths", settings.take("segment_lengths"), lengths)
    check_never_detached(case, settings.take("bptt", "full"))
    new_tokens = settings.take("max_new_tokens")
    settings.finish()
    return replay_segments(
        case,
        RMT(case.backbone(), config, torch.Generator()),
        lengths,
        look=lambda s, segment, before, after: {"memory_read": before.memory, "memory_written": after.memory},
        loss=label_loss,
        new_tokens=new_tokens,
    )
