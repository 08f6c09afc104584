"""The regression gate: what is red, what is refused, what a reference must be, and that broken memories are seen."""

import json
import math
import re
import shlex
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from memory_bench.baselines.rmt import RMT
from memory_bench.baselines.truncation import Truncation
from memory_bench.cli import app
from memory_bench.errors import UserError
from memory_bench.gate import reference
from memory_bench.gate.judge import compare
from memory_bench.gate.lines import TOLERANCES, Line, Setting, lines
from memory_bench.gate.reference import read_reference, to_json, write_reference
from memory_bench.record import Record, changed_files
from memory_bench.report.board import grouped
from memory_bench.store import Store
from synthetic import make_cell, make_record, question_samples, text_samples

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "results" / "reference" / "smoke-cpu.jsonl"
WORKFLOW = ROOT / "docs" / "ci" / "memory-bench.yml"
Run = Callable[..., tuple[int, str, str]]
SETTING = Setting("key-value", "r1", {"train_tokens": 5}, {"episodes": 9}, {"recipe": "short"}, "b1", "cpu")


def line(values: list[float], metric: str = "accuracy", **given: Any) -> Line:
    base = Line(
        "rmt", "key-value", "key-value", "cpu-minutes", metric, "", dict(enumerate(values)), True, 0.02, SETTING
    )
    return replace(base, **given)


def verdict(run: Line, before: Line, **declared: float) -> str:
    (found,) = compare([run], [before], declared).findings
    return found.verdict


@pytest.mark.parametrize(
    ("now", "wanted"),
    [
        ([0.80, 0.84, 0.82], "holds"),
        ([0.77, 0.77, 0.77], "holds"),  # 3 sigma are .06
        ([0.75, 0.75, 0.75], "worse"),
        ([0.87, 0.87, 0.87], "holds"),
        ([0.89, 0.89, 0.89], "improved"),
    ],
)
def test_a_mean_may_move_by_three_sigma(now: list[float], wanted: str) -> None:
    before = line([0.80, 0.84, 0.82])
    assert before.sigma == pytest.approx(0.02)
    assert verdict(line(now), before) == wanted
    opposite = {"worse": "improved", "improved": "worse", "holds": "holds"}[wanted]
    assert verdict(line(now, higher_is_better=False), replace(before, higher_is_better=False)) == opposite


def test_the_declared_tolerance_counts_where_it_is_more() -> None:
    before = line([0.9, 0.9, 0.9])
    assert verdict(line([0.89] * 3), before) == "holds"
    assert verdict(line([0.88] * 3), before) == "holds"  # at the tolerance, not beyond it
    assert verdict(line([0.87] * 3), before) == "worse"
    assert verdict(line([0.87] * 3), before, accuracy=0.05) == "holds"
    assert verdict(line([0.89] * 3), before, accuracy=0.0) == "worse"
    with pytest.raises(UserError, match=r"Unknown metric of the reference 'accurcy'. Did you mean accuracy?"):
        compare([before], [before], {"accurcy": 1.0})


def test_seeds_that_the_reference_knows_are_compared_with_themselves() -> None:
    before = line([0.9, 0.6, 0.9, 0.6], tolerance=0.0)
    (found,) = compare([line([0.9, 0.6])], [before]).findings
    assert (found.before, found.now, found.change) == (0.75, 0.75, 0)
    only_first = compare([line([0.9])], [before])
    assert only_first.findings[0].before == 0.9
    assert not only_first.notes
    others = compare([replace(before, values={7: 0.8})], [before])
    assert others.findings[0].before == pytest.approx(0.75)
    assert "does not have all of the seeds 7" in others.notes[0]


def test_what_is_not_there_is_red_and_what_is_new_is_not() -> None:
    before = line([0.9] * 3)
    found = compare([line([0.9] * 3, model="hmt")], [before])
    assert [f.verdict for f in found.findings] == ["missing", "new"]
    assert not found.holds
    assert compare([before, line([0.9] * 3, model="hmt")], [before]).holds


