"""Promises about types and shapes: states, readouts, counts, continuations. Cheap, so before any number is compared."""

import dataclasses
from collections.abc import Mapping, Sequence, Set
from functools import partial
from typing import Any

import torch
from torch import Tensor

from memory_bench.protocol import DecodePlan, MemoryModel, Readout, Segment, State
from memory_bench.testing.declared import built, home_of
from memory_bench.testing.measures import Build, random_text, require, segment_tokens, snapshot
from memory_bench.testing.sentences import attempt, describe, require_signature, whole

OPEN, STEP = "open(rows, *, seeds=None)", "step(state, segment, *, write=True)"


@torch.no_grad()
def states_have_rows(build: Build) -> None:
    """``open`` gives a `State`, a frozen dataclass of tensors whose first axis is the row."""
    model = built(build).eval()
    name = type(model).__name__
    require_signature(model.open, OPEN, 2)
    require_signature(model.open, OPEN, 2, seeds=[1, 2])
    for rows, seeds in ((2, None), (1, [7]), (3, [1, 2, 3])):
        given = f"{name}.open({rows}{'' if seeds is None else f', seeds={seeds}'})"
        state = attempt(partial(model.open, rows, seeds=seeds), f"{given} must return a State", home_of(model))
        check_state(model, state, rows, given)


def check_state(model: MemoryModel[Any], state: Any, rows: int, given: str) -> None:
    """What came from `given` is a state of `rows` rows."""
    require(
        isinstance(state, State),
        f"{given} must return a State (a frozen dataclass that subclasses memory_bench.protocol.State), but gave "
        f"{describe(state)}",
    )
    kind = type(state)
    frozen = getattr(kind.__dict__.get("__dataclass_params__"), "frozen", False)
    require(frozen, f"{kind.__name__}, the state that {given} gave, must be a frozen dataclass: states are values")
    for path, value in _parts(state, kind.__name__):
        require(
            not _hides(value),
            f"{path} is {describe(value)} with tensors or a generator in it: a state's tensors must be in its fields, "
            "tuples, lists and dataclasses, where their rows are found",
        )
    for field, tensor in state.tensors():
        path = f"{kind.__name__}.{field}"
        require(
            tensor.dim() > 0 and tensor.shape[0] == rows,
            f"{path} must have the row as its first axis: [{rows}, …] from {given}, but it is {describe(tensor)}",
        )
        require(
            not tensor.is_floating_point() or bool(tensor.isfinite().all()),
            f"{path} from {given} must be finite (what is empty is said by a mask), but it has NaN or infinity",
        )
        expected = torch.device("cpu") if ".host_" in f".{field}" else model.backbone.device
        require(
            tensor.device.type == expected.type,
            f"{path} from {given} must be on {expected.type}, but it is {describe(tensor)}",
        )


def _parts(value: Any, path: str) -> list[tuple[str, Any]]:
    """Everything in a state that is no tensor and no container it may have."""
    if isinstance(value, tuple | list):
        return [part for i, item in enumerate(value) for part in _parts(item, f"{path}.{i}")]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [p for f in dataclasses.fields(value) for p in _parts(getattr(value, f.name), f"{path}.{f.name}")]
    return [] if isinstance(value, Tensor) else [(path, value)]


