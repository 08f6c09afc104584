"""Folder: language modelling over any folder of text files.

Unusual here:

- Whatever is in the folder is scored, a file a document, as books are in `pg19`: in bits per byte, which no tokenizer
  changes, and in nats per token. A part of every file is chosen in bytes (`extent`) or in tokens (`tokens`).
- A folder with `train` and `test` in it trains on the one and is scored on the other; any other folder is all test, and
  models are trained on books, as for `pg19`.
- Its data are known by content: names and hashes of all texts, not where they are.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from memory_bench.corpus import Corpus, TextCorpus
from memory_bench.data import Library, Source
from memory_bench.data.texts import TRAIN, Texts
from memory_bench.episode import Encode, Episode, Read, TrainingPlan
from memory_bench.errors import DataError, UserError
from memory_bench.files.content import Hashes
from memory_bench.zoo.pretrain import encode_documents

from .language_modeling import LanguageModeling, books_corpus, excerpt, parse_extent

USUAL = "texts"  # in the data folder


class Folder(LanguageModeling):
    """The text files of a folder, one a document."""

    @dataclass(frozen=True, slots=True)
    class Config:
        """Options of the task."""

        # The folder; empty: `texts` in the data folder (--data).
        path: str = ""
        # Names of its texts, with commas between: "*.txt,*.md". Folders below it count.
        files: str = "*.txt"
        # Which part of every text is read: "full", or "bytes:FIRST-LAST" (cut at word borders).
        extent: str = "full"
        # Of that, how many tokens at most, whatever the tokenizer; 0: all of them.
        tokens: int = 0
        # How many texts are taken, spread evenly over the names; 0: all of them.
        documents: int = 0

        def __post_init__(self) -> None:
            parse_extent(self.extent, "folder")
            if self.tokens < 0 or self.tokens == 1 or self.documents < 0:
                raise UserError("folder: tokens must be at least 2 and documents at least 1 (0 means no limit).")
            if not self.patterns:
                raise UserError("folder: files must name what texts are called, as '*.txt'.")

        @property
        def patterns(self) -> tuple[str, ...]:
            """Of the names of texts."""
            return tuple(part.strip() for part in self.files.split(",") if part.strip())

    version = 1
    needs = ""  # its data are its own
    source = "any folder of text files"

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()

    def texts(self, library: Library) -> Texts:
        """The folder.

        Raises:
            DataError: none was named.
        """
        if not self.config.path and library.folder is None:
            raise DataError(
                f"The task folder has no texts: name a folder (--set folder.path=DIR), or give a data folder with "
                f"{USUAL} in it (--data)."
            )
        folder = Path(self.config.path).expanduser() if self.config.path else Path(library.folder or "") / USUAL
        return Texts(folder, self.config.patterns, Hashes(library.cache / "hashes"))

    def data(self, library: Library) -> Source:
        """The texts themselves, by content."""
        texts = self.texts(library)
        return Source("folder", "folder", f"folder {texts.folder.resolve().name}", texts.revision(), False)

    def episodes(self, library: Library, limit: int | None) -> Iterator[Episode]:
        """One scored document per episode; `limit` counts them. Texts that end before the extent are left out."""
        own, extent = self.config, parse_extent(self.config.extent, "folder")
        documents = self.texts(library).documents("test")
        if extent is not None:
            documents = [excerpt(d, *extent) for d in documents]
        documents = [d for d in documents if d.text.strip()]
        if not documents:
            raise UserError(f"folder: no text is long enough for extent '{own.extent}'.")
        if own.documents and own.documents < len(documents):
            documents = [documents[i * len(documents) // own.documents] for i in range(own.documents)]
        for document in documents[:limit]:
            yield Episode(document.id, (Read(document.text, scored=True, tag="text", tokens=own.tokens),))

    def plan(self, library: Library, *, pretrained: bool) -> TrainingPlan:
        """The folder's own training texts, or books where it has none."""
        return TrainingPlan("folder" if self.texts(library).split else "books")

    def corpus(self, library: Library, plan: TrainingPlan, encode: Encode) -> Corpus:
        """See `Task.corpus`."""
        if plan.corpus == "books":
            return books_corpus(library, encode)
        return TextCorpus(encode_documents([d.text for d in self.texts(library).documents(TRAIN)], encode))
