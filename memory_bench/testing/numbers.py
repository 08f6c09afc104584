"""Promises about numbers: causality, gradients, operations, decoding, precision."""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from memory_bench.protocol import DecodePlan, MemoryModel, Segment
from memory_bench.testing.measures import (
    CLOSE,
    Build,
    measure_look_ahead,
    measured_flops,
    prepared,
    random_text,
    read,
    require,
    require_close,
    require_same,
    segment_tokens,
    snapshot,
)


@torch.no_grad()
def any_length_can_be_peeked(build: Build) -> None:
    """Pieces shorter and longer than a segment can be looked at, with and without a condition."""
    model, text = prepared(build, segments=3)
    size = segment_tokens(model)
    _, state = read(model, model.open(2), text[:, :size])
    for tokens in (1, size - 1, size + 3, 2 * size):
        ids = text[:, :tokens]
        given = torch.arange(tokens, device=ids.device).expand(2, -1) < tokens // 2
        for condition in (None, given):
            logits = model.step(state, Segment.full(ids, condition), write=False)[0].logits()
            shaped = logits.shape == (2, tokens, model.backbone.vocab) and bool(logits.isfinite().all())
            require(shaped, f"a peek at {tokens} tokens must predict at every one of them")


def look_ahead_is_declared(build: Build) -> None:
    """The measured look-ahead is the declared one, also for a short piece and after a condition."""
    model = build().eval()
    declared, size = model.traits.look_ahead, segment_tokens(model)
    found = measure_look_ahead(model)
    sentence = "predictions depend on {} tokens past the predicting position, but traits.look_ahead says {}"
    require(found == declared, sentence.format(found, declared))
    for given, tokens in ((0, max(2, size // 2)), (size // 2, size)):
        found = measure_look_ahead(model, given=given, tokens=tokens)
        require(found <= declared, sentence.format(found, declared) + f" (piece of {tokens}, {given} given)")


@torch.no_grad()
def what_follows_has_no_influence(build: Build) -> None:
    """Predictions do not change when more text follows in the same piece.

    A model can keep `look_ahead_is_declared` and break this: one that asks how long the piece is, not what it says.
    """
    model, text = prepared(build, segments=4)
    size, ahead = segment_tokens(model), model.traits.look_ahead
    _, state = read(model, model.open(2), text[:, :-size])
    whole = text[:, -size:]
    for given in (0, max(1, size // 4)):
        condition = torch.arange(size, device=text.device).expand(2, -1) < given
        logits = model.step(state, Segment.full(whole, condition if given else None), write=False)[0].logits()
        for tokens in range(max(1, given), size):
            piece = Segment.full(whole[:, :tokens], condition[:, :tokens] if given else None)
            got = model.step(state, piece, write=False)[0].logits()[:, : max(0, tokens - ahead)]
            sentence = f"the {tokens} tokens that begin a piece of {size} must be predicted as if nothing followed them"
            require_close(got, logits[:, : got.shape[1]], sentence)


@torch.no_grad()
def chunks_do_not_matter_where_promised(build: Build) -> None:
    """With ``traits.chunk_invariant``, predictions do not depend on where the text is cut, nor whose row is cut so."""
    model, text = prepared(build)
    if not model.traits.chunk_invariant:
        return
    expected, _ = read(model, model.open(2), text)
    for cut in (1, 3, text.shape[1]):
        got, _ = read(model, model.open(2), text, cut=cut)
        require_close(got, expected, f"pieces of {cut} tokens must give the same predictions (traits.chunk_invariant)")
    rng = torch.Generator().manual_seed(0)
    for _ in range(4):
        got = _read_unevenly(model, text, rng)
        require_close(got, expected, "calls of any length must give the same predictions (traits.chunk_invariant)")


def _read_unevenly(model: MemoryModel[Any], text: Tensor, rng: torch.Generator) -> Tensor:
    """Logits of `text` ``[rows, tokens]`` in calls of drawn lengths, another for every row: none, too, for some."""
    state, read_so_far = model.open(len(text)), [0] * len(text)
    found: list[list[Tensor]] = [[] for _ in text]
    longest = 2 * segment_tokens(model)
    while min(read_so_far) < text.shape[1]:
        drawn = torch.randint(longest + 1, (len(text),), generator=rng).tolist()
        lengths = [min(n, text.shape[1] - done) for n, done in zip(drawn, read_so_far, strict=True)]
        if not any(lengths):
            continue
        ids = text.new_zeros(len(text), max(lengths))
        for row, (n, done) in enumerate(zip(lengths, read_so_far, strict=True)):
            ids[row, :n] = text[row, done : done + n]
        mask = torch.arange(ids.shape[1], device=text.device) < torch.tensor(lengths, device=text.device)[:, None]
        readout, state = model.step(state, Segment(ids, mask))
        for row, n in enumerate(lengths):
            found[row].append(readout.logits()[row, :n])
            read_so_far[row] += n
    return torch.stack([torch.cat(pieces) for pieces in found])


@torch.no_grad()
def absorbing_is_stepping(build: Build) -> None:
    """``absorb`` gives the state that ``step`` gives."""
    model, text = prepared(build)
    size = segment_tokens(model)
    stepped, absorbed = model.open(2, seeds=[1, 2]), model.open(2, seeds=[1, 2])
    for start in range(0, text.shape[1], size):
        segment = Segment.full(text[:, start : start + size])
        _, stepped = model.step(stepped, segment)
        absorbed = model.absorb(absorbed, segment)
        require_same(absorbed, snapshot(stepped), "absorb must give the state that step gives", CLOSE)


def gradients_reach_the_parameters(build: Build) -> None:
    """A training loss over a few segments reaches every trained parameter but those the class names ``unreached``."""
    model = build().train()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():  # at a start like zero a gradient may vanish by accident
            p.add_(0.02 * torch.randn(p.shape, generator=rng).to(p))
    size = segment_tokens(model)
    text = random_text(model, 2, 4 * size + 1)
    state, losses = model.open(2), []
    for start in range(0, 4 * size, size):
        readout, state = model.step(state, Segment.full(text[:, start : start + size]))
        losses.append(-readout.logprobs(text[:, start + 1 : start + size + 1]).mean())
        losses += [] if readout.aux_loss is None else [readout.aux_loss]
    torch.stack(losses).sum().backward()
    unreached: tuple[str, ...] = getattr(type(model), "unreached", ())
    own = model.memory_parameters() if model.frozen_backbone else dict(model.named_parameters())
    trained = {n: p for n, p in own.items() if p.requires_grad}
    missed = {n for n, p in trained.items() if p.grad is None or not bool(p.grad.any())}
    surprising = sorted(n for n in missed if not n.startswith(unreached))
    require(
        not surprising,
        f"a training loss must reach every trained parameter that the class does not name in `unreached`, but no "
        f"gradient reaches {', '.join(surprising[:4])} ({len(surprising)} parameters in all)",
    )
    broken = sorted(n for n, p in trained.items() if p.grad is not None and not bool(p.grad.isfinite().all()))
    require(not broken, f"the gradient of {', '.join(broken[:4])} is not finite")
    stale = sorted(prefix for prefix in unreached if not any(n.startswith(prefix) for n in missed))
    require(not stale, f"gradients reach everything below {', '.join(stale)}, which the class names unreached")


@torch.no_grad()
def weights_are_the_whole_model(build: Build) -> None:
    """Parameters and buffers, saved and loaded, make a second model give the numbers of the first."""
    model, text = prepared(build)
    rng = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.mul_(1 + 0.1 * torch.randn(p.shape, generator=rng).to(p))
    expected, _ = read(model, model.open(2), text)
    other = build().eval()
    read(other, other.open(2), text)  # whatever it might keep of its old weights, it keeps now
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    got, _ = read(other, other.open(2), text)
    require_close(got, expected, "a model with the saved weights must give the same numbers", 0.0)


def _predict(model: MemoryModel[Any], state: Any, segment: Segment) -> Tensor:
    return model.step(state, segment)[0].logits()


@torch.no_grad()
def flops_are_counted(build: Build) -> None:
    """The analytic counts agree with the matrix products: of a writing step nearly, of an `absorb` exactly."""
    model, text = prepared(build, segments=4, rows=1)
    size, state = segment_tokens(model), model.open(1)
    for number in range(4):
        segment, before = Segment.full(text[:, number * size : (number + 1) * size]), number * size
        counted, said = measured_flops(partial(_predict, model, state, segment)), model.flops(size, before)
        off = abs(said - counted) / counted
        require(off <= 0.02, f"flops({size}, {before}) says {said}, but {counted} were counted ({off:.0%} off)")
        counted, said = measured_flops(partial(model.absorb, state, segment)), model.absorb_flops(size, before)
        require(said == counted, f"absorb_flops({size}, {before}) says {said}, but {counted} were counted")
        state = model.absorb(state, segment)


@torch.no_grad()
def decoding_is_rereading(build: Build) -> None:
    """Greedy decoding gives what rereading prompt and continuation for every token gives."""
    model, text = prepared(build)
    size = segment_tokens(model)
    _, state = read(model, model.open(2), text[:, :size])
    before, prompt = snapshot(state), text[:, size : size + max(1, size // 2)]
    wanted: list[Tensor] = []
    for _ in range(size):
        ids = torch.cat([prompt, *wanted], dim=1)
        given = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape) < prompt.shape[1]
        current = state
        for start in range(0, ids.shape[1], size):
            piece = Segment.full(ids[:, start : start + size], given[:, start : start + size])
            readout, current = model.step(current, piece, write=piece.ids.shape[1] == size)
        wanted.append(readout.logits(-1).argmax(dim=-1))
    expected = torch.cat(wanted, dim=1)
    got = model.decode(state, Segment.full(prompt), DecodePlan(new_tokens=size))
    same = bool((got == expected).all())
    require(
        same,
        f"decode must give the greedy continuation that rereading gives, {expected.tolist()}, but gave {got.tolist()}",
    )
    require_same(state, before, "decode must not change the state it was given")
    stop = int(expected[0, 1])
    got = model.decode(state, Segment.full(prompt), DecodePlan(new_tokens=size, stop_ids=(stop,)))
    ended = got[0, int((got[0] == stop).nonzero()[0]) :]
    require(bool((ended == stop).all()), "a row that ended must repeat its last token")


@torch.no_grad()
def bfloat16_works(build: Build) -> None:
    """In bfloat16 the model runs, and its predictions stay near those in float32."""
    model, text = prepared(build)
    exact = read(model, model.open(2), text)[0].log_softmax(dim=-1)
    half = build().eval().to(torch.bfloat16)
    logits, _ = read(half, half.open(2), text)
    require(logits.dtype == torch.bfloat16, f"a bfloat16 model must predict in bfloat16, not {logits.dtype}")
    error = float((logits.float().log_softmax(dim=-1) - exact).abs().mean())
    require(error < 0.25, f"predictions in bfloat16 must be near those in float32 (mean difference {error:.2g} nats)")
