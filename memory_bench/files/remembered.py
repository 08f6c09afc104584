"""What was found in files, remembered for as long as they stay the same: looking again at thousands takes seconds.

A finding belongs to the files' sizes, times of the last changes and inodes, and to the code that made it. Files that
were changed a moment ago are not remembered: clocks of file systems tick slowly (`memory_bench.files.artefacts`).
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from memory_bench.errors import UserError
from memory_bench.files.artefacts import Damaged, read_json, settled, write_json

Facts = list[list[int] | None]
"""Of files: device, inode, size, times of the last changes of content and of inode; None: it is not there."""


class Remembered:
    """Findings by name.

    Args:
        file: where they are kept; what cannot be read or written there is found anew.
        of: what they depend on beside the files, for example a hash of the code.
    """

    def __init__(self, file: Path, of: str) -> None:
        self._file, self._of, self._changed = file, of, False
        self._known: dict[str, Any] = {}
        with suppress(FileNotFoundError, Damaged):
            kept = read_json(file)
            if kept.get("of") == of and isinstance(kept.get("found"), dict):
                self._known = kept["found"]

    def get(self, name: str, facts: Facts) -> str | None:
        """What was found in files of these facts; None: nothing is known of them."""
        match self._known.get(name):
            case {"facts": known, "value": str(value)} if known == facts:
                return value
        return None

    def put(self, name: str, facts: Facts, value: str) -> None:
        """Remember a finding."""
        self._known[name], self._changed = {"facts": facts, "value": value}, True

    def save(self) -> None:
        """Keep what is new for the next command, if that is possible."""
        if self._changed:
            with suppress(OSError, UserError):
                write_json(self._file, {"schema": 1, "of": self._of, "found": self._known})
            self._changed = False


def identity(status: os.stat_result) -> list[int]:
    """By what a file is known to be the one that was looked at: see `Facts`."""
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def facts_of(files: Sequence[Path]) -> tuple[Facts, bool]:
    """The facts of files, and whether another change of them would show."""
    found, still = Facts(), True
    for file in files:
        try:
            s = file.stat()
        except OSError:
            found.append(None)
        else:
            found.append(identity(s))
            still = still and settled(s)
    return found, still
