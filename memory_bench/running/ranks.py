"""The other processes of a cell's training: started, told what to train, and ended, by the worker that is the first.

They are children of the worker, under its watcher: what they hold and compute counts for the cell, and whatever ends
the worker ends them. One that ends, or does not answer, ends the cell: by its own error, which is the cell's result as
the worker's would be; without one as lost, so that the same command goes on.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from memory_bench.driver.peers import PATIENCE, Gone, Peers
from memory_bench.errors import MachineError
from memory_bench.running.job import Job
from memory_bench.running.obituary import killed
from memory_bench.running.processes import PARENT, WORKER
from memory_bench.running.refusals import oom_kills

HOST = "127.0.0.1"
GONE = 76  # exit code of one whose others have ended
SOON = 2.0  # seconds after which one whose connection broke has ended


class Ranks:
    """Those of one job, for use in ``with``; none where one process trains it.

    Args:
        job: of the worker's cell.
        patience: seconds after which one that does not answer is given up.

    Attributes:
        held: bytes that are theirs alone before anything is charged.
    """

    def __init__(self, job: Job, *, patience: float = PATIENCE) -> None:
        self.held = 0
        self._job, self._size, self._patience = job, job.cell.training.processes, patience
        self._processes: list[subprocess.Popen[str]] = []
        self._peers: Peers | None = None
        self._oom_kills = oom_kills()

    def start(self) -> Self:
        """Have them load what every cell loads before it is charged, and join."""
        if self._size == 1 or self._processes:
            return self
        try:
            self._begin()
        except BaseException:
            self.close()
            raise
        return self

    def _begin(self) -> None:
        store = TCPStore(HOST, 0, self._size, is_master=True, wait_for_workers=False)
        told = {"job": self._job.to_json(), "port": store.port, "patience": self._patience}
        for rank in range(1, self._size):
            process = subprocess.Popen(
                [*WORKER, "--rank"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, errors="replace",
                env={**os.environ, PARENT: str(os.getpid())},
            )  # fmt: skip
            self._processes.append(process)
            self._tell(process, {**told, "rank": rank})
        self.held = sum(self._ready(process) for process in self._processes)
        with self._answering():
            self._peers = Peers(store, 0, self._size, torch.device(self._job.device), patience=self._patience)

    @contextmanager
    def training(self, key: str) -> Iterator[Peers | None]:
        """Inside, they do what is done here with the training `key`; None: there are none.

        Raises:
            MachineError: one was ended from outside, or does not answer.
            MemoryError: the system refused memory to one.
        """
        self.start()
        with self._answering():
            for process in self._processes:
                self._tell(process, {"train": key})
            yield self._peers

    def close(self) -> None:
        """End them."""
        for process in self._processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with suppress(OSError):
                        stream.close()
        if self._peers is not None:
            with suppress(RuntimeError):
                self._peers.close()
        self._processes, self._peers, self.held = [], None, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def _tell(process: "subprocess.Popen[str]", what: dict[str, Any]) -> None:
        assert process.stdin is not None
        with suppress(OSError):  # it has ended, which is seen when it does not answer
            process.stdin.write(json.dumps(what) + "\n")
            process.stdin.flush()

    def _ready(self, process: "subprocess.Popen[str]") -> int:
        """What one holds, once it has loaded all."""
        assert process.stdout is not None
        for line in process.stdout:
            with suppress(ValueError, KeyError, TypeError):  # what libraries print
                return int(json.loads(line)["held"])
        raise self._why("it ended before it began")

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except Gone as gone:
            raise self._why(str(gone)) from gone

    def _why(self, said: str) -> Exception:
        """Why one is gone."""
        until = time.monotonic() + SOON
        while not any(p.poll() for p in self._processes) and time.monotonic() < until:
            time.sleep(0.05)
        codes = [(rank, process.poll()) for rank, process in enumerate(self._processes, 1)]
        of = f"process {{}} of the {self._size} of its training"
        for rank, code in codes:
            if code is not None and killed(code):
                if code == -signal.SIGKILL and oom_kills() > self._oom_kills and self._job.allotted is None:
                    return MemoryError(f"{of.format(rank)} was refused memory")
                return MachineError(f"{of.format(rank)} {killed(code)}")
        for rank, code in codes:
            if code not in (None, 0, GONE):
                return RuntimeError(f"{of.format(rank)} ended with code {code} without a word but what is in the log")
        return MachineError(f"one of the {self._size} processes of its training does not answer ({said})")
