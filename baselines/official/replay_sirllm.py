"""Replays reference cases of SirLLM (``StartRecentKVCache.evict_for_space_token_entropy``) with `SirLLM`."""

from dataclasses import replace

import torch
from torch import Tensor

from memory_bench.parity.cases import Case
from memory_bench.parity.replaying import cut, last_logits, layer_inputs, shifted_loss

from ..sirllm import SirLLM, SirLLMConfig


@torch.no_grad()
def replay(case: Case) -> dict[str, Tensor]:
    """Every tensor of the case, by the names of ``expected.safetensors``.

    Raises:
        UserError: a setting is unknown, or the weights do not fit.
    """
    settings = case.settings()
    lengths = settings.take("segment_lengths")
    config = replace(
        SirLLMConfig.official(),
        segment=max(lengths),
        sinks=settings.take("sink_tokens"),
        recent=settings.take("recent_tokens"),
        scored=settings.take("scored_tokens"),
        decay=settings.take("score_decay"),
        token_score=settings.take("token_score"),
    )
    settings.finish()
    model = SirLLM(case.backbone(), config, torch.Generator()).eval()
    inputs = case.tensors("inputs")
    ids = inputs["input_ids"]
    real = torch.ones_like(ids, dtype=torch.bool)
    got: dict[str, Tensor] = {}
    state, logits = model.open(len(ids)), []
    for number, segment in enumerate(cut(ids, real, lengths)):
        name = f"segment{number}."
        with_room = model.with_room(state, segment)
        got[f"{name}kept_positions"] = with_room.places[with_room.cache.mask]
        with layer_inputs(model.backbone) as seen:
            readout, state = model.step(state, segment)
        got |= {f"{name}hidden{layer}": hidden for layer, hidden in seen.items() if layer}
        logits.append(readout.logits())
        got[f"{name}logits"] = logits[-1]
        got[f"{name}scores"] = state.scores[state.cache.mask]
    pairs = enumerate(zip(state.cache.keys, state.cache.values, strict=True))
    for layer, (keys, values) in pairs:
        held = state.cache.mask[0]
        got |= {f"final.layer{layer}.keys": keys[:, :, held], f"final.layer{layer}.values": values[:, :, held]}
    changed = cut(inputs["counterfactual.input_ids"], real, lengths)
    got["counterfactual.last_segment.logits"] = last_logits(model, changed)
    return got | {"loss": shifted_loss(torch.cat(logits, dim=1), ids)}
