"""The page's structure, without a browser: nothing is loaded, texts are texts, every number has its details."""

import base64
import csv
import gzip
import hashlib
import io
import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from memory_bench.report import libraries as packages
from memory_bench.report.board import collect
from memory_bench.report.build import Report, build
from memory_bench.report.commands import row_command, run_command
from memory_bench.report.documents import extremes
from memory_bench.report.libraries import Libraries, as_script, find_libraries
from memory_bench.report.page_data import thinned
from memory_bench.running.grid import split_names
from memory_bench.running.options import parse_limits, parse_seeds, parse_settings
from memory_bench.store import Store
from synthetic import TASKS, few_questions, make_cell, make_record, make_store, question_samples, text_samples

FAKE = Libraries((("charts", "window.vegaEmbed = 1;"), ("table", "window.DataTable = 2;")), "td { }", "Made up.")
NASTY = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "=1+1", "[x](javascript:1)", "**a** `b` | c")


class Parts(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.inside: dict[str, list[str]] = {}
        self.shown: list[str] = []
        self._at = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.append((tag, values))
        self._at = tag
        if tag in ("script", "style"):
            self.inside.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        self._at = ""

    def handle_data(self, data: str) -> None:
        if self._at in ("script", "style"):
            self.inside[self._at][-1] += data
        else:
            self.shown.append(data)

    def scripts(self) -> list[tuple[dict[str, str], str]]:
        """Attributes and source of every script."""
        return list(zip([own for tag, own in self.tags if tag == "script"], self.inside.get("script", []), strict=True))

    def data(self) -> dict[str, Any]:
        """What the page's script reads."""
        return next(json.loads(text) for own, text in self.scripts() if own.get("type") == "application/json")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return build(make_store(tmp_path_factory.mktemp("runs") / "run"), TASKS, {"rmt": "exact"}, libraries=FAKE)


@pytest.fixture(scope="module")
def parts(report: Report) -> Parts:
    return Parts(report.html())


def test_a_page_loads_nothing_and_runs_what_its_policy_names(report: Report, parts: Parts) -> None:
    policy = next(own["content"] for tag, own in parts.tags if own.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert "unsafe" not in rules["script-src"]
    running = [text for own, text in parts.scripts() if own.get("type") not in ("application/json", "text/plain")]
    packed = [text for own, text in parts.scripts() if own.get("id", "").startswith("library-")]
    sources = [gzip.decompress(base64.b64decode(text)).decode() for text in packed]
    named = {f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in
             (*running, *(source for source in sources if "window." in source))}  # fmt: skip
    assert set(rules["script-src"].split()) == named
    assert len(running) == 1
    for tag, own in parts.tags:
        assert not [name for name in own if name.startswith("on")], (tag, own)
        assert not {"src", "srcset", "data", "action"} & own.keys(), (tag, own)
        assert own.get("href", "#").startswith("#"), (tag, own)
    assert not re.findall(r"url\(|@import", "".join(parts.inside["style"]))
    # The only address in our script names the grammar's version; it is never asked for.
    assert set(re.findall(r"https?://[^\s\"'`]+", running[0])) == {"https://vega.github.io/schema/vega-lite/v6.json"}
    assert report.html() == report.html()


def test_every_number_has_its_details(report: Report, parts: Parts) -> None:
    data = parts.data()
    rows = {(data["boards"][row["board"]]["task"], row["label"]): row for row in data["rows"]}
    lines = [line for line in report.rows() if line["value"] is not None]
    assert lines
    for line in lines:
        row = rows[str(line["task"]), str(line["model"])]
        found = [n for n in row["numbers"] if (n[0], n[1]) == (line["metric"], line["slice"])]
        assert [n[2] for n in found] == [pytest.approx(line["value"], rel=1e-5)], (row["label"], line)
        assert [n[5] for n in found] == [line["n"]]
    buttons = [own["data-row"] for tag, own in parts.tags if tag == "button" and "data-row" in own]
    ids = [own["id"] for tag, own in parts.tags if tag == "tr" and "id" in own]
    assert sorted(buttons) == sorted(ids) == sorted(row["id"] for row in data["rows"])
    assert len(set(ids)) == len(ids) == sum(len(board.everything) for board in report.boards)
    for row in data["rows"]:
        assert row["command"].startswith("memory-bench run --models ")
        assert row["asked"]["task data"]
        assert row["seeds"]
        for seed in row["seeds"]:
            assert re.fullmatch(r"[0-9a-f]{16}", seed["key"])
            assert data["facts"][seed["made"]]


def test_the_details_are_those_of_the_records(report: Report, parts: Parts) -> None:
    data = parts.data()
    board = report.boards[0]
    rows = [row for row in data["rows"] if row["board"] == 0]
    assert [row["label"] for row in rows] == [row.label for row in board.everything]
    for row, own in zip(rows, board.everything, strict=True):
        assert [seed["key"] for seed in row["seeds"]] == [record.key for record in own.records]
        assert row["status"] == own.status
    mplus = next(row for row in rows if row["label"] == "mplus")
    assert mplus["status"] == "over_budget"
    assert mplus["limits"] == ["eval_seconds: segment 6/8"]
    hmt = [row["label"] for row in rows].index("hmt")
    rmt = [row["label"] for row in rows].index("rmt")
    (pair,) = [p for p in data["boards"][0]["pairs"] if {p[0], p[1]} == {hmt, rmt}]
    known = board.pair(rows[pair[0]]["label"], rows[pair[1]]["label"])
    assert known is not None
    assert pair[2:5] == [pytest.approx(x, rel=1e-5) for x in (known.value, known.low, known.high)]
    assert (pair[6], pair[7]) == (int(known.told_apart), known.n)


def test_without_the_libraries_there_are_plain_tables_and_a_sentence(report: Report) -> None:
    page = replace(report, libraries=packages.missing("no package")).html()
    plain = Parts(page)
    assert not plain.scripts()
    assert "script-src 'none'" in page
    assert "pip install memory-bench[page]" in " ".join(plain.shown)
    for label in ("xl-cache", "longmem", "hmt"):
        assert label in plain.shown


def test_names_are_text_everywhere(tmp_path: Path) -> None:
    store = Store.open_or_create(tmp_path / "a <b>run *x*")
    for i, label in enumerate(NASTY):
        samples = text_samples(0, 0.01 * i)
        samples["episode"] = [f"{name} <i>{label}" for name in samples["episode"]]
        samples["cluster"] = samples["episode"]
        store.write_record(make_record(make_cell("hmt", label=label, place=i), samples), samples)
    built = build(store, TASKS, libraries=FAKE)
    parts = Parts(built.html())
    assert {tag for tag, _ in parts.tags}.isdisjoint({"img", "i", "b"})
    assert len(parts.scripts()) == 1 + 3 + 1  # data, two libraries with a style, our own
    assert all(any(label in shown for shown in parts.shown) for label in NASTY)
    assert sorted(row["label"] for row in parts.data()["rows"]) == sorted(NASTY)
    documents = parts.data()["rows"][0]["documents"]
    assert "<i>" in documents["worst"][0][0]
    text = built.markdown()
    for said in (r"\<script>alert(1)\</script>", r"\[x](javascript:1)", r"\*\*a\*\* \`b\` \| c", r"a \<b>run \*x\*"):
        assert said in text, said
    labels = {line["model"] for line in csv.DictReader(io.StringIO(built.csv()))}
    assert "'=1+1" in labels
    assert "=1+1" not in labels
    assert "=1+1" in {line["model"] for line in built.rows()}  # JSON computes nothing


@pytest.mark.parametrize("sign", ["=", "+", "-", "@", "\t"])
def test_no_label_becomes_a_formula(tmp_path: Path, sign: str) -> None:
    store = Store.open_or_create(tmp_path)
    samples = text_samples(0, 0.0)
    store.write_record(make_record(make_cell("hmt", label=f"{sign}1+1"), samples), samples)
    line = next(csv.DictReader(io.StringIO(build(store, TASKS).csv())))
    assert line["model"] == f"'{sign}1+1"
    assert float(line["value"]) > 0  # numbers are as they were


def test_commands_ask_for_what_was_run(tmp_path: Path) -> None:
    store = few_questions(tmp_path, ("rmt",))
    settings = {"rmt": {"memory": 8, "on": True, "names": ["a", "b c"]}, "other": {"x": 1}, "pubmedqa": {"distance": 4}}
    request = {"models": ["rmt[bptt=1]", "other"], "tasks": ["pubmedqa", "pg19"], "backbone": "tiny", "seeds": [0],
               "budget": {"name": "cpu-minutes"}, "limits": {"": 3, "pg19": 2}, "settings": settings,
               "controls": False}  # fmt: skip
    run = {"grid": {"request": request, "data": {"books": {"origin": "folder"}}}}
    (board,) = collect(store, TASKS)
    words = shlex.split(run_command(run, [board]))
    options = dict(zip(words[2::2], words[3::2], strict=False))
    assert split_names(options["--models"]) == ("rmt[bptt=1]", "other")
    assert parse_seeds(options["--seeds"], 5) == (0,)
    assert parse_limits(options["--limit"]) == {"": 3, "pg19": 2}
    given = tuple(words[i + 1] for i, word in enumerate(words) if word == "--set")
    assert parse_settings(given) == settings
    assert words[-4:] == ["--no-controls", "--data", "DIR", "--no-stand-ins"]
    row = board.rows[0]
    cell = replace(row.records[0].cell, label="rmt[bptt=1] (memory off)", controls=False)
    ablated = replace(row, label=cell.label, records=(replace(row.records[0], cell=cell),))
    words = shlex.split(row_command(run, board, ablated))
    options = dict(zip(words[2::2], words[3::2], strict=False))
    assert options["--models"] == "rmt[bptt=1]"
    given = tuple(words[i + 1] for i, word in enumerate(words) if word == "--set")
    assert parse_settings(given) == {name: settings[name] for name in ("rmt", "pubmedqa")}
    assert run_command({}, [board]) == ""
    assert "--models rmt " in row_command({}, board, row)


def test_extremes_name_every_document_once(tmp_path: Path) -> None:
    store = Store.open_or_create(tmp_path)
    samples = text_samples(0, 0.0)
    store.write_record(make_record(make_cell("hmt"), samples), samples)
    (board,) = collect(store, TASKS)
    found = extremes(board.rows[0], higher_is_better=False)
    assert (found["of"], len(found["best"]), len(found["worst"])) == (24, 10, 10)
    assert found["best"][0][1] < found["best"][-1][1] < found["worst"][-1][1] < found["worst"][0][1]
    whole = samples[samples.control == ""].groupby("episode")[["nll", "nbytes"]].sum()
    name, value, _ = found["worst"][0]
    assert value == pytest.approx((whole.nll / whole.nbytes)[name] / 0.6931471805599453)
    few = question_samples(0, {16: 0.5}, questions=5)
    few["right"] = few.predicted == few.answer
    other = Store.open_or_create(tmp_path / "few")
    other.write_record(make_record(make_cell("hmt", "pubmedqa"), few.drop(columns="right")), few.drop(columns="right"))
    (board,) = collect(other, TASKS)
    found = extremes(board.rows[0], higher_is_better=True)
    assert sorted(name for end in ("best", "worst") for name, *_ in found[end]) == [f"study-00{i}" for i in range(5)]
    shares: pd.Series[float] = few[few.control == ""].groupby("cluster")["right"].mean()
    assert all(value == shares[name] for end in ("best", "worst") for name, value, _ in found[end])


def test_a_curve_is_thinned_by_means() -> None:
    curve = [[10 * i, float(i)] for i in range(1, 101)]
    found = thinned(curve, 10)
    assert found == [[100 * (i + 1), 10 * i + 5.5] for i in range(10)]
    assert thinned([[1, None], [2, 3.0]]) == [[2, 3]]
    assert thinned([]) == []


def test_libraries_that_are_not_there_or_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(packages, "PACKAGES", ("no-such-package-here",))
        found = find_libraries()
        assert not found
        assert "no-such-package-here is not installed" in found.said
    assert as_script("var a=1;export{a as default,b as c};\n/* end */", {"default": "X"}).count("window.X=a;") == 1
    for other in ("var a=1;", "export{a as b};"):
        with pytest.raises(ValueError, match="JavaScript"):
            as_script(other, {"default": "X"})


def test_a_large_page_is_small_enough(tmp_path: Path) -> None:
    """24 models on 4 tasks, with all their details, stay below 2 MB."""
    libraries = find_libraries()
    if not libraries:
        pytest.skip(libraries.said)
    store = Store.open_or_create(tmp_path)
    curve = [[1000 * i, 5.0 - 0.001 * i] for i in range(200)]
    for name in range(24):
        for seed in (0, 1):
            samples = text_samples(seed, 0.001 * name, segment=64)
            record = make_record(make_cell(f"model-{name}", seed=seed, options="x" * 300), samples)
            store.write_record(replace(record, provenance={**record.provenance, "curve": curve}), samples)
    built = build(store, TASKS)
    tables = len(built.html().encode())
    whole = len(replace(built, libraries=libraries).html().encode())
    assert whole + 3 * (whole - 662_000) < 2_000_000, (tables, whole)
