"""The driver: what it scores, on what state, and what it leaves behind."""

import math
import subprocess
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from memory_bench import plugins
from memory_bench.backbone.model import Backbone
from memory_bench.budget import Budget
from memory_bench.corpus import Line
from memory_bench.driver.stream import Piece, Watcher, line_nll, walk
from memory_bench.protocol import MemoryModel
from memory_bench.testing import card_of, tiny_backbone
from memory_bench.zoo.pretrain import Window, WindowConfig

BOUNDED = ("hmt", "rmt", "mplus", "sliding-window")


def build(name: str, backbone: Backbone | None = None, **options: Any) -> MemoryModel[Any]:
    backbone = backbone or tiny_backbone("llama")
    cls = plugins.load("models", name)
    config = plugins.configure(name, cls.fit(card_of(backbone), Budget("test")), options)
    model: MemoryModel[Any] = cls(backbone, config, torch.Generator().manual_seed(0))
    return model.eval()


def line(tokens: int, seed: int = 0) -> Line:
    ids = torch.randint(64, (tokens,), generator=torch.Generator().manual_seed(100 + seed))
    scored = torch.ones(tokens, dtype=torch.bool)
    scored[0] = False
    return Line(ids, scored, seed=seed)


def by_token(pieces: Sequence[Piece], lines: Sequence[Line]) -> list[Tensor]:
    """Surprisal of every token of every line; NaN where nothing was scored."""
    found = [torch.full((len(x),), math.nan) for x in lines]
    for piece in pieces:
        for row, at in enumerate(piece.lines):
            for column in piece.scored[row].nonzero()[:, 0].tolist():
                assert found[at][piece.start + column].isnan(), "a token was scored twice"
                found[at][piece.start + column] = piece.nll[row, column]
    return found


@torch.no_grad()
def surprisal(model: MemoryModel[Any], lines: Sequence[Line], **options: Any) -> list[Tensor]:
    return by_token(list(walk(model, lines, **options)), lines)


def one_shot(backbone: Backbone, ids: Tensor) -> Tensor:
    """Surprisal of all tokens but the first by Hugging Face's own forward pass."""
    inner: Any = backbone.model
    with torch.no_grad():
        logprobs = inner(ids[None]).logits[0].log_softmax(-1)
    return -logprobs[:-1].gather(1, ids[1:, None])[:, 0]


@pytest.mark.parametrize("length", [1, 7, 16, 100])
def test_every_token_but_the_first_is_scored_once(length: int) -> None:
    lines = [line(n, n) for n in (33, 16, 7, 1, 48)]
    for found in surprisal(build("sliding-window"), lines, length=length):
        assert found[0].isnan()
        assert not found[1:].isnan().any()


@pytest.mark.parametrize("length", [1, 7, 16, 100])
def test_streamed_full_context_is_the_one_shot_pass(length: int) -> None:
    model, text = build("full-context"), line(50)
    (found,) = surprisal(model, [text], length=length)
    torch.testing.assert_close(found[1:], one_shot(model.backbone, text.ids), atol=2e-5, rtol=1e-5)


def test_only_what_is_asked_for_is_scored() -> None:
    text = line(30)
    text.scored[5:17] = False
    (found,) = surprisal(build("rmt"), [text])
    assert found.isnan().nonzero()[:, 0].tolist() == [0, *range(5, 17)]


@pytest.mark.parametrize("name", ["truncation", "xl-cache", "full-context", "memoryllm", *BOUNDED])
def test_rows_of_a_ragged_batch_are_the_rows_alone(name: str) -> None:
    model, lines = build(name), [line(n, n) for n in (5, 40, 8, 23, 16)]
    for alone, found in zip(lines, surprisal(model, lines), strict=True):
        torch.testing.assert_close(found, surprisal(model, [alone])[0], equal_nan=True, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["rmt", "memoryllm", "mplus"])
def test_a_walk_continues_from_the_state_it_is_given(name: str) -> None:
    model, texts = build(name), [line(20, 1), line(40, 2)]
    with torch.no_grad():
        state = model.open(2, seeds=[1, 2])
        for start in (0, 8):
            state = model.absorb(state, _segment(torch.stack([text.ids[start : start + 8] for text in texts])))
    rests = [Line(text.ids[16:], text.scored[16:]) for text in texts]
    found = surprisal(model, rests, state=state)  # rows are sorted by length inside: the state must follow
    for text, rest in zip(texts, found, strict=True):
        torch.testing.assert_close(rest[1:], surprisal(model, [text])[0][17:], atol=5e-5, rtol=1e-4)


def _segment(ids: Tensor) -> Any:
    from memory_bench.protocol import Segment

    return Segment.full(ids)


def test_a_segments_first_token_is_predicted_across_the_border() -> None:
    """By the last position of the segment before, in the window that position had."""
    backbone = tiny_backbone("llama")
    text = line(24)
    (found,) = surprisal(Window(backbone, WindowConfig(8)), [text])
    for border in (8, 16):
        expected = one_shot(backbone, text.ids[border - 8 : border + 1])[-1]
        assert found[border] == pytest.approx(float(expected), abs=2e-5)


def test_wiped_reads_every_segment_from_a_fresh_state() -> None:
    model, text = build("rmt"), line(32)
    wiped = surprisal(model, [text], memory="wiped")[0]
    own = surprisal(model, [text])[0]
    torch.testing.assert_close(wiped[1:8], own[1:8])
    assert not torch.allclose(wiped[9:], own[9:], atol=1e-3)
    for start in (8, 16, 24):
        part = Line(text.ids[start : start + 8], text.scored[start : start + 8])
        torch.testing.assert_close(wiped[start + 1 : start + 8], surprisal(model, [part])[0][1:], atol=2e-5, rtol=1e-5)


