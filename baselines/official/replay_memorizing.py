"""Replays reference cases of the Memorizing Transformer: two decoders, one layer, the fusion alone.

The decoders are no models of the benchmark; everything they remember and retrieve goes through the product's code.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memory_bench.errors import UserError
from memory_bench.parity.cases import Case, Settings
from memory_bench.parity.replaying import Weights

from ..memorizing import MemorizingConfig, window_and_memory
from ..parts import knn
from ..parts.ring import Ring
from .decoder_lucidrains import LucidrainsDecoder, LucidrainsSizes, MemoryLayer
from .decoder_meliad import MeliadDecoder, MeliadSizes

GATE, JOINT = "per-head sigmoid gate", "softmax over concatenated memory and local logits"


@torch.no_grad()
def replay(case: Case) -> dict[str, Tensor]:
    """Every tensor of a case's procedure, named as in ``expected``.

    Raises:
        UserError: unknown settings, weights that do not fit, or a backbone without a reference decoder.
    """
    backbone = Settings(case.info["backbone"], case.name)
    kind = backbone.take("model_type")
    backbone.take("note")
    backbone.take("not_a_hugging_face_model")
    inputs = case.tensors("inputs")
    settings, weights = case.settings(), Weights(case)
    if kind == "meliad-decoder":
        got = _meliad(case, backbone, settings, weights, inputs)
    elif kind == "lucidrains-memorizing-decoder":
        got = _lucidrains(case, backbone, settings, weights, inputs)
    elif kind == "none" and "query" in inputs:
        got = _fusion(case, settings, weights, inputs)
    elif kind == "none":
        got = _layer(case, settings, weights, inputs)
    else:
        raise UserError(f"Case {case.name}: no reference decoder is known for the backbone '{kind}'.")
    for left in (backbone, settings, weights):
        left.finish()
    return got


def _fixed(case: Case, settings: Settings, **known: Any) -> None:
    """Settings that can have one value only: those of the replayed code.

    Raises:
        UserError: another value is recorded.
    """
    for name, value in known.items():
        recorded = settings.take(name, value)
        if recorded != value:
            raise UserError(f"Case {case.name}: {name} = {recorded!r} is not known, only {value!r}.")


def _config(case: Case, settings: Settings, fusion: str, **options: Any) -> MemorizingConfig:
    """The official preset with the settings that all cases have."""
    _fixed(case, settings, fusion=fusion)
    return replace(
        MemorizingConfig.official(),
        slots=settings.take("memory_size_tokens"),
        top_k=settings.take("retrieved_k"),
        search=settings.take("retrieval"),
        xl_cache=settings.take("xl_cache_tokens"),
        fusion="gate" if fusion == GATE else "joint",
        **options,
    )


def _memory_layer(settings: Settings) -> int:
    """The memory layer, counted from 0."""
    layer: int = settings.take("memory_layer") - settings.take("memory_layer_base", 0)
    return layer


def _heads_last(x: Tensor) -> Tensor:
    """``[rows, heads, tokens, …]`` as ``[rows, tokens, heads, …]``, or the other way round."""
    return x.transpose(1, 2)


def _losses(logits: Tensor, ids: Tensor) -> Tensor:
    """``[rows, tokens - 1]`` surprisal (float64) of every token but the first."""
    return F.cross_entropy(logits[:, :-1].double().transpose(1, 2), ids[:, 1:], reduction="none")


def _meliad(
    case: Case, backbone: Settings, settings: Settings, weights: Weights, inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    _fixed(case, backbone, norm="RMS, eps 1e-6, scale only", activation="relu", tied_embeddings=True)
    _fixed(case, backbone, logit_divisor="sqrt(hidden_size)")
    _fixed(case, settings, memory_scope="one database per (batch row, head)", update_after_query=True)
    sizes = MeliadSizes(
        hidden=backbone.take("hidden_size"),
        heads=backbone.take("num_attention_heads"),
        head_width=backbone.take("head_dim"),
        mlp=backbone.take("intermediate_size"),
        layers=backbone.take("num_hidden_layers"),
        vocab=backbone.take("vocab_size"),
        window=backbone.take("window_length"),
        buckets=backbone.take("relative_bias_buckets"),
        max_distance=backbone.take("relative_bias_max_distance"),
        memory_layer=_memory_layer(settings),
        memory_bias=settings.take("position_bias_in_memory_layer", False),
        epsilon=settings.take("normalize_epsilon", 1e-6),
    )
    length = backbone.take("segment_length")
    normalise = settings.take("normalize_keys_queries", True)
    config = _config(case, settings, GATE, segment=length, normalise=normalise)
    decoder = MeliadDecoder(sizes, config, weights)
    ids = inputs["input_ids"]
    starts = inputs.get("start_of_sequence", torch.zeros(ids.shape[1] // length, len(ids))).bool()
    state, logits = decoder.open(len(ids)), []
    got: dict[str, Tensor] = {}
    for s, (part, start) in enumerate(zip(ids.split(length, dim=1), starts, strict=True)):
        predicted, state, seen = decoder.segment(state.reset(start), part)
        logits.append(predicted)
        got[f"segment{s}.logits"] = predicted
        got |= {f"segment{s}.memory_layer.{name}": tensor for name, tensor in seen.items()}
        store = state.store
        got[f"segment{s}.after.database_index"] = store.written.repeat_interleave(sizes.heads)
        got[f"segment{s}.after.key_db"] = store.keys[0].flatten(0, 1)
        got[f"segment{s}.after.value_db"] = store.values[0].flatten(0, 1)
    nll = _losses(torch.cat(logits, dim=1), ids)
    got["loss"] = nll.mean()[None]
    return got | {f"segment{s}.nll_sum": part.sum()[None] for s, part in enumerate(nll.split(length, dim=1))}


def _fusion(case: Case, settings: Settings, weights: Weights, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gate over a given window and store; both kinds of masking."""
    heads = settings.take("num_heads")
    settings.take("head_dim")
    _fixed(case, settings, normalize_keys_queries=True)  # they come normalised
    config = _config(case, settings, GATE)
    q, keys, values, stored, stored_values = (
        _heads_last(inputs[name]) for name in ("query", "key", "value", "memory_key", "memory_value")
    )
    q = q * weights.take("memory.attention_scale", heads).abs()[:, None, None]
    gate = weights.take("memory.memory_gate", heads)
    written = q.new_full((len(q),), settings.take("written_slots", config.slots), dtype=torch.long)
    store = Ring((stored,), (stored_values,), written, config.slots)
    valid, k = store.valid(), config.top_k
    window = knn.Local(q, keys, values, inputs["attention_mask"].bool()[None, None])
    bucketed = config.search == "bucketed"

    def memory(dilute: bool) -> Tensor:
        return knn.retrieve_and_attend(q, stored, stored_values, k, bucketed=bucketed, valid=valid, dilute=dilute)

    got = {
        "local_attention": knn.window_attention(q, keys, values, window.visible),
        "memory_attention": memory(dilute=True),
        "memory_attention_masked": memory(dilute=False),
        "output": window_and_memory(config, window, q, store, 0, (valid, None), gate),
        "retrieved_indices": _indices(config, q, stored, valid),
    }
    return {name: _heads_last(tensor) for name, tensor in got.items()}


