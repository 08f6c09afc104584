"""Data from the Hugging Face hub through `datasets`, at pinned revisions.

PG-19's training split has 11 GB, so only its first books are streamed. The official PubMedQA split is not on the hub;
its ids are in `memory_bench.data.pubmedqa_split`.
"""

from dataclasses import dataclass
from itertools import islice
from typing import Any

from memory_bench.data.documents import Document
from memory_bench.data.origins import Study, articles, of_split, reading, some, to_study
from memory_bench.data.passages import Passage, Story
from memory_bench.data.pubmedqa_split import TEST_IDS
from memory_bench.errors import DataError

PINS: dict[str, tuple[str, str | None, str]] = {
    "books": ("emozilla/pg19", None, "c021754c8e01c5b1cc83a1f549c1f97fbbb756b8"),
    "wikitext103": ("Salesforce/wikitext", "wikitext-103-v1", "b08601e04326c79dfdd32d625aee71d232d685c3"),
    "pubmedqa": ("qiaojin/PubMedQA", "pqa_labeled", "9001f2853fb87cab8d220904e0de81ac6973b318"),
}
"""Need to (repository, configuration, revision)."""
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
        with reading("the hub's PG-19"):
            return some(
                [
                    Document(str(r["url"]).rstrip("/").rsplit("/", 1)[-1], r["text"], {"title": r["short_book_title"]})
                    for r in rows
                ],
                "the hub's PG-19",
            )

    def wikitext(self, split: str) -> list[Document]:
        """See `Origin.wikitext`."""
        rows = _rows("wikitext103", split)
        with reading("the hub's WikiText-103"):
            text = "\n".join(r["text"].removesuffix("\n") for r in rows)
        return some(articles(text), "the hub's WikiText-103")

    def pubmedqa(self, split: str) -> list[Study]:
        """See `Origin.pubmedqa`."""
        rows = _rows("pubmedqa", "train")
        with reading("the hub's PubMedQA"):
            found = [to_study(str(r["pubid"]), r, r["context"]["contexts"]) for r in rows]
        return some(of_split(found, split, TEST_IDS), "the hub's PubMedQA")

    def passages(self, need: str, split: str) -> list[Passage]:
        """Never there."""
        raise DataError(f"The hub is not asked for {need} ({split}).")

    def babi(self, task: int) -> list[Story]:
        """Never there."""
        raise DataError(f"The hub is not asked for bAbI ({task}).")


def _rows(need: str, split: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The first `limit` rows of a split, streamed."""
    repository, config, revision = PINS[need]
    try:
        from datasets import load_dataset

        return list(islice(load_dataset(repository, config, split=split, revision=revision, streaming=True), limit))
    except Exception as error:
        raise DataError(
            f"The hub's {repository} ({split}) could not be read ({type(error).__name__}); try again, or give --data."
        ) from error
