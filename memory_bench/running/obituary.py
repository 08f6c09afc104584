"""What came of a cell whose worker has ended, seen from outside: its own record, or one written for it."""

import signal
from dataclasses import replace
from typing import Any

from memory_bench.budget import Usage
from memory_bench.record import Record, provenance
from memory_bench.running.guard import Guard
from memory_bench.running.processes import Worker
from memory_bench.running.refusals import refused_in
from memory_bench.store import Store

ABORTS = (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS)  # of native code that was refused memory


def settled(job: Any, store: Store, worker: Worker, guard: Guard, code: int, started: str) -> Record:
    """The record of a cell, filed.

    Its own counts if its worker ended by itself. What was seen from outside is added to it: memory of children, files;
    a limit that only children passed; memory refused to a child, of whose failure the worker made an error.
    """
    own = store.record(job.cell.key) if code in (0, 1) else None
    if own is not None and own.status == "over_budget":
        return own
    verdict = guard.judged()
    if (
        verdict is None
        and (own is None or own.status == "failed")
        and code != -signal.SIGKILL
        and _refused(worker, own, guard, code)
    ):
        guard.condemn_memory()
        verdict = guard.verdict
    if verdict is not None:
        return _file(
            store, obituary(job, started, "over_budget", str(verdict), _most(own, guard.usage, guard.children))
        )
    if own is None:
        return _file(store, obituary(job, started, "failed", _death(code), guard.usage))
    if (guard.others or guard.children) and (usage := _most(own, guard.usage, guard.children)) != own.usage:
        own = replace(own, usage=usage)
        store.write_record(own, store.samples(own.key))
    return own


def _refused(worker: Worker, own: Record | None, guard: Guard, code: int) -> bool:
    """Whether the log shows that memory was refused, where that would not be in the worker's own record."""
    if own is None:
        return (code in ABORTS or code > 0) and refused_in(worker.log)
    return own.status == "failed" and guard.children and refused_in(worker.log)


def _most(own: Record | None, seen: Usage, children: bool = False) -> Usage:
    """What the worker counted, with what was seen from outside where that is more: of seconds, if it had `children`."""
    if own is None:
        return seen
    names = ["peak_device_bytes", "peak_host_bytes"]
    if children:
        names += ["train_seconds", "eval_seconds", "control_seconds"]
    return replace(own.usage, **{name: max(getattr(own.usage, name), getattr(seen, name)) for name in names})


def _file(store: Store, record: Record) -> Record:
    store.write_record(record, None)
    return record


def _death(code: int) -> str:
    if code == -signal.SIGKILL:
        return "the process was killed by the system (signal 9), most likely out of memory"
    if code < 0:
        return f"the process died of signal {-code}"
    return f"the process ended with code {code} without a record; see its log.txt"


def obituary(job: Any, started: str, status: str, detail: str, usage: Usage | None = None) -> Record:
    """The record of a cell whose process died without writing one."""
    facts = provenance(device=job.device, threads=job.threads, started=started)
    return Record(
        cell=job.cell,
        status=status,
        detail=detail,
        metrics=(),
        usage=usage or Usage(),
        provenance=facts,
        learned=None,
        levels={},
    )
