"""Which errors say that memory was refused: torch, numpy, Python and the system have a kind or a sentence each.

Loads no torch.
"""

import errno
import re
from collections.abc import Iterator
from pathlib import Path

SENTENCES = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|enforce fail at alloc_cpu|std::bad_alloc"
    r"|(CUDA|HIP|MPS backend) out of memory|CUDA error: out of memory|CU(BLAS|DNN|SOLVER)_STATUS_ALLOC_FAILED"
    r"|Cannot allocate memory \(?(os error )?12\)?|\[Errno 12\]|could not create a memory object"
    r"|can't start new thread|Memory allocation still failed after \d+ retries"
    r"|^memory allocation of \d+ bytes failed|^(numpy\S*\.)?_?\w*MemoryError\b"
)
"""Of native libraries, whose errors reach Python as a `RuntimeError` or as a last line before an abort."""
TAIL = 20_000  # characters of a log


def refused(error: BaseException) -> bool:
    """Whether `error`, or one that it came of, says that memory was asked for and not given."""
    return any(
        isinstance(e, MemoryError)
        or (isinstance(e, OSError) and e.errno == errno.ENOMEM)
        or type(e).__name__ == "OutOfMemoryError"
        or (_native(e) and SENTENCES.search(str(e)) is not None)
        for e in chain(error)
    )


def too_large(error: BaseException) -> bool:
    """Whether `error`, or one that it came of, says that a file may not grow so large."""
    return any(isinstance(e, OSError) and e.errno == errno.EFBIG for e in chain(error)) or any(
        _native(e) and "File too large" in str(e) for e in chain(error)
    )


def _native(error: BaseException) -> bool:
    return isinstance(error, RuntimeError | OSError) or type(error).__name__ == "SafetensorError"


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it came of."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        e = left.pop()
        if e is None or id(e) in seen:
            continue
        seen.add(id(e))
        yield e
        left += [e.__cause__, e.__context__]  # ``from None`` hides from a reader what it came of, and changes nothing
        if isinstance(e, BaseExceptionGroup):
            left += e.exceptions


def refused_in(log: Path | None) -> bool:
    """Whether the last lines of a worker's log say so: of a library that aborts, of a child process."""
    if log is None:
        return False
    try:
        lines = log.read_text(encoding="utf-8", errors="replace")[-TAIL:].splitlines()
    except OSError:
        return False
    return any(SENTENCES.search(line.strip()) for line in lines)


def oom_kills() -> int:
    """How many processes the system has killed for want of memory: around here, or where nothing says, on the machine.

    0 where it does not tell.
    """
    for place in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"):
        try:
            text = Path(place).read_text(encoding="ascii", errors="replace")
        except OSError:
            continue
        if found := re.search(r"^oom_kill (\d+)$", text, flags=re.MULTILINE):
            return int(found[1])
    return 0
