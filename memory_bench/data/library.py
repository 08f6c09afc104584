"""One door to all data: for each need it picks the first origin that has it, and says which.

The order is the folder given with ``--data``, the Hugging Face hub, a stand-in. Nothing is read or downloaded before
it is asked for; `Library.prepare` does it all beforehand. Data that are made by a program stand in for nothing: their
only origin is that program.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from memory_bench.data import facts, needles, nouns, pairs, updates
from memory_bench.data.conversations import Conversation
from memory_bench.data.documents import Document
from memory_bench.data.folder import FILES, FolderData
from memory_bench.data.hub import HubData
from memory_bench.data.origins import Origin, Study
from memory_bench.data.packages import Runner, run_pip
from memory_bench.data.passages import Passage, Story
from memory_bench.data.standins import LABELS as STAND_IN_LABELS
from memory_bench.data.standins import StandIns
from memory_bench.errors import DataError, unknown
from memory_bench.files.artefacts import Notice

Where = Literal["folder", "hub", "stand-in", "program"]
LABELS = {
    "books": "pg19",
    "wikitext103": "wikitext103",
    "pubmedqa": "pubmedqa",
    "squad": "squad",
    "nq": "nq",
    "babi": "babi",
    "locomo": "locomo",
}
MADE = {
    "key-value": facts.REVISION,
    "fact-updates": updates.REVISION,
    "lost-in-the-middle": pairs.REVISION,
    "nouns": nouns.REVISION,
    "passkey": needles.REVISION,
}
SPLITS = {
    "books": ("train", "validation", "test"),
    "wikitext103": ("validation", "test"),
    "pubmedqa": ("train", "test"),
    "squad": ("train", "test"),
    "nq": ("train", "test"),
    "babi": ("1", "2", "3", "4", "5"),
    "locomo": ("test",),
}


@dataclass(frozen=True, slots=True)
class Source:
    """Where the data for a need come from.

    Attributes:
        need: what was asked for, for example ``books``.
        origin: folder, hub, stand-in or program.
        label: for tables, for example ``pg19`` or ``pg19 (stand-in: Shakespeare and Milton)``.
        revision: 16 hexadecimal digits that change when the data do.
        stand_in: whether other data than the named ones are used.
    """

    need: str
    origin: Where
    label: str
    revision: str
    stand_in: bool


@dataclass(frozen=True, slots=True)
class Library:
    """All data a run can use; it decides once per need and stays with it.

    Attributes:
        folder: of the user's data files; None: none.
        cache: where downloads are kept.
        stand_ins: whether stand-ins may be used.
        hub: whether the Hugging Face hub may be asked.
        runner: runs pip.
        notice: told of downloads that were altered and are fetched again.
    """

    folder: Path | None
    cache: Path
    stand_ins: bool = field(default=True, kw_only=True)
    hub: bool = field(default=True, kw_only=True)
    runner: Runner = field(default=run_pip, kw_only=True)
    notice: Notice = field(default=lambda sentence: None, kw_only=True, repr=False, compare=False)
    _chosen: dict[str, tuple[Where, Origin]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _sources: dict[str, Source] = field(default_factory=dict, init=False, repr=False, compare=False)
    _online: HubData = field(default_factory=HubData, init=False, repr=False, compare=False)

    def source(self, need: str) -> Source:
        """Where the data for `need` come from; nothing but checksums of files in the folder is read for it.

        Raises:
            UserError: there is no such need.
            DataError: nobody has the data, or the folder is unusable.
        """
        if need in MADE:
            return Source(need, "program", need, MADE[need], False)
        if need not in self._sources:
            where, origin = self._choose(need)
            stand_in = where == "stand-in"
            label = LABELS[need] + (f" (stand-in: {STAND_IN_LABELS[need]})" if stand_in else "")
            self._sources[need] = Source(need, where, label, origin.revision(need), stand_in)
        return self._sources[need]

    def prepare(self, need: str) -> Source:
        """Read all splits that evaluation and training use, downloading what is missing, to find errors early.

        Raises:
            DataError: as `source`, or a file is missing or broken.
        """
        source = self.source(need)
        read: dict[str, Callable[[str], object]] = {
            "books": self.books,
            "wikitext103": self.wikitext,
            "pubmedqa": self.pubmedqa,
            "babi": lambda task: self.babi(int(task)),
            "locomo": lambda split: self.conversations(),
        }
        for split in SPLITS.get(need, ()):
            if split != "validation":
                read.get(need, partial(self.passages, need))(split)
        return source

    def books(self, split: str) -> list[Document]:
        """PG-19's books, or what stands in for them. Training books are not in PG-19 if they come from a folder.

        Args:
            split: ``train``, ``validation`` or ``test``.
        """
        return self._origin("books", split).books(split)

    def wikitext(self, split: str) -> list[Document]:
        """WikiText-103's articles as word-level tokens with ``<unk>``; `split` is ``validation`` or ``test``."""
        return self._origin("wikitext103", split).wikitext(split)

    def pubmedqa(self, split: str) -> list[Study]:
        """PubMedQA's labelled questions: ``test`` is the official split of 500, ``train`` the other 500."""
        return self._origin("pubmedqa", split).pubmedqa(split)

    def passages(self, need: str, split: str) -> list[Passage]:
        """Questions with their passages (``test``), or passages to read in between (``train``).

        Args:
            need: ``squad`` or ``nq``. Passages of NQ are the same in both splits.
            split: see above.
        """
        return self._origin(need, split).passages(need, split)

    def babi(self, task: int) -> list[Story]:
        """The test questions of one of bAbI's tasks 1 to 5, with the facts told before them."""
        return self._origin("babi", str(task)).babi(task)

    def conversations(self) -> list[Conversation]:
        """LoCoMo's conversations, each with its questions."""
        return self._origin("locomo", "test").conversations()

    def _origin(self, need: str, split: str) -> Origin:
        if split not in SPLITS[need]:
            raise unknown(f"split of {LABELS[need]}", split, SPLITS[need])
        return self._choose(need)[1]

    def _choose(self, need: str) -> tuple[Where, Origin]:
        if need not in LABELS:
            raise unknown("data", need, [*LABELS, *MADE])
        if need not in self._chosen:
            self._chosen[need] = self._first(need)
        return self._chosen[need]

    def _first(self, need: str) -> tuple[Where, Origin]:
        if self.folder is not None and (files := FolderData(self.folder)).has(need):
            return "folder", files
        if self.hub and self._online.has(need):
            return "hub", self._online
        stand_ins = StandIns(self.cache, self.runner, notice=self.notice)
        if self.stand_ins and stand_ins.has(need):
            return "stand-in", stand_ins
        ways = [f"give a folder with {next(reversed(FILES[need].values()))} (--data)"]
        ways.append("connect to the Hugging Face hub" if self.hub else "allow the Hugging Face hub")
        ways += ["allow stand-ins (leave out --no-stand-ins)"] if stand_ins.has(need) else []
        why = "" if stand_ins.has(need) else ", for which there is no stand-in"
        raise DataError(f"There are no data for {LABELS[need]}{why}: {', or '.join(ways)}.")
