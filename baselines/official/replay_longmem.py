"""Replays reference cases of the official LongMem: the whole model, its bank alone, its attention alone.

The bank and attention cases run the same `LongMem` over a backbone without values, of which nothing is used.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from memory_bench.backbone.model import Backbone
from memory_bench.errors import UserError
from memory_bench.parity.cases import Case, Settings, load_strictly
from memory_bench.parity.replaying import attention_mask, check_described, cut, shifted_loss

from ..longmem import LongMem, LongMemConfig
from ..parts.chunk_bank import ChunkBank, Chunks, fold_rows, unfold_rows
from ..parts.knn import gather, products
from ..parts.side_network import Shape, causal_bias
from .decoder_alibi import AlibiDecoder, load_decoder

OFFICIAL = {
    "side_activation": "gelu (exact erf)",
    "side_norm_epsilon": 1e-5,
    "side_position": "alibi",
    "fusion": "per-head sigmoid gate, separate softmaxes",
    "bank_scope": "one bank shared by the whole batch",
}
"""What the official code always does; a case may say so."""
TIE = 1e-5  # scores that differ by less, relative to the largest, are equal but for rounding


@torch.no_grad()
def replay(case: Case) -> dict[str, Tensor]:
    """Every tensor of the case, by the names of ``expected.safetensors``.

    Raises:
        UserError: a setting is unknown or contradicts the others, or the weights do not fit.
    """
    inputs = case.tensors("inputs")
    if "step0.key" in inputs:
        return _bank(case, inputs)
    if "memory_key" in inputs:
        return _attention(case, inputs)
    return _whole(case, inputs)


def _whole(case: Case, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    settings = case.settings()
    lengths = _lengths(case, settings)
    base = settings.take("retrieval_layer_base", 0)
    options = _retrieval(case, settings) | {
        "segment": max(lengths),
        "reduction": settings.take("layer_reduction_factor"),
        "retrieval_layer": settings.take("retrieval_layer") - base,
        "side_inner": settings.take("side_intermediate_size"),
    }
    side_layers, reader = settings.take("side_layers"), settings.take("side_memory_layer")
    _finish(case, settings)
    model = LongMem(_backbone(case), replace(LongMemConfig.official(), **options), torch.Generator()).eval()
    check_described(case, "side_layers", side_layers, model.side_layers)
    check_described(case, "side_memory_layer", reader, model.reading_layer)
    load_strictly(model, _renamed(case.weights("memory.")), case.name)

    ids, logits = inputs["input_ids"], []
    got: dict[str, Tensor] = {}
    state = model.open(len(ids))
    for s, segment in enumerate(cut(ids, attention_mask(inputs), lengths)):
        passed = model.side_pass(state, segment, model.encode(segment))
        got |= {f"segment{s}.side_hidden{i}": hidden for i, hidden in enumerate(passed.hidden)}
        if passed.retrieved is not None:
            name = f"segment{s}.retrieved_chunk_index"
            side, x = model.side, passed.hidden[model.reading_layer]
            q = side.project(model.reading_layer, side.norm_input(model.reading_layer, x))[0]
            got[name] = _settle_ties(case, name, passed.retrieved, state, q)
        readout, state = model.step(state, segment)
        logits.append(readout.logits())
        got[f"segment{s}.logits"] = logits[-1]
        got |= {f"segment{s}.after.{name}": tensor for name, tensor in _contents(state).items()}
    got["logits"] = torch.cat(logits, dim=1)
    got["loss"] = shifted_loss(got["logits"], inputs.get("labels", ids))
    return got


def _bank(case: Case, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Written and read again, step by step."""
    settings = case.settings()
    options = _retrieval(case, settings)
    heads, width = settings.take("num_heads"), settings.take("head_dim")
    _finish(case, settings)
    unknown = set(case.weights("memory.")) - {"none"}
    if unknown:
        raise UserError(f"Case {case.name}: memory weights do not fit the bank ({', '.join(sorted(unknown)[:3])} …).")
    model = _alone(heads, width, options)
    got: dict[str, Tensor] = {}
    state, step = model.open(1), 0
    while f"step{step}.key" in inputs:
        q, k, v = (inputs[f"step{step}.{n}"].unflatten(2, (heads, width)) for n in ("query", "key", "value"))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        state = state.write(k, v, torch.ones(k.shape[0], k.shape[2], dtype=torch.bool))
        reader = model.reader(state)
        index = reader.retrieve(q)
        keys, values, places = reader.entries(index)
        for name, entries in (("keys", keys), ("values", values)):
            found = gather(entries, places, state.chunk)  # [1, heads, rows * queries, k, head]
            got[f"step{step}.retrieved_{name}"] = unfold_rows(found, len(q))
        name = f"step{step}.retrieved_chunk_index"
        got[name] = _settle_ties(case, name, index, state, q)
        got |= {f"step{step}.{name}": tensor for name, tensor in _contents(state).items()}
        step += 1
    return got


