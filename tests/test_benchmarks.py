"""The benchmarks run: every task of the speed table on a backbone of a few weights."""

import importlib
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
