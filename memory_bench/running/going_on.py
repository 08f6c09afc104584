"""Trains a model from where an earlier attempt at it was kept, if one was, and keeps it on the way.

What is kept stands in the store beside the trained memories, under the training's key, for every cell that shares it
(`memory_bench.driver.unfinished`). How often is no part of a cell: its result is the same to the bit.
"""

import importlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from memory_bench.budget import BudgetExceeded
from memory_bench.corpus import Corpus
from memory_bench.driver.checkpoints import save_checkpoint
from memory_bench.driver.every import Every, parse_every
from memory_bench.driver.meter import Meter
from memory_bench.driver.stream import Progress
from memory_bench.driver.train import Trained, train
from memory_bench.driver.unfinished import CannotGoOn, Keeper
from memory_bench.errors import NotFinite
from memory_bench.record import versions
from memory_bench.running.building import Parts
from memory_bench.running.fence import FileLimit
from memory_bench.running.job import Job
from memory_bench.running.ranks import Ranks
from memory_bench.store import Store


@dataclass(frozen=True, slots=True)
class Keeping:
    """How a cell's trainings are kept on their way.

    Attributes:
        store: where.
        every: how often; None: never, but what is there is gone on from.
        superseded: stamps of what does not count (see `memory_bench.running.job.Job`).
        device: its name.
    """

    store: Store
    every: Every | None
    superseded: Mapping[str, str]
    device: str

    @classmethod
    def of(cls, job: Job, store: Store, device: str) -> "Keeping":
        """As a job asks for it."""
        return cls(store, parse_every(job.checkpoint_every), job.superseded, device)

    def ready(self, key: str) -> None:
        """Load what reading needs, before anybody is charged."""
        if self.store.unfinished_stamp(key):
            importlib.import_module("pydantic")

    def keeper(self, key: str, files: FileLimit | None = None) -> Keeper:
        """Of the training `key`, whose lock is held; `files` bounds what the model writes."""
        keeper = Keeper(
            self.store.unfinished_folder(key),
            key,
            self.every,
            surroundings=_surroundings(self.device),
            notice=self.store.warn,
            unfenced=nullcontext if files is None else files.lifted,
        )
        if self.store.unfinished_stamp(key) == self.superseded.get(f"unfinished/{key}", "none"):
            keeper.forget()
        return keeper


def _surroundings(device: str) -> dict[str, str | int]:
    """What moves bits, or seconds: a training that went on in others would end elsewhere, or mix their seconds."""
    unit = torch.backends.cpu.get_cpu_capability()
    return {**versions(), "device": device, "threads": torch.get_num_threads(), "vector_unit": unit}


def train_on(
    parts: Parts,
    store: Store,
    keeper: Keeper,
    corpus: Callable[[], Corpus],
    meter: Meter,
    progress: Progress,
    ranks: Ranks,
) -> Trained:
    """The trained model of `parts`, saved in the store; what was kept on the way is gone when its training has ended.

    Args:
        parts: what is trained.
        store: where it is saved.
        keeper: of this training.
        corpus: gives one of which nothing was drawn yet.
        meter: of the cell.
        progress: as of `train`.
        ranks: the other processes of this training.

    Raises:
        BudgetExceeded, NotFinite: as of `train`.
        MachineError: as of `Ranks.training`.
    """
    try:
        with meter.phase("train"):
            trained = _trained(parts, keeper, corpus, meter, progress, ranks)
    except (BudgetExceeded, NotFinite):
        keeper.forget()  # it would end there again
        raise
    if trained.curve:
        folder = store.checkpoint_folder(parts.training.key)
        with keeper.unfenced():
            save_checkpoint(folder, trained, parts.recipe, parts.training, meter.usage, whole=parts.whole)
    keeper.forget()
    return trained


def _trained(
    parts: Parts, keeper: Keeper, corpus: Callable[[], Corpus], meter: Meter, progress: Progress, ranks: Ranks
) -> Trained:
    while True:
        with meter.aside():
            drawn = corpus()
        try:
            with ranks.training(parts.training.key) as peers:
                return train(
                    parts.build, parts.config, parts.recipe, drawn, meter, seed=parts.training.seed, progress=progress,
                    keeper=keeper, peers=peers,
                )  # fmt: skip
        except CannotGoOn as error:
            keeper.put_aside(str(error))
