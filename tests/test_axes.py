"""What kind of memory a model has: said in the same words by lists, README, records and boards."""

import dataclasses
import json
import re
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from typer.testing import CliRunner

from memory_bench.axes import NAMES, Axes, in_words
from memory_bench.cli import app
from memory_bench.report.build import build
from memory_bench.store import Store
from synthetic import TASKS, make_store

ROOT = Path(__file__).parents[1]
SHIPPED = {e.name: e for e in entry_points(group="memory_bench.models") if e.value.startswith("memory_bench.")}


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_every_model_says_where_it_stands_and_readme_says_the_same(name: str) -> None:
    axes = SHIPPED[name].load().axes
    assert isinstance(axes, Axes)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    compared = text[text.index("## What is compared") :]
    assert re.search(rf"^\| `{name}` \| {re.escape(in_words(dataclasses.asdict(axes)))} \|", compared, flags=re.M)


def test_lists_show_it_without_importing_a_model() -> None:
    listed = {e["name"]: e for e in json.loads(CliRunner().invoke(app, ["list", "models", "--json"]).output)}
    for name, entry in SHIPPED.items():
        assert listed[name]["axes"] == dataclasses.asdict(entry.load().axes), name
    said = CliRunner().invoke(app, ["list", "models", "--grep", "longmem"]).output
    assert "chunk kv, drop oldest; by similarity per token; side network, gated mix." in said


def test_words_that_no_axis_has_are_refused_with_those_it_has() -> None:
    with pytest.raises(ValueError, match=r"axes.unit is 'tokens'; it is one of: none; token kv"):
        Axes(unit="tokens")  # type: ignore[arg-type]
    assert in_words(None) == "not said"
    assert in_words(dataclasses.asdict(Axes())) == "no memory"


def test_a_board_can_be_ordered_by_an_axis(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run")
    kinds = {"rmt": Axes(unit="segment vectors"), "hmt": Axes(unit="segment vectors"), "truncation": Axes()}
    for record in store.records():
        if axes := kinds.get(record.cell.training.model.name):
            said = {**record.provenance, "axes": dataclasses.asdict(axes)}
            store.write_record(dataclasses.replace(record, provenance=said), store.samples(record.key))
    report = build(Store.open(store.folder), TASKS, axis="unit")
    assert not report.warnings
    markdown = report.markdown()
    board = [line for line in markdown.split("\n### ")[1].split("\n") if line.startswith("|")]
    cut = [[cell.strip() for cell in line.split("|")[1:3]] for line in board]
    assert cut[0] == ["model", "unit"]
    end = next(i for i, cells in enumerate(cut[2:], 2) if cells[0] == "model")
    found = [cells[1] for cells in cut[2:end]]
    groups = [unit for i, unit in enumerate(found) if i == 0 or found[i - 1] != unit]
    assert sorted(groups) == ["none", "not said", "segment vectors"]  # each is one stretch of rows
    assert ">unit</th>" in report.html()
    assert ">unit</th>" not in build(Store.open(store.folder), TASKS).html()


def test_an_axis_that_is_none_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run")
    result = CliRunner().invoke(app, ["report", str(store.folder), "--group-by", "unlt"])
    assert result.exit_code != 0
    assert "unit" in NAMES
    assert "Did you mean unit?" in str(result.exception) + result.output