@pytest.mark.parametrize(
    ("metric", "before", "now", "higher", "wanted"),
    [
        ("status", [0, 0, 0], [0, 0, 1], False, "worse"),
        ("status", [0, 0, 1], [0, 0, 1], False, "holds"),
        ("status", [1, 1, 1], [2, 0, 0], False, "worse"),  # a mean would call it better
        ("status", [1, 1, 1], [0, 0, 0], False, "improved"),
        ("look_ahead", [0, 0, 0], [16, 16, 16], False, "worse"),
        ("parity", [1, 1, 1], [0, 0, 0], True, "worse"),
        ("learned", [1, 1, 1], [1, 1, 0], True, "holds"),
        ("learned", [1, 1, 1], [1, 0, 0], True, "worse"),
        ("eval_flops_per_token", [1e5] * 3, [1.001e5] * 3, False, "worse"),
        ("eval_flops_per_token", [1e5] * 3, [1e5 + 0.01] * 3, False, "holds"),
        ("state_bytes", [1024] * 3, [1020] * 3, False, "improved"),
    ],
)
def test_facts_and_costs(metric: str, before: list[float], now: list[float], higher: bool, wanted: str) -> None:
    first = line(before, metric, higher_is_better=higher)
    first = replace(first, tolerance=TOLERANCES[metric].at(first.mean))
    assert verdict(line(now, metric, higher_is_better=higher), first) == wanted


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"device": "NVIDIA H200"}, "the device of rmt on key-value is 'NVIDIA H200' in the run and 'cpu' in the"),
        ({"data": "key-value (stand-in: x)"}, "the data of rmt on key-value is 'key-value (stand-in: x)'"),
        ({"data_revision": "r2"}, "the revision of the data"),
        (
            {"limits": {"train_tokens": 9}},
            "the limits of the budget of rmt on key-value is train_tokens = 9 in the run",
        ),
        ({"options": {"episodes": 8}}, "the options of the task"),
        ({"training": {"recipe": "long"}}, "the training data or recipe"),
        ({"backbone_revision": "b2"}, "the backbone's revision"),
    ],
)
def test_other_circumstances_are_refused(change: dict[str, Any], said: str) -> None:
    before = line([0.9] * 3)
    with pytest.raises(UserError, match=r"^Not comparable: ") as refused:
        compare([replace(before, setting=replace(SETTING, **change))], [before])
    assert said in str(refused.value)
    assert str(refused.value).count(".") - str(refused.value).count("0.") <= 2


def test_a_later_option_is_a_note() -> None:
    before = line([0.9] * 3)
    found = compare([replace(before, setting=replace(SETTING, options={"episodes": 9, "new": 1}))], [before])
    assert found.holds
    assert found.notes == ("key-value: the reference does not know the option new = 1.",)
    with pytest.raises(UserError, match="the options of the task"):
        compare([replace(before, setting=replace(SETTING, options={"new": 1}))], [before])


def test_another_budget_or_backbone_is_refused_and_another_task_is_missing() -> None:
    before = line([0.9] * 3)
    for change in ({"budget": "smoke"}, {"backbone": "tiny"}):
        with pytest.raises(UserError, match="Not comparable: the run has key-value with backbone"):
            compare([replace(before, **change)], [before])
    found = compare([replace(before, task="pg19")], [before])
    assert [f.verdict for f in found.findings] == ["missing", "new"]


def three_seeds(folder: Path, *, right: float = 0.9, device: str = "cpu", status: str = "ok", **facts: Any) -> Store:
    """A run of two models on questions and one on text, three seeds."""
    store = Store.open_or_create(folder)
    for seed in range(3):
        for name, share in (("truncation", 0.33), ("rmt", right)):
            cell = make_cell(name, "pubmedqa", seed)
            put(store, cell, questions(seed, share), status if name == "rmt" else "ok", device, facts)
        put(store, make_cell("hmt", "pg19", seed), text(seed), "ok", device, facts)
    return store


@cache
def questions(seed: int, right: float) -> Any:
    return question_samples(seed, {16: right, 64: right}, questions=30)


