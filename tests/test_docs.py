"""The documents: the example is a model, commands exist, links lead somewhere."""

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_architecture import ROOT
from typer.main import get_command

from memory_bench import plugins
from memory_bench.backbone.model import Backbone
from memory_bench.backbone.small import TINY, small_card, small_model
from memory_bench.budget import PRESETS
from memory_bench.cli import app
from memory_bench.testing import Check, model_checks

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "results").glob("*.md")])


def code_of(text: str) -> list[str]:
    """Code blocks and code within lines."""
    block = r"^```.*?^```"
    return re.findall(block, text, flags=re.M | re.S) + re.findall(
        r"`([^`]+)`", re.sub(block, "", text, flags=re.M | re.S)
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_files_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = set(re.findall(r"\]\((?!http)([^)#]+)\)", text))
    assert not [link for link in named if not (document.parent / link).exists()]
    files = set(re.findall(r"`((?:memory_bench|hmt|baselines|tasks|tests|docs|results)/[\w/.-]+\.\w+)`", text))
    assert not [file for file in files if not (ROOT / file).exists()]


def test_comments_name_files_that_exist() -> None:
    folders = "memory_bench|hmt|baselines|tasks|tests|docs|benchmarks"
    own = (file for folder in (*folders.split("|"), "results/claims") for file in (ROOT / folder).rglob("*"))
    for file in sorted(f for f in own if f.suffix in (".py", ".toml")):
        named = re.findall(rf"(?<![\w/.-])(?:{folders})/[\w/]+\.(?:py|md|toml)\b", file.read_text(encoding="utf-8"))
        assert not [name for name in named if not (ROOT / name).exists()], file


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_exist(document: Path) -> None:
    command: Any = get_command(app)
    named = 0
    for code in code_of(document.read_text(encoding="utf-8")):
        for name, rest in re.findall(r"memory-bench ([a-z][\w-]*)([^\n&]*)", code):
            named += 1
            assert name in command.commands, f"memory-bench {name}"
            if command.commands[name].context_settings.get("ignore_unknown_options"):
                continue  # it hands them on
            known = {option for parameter in command.commands[name].params for option in parameter.opts}
            assert set(re.findall(r"--[\w-]+", rest)) <= known, f"memory-bench {name}{rest}"
    assert named or document.name != "README.md"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The model of the readme."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    source = re.findall(r"```python\n(.*?)```", text, flags=re.S)[0]
    module = ModuleType("example")
    exec(compile(source, "README.md", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("check", model_checks(), ids=lambda check: check.__name__)
def test_the_example_is_a_memory_model(
    check: Check, example: ModuleType, make_backbone: Callable[..., Backbone]
) -> None:
    config = example.EchoConfig(segment=8, kept=3)
    check(lambda: example.Echo(make_backbone("qwen3"), config, torch.Generator().manual_seed(0)))


def test_the_example_of_a_task_is_one(tmp_path: Path) -> None:
    """Task and test of the contributors' page, as they stand there."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    sources = [block for block in re.findall(r"```python\n(.*?)```", text, flags=re.S) if "Colours" in block]
    module = ModuleType("contributing")
    for source in sources:
        exec(compile(source, "CONTRIBUTING.md", "exec"), module.__dict__)
    assert len(sources) == 2
    module.__dict__["test_colours"](tmp_path)
    example = ROOT / "examples/memory-bench-example/src/memory_bench_example/colours.py"
    bare = [line for line in example.read_text(encoding="utf-8").splitlines() if '"""' not in line and line.strip()]
    assert bare == [line for line in sources[0].splitlines() if '"""' not in line and line.strip()]


def test_the_number_of_promises_is_said_right() -> None:
    assert f"{len(model_checks())} promises" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_costs_of_models_that_no_board_has_yet_are_their_own_counts() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tiny, card = small_model(TINY, torch.Generator().manual_seed(0)), small_card("tiny", TINY, "")

    def per_token(name: str) -> float:
        kind = plugins.load("models", name)
        model = kind(tiny, kind.fit(card, PRESETS["cpu-minutes"]), torch.Generator().manual_seed(0))
        step = model.traits.segment or card.window
        return float(sum(model.flops(step, start) for start in range(0, 2048, step))) / 2048

    new = (
        *("autocompressor", "emllm", "extended-mind", "infini-attention", "infllm", "memlong", "memoryprompt"),
        *("sirllm", "ttt", "unimix"),
    )
    for name in new:
        said = re.search(rf"^\| `{name}` \| [^|]* \| ([\d.]+)(, growing)? \|", text, flags=re.M)
        assert said is not None, name
        assert float(said[1]) == pytest.approx(per_token(name) / per_token("truncation"), abs=0.0051), name


def test_every_finding_is_listed() -> None:
    text = (ROOT / "findings" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([^`]+)`", text, flags=re.M)) == {p.name for p in (ROOT / "findings").glob("*.sh")}
