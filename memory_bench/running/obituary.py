"""What came of a cell whose worker has ended, seen from outside: its own record, one written for it, or none.

None where the machine is to blame: the worker said so, its log ends with such an error, or somebody killed it. A kill
is the system's for want of memory only where something shows it: the watcher, a cgroup, the system's count of kills.
"""

import signal
from dataclasses import replace
from typing import Any

from memory_bench.budget import Spent, Usage
from memory_bench.errors import MachineError
from memory_bench.files.artefacts import damage, read_json, remove
from memory_bench.files.shapes import conform
from memory_bench.record import Record, provenance
from memory_bench.running.faults import said_in
from memory_bench.running.guard import Guard
from memory_bench.running.processes import Worker
from memory_bench.running.refusals import oom_kills, refused_in
from memory_bench.store import TRAINING, Store

ABORTS = (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS)  # of native code that was refused memory
OUTSIDE = ("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT", "SIGQUIT", "SIGXCPU", "SIGPWR", "SIGUSR1", "SIGUSR2")
"""What nobody sends to himself: a person, a scheduler or the system does."""


def settled(
    job: Any, store: Store, worker: Worker, guard: Guard, code: int, started: str, *, before: str = ""
) -> Record:
    """The record of a cell, filed; what stood there `before` (`Store.stamp`) is an earlier attempt's.

    Its own counts if its worker ended by itself, or was killed when it had written it. What was seen from outside is
    added to it: memory of children, files; a limit that only children passed; memory refused to a child, of whose
    failure the worker made an error.

    Raises:
        MachineError: it has none, by no fault of its own.
    """
    new = (code in (0, 1) or killed(code)) and store.stamp(job.cell.key) != before
    own = store.record(job.cell.key) if new else None
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
    if verdict is None and own is None and code == -signal.SIGKILL and oom_kills() > guard.oom_kills:
        if job.allotted is not None:  # less than its limits allow, perhaps
            raise MachineError(f"the {job.allotted / 1e9:.0f} GB of memory that a scheduler gave it were too little")
        guard.condemn_memory()
        verdict = guard.verdict
    if verdict is not None:
        remove(store.unfinished_folder(job.cell.training.key))  # it would end there again
        spent = _most(own, guard.usage, guard.children)
        if own is None:
            spent = with_training(spent, store, job.cell.training.key)
        return _file(store, obituary(job, started, "over_budget", str(verdict), spent))
    if own is None:
        if why := worker.trouble or (killed(code) and f"its process {killed(code)}") or said_in(worker.log):
            raise MachineError(why)
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


def with_training(seen: Usage, store: Store, key: str) -> Usage:
    """What was `seen` of a cell from outside, with what its training spent, where that has ended and was saved."""
    folder = store.checkpoint_folder(key)
    try:
        if damage(folder, key):
            return seen
        told = read_json(folder / TRAINING)["usage"]
        conform(Spent, told)
        spent = {name: told[name] for name in Spent.__slots__}
    except (OSError, ValueError, KeyError, TypeError):
        return seen
    peaks = {name: max(spent[name], getattr(seen, name)) for name in ("peak_device_bytes", "peak_host_bytes")}
    return replace(seen, **{**spent, **peaks})


def _file(store: Store, record: Record) -> Record:
    store.write_record(record, None)
    return record


def killed(code: int) -> str:
    """What the exit code of a process says of a kill from outside, as the end of a sentence; empty: it was none."""
    name = next((name for name in OUTSIDE if code == -int(getattr(signal, name, 0)) != 0), "")
    return f"was ended from outside ({name})" if name else ""


def _death(code: int) -> str:
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
