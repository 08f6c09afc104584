"""Budget presets are files, read like a user's own; what they say is part of every key."""

import importlib
import tomllib
from pathlib import Path

import pytest
from test_architecture import ROOT

from memory_bench.budget import PRESETS, load_budget
from memory_bench.command.listing import rows
from synthetic import make_cell

FOLDER = ROOT / "memory_bench" / "budgets"
KEYS = {
    "cpu-minutes": "336bb33a7993385e",
    "cpu-minutes-flops": "7a39e74fa9dc2396",
    "cpu-smol": "445ca1436cd5af87",
    "gpu-24g-hour": "deb1c899671aaf15",
    "gpu-80g-hour": "fd64bca85e227523",
    "gpu-minutes": "4685883386a004fc",
    "smoke": "3657937530dcaa22",
}
"""Of one cell under each preset, as they were when presets were written in Python."""


@pytest.mark.parametrize("name", KEYS)
def test_keys_under_presets_stay(name: str) -> None:
    assert make_cell("rmt", budget=name).key == KEYS[name]


def test_every_preset_is_a_file_that_a_user_may_copy(tmp_path: Path) -> None:
    assert set(PRESETS) == {file.stem for file in FOLDER.glob("*.toml")}
    for name, budget in PRESETS.items():
        copy = tmp_path / f"{name}.toml"
        copy.write_bytes((FOLDER / f"{name}.toml").read_bytes())
        assert load_budget(str(copy)) == budget
        assert budget.name == name


@pytest.mark.parametrize("name", PRESETS)
def test_presets_say_what_they_are_for_in_a_line(name: str) -> None:
    text = (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert text.splitlines()[0].endswith(".")
    values = tomllib.loads(text)
    assert "name" not in values, "the file's name is the preset's"


def test_the_list_shows_limits_in_units(tmp_path: Path) -> None:
    listed = {row["name"]: row for row in rows("budgets", None, tmp_path)}
    assert set(listed) == set(PRESETS)
    said = listed["cpu-minutes"]["summary"]
    assert "device_bytes 4 GB, host_bytes 6 GB, train_seconds 600 s, train_tokens 204,800" in said
    assert listed["gpu-80g-day"]["limits"]["device_bytes"] == 80_000_000_000


def test_the_papers_settings_are_their_numbers() -> None:
    """Steps times rows times tokens, as the sources in the files say them."""
    assert PRESETS["paper-hmt"].train_tokens == 2 * (200 * 2048 + 500 * 15360)
    assert PRESETS["paper-rmt"].train_tokens == 2 * 700 * 2048
    assert PRESETS["paper-armt"].train_tokens == 36_000 * 32 * 8 * 128


def test_the_page_of_budgets_is_what_presets_and_models_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    made = importlib.import_module("budgets")
    page = made.PAGE.read_text(encoding="utf-8")
    assert set(made.MEANT) == set(PRESETS)
    assert made.renewed(page) == page, "`python benchmarks/budgets.py` rewrites it"
