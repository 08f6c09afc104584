"""Questions without choices: answers generated on forks, their cost, and controls that are observed once."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import pytest
import torch
from test_observe import appended, build, words

from memory_bench.backbone.model import Backbone
from memory_bench.budget import Budget
from memory_bench.driver.encoding import encode_episode
from memory_bench.driver.generating import end_of_text
from memory_bench.driver.meter import Meter
from memory_bench.driver.observe import observe
from memory_bench.episode import Ask, Episode, Read
from memory_bench.errors import UserError
from memory_bench.protocol import DecodePlan, MemoryModel, Segment, State
from memory_bench.testing import tiny_backbone

MODELS = [
    *("hmt", "rmt", "armt", "longmem", "memorizing", "memoryllm", "mplus", "infllm", "emllm"),
    *("sliding-window", "full-context", "xl-cache", "truncation", "sirllm"),
]
OWN_LOOP: list[
    tuple[str, dict[str, Any]]
] = [  # models that write their own loop over the layers, and other paths in it
    ("armt", {}),
    ("armt", {"count_padding": True}),
    ("longmem", {"memory_position": "query"}),
    ("longmem", {"side_block": "parallel", "zero_chunks": True}),
    ("memorizing", {"layers": (0, 1), "fusion": "joint", "sinks": 2, "memory_position": "constant"}),
    ("memorizing", {"xl_cache": 8, "search": "bucketed", "normalise": True, "memory_position": "query"}),
    ("memorizing", {"strict_causal": True, "mask_unwritten": False, "xl_cache": 0, "sinks": 0}),
]


def encode(text: str) -> tuple[list[int], list[int]]:
    """A token a character; ids below 64."""
    return [ord(c) % 64 for c in text], [len(c.encode()) for c in text]


def decode(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def free(prompt: str = "?", answer: str = " abc", tag: str = "fact", tokens: int = 5) -> Ask:
    return Ask(prompt, (), answer, tag, "distance=0", tokens)


def look(model: MemoryModel[Any], episodes: Sequence[Episode], **options: Any) -> pd.DataFrame:
    return pd.DataFrame(observe(model, episodes, encode, seed=3, decode=decode, **options))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_padded_prompts_are_continued_as_alone(name: str, kind: str) -> None:
    """Rows of unequal length, some of which fill their segment of 8 on the way; twice in a row."""
    model = build(name, tiny_backbone(kind))
    ids, lengths = torch.arange(5 * 8).view(5, 8) * 7 % 60, [2, 8, 3, 5, 2]
    mask = torch.arange(8) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        state = model.absorb(model.open(5, seeds=[1, 2, 3, 4, 5]), Segment.full((ids + 9) % 60))
        together = model.decode(state, Segment(ids, mask, mask), DecodePlan(6))
        for row, length in enumerate(lengths):
            index = torch.tensor([row])
            prompt = Segment.full(ids[row : row + 1, :length])
            assert together[row].tolist() == model.decode(state.rows(index), prompt, DecodePlan(6))[0].tolist()
            assert together[row].tolist() == reread(model, state.rows(index), prompt.ids, 6)


def reread(model: MemoryModel[Any], state: State, ids: torch.Tensor, count: int) -> list[int]:
    """Greedy continuation with plain steps over the whole open segment for every token."""
    new: list[int] = []
    given = torch.ones_like(ids, dtype=torch.bool)
    for _ in range(count):
        full = ids.shape[1] == 8
        readout, after = model.step(state, Segment.full(ids, given), write=full)
        new.append(int(readout.logits(-1).argmax()))
        if full:
            state, ids, given = after, ids[:, :0], given[:, :0]
        ids = torch.cat([ids, torch.tensor([[new[-1]]])], dim=1)
        given = torch.cat([given, torch.zeros(1, 1, dtype=torch.bool)], dim=1)
    return new


def test_a_pass_that_begins_alike_is_continued(make_backbone: Any) -> None:
    for kind in ("llama", "qwen3", "gpt2", "opt"):
        backbone: Backbone = make_backbone(kind)
        ids = torch.arange(2 * 9).view(2, 9) % 60
        embeds, mask = backbone.embed(ids), torch.ones_like(ids, dtype=torch.bool)
        mask[0, :3] = False
        wanted, past = backbone.run_cached(embeds, mask)
        assert past is not None
        with torch.no_grad(), backbone.reusing():
            backbone.run(embeds[:, :5], mask[:, :5])
            found, own = backbone.run_cached(embeds, mask)
            assert own is not None
            again = backbone.run(embeds[:, :9], mask)
            changed = backbone.run(embeds.flip(1), mask)
        assert torch.allclose(found[mask], wanted[mask], atol=1e-5)
        assert torch.allclose(own.keys[1][1], past.keys[1][1], atol=1e-5)
        assert torch.equal(again[:, :8], found[:, :8])
        assert torch.allclose(again[:, 8], found[:, 8], atol=1e-5)  # the last token always runs
        assert torch.allclose(changed[mask], backbone.run(embeds.flip(1), mask)[mask], atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize(("name", "options"), OWN_LOOP)
def test_an_own_loop_is_continued(
    name: str, options: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Predictions and memory as without reuse, whether more tokens follow, fewer, others, or the memory is another."""
    model = build(name, tiny_backbone(kind), **options)
    ids = torch.arange(3 * 8).view(3, 8) * 7 % 60
    mask = torch.arange(8) >= torch.tensor([[0], [3], [1]])
    changed = torch.where(torch.arange(8) < 6, ids, ids + 1)
    computed: list[int] = []
    close = type(model.backbone).close
    monkeypatch.setattr(
        type(model.backbone),
        "close",
        lambda self, layer, hidden, *rest: computed.append(hidden.shape[1]) or close(self, layer, hidden, *rest),
    )
    with torch.no_grad():
        state = model.absorb(model.open(3, seeds=[1, 2, 3]), Segment.full((ids + 9) % 60))
        other = model.absorb(state, Segment.full((ids + 5) % 60))
        steps = [
            (before, Segment(text[:, :tokens], mask[:, :tokens], mask[:, :tokens]), write)
            for before in (state, other)
            for text, tokens, write in (
                (ids, 5, False),
                (ids, 6, False),
                (ids, 6, False),
                (changed, 8, False),
                (ids, 8, True),
                (ids, 8, True),
                (ids, 4, False),
            )
        ]
        wanted = [model.step(before, segment, write=write) for before, segment, write in steps]
        computed.clear()
        with model.backbone.reusing():
            found = [model.step(before, segment, write=write) for before, segment, write in steps]
    extra = getattr(model.config, "memory_tokens", 0)
    shift = int(kind == "qwen3")  # the key shift computes one token more
    new = [5, 1 + shift, 1 + shift, 2 + shift]
    layers = model.backbone.layers
    assert computed[: 4 * layers : layers] == new
    if name == "armt":
        assert computed[4 * layers] == 2 + shift + extra
    for (mine, after), (theirs, expected), (_, segment, _) in zip(found, wanted, steps, strict=True):
        assert torch.allclose(mine.hidden[segment.mask], theirs.hidden[segment.mask], atol=1e-5)
        for (path, tensor), (_, right) in zip(after.tensors(), expected.tensors(), strict=True):
            assert torch.allclose(tensor.double(), right.double(), atol=1e-5), path


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prompt", ["?", "a long prompt of three segments"])
def test_what_is_generated_and_its_likelihood(name: str, prompt: str) -> None:
    """Against a stream of its own that reads the same text; several streams are out of step."""
    model = build(name)
    episodes = [
        Episode(f"e{n}", (Read(words(n, 3 + n), tag="fact"), free(prompt), Read(words(9 + n, 4)), free(prompt)))
        for n in range(4)
    ]
    found = look(model, episodes, controls=False)
    assert len(found) == 8
    for episode in episodes:
        text = "".join(e.text for e in episode.events if isinstance(e, Read))
        row = found[(found["episode"] == episode.id) & (found["event"] == 3)].iloc[0]
        seed = encode_episode(episode, encode, 3).line.seed
        asked = Ask(prompt, (" abc",), " abc")
        assert row["nll"] == pytest.approx(appended(model, text, asked, seed)[0], abs=2e-4)
        ids = torch.tensor([encode(text + prompt)[0]])
        state, last = model.open(1, seeds=[seed]), 8 * ((ids.shape[1] - 1) // 8)
        given = torch.arange(ids.shape[1])[None] >= len(text)
        with torch.no_grad():
            for start in range(0, last, 8):
                piece = given[:, start : start + 8]
                state = model.absorb(state, Segment.full(ids[:, start : start + 8], piece if piece.any() else None))
            made = model.decode(state, Segment.full(ids[:, last:], given[:, last:]), DecodePlan(5, end_of_text(model)))
        assert row["generated"] == decode(made[0].tolist()) == row["predicted"]
        assert row["choice_nll"] == [row["nll"]]
        assert row["accepted"] == [" abc"]


def test_a_generated_answer_leaves_no_trace_and_is_charged() -> None:
    model = build("rmt")
    text = (Read(words(1, 7), scored=True, tag="fact"), Read(words(2, 9), scored=True))
    plain, asked = Episode("e", text), Episode("e", (text[0], free(), text[1], free()))
    usages = []
    for episode, tokens in ((plain, 0), (asked, 5)):
        meter = Meter(Budget("test"), torch.device("cpu"))
        with meter.phase("eval"):
            found = look(model, [episode], watcher=meter)
        usages.append((found[found["kind"] == "read"]["nll"].tolist(), meter.usage.eval_flops, meter.usage.eval_tokens))
        del tokens
    assert usages[0][0] == usages[1][0]
    assert usages[1][1] > usages[0][1] + 2 * model.flops(6, 0)  # read again for the questions, and both continuations
    assert usages[1][2] >= usages[0][2] + 2 * 6


def test_a_question_without_choices_needs_a_decoder() -> None:
    with pytest.raises(UserError, match="decode"):
        observe(build("rmt"), [Episode("e", (Read("abc"), free()))], encode, seed=0)


def test_controls_without_memory_are_observed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("rmt")
    events = [Read(words(1, 4), tag="fact"), free()]
    for n in range(3):
        events += [Read(words(2 + n, 5)), free()]
    other = Episode("f", (Read(words(8, 30), tag="fact"), free("!")))
    opened: list[int] = []
    plain = model.open
    monkeypatch.setattr(model, "open", lambda rows, **kw: opened.append(rows) or plain(rows, **kw))
    found = look(model, [Episode("e", tuple(events)), other])
    mine = found[found["episode"] == "e"]
    assert mine.groupby("control").size().to_dict() == {"": 4, "ceiling": 4, "foreign": 4, "wiped": 4}
    for control in ("wiped", "ceiling"):
        part = mine[mine["control"] == control]
        assert part["nll"].nunique() == 1
        assert part["start"].tolist() == mine[mine["control"] == ""]["start"].tolist()
    assert mine[mine["control"] == ""]["nll"].nunique() == 4
    assert opened == [2, 1, 1, 1, 1]  # the streams; wiped and ceiling of either question
    wiped = mine[mine["control"] == "wiped"].iloc[0]
    assert wiped["nll"] == pytest.approx(appended(model, "", Ask("?", (" abc",), " abc"), 0)[0], abs=2e-4)
