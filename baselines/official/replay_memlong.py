"""Replays reference cases of MemLong (``LlamaForCausalLM`` with ``ToolKit`` and ``ChunkMemory``) with `MemLong`."""

from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from memory_bench.backbone.embedder import Embedder
from memory_bench.errors import UserError
from memory_bench.parity.cases import Case, Settings
from memory_bench.parity.replaying import check_described, cut, segment_lengths, shifted_loss
from memory_bench.protocol import Segment

from ..memlong import MemLong, MemLongConfig, MemLongState
from ..parts.text_memory import Found

POSITIONS = {"zero": "zero", "continual": "repeated"}
STORES = {"float32": "backbone", "bfloat16": "bfloat16"}
CURRENT = ("current piece (whole)", "prompt pieces: current piece (whole); generation: whole text so far")


class TableEmbedder:
    """What stands for the text embedder in the cases: unit means of rows of a table ``[vocab, width]``."""

    parameters = 0

    def __init__(self, table: Tensor) -> None:
        self._table = table
        self.width = int(table.shape[1])

    def __call__(self, ids: Tensor) -> Tensor:
        """Unit vectors ``[texts, width]`` of `ids` ``[texts, tokens]``; negative ids are no tokens."""
        real = (ids >= 0)[:, :, None]
        return F.normalize((self._table[ids.clamp(min=0).long()] * real).sum(dim=1), dim=-1)

    def flops(self, tokens: int) -> int:
        """Operations for one text: none that count."""
        del tokens
        return 0


def replay(case: Case) -> dict[str, Tensor]:
    """Every tensor of the case, by the names of ``expected.safetensors``.

    Raises:
        UserError: a setting is unknown or contradicts the others, or the weights do not fit.
    """
    settings = case.settings()
    config = _config(case, settings)
    calls, gradient = settings.take("calls"), settings.take("gradient", "none")
    new_tokens = settings.take("max_new_tokens")
    settings.finish()
    model = _build(case, config)
    inputs = case.tensors("inputs")
    if new_tokens:
        return _generate(model, inputs["input_ids"], new_tokens)
    check_described(case, "calls", calls, [inputs[f"call.{n}.input_ids"].shape[1] for n in range(len(calls))])
    got: dict[str, Tensor] = {}
    state = model.open(len(inputs["call.0.input_ids"]))
    with torch.no_grad():
        for number in range(len(calls) - 1):
            state, seen = _call(model, state, inputs, number)
            got |= seen
    with torch.set_grad_enabled(not gradient.startswith("none")):
        _, seen = _call(model, state, inputs, len(calls) - 1)
        got |= seen
        if not gradient.startswith("none"):
            got |= _gradients(seen[f"call.{len(calls) - 1}.loss"], model)
    return got | _changed(model, inputs, len(calls))


def _config(case: Case, settings: Settings) -> MemLongConfig:
    position, store = settings.take("memory_position"), settings.take("memory_dtype")
    query, scores = settings.take("retrieval_query"), settings.take("chunk_scores")
    for name, value, known in (
        ("memory_position", position, tuple(POSITIONS)),
        ("memory_dtype", store, tuple(STORES)),
        ("retrieval_query", query, CURRENT),
        ("chunk_scores", scores, ("inner product of unit vectors",)),
    ):
        if value not in known:
            raise UserError(f"Case {case.name}: {name} = {value!r} is not known, only {', '.join(known)}.")
    return replace(
        MemLongConfig.official(),
        segment=settings.take("last_context_length"),
        memory_layer=settings.take("memory_layer"),
        retrieval_layers=tuple(settings.take("retrieval_layers")),
        memory_tokens=settings.take("memory_tokens"),
        chunk=settings.take("chunk_length"),
        retrieved_chunks=settings.take("retrieved_chunks"),
        gate="scale" if settings.take("score_gate") else "none",
        memory_position=cast(Any, POSITIONS[position]),
        store=cast(Any, STORES[store]),
    )


def _build(case: Case, config: MemLongConfig) -> MemLong:
    """The case's model; the official class also has gates where none is used, at a memory layer that does not read."""
    backbone, weights = case.backbone(), case.weights("memory.")
    backbone.embedder = cast(Embedder, TableEmbedder(weights.pop("retriever_table")))
    model = MemLong(backbone, config, torch.Generator()).eval()
    unused = {f"layers.{layer}.score_gate" for layer in range(backbone.layers) if layer not in model.layers}
    gates = {name: weights.pop(name) for name in list(weights) if name.endswith(".score_gate")}
    if weights or {f"layers.{n}.score_gate" for n in model.score_gate} != set(gates) - unused:
        raise UserError(f"Case {case.name}: weights do not fit ({', '.join(sorted([*weights, *gates])[:4])}).")
    with torch.no_grad():
        for layer, gate in model.score_gate.items():
            gate.copy_(gates[f"layers.{layer}.score_gate"])
    return model


