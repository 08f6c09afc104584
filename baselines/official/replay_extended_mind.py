"""Replays reference cases of Extended Mind Transformers (``ExtendedLlamaForCausalLM``) with `ExtendedMind`."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from memory_bench.errors import UserError
from memory_bench.parity.cases import Case, Settings
from memory_bench.parity.replaying import cut, last_logits, layer_inputs, shifted_loss
from memory_bench.protocol import DecodePlan, Segment

from ..extended_mind import ExtendedMind, ExtendedMindConfig, ExtendedMindState


@torch.no_grad()
def replay(case: Case) -> dict[str, Tensor]:
    """Every tensor of the case, by the names of ``expected.safetensors``.

    Raises:
        UserError: a setting or protocol is unknown, or the weights do not fit.
    """
    settings = case.settings()
    protocol = settings.take("protocol")
    if protocol not in ("document", "stream"):
        raise UserError(f"Case {case.name}: protocol '{protocol}' is not known; use document or stream.")
    options = _options(settings)
    if protocol == "document":
        new_tokens = settings.take("generated_tokens", 0)
        settings.finish()
        return _document(case, options, new_tokens)
    lengths = settings.take("segment_lengths")
    window = settings.take("local_window")
    settings.finish()
    return _stream(case, options, lengths, window)


def _options(settings: Settings) -> dict[str, Any]:
    """What both protocols set."""
    used, masked, removed = (
        settings.take(name) for name in ("use_memory_by_layer", "mask_by_similarity", "remove_special_ids")
    )
    threshold, special = settings.take("similarity_threshold"), settings.take("special_ids")
    return {
        "top_k": settings.take("retrieved_tokens"),
        "similarity_threshold": threshold if masked else None,
        "layers": tuple(layer for layer, uses in enumerate(used) if uses),
        "special_ids": tuple(special) if removed else (),
        "memory_stride": settings.take("memory_stride"),
        "memory_context": settings.take("memory_context"),
    }


def _build(case: Case, **options: Any) -> ExtendedMind:
    return ExtendedMind(case.backbone(), replace(ExtendedMindConfig.official(), **options), torch.Generator()).eval()


def _watched(model: ExtendedMind, state: ExtendedMindState, segment: Segment, name: str) -> dict[str, Tensor]:
    """Logits of a segment, inputs of the layers above the first, and what these retrieve (ascending).

    In the first layer equal tokens have equal keys, and tie.
    """
    tokens = segment.ids.shape[1]
    found: dict[int, Tensor] = {}
    with layer_inputs(model.backbone) as inputs:
        logits = model.backbone.head(model.read(state, segment, found.__setitem__)[0])
    got = {f"{name}hidden{layer}": hidden[:, -tokens:] for layer, hidden in inputs.items() if layer}
    got |= {
        f"{name}layer{layer}.retrieved": slots[:, :, -tokens:].sort(dim=-1).values  # slots are numbers of entries
        for layer, slots in found.items()
        if layer
    }
    return got | {f"{name}logits": logits}


def _entries(model: ExtendedMind, state: ExtendedMindState, segment: Segment, name: str) -> dict[str, Tensor]:
    """The entries that a segment may retrieve."""
    valid = model.memories(state, segment)[0]
    pairs = zip(model.layers, state.store.keys, state.store.values, strict=True)
    return {
        f"{name}layer{layer}.{kind}": entries[:, :, valid]
        for layer, keys, values in pairs
        for kind, entries in (("keys", keys), ("values", values))
    }


def _document(case: Case, options: dict[str, Any], new_tokens: int) -> dict[str, Tensor]:
    """A document is read once; then a text is read, and continued, with it in memory."""
    inputs = case.tensors("inputs")
    text = Segment.full(inputs["input_ids"])
    tokens = text.ids.shape[1]
    model = _build(case, segment=tokens, history=0, window_start="segment", **options)  # all of it, from 0

    def read(name: str) -> ExtendedMindState:
        return model.absorb(model.open(len(text.ids)), Segment.full(inputs[name]))

    memory = read("memory_ids")
    keeper = ExtendedMind(model.backbone, replace(model.config, layers=None), torch.Generator()).eval()
    document = Segment.full(inputs["memory_ids"])
    got = _entries(
        keeper, keeper.absorb(keeper.open(len(text.ids)), document), text, "memory."
    )  # also of layers without memory
    got |= _watched(model, memory, text, "read.")
    got["counterfactual.read.logits"] = model.step(read("counterfactual.memory_ids"), text, write=False)[0].logits()
    got["without_memory.logits"] = model.step(model.open(len(text.ids)), text, write=False)[0].logits()
    if new_tokens:
        new = model.decode(memory, text, DecodePlan(new_tokens, fold=False))
        whole = Segment.full(torch.cat([text.ids, new], dim=1))
        got["generate.output_ids"] = new
        got["generate.logits"] = model.step(memory, whole, write=False)[0].logits(slice(tokens, None))
    return got


def _stream(case: Case, options: dict[str, Any], lengths: list[int], window: int) -> dict[str, Tensor]:
    """A text is read segment by segment; what the window no longer shows is memory."""
    inputs = case.tensors("inputs")
    model = _build(case, segment=max(lengths), history=window - max(lengths), **options)
    keeper = ExtendedMind(model.backbone, replace(model.config, layers=None), torch.Generator()).eval()
    ids = inputs["input_ids"]
    got: dict[str, Tensor] = {}
    state, kept, logits = model.open(len(ids)), keeper.open(len(ids)), []
    segments = cut(ids, torch.ones_like(ids, dtype=torch.bool), lengths)
    for number, segment in enumerate(segments):
        got |= _watched(model, state, segment, f"segment{number}.")
        logits.append(got[f"segment{number}.logits"])
        if segment is segments[-1]:
            got |= _entries(keeper, kept, segment, "final.")
        state, kept = model.absorb(state, segment), keeper.absorb(kept, segment)
    changed = cut(inputs["counterfactual.input_ids"], torch.ones_like(ids, dtype=torch.bool), lengths)
    got["counterfactual.last_segment.logits"] = last_logits(model, changed)
    return got | {"loss": shifted_loss(torch.cat(logits, dim=1), ids)}