def _attention(case: Case, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Attention with given memories: a bank per row, whose chunk t is what token t has retrieved."""
    settings = case.settings()
    heads, width, k = (settings.take(name) for name in ("num_heads", "head_dim", "retrieved_tokens_k"))
    _finish(case, settings)
    options = {"chunk": k, "retrieved_tokens": k, "memory_size": k, "shared_bank": False, "coarse_eviction": False}
    model = _alone(heads, width, options)
    weights = case.weights("memory.")
    gate = weights.pop("memory_gate", None)
    if gate is None or gate.shape != model.memory_gate.shape:
        raise UserError(f"Case {case.name}: memory weights do not fit the model (memory_gate …).")
    model.memory_gate.copy_(gate)
    load_strictly(model.side._blocks[0].attention, weights, case.name)

    x = inputs["x"]
    rows, tokens = x.shape[:2]
    mask = torch.ones(rows, tokens, dtype=torch.bool)
    q, keys, values = model.side.project(0, x)
    local = model.side.attend(q, keys, values, causal_bias(inputs["alibi"][:, :, None], mask))
    given = (
        inputs["memory_key"].flatten(2, 3),
        inputs["memory_value"].flatten(2, 3),
    )  # [rows, heads, tokens * k, head]
    chunks = Chunks.of(*given, counts=[tokens] * rows, size=k)
    bank = replace(model.open(rows), blocks=(chunks,))
    own = torch.arange(tokens)[None, None, :, None].expand(rows, heads, -1, -1)
    fused = model.fuse(model.reader(bank), local, q, own, torch.arange(tokens).expand(rows, -1))
    project = model.side._blocks[0].attention.o_proj
    return {"output": project(fused), "output_without_memory": project(local)}


def _alone(heads: int, width: int, options: Mapping[str, Any]) -> LongMem:
    """The model over a backbone of one block without values."""
    empty = cast(Backbone, AlibiDecoder(Shape(1, heads * width, 1, heads), vocab=1))
    config = replace(LongMemConfig.official(), reduction=1, side_inner=1, **options)
    return LongMem(empty, config, torch.Generator()).eval()


def _backbone(case: Case) -> Backbone:
    config = case.info["backbone"]
    if config.get("model_type") != "newgpt":
        return case.backbone()
    return cast(Backbone, load_decoder(config, case.weights("backbone."), case.name))


def _lengths(case: Case, settings: Settings) -> list[int]:
    """Tokens of every segment: only the procedure's text says them, so they are taken from the recorded logits."""
    expected = case.tensors("expected")
    lengths: list[int] = []
    while f"segment{len(lengths)}.logits" in expected:
        lengths.append(expected[f"segment{len(lengths)}.logits"].shape[1])
    check_described(case, "segment_length", settings.take("segment_length"), max(lengths))
    return lengths


def _retrieval(case: Case, settings: Settings) -> dict[str, Any]:
    chunk, k = settings.take("chunk_size"), settings.take("retrieved_tokens_k")
    check_described(case, "retrieved_chunks", settings.take("retrieved_chunks"), k // chunk)
    return {"chunk": chunk, "retrieved_tokens": k, "memory_size": settings.take("memory_size_tokens")}


def _finish(case: Case, settings: Settings) -> None:
    for name, always in OFFICIAL.items():
        check_described(case, name, settings.take(name), always)
    settings.finish()


def _renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Recorded names as ours; the gate is the one of the layer that has it."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        own = name.replace("side_layers.", "side.blocks.").replace("final_norm.", "side.norm.")
        found["memory_gate" if name.endswith(".attention.memory_gate") else own] = tensor
    return found


def _settle_ties(case: Case, name: str, retrieved: Tensor, bank: ChunkBank, q: Tensor) -> Tensor:
    """Retrieved chunks ``[rows, tokens, heads, n]``; among chunks of equal score, the recorded one.

    Texts that repeat leave chunks with identical keys and values in the bank, and which of them a search names is its
    own affair. A recorded chunk with another score is never taken.
    """
    recorded = case.tensors("expected").get(name)
    ours = retrieved.transpose(1, 2)  # [rows, tokens, heads, n]
    if recorded is None or recorded.shape != ours.shape:
        return ours
    scores = unfold_rows(products(fold_rows(q), bank.joined().index), len(q)).transpose(1, 2)
    known = (ours >= 0) & (recorded >= 0) & (recorded < scores.shape[-1])
    both = [scores.gather(3, x.where(known, torch.zeros_like(x))) for x in (ours, recorded)]
    equal = known & ((both[0] - both[1]).abs() <= TIE * scores.abs().max())
    return recorded.where(equal, ours)


def _contents(bank: ChunkBank) -> dict[str, Tensor]:
    """What the bank holds, ``[heads, chunks, chunk, head]``, and how many chunks that is."""
    chunks = bank.joined()
    shape = (chunks.count, bank.chunk)
    return {
        "cursor_chunks": torch.tensor([chunks.count]),
        "memory_keys": chunks.keys[0].unflatten(1, shape),
        "memory_values": chunks.values[0].unflatten(1, shape),
    }
