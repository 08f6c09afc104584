"""Observation: what a question sees, leaves behind and costs, and what the columns of its row mean."""

import time
from collections.abc import Sequence
from typing import Any

import pandas as pd
import pytest
import torch

from memory_bench import plugins
from memory_bench.backbone.model import Backbone
from memory_bench.budget import Budget
from memory_bench.corpus import Line
from memory_bench.driver.encoding import encode_episode, word_ends
from memory_bench.driver.meter import Meter
from memory_bench.driver.observe import observe
from memory_bench.driver.stream import line_nll
from memory_bench.episode import Ask, Episode, Read
from memory_bench.protocol import MemoryModel
from memory_bench.testing import card_of, tiny_backbone

CHOICES = (" ab", " c", " defg")


def encode(text: str) -> tuple[list[int], list[int]]:
    """A token a character; ids below 64."""
    return [ord(c) % 64 for c in text], [len(c.encode()) for c in text]


def build(name: str, backbone: Backbone | None = None, **options: Any) -> MemoryModel[Any]:
    backbone = backbone or tiny_backbone("llama")
    cls = plugins.load("models", name)
    config = plugins.configure(name, cls.fit(card_of(backbone), Budget("test")), options)
    model: MemoryModel[Any] = cls(backbone, config, torch.Generator().manual_seed(0))
    return model.eval().requires_grad_(False)


def words(seed: int, count: int) -> str:
    rng = torch.Generator().manual_seed(seed)
    return " ".join(
        "".join(chr(97 + int(torch.randint(26, (), generator=rng))) for _ in range(3)) for _ in range(count)
    )


def asked(name: str, *parts: str | Ask, scored: bool = False, cluster: str = "") -> Episode:
    events = [Read(p, scored=scored, tag=f"part{n}") if isinstance(p, str) else p for n, p in enumerate(parts)]
    return Episode(name, tuple(events), cluster)


def question(prompt: str = "?", evidence: str = "part0") -> Ask:
    return Ask(prompt, CHOICES, " c", evidence)


def look(model: MemoryModel[Any], episodes: Sequence[Episode], **options: Any) -> pd.DataFrame:
    return pd.DataFrame(observe(model, episodes, encode, seed=3, **options))


def appended(model: MemoryModel[Any], text: str, ask: Ask, seed: int) -> list[float]:
    """Surprisal of each choice after `text` and the prompt, read by a fresh stream from its beginning."""
    lines = []
    for choice in ask.choices:
        ids = torch.tensor(encode(text + ask.prompt + choice)[0])
        scored, given = torch.zeros(len(ids), dtype=torch.bool), torch.zeros(len(ids), dtype=torch.bool)
        scored[len(ids) - len(choice) :] = True
        given[len(text) : len(ids) - len(choice)] = True
        lines.append(Line(ids, scored, given, seed))
    with torch.no_grad():
        return line_nll(model, lines)


@pytest.mark.parametrize("name", ["hmt", "rmt", "memoryllm", "mplus", "sliding-window"])
def test_a_question_leaves_no_trace(name: str) -> None:
    model = build(name)
    plain = asked("e", words(1, 7), words(2, 9), scored=True)
    disturbed = Episode("e", (plain.events[0], question(), question(words(5, 8)), plain.events[1], question()))
    with_questions, without = (look(model, [e]) for e in (disturbed, plain))
    reads = with_questions[with_questions["kind"] == "read"]
    assert reads["nll"].tolist() == without["nll"].tolist()  # bit for bit
    again = Episode("e", (disturbed.events[0], disturbed.events[3], disturbed.events[4]))
    last = with_questions[(with_questions["kind"] == "ask") & (with_questions["event"] == 4)]
    alone = look(model, [again])
    expected = alone[alone["kind"] == "ask"]
    assert last["choice_nll"].tolist() == expected["choice_nll"].tolist()


@pytest.mark.parametrize("name", ["hmt", "rmt", "memoryllm", "mplus", "full-context", "xl-cache"])
@pytest.mark.parametrize("text", [0, 1, 7, 8, 9, 24])
@pytest.mark.parametrize("prompt", ["", "?", "a long prompt of three segments"])
def test_a_question_equals_the_same_text_appended(name: str, text: int, prompt: str) -> None:
    model, read = build(name), words(4, 8)[:text]
    if not read and not prompt:
        return  # nothing precedes the answer
    ask = question(prompt)
    events = (Read(read, tag="part0"), ask) if read else (ask,)
    episodes = [Episode("e", events), asked("other", words(9, 8), question())]
    found = look(model, episodes, controls=False)
    row = found[found["episode"] == "e"].iloc[0]
    seed = encode_episode(episodes[0], encode, 3).line.seed
    expected = appended(model, read, ask, seed)
    assert row["choice_nll"] == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("name", ["hmt", "rmt", "mplus", "memorizing", "retrieval", "xl-cache", "truncation"])
