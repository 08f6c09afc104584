"""Odd input of every kind, drawn by hypothesis: no traceback and no hang, whatever a file or a command line holds.

The same examples every time: 200 in the usual tests, 2,000 and 300 commands in processes of their own in the slow ones
(``pytest -m slow tests/test_fuzz.py``).
"""

import contextlib
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from damage import resealed
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from memory_bench.cell import from_json
from memory_bench.cli import main
from memory_bench.errors import UserError
from memory_bench.plugins import parse_value
from synthetic import real_questions

ROOT = Path(__file__).parents[1]
REFERENCE = str(ROOT / "results/reference/smoke-cpu.jsonl")
SECONDS = 120.0  # of a command in a process of its own, on a busy machine


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": [value]}
    return value


VALUES = st.one_of(
    st.sampled_from([
        None, True, -1, 0, 1.5, 2**63, 10**30, 10**400, "", "x", [], [1], [[1, 2]], {}, {"a": None}, float("nan"),
        float("inf"), -1e308, 1e-320, nested(20), nested(40), nested(200), "\ud800", "\x00", "x" * 5000, {"": ""},
        "9999-12-31T23:59:59-12:00", "0001-01-01", "1700000000", "../../x", "x.py:T", "lm-eval:x.yaml", "failed",
    ]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ),
)  # fmt: skip
WORDS = st.one_of(
    st.sampled_from([
        "", " ", ",", "=", "[", "]", "hmt", "rmt", "rmt[", "rmt[]", "rmt[a]", "rmt[segment=4]", "pg19", "pg19,,",
        "tiny", "smoke", "-1", "0", "1", "3", "0,1", "9" * 30, "9" * 5000, "1e999", "nan", "x.py:T", "x.toml",
        "/dev/null", "/proc/self/mem", ".", "..", "é" * 200, "x" * 5000, "\udcff", "a\nb", "--", "[" * 3000,
        "rmt.segment=1e400",
        "rmt.segment=" + "9" * 5000, "rmt.x=[[1,", "pg19.extent=bytes:" + "9" * 5000 + "-1", "lm-eval:",
        "lm-eval:.yaml", "lm-eval:a:b", "x@y", "backbone.dtype=float8", "http://x:y", "sqlite:///", "²", "٣",
    ]),
    st.text(st.characters(exclude_characters="\x00"), max_size=12),
)  # fmt: skip
OPTIONS = ("--models", "--tasks", "--backbone", "--budget", "--seeds", "--suite", "--data", "--limit", "--set")
MORE = {
    "run": (*OPTIONS, "--out", "--retry", "--executor", "--mlflow"), "plan": OPTIONS, "report": (), "list": ("--grep",),
    "compare": ("--out",), "check": ("--against", "--tolerance", "--write"), "reproduce": ("--seeds", "--executor"),
    "sync": ("--uri",), "fetch": ("--data",), "verify": (),
}  # fmt: skip
FIRST = {"list": ["models", "tasks", "budgets"], "sync": ["mlflow"]}


def examples(usual: int) -> Callable[[Callable[..., None]], Any]:
    """The test with `usual` examples; in the slow tier ten times as many, from another seed."""

    def decorate(test: Callable[..., None]) -> Any:
        own = settings(max_examples=usual, deadline=None, database=None, phases=[Phase.generate],
                       suppress_health_check=list(HealthCheck))  # fmt: skip
        many = settings(own, max_examples=10 * usual)

        @pytest.mark.parametrize("tier", ["usual", pytest.param("many", marks=pytest.mark.slow)])
        def both(tier: str, scene: Scene) -> None:
            chosen = own if tier == "usual" else many

            @seed(0 if tier == "usual" else 1)
            @chosen
            @given(st.data())
            def drawn(data: st.DataObject) -> None:
                test(data, scene)

            drawn()

        both.__doc__ = test.__doc__
        return both

    return decorate


def ended(*arguments: str) -> tuple[int, str]:
    """Exit code and standard error of a command that must end in one of three ways and without a traceback."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(arguments))
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    assert code in (0, 1, 2), (arguments, code)
    assert "Traceback" not in err.getvalue()
    return code, err.getvalue()


@dataclass(frozen=True)
class Scene:
    """A folder of results as it was written, a place to spoil it in, and a world to run commands in."""

    store: Path
    place: Path
    world: Any


@pytest.fixture(scope="module")
def scene(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Nothing is drawn, and nothing runs: `run` plans, looks at what there is, and reports."""
    root = tmp_path_factory.mktemp("fuzz")
    store = real_questions(root / "whole", ("rmt", "truncation"))
    keys = sorted(folder.name for folder in store.cells.iterdir())
    request = {"models": ["rmt"], "tasks": ["pubmedqa"], "budget": {"name": "cpu-minutes"}}
    source = {"label": "x", "revision": "r", "origin": "hub", "stand_in": False}
    skipped = [{"model": "longmem", "task": "pubmedqa", "reason": "why"}]
    store.write_run({"request": request, "cells": keys, "roles": {key: ["asked", "mine"] for key in keys},
                     "skipped": skipped, "data": {"pubmedqa": source}})  # fmt: skip
    before = os.getcwd()
    (root / "here").mkdir()
    os.chdir(root / "here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memory_bench.report.plots.render", lambda board, labels: [])
        for name in ("Inline", "Local"):
            patch.setattr(f"memory_bench.running.executors.{name}.run", lambda self, jobs: (x for x in ()))
        for name, value in world.environment().items():
            patch.setenv(name, value)
        yield Scene(store.folder, root / "spoilt", world)
    os.chdir(before)


