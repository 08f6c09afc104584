"""Models that overspend, each in its own way, and what became of them: a table of limits and how far they were passed.

    python benchmarks/limits.py [--executor local|inline] [CASE …]

Every case is a model that behaves until its third step, then asks for far more than its budget allows. A row shows the
limit, the most that was really held or spent, their ratio, and the record's status and detail.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

MB = 1_000_000

MODEL = """
import mmap, subprocess, sys, tempfile, time
from dataclasses import dataclass

import numpy as np
import torch

from memory_bench.zoo.pretrain import Window

MB = 1_000_000
CHILD = "import time; held = bytearray(800_000_000); held[::4096] = b'x' * len(held[::4096]); time.sleep(60)"


@dataclass(frozen=True, slots=True)
class OverConfig:
    segment: int = 8
    way: str = ""
    when: str = "eval"
    before: int = 3  # steps


class Over(Window):
    Config = OverConfig

    def __init__(self, backbone, config, rng):
        super().__init__(backbone, config)
        self.config, self.steps, self.held = config, 0, []
        self.shift = torch.nn.Parameter(torch.zeros(1))

    def step(self, state, segment, *, write=True):
        if self.training == (self.config.when == "train"):
            self.steps += 1
            if self.config.way and self.steps > self.config.before:
                getattr(self, self.config.way)()
        readout, state = super().step(state, segment, write=write)
        return type(readout)(readout.hidden + self.shift, readout.head), state

    def grow(self):
        self.held.append(torch.ones(15 * MB))

    def ones(self):
        self.held.append(torch.ones(250 * MB))

    def fill(self):
        self.held.append(torch.empty(250 * MB).fill_(1.0))

    def numpy(self):
        self.held.append(np.ones(125 * MB))

    def private(self):
        held = mmap.mmap(-1, 1000 * MB, flags=mmap.MAP_PRIVATE)
        self.held.append(self._touched(held, 1000 * MB))

    def shared(self):
        self.held.append(self._touched(mmap.mmap(-1, 1000 * MB), 1000 * MB))

    def disk(self):
        with open(tempfile.mkstemp()[1], "wb") as file:
            for _ in range(60):
                file.write(b"x" * 16 * MB)
                file.flush()
        time.sleep(1)

    def elsewhere(self):
        with open(__file__ + ".store", "wb") as file:
            for _ in range(60):
                file.write(b"x" * 16 * MB)
                file.flush()
            time.sleep(1)

    def mapped(self):
        store = np.memmap(tempfile.mkstemp()[1], dtype="uint8", mode="w+", shape=1000 * MB)
        for start in range(0, len(store), 16 * MB):
            store[start : start + 16 * MB] = 1
        time.sleep(1)

    def child(self):
        subprocess.run([sys.executable, "-c", CHILD], check=True)

    def session(self):
        subprocess.Popen([sys.executable, "-c", CHILD], start_new_session=True)
        time.sleep(30)

    def sleep(self):
        time.sleep(60)

    def busy(self):
        while True:
            pass

    def slow(self):
        time.sleep(0.7)

    @staticmethod
    def _touched(held, size):
        for start in range(0, size, 4096):
            held[start] = 1
        return held
