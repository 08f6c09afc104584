"""Files that a worker keeps something in, as seen from outside.

Those in its temporary folder, and those that it or its children have open for writing or mapped, wherever they are and
whether they still have a name, but not the run's results and the cache. Files that are opened, written and closed
elsewhere between two looks cannot be seen. Loads no torch.
"""

import os
import re
import stat
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from memory_bench.running.processes import Worker

ANONYMOUS = ("/dev/zero", "/SYSV", "/memfd:")  # what the system calls memory that is shared and mapped: no file
Inode = tuple[int, int]


class Files:
    """Files that a worker keeps something in.

    Attributes:
        bytes: on disk, as last seen (blocks, so that a hole in a file is nothing).
        base: resident pages of files (libraries) when the meter started; 0: not known yet.
    """

    def __init__(self, worker: Worker, beside: Collection[Path]) -> None:
        self.bytes, self.base = 0, 0
        self._worker = worker
        self._beside = tuple(f"{path.resolve()}{os.sep}" for path in beside)
        self._own = f"{worker.folder}{os.sep}"
        self._seen: dict[Inode, tuple[str, ...]] = {}
        self._others: set[Inode] = set()  # that it has from whoever started it, such as a redirected output

    def find(self, children: Collection[int], *, begun: bool, maps: bool) -> None:
        """Look for them; before its meter has `begun`, what is found is none of the model's.

        Args:
            children: of the worker.
            begun: whether it is charged by now.
            maps: also those that are only mapped, which takes longer.
        """
        for pid in (self._worker.pid, *children):
            for file in (*opened(pid), *(mapped(pid) if maps else ())):
                if file.path.startswith(self._beside):
                    continue
                if not begun:
                    self._others.add(file.inode)
                elif file.inode not in self._others and (file.gone or not file.path.startswith(self._own)):
                    doors = dict.fromkeys((*self._seen.get(file.inode, ()), file.path, file.door))
                    self._seen[file.inode] = tuple(doors)

    def measure(self) -> None:
        """Add up what they have on disk."""
        sizes: dict[Inode, int] = {}
        for top, _, names in os.walk(self._worker.temporary):
            for name in names:
                with suppress(OSError):
                    inode, size = _on_disk(os.path.join(top, name), follow=False)
                    sizes[inode] = size
        for known, doors in list(self._seen.items()):
            for door in doors:
                with suppress(OSError):
                    inode, size = _on_disk(door)
                    if inode == known:
                        sizes[inode] = size
                        break
            else:
                del self._seen[known]  # its last name and the last that had it open are gone
        self.bytes = sum(sizes.values())


class WrittenFile(NamedTuple):
    """A regular file that a process may write: its name, what else leads to it, and whether it has no name any more."""

    inode: Inode
    path: str
    door: str
    gone: bool


def opened(pid: int) -> list[WrittenFile]:
    """Regular files that a process has open for writing, those among them that have been deleted too."""
    found = []
    with suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                door = f"/proc/{pid}/fd/{number}"
                path = os.readlink(door)
                if not path.startswith("/") or path.startswith("/proc/"):
                    continue
                info = Path(f"/proc/{pid}/fdinfo/{number}").read_text(encoding="ascii", errors="replace")
                flags = re.search(r"^flags:\s*(\d+)", info, flags=re.MULTILINE)
                if flags and int(flags[1], 8) & os.O_ACCMODE != os.O_RDONLY:
                    found += _regular(path, door)
    return found


def mapped(pid: int) -> list[WrittenFile]:
    """Regular files that a process has mapped so that what it writes stays in them."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = re.findall(r"^(\S+) rw.s \S+ \S+ \d+ +(/.+)$", maps, flags=re.MULTILINE)
    named = [(span, path) for span, path in found if not path.startswith(ANONYMOUS)]
    return [file for span, path in named for file in _regular(path, f"/proc/{pid}/map_files/{span}")]


def _regular(path: str, door: str) -> list[WrittenFile]:
    """The file behind `door`, if it is a regular one."""
    with suppress(OSError):
        try:
            status = os.stat(door)
        except PermissionError:  # doors of maps are not everybody's
            status = os.stat(path)
        if stat.S_ISREG(status.st_mode):
            name = path.removesuffix(" (deleted)")
            return [WrittenFile((status.st_dev, status.st_ino), name, door, status.st_nlink == 0)]
    return []


def _on_disk(path: str, *, follow: bool = True) -> tuple[Inode, int]:
    status = os.stat(path, follow_symlinks=follow)
    return (status.st_dev, status.st_ino), status.st_blocks * 512
