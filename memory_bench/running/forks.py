"""Work in a child of this process, so that what it imports and holds is gone with it. Loads no torch.

A command that waits for hours while others compute needs neither torch nor pandas; what it plans with and reports with
does. So planning and reporting happen in forks, and the command itself stays small.
"""

import os
import pickle
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

from memory_bench.errors import MachineError
from memory_bench.running.orphans import watch
from memory_bench.running.processes import PARENT

Result = TypeVar("Result")


def here(work: Callable[[], Result]) -> Result:
    """`work`, in this process."""
    return work()


def in_fork(work: Callable[[], Result]) -> Result:
    """What `work` returns, or raises, from a fork of this process: something that can be pickled.

    Where a fork is not safe (another system, other threads) or saves nothing (torch is here already), from here.

    Raises:
        MachineError: the child was killed.
    """
    if not sys.platform.startswith("linux") or "torch" in sys.modules or threading.active_count() > 1:
        return work()
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads that libraries started: they hold no lock
        child = os.fork()
    if child == 0:
        os.close(reading)
        _work_and_leave(work, writing, parent)
    os.close(writing)
    try:
        with os.fdopen(reading, "rb") as told:
            content = told.read()
    except BaseException:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        raise
    finally:
        _, status = os.waitpid(child, 0)
    if not content:
        code = os.waitstatus_to_exitcode(status)
        raise MachineError(f"A process of this command was ended ({signal.Signals(-code).name if code < 0 else code}).")
    done, found = pickle.loads(content)
    if not done:
        raise found
    return found  # type: ignore[no-any-return]


def _work_and_leave(work: Callable[[], Any], writing: int, parent: int) -> NoReturn:
    """The whole life of the child, which ends with its parent."""
    try:
        os.environ[PARENT] = str(parent)
        watch()
        try:
            told = True, work()
            sys.stdout.flush()
        except BaseException as error:
            told = False, _plain(error)
        with suppress(OSError, ValueError):
            sys.stderr.flush()
        with suppress(OSError), os.fdopen(writing, "wb") as out:  # the command itself may be gone
            out.write(pickle.dumps(told))
    except BaseException:  # nothing of this process may go on in its child
        traceback.print_exc()
    finally:
        os._exit(0)


def _plain(error: BaseException) -> BaseException:
    """An error that can be sent, with where it arose as a note."""
    error.add_note(f"In a process of this command:\n{''.join(traceback.format_exception(error))}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("\n".join(error.__notes__))
    return error
