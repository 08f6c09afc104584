"""Answers in the model's own words: greedy continuations on forks, and what the right answer would have cost.

Questions of unequal length are continued together, padded in front. The model is charged for one pass over prompt and
continuation, which is what a decoder with a cache computes; the surprisal of the right answer is the harness's own.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from memory_bench.corpus import Line
from memory_bench.driver.stream import Watcher, control, cut, line_nll, segment_length
from memory_bench.protocol import DecodePlan, MemoryModel, Readout, Segment, State


def generate(
    model: MemoryModel[Any],
    lines: Sequence[Line],
    answers: Sequence[tuple[int, int]],
    state: State,
    before: int,
    *,
    whole: bool = False,
    watcher: Watcher | None = None,
) -> list[tuple[float, list[int]]]:
    """Per line the surprisal (nats) of its right answer, and the ids that the model writes instead.

    The surprisal is NaN where a logit was not finite while the answer was written.

    Args:
        model: in evaluation mode.
        lines: a prompt of at most one segment, and the right answer.
        answers: per line, the tokens of the right answer, and how many to write.
        state: row i belongs to line i; `before` tokens were read before.
        before: see state.
        whole: everything stays in one step, however long.
        watcher: told of the continuation.
    """
    prompts = [_cut(line, len(line) - right) for line, (right, _) in zip(lines, answers, strict=True)]
    prompt, _ = cut(prompts, 0, max(map(len, prompts)), model.backbone.device)
    prompt = prompt.right_aligned()
    tokens = max(count for _, count in answers)
    if watcher is not None:
        watcher.at(1, 1)
    with model.backbone.reusing():
        plan = DecodePlan(tokens, end_of_text(model), fold=not whole)
        with model.backbone.watched(None if watcher is None else watcher.ticked) as finite:
            new = model.decode(state, prompt, plan)
        broken = set() if all(map(bool, finite)) else _broken(model, state, prompt, plan)
        if watcher is not None:
            read = prompt.ids.shape[1]
            real = int(prompt.mask.sum()) + sum(count for _, count in answers)
            watcher.stepped(model, len(lines), read + tokens, before, real)
        with control(watcher, "right answer"):
            right = [line.ids[len(line) - count :] for line, (count, _) in zip(lines, answers, strict=True)]
            longest = prompt.ids.shape[1] + max(map(len, right))
            if whole or longest <= segment_length(model):
                nll = _surprisal(model, state, prompt, right)
                if watcher is not None:
                    watcher.ticked()
            else:
                nll = line_nll(model, lines, state=state, before=before, watcher=watcher)
    nll = [math.nan if row in broken else value for row, value in enumerate(nll)]
    return [(n, ids[:count]) for n, ids, (_, count) in zip(nll, new.tolist(), answers, strict=True)]


def _broken(model: MemoryModel[Any], state: State, prompt: Segment, plan: DecodePlan) -> set[int]:
    """The rows whose logits are not finite when they are continued alone; all where none is."""
    found = set()
    for row in range(len(prompt.ids)):
        index = torch.tensor([row])
        with model.backbone.watched() as finite:
            model.decode(state.rows(index), prompt.rows(index.to(prompt.ids.device)), plan)
        if not all(map(bool, finite)):
            found.add(row)
    return found or set(range(len(prompt.ids)))


def _cut(line: Line, tokens: int) -> Line:
    given = None if line.given is None else line.given[:tokens]
    return Line(line.ids[:tokens], line.scored[:tokens], given, line.seed)


def _surprisal(model: MemoryModel[Any], state: State, prompt: Segment, right: Sequence[Tensor]) -> list[float]:
    """Surprisal of each answer after its prompt, all in one look; the prompt was read by `MemoryModel.decode`."""
    device, tokens = prompt.ids.device, prompt.ids.shape[1]
    ids = pad_sequence(list(right), batch_first=True).to(device)
    real = torch.arange(ids.shape[1], device=device) < torch.tensor([[len(r)] for r in right], device=device)
    given = prompt.mask if prompt.given is None else prompt.given
    both = ((prompt.ids, ids), (prompt.mask, real), (given, torch.zeros_like(real)))
    readout, _ = model.step(state, Segment(*(torch.cat(pair, dim=1) for pair in both)), write=False)
    predicting = Readout(readout.hidden[:, tokens - 1 : -1], readout.head)
    nll = -predicting.logprobs(ids).double().masked_fill(~real, 0.0)
    return [float(value) for value in nll.sum(dim=1)]


def end_of_text(model: MemoryModel[Any]) -> tuple[int, ...]:
    """The ids after which the backbone says nothing more."""
    inner: Any = model.backbone.model
    ids = getattr(inner.config, "eos_token_id", None)
    found = ids if isinstance(ids, list | tuple) else [] if ids is None else [ids]
    return tuple(int(i) for i in found)