def _pieces(model: MemLong, ids: Tensor) -> list[Segment]:
    """How a call is cut: into chunks, and one last piece."""
    last = min(model.config.segment, ids.shape[1])
    lengths = [*segment_lengths(ids.shape[1] - last, model.config.chunk), last]
    return cut(ids, torch.ones_like(ids, dtype=torch.bool), lengths)


def _look(model: MemLong, state: MemLongState, piece: Segment) -> tuple[Tensor, Found | None]:
    vector = model.embed_text(model.query_text(state, piece))
    return vector, model.find(state, piece, lambda: vector)


def _call(
    model: MemLong, state: MemLongState, inputs: dict[str, Tensor], number: int, ids: Tensor | None = None
) -> tuple[MemLongState, dict[str, Tensor]]:
    """A call, and what is recorded of it; pieces before its last one have no gradient."""
    name, logits = f"call.{number}", []
    got: dict[str, Tensor] = {}
    pieces = _pieces(model, inputs[f"{name}.input_ids"] if ids is None else ids)
    for at, piece in enumerate(pieces):
        vector, found = _look(model, state, piece)
        if found is not None:
            got[f"{name}.piece.{at}.retrieved_chunks"] = found.chunks
            got[f"{name}.piece.{at}.query_embedding"] = vector
            got[f"{name}.piece.{at}.memory_keys_read"] = _without_gaps(found)
        with torch.set_grad_enabled(torch.is_grad_enabled() and piece is pieces[-1]):
            readout, state = model.step(state, piece)
            logits.append(readout.logits())
        real = (state.memory.ids[0] >= 0).flatten()
        written = real.nonzero()[-piece.ids.shape[1] :, 0]
        got[f"{name}.piece.{at}.keys_written"] = state.memory.keys[:, :, written]
        got[f"{name}.piece.{at}.values_written"] = state.memory.values[:, :, written]
    got[f"{name}.logits"] = torch.cat(logits, dim=1)
    got[f"{name}.loss"] = shifted_loss(got[f"{name}.logits"], inputs[f"{name}.labels"])
    got[f"{name}.chunks_stored"] = state.memory.real.sum(dim=1)
    got[f"{name}.tokens_stored"] = (state.memory.ids >= 0).flatten(1).sum(dim=1)
    return state, got


def _without_gaps(found: Found) -> Tensor:
    """The keys of real tokens ``[rows, kv_heads, n, head]``; all rows have as many."""
    return torch.stack([keys[:, mask] for keys, mask in zip(found.keys, found.mask, strict=True)])


def _gradients(loss: Tensor, model: MemLong) -> dict[str, Tensor]:
    """Of the projections, the embedding and the gates, as the cases name them."""
    inner: Any = model.backbone.model
    named = {"backbone.input_embedding": inner.get_input_embeddings().weight}
    for layer, block in enumerate(inner.model.layers):
        for kind in ("q_proj", "k_proj", "v_proj"):
            named[f"backbone.layer.{layer}.{kind}"] = getattr(block.self_attn, kind).weight
    named |= {f"memory.layers.{layer}.score_gate": gate for layer, gate in model.score_gate.items()}
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
    return {f"grad.{name}": gradient for name, gradient in zip(named, found, strict=True)}


@torch.no_grad()
def _changed(model: MemLong, inputs: dict[str, Tensor], calls: int) -> dict[str, Tensor]:
    """Logits of the last piece where a chunk of an earlier one is another."""
    other = {n: t for n, t in inputs.items() if n.endswith("_earlier_chunk_changed")}
    if not other:
        return {}
    state = model.open(len(inputs["call.0.input_ids"]))
    seen: dict[str, Tensor] = {}
    for number in range(calls):
        ids = other.get(f"call.{number}.input_ids_earlier_chunk_changed")
        state, seen = _call(model, state, inputs, number, ids)
    last = min(model.config.segment, inputs[f"call.{calls - 1}.input_ids"].shape[1])
    return {"logits_last_piece_earlier_chunk_changed": seen[f"call.{calls - 1}.logits"][:, -last:]}


@torch.no_grad()
def _generate(model: MemLong, ids: Tensor, new_tokens: int) -> dict[str, Tensor]:
    """A prompt in pieces, of which the last is not stored, and a greedy continuation."""
    *pieces, last = _pieces(model, ids)
    state, passes = model.open(len(ids)), []
    for piece in pieces:
        passes.append(_look(model, state, piece))
        state = model.absorb(state, piece)
    new, logits = model.continued(state, last, new_tokens, lambda vector, found: passes.append((vector, found)))
    got = {"generated_ids": new, "step_logits": logits, "chunks_stored": state.memory.real.sum(dim=1)}
    for number, (vector, found) in enumerate(passes):
        if found is not None:
            got[f"backbone_call.{number}.query_embedding"] = vector
            got[f"backbone_call.{number}.retrieved_chunks"] = found.chunks
    return got
