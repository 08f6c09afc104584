"""From names to cells: what is run, what is the same, what is refused."""

import shutil
from dataclasses import replace
from importlib import resources
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from memory_bench import plugins
from memory_bench.budget import PRESETS, Budget, load_budget
from memory_bench.cell import from_json, to_json
from memory_bench.command.commands import prepare
from memory_bench.data.library import Library
from memory_bench.errors import UserError
from memory_bench.running.grid import Grid, Request, plan_grid, split_names
from memory_bench.running.options import Options, parse_limits, parse_seeds, read_suite
from memory_bench.summaries import summarise
from memory_bench.zoo.named import Backbones

FILE = '''
from __future__ import annotations
from dataclasses import dataclass
from memory_bench.zoo.pretrain import Window

@dataclass(frozen=True, slots=True)
class Config:
    segment: int = 8
    share: float | None = None

class Scratch(Window):
    """A model that nobody installed."""
    Config = Config
    def __init__(self, backbone, config, rng):
        super().__init__(backbone, config)
'''


def grid(world: Any, models: str = "rmt", tasks: str = "pg19", **more: Any) -> Grid:
    library = Library(world.data, world.cache, hub=False)
    budget = more.pop("budget", load_budget(str(world.budget)))
    request = Request(
        split_names(models), split_names(tasks), more.pop("backbone", str(world.backbone)), budget,
        more.pop("seeds", (0,)), **more,
    )  # fmt: skip
    return plan_grid(request, library, Backbones(library, world.cache, hub=False))


def titles(found: Grid) -> list[tuple[str, str, int, str]]:
    return [(c.label, c.task.name, c.training.seed, c.role) for c in found.cells]


def test_cells_are_the_product_asked_ones_first(world: Any) -> None:
    found = titles(grid(world, "rmt,truncation", "pg19,pubmedqa", seeds=(0, 7)))
    assert found[:4] == [("rmt", "pg19", 0, "asked"), ("rmt", "pg19", 7, "asked"), ("truncation", "pg19", 0, "asked"),
                         ("truncation", "pg19", 7, "asked")]  # fmt: skip
    assert found[4:6] == [("xl-cache", "pg19", 0, "control"), ("xl-cache", "pg19", 7, "control")]
    assert len(found) == 12


def test_controls_can_be_left_out(world: Any) -> None:
    found = grid(world, "rmt", controls=False)
    assert titles(found) == [("rmt", "pg19", 0, "asked")]
    assert not found.cells[0].controls


def test_ablations_come_along_as_controls(world: Any) -> None:
    cls = plugins.load("models", "hmt")
    expected = {f"hmt ({title})" for title in cls.ablations}
    assert expected <= {c.label for c in grid(world, "hmt").cells if c.role == "control"}
    changed = {c.label: c.training.model.config for c in grid(world, "hmt", settings={"hmt": {"segment": 8}}).cells}
    for title, change in cls.ablations.items():
        assert change.items() <= changed[f"hmt ({title})"].items()
        assert changed[f"hmt ({title})"]["segment"] == 8


def test_names_may_carry_options(world: Any) -> None:
    assert split_names("hmt[a=1,b=2], rmt,,mplus") == ("hmt[a=1,b=2]", "rmt", "mplus")
    cells = grid(world, "rmt[memory_tokens=2,segment=4],rmt", controls=False).cells
    assert [c.label for c in cells] == ["rmt[memory_tokens=2,segment=4]", "rmt"]
    assert (cells[0].training.model.config["memory_tokens"], cells[0].training.model.config["segment"]) == (2, 4)
    assert cells[0].key != cells[1].key


def test_options_win_over_settings(world: Any) -> None:
    cells = grid(world, "rmt[segment=4],rmt", controls=False, settings={"rmt": {"segment": 8}}).cells
    assert [c.training.model.config["segment"] for c in cells] == [4, 8]


def test_the_same_cell_is_run_once(world: Any) -> None:
    config = grid(world, "rmt", controls=False).cells[0].training.model.config
    same = f"rmt[memory_tokens={config['memory_tokens']}]"
    assert titles(grid(world, f"rmt,rmt,{same}", "pg19,pg19", controls=False)) == [("rmt", "pg19", 0, "asked")]
    assert [c.role for c in grid(world, "truncation[segment=16]").cells if "truncation" in c.label] == ["asked"]


