"""What every origin of data answers, and the parsing they share.

Origins are `memory_bench.data.folder` (plain files), `memory_bench.data.hub` (pinned revisions) and
`memory_bench.data.standins` (what any machine can get or make); `memory_bench.data.library` picks one per need.
"""

import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from memory_bench.data.documents import Document
from memory_bench.data.passages import Passage, Story
from memory_bench.errors import DataError

ANSWERS = ("yes", "no", "maybe")
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
    """Where data comes from. A `need` is one of ``books``, ``wikitext103``, ``pubmedqa``, ``squad``, ``nq``, ``babi``.

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


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Turn whatever goes wrong while `what` is read into one sentence.

    Raises:
        DataError: the file is missing, cannot be read, or holds something else.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(
            f"There is no file {what}: complete the data folder, or remove the files beside it to use another source."
        ) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{what} does not have the expected content ({type(error).__name__}: {error}).") from error
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


def articles(text: str) -> list[Document]:
    """WikiText as one document per article: one starts at a line `` = Title = `` between blank lines.

    Lines of that form in tables and formulas have no blank neighbours and stay text. Ids start with the article's
    place, for titles repeat (``<unk>``).
    """
    lines = text.split("\n")
    blank = [not line.strip() for line in lines] + [True]
    starts = [
        i for i, line in enumerate(lines) if HEADING.fullmatch(line) and (i == 0 or blank[i - 1]) and blank[i + 1]
    ]
    documents = []
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], len(lines)], strict=True)):
        title = lines[start].strip(" =")
        body = "\n".join(lines[start:stop]).strip()
        documents.append(Document(f"{number:04d} {title}", f" {body} \n", {"title": title}))
    return documents


def to_study(key: str, row: Mapping[str, Any], contexts: Sequence[str]) -> Study:
    """A row of PubMedQA (field names in lower case) as a `Study`.

    Raises:
        ValueError, KeyError: the row is not one.
    """
    answer = str(row["final_decision"])
    if answer not in ANSWERS:
        raise ValueError(f"study {key} has the answer {answer!r} instead of yes, no or maybe")
    return Study(key, str(row["question"]), tuple(contexts), answer, str(row["long_answer"]))


def of_split(found: Sequence[Study], split: str, test: frozenset[str]) -> list[Study]:
    """The studies of ``test`` (the official ids) or of ``train`` (all others)."""
    return [s for s in found if (s.id in test) == (split == "test")]