def changed(data: st.DataObject, whole: Any) -> Any:
    """A copy of JSON data with one to three entries changed, lost or added, anywhere in them."""
    value = json.loads(json.dumps(whole))
    for _ in range(data.draw(st.integers(1, 3))):
        places: list[tuple[Any, Any]] = []
        left = [value]
        while left:
            node = left.pop()
            for key in list(node) if isinstance(node, dict) else range(len(node)):
                places.append((node, key))
                if isinstance(node[key], dict | list) and len(places) < 500:
                    left.append(node[key])
        if not places:
            return value
        node, key = data.draw(st.sampled_from(range(len(places))).map(lambda n, p=places: p[n]))
        what = data.draw(st.sampled_from(["change", "change", "lose", "add"]))
        if what == "lose":
            del node[key]
        elif what == "add" and isinstance(node, dict):
            node[data.draw(st.text(max_size=5))] = data.draw(VALUES)
        else:
            node[key] = data.draw(VALUES)
    return value


def written(file: Path, value: Any) -> None:
    """With a checksum that fits, so that the values themselves are judged."""
    try:
        text = resealed(value)
    except (AttributeError, RecursionError):
        text = json.dumps(value)
    file.write_bytes(text.encode("utf-8", "surrogatepass"))


def spoilt(scene: Scene) -> Path:
    shutil.rmtree(scene.place, ignore_errors=True)
    shutil.copytree(scene.store, scene.place)
    return scene.place


READERS = st.sampled_from([
    ("report", "OUT"), ("compare", "rmt", "truncation", "--out", "OUT"), ("compare", "OUT", "OUT", "rmt"),
    ("check", "OUT", "--against", REFERENCE), ("check", "OUT", "--write", "made.jsonl"),
])  # fmt: skip


def read(data: st.DataObject, folder: Path) -> None:
    ended(*(str(folder) if word == "OUT" else word for word in data.draw(READERS)))


@examples(60)
def test_records(data: st.DataObject, scene: Scene) -> None:
    """A record with odd entries, its key made to fit where its cell can still be read."""
    folder = spoilt(scene)
    file = sorted(folder.glob("cells/*/record.json"))[0]
    value = changed(data, json.loads(file.read_text()))
    try:
        value["key"] = from_json(value["cell"]).key
        file = file.parent.rename(file.parent.with_name(value["key"])) / file.name
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, UserError):
        pass
    written(file, value)
    read(data, folder)


@examples(30)
def test_run_files(data: st.DataObject, scene: Scene) -> None:
    folder = spoilt(scene)
    written(folder / "run.json", changed(data, json.loads((folder / "run.json").read_text())))
    read(data, folder)