def test_models_are_sized_to_the_backbone_and_the_budget(world: Any) -> None:
    (cell,) = grid(world, "hmt", controls=False, budget=Budget("b", train_tokens=5, added_parameters=600)).cells
    assert cell.training.model.config["segment"] == 16
    assert cell.training.model.config["recall_width"] < 32


def test_keys_change_with_what_changes_numbers_and_with_nothing_else(world: Any) -> None:
    (cell,) = grid(world, "rmt", controls=False).cells
    same = [replace(cell, role="control", label="x"), _budget(cell, seeds=9), from_json(to_json(cell))]
    assert {c.key for c in same} == {cell.key}
    other = [
        replace(cell, limit=4),
        replace(cell, controls=True),
        _budget(cell, eval_seconds=9),
        _budget(cell, train_tokens=9),
    ]
    assert len({c.key for c in [cell, *other]}) == 5
    shared = [*same, *other[:3]]
    assert {c.training.key for c in shared} == {cell.training.key}
    assert other[3].training.key != cell.training.key
    pubmedqa = grid(world, "rmt", "pubmedqa", controls=False).cells[0]
    assert pubmedqa.training.key == cell.training.key, "zero-shot on a pretrained backbone: the books serve both"


def _budget(cell: Any, **changes: Any) -> Any:
    return replace(cell, training=replace(cell.training, budget=replace(cell.training.budget, **changes)))


def test_other_data_are_other_cells(world: Any, tmp_path: Path) -> None:
    (before,) = grid(world, controls=False).cells
    shutil.copytree(world.data, tmp_path / "data")
    (same,) = grid(replace(world, data=tmp_path / "data"), controls=False).cells
    assert same.key == before.key
    (tmp_path / "data/pg19/books_validation.jsonl.gz").unlink()
    (other,) = grid(replace(world, data=tmp_path / "data"), controls=False).cells
    assert other.key != before.key


def test_the_stand_ins_own_backbone_and_training_take_over(world: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    cells = grid(replace(world, data=tmp_path / "data"), "rmt", "pubmedqa", budget=Budget("b")).cells
    assert {(c.training.backbone.name, c.training.recipe.name) for c in cells} == {("invented-studies",) * 2}
    assert cells[0].task.config["data"] == "pubmedqa (stand-in: invented studies)"


def test_a_training_without_an_end_is_refused(world: Any) -> None:
    with pytest.raises(UserError, match="'endless' never ends training: set train_tokens"):
        grid(world, budget=Budget("endless", eval_seconds=5))
    assert grid(world, budget=Budget("none", train_tokens=0)).cells


def test_a_model_in_a_file(world: Any, tmp_path: Path) -> None:
    """With dataclasses whose annotations are text, and settings by the class's name."""
    (tmp_path / "scratch.py").write_text(FILE)
    name = f"{tmp_path}/scratch.py:Scratch"
    (cell,) = grid(world, name, controls=False, settings={"scratch": {"share": 0.5}}).cells
    assert (cell.label, cell.training.model.config) == ("scratch", {"segment": 16, "share": 0.5})
    assert plugins.load("models", name) is plugins.load("models", name)
    with pytest.raises(UserError, match=r"scratch\[share=much\].share: Input should be a valid number"):
        grid(world, f"{name}[share=much]")
    with pytest.raises(UserError, match=r"Unknown name in .*scratch.py 'Scrath'. Did you mean Scratch?"):
        grid(world, name.replace(":Scratch", ":Scrath"))
    (tmp_path / "scratch.py").write_text("import absent_package")
    with pytest.raises(UserError, match="cannot be imported: ModuleNotFoundError"):
        grid(world, name)


def test_a_broken_package_costs_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [EntryPoint("gone", "absent_package.model:Model", "memory_bench.models"),
               EntryPoint("other", "memory_bench.zoo.pretrain:Nobody", "memory_bench.models")]  # fmt: skip
    real = plugins.entry_points
    monkeypatch.setattr(
        plugins, "entry_points", lambda group: [*real(group=group), *(entries if group.endswith("models") else [])]
    )
    found = {name: summarise(entry) for name, entry in plugins.installed("models").items()}
    assert "No module named" in found["gone"].broken or "not installed" in found["gone"].broken
    assert found["other"].broken == "memory_bench.zoo.pretrain has no class Nobody"
    assert not found["rmt"].broken
    with pytest.raises(UserError, match="The model 'gone' of package unknown cannot be loaded"):
        plugins.load("models", "gone")


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("0.5", 0.5), ("true", True), ("half", "half"), ('"3"', "3"), ("[1, 2]", [1, 2]), ("a = 1", "a = 1")],
)
def test_values_are_read_like_toml(text: str, value: Any) -> None:
    assert plugins.parse_value(text) == value


