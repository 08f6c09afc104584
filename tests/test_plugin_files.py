"""Plug-ins that are files or packages: named without a class, refused before anything runs, blamed with their line."""

import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from author_model import CONFIG, FROZEN, METHOD, MODEL, SOURCE, also, method

from memory_bench import plugins
from memory_bench.command import listing
from memory_bench.errors import UserError
from memory_bench.frames import Home, home_of_file, home_of_module, place
from memory_bench.store import Store

Invoke = Callable[..., tuple[int, str, str]]
TASK = (Path(__file__).parents[1] / "examples/memory-bench-example/src/memory_bench_example/colours.py").read_text()
FIT = "@classmethod\n    def fit(cls, card, budget):\n        return MineConfig(segment=card.windw)"


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be prepared, trained or run."""
    from memory_bench.running.executors import Inline

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was run")

    monkeypatch.setattr(Inline, "run", never)


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (CONFIG, "", "mine.py:Mine is no model: it has no Config"),
        (FROZEN, "class MineConfig", "its Config is no frozen dataclass"),
        (FROZEN, "@dataclass\nclass MineConfig", "its Config is no frozen dataclass"),
        ("    segment: int = 8\n", "    slots: int\n    segment: int = 8\n", "its Config.slots has no default"),
        ("def step(", "def forward(", "mine.py:Mine is no model: it has no step"),
        ("def step(", "step = None\n\n    def forward(", "its step is no method step(self, state, segment, *"),
        (
            "segment, *, write=True)",
            "segment)",
            "its step must be callable as step(self, state, segment, *, write=True)",
        ),
        ("config, rng):", "config):", "its __init__ must be callable as __init__(self, backbone, config, rng)"),
        ("(MemoryModel[MineState])", "", "it has no fit, families, ablations"),
        (SOURCE, also('families = "llama"'), "its families are no tuple of names"),
        (SOURCE, also("ablations = None"), "its ablations are no mapping"),
        (
            METHOD,
            method(FIT),
            "fit raised AttributeError: 'BackboneCard' object has no attribute 'windw' (fit in mine.py",
        ),
        ("gain: float = 1.0", "gain: torch.dtype = torch.float32", "its options must be plain data"),
        ("import copy\n", "import absent_package\n", "mine.py cannot be imported: ModuleNotFoundError"),
        ("import copy\n", "import sys; sys.exit(0)\n", "mine.py cannot be imported: SystemExit: 0"),
        ("import copy\n", "import copy copy\n", "mine.py cannot be imported: SyntaxError"),
    ],
)
def test_what_is_no_model_is_refused_before_anything_runs(
    old: str, new: str, said: str, world: Any, invoke: Invoke, tmp_path: Path
) -> None:
    assert old in MODEL
    (tmp_path / "mine.py").write_text(MODEL.replace(old, new))
    for command in ("run", "plan"):
        more = ["--no-controls", *([] if command == "plan" else ["--out", str(tmp_path / "out")])]
        given = [a for a in world.arguments(*more) if command == "run" or a not in ("--executor", "inline")]
        code, _, err = invoke(command, *given, "--tasks", "pg19", "--models", f"{tmp_path}/mine.py:Mine")
        assert code == 2, err
        assert said in " ".join(err.split())
        assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("Config", "Options", "colours.py:Colours is no task: it has no Config"),
        ("questions: int = 60", "questions: int", "its Config.questions has no default"),
        ("def episodes(", "def stream(", "it has no episodes"),
        ('    headline = "accuracy"', "    headline = None", "its headline is no text"),
        (
            "def metrics(self, samples: pd.DataFrame, seed: int = 0)",
            "def metrics(self)",
            "its metrics must be callable",
        ),
        ('TrainingPlan("colours")', 'TrainingPlan(corpse="colours")', "plan raised TypeError"),
        ("import torch\n", "import trch\n", "colours.py cannot be imported: ModuleNotFoundError"),
    ],
)
def test_what_is_no_task_is_refused_before_anything_runs(
    old: str, new: str, said: str, world: Any, invoke: Invoke, tmp_path: Path
) -> None:
    assert old in TASK
    (tmp_path / "colours.py").write_text(TASK.replace(old, new))
    given = world.arguments("--no-controls", "--out", str(tmp_path / "out"))
    code, _, err = invoke("run", *given, "--models", "truncation", "--tasks", f"{tmp_path}/colours.py:Colours")
    assert code == 2, err
    assert said in " ".join(err.split())
    assert "Traceback" not in err


def test_a_file_names_its_models(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MODEL)
    assert plugins.complete("models", str(file)) == plugins.complete("models", f"{file}:") == f"{file}:Mine"
    assert plugins.complete("models", "rmt") == "rmt"
    assert plugins.complete("tasks", "lm-eval:some.py") == "lm-eval:some.py"
    with pytest.raises(UserError, match=r"mine\.py names no class: write .*mine\.py:Mine"):
        plugins.load("models", str(file))
    file.write_text(MODEL + "\n\nclass Other(Mine):\n    pass\n")
    with pytest.raises(UserError, match=r"has several models: choose .*mine\.py:Mine, .*mine\.py:Other\."):
        plugins.complete("models", str(file))
    with pytest.raises(UserError, match=r"Unknown name in .*mine\.py 'Othr'. Did you mean Other\?"):
        plugins.load("models", f"{file}:Othr")
    with pytest.raises(UserError, match=r"MineState is no model: it has no Config.* The file has .*mine\.py:Mine"):
        plugins.load("models", f"{file}:MineState")
    file.write_text(MODEL.replace(CONFIG, ""))
    with pytest.raises(UserError, match=r"has no model: MineConfig is none: .*; Mine is none: it has no Config"):
        plugins.complete("models", str(file))
    file.write_text("import torch\n")
    with pytest.raises(UserError, match=r"mine\.py has no task: it defines no class"):
        plugins.complete("tasks", str(file))
    with pytest.raises(UserError, match=r"There is no file .*mina\.py to load from\. Did you mean .*mine\.py\?"):
        plugins.complete("models", str(tmp_path / "mina.py"))


def test_a_run_takes_files_without_classes(world: Any, invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODEL)
    (tmp_path / "colours.py").write_text(TASK)
    task = f"{tmp_path}/colours.py"
    more = ["--no-controls", "--set", f"{task}.between=2", "--limit", f"{task}=2", "--out", str(tmp_path / "out")]
    code, _, err = invoke("run", *world.arguments(*more), "--models", f"{tmp_path}/mine.py[gain=0.5]", "--tasks", task)
    assert code == 0, err
    (record,) = {r.cell.label: r for r in Store(tmp_path / "out").records()}.values()
    assert record.cell.training.model.name == f"{tmp_path}/mine.py:Mine"
    assert record.cell.label == "mine[gain=0.5]"
    assert (record.cell.task.name, record.cell.limit) == (f"{task}:Colours", 2)
    assert record.cell.task.config["between"] == 2


def test_broken_packages_cost_a_line_of_the_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever their import does: every row of ours is as before, and what they print is no result."""
    texts = {
        "raises": "raise RuntimeError('not today')",
        "exits": "print('hello')\nraise SystemExit(3)",
        "misses": "import absent_package",
        "nomodel": "class Model:\n    pass",
        "good": MODEL.replace("class Mine(", "class Model("),
    }
    for name, text in texts.items():
        (tmp_path / f"h8_{name}").mkdir()
        (tmp_path / f"h8_{name}" / "__init__.py").write_text(text if name == "exits" else "")
        (tmp_path / f"h8_{name}" / "model.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    entries = [EntryPoint(name, f"h8_{name}.model:Model", "memory_bench.models") for name in texts]
    entries += [EntryPoint("near", "h8_good.model:Modle", "memory_bench.models")]
    entries += [EntryPoint("odd", "what is this", "memory_bench.models")]
    real = plugins.entry_points
    ours = {row["name"]: row for row in listing.rows("models", None, tmp_path)}
    monkeypatch.setattr(
        plugins, "entry_points", lambda group: [*real(group=group), *(entries if group.endswith("models") else [])]
    )
    rows = {row["name"]: row for row in listing.rows("models", None, tmp_path)}
    assert {name: rows[name] for name in ours} == ours
    assert "RuntimeError: not today" in rows["raises"]["status"]
    assert "h8_raises/model.py line 1" in rows["raises"]["status"]
    assert all(rows[name]["status"].startswith("broken: ") for name in ("exits", "odd"))
    assert "No module named 'absent_package'" in rows["misses"]["status"]
    assert "it has no Config" in rows["nomodel"]["status"]
    assert "did you mean Model?" in rows["near"]["status"]
    assert rows["good"]["status"] == "installed"
    for name in [name for name in sys.modules if name.startswith("h8_")]:
        del sys.modules[name]


def test_the_line_is_the_plugins_own(tmp_path: Path) -> None:
    """The last frame inside, not torch's; helpers beside it count, a virtual environment in its folder does not."""
    library = tmp_path / "venv" / "site-packages"
    library.mkdir(parents=True)
    parts = {
        "helper.py": "def help(f):\n    f()",
        "venv/site-packages/deep.py": "def fail():\n    raise ValueError('x')",
    }
    for name, text in parts.items():
        (tmp_path / name).write_text(text)
    spaces: dict[str, Any] = {}
    for name, text in parts.items():
        exec(compile(text, str(tmp_path / name), "exec"), spaces.setdefault(name, {"__name__": Path(name).stem}))
    helper, deep = (spaces[name] for name in parts)
    with pytest.raises(ValueError, match="x") as raised:
        helper["help"](deep["fail"])
    home = home_of_file(tmp_path / "bad.py")
    assert place(raised.value, [home]) == "help in helper.py line 2"
    assert place(raised.value, [Home("other_package")]) == ""
    assert home_of_module("memory_bench.baselines.rmt").package == "memory_bench.baselines"
    outer = RuntimeError("of the harness")
    outer.__cause__ = raised.value
    assert place(outer, [home]) == "help in helper.py line 2"


def test_a_shipped_models_line_is_named_by_its_package(monkeypatch: pytest.MonkeyPatch, make_backbone: Any) -> None:
    from memory_bench.budget import Budget
    from memory_bench.testing import card_of

    cls, backbone = plugins.load("models", "truncation"), make_backbone("llama")
    model = cls(backbone, cls.fit(card_of(backbone), Budget("t")), None)
    with pytest.raises(AttributeError) as raised:
        model.step(model.open(1), None)
    assert "baselines/truncation.py line " in place(raised.value, [home_of_module(cls.__module__)])
