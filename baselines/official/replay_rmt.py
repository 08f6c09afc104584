"""Replays reference cases of the official RMT (``MemoryCell`` and ``RecurrentWrapper``) with `RMT`."""

from dataclasses import replace

import torch
from torch import Tensor

from memory_bench.errors import UserError
from memory_bench.parity.cases import Case, load_strictly
from memory_bench.parity.replaying import (
    attention_mask,
    check_described,
    cut,
    gradients,
    greedy,
    last_logits,
    segment_lengths,
    shifted_loss,
    stream,
)

from ..rmt import RMT, RMTConfig


def replay(case: Case) -> dict[str, Tensor]:
    """Every tensor of the case, by the names of ``expected.safetensors``.

    Raises:
        UserError: a setting is unknown or contradicts the others, or the weights do not fit.
    """
    inputs = case.tensors("inputs")
    ids, mask = inputs["input_ids"], attention_mask(inputs)
    settings = case.settings()
    config = replace(
        RMTConfig.official(),
        segment=settings.take("segment_length"),
        memory_tokens=settings.take("memory_tokens"),
        legacy_write_slot=settings.take("legacy_write_slot", True),
    )
    lengths = segment_lengths(ids.shape[1], config.segment, settings.take("segment_alignment", "left"))
    check_described(case, "segment_lengths", settings.take("segment_lengths"), lengths)
    new_tokens = settings.take("max_new_tokens")
    bptt = settings.take("bptt", "full, no detach")
    settings.finish()
    if not str(bptt).startswith("full"):
        raise UserError(f"Case {case.name}: bptt '{bptt}' is not known; the official code never detaches.")

    model = RMT(case.backbone(), config, torch.Generator()).eval()
    load_strictly(model, case.weights("memory."), case.name)
    got: dict[str, Tensor] = {}
    logits = []
    for s, _, before, readout, after in stream(model, cut(ids, mask, lengths)):
        got[f"segment.{s}.memory_read"], got[f"segment.{s}.memory_written"] = before.memory, after.memory
        logits.append(readout.logits())
    got["logits"] = torch.cat(logits, dim=1)
    if "labels" in inputs:
        got["loss"] = shifted_loss(got["logits"], inputs["labels"], inputs.get("labels_mask"))
        got["perplexity"] = got["loss"].exp()
        got |= gradients(got["loss"], model)
    changed = inputs.get("input_ids_first_segment_changed")
    if changed is not None:
        got["logits_last_segment_first_segment_changed"] = last_logits(model, cut(changed, mask, lengths))
    if new_tokens:
        got["generated_ids"] = greedy(model, cut(ids, mask, lengths, given=True), new_tokens)
    return got
