"""Cells as jobs on this machine: which device, how many threads, how many side by side."""

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import psutil

from memory_bench.budget import GB
from memory_bench.card import BackboneCard
from memory_bench.cell import Cell
from memory_bench.errors import UserError
from memory_bench.running.job import Job
from memory_bench.running.options import Options
from memory_bench.running.remaining import Remaining

RUNS = Path("results/runs")
SMALL = 5_000_000  # parameters below which a cell gets one thread
THREADS = 2  # for a larger backbone on the CPU, however many cores there are: with others sums are rounded otherwise
CELL_BYTES = 6 * GB  # main memory for each of the cells that run side by side on large backbones


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be done in a folder.

    Attributes:
        out: the folder.
        keys: of all cells that were asked for.
        jobs: the cells without a result.
        remaining: how long they take.
        workers: how many of them run side by side.
    """

    out: Path
    keys: tuple[str, ...]
    jobs: list[Job]
    remaining: Remaining
    workers: int


def cuda_here() -> bool:
    """Whether there is a GPU."""
    import torch

    return torch.cuda.is_available()


def threads_for(card: BackboneCard, device: str) -> int:
    """Torch's threads in a cell on a backbone.

    On the CPU a number of the backbone's own, as it moves numbers (of long streams by up to 0.3 %): the same cell on
    another machine, or beside cells on another backbone, is computed alike.
    """
    if device == "cuda":
        return cores()
    return 1 if card.parameters < SMALL else THREADS


def check_processes(processes: int, executor: str) -> None:
    """Refuse several processes in a cell where they cannot be.

    Raises:
        UserError: a cell has no process of its own, or there is not a GPU for each.
    """
    if processes == 1:
        return
    if executor == "inline":
        raise UserError(f"--processes {processes} needs a process for every cell: leave out --executor inline.")
    if executor == "local" and cuda_here():
        import torch

        if (found := torch.cuda.device_count()) < processes:
            raise UserError(
                f"--processes {processes} needs a GPU for each of them; this machine has {found}: "
                f"give --processes {found}, or more machines with --executor slurm or ray."
            )


def workers_for(cards: Collection[BackboneCard], device: str, processes: int = 1) -> int:
    """How many cells on these backbones run side by side; all of them are on the first GPU(s), if any."""
    if device == "cuda" or not cards:
        return 1
    busy = max(threads_for(card, device) for card in cards) * processes
    room = psutil.virtual_memory().total // CELL_BYTES if busy > 1 else cores()
    return max(1, min(cores() // busy, room))


def cores() -> int:
    """Of the CPU, those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_job(cell: Cell, out: Path, options: Options, threads: int) -> Job:
    """The cell with everything its worker needs."""
    device = "cuda" if cuda_here() else "cpu"
    every = options.checkpoint_every
    return Job(
        cell, out, options.data, options.cache, options.stand_ins, options.hub, device, threads, checkpoint_every=every
    )
