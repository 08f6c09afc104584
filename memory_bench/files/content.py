"""Files by their content: SHA-256, streamed, and remembered as long as nothing about the file has changed.

Weights are gigabytes, and every command asks for their hash. What is remembered belongs to path, size, times of the
last changes and inode. A file that was changed a moment ago is hashed every time: clocks of file systems tick slowly,
and it could change once more within the same tick.
"""

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from memory_bench.errors import UserError
from memory_bench.files.artefacts import remove, settled, sha256, write_atomically


class Hashes:
    """SHA-256 of files.

    Args:
        folder: where hashes are remembered, one small file each; None: nowhere.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def of(self, file: Path) -> str:
        """64 hexadecimal digits of a file's content.

        Raises:
            OSError: it cannot be read.
        """
        facts = _facts(file)
        note = None if self.folder is None else self.folder / digest_of(map(str, facts))
        if note is not None and (known := _read(note)):
            return known
        found = sha256(file)
        if note is not None and settled(file.stat()) and _facts(file) == facts:
            _write(note, found)
        return found


def digest_of(parts: Iterable[str]) -> str:
    """64 hexadecimal digits of some texts in their order."""
    return hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).hexdigest()


def _facts(file: Path) -> tuple[str, int, int, int, int, int]:
    """Path, size, times of the last changes of content and of inode (nanoseconds), inode, device."""
    s = file.stat()
    return str(file.resolve()), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev


def _read(note: Path) -> str:
    """A remembered hash; empty if there is none, or not the one that was written there."""
    try:
        text = note.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
    return text[:64] if text == _vouched(note, text[:64]) else ""


def _vouched(note: Path, found: str) -> str:
    """What is written for a hash: it, and a checksum of it at this place."""
    return f"{found} {digest_of((note.name, found))}"


def _write(note: Path, text: str) -> None:
    """Remember it if that is possible: another process may read at any time, and a cache may be read-only."""
    with suppress(OSError, UserError):
        note.parent.mkdir(parents=True, exist_ok=True)
        if note.is_dir():
            remove(note)
        write_atomically(note, _vouched(note, text))
