"""Replays reference cases of the official HMT (its ``RecurrentWrapper`` with ``CrossAttentionMemory``) with `HMT`."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from memory_bench.errors import unknown
from memory_bench.parity.cases import Case, Settings
from memory_bench.parity.replaying import check_described, replay_segments, segment_lengths, tail_loss
from memory_bench.protocol import Segment

from .model import HMT, HMTConfig, HMTState

SCALES = {"1/sqrt(recall_hidden_size)": "1/sqrt(h)", "1/recall_hidden_size": "1/h"}
RECALL_FIELDS = {
    "recall_hidden_size": "recall_width",
    "recall_cache_length": "cache",
    "recall_dtype": "recall_dtype",
    "recall_query": "recall_query",
    "summary_fraction": "summary_fraction",
}


def read_config(case: Case, settings: Settings) -> HMTConfig:
    """The case's settings over the official ones; null settings (no recall) keep the official value."""
    fields: dict[str, Any] = {
        "segment": settings.take("segment_length"),
        "memory_tokens": settings.take("memory_tokens"),
        "sensory_tokens": settings.take("sensory_tokens"),
        "recall": settings.take("recall"),
    }
    fields |= {ours: settings.take(theirs) for theirs, ours in RECALL_FIELDS.items()}
    scale = settings.take("recall_scale")
    if scale is not None and scale not in SCALES:
        raise unknown("recall_scale", str(scale), SCALES, f"(case {case.name})")
    fields["recall_scale"] = SCALES.get(scale)
    return replace(HMTConfig.official(), **{k: v for k, v in fields.items() if v is not None})


def replay(case: Case) -> dict[str, Tensor]:
    """Every tensor of the case, by the names of ``expected.safetensors``.

    Raises:
        UserError: a setting is unknown or contradicts the others, or the weights do not fit.
    """
    settings = case.settings()
    config = read_config(case, settings)
    lengths = segment_lengths(case.tokens, config.segment)
    check_described(case, "segments", settings.take("segments"), len(lengths))
    check_described(case, "last_segment_length", settings.take("last_segment_length"), lengths[-1])
    check_described(case, "summary_tokens", settings.take("summary_tokens"), config.summary_tokens)
    settings.take("kept_segments")  # how many segments' logits the official wrapper returns; all are compared
    tail, new_tokens = settings.take("scored_tail_tokens") or config.segment, settings.take("max_new_tokens")
    prompt_alignment = settings.take("segment_alignment", "left")  # the official forward ignores it
    settings.finish()
    model = HMT(case.backbone(), config, torch.Generator())
    return replay_segments(
        case,
        model,
        lengths,
        look=lambda s, segment, before, after: {
            **inner_steps(model, before, segment),
            "memory_written": after.memory,
        },
        loss=lambda logits, inputs: tail_loss(logits, inputs["labels"], tail),
        new_tokens=new_tokens,
        prompt_lengths=segment_lengths(case.tokens, config.segment, prompt_alignment),
    )


def inner_steps(model: HMT, state: HMTState, segment: Segment) -> dict[str, Tensor]:
    """What a step passes through: summary, sensory ids, memory read and recall weights.

    The official class summarises segment 0 too and throws the summary away.
    """
    reading = model.read(state, segment)
    steps = {"memory_read": reading.memory, "sensory_ids": model.sensory(state)[0]}
    if model.config.recall:
        steps["summary"] = model.summarise(*model.query_tokens(state, segment))
    if reading.weights is not None:
        steps["recall_weights"] = reading.weights
    return steps