@cache
def text(seed: int) -> Any:
    return text_samples(seed, 0.02, documents=4)


def put(
    store: Store,
    cell: Any,
    samples: Any,
    status: str = "ok",
    device: str = "cpu",
    facts: dict[str, Any] | None = None,
) -> None:
    record = make_record(cell, samples, status, "" if status == "ok" else "RuntimeError: no")
    versions = {"torch": "2.13.0", "python": "3.11.9"}
    more = {"device": device, "commit": "abc", "dirty": False, "versions": versions, **(facts or {})}
    store.write_record(replace(record, provenance={**record.provenance, **more}), None)  # the gate reads no samples


def measured(store: Store) -> tuple[list[Line], list[Record]]:
    rows = [row for board in grouped(store) for row in board]
    return lines(rows, {"rmt": True}), [record for row in rows for record in row]


def test_lines_of_a_run(tmp_path: Path) -> None:
    found, _ = measured(three_seeds(tmp_path))
    by = {(x.model, x.metric, x.slice): x for x in found}
    accuracy = by["rmt", "accuracy", ""]
    assert accuracy.mean == pytest.approx(0.9, abs=0.05)
    assert list(accuracy.values) == [0, 1, 2]
    assert 0 < accuracy.sigma < 0.05
    assert accuracy.setting.device == "cpu"
    assert accuracy.setting.data == "pubmedqa (stand-in: invented studies)"
    assert {"distance=16", "distance=64", "control:wiped"} <= {x.slice for x in found if x.model == "rmt"}
    assert by["rmt", "learned", ""].mean == by["rmt", "parity", ""].mean == 1
    assert by["truncation", "parity", ""].mean == by["rmt", "status", ""].mean == 0
    assert ("truncation", "learned", "") not in by, "it has no memory"
    assert not by["hmt", "bits_per_byte", ""].higher_is_better
    assert not [x for x in found if x.metric == "ppl_token"], "no tolerance was declared for it"
    assert not [x for x in found if x.slice == "control:ceiling"], "no memory takes part in it"


def test_a_cell_that_did_not_finish_has_a_status_and_no_numbers(tmp_path: Path) -> None:
    before, _ = measured(three_seeds(tmp_path / "before"))
    after, _ = measured(three_seeds(tmp_path / "after", status="over_budget"))
    found = {(f.line.model, f.line.metric, f.line.slice): f.verdict for f in compare(after, before).findings}
    assert found["rmt", "status", ""] == "worse"
    assert found["rmt", "accuracy", ""] == "missing"
    assert {v for (model, _, _), v in found.items() if model != "rmt"} == {"holds"}


def test_a_scratch_model_that_was_run_again_counts_once(tmp_path: Path) -> None:
    store = three_seeds(tmp_path)
    for seed in range(3):
        cell = make_cell("rmt", "pubmedqa", seed)
        edited = replace(cell, training=replace(cell.training, model=replace(cell.training.model, revision="edited")))
        put(store, edited, questions(seed, 0.4), "ok", "cpu", {"finished": "2027-01-01T00:00:00+00:00"})
    found, _ = measured(store)
    (accuracy,) = [x for x in found if (x.model, x.metric, x.slice) == ("rmt", "accuracy", "")]
    assert accuracy.mean < 0.5