def _hides(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(isinstance(item, Tensor) or _hides(item) for item in value.values())
    if isinstance(value, Set | Sequence) and not isinstance(value, str | bytes):
        return any(isinstance(item, Tensor) or _hides(item) for item in value)
    return isinstance(value, torch.Generator | torch.nn.Module)


@torch.no_grad()
def steps_have_shapes(build: Build) -> None:
    """``step`` gives a `Readout` of every token of every row and a `State`, of the backbone's type and device."""
    model = built(build).eval()
    name, size = type(model).__name__, segment_tokens(model)
    require_signature(model.step, STEP, None, None)
    require_signature(model.step, STEP, None, None, write=False)
    require_signature(model.absorb, "absorb(state, segment)", None, None)
    for rows in (2, 1):
        state = model.open(rows)
        check_state(model, state, rows, f"{name}.open({rows})")
        text = random_text(model, rows, 3 * size)
        for start, tokens in ((0, size), (size, size), (2 * size, max(1, size // 2))):
            segment = Segment.full(text[:, start : start + tokens])
            before, given = snapshot(state), f"{name}.step of {rows} rows and {tokens} tokens"
            peeked = _stepped(model, state, segment, f"{given} (write=False)", write=False)
            _check_kept(model, peeked, state, before, f"{given} with write=False")
            state = _stepped(model, state, segment, given, write=True)
            _check_alike(state, before, given)
    absorbed = attempt(lambda: model.absorb(state, segment), f"{name}.absorb must return a State", home_of(model))
    check_state(model, absorbed, 1, f"{name}.absorb(state, segment)")


def _stepped(model: MemoryModel[Any], state: Any, segment: Segment, given: str, *, write: bool) -> Any:
    """The state after a step whose readout is what it should be."""
    promise = f"{given} must return (Readout, State)"
    found = attempt(lambda: model.step(state, segment, write=write), promise, home_of(model))
    pair = isinstance(found, tuple) and len(found) == 2
    kinds = f" ({', '.join(describe(item) for item in found)})" if isinstance(found, tuple) else ""
    require(pair, f"{promise}, two things, but it gave {describe(found)}{kinds}")
    readout, after = found
    require(isinstance(readout, Readout), f"{promise}, but it gave {describe(found)}{kinds}")
    check_readout(model, readout, segment, given)
    check_state(model, after, len(segment.ids), given)
    return after


def check_readout(model: MemoryModel[Any], readout: Readout, segment: Segment, given: str) -> None:
    """A readout predicts after every token of a segment, padding included, in the backbone's type."""
    rows, tokens = segment.ids.shape
    backbone, hidden = model.backbone, readout.hidden
    wanted = f"Readout.hidden of {given} must be [rows, tokens, width] = [{rows}, {tokens}, {backbone.width}]"
    shaped = isinstance(hidden, Tensor) and hidden.dim() == 3 and hidden.shape[:2] == (rows, tokens)
    require(shaped, f"{wanted}, one position for each token of the segment, but it is {describe(hidden)}")
    alike = hidden.dtype == backbone.dtype and hidden.device.type == backbone.device.type
    require(
        alike,
        f"{wanted} of the backbone's type and device ({backbone.dtype}, {backbone.device.type}), but it is "
        f"{describe(hidden)}",
    )
    require(bool(hidden.isfinite().all()), f"{wanted} and finite, but it has NaN or infinity")
    require(
        callable(readout.head),
        f"Readout.head of {given} must map hidden states to logits, not {describe(readout.head)}",
    )
    logits_wanted = f"Readout.head of {given} must map hidden [rows, tokens, width] to logits [rows, tokens, vocab]"
    logits = attempt(lambda: readout.head(hidden), f"{logits_wanted} (hidden is {describe(hidden)})", home_of(model))
    shaped = isinstance(logits, Tensor) and logits.shape == (rows, tokens, backbone.vocab)
    require(shaped, f"{logits_wanted} = [{rows}, {tokens}, {backbone.vocab}], but it gave {describe(logits)}")
    require(not bool(logits.isnan().any()), f"logits of {given} must be numbers, but there are NaN among them")
    loss = readout.aux_loss
    scalar = isinstance(loss, Tensor) and loss.dim() == 0 and loss.is_floating_point()
    require(
        loss is None or scalar, f"Readout.aux_loss of {given} must be None or a scalar tensor, not {describe(loss)}"
    )


def _check_kept(model: MemoryModel[Any], peeked: Any, state: Any, before: list[tuple[str, Tensor]], given: str) -> None:
    for what, found in (
        ("return the state as it was", peeked.tensors()),
        ("leave the state as it was", state.tensors()),
    ):
        same = [n for n, _ in found] == [n for n, _ in before]
        for (name, ours), (_, theirs) in zip(found, before, strict=False):
            require(
                ours.shape == theirs.shape and torch.equal(ours, theirs),
                f"{given} (a peek) must {what}, but state.{name} changed",
            )
        require(same, f"{given} (a peek) must {what}, but it has other tensors")


def _check_alike(state: Any, before: list[tuple[str, Tensor]], given: str) -> None:
    """A state keeps the types of its tensors from step to step."""
    kinds = {name: tensor.dtype for name, tensor in before}
    for name, tensor in state.tensors():
        was = kinds.get(name, tensor.dtype)
        require(tensor.dtype == was, f"{given} must keep the type of state.{name}, {was}, but made it {tensor.dtype}")


def counts_are_whole_numbers(build: Build) -> None:
    """``flops`` and its kin take (tokens, remembered) and give whole numbers from 0, parts no more than the whole."""
    model = built(build)
    name, size, home = type(model).__name__, segment_tokens(model), home_of(model)
    for method in ("flops", "absorb_flops", "detached_flops"):
        function, shape = getattr(model, method), f"{method}(tokens, remembered)"
        require_signature(function, shape, 1, 0)
        for tokens, remembered in ((size, 0), (1, 0), (size, 10 * size), (1, 3)):
            given = f"{name}.{method}({tokens}, {remembered})"
            promise = f"{given} must be a whole number of operations from 0"
            said = attempt(partial(function, tokens, remembered), promise, home)
            require(whole(said) and said >= 0, f"{promise} (multiply-add = 2), but it is {describe(said)}")
            of_all = model.flops(tokens, remembered)
            require(said <= of_all, f"{given} must not be more than flops, {of_all}, but it is {said}")
    for distance in (0, size):
        share: Any = attempt(
            partial(model.expected_retention, distance), f"{name}.expected_retention(tokens) must be a share", home
        )
        fits = share is None or (isinstance(share, int | float) and not isinstance(share, bool) and 0 <= share <= 1)
        require(
            fits, f"{name}.expected_retention({distance}) must be None or a share from 0 to 1, not {describe(share)}"
        )


@torch.no_grad()
def continuations_have_shapes(build: Build) -> None:
    """``decode`` gives the new tokens alone, ``[rows, new_tokens]`` ids of the vocabulary."""
    model = built(build).eval()
    name, size = type(model).__name__, segment_tokens(model)
    text = random_text(model, 2, size)
    require_signature(model.decode, "decode(state, prompt, plan)", None, None, None)
    prompt = Segment.full(text[:, : max(1, size // 2)])
    promise = f"{name}.decode of 2 rows must give the new tokens alone, [rows, new_tokens] = [2, 3] int64"
    state = model.open(2)
    found: Any = attempt(lambda: model.decode(state, prompt, DecodePlan(new_tokens=3)), promise, home_of(model))
    fits = isinstance(found, Tensor) and found.shape == (2, 3) and found.dtype == torch.int64
    require(fits, f"{promise}, but it gave {describe(found)}")
    inside = bool(((found >= 0) & (found < model.backbone.vocab)).all())
    require(inside, f"{promise}, ids of the vocabulary of {model.backbone.vocab}, but others are among them")
