"""What replays of segment-recurrent models share: cutting texts, losses, greedy continuations, gradients.

Knows no model. Everything that is compared comes out of `MemoryModel.step` and `MemoryModel.decode`.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memory_bench.backbone.model import Backbone
from memory_bench.errors import UserError
from memory_bench.parity.cases import Case, load_strictly
from memory_bench.protocol import DecodePlan, MemoryModel, Readout, Segment, State

S = TypeVar("S", bound=State)

PLAIN_NAMES = {
    r"layers\.(\d+)\.self_attn\.([qkv]_proj)\.weight$": r"layer.\1.\2",
    r"^model\.(decoder\.final_layer_)?norm\.weight$": "final_norm",
    r"(embed_positions|wpe)\.weight$": "position_embedding",
}
"""Names of parameters that are the same whatever the family, by what they are in Hugging Face's models."""


class Weights:
    """A case's weights, taken one by one; what is missing, has another shape or is left over is an error."""

    def __init__(self, case: Case) -> None:
        self._left = case.tensors("weights")
        self._case = case.name

    def take(self, name: str, *shape: int) -> Tensor:
        """The weight called `name`, now counted as used.

        Raises:
            UserError: there is none, or its shape is not `shape`.
        """
        found = self._left.pop(name, None)
        if found is None or found.shape != shape:
            have = "is missing" if found is None else f"has shape {list(found.shape)} instead of {list(shape)}"
            raise UserError(f"Case {self._case}: weights do not fit: {name} {have}.")
        return found

    def finish(self) -> None:
        """Raise for weights that were never taken.

        Raises:
            UserError: naming them.
        """
        if self._left:
            raise UserError(f"Case {self._case}: weights do not fit: {', '.join(sorted(self._left)[:3])} not known.")


def segment_lengths(tokens: int, segment: int, alignment: str = "left") -> list[int]:
    """Lengths of the segments of a text: the short one last (``left``), first (``right``), or near-equal (``center``).

    Raises:
        UserError: unknown alignment.
    """
    full, rest = divmod(tokens, segment)
    if alignment == "left":
        return [segment] * full + [rest] * bool(rest)
    if alignment == "right":
        return [rest] * bool(rest) + [segment] * full
    if alignment == "center":
        return [len(part) for part in torch.arange(tokens).chunk(math.ceil(tokens / segment))]
    raise UserError(f"Unknown segment alignment '{alignment}': use left, right or center.")


def cut(ids: Tensor, mask: Tensor, lengths: Sequence[int], *, given: bool = False) -> list[Segment]:
    """Consecutive segments of `ids` ``[rows, tokens]``; with `given`, every token is handed over as a condition."""
    ends = list(accumulate(lengths, initial=0))
    parts = [(ids[:, start:end], mask[:, start:end]) for start, end in pairwise(ends)]
    return [Segment(i, m, torch.ones_like(m) if given else None) for i, m in parts]


def attention_mask(inputs: Mapping[str, Tensor]) -> Tensor:
    """``[rows, tokens]`` bool: the recorded mask, or all real."""
    ids = inputs["input_ids"]
    return inputs.get("attention_mask", torch.ones_like(ids)).bool()


def stream(
    model: MemoryModel[S], segments: Sequence[Segment], detach_every: int | None = None
) -> Iterator[tuple[int, Segment, S, Readout, S]]:
    """Read segments into a fresh state: (index, segment, state before, readout, state after) of each."""
    state = model.open(segments[0].ids.shape[0])
    for index, segment in enumerate(segments):
        readout, after = model.step(state, segment)
        yield index, segment, state, readout, after
        state = after.detach() if detach_every and (index + 1) % detach_every == 0 else after


Look = Callable[[int, Segment, S, S], Mapping[str, Tensor]]
"""What a case records of a step beside its logits, from (index, segment, state before, state after), named as there."""
Loss = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
"""The case's loss of logits ``[rows, tokens, vocab]``, given its inputs."""


def replay_segments(
    case: Case,
    model: MemoryModel[S],
    lengths: Sequence[int],
    *,
    look: Look[S],
    loss: Loss,
    new_tokens: int | None,
    prompt_lengths: Sequence[int] | None = None,
    detach_every: int | None = None,
) -> dict[str, Tensor]:
    """Every tensor of the case of a model that is read segment by segment, by the names of ``expected.safetensors``.

    Logits and what `look` sees of each step; with recorded labels loss, perplexity and gradients; with a changed first
    segment the last segment's logits; with `new_tokens` a greedy continuation.

    Args:
        case: to replay; its memory weights are loaded into `model`, strictly.
        model: with the case's settings.
        lengths: of the segments.
        look: at every step.
        loss: of the logits.
        new_tokens: to generate; None or 0: none.
        prompt_lengths: of the segments of a text that is continued, where they are others.
        detach_every: no gradient goes through the state after so many segments; None: through all.

    Raises:
        UserError: the weights do not fit.
    """
    load_strictly(model.eval(), case.weights("memory."), case.name)
    inputs = case.tensors("inputs")
    ids, mask = inputs["input_ids"], attention_mask(inputs)
    got: dict[str, Tensor] = {}
    logits = []
    for s, segment, before, readout, after in stream(model, cut(ids, mask, lengths), detach_every):
        got |= {f"segment.{s}.{name}": tensor for name, tensor in look(s, segment, before, after).items()}
        logits.append(readout.logits())
    got["logits"] = torch.cat(logits, dim=1)
    if "labels" in inputs:
        got["loss"] = loss(got["logits"], inputs)
        got["perplexity"] = got["loss"].exp()
        got |= gradients(got["loss"], model)
    changed = inputs.get("input_ids_first_segment_changed")
    if changed is not None:
        got["logits_last_segment_first_segment_changed"] = last_logits(model, cut(changed, mask, lengths))
    if new_tokens:
        got["generated_ids"] = greedy(model, cut(ids, mask, prompt_lengths or lengths, given=True), new_tokens)
    return got


