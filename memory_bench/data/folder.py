"""Data from a folder of plain files, the layout that ``--data`` expects.

A need is answered from the folder as soon as one of its files is there; a missing neighbour is then an error and never
silently another source.
"""

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

from memory_bench.data.conversations import Conversation, conversations
from memory_bench.data.documents import Document
from memory_bench.data.origins import Study, articles, reading, some
from memory_bench.data.passages import Passage, Story, stories
from memory_bench.data.rows import Book, documents, nq, pubmedqa, squad, squad_passages
from memory_bench.errors import DataError
from memory_bench.files.artefacts import sha256
from memory_bench.files.inputs import json_lines, text_of

BABI = {
    1: "single-supporting-fact",
    2: "two-supporting-facts",
    3: "three-supporting-facts",
    4: "two-arg-relations",
    5: "three-arg-relations",
}
FILES = {
    "books": {
        "train": "pg19/books_train.jsonl.gz",
        "validation": "pg19/books_validation.jsonl.gz",
        "test": "pg19/books_test.jsonl.gz",
    },
    "wikitext103": {
        "validation": "wikitext/wikitext-103.wiki.valid.tokens.gz",
        "test": "wikitext/wikitext-103.wiki.test.tokens.gz",
    },
    "squad": {
        "train": "squad/squad1.1-routerlens-4330.jsonl.gz",
        "test": "squad/squad2.0-dev-half.json.gz",
    },
    "nq": {"test": "nq/nq-open-oracle.jsonl.gz"},
    "babi": {str(task): f"babi/en/qa{task}_{name}_test.txt.gz" for task, name in BABI.items()},
    "locomo": {"test": "locomo/locomo10.json.gz"},
    "pubmedqa": {"studies": "pubmedqa/ori_pqal.json.gz", "test ids": "pubmedqa/test_ground_truth.json"},
}
"""Need and part to the file that holds it."""


@dataclass(frozen=True, slots=True)
class FolderData:
    """An `Origin` of files under `folder`."""

    folder: Path

    def has(self, need: str) -> bool:
        """See `Origin.has`.

        Raises:
            DataError: the folder is missing or cannot be listed.
        """
        try:
            next(self.folder.iterdir(), None)
            return any((self.folder / name).exists() for name in FILES[need].values())
        except OSError as error:
            raise DataError(f"The data folder {self.folder} cannot be used: {error.strerror or error}.") from error

    def revision(self, need: str) -> str:
        """See `Origin.revision`: of the names and contents of the files that are there."""
        total = hashlib.sha256()
        for name in FILES[need].values():
            path = self.folder / name
            if path.exists():
                with reading(path):
                    total.update(f"{name} {sha256(path)}\n".encode())
        return total.hexdigest()[:16]

    def books(self, split: str) -> list[Document]:
        """See `Origin.books`."""
        path, data = self._read("books", split)
        return some(documents(json_lines(data, path, Book)), path)

    def wikitext(self, split: str) -> list[Document]:
        """See `Origin.wikitext`."""
        path, data = self._read("wikitext103", split)
        return some(articles(text_of(data, path), path), path)

    def pubmedqa(self, split: str) -> list[Study]:
        """See `Origin.pubmedqa`."""
        truth, answers = self._read("pubmedqa", "test ids")
        path, data = self._read("pubmedqa", "studies")
        return some(pubmedqa(data, path, answers, truth, split), path)

    def passages(self, need: str, split: str) -> list[Passage]:
        """See `Origin.passages`. Those of NQ are in one file: a reader leaves out what concerns its question."""
        path, data = self._read(need, "test" if need == "nq" else split)
        read = nq if need == "nq" else squad if split == "test" else squad_passages
        return some(list(read(data, path)), path)

    def babi(self, task: int) -> list[Story]:
        """See `Origin.babi`."""
        path, data = self._read("babi", str(task))
        return some(list(stories(data, path, task)), path)

    def conversations(self) -> list[Conversation]:
        """See `Origin.conversations`."""
        path, data = self._read("locomo", "test")
        return some(list(conversations(data, path)), path)

    def _read(self, need: str, part: str) -> tuple[Path, bytes]:
        """A file's path, and what is in it."""
        path = self.folder / FILES[need][part]
        with reading(path):
            data = path.read_bytes()
            return path, gzip.decompress(data) if path.suffix == ".gz" else data