def test_a_reference_is_read_as_it_was_written(tmp_path: Path) -> None:
    found, records = measured(three_seeds(tmp_path / "run"))
    path = tmp_path / "reference.jsonl"
    write_reference(path, found, records, ())
    again = read_reference(path)
    assert [x.identity for x in again] == [x.identity for x in found]
    assert compare(found, again).holds
    assert not compare(found, again).of("improved", "new")
    plain = json.loads(path.read_text().splitlines()[0])
    assert {"schema", "model", "backbone", "task", "budget", "metric", "slice", "mean", "sigma", "seeds", "tolerance",
            "higher_is_better", "data", "data_revision", "device", "versions", "commit"} <= plain.keys()  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 2}, "it has schema 2, this version reads 1"),
        ({"mean": 0.5}, "it was edited"),
        ({"sigma": 0.5}, "it was edited"),
        ({"surprise": 1}, "Unknown field of a line 'surprise'"),
        ({"values": {}}, "it was edited"),
        ({"higher_is_better": "false"}, "'higher_is_better' must be true or false, not \"false\""),
        ({"mean": "0.8"}, "'mean' must be a number, not \"0.8\""),
        ({"limits": None}, "'limits' must be an object, not null"),
        ({"tolerance": math.nan}, "NaN is no number in JSON"),
    ],
)
def test_a_spoilt_reference_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({**to_json(line([0.9, 0.8, 0.7])), **change}) + "\n")
    with pytest.raises(UserError, match=f"Cannot use line 1 of the reference .*({said})"):
        read_reference(path)
    for content in ("", "[]\n", "no JSON\n"):
        path.write_text(content)
        with pytest.raises(UserError, match=r"is empty|Cannot use line 1"):
            read_reference(path)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"facts": {"dirty": True}}, "were measured in a working tree with uncommitted changes; commit, and run again"),
        ({"status": "failed"}, "rmt · pubmedqa · seed 0 failed"),
    ],
)
def test_no_reference_without_a_clean_tree_or_with_failures(facts: dict[str, Any], said: str, tmp_path: Path) -> None:
    store = three_seeds(tmp_path / "run", **facts.pop("facts", {}), **facts)
    found, records = measured(store)
    with pytest.raises(UserError, match=r"^No reference was written: ") as refused:
        write_reference(tmp_path / "r.jsonl", found, records, ())
    assert said in str(refused.value)
    assert not (tmp_path / "r.jsonl").exists()


def test_a_reference_needs_three_seeds_and_one_commit(tmp_path: Path) -> None:
    store = three_seeds(tmp_path / "run")
    put(store, make_cell("mplus", "pubmedqa", 0), questions(0, 0.9))
    with pytest.raises(
        UserError, match=r"mplus on pubmedqa has 1 seed\(s\), and the spread between runs takes at least 3"
    ):
        write_reference(tmp_path / "r.jsonl", *measured(store), ())
    store = three_seeds(tmp_path / "other")
    put(store, make_cell("rmt", "pubmedqa", 3), questions(3, 0.9), "ok", "cpu", {"commit": "def"})
    with pytest.raises(UserError, match=r"its cells were measured at 2 commits \(abc, def\)"):
        write_reference(tmp_path / "r.jsonl", *measured(store), ())