def options(world: Any, **changes: Any) -> Options:
    plain = Options(
        "",
        "",
        "",
        "",
        "",
        "",
        world.data,
        True,
        None,
        "",
        (),
        True,
        "inline",
        "",
        False,
        True,
        False,
        world.cache,
        False,
    )
    return replace(plain, **changes)


def test_a_suite_fills_what_the_command_line_leaves_open(world: Any, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(
        f'# A suite.\nmodels = ["rmt", "hmt[recall=false]"]\ntasks = "pg19"\nbackbone = "{world.backbone}"\n'
        f'budget = "{world.budget}"\nseeds = [3, 5]\nlimit = "pg19=2"\n[set]\n"rmt.segment" = 4\n'
    )
    found = prepare(options(world, suite=str(tmp_path / "s.toml"), controls=False))
    assert titles(found.grid) == [(m, "pg19", s, "asked") for m in ("rmt", "hmt[recall=false]") for s in (3, 5)]
    assert found.grid.cells[0].training.model.config["segment"] == 4
    assert found.grid.cells[0].limit == 2
    assert found.out.name.startswith("s-")
    found = prepare(
        options(world, suite=str(tmp_path / "s.toml"), controls=False, seeds="1", settings=("rmt.segment=8",))
    )
    assert [c.training.seed for c in found.grid.cells] == [0, 0]
    assert found.grid.cells[0].training.model.config["segment"] == 8
    (tmp_path / "s.toml").write_text('model = "rmt"')
    with pytest.raises(UserError, match=r"Unknown entry in the suite .* 'model'. Did you mean models?"):
        prepare(options(world, suite=str(tmp_path / "s.toml")))


def test_shipped_suites_can_be_read() -> None:
    names = [
        f.name.removesuffix(".toml") for f in resources.files("memory_bench.suites").iterdir() if ".toml" in f.name
    ]
    assert names
    for name in names:
        assert read_suite(name)["models"]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_end_every_training(name: str) -> None:
    budget = PRESETS[name]
    assert any(v is not None for v in (budget.train_tokens, budget.train_flops, budget.train_seconds))
    assert load_budget(name) is budget


@pytest.mark.parametrize(
    ("text", "seeds"), [("", (0, 1)), ("3", (0, 1, 2)), ("0,7", (0, 7)), ("5,", (5,)), ("1,1", (1,))]
)
def testparse_seeds(text: str, seeds: tuple[int, ...], world: Any) -> None:
    assert parse_seeds(text, 2) == seeds


def test_limits_are_for_all_tasks_or_for_named_ones() -> None:
    assert parse_limits("") == {}
    assert parse_limits("8") == {"": 8}
    assert parse_limits("pg19=3, pubmedqa=100") == {"pg19": 3, "pubmedqa": 100}
    for wrong in ("0", "-1", "x", "pg19=", "pg19=0", "pg19=3.5", "=3", "3,4", "pg19=3,pg19=4"):
        with pytest.raises(UserError, match="--limit"):
            parse_limits(wrong)


def test_a_limit_is_refused_for_a_task_that_does_not_run(world: Any) -> None:
    limited = options(world, models="rmt", tasks="pg19", limit="pg18=2", backbone=str(world.backbone))
    with pytest.raises(UserError, match="Did you mean pg19"):
        prepare(limited)


@pytest.mark.parametrize(
    ("model", "setting", "said"),
    [("memorizing", "memorizing.layers=[9]", "layers 0 to 1"), ("longmem", "longmem.retrieval_layer=9", "use 0 to 1")],
)
def test_options_that_do_not_fit_the_backbone_are_refused(world: Any, model: str, setting: str, said: str) -> None:
    asked = options(world, models=model, tasks="pg19", backbone=str(world.backbone), settings=(setting,))
    with pytest.raises(UserError, match=said):
        prepare(asked)
