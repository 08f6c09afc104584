"""Replays reference cases of the official AutoCompressors (mixin, trainer, ``generate``) with `AutoCompressor`."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from memory_bench.errors import UserError
from memory_bench.parity.cases import Case, load_strictly
from memory_bench.parity.replaying import (
    attention_mask,
    check_described,
    cut,
    gradients,
    label_loss,
    replay_segments,
    segment_lengths,
    shifted_loss,
)
from memory_bench.protocol import DecodePlan, Segment

from ..autocompressor import AutoCompressor, AutoCompressorConfig, AutoCompressorState

CHANGED = "logits_last_segment_first_segment_changed"


def replay(case: Case) -> dict[str, Tensor]:
    """Every tensor of the case, by the names of ``expected.safetensors``.

    Raises:
        UserError: a setting is unknown or contradicts the others, or the weights do not fit.
    """
    settings = case.settings()
    backbone = case.backbone()
    lengths = settings.take("segment_lengths")
    slices, each = settings.take("training_substeps"), settings.take("segments_per_substep")
    settings.take("random_seed_of_lengths")  # how they were drawn; the lengths themselves are recorded
    settings.take("write_after_last_segment")  # whether the last summaries are computed: nothing before sees them
    _check_gradients(case, slices, settings.take("stop_gradient"))
    positions = "none" if backbone.max_positions is not None else "rotary, counted"
    check_described(case, "summary_positions", settings.take("summary_positions"), positions)
    fold, new_tokens = settings.take("fold_generated_text_every"), settings.take("max_new_tokens")
    config = replace(
        AutoCompressorConfig.official(),
        summary_tokens=settings.take("summary_tokens"),
        accumulate=settings.take("accumulate_summaries"),
    )
    settings.finish()
    if slices:
        lengths = lengths if isinstance(lengths[0], list) else [lengths] * slices  # else all alike
        if len(lengths) != slices or any(len(part) != each for part in lengths):
            raise UserError(f"Case {case.name}: segment_lengths must be {slices} lists of {each} lengths.")
        return _replay_slices(case, _model(backbone, config, max(max(part) for part in lengths)), lengths)
    lengths = segment_lengths(case.tokens, lengths) if isinstance(lengths, int) else lengths
    if "prompt_ids" in case.tensors("inputs"):
        return _replay_generation(case, _model(backbone, config, fold or max(lengths)), lengths, fold, new_tokens or 0)
    model = _model(backbone, config, max(lengths))
    got = replay_segments(case, model, lengths, look=_look(model), loss=label_loss, new_tokens=new_tokens)
    mask = attention_mask(case.tensors("inputs"))
    got["logits"] = got["logits"] * mask[..., None]
    if CHANGED in got:
        got[CHANGED] = got[CHANGED] * mask[:, -lengths[-1] :, None]
    return got


def _model(backbone: Any, config: AutoCompressorConfig, segment: int) -> AutoCompressor:
    return AutoCompressor(backbone, replace(config, segment=segment), torch.Generator())


def _check_gradients(case: Case, slices: int | None, stop: Any) -> None:
    """Nothing is detached inside one forward pass; the trainer detaches between its slices."""
    wanted = "between substeps" if slices else "none"
    if stop is not None and wanted not in str(stop):
        raise UserError(f"Case {case.name}: stop_gradient is recorded as {stop}, but the other settings give {wanted}.")


def _look(model: AutoCompressor) -> Any:
    """What is recorded of a step: the summaries that were read, and those that were written."""

    def look(
        index: int, segment: Segment, before: AutoCompressorState, after: AutoCompressorState
    ) -> dict[str, Tensor]:
        new = after.summaries.shape[1] - model.config.summary_tokens
        return {"summaries_read": before.summaries, "summaries_written": after.summaries[:, new:]}

    return look


def _replay_slices(case: Case, model: AutoCompressor, lengths: list[list[int]]) -> dict[str, Tensor]:
    """One step of the official trainer: a loss for every slice of the text, whose gradients add.

    The first token of a slice is not scored; summaries go from slice to slice without their history.
    """
    load_strictly(model.eval(), case.weights("memory."), case.name)
    total = sum(map(sum, lengths))  # of a longer text the end is used
    inputs = {name: tensor[:, -total:] for name, tensor in case.tensors("inputs").items()}
    ids, mask = inputs["input_ids"], attention_mask(inputs)
    got = _slices(model, ids, mask, lengths)
    ends = torch.linspace(0, ids.shape[1], len(lengths) + 1, dtype=torch.long).tolist()
    losses = []
    for number, (start, end) in enumerate(pairwise(ends)):
        logits = got[f"substep.{number}.logits"]
        losses.append(shifted_loss(logits, inputs["labels"][:, start:end]))
        got |= {f"substep.{number}.loss": losses[-1], f"substep.{number}.logits": logits * mask[:, start:end, None]}
    loss = torch.stack(losses).sum()
    got |= {"reported_loss": loss / len(losses), **gradients(loss, model)}
    changed = inputs.get("input_ids_first_segment_changed")
    if changed is not None:
        last = lengths[-1][-1]
        logits = _slices(model, changed, mask, lengths)[f"substep.{len(lengths) - 1}.logits"]
        got[CHANGED] = logits[:, -last:] * mask[:, -last:, None]
    return got


def _slices(model: AutoCompressor, ids: Tensor, mask: Tensor, lengths: list[list[int]]) -> dict[str, Tensor]:
    """Logits of every slice, and the summaries of every segment, counted over the whole text."""
    got: dict[str, Tensor] = {}
    state, index, look = model.open(len(ids)), 0, _look(model)
    ends = torch.linspace(0, ids.shape[1], len(lengths) + 1, dtype=torch.long).tolist()
    for number, (start, end) in enumerate(pairwise(ends)):
        logits = []
        for segment in cut(ids[:, start:end], mask[:, start:end], lengths[number]):
            readout, after = model.step(state, segment)
            got |= {f"segment.{index}.{name}": t for name, t in look(index, segment, state, after).items()}
            logits.append(readout.logits())
            state, index = after, index + 1
        got[f"substep.{number}.logits"] = torch.cat(logits, dim=1)
        state = state.detach()
    return got


@torch.no_grad()
def _replay_generation(
    case: Case, model: AutoCompressor, lengths: list[int], fold: int | None, new_tokens: int
) -> dict[str, Tensor]:
    """A text is summarised, its last segment too; a prompt is continued after the summaries."""
    load_strictly(model.eval(), case.weights("memory."), case.name)
    inputs = case.tensors("inputs")
    state = model.open(len(inputs["input_ids"]))
    for segment in cut(inputs["input_ids"], attention_mask(inputs), lengths):
        state = model.absorb(state, segment)
    prompt = Segment.full(inputs["prompt_ids"])
    # Officially a segment is folded when it is exactly so long, which a longer prompt never is.
    plan = DecodePlan(new_tokens, fold=fold is not None and prompt.ids.shape[1] <= fold)
    ids = model.decode(state, prompt, plan)
    return {
        "context_summaries": state.summaries,
        "prompt_logits": model.step(state, prompt, write=False)[0].logits(),
        "generated_ids": ids,
        "generated_ids_without_summaries": model.decode(model.open(len(ids)), prompt, plan),
        "step_logits": _step_logits(model, state, prompt.ids, ids, plan.fold),
    }


def _step_logits(model: AutoCompressor, state: AutoCompressorState, piece: Tensor, ids: Tensor, fold: bool) -> Tensor:
    """``[rows, new_tokens, vocab]``: what every generated token was taken from, reading everything again each time."""
    found = []
    for token in ids.split(1, dim=1):
        full = fold and piece.shape[1] >= model.config.segment
        readout, after = model.step(state, Segment.full(piece), write=full)
        found.append(readout.logits(-1))
        state, piece = (after, piece[:, :0]) if full else (state, piece)
        piece = torch.cat([piece, token], dim=1)
    return torch.cat(found, dim=1)
