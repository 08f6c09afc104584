"""The benchmarks run: every task of the speed table on a backbone of a few weights."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from memory_bench import plugins

SCRIPTS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def adapters(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.delitem(sys.modules, "adapters", raising=False)
    return importlib.import_module("adapters")


@pytest.mark.parametrize("title", ["rmt", "memoryllm", "mplus + LoRA"])
def test_speed_is_measured_and_predicted(adapters: ModuleType, title: str) -> None:
    setting = next(s for s in adapters.settings(layers=2) if s.title == title)
    with torch.random.fork_rng():
        backbone = adapters.llama(hidden=32, layers=2, vocab=64)
    rows = adapters.measure(setting, backbone, 1, sizes=(512, 512))
    assert [row.task for row in rows] == list(setting.tasks)
    for row in rows:
        assert row.low <= row.ratio <= row.high
        assert row.model_tokens_per_second > 0
        assert 0.5 < row.predicted < 50, row
        assert row.official is setting.tasks[row.task]
    assert adapters.shown(rows[0]).startswith(title)


def test_settings_fit_their_models(adapters: ModuleType) -> None:
    for setting in adapters.settings(layers=2):
        if setting.model in plugins.installed("models"):
            plugins.load("models", setting.model).Config(**setting.config)


def test_the_device_script_keeps_what_it_has_when_an_item_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    device = importlib.import_module("device")
    hangs, ends = (sys.executable, "-c", "import time; time.sleep(60)"), (sys.executable, "-c", "print('measured')")
    asked = [device.Item("hangs", hangs, 0.2), device.Item("ends", ends, 0.7), device.Item("late", ends, 0.0)]
    told = device.run(asked, tmp_path, 10.0)
    assert [t["ended"] for t in told] == ["stopped after 2 s", "exit code 0", "no time left"]
    assert (tmp_path / "ends.log").read_text() == "measured\n"
    rows = list(device.streams("cpu", [64], ["truncation"], 32))
    assert rows[0]["tokens_per_second"] > 0
    for item in device.items(tmp_path, None, True):
        assert item.command[0] == sys.executable


def test_a_checkout_is_measured_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`against.py`: each side runs its own package, and a ratio is one of pairs."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    against = importlib.import_module("against")
    side = against.checkout("", tmp_path / "here")
    code = "import memory_bench.baselines.parts as p, memory_bench.cli as c; print(p.__file__); print(c.__file__)"
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, env=side.environment(), capture_output=True, text=True, check=True)
    assert all(line.startswith(f"{side.folder}/memory_bench/") for line in done.stdout.splitlines())
    line = against.Line("step", "s", [2.0, 4.0, 8.0], [1.0, 1.0, 6.0], "equal")
    assert line.ratio == (0.5, 0.375, 0.625)
    calls = [lambda: told.append("before"), lambda: told.append("after")]
    told: list[str] = []
    against.paired(calls, 2)
    assert told == ["before", "after", "after", "before"]


def test_steps_of_a_checkout_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """What both sides compute can be compared bit by bit: a second process would tell the same."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    steps = importlib.import_module("steps")
    monkeypatch.setattr(steps, "SEGMENT", 8)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 30, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 64}  # fmt: skip
    monkeypatch.setattr(steps, "SHAPE", steps.SHAPE | small)
    monkeypatch.setattr(steps, "MODELS", {name: (*made[:2], 20) for name, made in steps.MODELS.items()})
    with torch.random.fork_rng():
        for line in ("memorizing", "full-context"):
            first, again = (steps.streaming(line)() for _ in range(2))
            assert first["digest"] == again["digest"]
            assert first["seconds"] > 0 < first["window"]
