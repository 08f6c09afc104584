"""Whatever is given, the answer is a sentence and exit code 2: counts, paths, character sets, cases, data."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memory_bench.errors import UserError
from memory_bench.files import plain
from memory_bench.parity.cases import Case
from memory_bench.plugins import parse_value
from memory_bench.running.options import MOST_SEEDS, parse_limits, parse_seeds

Run = Callable[..., tuple[int, str, str]]
ASKED = ("--models", "rmt", "--tasks", "pg19")
HUGE = "9" * 5000
DEEP = "[" * 100_000
ROOT = Path(__file__).parents[1]


def refused(answer: tuple[int, str, str]) -> str:
    """The sentence of a command that refused."""
    code, _, err = answer
    assert code == 2, err
    assert "Traceback" not in err
    assert len(err) < 12_000
    (line,) = [line for line in err.splitlines() if line.startswith("Error: ")]
    return line


@pytest.mark.parametrize("command", [("run",), ("plan",), ("run", "--mlflow"), ("run", "--quiet", "--mlflow")])
def test_without_arguments_a_run_leads_on(command: tuple[str, ...], invoke: Run) -> None:
    said = refused(invoke(*command))
    assert all(name in said for name in ("--models", "--tasks", "--suite", "list models"))


@pytest.mark.parametrize("number", [HUGE, "99999999999", "1001", "0", "1e3", "-1", "4294967296,", "²"])
def test_absurd_seeds_are_refused_with_the_range(number: str, invoke: Run) -> None:
    assert f"1 to {MOST_SEEDS:,} seeds" in refused(invoke("run", *ASKED, f"--seeds={number}"))
    with pytest.raises(UserError, match="99,999,999,999 seeds are asked for"):
        parse_seeds("", 99_999_999_999)
    with pytest.raises(UserError, match="at most"):
        parse_seeds(",".join(map(str, range(MOST_SEEDS + 1))), 1)


@pytest.mark.parametrize("text", [HUGE, f"pg19={HUGE}", "10000000000", "0", "pg19=²", DEEP])
def test_absurd_limits_are_refused_with_the_range(text: str) -> None:
    with pytest.raises(UserError, match=r"from 1 \(to 1,000,000,000\)"):
        parse_limits(text)


@pytest.mark.parametrize("value", [HUGE, f"-{HUGE}", f"[1, [{HUGE}]]", DEEP, "9223372036854775808", "1_0" * 3000])
def test_absurd_options_are_refused(value: str, invoke: Run) -> None:
    with pytest.raises(UserError):
        _ = parse_value(value) if "_" not in value and value != DEEP else refuse(value)
    said = refused(invoke("plan", *ASKED, "--set", f"rmt.segment={value}"))
    assert "64 bits" in said or "nested" in said or "valid integer" in said


def refuse(value: str) -> None:
    """What is no TOML at all is a text, which no option takes that wants a number."""
    parse_value(value)
    raise UserError("a text")


@pytest.mark.parametrize("value", [HUGE, DEEP, "true", '"x"', "[1]", "nan", "inf", "-1", "1e999", "1979-05-27"])
@pytest.mark.parametrize("entry", ["train_tokens", "seeds", "set", "models", "limit", "tasks", "name"])
def test_toml_of_any_kind_is_read_or_refused(entry: str, value: str, invoke: Run, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(f"{entry} = {value}\n")
    for option in ("--budget", "--suite"):
        if option == "--suite" or (entry, value) not in {("train_tokens", "inf"), ("name", '"x"')}:
            refused(invoke("plan", *ASKED, "--backbone", "absent", option, str(file)))


@pytest.mark.parametrize(("place", "said"), [("/proc/x", "Cannot write to /proc/x"), ("file", "part of the path"),
    ("file/inside", "part of the path"), ("x" * 5000, "File name too long")])  # fmt: skip
def test_places_that_cannot_be_written(
    place: str, said: str, world: Any, invoke: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert said in refused(invoke("run", *world.arguments("--out", place), *ASKED))


@pytest.mark.parametrize("command", ["report", "compare x --out", "check --write y", "sync mlflow", "verify",
    "fetch books --data", "plan --models rmt --tasks pg19 --data",
    "plan --models rmt --tasks pg19 --budget", "plan --tasks pg19 --models"])  # fmt: skip
@pytest.mark.parametrize("place", ["x" * 5000, "\udcff", "/dev/null/x"])
def test_paths_that_are_none(command: str, place: str, invoke: Run) -> None:
    code, _, err = invoke(*command.split(), place)
    assert (code in (1, 2), "Traceback" in err, len(err) < 12_000) == (True, False, True), err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_tables_are_printed_in_any_character_set(encoding: str, tmp_path: Path) -> None:
    """In processes of their own: what a test captures has no character set."""
    from synthetic import real_questions

    folder = real_questions(tmp_path / "rün").folder
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONPATH": str(ROOT / "tests")}
    script = (
        "import sys; import memory_bench.report.plots as p; p.render = lambda board, labels: []\n"
        "from memory_bench.cli import main\n"
        "for line in sys.argv[2:]:\n"
        "    try:\n        main([a.replace('OUT', sys.argv[1]) for a in line.split()])\n"
        "    except SystemExit as end:\n        assert end.code in (0, 1), line\n"
    )
    lines = (
        "report OUT",
        "compare rmt truncation --out OUT",
        "list models",
        "list tasks",
        "list reported",
        "list suites",
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), *lines], capture_output=True, env=environment, check=False
    )
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr.decode(errors="replace")[-800:]
    assert b"A - B [95 %]" in done.stdout
    assert b"\\u2212" not in done.stdout


@pytest.fixture
def case(tmp_path: Path) -> Callable[..., Path]:
    """``case(part, name, value)``: a shipped case in which one entry of case.json is another."""
    shutil.copytree(ROOT / "results/parity/armt-gpt2", tmp_path / "case")

    def change(part: str, name: str, value: Any) -> Path:
        file = tmp_path / "case" / "case.json"
        info = json.loads(file.read_text())
        (info if not name else info[part])[name or part] = value
        file.write_text(json.dumps(info))
        return tmp_path / "case"

    return change


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("backbone", "n_layer", 10**30), ("backbone", "n_layer", 100_000), ("backbone", "vocab_size", 100_000),
        ("backbone", "n_embd", 100_000), ("memory", "memory_tokens", 10**12), ("memory", "max_new_tokens", 100_000),
        ("memory", "segment_lengths", [10**9]), ("backbone", "", None), ("memory", "", []), ("tolerance", "", 3),
    ],
)  # fmt: skip
def test_a_case_asks_for_no_more_than_its_weights(
    part: str, name: str, value: Any, case: Callable[..., Path], invoke: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import GPT2LMHeadModel

    monkeypatch.setattr(GPT2LMHeadModel, "tie_weights", only_on_meta(GPT2LMHeadModel.tie_weights))
    refused(invoke("verify", str(case(part, name, value))))


def only_on_meta(tie: Callable[..., Any]) -> Callable[..., Any]:
    """A backbone of another shape than the weights is never built with memory of its own."""

    def checked(model: Any, *given: Any, **options: Any) -> Any:
        devices = {p.device.type for p in model.parameters()}
        assert devices == {"meta"} or model.config.n_embd * model.config.vocab_size < 10_000
        return tie(model, *given, **options)

    return checked


def test_a_case_as_it_was_recorded_is_built() -> None:
    assert Case(ROOT / "results/parity/armt-gpt2").backbone().width == 32


def test_data_that_are_too_few_are_found_before_anything_is_trained(
    world: Any, invoke: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A book that ends before the extent; a data set shorter than one document; a task that fails on the data."""
    monkeypatch.setattr("memory_bench.running.executors.Inline.run", never)
    tokens = tmp_path / "wikitext"
    shutil.copytree(world.data, tmp_path, dirs_exist_ok=True)
    tokens.mkdir()
    for name in ("valid", "test"):
        with gzip.open(tokens / f"wikitext-103.wiki.{name}.tokens.gz", "wt") as file:
            file.write(" = A = \n\n few words \n")
    (tmp_path / "task.py").write_text(
        "from memory_bench.tasks.language_modeling import PG19\nclass T(PG19):\n"
        "    def episodes(self, library, limit):\n        yield from {}['absent']\n"
    )
    for task, options, said in (
        ("pg19", ("--set", "pg19.extent=bytes:900000-900010"), "no book is long enough"),
        ("wikitext103", (), "wikitext103 gives no episodes from wikitext103: there is too little"),
        (f"{tmp_path}/task.py:T", (), "KeyError: 'absent'"),
    ):
        given = world.arguments("--data", str(tmp_path), "--models", "truncation", "--tasks", task, *options)
        out = ("--out", str(tmp_path / "out"), "--no-controls")
        assert said in refused(invoke("run", *given, *out)), task
        assert said in refused(invoke("run", "--dry-run", *given, *out)), task


def never(self: Any, jobs: Any) -> Any:
    raise AssertionError("something ran")


@pytest.mark.parametrize("value", [2**63, -(2**63), 1e999, float("nan"), "\ud800", {"a": "\udfff"}, {"\ud800": 1}])
def test_odd_values_are_named_wherever_they_are(value: Any) -> None:
    assert plain.odd(value)
    assert plain.odd([{"a": (1, [value])}])
    assert not plain.odd([{"a": (2**63 - 1, 1e308, "é", None, True)}])
    deep: Any = 1
    for _ in range(plain.DEEPEST):
        deep = [deep]
    assert "nested" in plain.odd(deep)
    assert not plain.odd(deep[0])
