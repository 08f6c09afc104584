"""Data from the Hugging Face hub through `datasets`, at pinned revisions.

PG-19's training split has 11 GB, so only its first books are streamed. The official PubMedQA split is not on the hub;
its ids are in `memory_bench.data.pubmedqa_split`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from memory_bench.data.conversations import Conversation
from memory_bench.data.documents import Document
from memory_bench.data.origins import Study, articles, some
from memory_bench.data.passages import Passage, Story
from memory_bench.data.pubmedqa_split import TEST_IDS
from memory_bench.data.rows import Book, WikiLine, documents, of_split, renamed, studies
from memory_bench.errors import DataError, Unavailable
from memory_bench.files.inputs import Place, checked

PINS: dict[str, tuple[str, str | None, str]] = {
    "books": ("emozilla/pg19", None, "c021754c8e01c5b1cc83a1f549c1f97fbbb756b8"),
    "wikitext103": ("Salesforce/wikitext", "wikitext-103-v1", "b08601e04326c79dfdd32d625aee71d232d685c3"),
    "pubmedqa": ("qiaojin/PubMedQA", "pqa_labeled", "9001f2853fb87cab8d220904e0de81ac6973b318"),
}
"""Need to (repository, configuration, revision)."""
NAMES = {"books": "the hub's PG-19", "wikitext103": "the hub's WikiText-103", "pubmedqa": "the hub's PubMedQA"}
TRAINING_BOOKS = 20
PATIENCE = 5.0  # seconds


@dataclass(slots=True)
class HubData:
    """The hub as an `Origin`; after one request without an answer it is not asked again (`down`)."""

    down: bool = False

    def has(self, need: str) -> bool:
        """See `Origin.has`."""
        if self.down or need not in PINS:
            return False
        repository, _, revision = PINS[need]
        try:
            from huggingface_hub import HfApi

            HfApi().dataset_info(repository, revision=revision, timeout=PATIENCE)
        except Exception:  # whatever keeps the hub from answering, the next origin is to be asked
            self.down = True
        return not self.down

    def revision(self, need: str) -> str:
        """See `Origin.revision`: of the pinned commit."""
        return PINS[need][2][:16]

    def books(self, split: str) -> list[Document]:
        """See `Origin.books`."""
        rows = _rows("books", split, TRAINING_BOOKS if split == "train" else None)
        found = [(place, checked(Book, _book(row), place)) for place, row in rows]
        return some(documents(found), NAMES["books"])

    def wikitext(self, split: str) -> list[Document]:
        """See `Origin.wikitext`."""
        lines = [checked(WikiLine, row, place).text.removesuffix("\n") for place, row in _rows("wikitext103", split)]
        return some(articles("\n".join(lines), NAMES["wikitext103"]), NAMES["wikitext103"])

    def pubmedqa(self, split: str) -> list[Study]:
        """See `Origin.pubmedqa`."""
        found = studies((place, row.get("pubid"), _study(row)) for place, row in _rows("pubmedqa", "train"))
        return some(of_split(found, split, TEST_IDS), NAMES["pubmedqa"])

    def passages(self, need: str, split: str) -> list[Passage]:
        """Never there."""
        raise DataError(f"The hub is not asked for {need} ({split}).")

    def babi(self, task: int) -> list[Story]:
        """Never there."""
        raise DataError(f"The hub is not asked for bAbI ({task}).")

    def conversations(self) -> list[Conversation]:
        """Never there."""
        raise DataError("The hub is not asked for LoCoMo.")


def _book(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the hub's PG-19 under our names: the id is the end of its address, authors are not told."""
    found = {"author": "", **renamed(row, {"short_book_title": "title", "text": "text", "url": "pg_id"})}
    url = found.get("pg_id")
    return {**found, "pg_id": url.rstrip("/").rsplit("/", 1)[-1]} if isinstance(url, str) else found


def _study(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the hub's PubMedQA under the names of the official file."""
    names = {"question": "QUESTION", "long_answer": "LONG_ANSWER", "final_decision": "final_decision"}
    inner = row.get("context")
    contexts = renamed(inner, {"contexts": "CONTEXTS"}) if isinstance(inner, Mapping) else {}
    return {**renamed(row, names), **contexts}


def _rows(need: str, split: str, limit: int | None = None) -> list[tuple[Place, dict[str, Any]]]:
    """The first `limit` rows of a split, streamed, each with its place."""
    repository, config, revision = PINS[need]
    try:
        from datasets import load_dataset

        rows = load_dataset(repository, config, split=split, revision=revision, streaming=True)
        return [(Place(NAMES[need], f"row {number}"), row) for number, row in enumerate(islice(rows, limit), 1)]
    except Exception as error:
        raise Unavailable(
            f"The hub's {repository} ({split}) could not be read ({type(error).__name__}); try again, or give --data."
        ) from error