def label_loss(logits: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """`shifted_loss` over a case's labels, those of its mask where it has one."""
    return shifted_loss(logits, inputs["labels"], inputs.get("labels_mask"))


def check_never_detached(case: Case, bptt: Any) -> None:
    """The official code of a case never cuts gradients between segments; the case may say so.

    Raises:
        UserError: it says something else.
    """
    if not str(bptt).startswith("full"):
        raise UserError(f"Case {case.name}: bptt '{bptt}' is not known; the official code never detaches.")


def last_logits(model: MemoryModel[Any], segments: Sequence[Segment]) -> Tensor:
    """Logits ``[rows, tokens, vocab]`` of the last segment after reading those before it."""
    *_, last = stream(model, segments)
    return last[3].logits()


def tail_loss(logits: Tensor, labels: Tensor, tail: int) -> Tensor:
    """Mean cross entropy of the last `tail` labels (-100 is left out), each predicted one position earlier.

    The first label has no prediction, so at most ``tokens - 1`` are scored.
    """
    tail = min(tail, labels.shape[1] - 1)
    return _cross_entropy(logits[:, -(tail + 1) : -1], labels[:, -tail:])


def shifted_loss(logits: Tensor, labels: Tensor, predicting: Tensor | None = None) -> Tensor:
    """Mean cross entropy of every label but the first (-100 is left out), each predicted one position earlier.

    Args:
        logits: ``[rows, tokens, vocab]``.
        labels: ``[rows, tokens]``.
        predicting: ``[rows, tokens]``, true at the *predicting* positions to keep; None: all.
    """
    targets = labels[:, 1:]
    if predicting is not None:
        targets = targets.masked_fill(~predicting[:, :-1].bool(), -100)
    return _cross_entropy(logits[:, :-1], targets)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)


@torch.no_grad()
def greedy(model: MemoryModel[Any], prompt: Sequence[Segment], new_tokens: int) -> Tensor:
    """Greedy continuation ``[rows, new_tokens]``: all segments but the last are written, nothing new is folded in.

    A padded last segment is continued row by row without its padding (a prompt of `MemoryModel.decode` has none).
    """
    *history, last = prompt
    state = model.open(last.ids.shape[0])
    for segment in history:
        state = model.absorb(state, segment)
    plan = DecodePlan(new_tokens, fold=False)
    if bool(last.mask.all()):
        return model.decode(state, last, plan)
    rows = torch.arange(last.ids.shape[0])[:, None]
    alone = [model.decode(state.rows(row), Segment.full(last.ids[row][last.mask[row]][None]), plan) for row in rows]
    return torch.cat(alone)


def gradients(loss: Tensor, model: MemoryModel[Any]) -> dict[str, Tensor]:
    """Derivatives of the loss: ``grad.memory.<name>``, ``grad.backbone.<name>``, ``grad.backbone.input_embedding``.

    Some of the backbone's have a name of no family, too: ``layer.0.q_proj``, ``final_norm``, ``position_embedding``.
    Parameters the loss does not depend on are left out.
    """
    inner: Any = model.backbone.model
    named: dict[str, nn.Parameter] = {f"memory.{name}": p for name, p in model.memory_parameters().items()}
    named |= {f"backbone.{name}": p for name, p in inner.named_parameters()}
    named["backbone.input_embedding"] = inner.get_input_embeddings().weight
    for pattern, short in PLAIN_NAMES.items():
        named |= {
            f"backbone.{match.expand(short)}": p
            for name, p in inner.named_parameters()
            if (match := re.search(pattern, name))
        }
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return {f"grad.{name}": g for name, g in zip(named, found, strict=True) if g is not None}


@contextmanager
def layer_inputs(backbone: Backbone) -> Iterator[dict[int, Tensor]]:
    """Inside, what every layer of a Llama was given last, ``[rows, tokens, width]`` by number."""
    inner: Any = backbone.model
    seen: dict[int, Tensor] = {}

    def noting(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: seen.update({layer: inputs[0]})

    hooks = [
        block.input_layernorm.register_forward_pre_hook(noting(layer)) for layer, block in enumerate(inner.model.layers)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def check_described(case: Case, name: str, recorded: Any, ours: Any) -> None:
    """A setting that only describes the run must agree with what is run; None says nothing.

    Raises:
        UserError: it does not.
    """
    if recorded is not None and recorded != ours:
        raise UserError(f"Case {case.name}: {name} is recorded as {recorded}, but the other settings give {ours}.")
