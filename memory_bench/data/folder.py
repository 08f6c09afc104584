"""Data from a folder of plain files, the layout that ``--data`` expects.

A need is answered from the folder as soon as one of its files is there; a missing neighbour is then an error and never
silently another source.
"""

import gzip
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from memory_bench.data.documents import Document
from memory_bench.data.origins import Study, articles, of_split, reading, some, to_study
from memory_bench.data.packages import checksum
from memory_bench.data.passages import Passage, Story, nq_rows, squad, squad_rows, stories
from memory_bench.errors import DataError

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
                    total.update(f"{name} {checksum(path)}\n".encode())
        return total.hexdigest()[:16]

    def books(self, split: str) -> list[Document]:
        """See `Origin.books`."""
        path = self.folder / FILES["books"][split]
        found = []
        with reading(path), gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                meta = {"title": str(row["title"]), "author": str(row["author"])}
                found.append(Document(str(row["pg_id"]), str(row["text"]), meta))
        return some(found, path)

    def wikitext(self, split: str) -> list[Document]:
        """See `Origin.wikitext`."""
        path = self.folder / FILES["wikitext103"][split]
        with reading(path):
            text = gzip.decompress(path.read_bytes()).decode()
        return some(articles(text), path)

    def pubmedqa(self, split: str) -> list[Study]:
        """See `Origin.pubmedqa`."""
        truth, path = (self.folder / FILES["pubmedqa"][part] for part in ("test ids", "studies"))
        with reading(truth):
            test = frozenset(json.loads(truth.read_text(encoding="utf-8")).keys())
        with reading(path):
            rows = json.loads(gzip.decompress(path.read_bytes())).items()
            found = [to_study(k, {n.lower(): v for n, v in row.items()}, row["CONTEXTS"]) for k, row in rows]
        return some(of_split(found, split, test), path)

    def passages(self, need: str, split: str) -> list[Passage]:
        """See `Origin.passages`. Those of NQ are in one file: a reader leaves out what concerns its question."""
        path = self.folder / FILES[need]["test" if need == "nq" else split]
        with reading(path):
            text = gzip.decompress(path.read_bytes()).decode()
            if need == "squad" and split == "test":
                return some(list(squad(json.loads(text))), path)
            read = nq_rows if need == "nq" else squad_rows
            return some(list(read(json.loads(line) for line in text.splitlines() if line)), path)

    def babi(self, task: int) -> list[Story]:
        """See `Origin.babi`."""
        path = self.folder / FILES["babi"][str(task)]
        with reading(path):
            return some(list(stories(gzip.decompress(path.read_bytes()).decode(), task)), path)
