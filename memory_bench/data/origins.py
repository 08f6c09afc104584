"""What every origin of data answers, and the parsing they share.

Origins are `memory_bench.data.folder` (plain files), `memory_bench.data.hub` (pinned revisions) and
`memory_bench.data.standins` (what any machine can get or make); `memory_bench.data.library` picks one per need.
"""

import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, TypeVar

from memory_bench.data.conversations import Conversation
from memory_bench.data.documents import Document
from memory_bench.data.passages import Passage, Story
from memory_bench.errors import DataError
from memory_bench.files.inputs import Place

HEADING = re.compile(r" = (?!=).*(?<!=) = ?")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Study:
    """One PubMedQA item: an abstract without its conclusion, a question about it, and the expert's answer.

    Attributes:
        id: PubMed id.
        question: usually the paper's title.
        contexts: sections of the abstract.
        answer: ``yes``, ``no`` or ``maybe``.
        long_answer: the abstract's conclusion.
    """

    id: str
    question: str
    contexts: tuple[str, ...]
    answer: str
    long_answer: str = ""


class Origin(Protocol):
    """Where data comes from.

    A `need` is one of ``books``, ``wikitext103``, ``pubmedqa``, ``squad``, ``nq``, ``babi``, ``locomo``.

    Reading raises `DataError` with one sentence that names the file or place.
    """

    def has(self, need: str) -> bool:
        """Whether this origin is the one to ask; what it holds may still turn out broken when it is read."""
        ...

    def revision(self, need: str) -> str:
        """16 hexadecimal digits that change when the data do."""
        ...

    def books(self, split: str) -> list[Document]:
        """The books of a split (``train``, ``validation``, ``test``)."""
        ...

    def wikitext(self, split: str) -> list[Document]:
        """The articles of a split (``validation``, ``test``)."""
        ...

    def pubmedqa(self, split: str) -> list[Study]:
        """The labelled questions of a split (``train``, ``test``)."""
        ...

    def passages(self, need: str, split: str) -> list[Passage]:
        """Questions with their passages (``test``), or other passages (``train``), of ``squad`` or ``nq``."""
        ...

    def babi(self, task: int) -> list[Story]:
        """The test questions of bAbI's task 1 to 5."""
        ...

    def conversations(self) -> list[Conversation]:
        """LoCoMo's conversations."""
        ...


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Turn whatever goes wrong while `what` is read into one sentence.

    Raises:
        DataError: the file is missing, or cannot be read or unpacked.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(
            f"There is no file {what}: complete the data folder, or remove the files beside it to use another source."
        ) from error
    except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"Cannot read {what}: {error}.") from error


def some(found: list[T], what: object) -> list[T]:
    """`found`, unless it is empty.

    Raises:
        DataError: nothing was found in `what`.
    """
    if not found:
        raise DataError(f"{what} holds nothing that could be used.")
    return found


def articles(text: str, what: object = "WikiText") -> list[Document]:
    """WikiText as one document per article: one starts at a line `` = Title = `` between blank lines.

    Lines of that form in tables and formulas have no blank neighbours and stay text. Ids start with the article's
    place, for titles repeat (``<unk>``).

    Raises:
        DataError: there is text before the first title, so `what` is not whole, or no WikiText.
    """
    lines = text.split("\n")
    blank = [not line.strip() for line in lines] + [True]
    starts = [
        i for i, line in enumerate(lines) if HEADING.fullmatch(line) and (i == 0 or blank[i - 1]) and blank[i + 1]
    ]
    head = next((i for i, empty in enumerate(blank[:-1]) if not empty), None)
    if head is not None and (not starts or head < starts[0]):
        raise Place(str(what), f"line {head + 1}").fault("text before the first title (' = Title = ')")
    documents = list[Document]()
    for number, (start, stop) in enumerate(pairwise([*starts, len(lines)])):
        title = lines[start].strip(" =")
        body = "\n".join(lines[start:stop]).strip()
        documents.append(Document(f"{number:04d} {title}", f" {body} \n", {"title": title}))
    return documents
