"""Replays reference cases of Infini-attention with `InfiniAttention`: third parties' code, for there is no official."""

import torch
from torch import Tensor

from memory_bench.errors import UserError, unknown
from memory_bench.parity.cases import Case, Settings
from memory_bench.parity.replaying import check_described, label_loss, replay_segments
from memory_bench.protocol import Segment

from ..infini_attention import InfiniAttention, InfiniAttentionConfig, InfiniState

EMPTY = {"local attention without gate": False, "zero memory output under the gate": True}
DESCRIBED = {
    "memory_layers": "all",
    "gate": "one scalar per query head, sigmoid(gate) weighs the memory",
    "memory_positions": "none (queries and keys before rotary)",
    "local_positions": "rotary, restarting at 0 in every segment",
}
"""Settings that say what the model always does."""


def read_config(case: Case, settings: Settings, segment: int) -> InfiniAttentionConfig:
    """The case's settings."""
    empty = settings.take("empty_memory", "local attention without gate")
    if empty not in EMPTY:
        raise unknown("empty_memory", str(empty), EMPTY, f"(case {case.name})")
    for name, ours in DESCRIBED.items():
        check_described(case, name, settings.take(name), ours)
    update, epsilon = settings.take("update_rule", "linear"), settings.take("epsilon", 1e-10)
    return InfiniAttentionConfig(segment=segment, update=update, epsilon=epsilon, gate_empty=EMPTY[empty])


def detached(case: Case, settings: Settings) -> int | None:
    """After how many segments the memories are detached; None: never. The case may say so in words, too.

    Raises:
        UserError: the words say something else.
    """
    every: int | None = settings.take("detach_every_segments")
    words = "full" if every is None else f"detached after every {'segment' if every == 1 else f'{every} segments'}"
    check_described(case, "bptt", settings.take("bptt"), words)
    if every is not None and every < 1:
        raise UserError(f"Case {case.name}: detach_every_segments is {every}; it must be at least 1, or null.")
    return every


def replay(case: Case) -> dict[str, Tensor]:
    """Every tensor of the case, by the names of ``expected.safetensors``.

    Raises:
        UserError: a setting is unknown or contradicts the others, or the weights do not fit.
    """
    settings = case.settings()
    lengths: list[int] = settings.take("segment_lengths")
    config = read_config(case, settings, max(lengths))
    every, new_tokens = detached(case, settings), settings.take("max_new_tokens")
    settings.finish()
    model = InfiniAttention(case.backbone(), config, torch.Generator())
    return replay_segments(
        case, model, lengths, look=_written, loss=label_loss, new_tokens=new_tokens, detach_every=every
    )


def _written(index: int, segment: Segment, before: InfiniState, after: InfiniState) -> dict[str, Tensor]:
    """Every layer's memory after a segment."""
    return {
        f"layer.{layer}.{name}": tensor
        for layer, memory in enumerate(after.memories)
        for name, tensor in (("memory_matrix", memory.matrix), ("normaliser", memory.normaliser))
    }
