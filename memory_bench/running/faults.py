"""Which errors are the machine's: a full disk, a folder that cannot be written to, a file system that went away.

They say nothing of a model, so they are never a cell's result: the cell stays to be done. The system has a number for
each; libraries dress them up as errors of their own. What is missing or not permitted counts only in the folders that
are ours: elsewhere it is the mistake of whoever asked for it. Loads no torch.
"""

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from memory_bench.budget import BudgetExceeded
from memory_bench.errors import MachineError
from memory_bench.running.refusals import chain

REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file may not become so large",
    errno.EROFS: "a file system is read-only",
    errno.EIO: "a disk could not be read or written",
    errno.ESTALE: "a network folder went away",
    errno.EREMOTEIO: "a disk could not be read or written",
    errno.ENOLCK: "no file can be locked",
    errno.EMFILE: "too many files are open",
    errno.ENFILE: "too many files are open",
}
OURS = {
    errno.EACCES: "it is not permitted to use",
    errno.EPERM: "it is not permitted to use",
    errno.ENOENT: "somebody removed",
    errno.ENOTDIR: "somebody replaced",
    errno.EISDIR: "somebody replaced",
}
"""In the run's folder and the cache."""
COSTUMES = (
    (re.compile(r"No space left on device|database or disk is full"), errno.ENOSPC),
    (re.compile(r"Disk quota exceeded"), errno.EDQUOT),
    (re.compile(r"File too large"), errno.EFBIG),
    (re.compile(r"Read-only file system"), errno.EROFS),
    (re.compile(r"Input/output error|disk I/O error"), errno.EIO),
    (re.compile(r"Stale (NFS )?file handle"), errno.ESTALE),
    (re.compile(r"Too many open files"), errno.EMFILE),
    (re.compile(r"PytorchStreamWriter failed|unexpected pos \d+ vs \d+|basic_ios::clear: iostream error"), 0),
)
NATIVE = ("SafetensorError", "OperationalError", "ArrowIOError", "ArrowInvalid", "HfHubHTTPError")
WRITING = "a file could not be written whole"
LAST = re.compile(r"^([\w.]+\.)?(\w*Error|\w*Exception): ")  # of a traceback


def fault(error: BaseException, ours: Sequence[Path] = ()) -> str:
    """Why `error` is the machine's, as the end of a sentence; empty if it is not, or is a limit of the budget.

    Args:
        error: with all that it came of.
        ours: the run's folder and the cache.
    """
    if isinstance(error, BudgetExceeded):
        return ""
    return next((why for e in chain(error) if (why := _why(e, ours))), "")


@contextmanager
def told_apart(*ours: Path) -> Iterator[None]:
    """Raise `MachineError` for what is the machine's; everything else as it is. `ours` as of `fault`."""
    try:
        yield
    except MachineError:
        raise
    except Exception as error:
        if why := fault(error, ours):
            raise MachineError(why) from error
        raise


def said_in(log: Path) -> str:
    """As `fault`, of the error that a worker's log ends with; empty if there is none."""
    with suppress(OSError, IndexError):
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
        if LAST.match(last):
            return _dressed(last)
    return ""


def _why(error: BaseException, ours: Sequence[Path]) -> str:
    if isinstance(error, MachineError):
        return str(error).rstrip(".")
    if isinstance(error, OSError) and error.errno is not None:
        place = _ours(error, ours)
        if error.errno in REASONS:
            return REASONS[error.errno] + (f" ({place})" if place else "")
        return f"{OURS[error.errno]} {place}" if place and error.errno in OURS else ""
    if isinstance(error, RuntimeError | OSError) or type(error) is Exception or type(error).__name__ in NATIVE:
        return _dressed(str(error))
    return ""


def _dressed(text: str) -> str:
    for costume, number in COSTUMES:
        if costume.search(text):
            return REASONS.get(number, WRITING)
    return ""


def _ours(error: OSError, ours: Sequence[Path]) -> str:
    """The first file of an error that is in one of `ours`, or one of them; empty if none is."""
    for name in (error.filename, error.filename2):
        if isinstance(name, str | bytes | os.PathLike):
            path = Path(os.path.abspath(os.fsdecode(name)))
            if any(path.is_relative_to(os.path.abspath(folder)) for folder in ours):
                return str(path)
    return ""
