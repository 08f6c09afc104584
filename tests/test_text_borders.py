"""Pieces of a text as they stand in it: marks before texts, borders inside a token, what a choice is."""

from random import Random
from typing import Any

import pandas as pd
import pytest
import torch
from tokenizers_of_kinds import KINDS, MARKED, prose, small_tokenizer

from memory_bench import plugins
from memory_bench.backbone.model import Backbone
from memory_bench.backbone.tokenizer import Tokens, word_level
from memory_bench.budget import Budget
from memory_bench.data import Study
from memory_bench.driver.encoding import Before, encode_asked, encode_episode
from memory_bench.driver.observe import observe
from memory_bench.episode import Ask, Episode, Read
from memory_bench.errors import DataError
from memory_bench.tasks import pubmedqa
from memory_bench.testing import card_of, tiny_backbone

CHOICES = (" yes", " no", " maybe")
PROMPT = "\nQuestion: is it?\nAnswer:"


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tokens(kind: str) -> Tokens:
    return Tokens(small_tokenizer(kind))


def test_a_piece_is_encoded_as_in_its_text(tokens: Tokens, kind: str) -> None:
    for seed in range(20):
        before, behind = prose(9, seed), f" {prose(5, seed)}"
        whole = tokens(before + behind)[0]
        assert tokens(before)[0] + tokens.within(behind)[0] == whole
    alone, within = tokens("whale")[0], tokens.within("whale")[0]
    assert (alone == within) == (kind not in MARKED)


def test_bytes_are_those_of_the_text(tokens: Tokens) -> None:
    rng = Random(0)
    for _ in range(100):
        text = "".join(rng.choice("ab \n\té東🐋e\u0301\u200b") for _ in range(rng.randrange(1, 30)))
        for encode in (tokens, tokens.within):
            ids, sizes = encode(text)
            assert len(ids) == len(sizes)
            assert sum(sizes) == len(text.encode())


def test_behind_a_special_token_a_text_is_encoded_as_there(tokens: Tokens) -> None:
    before, behind = prose(4), " sea</s>ship and storm"
    assert tokens(before)[0] + tokens.within(behind)[0] == tokens(before + behind)[0]
    assert sum(tokens.within(behind)[1]) == len(behind)


def test_a_stream_in_pieces_is_the_stream(tokens: Tokens) -> None:
    """Cut before a blank, read in pieces: the ids, and every byte once."""
    words = [prose(1, 0), *(f" {prose(3, n)}" for n in range(1, 6))]
    stream = encode_episode(Episode("e", tuple(Read(word, scored=True) for word in words)), tokens, 0)
    ids, sizes = tokens("".join(words))
    assert stream.line.ids.tolist() == ids
    assert stream.nbytes.tolist() == sizes
    anew = encode_episode(Episode("e", (Read("\n"), Read(words[0], scored=True, anew=True))), tokens, 0)
    assert anew.line.ids.tolist() == tokens("\n")[0] + tokens(words[0])[0]


def test_a_cut_text_goes_on_inside(tokens: Tokens) -> None:
    read = Read(prose(20), tokens=7, lead=prose(3))
    stream = encode_episode(Episode("e", (read, Read(" sea"), Ask(PROMPT, CHOICES, " no"))), tokens, 0)
    assert stream.line.ids.tolist() == tokens(prose(20))[0][:7] + tokens.within(" sea")[0]
    short = encode_episode(Episode("e", (Read(" sea", tokens=7, lead=prose(9)), Ask(PROMPT, (), " no"))), tokens, 0)
    own = tokens.within(" sea")[0]
    assert len(short.line) == 7
    assert short.line.ids.tolist()[-len(own) :] == own


@pytest.mark.parametrize("end", ["", ".", ".\n", "\n", " "])
@pytest.mark.parametrize("prompt", ["", PROMPT, "\n\nSo:", " (", " so"])
def test_questions_stand_in_their_text(tokens: Tokens, end: str, prompt: str) -> None:
    """The fork has read the whole text's tokens, whatever spans its borders; choices are cut as harnesses do."""
    text = prose(12) + end
    episode = Episode("e", (Read(text, tag="t"), Ask(prompt, CHOICES, " no", "t")))
    stream = encode_episode(episode, tokens, 0)
    (question,) = stream.questions
    bare = prompt.rstrip() if prompt.strip() else prompt
    for choice, found in zip(CHOICES, question.choices, strict=True):
        whole = tokens(text + prompt + choice)[0]
        known = tokens(text + bare)[0]
        read = stream.line.ids[: question.at].tolist() + question.prompt.tolist()
        assert read == known
        assert found.tolist() == whole[len(known) :]
    assert question.apart.tolist() == tokens.within(bare)[0]
    assert question.distance_tokens == 0


