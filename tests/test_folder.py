"""Folder: which files are texts, what their identity is, splits, parts of texts, and what is refused."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from memory_bench.backbone.tokenizer import word_level
from memory_bench.data import Library
from memory_bench.data.texts import Texts
from memory_bench.driver.encoding import encode_episode
from memory_bench.episode import Read
from memory_bench.errors import DataError, UserError
from memory_bench.tasks.folder import Folder
from memory_bench.testing import check_task

BOTH = {"train/a.txt": "seven words that a model may learn", "train/b.txt": "more of them", "test/c.txt": "unseen text"}


def made(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def library(tmp_path: Path, data: Path | None = None) -> Library:
    return Library(data, tmp_path / "cache", hub=False)


def task(folder: Path, **options: Any) -> Folder:
    return Folder(Folder.Config(path=str(folder), **options))


def read(folder: Path, tmp_path: Path, limit: int | None = None, **options: Any) -> dict[str, str]:
    found = {}
    for episode in task(folder, **options).episodes(library(tmp_path), limit):
        (event,) = episode.events
        assert isinstance(event, Read)
        assert event.scored
        found[episode.id] = event.text
    return found


def test_every_text_below_the_folder_is_a_document(tmp_path: Path) -> None:
    files = {"b.txt": "two", "a/deep/one.txt": "one", "notes.md": "no", ".git/x.txt": "no", ".hidden.txt": "no",
             "empty.txt": " \n", "c.txt": "\ufeffthree\r\nlines\n"}  # fmt: skip
    folder = made(tmp_path / "mine", files)
    assert read(folder, tmp_path) == {"a/deep/one.txt": "one", "b.txt": "two", "c.txt": "three\nlines\n"}
    assert list(read(folder, tmp_path, files="*.md, b.*")) == ["b.txt", "notes.md"]
    assert list(read(folder, tmp_path, 2)) == ["a/deep/one.txt", "b.txt"]
    assert list(read(folder, tmp_path, documents=2)) == ["a/deep/one.txt", "b.txt"]


def test_its_identity_is_content_and_not_its_place(tmp_path: Path) -> None:
    first, second = made(tmp_path / "one" / "mine", BOTH), made(tmp_path / "two" / "mine", BOTH)
    sources = [task(folder).data(library(tmp_path)) for folder in (first, second)]
    assert sources[0] == sources[1]
    assert (sources[0].label, sources[0].origin, sources[0].stand_in) == ("folder mine", "folder", False)
    for name, text in (("train/a.txt", "other words"), ("test/c.txt", "unseen  text"), ("test/d.txt", "one more")):
        assert task(made(second, {name: text})).data(library(tmp_path)).revision != sources[0].revision
        made(second, BOTH)
        (second / "test/d.txt").unlink(missing_ok=True)
    (second / "test/c.txt").rename(second / "test/e.txt")
    assert task(second).data(library(tmp_path)).revision != sources[0].revision
    made(first, {"readme.md": "no text of this task"})
    assert task(first).data(library(tmp_path)) == sources[0]


def test_training_texts_are_apart_from_the_test(tmp_path: Path) -> None:
    folder = made(tmp_path / "mine", BOTH)
    own = task(folder)
    assert list(read(folder, tmp_path)) == ["test/c.txt"]
    plan = own.plan(library(tmp_path), pretrained=True)
    assert plan.corpus == "folder"
    encode = word_level(sorted({word for text in BOTH.values() for word in text.split()}))
    (line,) = own.corpus(library(tmp_path), plan, encode).batch(1, 1, 100, torch.Generator().manual_seed(0))
    assert len(line) == 10  # all of both training texts, nothing of the test


@pytest.mark.parametrize("files", [{"a.txt": "text"}, {"test/a.txt": "text"}, {"train/a.txt": "text"}], ids=str)
def test_any_other_folder_is_all_test_and_books_are_trained_on(tmp_path: Path, files: dict[str, str]) -> None:
    folder = made(tmp_path / "mine", files)
    assert list(read(folder, tmp_path)) == list(files)
    assert task(folder).plan(library(tmp_path), pretrained=False).corpus == "books"


def test_a_part_of_every_text_in_bytes_or_in_tokens(tmp_path: Path) -> None:
    folder = made(tmp_path / "mine", {"a.txt": "one two three four five", "b.txt": "one"})
    assert read(folder, tmp_path, extent="bytes:4-13") == {"a.txt": "two three"}
    (episode, _) = task(folder, tokens=3).episodes(library(tmp_path), None)
    stream = encode_episode(episode, word_level(["one", "two", "three", "four", "five"]), 0)
    assert len(stream.line) == 3
    assert int(stream.nbytes.sum()) == len("one two three")


def test_the_data_folder_has_them_under_texts(tmp_path: Path) -> None:
    data = made(tmp_path / "data", {"texts/a.txt": "text", "b.txt": "no"})
    found = list(Folder().episodes(library(tmp_path, data), None))
    assert [episode.id for episode in found] == ["a.txt"]
    assert Folder().data(library(tmp_path, data)) == task(data / "texts").data(library(tmp_path))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a.md": "text"}, "has no file whose name fits *.txt"),
        ({"a.txt": b"line\nb\xe9d"}, "a.txt, line 2: not UTF-8 (byte 0xe9)"),
        ({"a.txt": "  \n"}, "holds nothing that could be used"),
        ({**BOTH, "d.txt": "beside"}, "and 1 texts beside them, as d.txt"),
        ({**BOTH, "test/d.txt": BOTH["train/b.txt"]}, "test/d.txt is trained on, as train/b.txt"),
    ],
    ids=["no text", "no UTF-8", "empty", "beside", "leak"],
)
def test_what_is_no_such_folder_is_refused(tmp_path: Path, files: dict[str, str | bytes], said: str) -> None:
    own, books = task(made(tmp_path / "mine", files)), library(tmp_path)
    with pytest.raises(DataError, match=re.escape(said)):
        own.data(books), list(own.episodes(books, None))


def test_a_folder_must_be_named_and_be_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"name a folder \(--set folder.path=DIR\)"):
        Folder().data(library(tmp_path))
    with pytest.raises(DataError, match=r"There is no folder .*nowhere with texts"):
        task(tmp_path / "nowhere").data(library(tmp_path))
    with pytest.raises(UserError, match=r"folder: no text is long enough for extent 'bytes:50-60'"):
        list(task(made(tmp_path / "mine", BOTH), extent="bytes:50-60").episodes(library(tmp_path), None))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"extent": "words:1-2"}, "folder: extent is 'full' or"), ({"tokens": 1}, "tokens must be at least 2"),
        ({"documents": -1}, "documents at least 1"), ({"files": " ,"}, "files must name what texts are called"),
    ],
)  # fmt: skip
def test_impossible_options_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        Folder.Config(**wrong)


def test_the_task_keeps_its_promises(tmp_path: Path) -> None:
    check_task(task(made(tmp_path / "mine", BOTH | {"test/d.txt": "and a second one"})), library(tmp_path), limit=2)


def test_links_lead_to_files_only(tmp_path: Path) -> None:
    folder = made(tmp_path / "mine", {"a.txt": "text"})
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    assert [f.name for f in Texts(folder).files("test")] == ["a.txt"]
