"""Any folder of text files as documents: which files it has, what is in them, and its identity.

- Texts are the files whose names fit one of some patterns, in the folder and all folders below it; hidden ones are left
  out, and so are files that hold nothing but blanks. They are UTF-8; a file that is not is refused with its line.
- A folder with folders `train` and `test` has its training texts in the first and its test texts in the second. Then no
  text may stand beside them, and none of the test may be in training, letter by letter. Any other folder is all test.
- Its identity is the content: names and SHA-256 of all its texts, wherever the folder is.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from memory_bench.data.documents import Document
from memory_bench.data.origins import reading, some
from memory_bench.errors import DataError
from memory_bench.files.content import Hashes
from memory_bench.files.inputs import text_of

TRAIN, TEST = "train", "test"


@dataclass(frozen=True)
class Texts:
    """The texts of a folder.

    Attributes:
        folder: where they are.
        patterns: of their names, as ``*.txt``.
        hashes: of files.
    """

    folder: Path
    patterns: tuple[str, ...] = ("*.txt",)
    hashes: Hashes = field(default_factory=Hashes, compare=False)

    @property
    def split(self) -> bool:
        """Whether it has training texts of its own.

        Raises:
            DataError: see `files`.
        """
        return bool(self.files(TRAIN))

    def files(self, split: str) -> list[Path]:
        """The files of a split, ``train`` or ``test``, by name.

        Raises:
            DataError: the folder is missing, cannot be read, has no such files, or mixes its splits.
        """
        found = self._found()
        parts = {part: [f for f in found if f.relative_to(self.folder).parts[0] == part] for part in (TRAIN, TEST)}
        if not all(parts.values()):
            return found if split == TEST else []
        beside = [f for f in found if f not in parts[TRAIN] and f not in parts[TEST]]
        if beside:
            raise DataError(
                f"{self.folder} has folders {TRAIN} and {TEST}, and {len(beside)} texts beside them, as "
                f"{beside[0].relative_to(self.folder)}: put every text into one of the two, or rename the folders."
            )
        return parts[split]

    def documents(self, split: str) -> list[Document]:
        """The texts of a split; an id is the file's place in the folder.

        Raises:
            DataError: see `files`; or a file cannot be read, is not UTF-8, or all of them are empty.
        """
        found = []
        for file in self.files(split):
            with reading(file):
                text = text_of(file.read_bytes(), file)
            if text.strip():
                found.append(Document(file.relative_to(self.folder).as_posix(), text))
        return some(found, f"{self.folder} ({', '.join(self.patterns)})")

    def revision(self) -> str:
        """16 hexadecimal digits of the names and contents of all its texts.

        Raises:
            DataError: see `files`; or a text of the test is in training, too.
        """
        total = hashlib.sha256()
        seen: dict[str, dict[str, str]] = {TRAIN: {}, TEST: {}}
        for split, own in seen.items():
            for file in self.files(split):
                name = file.relative_to(self.folder).as_posix()
                with reading(file):
                    own[self.hashes.of(file)] = name
                    total.update(f"{split} {name} {self.hashes.of(file)}\n".encode(errors="surrogateescape"))
        if both := seen[TRAIN].keys() & seen[TEST].keys():
            one = min(both)
            raise DataError(f"{self.folder}: {seen[TEST][one]} is trained on, as {seen[TRAIN][one]}.")
        return total.hexdigest()[:16]

    def _found(self) -> list[Path]:
        """All texts, by name."""
        if not self.folder.is_dir():
            raise DataError(f"There is no folder {self.folder} with texts.")
        try:
            every: Sequence[Path] = sorted(self.folder.rglob("*"))
            found = [f for f in every if self._fits(f) and f.is_file()]
        except OSError as error:
            raise DataError(f"The folder {self.folder} cannot be used: {error.strerror or error}.") from error
        if not found:
            raise DataError(f"{self.folder} has no file whose name fits {' or '.join(self.patterns)}.")
        return found

    def _fits(self, file: Path) -> bool:
        hidden = any(part.startswith(".") for part in file.relative_to(self.folder).parts)
        return not hidden and any(fnmatchcase(file.name, pattern) for pattern in self.patterns)