def test_foreign_reads_the_next_rows_state() -> None:
    model, lines = build("rmt"), [line(32, 1), line(32, 2), line(20, 3)]
    found = surprisal(model, lines, memory="foreign")
    with torch.no_grad():
        state = model.open(1)
        for start in (0, 8, 16):
            state = model.absorb(state, _segment(lines[1].ids[None, start : start + 8]))
        (expected,) = surprisal(model, [Line(lines[0].ids[24:], lines[0].scored[24:])], state=state)
    torch.testing.assert_close(found[0][25:], expected[1:], atol=2e-5, rtol=1e-5)
    own = surprisal(model, lines)
    assert all(not torch.allclose(a[9:], b[9:], atol=1e-3) for a, b in zip(found, own, strict=True))


def test_foreign_scores_nothing_without_another_row() -> None:
    found = surprisal(build("rmt"), [line(32, 1), line(12, 2)], memory="foreign")
    assert not found[0][1:16].isnan().any()
    assert found[0][16:].isnan().all()


def gradients(model: MemoryModel[Any], lines: Sequence[Line], **options: Any) -> dict[str, Tensor]:
    loss = sum((piece.nll.sum() for piece in walk(model, lines, **options)), torch.zeros(()))
    names, parameters = zip(*((n, p) for n, p in model.named_parameters()), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: g for n, g in zip(names, found, strict=True) if g is not None}


@pytest.mark.parametrize("name", ["rmt", "hmt", "memoryllm", "mplus"])
def test_recomputing_gives_the_same_gradients(name: str) -> None:
    lines = [line(40, 1), line(29, 2)]
    kept, again = (gradients(build(name).train(), lines, recompute=flag) for flag in (False, True))
    assert kept.keys() == again.keys()
    for parameter, gradient in kept.items():
        torch.testing.assert_close(again[parameter], gradient, atol=1e-5, rtol=1e-4)


def test_detaching_cuts_the_gradient_between_segments() -> None:
    model, lines = build("rmt"), [line(40)]
    whole = gradients(model, lines)["initial_memory"]
    first = gradients(model, [Line(lines[0].ids[:9], lines[0].scored[:9])])["initial_memory"]
    cut = gradients(model, lines, detach_every=1)["initial_memory"]
    torch.testing.assert_close(cut, gradients(model, [line(8)])["initial_memory"])
    assert not torch.allclose(whole, cut)
    assert not torch.allclose(first, cut), "the border's prediction belongs to the segment after it"
    torch.testing.assert_close(gradients(model, lines, detach_every=100)["initial_memory"], whole)


def test_the_watcher_is_told_of_real_tokens_and_places() -> None:
    class Told(Watcher):
        def __init__(self) -> None:
            self.steps: list[tuple[int, int, int, int]] = []

        def stepped(
            self, model: MemoryModel[Any], rows: int, tokens: int, before: int, real: int, *, absorbed: bool = False
        ) -> None:
            self.steps.append((rows, tokens, before, real))

    told = Told()
    with torch.no_grad():
        line_nll(build("rmt"), [line(20), line(11)], before=16, watcher=told)
    assert told.steps == [(2, 8, 16, 16), (2, 8, 24, 11), (1, 4, 32, 4)]


PEAK = """
import sys, torch
torch.set_num_threads(1)
from memory_bench import plugins
from memory_bench.budget import Budget
from memory_bench.corpus import Line
from memory_bench.driver.meter import peak_bytes
from memory_bench.driver.stream import line_nll
from memory_bench.testing import card_of, tiny_backbone

backbone = tiny_backbone("llama", hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                         num_key_value_heads=1)
for name in sys.argv[1:]:
    cls = plugins.load("models", name)
    model = cls(backbone, cls.fit(card_of(backbone, window=256), Budget("test")), torch.Generator().manual_seed(0))
    for tokens in (4096, 65536):
        ids = torch.randint(64, (tokens,))
        with torch.no_grad():
            line_nll(model.eval(), [Line(ids, torch.ones(tokens, dtype=torch.bool))])
        print(name, tokens, peak_bytes())
"""


def test_memory_stays_flat_from_4k_to_64k_tokens() -> None:
    """Peaks of one process only rise, so the longer text must not raise what the shorter one has set."""
    done = subprocess.run([sys.executable, "-c", PEAK, *BOUNDED], capture_output=True, text=True, check=True)
    peaks = {(name, int(tokens)): int(peak) for name, tokens, peak in (s.split() for s in done.stdout.splitlines())}
    for name in BOUNDED:
        grown = peaks[name, 65536] - peaks[name, 4096]
        assert grown < 4e6, f"{name} needed {grown / 1e6:.1f} MB more for 64k tokens than for 4k"


def test_nothing_of_a_step_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = build("rmt"), line(200)
    step, seen = model.step, []

    def spy(*given: Any, **options: Any) -> Any:
        readout, state = step(*given, **options)
        seen.append(weakref.ref(readout.hidden))
        assert sum(ref() is not None for ref in seen) <= 2  # this one, and the one whose last position is carried over
        return readout, state

    monkeypatch.setattr(model, "step", spy)
    with torch.no_grad():
        line_nll(model, [text])
    assert len(seen) == 25