@pytest.mark.parametrize("text", [3, 7, 8, 9, 16, 21])
def test_choices_of_one_token_are_scored_in_one_pass(name: str, text: int) -> None:
    """As if each were appended, at a third of the tokens; the prompt ends before, at and after a segment's end."""
    model, read = build(name, segment=8), words(3, 8)[:text]
    choices = ("a", "b", "c")
    counted = Meter(Budget("b"), torch.device("cpu"))
    ask = Ask("x?", choices, "b", "part0")
    row = look(model, [asked("e", read, ask)], controls=False, watcher=counted).iloc[0]
    seed = encode_episode(asked("e", read, ask), encode, 3).line.seed
    assert row["choice_nll"] == pytest.approx(appended(model, read, ask, seed), abs=1e-5)
    assert counted.usage.eval_tokens == text + 2


def test_choices_are_scored_by_hand() -> None:
    """Against Hugging Face's own forward pass: sums over a choice's tokens; the smallest is the prediction."""
    model = build("full-context")
    inner: Any = model.backbone.model
    text, ask = words(1, 5), question(" and?")
    row = look(model, [asked("e", text, ask)], controls=False).iloc[0]
    for choice, found in zip(CHOICES, row["choice_nll"], strict=True):
        ids = torch.tensor([encode(text + ask.prompt + choice)[0]])
        logprobs = inner(ids).logits[0].log_softmax(-1)
        start = len(text + ask.prompt)
        by_hand = -sum(float(logprobs[t - 1, ids[0, t]]) for t in range(start, ids.shape[1]))
        assert found == pytest.approx(by_hand, abs=1e-3)
    best = min(range(3), key=lambda n: row["choice_nll"][n])
    assert row["predicted"] == CHOICES[best]
    assert row["nll"] == row["choice_nll"][1]
    assert (row["answer"], row["tokens"], row["nbytes"]) == (" c", 2, 2)


def test_distances_are_in_tokens_and_bytes() -> None:
    episode = asked(
        "e", "abc", "übür", question(), "x" * 10, question(), question(evidence="part1"), question(evidence="no")
    )
    found = look(build("rmt"), [episode], controls=False)
    assert found["distance_tokens"].tolist() == [4, 14, 10, -1]
    assert found["distance_bytes"].tolist() == [6, 16, 10, -1]
    assert found["start"].tolist() == [7, 17, 17, 17]


def test_words_and_bytes_add_up_to_the_texts() -> None:
    text = "  Über  the\nwhite whale – again "
    episodes = [asked("a", text, scored=True), asked("b", words(3, 11), scored=True)]
    found = look(build("rmt"), episodes, controls=False)
    sums = found.groupby("episode")[["nbytes", "words", "tokens"]].sum()
    assert sums.loc["a"].tolist() == [len(text.encode()) - 1, 6, len(text) - 1]  # all but the first token
    assert sums.loc["b"].tolist() == [len(words(3, 11)) - 1, 11, len(words(3, 11)) - 1]


def test_a_word_counts_where_it_ends() -> None:
    assert word_ends("ab cd", [1, 2, 2]) == [0, 1, 1]
    assert word_ends("one", [1, 0, 2]) == [0, 0, 1]
    assert word_ends("", []) == []


def test_reading_is_scored_segment_by_segment() -> None:
    text = words(3, 6)  # 23 tokens
    found = look(build("rmt"), [asked("e", text[:10], scored=False), asked("f", text, scored=True)], controls=False)
    assert found["episode"].unique().tolist() == ["f"]
    assert found["start"].tolist() == [1, 8, 16]
    assert found["tokens"].tolist() == [7, 8, 7]
    assert set(found["kind"]) == {"read"}


def test_read_controls_are_what_they_say() -> None:
    model = build("rmt")
    episodes = [asked("a", words(1, 8), scored=True), asked("b", words(2, 8), scored=True)]
    found = look(model, episodes)
    by = {(c, e): part["nll"].tolist() for (c, e), part in found.groupby(["control", "episode"])}
    assert by["wiped", "a"][0] == pytest.approx(by["", "a"][0])  # nothing is remembered yet
    assert by["wiped", "a"][1:] != pytest.approx(by["", "a"][1:], rel=1e-3)
    same = look(model, [asked("a", words(1, 8), scored=True), asked("b", words(1, 8), scored=True)])
    own, foreign = (same[(same["control"] == c) & (same["episode"] == "a")]["nll"].tolist() for c in ("", "foreign"))
    assert foreign == pytest.approx(own)  # two documents of the same text: the other's memory is one's own
    assert by["foreign", "a"][1:] != pytest.approx(by["", "a"][1:], rel=1e-3)
    truncation = look(build("truncation"), episodes)
    per = [truncation[truncation["control"] == c]["nll"].tolist() for c in ("", "wiped", "foreign")]
    assert per[0] == pytest.approx(per[1])
    assert per[0] == pytest.approx(per[2])


