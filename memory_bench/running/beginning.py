"""What is loaded before a cell is charged: the same for every model, and for every process of its training."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from memory_bench import plugins
from memory_bench.backbone.tokenizer import Tokens
from memory_bench.corpus import Corpus
from memory_bench.data.library import Library
from memory_bench.episode import Episode, Task
from memory_bench.running.going_on import Keeping
from memory_bench.running.grid import make_task, refuse_changed
from memory_bench.running.job import Job
from memory_bench.running.ranks import Ranks
from memory_bench.running.recipes import trains
from memory_bench.running.starting import warm_up
from memory_bench.store import Store
from memory_bench.zoo.named import Backbones

Say = Callable[[str, int, int], None]
"""Told (phase, done, total)."""


@dataclass(slots=True)
class Begun:
    """What is the same for every model, and loaded before the meter starts: task, data, tokenizer."""

    task: Task
    library: Library
    backbones: Backbones
    encode: Tokens
    episodes: list[Episode]
    pretrained: bool
    store: Store
    say: Say
    keeping: Keeping
    ranks: Ranks
    _corpus: Corpus | None = None

    def has_checkpoint(self, key: str) -> bool:
        """Whether something stands where a training's checkpoint is kept, and counts."""
        return self.store.checkpoint_stamp(key) not in ("", self.keeping.superseded.get(key))

    def joined(self) -> Ranks:
        """The other processes, which have begun too where something is to be trained now."""
        return self.ranks if self._corpus is None else self.ranks.start()

    def read_corpus(self) -> None:
        """Load what is trained on, encoded."""
        self.say("data", 0, 1)
        plan = self.task.plan(self.library, pretrained=self.pretrained)
        self._corpus = self.task.corpus(self.library, plan, self.encode)

    def corpus(self) -> Corpus:
        """What is trained on; each training has one of its own, of which nothing was drawn yet."""
        if self._corpus is None:
            self.read_corpus()
        given, self._corpus = self._corpus, None
        assert given is not None
        return given


def begin(job: Job, store: Store, say: Say) -> Begun:
    """All that is loaded before; `say` is told of what takes long.

    Raises:
        UserError: something has changed since the cell was planned, or cannot be had.
    """
    cell, training = job.cell, job.cell.training
    warm_up()
    plugins.load("models", training.model.name)  # with the libraries that it imports
    library = Library(job.data, job.cache, stand_ins=job.stand_ins, hub=job.hub, notice=store.warn)
    backbones = Backbones(library, job.cache, hub=job.hub, notice=store.warn)
    task, card = make_task(cell.task), backbones.card(training.backbone.name)
    refuse_changed(cell, task, card, library)
    encode = backbones.tokens(training.backbone.name)
    episodes = list(task.episodes(library, cell.limit))
    begun = Begun(task, library, backbones, encode, episodes, card.pretrained, store, say,
                  Keeping.of(job, store, device_name(job.device)), Ranks(job))  # fmt: skip
    if trains(training) and not begun.has_checkpoint(training.key):
        begun.read_corpus()
        begun.keeping.ready(training.key)
    return begun


def device_name(device: str) -> str:
    """Its name, as a record has it."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else device
