"""Whatever the author of a task gets wrong is an AssertionError with a sentence, before a model reads anything."""

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from memory_bench.data import Library
from memory_bench.testing import check_task

TASK = (Path(__file__).parents[1] / "examples/memory-bench-example/src/memory_bench_example/colours.py").read_text()
FROZEN = "@dataclass(frozen=True, slots=True)\n    class Config"
EPISODE = 'yield Episode(str(number), (Read(fact, tag="fact"), Read(filler), ask))'
ASK = 'Ask(question, COLOURS, answer, evidence="fact")'
PLAN = 'return TrainingPlan("colours")'
CORPUS = "return LineCorpus(lines)"
FOUND = "return found  #"
SOURCE = 'return Source("colours", "program", "colours", "1", stand_in=False)'
BUILT = "def __init__(self, config: Config | None = None) -> None:\n        self.config = config or self.Config()"
LINE = "Line(ids, scored, seed=number)"

MISTAKES = {
    "Config is not frozen": (
        FROZEN,
        "@dataclass\n    class Config",
        r"Colours\.Config must be a frozen dataclass of the options, not the",
    ),
    "Config has no default": (
        "questions: int = 60",
        "questions: int",
        r"Colours\.Config\(\) must give the usual options: every field has a.*but it raised TypeError:",
    ),
    "the headline is missing": (
        '    headline = "accuracy"',
        '    head = "accuracy"',
        r"Colours\.headline must be a text, the name of the metric of the.*, not None",
    ),
    "needs is None": (
        '    needs = ""',
        "    needs = None",
        r"Colours\.needs must be a text, the name of its data, or '', not None",
    ),
    "version is a text": (
        '    needs = ""',
        '    needs = ""\n    version = "1"',
        r"Colours\.version must be a whole number, at least 1, not '1' \(str\)",
    ),
    "beside is a text": (
        '    needs = ""',
        '    needs = ""\n    beside = "books"',
        r"Colours\.beside must be a tuple of names of data, not 'books' \(str\)",
    ),
    "the constructor takes no config": (
        BUILT,
        "def __init__(self) -> None:\n        self.config = self.Config()",
        r"Colours\.__init__ must be callable as __init__\(self, config\), but it",
    ),
    "episodes takes no limit": (
        "library: Library, limit: int | None)",
        "library: Library, limit: int | None = 9, *, n)",
        r"Colours\.episodes must be callable as episodes\(library, limit\), but it",
    ),
    "episodes ignores the limit": (
        "[:limit]",
        "",
        r"Colours\.episodes\(library, 4\) must give 4 episodes at most, but it",
    ),
    "episodes gives None": (
        EPISODE,
        "pass",
        r"Colours\.episodes\(library, 4\) must give Episode after Episode, but it",
    ),
    "episodes gives tuples": (
        EPISODE,
        "yield (str(number), (Read(fact),))",
        r"Colours\.episodes\(library, 4\) must give Episode after Episode, but",
    ),
    "episodes raises": (
        "fact, filler, question, answer = self.draw",
        "fact, filler = self.draw",
        r"Colours\.episodes\(library, 4\) must give Episode after Episode, but it",
    ),
    "the id is a number": (
        "Episode(str(number)",
        "Episode(number",
        r"episode 0: Episode\.id must be a text, not 0 \(int\)",
    ),
    "the ids are all alike": (
        "Episode(str(number)",
        'Episode("one"',
        r"episode ids must be unique, but 'one' stands for several",
    ),
    "events is a list": (
        EPISODE,
        'yield Episode(str(number), [Read(fact, tag="fact"), ask])',
        r"episode '0': Episode\.events must be a tuple, not a list of 2",
    ),
    "an event is a text": (
        EPISODE,
        "yield Episode(str(number), (fact, ask))",
        r"episode '0', event 0 must be a Read or an Ask, not 'The coat is red\.'",
    ),
    "a text is a number": (
        "Read(filler)",
        "Read(7)",
        r"episode '0', event 1: Read\.text must be a text, not 7 \(int\)",
    ),
    "the choices are one text": (
        ASK,
        'Ask(question, " red", answer, evidence="fact")',
        r"episode '0', event 2: Ask\.choices must be a tuple, not ' red' \(str\)",
    ),
    "the choices are a list": (
        ASK,
        'Ask(question, list(COLOURS), answer, evidence="fact")',
        r"episode '0', event 2: Ask\.choices must be a tuple, not a list of 3",
    ),
    "the answer is no choice": (
        ASK,
        'Ask(question, COLOURS, answer.strip(), evidence="fact")',
        r"episode 0: the answer 'red' is not among the choices",
    ),
    "no tokens to generate": (
        ASK,
        'Ask(question, (), answer, evidence="fact")',
        r"episode 0: a question without choices must say how many tokens to",
    ),
    "the evidence is never read": (
        'Read(fact, tag="fact")',
        "Read(fact)",
        r"episode 0: the evidence 'fact' must be read before its question",
    ),
    "nothing is asked": (
        ", Read(filler), ask)",
        ", Read(filler))",
        r"episode 0: nothing is scored and nothing is asked",
    ),
    "episodes change": (
        'Random(f"colours {seed}")',
        "Random()",
        r"Colours's episodes must be the same every time: episode '0' changed",
    ),
    "plan gives a text": (
        PLAN,
        'return "colours"',
        r"Colours\.plan\(library, pretrained=False\) must give a TrainingPlan, not",
    ),
    "plan names no recipe": (
        PLAN,
        'return TrainingPlan("colours", recipe="tyni")',
        r"Colours\.plan\(library, pretrained=False\) must name a recipe that there.*but it raised UserError: Unknown",
    ),
    "plan takes no pretrained": (
        "library: Library, *, pretrained: bool)",
        "library: Library)",
        r"Colours\.plan must be callable as plan\(library, \*, pretrained\), but it",
    ),
    "corpus gives None": (
        CORPUS,
        "lines.clear()",
        r"Colours\.corpus of 'colours' must give a corpus: something with.*but it gave None",
    ),
    "corpus gives a list": (
        CORPUS,
        "return lines",
        r"Colours\.corpus of 'colours' must give a corpus: something with.*but it gave a list of 500",
    ),
    "ids are floats": (
        LINE,
        "Line(ids.float(), scored, seed=number)",
        r"Line\.ids of Colours\.corpus of 'colours' must be \[tokens\] int64, not a",
    ),
    "nothing of a line is scored": (
        LINE,
        "Line(ids, scored & False, seed=number)",
        r"Line\.scored of Colours\.corpus of 'colours' must be \[tokens\] = \[190\]",
    ),
    "scored is another length": (
        LINE,
        "Line(ids, scored[1:], seed=number)",
        r"Line\.scored of Colours\.corpus of 'colours' must be \[tokens\] = \[190\].*, not a tensor \[189\] of bool",
    ),
    "metrics gives a dict": (
        FOUND,
        "return {e.metric: e.value for e in found}  #",
        r"Colours\.metrics\(samples\) must give a list of Estimate, but it gave a",
    ),
    "metrics gives nothing": (
        FOUND,
        "return []  #",
        r"the first metric must be the headline accuracy, over everything, but",
    ),
    "metrics begins with another": (
        'Estimate("accuracy"',
        'Estimate("share_right"',
        r"the first metric must be the headline accuracy, over everything, but",
    ),
    "metrics begins with a control": (
        FOUND,
        "return found[::-1]  #",
        r"the first metric must be the headline accuracy, over everything, but",
    ),
    "metrics changes the samples": (
        "        found = []\n",
        "        found = []\n        samples['right'] = 1.0\n",
        r"Colours\.metrics\(samples\) must leave the samples as they are: copy",
    ),
    "metrics is turned round": (
        'part["predicted"] == part["answer"]',
        'part["predicted"] != part["answer"]',
        r"accuracy must be better for an oracle \(0\.0\) than for a guess \(0\.75\)",
    ),
    "metrics reads a column that is not there": (
        'part["cluster"], seed',
        'part["document"], seed',
        r"Colours\.metrics\(samples\) must give a list of Estimate, but it raised",
    ),
    "a value is a text": (
        'Estimate("accuracy", value,',
        'Estimate("accuracy", f"{value:.1%}",',
        r"accuracy of Colours\.metrics must have plain numbers as value, low and.*, not Estimate\(metric='accuracy',",
    ),
    "data gives a text": (
        SOURCE,
        'return "colours"',
        r"Colours\.data\(library\) must give a Source with a label and a revision,",
    ),
    "levels gives a list": (
        '    needs = ""',
        '    needs = ""\n    levels = lambda self, library: [1 / 3]',
        r"Colours\.levels\(library\) must be a mapping of names to numbers, not a",
    ),
}


def said_of(text: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    module: Any = ModuleType("colours")
    monkeypatch.setitem(sys.modules, "colours", module)
    exec(compile(text, "colours.py", "exec"), module.__dict__)
    with pytest.raises(AssertionError) as told:
        check_task(made(module.Colours), Library(None, folder, hub=False))
    return str(told.value)


def made(kind: Any) -> Any:
    try:
        return kind(kind.Config(questions=60))
    except TypeError:
        return kind()


@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_is_a_sentence(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old, new, expected = MISTAKES[name]
    assert old in TASK
    said = said_of(TASK.replace(old, new), monkeypatch, tmp_path)
    assert re.search(expected, said), said
    assert len(said.split()) > 7


def test_a_class_is_no_task(tmp_path: Path) -> None:
    for given, what in ((dict, "the class dict"), (None, "None")):
        with pytest.raises(AssertionError, match=f"an instance of a subclass of memory_bench.episode.Task, not {what}"):
            check_task(given, Library(None, tmp_path, hub=False))  # type: ignore[arg-type]