def test_blanks_that_end_a_prompt_belong_to_the_choices(tokens: Tokens) -> None:
    read = Read(prose(5))
    two = [
        encode_episode(Episode("e", (read, ask)), tokens, 0).questions[0]
        for ask in (Ask("\nAnswer: ", ("yes", "no"), "no"), Ask("\nAnswer:", (" yes", " no"), " no"))
    ]
    assert two[0].prompt.equal(two[1].prompt)
    assert [a.equal(b) for a, b in zip(two[0].choices, two[1].choices, strict=True)] == [True, True]


def test_a_choice_without_a_token_is_refused() -> None:
    tokens = word_level(["[unk]", "the", "wha", "whale"])
    with pytest.raises(DataError, match="'le' has no token of its own behind 'the wha'"):
        encode_asked(tokens, Before("the"), " wha", ["le"])


def build(name: str, backbone: Backbone, **options: Any) -> Any:
    cls = plugins.load("models", name)
    config = plugins.configure(name, cls.fit(card_of(backbone), Budget("test")), options)
    return cls(backbone, config, torch.Generator().manual_seed(0)).eval().requires_grad_(False)


def test_answers_are_those_of_the_whole_text(tokens: Tokens, kind: str) -> None:
    """Against the model's own forward pass over the whole text; the controls run where the fork begins earlier."""
    backbone = tiny_backbone("llama", vocab_size=420)
    inner: Any = backbone.model
    text = prose(12) + "."
    ask = Ask(PROMPT, CHOICES, " no", "t")
    rows = observe(
        build("full-context", backbone), [Episode("e", (Read(text, tag="t"), ask)), Episode("f", (Read(text), ask))],
        tokens, seed=0,
    )  # fmt: skip
    found = pd.DataFrame(rows)
    main = found[(found["control"] == "") & (found["episode"] == "e")].iloc[0]
    known = len(tokens(text + PROMPT)[0])
    for choice, nll in zip(CHOICES, main["choice_nll"], strict=True):
        ids = torch.tensor([tokens(text + PROMPT + choice)[0]])
        with torch.no_grad():
            logprobs = inner(ids).logits[0, known - 1 : -1].log_softmax(-1)
        assert nll == pytest.approx(-float(logprobs.gather(1, ids[0, known:, None]).sum()), abs=1e-3)
    assert {"", "wiped", "foreign"} <= set(found["control"])
    if kind == "llama3":  # a full stop and the line break after it are one token
        assert main["start"] == len(tokens(text)[0]) - 1


def test_memories_ask_where_the_fork_begins_earlier() -> None:
    """A text that ends a segment, and a prompt that takes its last token back."""
    tokens = Tokens(small_tokenizer("llama3"))
    text = prose(30)
    text = tokens.tokenizer.decode(tokens(text)[0][:15]) + "."
    assert len(tokens(text)[0]) == 16
    for name in ("rmt", "full-context"):
        asks = (Ask(PROMPT, CHOICES, " no", "t"), Ask("", CHOICES, " no", "t"), Ask(PROMPT, (), " no", "t"))
        model = build(name, tiny_backbone("llama", vocab_size=420), **({"segment": 8} if name == "rmt" else {}))
        episodes = [Episode(e, (Read(text, tag="t"), *asks)) for e in "ab"]
        rows = pd.DataFrame(observe(model, episodes, tokens, seed=0, decode=tokens.decode))
        assert rows["nll"].notna().all()
        assert sorted(set(rows["control"])) == ["", "ceiling", "foreign", "wiped"]
        assert rows[rows["control"] == ""]["start"].tolist() == [15, 16, 15] * 2


def test_examples_are_trained_on_as_they_are_asked(tokens: Tokens) -> None:
    study = Study("1", "is it", (prose(6), f"{prose(7)}."), "no", "")
    line = pubmedqa.training_line(study, tokens, 0)
    text = "\n".join(study.contexts) + pubmedqa.prompt(study.question)
    assert line.ids.tolist() == tokens(f"{text} no")[0]
    assert line.ids[line.scored].tolist() == tokens(f"{text} no")[0][len(tokens(text)[0]) :]
    assert line.given is not None
    assert tokens.tokenizer.decode(line.ids[line.given].tolist()).strip(" .\n").startswith("Question")
