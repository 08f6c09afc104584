"""Whatever an author gets wrong is an AssertionError with a sentence: the promise, what was given, what is expected."""

import re
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from author_model import MISTAKES, MODEL, Mistake

from memory_bench.testing import Check, check_model, model_checks, tiny_backbone


def build_of(text: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """The model that `text` makes, as its author's test would build it."""
    module: Any = ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", module)
    exec(compile(text, "mine.py", "exec"), module.__dict__)
    return lambda: module.Mine(tiny_backbone("qwen3"), module.MineConfig(), torch.Generator().manual_seed(1))


def test_the_model_without_a_mistake_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    check_model(build_of(MODEL, monkeypatch))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.name.replace(" ", "-"))
def test_every_mistake_is_a_sentence(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError) as told:
        check_model(build_of(mistake.text, monkeypatch))
    said = str(told.value)
    assert re.search(mistake.said, said, flags=re.S), said
    assert len(said.split()) > 8
    assert not re.search(r"/\w+/\w+/", said), "a path of this machine"


def test_every_check_alone_speaks_in_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    """As parametrised tests run them: no IndexError or AttributeError of the suite's own."""
    for name in ("step gives the readout alone", "no Config", "step raises", "traits is a dict", "open gives None"):
        (mistake,) = [m for m in MISTAKES if m.name == name]
        build = build_of(mistake.text, monkeypatch)
        said = [text for check in model_checks() if (text := sentence_of(check, build))]
        assert said, name
        assert all(len(text.split()) > 8 for text in said), said


def sentence_of(check: Check, build: Callable[[], Any]) -> str:
    """What a check says; anything but an `AssertionError` is raised."""
    try:
        check(build)
    except AssertionError as error:
        return str(error)
    return ""
