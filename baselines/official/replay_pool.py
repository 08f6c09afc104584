"""Replays the reference cases of MemoryLLM and M+ with the classes that `run` uses."""

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import Tensor

from memory_bench.errors import UserError
from memory_bench.parity.cases import Case, Settings, load_strictly
from memory_bench.protocol import DecodePlan, Segment

from ..memoryllm import MemoryLLM
from ..mplus import MPlus, MPlusState

Model = MemoryLLM | MPlus


@torch.no_grad()
def replay(case: Case) -> dict[str, Tensor]:
    """Every tensor of a case's procedure, named as in ``expected``.

    Raises:
        UserError: unknown settings, weights that do not fit, or another model's case.
    """
    inputs = case.tensors("inputs")
    model = build(case)
    start = model.open(1)
    out: dict[str, Tensor] = {}
    if "score.input_ids" in inputs:
        out |= _score(model, start, inputs["score.input_ids"], "score.before_any_injection")
    state = start
    for i in _numbered(inputs, r"inject\.(\d+)\.input_ids"):
        permutations = _permutations(inputs, f"inject.{i}.drop_permutation")
        state, seen = _inject(model, state, inputs[f"inject.{i}.input_ids"], permutations)
        out |= {f"inject.{i}.{name}": tensor for name, tensor in seen.items()}
        if "score.input_ids" in inputs:
            out |= _score(model, state, inputs["score.input_ids"], f"score.after_{i}")
    out |= _counterfactuals(model, start, state, inputs)
    out |= _chain(model, state, inputs)
    expected = case.tensors("expected").get("generate.output_ids")
    if expected is not None:  # only its length is used: case.json does not give the number of new tokens
        prompt = inputs["generate.input_ids" if "generate.input_ids" in inputs else "score.input_ids"][: len(expected)]
        out["generate.output_ids"] = _generate(model, state, prompt, expected.shape[1] - prompt.shape[1])
    return out


def build(case: Case) -> Model:
    """The case's model with its weights, from the official preset and the case's settings."""
    classes: dict[str, type[Model]] = {"memoryllm": MemoryLLM, "mplus": MPlus}
    if case.model not in classes:
        raise UserError(f"Case {case.name}: '{case.model}' is no pool model; this replay knows memoryllm and mplus.")
    weights = case.weights("memory.")
    settings = case.settings()
    options = _common(settings, case.name)
    block = options["tokens_per_block"]
    options["blocks"] = settings.take("blocks" if case.model == "memoryllm" else "pool_blocks")
    _agree(case, "pool_tokens", settings.take("pool_tokens"), options["blocks"] * block)
    if case.model == "mplus":
        options["retrieved_tokens"] = settings.take("long_term_blocks") * block
        _agree(case, "retrieved_tokens", settings.take("retrieved_tokens"), options["retrieved_tokens"])
        options |= _long_term(settings, weights)
    settings.finish()
    cls = classes[case.model]
    longest = max(t.shape[1] for name, t in case.tensors("inputs").items() if name.endswith("input_ids"))
    config = replace(cls.Config.official(), segment=longest, **options)
    model = cls(case.backbone(), config, torch.Generator().manual_seed(0))
    load_strictly(model, _renamed(weights), case.name)
    return model.eval()


def _common(settings: Settings, case: str) -> dict[str, Any]:
    lora = Settings(settings.take("lora") or {}, case)
    options = {
        "tokens_per_block": settings.take("tokens_per_block"),
        "pool_initialized": settings.take("pool_initialized", True),
        "bos_embedding": settings.take("bos_embedding", True),
        "drop_per_layer": settings.take("drop_per_layer", True),
        "lora_rank": lora.take("rank", 0),
        "add_read_lora": settings.take("add_read_lora", False),
    }
    options |= {"lora_alpha": float(lora.take("alpha", 1)), "lora_targets": tuple(lora.take("targets", ()))}
    lora.finish()
    return options


