"""A worker whose starter is gone ends, with all that it started, and leaves no result.

A closed terminal, a dropped connection or a kill ends a command without a word to its workers, which have sessions of
their own. Each is told who started it, and looks several times a second whether that is still its parent. Loads no
torch: a worker watches before it imports anything.
"""

import os
import shutil
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from memory_bench.running.processes import BEACON, PARENT, descendants, end_marked

PERIOD = 0.2  # seconds between two looks


def watch() -> None:
    """End this process as soon as the one that started it is gone; nothing where none is named (started by hand).

    The name is taken out of the environment: what a worker starts has another parent.
    """
    told = os.environ.pop(PARENT, "")
    if told.isdigit():
        threading.Thread(target=_watch, args=(int(told),), daemon=True, name="parent").start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PERIOD)
    leave()


def leave() -> NoReturn:
    """End this worker now with all that it started: nobody waits for its result, so it writes none."""
    own, beacon = os.getpid(), os.environ.get(BEACON)
    for _ in range(10):
        started = descendants(own, {}) - {own}
        for pid in started:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if not started:
            break
        time.sleep(0.01)  # those that were killed are gone a moment later
    if beacon:
        with suppress(OSError):
            end_marked(Path(beacon))
        shutil.rmtree(Path(beacon).parent, ignore_errors=True)
    os.kill(own, signal.SIGKILL)
    os._exit(1)