def test_the_tree_must_be_clean_now(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()

    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *identity, *arguments], cwd=tree, check=True, capture_output=True)

    for name in ("code.py", "gate.jsonl"):
        (tree / name).write_text("1\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    (tree / "not-tracked").write_text("1\n")
    assert changed_files(tree) == []
    found, records = measured(three_seeds(tmp_path / "run"))
    write_reference(tree / "gate.jsonl", found, records, (tree,))
    write_reference(tree / "gate.jsonl", found, records, (tree,))  # itself does not count
    (tree / "code.py").write_text("2\n")
    with pytest.raises(UserError, match=r"the working tree has uncommitted changes \(code.py, 1 in all\)"):
        write_reference(tree / "gate.jsonl", found, records, (tree,))


@pytest.fixture
def call(invoke: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """`invoke`, outside of any checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("memory_bench.record.checkout", lambda: {"commit": "abc", "dirty": False})
    monkeypatch.setattr(reference, "changed_files", lambda place: [])
    monkeypatch.setattr("memory_bench.command.commands.report", lambda *given, **options: 0)
    return invoke


def test_the_command(call: Run, tmp_path: Path) -> None:
    three_seeds(tmp_path / "good")
    assert call("check", "good", "--write", "gate.jsonl")[:2] == (0, "gate.jsonl: 36 lines of 9 cells.\n")
    code, out, _ = call("check", "good", "--against", "gate.jsonl")
    assert code == 0
    assert "The gate holds: 36 lines, none worse, none missing." in out
    assert len(out.splitlines()) < 12
    three_seeds(tmp_path / "bad", right=0.4)
    code, out, _ = call("check", "bad", "--against", "gate.jsonl", "--markdown", "new/m.md", "--junit", "new/j.xml")
    assert code == 1
    assert "REGRESSION" in out
    assert re.search(r"worse +\| rmt +\| pubmedqa +\| accuracy ", out)
    assert "truncation" not in out
    text = Path("new/m.md").read_text()
    assert text.startswith("### memory-bench: REGRESSION: of 36 lines ")
    assert "<details>" in text
    suite = ET.parse("new/j.xml").getroot()[0]
    failures = {case.get("name") for case in suite if case.find("failure") is not None}
    assert (suite.get("tests"), suite.get("failures")) == ("36", str(len(failures)))
    assert failures == {"rmt accuracy", "rmt accuracy distance=16", "rmt accuracy distance=64"}
    assert "rmt on pubmedqa, accuracy: worse, " in (ET.parse("new/j.xml").getroot().find(".//failure").get("message"))  # type: ignore[union-attr]
    code, out, _ = call("check", "bad", "--against", "gate.jsonl", "--tolerance", "accuracy=0.9", "--json")
    assert (code, json.loads(out)["holds"], len(json.loads(out)["lines"])) == (0, True, 36)
    three_seeds(tmp_path / "better", right=1.0)
    code, out, _ = call("check", "better", "--against", "gate.jsonl", "--tolerance", "accuracy=0")
    assert code == 0
    assert "A leak looks like progress" in out


def test_a_cell_without_a_result_is_red(call: Run, tmp_path: Path) -> None:
    """The mean over the other seeds may well hold."""
    store = three_seeds(tmp_path / "run")
    assert call("check", "run", "--write", "gate.jsonl")[0] == 0
    cells = [record.cell for record in store.records()]
    store.write_run({"cells": [c.key for c in cells], "roles": {c.key: [c.role, c.label] for c in cells}})
    assert call("check", "run", "--against", "gate.jsonl")[0] == 0
    store.remove(next(c.key for c in cells if c.label == "rmt"))
    code, out, _ = call("check", "run", "--against", "gate.jsonl", "--junit", "j.xml")
    assert code == 1
    assert "REGRESSION: 1 cell(s) without a result (rmt)" in out
    assert ET.parse("j.xml").getroot().get("failures") == "1"
    code, _, err = call("check", "run", "--write", "again.jsonl")
    assert (code, "1 cells have no result (rmt …); finish the run" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run",), "Give either --against FILE"),
        (("run", "--against", "a", "--write", "b"), "Give either --against FILE"),
        (("absent", "--against", "gate.jsonl"), "absent holds no results"),
        (("run", "--against", "absent.jsonl"), "Cannot read the reference absent.jsonl: No such file or directory"),
        (("run", "--against", "gate.jsonl", "--tolerance", "accuracy=much"), "give metric=number"),
        (("run", "--against", "gate.jsonl", "--tolerance", "accuracy=-1"), "-1 is no number from 0"),
        (("run", "--against", "gate.jsonl", "--tolerance", "absent.toml"), "give metric=number"),
        (("h200", "--against", "gate.jsonl"), "Not comparable: the device of hmt on pg19 is 'NVIDIA H200'"),
    ],
)
def test_what_cannot_be_compared_is_a_sentence_and_2(
    arguments: tuple[str, ...], said: str, call: Run, tmp_path: Path
) -> None:
    three_seeds(tmp_path / "run")
    three_seeds(tmp_path / "h200", device="NVIDIA H200")
    call("check", "run", "--write", "gate.jsonl")
    code, out, err = call("check", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err


def test_a_leak_is_said_to_be_an_improvement(call: Run, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = world.arguments("--tasks", "pg19", "--seeds", "3", "--no-controls", "--quiet", "--models", "truncation")
    assert call("run", *asked, "--out", "honest")[0] == 0
    step = Truncation.step

    def told(self: Truncation, *given: Any, **options: Any) -> Any:
        readout, state = step(self, *given, **options)
        weight = self.backbone.model.lm_head.weight  # every position is told which token it predicts
        readout.hidden[:, :-1] += 2 * weight[given[1].ids[:, 1:]]
        return readout, state

    monkeypatch.setattr(Truncation, "step", told)
    assert call("run", *asked, "--out", "leak")[0] == 0
    assert call("check", "honest", "--write", "gate.jsonl")[0] == 0
    code, out, _ = call("check", "honest", "--against", "gate.jsonl")
    assert (code, "IMPROVED" in out) == (0, False)
    code, out, _ = call("check", "leak", "--against", "gate.jsonl")
    assert code == 0
    assert re.search(r"improved \| truncation \| pg19 \| bits/byte ", out), out
    assert "IMPROVED: " in out


@pytest.mark.skipif(not SHIPPED.is_file(), reason="no reference here")
def test_a_memory_that_is_never_written_is_red(call: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cells of the gate's own suite, against its own reference."""
    monkeypatch.setattr("memory_bench.running.grid.CONTROLS", ())
    rmt = [text for text in SHIPPED.read_text().splitlines() if json.loads(text)["model"] == "rmt"]
    Path("rmt.jsonl").write_text("\n".join(rmt) + "\n")
    step = RMT.step

    def unwritten(self: RMT, state: Any, segment: Any, *, write: bool = True) -> Any:
        return step(self, state, segment, write=False)

    for broken, wanted in ((step, 0), (unwritten, 1)):
        monkeypatch.setattr(RMT, "step", broken)
        given = ("--suite", "gate", "--models", "rmt", "--seeds", "0,", "--executor", "inline", "--quiet")
        assert call("run", *given, "--out", f"out{wanted}")[0] == 0
        code, out, _ = call("check", f"out{wanted}", "--against", "rmt.jsonl")
        assert code == wanted, out
    assert re.search(r"worse +\| rmt +\| key-value +\| accuracy +\|", out)
    assert re.search(r"worse +\| rmt +\| key-value +\| learned +\| 100% of seeds +\| 0% of seeds", out)
    assert "state bytes" not in out


@pytest.mark.skipif(not SHIPPED.is_file(), reason="no reference here")
def test_the_shipped_reference_is_of_the_gate_suite() -> None:
    found = read_reference(SHIPPED)
    assert {x.model for x in found} == {"hmt", "hmt (recall off)", "rmt", "mplus", "truncation", "xl-cache"}
    assert {x.setting.device for x in found} == {"cpu"}
    assert {x.setting.data for x in found} == {"key-value"}
    assert min(len(x.values) for x in found) >= reference.SEEDS
    assert all(x.commit for x in found)
    for x in found:  # what a memory is worth is more than what the gate lets pass
        if x.metric == "accuracy" and x.slice == "" and x.model in ("hmt", "rmt", "mplus"):
            assert x.mean - 0.1 > 2 * max(x.tolerance, 3 * x.sigma)


def test_the_workflow_can_be_copied() -> None:
    """It is YAML, and its commands are those of the installed package."""
    workflow = yaml.safe_load(WORKFLOW.read_text())
    jobs = workflow["jobs"]
    assert {"gate-cpu", "gate-gpu"} <= jobs.keys()
    assert "self-hosted" in jobs["gate-gpu"]["runs-on"]
    assert workflow[True].keys() >= {"push", "pull_request"}  # YAML 1.1 reads `on` as true
    command: Any = get_command(app)
    named = []
    for job in jobs.values():
        assert any("upload-artifact" in step.get("uses", "") for step in job["steps"])
        for step in job["steps"]:
            for words in map(shlex.split, step.get("run", "").replace("\\\n", " ").splitlines()):
                if words and words[0] not in ("pip", "memory-bench", "cat"):
                    raise AssertionError(f"{words[0]} is no command of an installation")
                if words and words[0] == "memory-bench":
                    named.append(words[1])
                    known = {o for parameter in command.commands[words[1]].params for o in parameter.opts}
                    assert {w.split("=")[0] for w in words if w.startswith("--")} <= known, words
    assert {"run", "check", "fetch"} <= set(named)