"""


@dataclass(frozen=True, slots=True)
class Case:
    """A way to overspend.

    Attributes:
        way: of the model above.
        limit: the one that must be named.
        amount: of that limit; of ``host_bytes`` above what a process with torch and the data holds.
        when: in ``train`` or ``eval``.
    """

    way: str
    limit: str
    amount: float
    when: str = "eval"

    @property
    def title(self) -> str:
        """Of its row."""
        return f"{self.way} in {self.when}"


MEMORY = ("grow", "ones", "fill", "numpy", "private", "shared", "child", "session")
CASES = (
    *(Case(way, "device_bytes", 150 * MB) for way in MEMORY),
    *(Case(way, "device_bytes", 150 * MB, "train") for way in ("grow", "ones", "child")),
    *(Case(way, "host_bytes", 300 * MB) for way in ("ones", "disk", "mapped", "elsewhere")),
    *(Case(way, "eval_seconds", 1.5) for way in ("sleep", "busy", "slow")),
    *(Case(way, "train_seconds", 1.5, "train") for way in ("sleep", "busy")),
)
Jobs = Callable[[str], Sequence[Any]]
"""Jobs of the models in a comma-separated text, on one task with one seed."""


def prepared(cases: Sequence[Case], folder: Path, jobs: Jobs, held: int) -> list[Any]:
    """The job of every case; `held` is what a process has before its model is built."""
    (folder / "over.py").write_text(MODEL, encoding="utf-8")
    found = []
    for case in cases:
        (job,) = jobs(f"{folder}/over.py:Over[way={case.way},when={case.when}]")
        amount = case.amount + held if case.limit == "host_bytes" else case.amount
        none = dict.fromkeys(("device_bytes", "host_bytes", "train_seconds", "eval_seconds"))
        limits = {**none, case.limit: amount if case.limit.endswith("_seconds") else int(amount)}
        budget = replace(job.cell.training.budget, name=f"{case.way}-{case.when}-{case.limit}", **limits)
        found.append(replace(job, cell=replace(job.cell, training=replace(job.cell.training, budget=budget))))
    return found


@dataclass(frozen=True, slots=True)
class Row:
    """What became of a case: the limit, what was really used (None: nobody saw), the record's words."""

    case: Case
    limit: float
    used: float
    status: str
    detail: str

    @property
    def ratio(self) -> float:
        """Of what was used to what was allowed."""
        return self.used / self.limit


def rows(cases: Sequence[Case], jobs: Sequence[Any], executor: Any) -> Iterator[Row]:
    """Run the cases and tell of each, in the order in which they end."""
    known = {job.cell.key: case for job, case in zip(jobs, cases, strict=True)}
    with closing(executor.run(jobs)) as events:
        for event in events:
            if (record := event.record) is not None:
                case = known[record.key]
                name = (
                    case.limit.replace("_bytes", "").join(("peak_", "_bytes")) if "bytes" in case.limit else case.limit
                )
                limit = getattr(record.cell.training.budget, case.limit)
                yield Row(case, limit, getattr(record.usage, name), record.status, record.detail)


def shown(row: Row, executor: str) -> str:
    """A row of the Markdown table."""
    from memory_bench.budget import amount

    limit, used = (amount(row.case.limit, value) for value in (row.limit, row.used))
    return f"| {row.case.title} | {executor} | {limit} | {used} | {row.ratio:.2f} | {row.status} | {row.detail} |"


def main(arguments: Sequence[str]) -> None:
    """Print the table."""
    from memory_bench.command import commands
    from memory_bench.command.jobs import make_job
    from memory_bench.driver.memory import resident
    from memory_bench.running.environment import cache_folder
    from memory_bench.running.executors import Inline, Local
    from memory_bench.running.options import Options
    from memory_bench.running.starting import settle, warm_up
    from memory_bench.store import Store

    warm_up()  # so that this process holds what a worker does
    settle()
    names = [a for a in arguments if not a.startswith("--")]
    executors = [a.partition("=")[2] for a in arguments if a.startswith("--executor=")] or ["local", "inline"]
    cases = [case for case in CASES if not names or case.way in names]
    sys.stdout.write("| case | executor | limit | used | ratio | status | detail |\n|---|---|---|---|---|---|---|\n")
    for executor in executors:
        with TemporaryDirectory() as folder:
            out, cache = Path(folder) / "out", cache_folder()

            def jobs(models: str, out: Path = out, cache: Path = cache) -> list[Any]:
                options = Options(
                    models, "pg19", "tiny", "smoke", "1", "", None, True, out, "2", (), False, "inline", "", False,
                    True, False, cache, False,
                )  # fmt: skip
                cells = commands.prepare(options).grid.cells
                Store.open_or_create(out)
                return [make_job(cell, out, options, 1) for cell in cells]

            made = prepared(cases, Path(folder), jobs, resident().now)
            for row in rows(cases, made, Inline() if executor == "inline" else Local(1)):
                sys.stdout.write(shown(row, executor) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
