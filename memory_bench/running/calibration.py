"""What was measured on this machine of cells like one, kept in the user's cache: a plan need not guess.

A calibration belongs to the machine, the versions, the backbone, model, recipe, task and threads: what moves seconds or
bytes. It is made in a process of its own, as a cell runs, in about 20 seconds at most. What a cell itself spent when it
was run is kept too, and known when it is run again.
"""

import json
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from memory_bench.cell import Cell, digest
from memory_bench.errors import UserError
from memory_bench.files.artefacts import Notice, read_json, remove, write_json
from memory_bench.record import Record, processor, versions
from memory_bench.running.processes import WORKER, start

SCHEMA = 1
COPIES = 5.0
PATIENCE = 180.0  # seconds that pass, on a machine that has other work too, until one is given up


@dataclass(frozen=True, slots=True)
class Spent:
    """What a cell spent when it was run here."""

    peak_bytes: int
    train_seconds: float
    eval_seconds: float
    control_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Calibrations:
    """Those in a cache folder, of one kind of device.

    Args:
        cache: the user's cache folder.
        device: ``cpu`` or ``cuda``.
        command: what calibrates a job file.
        notice: told of those that were damaged.
    """

    cache: Path
    device: str
    command: tuple[str, ...] = (*WORKER, "--calibrate")
    notice: Notice = lambda sentence: None

    @property
    def folder(self) -> Path:
        """Where they are."""
        return self.cache / "calibration"

    def key(self, cell: Cell, threads: int, *, trained: bool) -> str:
        """What two cells have in common for which the same is measured."""
        t = cell.training
        parts = (t.model, t.backbone, t.recipe, replace(t.corpus, revision=""), cell.task)
        return digest(
            [SCHEMA, self._here(), threads, trained, cell.limit, cell.controls, cell.scored_with, *map(asdict, parts)]
        )

    def _here(self) -> dict[str, Any]:
        return {"device": self.device, "machine": machine(), **versions()}

    def find(self, cell: Cell, threads: int, *, trained: bool) -> dict[str, Any] | None:
        """What was measured; None: nothing yet, or it failed."""
        return self._read(self.key(cell, threads, trained=trained))

    def _read(self, key: str) -> dict[str, Any] | None:
        try:
            return read_json(self.folder / f"{key}.json")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self.notice(f"calibration/{key}.json in the cache is not used and is made again: {error}.")
            return None

    def _write(self, key: str, found: dict[str, Any]) -> None:
        """Keep it where that is possible: a cache may be read-only or full, and nothing but a plan depends on it."""
        path = self.folder / f"{key}.json"
        with suppress(OSError, UserError):
            if path.is_dir():
                remove(path)
            write_json(path, found)

    def make(self, job: Any, *, trained: bool) -> dict[str, Any] | None:
        """Measure a job's cell now, in a process of its own; None if it cannot be."""
        found: dict[str, Any] = {}
        with TemporaryDirectory() as folder:
            path = Path(folder) / "job.json"
            path.write_text(json.dumps(replace(job, out=Path(folder)).to_json()), encoding="utf-8")
            with start([*self.command, str(path)], inside=Path(folder)) as worker:
                patience = threading.Timer(PATIENCE, worker.kill)
                patience.daemon = True
                patience.start()
                assert worker.process.stdout is not None
                for line in worker.process.stdout:
                    with suppress(ValueError, KeyError, TypeError):  # what libraries print
                        found = json.loads(line)["calibration"]
                patience.cancel()
        if not found:
            return None
        self._write(self.key(job.cell, job.threads, trained=trained), found)
        return found

    def learn(self, record: Record) -> None:
        """Keep what a cell spent, where it came to its end."""
        if record.status != "ok":
            return
        u = record.usage
        spent = Spent(u.peak_device_bytes, u.train_seconds, u.eval_seconds, u.control_seconds)
        self._write(self._spent_key(record.cell), asdict(spent))

    def spent(self, cell: Cell) -> Spent | None:
        """What this very cell spent here before."""
        found = self._read(self._spent_key(cell))
        return None if found is None else Spent(**{name: found[name] for name in Spent.__slots__ if name in found})

    def keep(self, cell: Cell, plan: dict[str, Any]) -> None:
        """Keep what was planned of a cell, for its run."""
        self._write(self._planned_key(cell), plan)

    def planned(self, cell: Cell) -> dict[str, Any] | None:
        """What was planned of a cell; None: nothing."""
        found = self._read(self._planned_key(cell))
        return None if found is None else {k: v for k, v in found.items() if k not in ("schema", "checksum")}

    def _planned_key(self, cell: Cell) -> str:
        return digest([SCHEMA, "plan", self._here(), cell.key])

    def _spent_key(self, cell: Cell) -> str:
        return digest([SCHEMA, self._here(), cell.key])


def machine() -> str:
    """This machine, as far as its speed goes: processor and cores."""
    return f"{processor()}, {os.cpu_count()} cores"


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a cell would spend, from a calibration.

    Attributes:
        peak_bytes: on the device, above the start.
        train_seconds, eval_seconds, control_seconds: of the device.
        start_seconds: until the model is built.
        how: ``measured here``.
    """

    peak_bytes: int
    train_seconds: float
    eval_seconds: float
    control_seconds: float
    start_seconds: float
    how: str = "measured here"

    @property
    def seconds(self) -> float:
        """All of them."""
        return self.train_seconds + self.eval_seconds + self.control_seconds + self.start_seconds


def step_seconds(found: dict[str, Any], segments: int, flops: float) -> float:
    """Seconds of an optimiser step, from those measured that walk as many segments, or nearly."""
    alike = min(abs(s["segments"] - segments) for s in found["train"])
    near = [s for s in found["train"] if abs(s["segments"] - segments) == alike]
    return float(flops * sum(s["seconds"] for s in near) / max(1.0, sum(s["flops"] for s in near)))


def peak_of(found: dict[str, Any], longest: int) -> int:
    """Peak bytes of a cell whose longest text has `longest` tokens."""
    last, rows = found["stretches"][-1], found["rows"]
    held = last["peak"]
    if last["tokens"] < longest:
        more = max(0.0, _remembered(found["growth"], longest) - _remembered(found["growth"], int(last["tokens"])))
        held += rows * more * _copies(found["stretches"], rows)
    return int(max(found["train_peak"], held))


def _remembered(growth: Sequence[Sequence[int]], tokens: int) -> float:
    """Bytes of a row's memory after `tokens` tokens; behind what was read it grows on as it did last."""
    for read, size in growth:
        if read >= tokens:
            return size
    (first, less), (last, size) = growth[len(growth) // 2], growth[-1]
    return size + max(0, size - less) * (tokens - last) / max(1, last - first)


def _copies(stretches: Sequence[dict[str, Any]], rows: int) -> float:
    """By how many bytes the peak grows for a byte of memory: old and new exist at once, and what is made of them.

    What a process has free from its start hides the first of that, so that the growth seen is a lower bound only: at
    least `COPIES` are taken, as many as full-context and memorizing were measured to need on `tiny`.
    """
    if len(stretches) > 1:
        a, b = stretches[-2:]
        grown, more = rows * (b["state"] - a["state"]), b["peak"] - a["peak"]
        if grown > 0.02 * b["peak"]:
            return float(min(6.0, max(COPIES, more / grown)))
    return COPIES