def _long_term(settings: Settings, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """M+'s own options; the starting store's sizes are those in the weights, because layers may differ."""
    settings.take("long_term_initial_size")
    layers = _numbered(weights, r"long_term\.layers\.(\d+)\.tokens")
    return {
        "retriever_width": settings.take("retriever_dim"),
        "retriever_layers": settings.take("retriever_layers", 2),
        "initial_recall_frequency": float(settings.take("initial_recall_frequency")),
        "recall_decay": float(settings.take("decay")),
        "merge_every": settings.take("merge_every_injections"),
        "retrieval_query": settings.take("retrieval_query", "all"),
        "long_term_sizes": tuple(len(weights[f"long_term.layers.{i}.tokens"]) for i in layers),
    }


def _agree(case: Case, name: str, said: int | None, follows: int) -> None:
    if said not in (None, follows):
        raise UserError(f"Case {case.name}: {name} is {said}, but the block settings give {follows}.")


def _renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A retriever of one linear layer may be stored without the number of the layer."""
    pattern = re.compile(r"(retriever\.layers\.\d+\.(?:query|key|encoder_query))\.weight")
    return {pattern.sub(r"\1.0.weight", name): tensor for name, tensor in weights.items()}


def _numbered(names: Mapping[str, Tensor], pattern: str) -> list[int]:
    return sorted(int(found[1]) for name in names if (found := re.fullmatch(pattern, name)))


def _permutations(inputs: Mapping[str, Tensor], name: str) -> Tensor | None:
    """``[1, layers or 1, pool_tokens]``; None where nothing was drawn (a first fill)."""
    return inputs[name][None] if name in inputs else None


def _rows(state: Any, rows: int) -> Any:
    return state.rows(torch.zeros(rows, dtype=torch.int64))


def _score(model: Model, state: Any, ids: Tensor, name: str, adapter: str = "read") -> dict[str, Tensor]:
    """Logits, mean next-token loss, and the retrieved rows of a read."""
    reading = model.read(_rows(state, len(ids)), ids, adapter=adapter)
    logits = model.backbone.head(reading.hidden)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    out = {f"{name}.logits": logits, f"{name}.loss": loss}
    if isinstance(model, MPlus) and len({rows.shape[1] for rows in reading.recalled}) == 1:
        out[f"{name}.retrieved_tokens"] = torch.stack([rows[0] for rows in reading.recalled])
    return out


def _inject(model: Model, state: Any, ids: Tensor, permutations: Tensor | None) -> tuple[Any, dict[str, Tensor]]:
    """One write; of several texts the first is merged, as in the official code."""
    written = model.write_pass(_rows(state, len(ids)), ids)
    logits = model.backbone.head(model.backbone.end(cast(Tensor, written.hidden)))
    merged = replace(written, block=written.block[:1])
    merged = replace(merged, hidden=None, inputs=tuple(x[:1] for x in written.inputs))
    filled = bool(state.host_filled[0])
    state = model.store(state, merged, permutations)
    seen = {"logits": logits, "new_memory": written.block, "pool": state.pool[0]}
    if filled and permutations is not None:
        stay = permutations.shape[-1] - written.block.shape[2]
        seen["kept_indices"] = permutations[0, :, : max(0, stay)].sort(dim=-1).values
    return state, seen | (_stores(state) if isinstance(state, MPlusState) else {})


def _stores(state: MPlusState) -> dict[str, Tensor]:
    long, pending = state.host_long_term, state.host_pending
    out = {"pool_ages": state.host_pool_ages[0], "long_term_size": long.counts[0]}
    names = ("tokens", "keys", "ages", "recall_frequencies")
    for layer in range(len(long.ages)):
        out |= {f"long_term.{layer}.{n}": t[0] for n, t in zip(names, long.layer(layer), strict=True)}
    if pending.ages[0].shape[1]:
        out |= {f"pending.{f.name}": torch.cat(getattr(pending, f.name)) for f in fields(pending)[:3]}
    return out


def _counterfactuals(model: Model, start: Any, state: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reads with zeroed long-term entries, and after other contexts were written with the same draws."""
    out: dict[str, Tensor] = {}
    if "score.input_ids" not in inputs:
        return out
    if isinstance(state, MPlusState):
        stores = {n: _zeroed(getattr(state, n)) for n in ("host_long_term", "host_pending")}
        out |= _score(model, replace(state, **stores), inputs["score.input_ids"], "counterfactual.zeroed_long_term")
    others = _numbered(inputs, r"counterfactual\.inject\.(\d+)\.input_ids")
    other = start
    for i in others:
        permutations = _permutations(inputs, f"inject.{i}.drop_permutation")
        other, _ = _inject(model, other, inputs[f"counterfactual.inject.{i}.input_ids"], permutations)
    return out | (_score(model, other, inputs["score.input_ids"], "counterfactual.score") if others else {})


def _zeroed(store: Any) -> Any:
    return replace(store, tokens=tuple(torch.zeros_like(t) for t in store.tokens))


def _chain(model: Model, state: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write passes chained through their un-merged blocks, and reads of these blocks alone or topped up."""
    out: dict[str, Tensor] = {}
    blocks: list[Tensor] = []
    for i in _numbered(inputs, r"chain\.(\d+)\.input_ids"):
        ids = inputs[f"chain.{i}.input_ids"]
        before = _with_pool(state, blocks[-1]) if blocks else state
        blocks.append(model.write_pass(before, ids).block)
        out[f"chain.{i}.new_memory"] = blocks[-1]
    if not blocks:
        return out
    ids = inputs["score.input_ids"]
    out |= _score(model, _with_pool(state, blocks[-1]), ids, "chain.read_single", adapter="write")
    reads = {"chain.read_single_topped_up": blocks[-1], "chain.read_double": torch.cat(blocks[-2:], dim=2)}
    for name, block in reads.items():
        permutations = _permutations(inputs, f"{name}.permutation")
        if permutations is not None:
            out |= _score(model, model.merge(state, block, permutations), ids, name)
    return out


def _with_pool(state: Any, block: Tensor) -> Any:
    return replace(state, pool=block)


def _generate(model: Any, state: Any, prompt: Tensor, new: int) -> Tensor:
    """Greedy decoding in one segment, prompt included."""
    plan = DecodePlan(new_tokens=new, fold=False)
    return torch.cat([prompt, model.decode(_rows(state, len(prompt)), Segment.full(prompt), plan)], dim=1)
