"""Where in a plug-in something went wrong: the last frame of a traceback that is its own, not torch's or the harness's.

Files are named relative to the plug-in's folder or by its package, never by where they are on a machine.
"""

import os
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from memory_bench.sources import in_library

HARNESS = "memory_bench"


@dataclass(frozen=True, slots=True)
class Home:
    """Where the code of a plug-in is.

    Attributes:
        package: of one that is installed: its modules are this one and those below it.
        folder: of one that is a file: the folder of that file.
    """

    package: str = ""
    folder: Path | None = None


def home_of_module(name: str) -> Home:
    """Home of a plug-in by a module of it: the package at the top, or of this project's own the folder of plug-ins."""
    parts = name.split(".")
    return Home(".".join(parts[: 2 if parts[0] == HARNESS else 1]))


def home_of_file(file: Path) -> Home:
    """Home of a plug-in that is a file."""
    return Home(folder=file.resolve().parent)


def place(error: BaseException, homes: Iterable[Home]) -> str:
    """The last frame of `error`, or of what caused it, that is at home: ``step in bad.py line 23``; else empty."""
    known, seen = tuple(homes), set[int]()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        own = [said for said in (_said(frame, line, known) for frame, line in _frames(current)) if said]
        if own:
            return own[-1]
        current = current.__cause__ or current.__context__
    return ""


def last_foreign(error: BaseException) -> str:
    """As `place`, for a plug-in of which nothing is known yet: the last frame of neither the harness nor a library."""
    own = [
        f"{frame.f_code.co_name} in {Path(frame.f_code.co_filename).name} line {line}"
        for frame, line in _frames(error)
        if not _is_harness(frame) and not in_library(Path(frame.f_code.co_filename))
    ]
    return own[-1] if own else ""


def summary(error: BaseException) -> str:
    """Type and message of an error."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    for frame, line in traceback.walk_tb(error.__traceback__):
        yield frame, line or frame.f_code.co_firstlineno


def _is_harness(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).split(".")[0] == HARNESS


def _said(frame: FrameType, line: int, homes: tuple[Home, ...]) -> str:
    for home in homes:
        if file := _file_at(frame, home):
            return f"{frame.f_code.co_name} in {file} line {line}"
    return ""


def _file_at(frame: FrameType, home: Home) -> str:
    """The name of a frame's file if it is at `home`; else empty."""
    module, file = str(frame.f_globals.get("__name__", "")), frame.f_code.co_filename
    if home.folder is not None:
        real = Path(os.path.realpath(file))
        # A virtual environment, or the harness's own checkout, may be in the folder.
        inside = real.is_relative_to(home.folder) and not in_library(real) and not _is_harness(frame)
        return real.relative_to(home.folder).as_posix() if inside else ""
    if not home.package or not f"{module}.".startswith(f"{home.package}."):
        return ""
    base = Path(file).name
    by_name = module.replace(".", "/") + ("/__init__.py" if base == "__init__.py" else ".py")
    return by_name if Path(by_name).name == base else base  # of code that was put together, what it calls its file