@examples(10)
def test_runs_in_a_folder_with_odd_files(data: st.DataObject, scene: Scene) -> None:
    folder = spoilt(scene)
    file = sorted(folder.glob("cells/*/record.json"))[0]
    written(file, changed(data, json.loads(file.read_text())))
    written(folder / "run.json", changed(data, json.loads((folder / "run.json").read_text())))
    code, _ = ended(
        "run", *scene.world.arguments("--out", str(folder), "--no-controls", "--models", "rmt"), "--tasks", "pg19"
    )
    assert code == 1, "its cell was not run"


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command, what it needs first, and some of its options with odd values."""
    command = draw(st.sampled_from(sorted(MORE)))
    line = [command, *([draw(st.sampled_from(FIRST[command]))] if command in FIRST else [])]
    if command in ("report", "compare", "check", "sync", "verify", "fetch", "reproduce"):
        line.append("./" + draw(WORDS) if command in ("verify", "sync") else draw(WORDS) or "x")
    for option in draw(st.lists(st.sampled_from(MORE[command]), max_size=4)) if MORE[command] else ():
        line += [option, draw(WORDS)]
    return line


def planned(scene: Scene, *more: str) -> list[str]:
    """A command that plans one model on one task; `more` comes last and wins."""
    return ["run", "--dry-run", *scene.world.arguments("--models", "rmt", "--tasks", "pg19", "--no-controls", *more)]


@examples(45)
def test_command_lines(data: st.DataObject, scene: Scene) -> None:
    line = data.draw(command_lines())
    if line[0] in ("run", "plan"):  # what is not drawn is little and here
        line = [
            "run",
            "--dry-run",
            *scene.world.arguments("--models", "rmt", "--tasks", "pg19", "--no-controls"),
            *line[1:],
        ]
    ended(*line)


@examples(20)
def test_settings(data: st.DataObject, scene: Scene) -> None:
    """Options of models, tasks, the backbone and the recipe, of every type."""
    owner = data.draw(st.sampled_from(["rmt", "pg19", "backbone", "hmt", "rmt.train"]))
    option = data.draw(st.sampled_from(["segment", "extent", "dtype", "memory_tokens", "recipe", "x", ""]))
    value = data.draw(st.one_of(WORDS, VALUES.map(lambda v: json.dumps(v)), st.text(max_size=20)))
    with contextlib.suppress(UserError):
        parse_value(value)
    ended(*planned(scene, "--set", f"{owner}.{option}={value}"))


@examples(15)
def test_toml(data: st.DataObject, scene: Scene) -> None:
    """Budgets and suites: keys that there are with values of every kind, and text that is no TOML."""
    keys = st.sampled_from(["seeds", "train_tokens", "device_bytes", "tasks", "name", "models", "set", "limit", "x"])
    values = VALUES.map(lambda v: json.dumps(v)) | st.sampled_from(
        ["1979-05-27", "9" * 5000, "[" * 3000, "inf", "-nan"]
    )
    lines = data.draw(st.lists(st.tuples(keys, values), max_size=3))
    text = data.draw(st.one_of(st.just("\n".join(f"{key} = {value}" for key, value in lines)), st.text(max_size=30)))
    file = scene.place.with_name("odd.toml")
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    option = data.draw(st.sampled_from(["--budget", "--suite"]))
    ended(
        "run",
        "--dry-run",
        *scene.world.arguments("--models", "rmt", "--tasks", "pg19", "--no-controls", option, str(file)),
    )


@examples(10)
def test_cases(data: st.DataObject, scene: Scene) -> None:
    """Reference cases whose case.json has odd entries."""
    folder = scene.place.with_name("case")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "results/parity/armt-gpt2", folder)
    value = changed(data, json.loads((folder / "case.json").read_text()))
    (folder / "case.json").write_bytes(json.dumps(value).encode("utf-8", "surrogatepass"))
    ended("verify", str(folder))


@examples(10)
def test_data_files(data: st.DataObject, scene: Scene) -> None:
    """Books and studies with odd entries, lines or bytes."""
    folder = scene.place.with_name("data")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(scene.world.data, folder)
    name = data.draw(st.sampled_from(["pg19/books_test.jsonl.gz", "pubmedqa/ori_pqal.json.gz"]))
    lines = gzip.decompress((folder / name).read_bytes()).decode().splitlines()
    lines[0] = json.dumps(changed(data, json.loads(lines[0])))
    raw = "\n".join(lines).encode("utf-8", "surrogatepass")
    raw = data.draw(st.sampled_from([raw, raw, raw[: len(raw) // 2], b"", b"\n\n", b"\xff" + raw, b"1"]))
    (folder / name).write_bytes(data.draw(st.sampled_from([gzip.compress(raw), gzip.compress(raw), raw])))
    ended(*planned(scene, "--data", str(folder), "--tasks", "pg19,pubmedqa"))


@pytest.mark.slow
def test_commands_in_processes(scene: Scene) -> None:
    """300 real command lines: exit code 0, 1 or 2, no traceback, and an end within the time."""
    asked = settings(max_examples=300, deadline=None, database=None, phases=[Phase.generate],
                     suppress_health_check=list(HealthCheck))  # fmt: skip
    environment = {**os.environ, **scene.world.environment(), "OMP_NUM_THREADS": "1"}

    @seed(2)
    @asked
    @given(command_lines())
    def drawn(line: list[str]) -> None:
        # Nothing runs: the backbone is none, unless the line names another.
        given = [line[0], "--backbone", "absent", *line[1:]] if line[0] in ("run", "plan") else line
        words = [os.fsencode(word) if "\udcff" in word else word.encode("utf-8", "replace") for word in given]
        done = subprocess.run([sys.executable, "-m", "memory_bench", *words], capture_output=True, timeout=SECONDS,
                              env=environment, check=False)  # fmt: skip
        assert done.returncode in (0, 1, 2), (line, done.stderr[-500:])
        assert b"Traceback" not in done.stderr, (line, done.stderr[-500:])

    drawn()