def test_question_controls_are_what_they_say() -> None:
    model = build("rmt")
    one, two = words(1, 5), words(2, 5)  # 19 tokens: two segments and an open one of 3
    episodes = [asked("a", one, question()), asked("b", two, question())]
    found = look(model, episodes)
    rows = {(r["control"], r["episode"]): r["choice_nll"] for _, r in found.iterrows()}
    assert {c for c, _ in rows} == {"", "wiped", "foreign", "ceiling"}
    tail = one[16:]
    assert rows["wiped", "a"] == pytest.approx(appended(model, tail, question(), 0), abs=2e-4)
    assert rows["foreign", "a"] == pytest.approx(appended(model, two[:16] + tail, question(), 0), abs=2e-4)
    wide = build("rmt", segment=64)  # all the evidence in one segment of the model
    assert rows["ceiling", "a"] == pytest.approx(appended(wide, one, question(), 0), abs=2e-4)


def test_foreign_is_asked_while_another_stream_goes_on() -> None:
    """Two questions of one stream, and a second stream that is asked elsewhere."""
    long = asked("b", words(2, 12), question())
    found = look(build("rmt"), [asked("a", words(1, 5), question(), question("!")), long])
    foreign = found[found["control"] == "foreign"]
    assert foreign["episode"].tolist() == ["a", "a"]
    assert look(build("rmt"), [long])["control"].tolist() == ["", "ceiling", "wiped"]


def test_streams_need_not_be_asked_in_the_order_of_their_lengths() -> None:
    model = build("rmt")
    early = asked("early", words(1, 3), question(), words(2, 20), scored=True)
    late = asked("late", words(3, 12), question())
    together = look(model, [early, late], controls=False)
    for name, episode in (("early", early), ("late", late)):
        alone = look(model, [episode], controls=False)
        found = together[(together["episode"] == name) & (together["kind"] == "ask")]
        expected = alone[alone["kind"] == "ask"]["choice_nll"].iloc[0]
        assert found["choice_nll"].iloc[0] == pytest.approx(expected, abs=1e-4)


def test_without_evidence_there_is_no_ceiling_and_without_controls_nothing() -> None:
    episodes = [asked("a", words(1, 5), question(evidence="")), asked("b", words(2, 5), question(evidence=""))]
    assert set(look(build("rmt"), episodes)["control"]) == {"", "wiped", "foreign"}
    assert set(look(build("rmt"), episodes, controls=False)["control"]) == {""}


def test_order_of_episodes_and_batches_changes_nothing() -> None:
    model = build("mplus")
    episodes = [asked(f"e{n}", words(n, 3 + n), question(), words(50 + n, 2), question()) for n in range(5)]
    one, other = (look(model, part, controls=False) for part in (episodes, episodes[::-1]))
    pairs = one.merge(other, on=["episode", "event"], suffixes=("", "_other"))
    assert len(pairs) == 10
    for _, pair in pairs.iterrows():
        assert pair["choice_nll"] == pytest.approx(pair["choice_nll_other"], abs=1e-4)


def test_only_the_main_pass_is_charged() -> None:
    episodes = [asked(f"e{n}", words(n, 12), question(), scored=True) for n in range(3)]
    usage = []
    for controls in (False, True):
        meter = Meter(Budget("test"), torch.device("cpu"))
        with meter.phase("eval"):
            look(build("rmt"), episodes, controls=controls, watcher=meter)
        usage.append(meter.usage)
    assert usage[0].eval_tokens == usage[1].eval_tokens > 0
    assert usage[0].eval_flops == usage[1].eval_flops > 0
    assert usage[0].state_bytes == usage[1].state_bytes > 0


def test_controls_have_a_clock_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "process_time", lambda: clock[0])
    meter = Meter(Budget("test", eval_seconds=4), torch.device("cpu"))
    with meter.phase("eval"):
        clock[0] += 1
        with meter.control("wiped"):
            clock[0] += 10
        clock[0] += 1
    assert meter.usage.eval_seconds == pytest.approx(2, abs=0.1)
    assert meter.usage.control_seconds == pytest.approx(10, abs=0.1)
