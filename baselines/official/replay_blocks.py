"""Replays the reference cases of InfLLM and EM-LLM (``ContextManager`` patched into a Llama) with the models here."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from memory_bench.errors import UserError
from memory_bench.parity.cases import Case, Settings
from memory_bench.parity.replaying import cut, shifted_loss
from memory_bench.protocol import Segment

from ..emllm import EMLLM, EMLLMConfig, EventState
from ..infllm import InfLLM, InfLLMConfig
from ..parts.block_model import BlockModel, BlockState, Pass


@dataclass(frozen=True, slots=True)
class Call:
    """A call of the official code: its execution blocks here, and the state after it."""

    passes: list[Pass]
    logits: Tensor
    after: Any


@torch.no_grad()
def replay(case: Case) -> dict[str, Tensor]:
    """Every tensor of the case, by the names of ``expected.safetensors``.

    Raises:
        UserError: a setting is unknown or contradicts the others, or it is another model's case.
    """
    settings = case.settings()
    lengths: list[int] = settings.take("segment_lengths")
    new_tokens = int(settings.take("generated_tokens") or 0)
    if sum(lengths) != case.tokens:
        raise UserError(f"Case {case.name}: segment_lengths add up to {sum(lengths)}, recorded are {case.tokens}.")
    if extra := case.weights("memory."):
        raise UserError(f"Case {case.name}: this method has no weights of its own ({', '.join(sorted(extra)[:3])}).")
    if case.model == "emllm":
        return _emllm(case, settings, lengths, new_tokens)
    if case.model == "infllm":
        return _infllm(case, settings, lengths, new_tokens)
    raise UserError(f"Case {case.name}: this replay knows infllm and emllm, not '{case.model}'.")


def _options(case: Case, settings: Settings, config: Any, lengths: Sequence[int]) -> Any:
    """The official config with every option that the case sets."""
    names = [name for name in type(config).__dataclass_fields__ if name in case.info["memory"]]
    options = {name: settings.take(name) for name in names}
    settings.finish()
    return replace(config, segment=max(lengths), **options)


def _infllm(case: Case, settings: Settings, lengths: list[int], new_tokens: int) -> dict[str, Tensor]:
    model = InfLLM(case.backbone(), _options(case, settings, InfLLMConfig.official(), lengths), torch.Generator())
    got, calls = _read(case, model.eval(), lengths, new_tokens)
    for number, call in enumerate(calls):
        store = call.after.store
        got |= {
            f"segment{number}.blocks": store.counts[:1],
            f"segment{number}.sinks": store.host_sinks[:1],
            f"segment{number}.pending": (store.host_read - store.pending_start)[:1],
        }
        for layer in range(model.backbone.layers):
            width, heads = model.config.selected_blocks, model.backbone.heads if model.per_head else 1
            chosen = [_numbers(p.chosen[layer][:, :, 0], width).expand(-1, heads, -1) for p in call.passes]
            shown = torch.stack(chosen, dim=2)  # [rows, heads, execution blocks, selected]
            got[f"segment{number}.layer{layer}.selected_blocks"] = shown if model.per_head else shown[:, 0]
    last: BlockState = calls[-1].after
    for layer in range(model.backbone.layers):
        got[f"final.layer{layer}.block_representatives"] = last.store.representatives[layer]
        got[f"final.layer{layer}.received"] = last.store.received[layer]
    return got


def _emllm(case: Case, settings: Settings, lengths: list[int], new_tokens: int) -> dict[str, Tensor]:
    labelled = bool(settings.take("labels_for_last_call", False))
    config: EMLLMConfig = _options(case, settings, EMLLMConfig.official(), lengths)
    if max(lengths) > config.execution_block:
        raise UserError(f"Case {case.name}: a call has more tokens than an execution block.")
    if len(case.tensors("inputs")["input_ids"]) > 1:
        raise UserError(f"Case {case.name}: the official EM-LLM reads one row.")
    model = EMLLM(case.backbone(), config, torch.Generator())
    got, calls = _read(case, model.eval(), lengths, new_tokens)
    surprisal, ends = [], []
    for number, call in enumerate(calls):
        store = call.after.store
        got[f"segment{number}.block_sizes"] = store.host_sizes[0]
        got[f"segment{number}.pending"] = store.host_read - store.pending_start
        chosen = [_listed(times[0, 0, 0]) for times in call.passes[0].chosen]
        width = max(1, *map(len, chosen))
        for layer, blocks in enumerate(chosen):
            padded = torch.tensor(blocks + [-1] * (width - len(blocks)))
            got[f"segment{number}.layer{layer}.attended_blocks"] = padded
        surprisal.append(call.after.host_surprisal[:, -lengths[number] :])
        if number:  # by now the ends in the call before are known
            new, old = lengths[number], lengths[number - 1]
            ends.append(call.after.host_ends[:, -(new + old) : -new])
    if labelled:  # whatever comes next decides about the ends in the last call
        after = _call(model, calls[-1].after, Segment.full(torch.zeros(1, 1, dtype=torch.long))).after
        ends.append(after.host_ends[:, -lengths[-1] - 1 : -2])
    got["surprisal"] = torch.cat(surprisal, dim=1)[:, 1 : case.tokens - (0 if labelled else lengths[-1] - 1)]
    got["boundaries"] = torch.cat(ends, dim=1).long()
    last: EventState = calls[-1].after
    for layer in range(model.backbone.layers):
        got[f"final.layer{layer}.block_representatives"] = last.store.representatives[layer][0]
        got[f"final.layer{layer}.received"] = last.store.received[layer][0]
        queue = last.host_queue[0, layer]
        got[f"final.layer{layer}.contiguity_buffer"] = queue[queue >= 0]
    return got


def _read(
    case: Case, model: BlockModel[Any], lengths: list[int], new_tokens: int
) -> tuple[dict[str, Tensor], list[Call]]:
    """What both kinds of case record, and the calls."""
    inputs = case.tensors("inputs")
    ids = inputs["input_ids"]
    calls = _calls(model, ids, lengths)
    got: dict[str, Tensor] = {}
    for number, call in enumerate(calls):
        got[f"segment{number}.logits"] = call.logits
        for layer in range(1, model.backbone.layers):
            got[f"segment{number}.hidden{layer}"] = torch.cat([done.inputs[layer] for done in call.passes], dim=1)
    got["loss"] = shifted_loss(torch.cat([call.logits for call in calls], dim=1), ids)
    if "counterfactual.input_ids" in inputs:
        changed = _calls(model, inputs["counterfactual.input_ids"], lengths)
        got["counterfactual.last_segment.logits"] = changed[-1].logits
    if new_tokens:
        state, logits = calls[-1].after, [calls[-1].logits[:, -1:]]
        for _ in range(new_tokens):
            call = _call(model, state, Segment.full(logits[-1].argmax(dim=-1)))
            state = call.after
            logits.append(call.logits)
        got["generate.output_ids"] = torch.cat([step.argmax(dim=-1) for step in logits[:-1]], dim=1)
        got["generate.logits"] = torch.cat(logits[1:], dim=1)
    return got, calls


def _calls(model: BlockModel[Any], ids: Tensor, lengths: list[int]) -> list[Call]:
    state, calls = model.open(len(ids)), list[Call]()
    for segment in cut(ids, torch.ones_like(ids, dtype=torch.bool), lengths):
        calls.append(_call(model, state, segment))
        state = calls[-1].after
    return calls


def _call(model: BlockModel[Any], state: Any, segment: Segment) -> Call:
    passes, after = model.read(state, segment)
    hidden = torch.cat([done.hidden for done in passes], dim=1)
    return Call(passes, model.backbone.head(hidden), after)


def _numbers(times: Tensor, width: int) -> Tensor:
    """``[rows, heads, width]``: numbers of the chosen blocks of `times` ``[rows, heads, blocks]``, then -1."""
    rows = [[_listed(head) for head in row] for row in times]
    return torch.tensor([[[*blocks, *[-1] * (width - len(blocks))] for blocks in row] for row in rows])


def _listed(times: Tensor) -> list[int]:
    """Every block as often as it was attended to, ascending."""
    return [block for block, count in enumerate(times.tolist()) for _ in range(count)]
