"""The command line: exit codes, sentences, and what is not imported."""

import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memory_bench.cli import app
from memory_bench.command import commands
from memory_bench.store import Store

COMMANDS = [c.name or c.callback.__name__ for c in app.registered_commands if c.callback is not None]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(invoke: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """``call(*arguments)``: exit code, standard output and standard error of a command, run in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return invoke


def sentence(err: str) -> str:
    """The error, which must be one line without a traceback."""
    lines = [line for line in err.splitlines() if line.strip()]
    assert "Traceback" not in err
    assert len(lines) == 1, err
    assert lines[0].startswith("Error: ")
    return lines[0]


def environment(world: Any) -> dict[str, str]:
    return {**os.environ, **world.environment()}


BASIC = ("--models", "rmt", "--tasks", "pg19")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--models", "hmtt", "--tasks", "pg19"), "Unknown model 'hmtt'. Did you mean hmt?"),
        (("--models", "hm", "--tasks", "pg19"), "Unknown model 'hm'. Did you mean hmt?"),
        (("--models", "rmt", "--tasks", "pg-19"), "Unknown task 'pg-19'. Did you mean pg19?"),
        (("--models", "rmt"), "Give --models and --tasks"),
        ((*BASIC, "--budget", "cpu-minute"), "Unknown budget 'cpu-minute'. Did you mean cpu-minutes?"),
        ((*BASIC, "--budget", "absent.toml"), "Cannot read the budget file absent.toml"),
        ((*BASIC, "--set", "rmt.segmnt=4"), "Unknown option of rmt 'segmnt'. Did you mean segment?"),
        ((*BASIC, "--set", "rmt.segment=four"), "rmt.segment: Input should be a valid integer"),
        ((*BASIC, "--set", "rmt.segment=0"), "segment must be at least 1"),
        ((*BASIC, "--set", "hmt.segment=4"), "'hmt' is no model or task of this run"),
        ((*BASIC, "--set", "segment=4"), "write model.option=value"),
        ((*BASIC, "--set", "pg19.extent=all"), "extent is 'full' or 'bytes:FIRST-LAST'"),
        (("--models", "rmt[segment]", "--tasks", "pg19"), "Cannot read the option 'segment' of rmt"),
        (("--models", "rmt[", "--tasks", "pg19"), "Cannot read the model 'rmt['"),
        (("--models", "./absent.py:Model", "--tasks", "pg19"), "There is no file ./absent.py"),
        ((*BASIC, "--backbone", "tiny-lama"), "Unknown backbone 'tiny-lama'"),
        ((*BASIC, "--backbone", "."), "no model folder"),
        ((*BASIC, "--seeds", "many"), "give a number of seeds (3) or a list of them (0,1,7)"),
        ((*BASIC, "--seeds", "0"), "there must be at least one"),
        ((*BASIC, "--seeds", "-1"), "seeds must not be negative"),
        ((*BASIC, "--executor", "remote"), "Unknown executor 'remote'"),
        ((*BASIC, "--retry", "all"), "Unknown value of --retry 'all'"),
        ((*BASIC, "--suite", "absent"), "Unknown suite 'absent'"),
        ((*BASIC, "--data", "absent"), "The data folder absent cannot be used: No such file or directory"),
    ],
)
def test_a_mistake_is_a_sentence(arguments: tuple[str, ...], said: str, world: Any, call: Run) -> None:
    code, out, err = call("run", *world.arguments(), *arguments)
    assert code == 2
    assert said in sentence(err)
    assert not out
    assert not list(Path().iterdir()), "nothing was begun"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("train_tokens = -5", "train_tokens = -5 is negative"),
        ("seeds = 0", "seeds = 0 is negative or too small"),
        ("train_token = 5", "Unknown limit in the budget file 'train_token'. Did you mean train_tokens?"),
        ('train_tokens = "many"', "train_tokens must be a number, not 'many'"),
        ("train_tokens = nan", "train_tokens = nan is negative or too small, or no number"),
        ("eval_seconds = inf", "eval_seconds = inf"),
        ("train_tokens = 5 5", "Cannot read the budget file"),
        ("tasks = 5", "tasks must be tables of options"),
        ("[tasks]\npg19 = 5", "tasks must be tables of options"),
        (
            "train_tokens = 5\n[tasks.pg91]\nextent = 'full'",
            "Unknown task in the budget 'b' 'pg91'. Did you mean pg19?",
        ),
        ("eval_seconds = 5", "never ends training"),
    ],
)
def test_a_wrong_budget_is_a_sentence(content: str, said: str, world: Any, call: Run, tmp_path: Path) -> None:
    (tmp_path / "b.toml").write_text(content)
    code, _, err = call("run", *world.arguments("--budget", str(tmp_path / "b.toml")), *BASIC)
    assert code == 2
    assert said in sentence(err)


@pytest.mark.parametrize(
    "content",
    [
        b"no gzip",
        gzip.compress(b"no json\n"),
        gzip.compress(b'{"pg_id": 1}\n'),
        gzip.compress(b"")[:-4],
        gzip.compress(b""),
    ],
    ids=["no gzip", "no json", "no text", "cut off", "empty"],  # gzip's bytes hold the time: no names for xdist
)
def test_corrupt_data_are_a_sentence_before_anything_trains(
    content: bytes, world: Any, call: Run, tmp_path: Path
) -> None:
    shutil.copytree(world.data, tmp_path / "data")
    (tmp_path / "data/pg19/books_train.jsonl.gz").write_bytes(content)
    out = tmp_path / "out"
    code, _, err = call("run", *world.arguments("--data", str(tmp_path / "data"), "--out", str(out)), *BASIC)
    assert code == 2
    assert "books_train.jsonl.gz" in sentence(err)
    assert not list(out.glob("cells/*"))


@pytest.mark.parametrize(
    ("content", "said"), [("{", "config.json"), ('{"model_type": "bert"}', "'bert' is not a supported backbone")]
)
def test_a_corrupt_backbone_is_a_sentence(content: str, said: str, world: Any, call: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    code, _, err = call("run", *world.arguments("--backbone", str(tmp_path)), *BASIC)
    assert code == 2
    assert said in sentence(err)


def test_a_file_where_the_out_folder_should_be(world: Any, call: Run, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    for out in (file, file / "inside"):
        code, _, err = call("run", *world.arguments("--out", str(out)), *BASIC)
        assert code == 2
        assert "Cannot write to" in sentence(err)
        assert "Choose another folder with --out" in err
    assert file.read_text() == "precious"


def test_a_read_only_out_folder(world: Any, call: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **options: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    code, _, err = call("run", *world.arguments("--out", str(tmp_path / "out")), *BASIC)
    assert code == 2
    assert "it is on a read-only file system" in sentence(err)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("list", "model"), "Unknown list 'model'. Did you mean models?"),
        (("report", "absent"), "absent holds no results"),
        (("compare", "hmt", "rmt", "--out", "absent"), "absent holds no results"),
        (("verify", "absent"), "neither a reference case nor a folder of them"),
        (("fetch", "boks"), "Unknown thing to fetch 'boks'. Did you mean books?"),
    ],
)
def test_other_commands_know_sentences_too(arguments: tuple[str, ...], said: str, call: Run) -> None:
    code, _, err = call(*arguments)
    assert code == 2
    assert said in sentence(err)


def test_unknown_commands_and_options_have_exit_code_2(call: Run) -> None:
    for arguments in (("runn",), ("run", "--modles", "rmt"), ("run", "--limit", "0"), ("list",)):
        code, _, err = call(*arguments)
        assert code == 2
        assert "Traceback" not in err


def test_a_run_says_how_it_went(world: Any, call: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 0, then 0 again without work; 1 once a cell has failed; ``--retry failed`` mends it."""
    monkeypatch.setattr(commands, "report", lambda *given, **options: 0)
    (tmp_path / "bad.py").write_text(BAD)
    out = tmp_path / "out"
    arguments = ["run", *world.arguments("--out", str(out), "--no-controls"), "--tasks", "pg19", "--models"]
    assert call(*arguments, "rmt")[0] == 0
    when = {p: p.stat().st_mtime_ns for p in out.glob("cells/*/record.json")}
    code, _, err = call(*arguments, "rmt")
    assert (code, "1 cells done, 0 to run" in err) == (0, True)
    assert {p: p.stat().st_mtime_ns for p in out.glob("cells/*/record.json")} == when
    code, _, err = call(*arguments, f"rmt,{tmp_path}/bad.py:Bad")
    assert (code, "1 cells done, 1 to run" in err) == (1, True)
    code, _, err = call(*arguments, f"rmt,{tmp_path}/bad.py:Bad")
    assert (code, "2 cells done, 0 to run" in err) == (1, True)
    (tmp_path / "mended").touch()
    code, _, err = call(*arguments, f"rmt,{tmp_path}/bad.py:Bad", "--retry", "failed")
    assert (code, "1 cells done, 1 to run" in err) == (0, True)
    assert [r.status for r in Store(out).records()] == ["ok", "ok"]
    before = {p: p.stat().st_mtime_ns for p in out.glob("checkpoints/*/training.json")}  # with the other's adapters
    code, _, err = call(*arguments, "rmt", "--force")
    assert (code, "0 cells done, 1 to run" in err) == (0, True)
    assert {p: p.stat().st_mtime_ns for p in when} != when
    assert sum(p.stat().st_mtime_ns != when for p, when in before.items()) == 1, "trained again too"
    assert not Path("latest").exists()
    assert not (tmp_path / "latest").exists(), "only runs under results/runs are linked"


BAD = """
from pathlib import Path
from memory_bench.zoo.pretrain import Window, WindowConfig

class Bad(Window):
    Config = WindowConfig
    def __init__(self, backbone, config, rng):
        super().__init__(backbone, config)
        if not (Path(__file__).parent / "mended").exists():
            raise RuntimeError("not yet")
"""


def test_results_go_where_the_contract_says(world: Any, call: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "report", lambda *given, **options: 0)
    code, _, _ = call("run", *world.arguments("--no-controls", "--quiet"), "--models", "truncation", "--tasks", "pg19")
    assert code == 0
    (out,) = (p for p in Path("results/runs").iterdir() if not p.is_symlink())
    assert out.name.startswith("truncation-pg19-")
    assert Path("results/runs/latest").resolve() == out.resolve()
    assert {"run.json", "cells"} <= {p.name for p in out.iterdir()}


def test_dry_run_and_plan_train_nothing(world: Any, call: Run, tmp_path: Path) -> None:
    arguments = world.arguments("--out", str(tmp_path / "out"), "--json")
    code, out, _ = call("run", *arguments, *BASIC, "--dry-run")
    rows = json.loads(out)["cells"]
    assert code == 0
    assert [(r["model"], r["role"]) for r in rows] == [
        ("rmt", "asked"),
        ("truncation", "control"),
        ("xl-cache", "control"),
    ]
    assert {"train_tokens", "train_flops", "peak_bytes", "train_seconds", "fits"} <= rows[0].keys()
    plan = [a for a in arguments if a not in ("--executor", "inline")]
    code, out, _ = call("plan", *plan, *BASIC)
    assert json.loads(out)["cells"][0]["train_tokens"] == 1024  # whole optimiser steps
    assert not (tmp_path / "out").exists()
    code, out, _ = call(
        "plan", *[a for a in plan if a != "--json"], "--models", "sliding-window,rmt", "--tasks", "pg19"
    )
    assert (code, "4 cells" in out) == (0, True)


def test_skipped_pairs_do_not_change_the_exit_code(world: Any, call: Run, tmp_path: Path) -> None:
    from memory_bench.testing import tiny_backbone

    folder = tmp_path / "gpt2"
    backbone: Any = tiny_backbone("gpt2", vocab_size=300)
    backbone.model.save_pretrained(folder)
    shutil.copy(world.backbone / "tokenizer.json", folder)
    given = [a for a in world.arguments("--backbone", str(folder)) if a not in ("--executor", "inline")]
    (budget := tmp_path / "larger.toml").write_text('train_tokens = 4000\n[tasks.pg19]\nextent = "full"\n')
    given += ["--budget", str(budget)]
    code, out, err = call("plan", *given, "--models", "mplus,rmt", "--tasks", "pg19")
    assert code == 0, err
    assert "Skipped: mplus on pg19: mplus works on llama backbones" in out
    code, _, err = call("plan", *given, "--models", "mplus", "--tasks", "pg19")
    assert code == 2
    assert "Nothing to run: mplus works on llama backbones" in sentence(err)


def test_lists_have_the_fields_the_contract_names(call: Run, world: Any) -> None:
    code, out, _ = call("list", "models", "--json")
    models = {m["name"]: m for m in json.loads(out)}
    assert code == 0
    assert {
        "hmt",
        "rmt",
        "memoryllm",
        "mplus",
        "truncation",
        "sliding-window",
        "xl-cache",
        "full-context",
    } <= models.keys()
    for entry in models.values():
        assert {
            "name",
            "status",
            "summary",
            "families",
            "parity",
            "look_ahead",
            "added_parameters",
            "source",
        } <= entry.keys()
        assert entry["status"] == "installed"
        assert entry["summary"]
        assert not entry["summary"].startswith("See the module")
    assert models["mplus"]["families"] == ["llama"]
    tasks = {t["name"]: t for t in json.loads(call("list", "tasks", "--json", "--data", str(world.data))[1])}
    assert tasks["pg19"]["status"] == "real data in the folder"
    assert tasks["pg19"]["headline"] == "bits_per_byte"
    assert tasks["wikitext103"]["status"].startswith("no stand-in")
    assert [m["name"] for m in json.loads(call("list", "models", "--grep", "XL-", "--json")[1])] == ["xl-cache"]
    for what in ("backbones", "budgets", "suites", "reported", "tasks", "models"):
        assert call("list", what)[0] == 0


def cpu(arguments: list[str], world: Any) -> tuple[float, str]:
    """Seconds of CPU a command takes, and what it prints."""
    before = os.times()
    done = subprocess.run(arguments, env=environment(world), capture_output=True, text=True, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system, done.stdout


@pytest.mark.parametrize("what", ["models", "reported"])
def test_listing_takes_less_than_a_second(what: str, world: Any) -> None:
    seconds, _ = cpu([sys.executable, "-m", "memory_bench.cli", "list", what], world)
    assert seconds < 1


def test_help_is_quick(world: Any) -> None:
    seconds, _ = cpu([sys.executable, "-m", "memory_bench.cli", "run", "--help"], world)
    assert seconds < 0.5


IMPORTS = """
import sys
from memory_bench.cli import main
for command in sys.argv[1:]:
    try:
        main([command, "--help"])
    except SystemExit as ended:
        assert ended.code == 0, command
for command in ("models", "tasks", "backbones", "budgets", "suites", "reported"):
    try:
        main(["list", command])
    except SystemExit as ended:
        assert not ended.code
print("IMPORTED", sorted({"torch", "transformers", "pandas", "datasets"} & sys.modules.keys()))
"""


def test_help_and_lists_import_nothing_heavy(world: Any) -> None:
    _, out = cpu([sys.executable, "-c", IMPORTS, *COMMANDS], world)
    assert out.splitlines()[-1] == "IMPORTED []"
    assert out.count("Example: memory-bench ") == len(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_that_parses(command: str, call: Run) -> None:
    code, out, _ = call(command, "--help")
    example = out.split("Example: memory-bench ")[1].splitlines()[0].split()
    assert code == 0
    assert example[0] == command
    options = [word for word in example if word.startswith("--")]
    assert all(option in out for option in options)


def test_an_interrupt_is_a_sentence_and_130(
    world: Any, call: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run", interrupted)
    code, _, err = call("run", *BASIC)
    assert (code, err.strip()) == (130, "Interrupted. Finished cells are kept; the same command continues.")


def test_the_same_run_twice_is_quick(world: Any, call: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is prepared or loaded where nothing is to be done."""
    monkeypatch.setattr(commands, "report", lambda *given, **options: 0)
    arguments = ["run", *world.arguments("--out", str(tmp_path / "out"), "--no-controls"), *BASIC]
    assert call(*arguments)[0] == 0
    started = time.process_time()
    assert call(*arguments)[0] == 0
    assert time.process_time() - started < 1