def _indices(config: MemorizingConfig, q: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
    """Retrieved slots ``[rows, heads, tokens, k]``; empty ones are tied, and the official code takes them in order."""
    k = config.top_k
    if config.search == "bucketed":
        shares = knn.bucket_shares(knn.products(q, keys), k, valid)
        return shares.argmax(dim=-2) * k + torch.arange(k)
    found = knn.search(q, keys, k, valid)
    rows = torch.arange(len(valid)).view(-1, 1, 1, 1)
    empty = ~valid[rows, found]
    in_order = valid.sum(dim=1).view(-1, 1, 1, 1) + empty.long().cumsum(dim=-1) - 1
    return torch.where(empty, in_order, found)


def _layer(case: Case, settings: Settings, weights: Weights, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """One memory layer of lucidrains' decoder; the bias of its window is given."""
    hidden, heads, width = (settings.take(name) for name in ("hidden_size", "num_heads", "head_dim"))
    _fixed(case, settings, num_key_value_heads=1, memory_scope="one per batch row, shared by heads")
    config = _config(case, settings, JOINT, mask_unwritten=True, mask_cache=True)
    layer = MemoryLayer(
        config,
        heads,
        weights.take("memory.q_proj", heads * width, hidden),
        weights.take("memory.kv_proj", 2 * width, hidden),
        weights.take("memory.o_proj", hidden, heads * width),
        weights.take("memory.log_scale", heads, 1, 1)[:, 0, 0],
    )
    weights.take("memory.relative_bias_table", 32, heads)  # the biases made of it are inputs
    segments = sorted(int(n.split(".")[0].removeprefix("segment")) for n in inputs if n.endswith(".x"))
    store, cache = layer.open(inputs[f"segment{segments[0]}.x"].shape[0])
    got: dict[str, Tensor] = {}
    for s in segments:
        output, store, cache = layer.attend(inputs[f"segment{s}.x"], inputs[f"segment{s}.relative_bias"], store, cache)
        got[f"segment{s}.output"] = output
        got[f"segment{s}.xl_cache"] = torch.stack(cache, dim=3)[:, 0]
        got[f"segment{s}.stored_tokens"] = store.written[:1]
    return got | {"memory": _stored(store)}


def _stored(store: Ring) -> Tensor:
    """``[rows, stored tokens, 2 (key, value), head]``."""
    if int(store.written.max()) > store.capacity:
        raise ValueError("the official store loses its index when it overflows, which is not replayed")
    return torch.stack([store.keys[0], store.values[0]], dim=3)[:, 0]


def _lucidrains(
    case: Case, backbone: Settings, settings: Settings, weights: Weights, inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    _fixed(case, backbone, num_key_value_heads=1, norm="LayerNorm eps 1e-5", activation="gelu (exact)")
    _fixed(case, settings, memory_scope="one per batch row, shared by heads")
    sizes = LucidrainsSizes(
        hidden=backbone.take("hidden_size"),
        heads=backbone.take("num_attention_heads"),
        head_width=backbone.take("head_dim"),
        mlp=backbone.take("intermediate_size"),
        layers=backbone.take("num_hidden_layers"),
        vocab=backbone.take("vocab_size"),
        buckets=backbone.take("relative_bias_buckets"),
        max_distance=backbone.take("relative_bias_max_distance"),
        memory_layer=_memory_layer(settings),
    )
    decoder = LucidrainsDecoder(sizes, _config(case, settings, JOINT, mask_unwritten=True, mask_cache=True), weights)
    ids = inputs["input_ids"]
    length = case.tensors("expected")["segment0.logits"].shape[1]  # case.json does not give it
    (store, caches), logits = decoder.open(len(ids)), []
    got: dict[str, Tensor] = {}
    for s, part in enumerate(ids.split(length, dim=1)):
        predicted, store, caches = decoder.segment(part, store, caches)
        logits.append(predicted)
        got |= {f"segment{s}.logits": predicted, f"segment{s}.stored_tokens": store.written[:1]}
    return got | {"loss": _losses(torch.cat(logits, dim=1), ids).mean(), "memory": _stored(store)}
