"""The shipped boards: README shows what they hold, they are of the code as it is, and the script that remakes them."""

import csv
import json
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from test_architecture import ROOT
from test_benchmarks import SCRIPTS

from memory_bench import plugins
from memory_bench.backbone.small import CLOSED
from memory_bench.cell import training_from_json
from memory_bench.driver.train import untrained
from memory_bench.recipe import find_recipe
from memory_bench.zoo.named import Backbones

README = (ROOT / "README.md").read_text(encoding="utf-8")
SHIPPED = sorted(ROOT.glob("results/*/*/records.jsonl"))


def named(path: Path) -> str:
    return path.parent.name


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture
def boards(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import boards

    yield boards
    for name in ("boards", "readme"):
        sys.modules.pop(name, None)


def test_readme_shows_what_the_records_hold(boards: ModuleType) -> None:
    made = boards.readme.updated(README).split("\n")
    wrong = [line for line in README.split("\n") if line not in made]
    assert README.split("\n") == made, f"`python benchmarks/boards.py --readme` changes {wrong}"


def test_a_changed_number_is_seen(boards: ModuleType) -> None:
    tables = re.findall(r"<!-- measured: .*?<!-- /measured -->", README, flags=re.S)
    assert len(tables) == len(boards.readme.TABLES)
    last = [max(i for i, c in enumerate(table) if c.isdigit()) for table in tables]
    starts = [README.index(table) + place for table, place in zip(tables, last, strict=True)]
    starts.append(README.index("| 1.", README.index("## What is compared")) + 4)  # a cost
    for start in starts:
        other = README[:start] + str((int(README[start]) + 1) % 10) + README[start + 1 :]
        assert boards.readme.updated(other) == README


@pytest.mark.parametrize(
    ("start", "end"), [("## What came out", "## What is compared"), ("**Published claims", "## Data")]
)
def test_prose_about_boards_quotes_no_figure(start: str, end: str) -> None:
    part = README[README.index(start) : README.index(end)]
    prose = re.sub(r"<!-- measured: .*?<!-- /measured -->", "", part, flags=re.S)
    assert not re.findall(r"[^\n]*\d(?:\.\d| ?%| points)[^\n]*", prose), "figures belong into the measured tables"


CONCLUDED = {
    "HMT's recall adds nothing": lambda on: all(
        abs(on(board, "pg19", "hmt") - on(board, "pg19", "hmt (recall off)")) < 0.005
        for board in ("tiny-stand-ins", "tiny-real")
    ),
    "cache is at chance and the memories are not": lambda on: (
        abs(on("tiny-stand-ins", "pubmedqa", "xl-cache") - 1 / 3) < 0.05
        and min(on("tiny-stand-ins", "pubmedqa", memory) for memory in ("hmt", "rmt", "mplus")) > 0.5
    ),
    "the retrieved end of it, does as well": lambda on: (
        max(on("tiny-real", "pg19", "retrieval"), on("tiny-real", "pg19", "xl-cache")) <= on("tiny-real", "pg19", "hmt")
    ),
    "A gate that starts almost closed stays so": lambda on: (
        abs(on("tiny-real", "pg19", "memorizing") - on("tiny-real", "pg19", "truncation")) < 0.002
    ),
    "a side network begins below the model it reads": lambda on: (
        on("tiny-real", "pg19", "longmem") > on("tiny-real", "pg19", "truncation") + 0.01
    ),
    "a context far beyond the trained one is worse than none": lambda on: (
        on("tiny-real", "pg19", "full-context") > on("tiny-real", "pg19", "truncation") + 0.01
    ),
    "Nobody at this size answers the real PubMedQA better": lambda on: (
        max(on("tiny-real", "pubmedqa", label) for label in ("hmt", "rmt", "mplus", "armt", "retrieval")) < 0.562
    ),
    "HMT, which answers fewer questions right at four windows, keeps at sixteen what the others lose": lambda on: all(
        on("tiny-stand-ins", "pubmedqa", "hmt") < on("tiny-stand-ins", "pubmedqa", other)
        and on("tiny-stand-ins", "pubmedqa", "hmt", FAR) > on("tiny-stand-ins", "pubmedqa", other, FAR) + 0.05
        for other in ("rmt", "mplus")
    ),
    "HMT with and without it cannot be told apart, at sixteen it is what keeps the answer": lambda on: (
        abs(on("tiny-stand-ins", "pubmedqa", "hmt") - on("tiny-stand-ins", "pubmedqa", "hmt (recall off)")) < 0.05
        and on("tiny-stand-ins", "pubmedqa", "hmt", FAR)
        > on("tiny-stand-ins", "pubmedqa", "hmt (recall off)", FAR) + 0.2
    ),
    "does show a memory, with Memorizing Transformer's and not without": lambda on: (
        on("squad-real", "squad-retention", "memorizing", "", "answer_logprob")
        > on("squad-real", "squad-retention", "memorizing (memory off)", "", "answer_logprob") + 1
    ),
    "Stores keep what they hold": lambda on: all(
        on("retention-tiny", "key-value", label, "distance=512") > 0.9 for label in ("full-context", "memorizing")
    ),
    "lasts longer than its rows do, and then not at all": lambda on: (
        on("retention-tiny", "key-value", "memoryllm", "distance=128") > 0.5
        and on("retention-tiny", "key-value", "memoryllm", "distance=512") < 0.15
    ),
}
FAR = "distance=384"


@pytest.mark.parametrize("sentence", CONCLUDED)
def test_what_readme_concludes_is_in_the_records(boards: ModuleType, sentence: str) -> None:
    assert sentence in " ".join(README.split())

    def on(board: str, task: str, label: str, slice_: str = "", metric: str = "") -> float:
        return float(boards.readme.value(boards.readme.shown(board, task).rows[label], slice_, metric))

    assert CONCLUDED[sentence](on), f"README says '{sentence}', the records do not"


@pytest.mark.parametrize("path", SHIPPED, ids=named)
def test_boards_are_of_the_code_as_it_is(path: Path, tmp_path: Path) -> None:
    assert not stale(path, tmp_path), f"{named(path)} is of other code: benchmarks/boards.py remakes it"


def stale(path: Path, cache: Path) -> set[str]:
    """What in records is of another version than the code's."""
    cells = [record["cell"] for record in records(path)]
    trainings = [training_from_json(c["training"]) for c in cells]
    used = {("model", t.model.name, t.model.version) for t in trainings}
    used |= {  # a recipe that trains nothing has no version
        ("recipe", t.recipe.name, t.recipe.version)
        for t in trainings
        if not untrained(t.budget, find_recipe(t.recipe.name))
    }
    used |= {("task", c["task"]["name"], c["task"]["version"]) for c in cells}
    wrong = {
        f"{what} {name} {had}, not {version(what, name)}" for what, name, had in used if had != version(what, name)
    }
    books = json.loads((path.parent / "run.json").read_text(encoding="utf-8"))["grid"]["data"].get("books")
    library: Any = SimpleNamespace(source=lambda need: SimpleNamespace(**books))
    for name, revision in {(c["training"]["backbone"]["name"], c["training"]["backbone"]["revision"]) for c in cells}:
        ours = name == "tiny" or name in CLOSED  # of others the files would be needed
        if ours and Backbones(library, cache, hub=False).card(name).revision != revision:
            wrong.add(f"backbone {name} {revision}")
    return wrong


def version(what: str, name: str) -> int:
    return int((find_recipe(name) if what == "recipe" else plugins.load(f"{what}s", name)).version)


@pytest.mark.parametrize("kind", ["models", "tasks"])
def test_a_raised_version_is_seen(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = next(path for path in SHIPPED if named(path) == "retention-tiny")
    name = {"models": "rmt", "tasks": "key-value"}[kind]
    before, had = stale(path, tmp_path), plugins.load(kind, name).version
    monkeypatch.setattr(plugins.load(kind, name), "version", had + 1)
    assert any(f" {name} " in said and f"not {had + 1}" in said for said in stale(path, tmp_path) - before)


def test_seeds_of_the_first_command_stand_beside_all(boards: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    had = boards.readme.records("tiny-stand-ins")
    first = [r for r in had if r.cell.training.seed < 2]
    more = [
        replace(r, cell=replace(r.cell, training=replace(r.cell.training, seed=r.cell.training.seed + 2)))
        for r in first
    ]
    monkeypatch.setattr(boards.readme, "records", lambda board: first + more)
    head, _, *lines = boards.readme.by_seed().split("\n")
    assert head.startswith("| accuracy, % | seed 0 | seed 1 | seed 2 | seed 3 | seeds 0 and 1 | all 4 | sd | at ")
    for line in lines:  # the same numbers again: means are equal
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1:3] == cells[3:5]
        assert cells[5] == cells[6]


@pytest.mark.parametrize("path", [p for p in SHIPPED if (p.parent / "leaderboard.csv").is_file()], ids=named)
def test_tables_are_of_their_records(path: Path) -> None:
    own = records(path)
    run = json.loads((path.parent / "run.json").read_text(encoding="utf-8"))
    assert sorted(run["grid"]["cells"]) == [record["key"] for record in own]
    values: dict[tuple[str, str, str], list[float]] = {}
    for record in own:
        for m in record["metrics"]:
            place = (record["cell"]["label"], record["cell"]["task"]["name"], m["metric"])
            if not m["slice"] and m["metric"] in ("accuracy", "bits_per_byte"):
                values.setdefault(place, []).append(m["value"])
    with (path.parent / "leaderboard.csv").open(encoding="utf-8", newline="") as file:
        lines = {(r["model"], r["task"], r["metric"]): r["value"] for r in csv.DictReader(file) if not r["slice"]}
    assert values.keys() <= lines.keys()
    for place, found in values.items():
        assert float(lines[place]) == pytest.approx(statistics.mean(found), rel=1e-9), place


def test_every_shipped_board_has_its_command(boards: ModuleType) -> None:
    text = (ROOT / "results/leaderboards/README.md").read_text(encoding="utf-8")
    for name, board in boards.BOARDS.items():
        assert board.also or f"| `{name}` | `memory-bench {board.command}` |" in text
    assert {named(path) for path in SHIPPED} == set(boards.BOARDS)
    for path in SHIPPED:
        assert path.parent == ROOT / boards.BOARDS[named(path)].parent / named(path)


def test_dry_run_prints_exact_commands(boards: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert boards.main(["--dry-run", "--work", str(tmp_path), "--data", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    out = tmp_path / f"boards-{boards.of_code()}"
    assert f"memory-bench run --models hmt,rmt,mplus --tasks pg19,pubmedqa --seeds 5 --out {out}/tiny-stand-ins" in text
    assert f"memory-bench run --suite tiny --data {tmp_path} --no-stand-ins --out {out}/tiny-real" in text
    assert "reproduce" not in text  # only where it is named
    assert len(re.findall(r"^# [\w-]+: \d+ core minutes$", text, flags=re.M)) == 7
    assert boards.main(["--dry-run", "--only", "reproduced"]) == 0
    assert "memory-bench reproduce --data" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--only", "tiny-rael"], "no board is called tiny-rael"), (["--only", "tiny-real"], "tiny-real need --data DIR")],
)
def test_mistakes_are_said_before_anything_runs(
    boards: ModuleType, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        boards.main(words)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def finished(folder: Path, source: Path) -> Path:
    """The folder of a run, as the records of a shipped board would have left it."""
    for record in records(source / "records.jsonl"):
        record["provenance"]["curve"] = [[1, 2.0]]
        (folder / "cells" / record["key"]).mkdir(parents=True)
        (folder / "cells" / record["key"] / "record.json").write_text(json.dumps(record), encoding="utf-8")
    for file in ("run.json", "leaderboard.md", "leaderboard.csv"):
        (folder / file).write_bytes((source / file).read_bytes())
    (folder / "plots").mkdir()
    for suffix in ("png", "svg"):
        (folder / "plots" / f"a.{suffix}").write_bytes(b"")
    return folder


def test_a_finished_board_takes_the_old_ones_place(boards: ModuleType, tmp_path: Path) -> None:
    source = ROOT / "results/leaderboards/squad-real"
    folder = finished(tmp_path / "work", source)
    target = tmp_path / "results/leaderboards/squad-real"
    (target / "plots").mkdir(parents=True)
    (target / "plots" / "old.png").write_bytes(b"")
    boards.ship("squad-real", folder, tmp_path)
    assert (target / "records.jsonl").read_bytes() == (source / "records.jsonl").read_bytes()
    assert sorted(p.name for p in target.rglob("*") if p.is_file()) == [
        "a.png", "leaderboard.csv", "leaderboard.md", "records.jsonl", "run.json",
    ]  # fmt: skip


@pytest.mark.parametrize("fault", ["missing", "failed"])
def test_an_unfinished_board_is_not_shipped(boards: ModuleType, tmp_path: Path, fault: str) -> None:
    source = ROOT / "results/leaderboards/squad-real"
    folder = finished(tmp_path / "work", source)
    path = next((folder / "cells").glob("*/record.json"))
    if fault == "missing":
        path.unlink()
    else:
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "status": "failed"}))
    with pytest.raises(ValueError, match="has no record" if fault == "missing" else "failed"):
        boards.ship("squad-real", folder, tmp_path)
    assert not (tmp_path / "results").exists()


def test_a_run_is_drawn_again_only_with_its_samples(
    boards: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished(tmp_path / "squad-real", ROOT / "results/leaderboards/squad-real")
    ran: list[list[str]] = []
    monkeypatch.setattr(
        boards.subprocess, "run", lambda words, **_: SimpleNamespace(returncode=len(ran.append(words) or ""))
    )
    monkeypatch.setattr(boards, "ship", lambda name, source: ran.append([name, str(source)]))
    words = ["--render", str(tmp_path), "--only", "squad-real"]
    assert boards.main(words) == 1
    assert "has no samples, without which nothing is paired" in capsys.readouterr().err
    assert not ran
    for record in (folder / "cells").iterdir():
        (record / "samples.parquet").write_bytes(b"")
    assert boards.main(words) == 0
    assert ran[0][-3:] == ["report", str(folder), "--quiet"]
    assert ran[1] == ["squad-real", str(folder)]
    assert boards.main(["--render", str(tmp_path), "--only", "tiny-real"]) == 1
    assert "is no run" in capsys.readouterr().err
