"""A training on its way, on disk: all that it needs to go on as if nothing had happened, to the bit.

It is kept between two optimiser steps, where no gradient and no memory state lives: every step reads fresh streams. So
there are weights that train (and what stands beside the backbone), the optimiser's moments, states of generators, what
was spent, the curve, and how many steps each stage has had. What was drawn from the corpus is drawn again: that brings
any corpus to where it was, and shows whether it is the same.

::

    unfinished/<training key>/000000120/     unfinished.json   tensors.safetensors   SHA256SUMS

A newer one is whole on the disk before the older goes. What is damaged, or of another training or surroundings, is set
aside with a notice and never used. Keeping is the harness's work: what it takes is charged to nobody, it needs no
second copy of anything in memory, and one that cannot be written is said and costs nothing else.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from torch import Tensor

from memory_bench.budget import Usage
from memory_bench.corpus import Line
from memory_bench.driver.every import Every
from memory_bench.driver.tensor_file import write_tensors
from memory_bench.errors import UserError
from memory_bench.files.artefacts import Damaged, Notice, damage, read_json, remove, replacing, write_json
from memory_bench.files.shapes import conform

SCHEMA = 1
FACTS, TENSORS = "unfinished.json", "tensors.safetensors"
ASIDE = ".aside"


class CannotGoOn(Exception):
    """What was kept does not lead on: the text says why, as the end of a sentence. Nothing was changed by trying."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What ``unfinished.json`` holds beside its schema.

    Attributes:
        surroundings: what moves bits or seconds (versions, device, threads): those of another are not gone on from.
        stages: optimiser steps made in each stage so far.
        stage: number of the stage that it is in, from 0.
        curve: as of `memory_bench.driver.train.Trained`.
        took: seconds of the last steps.
        saved: bytes that a step of this stage keeps for its backward pass.
        usage: what was spent.
        drawn: `digest` of the last batch.
        chance: of generators (`memory_bench.driver.randomness.plain`).
    """

    surroundings: dict[str, Any]
    stages: list[int]
    stage: int
    curve: list[tuple[int, float]]
    took: list[float]
    saved: int
    usage: Usage
    drawn: str
    chance: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Kept:
    """What was found on disk, with the place of its tensors."""

    facts: Facts
    tensors: Path


class Keeper:
    """Keeps one training, and finds what was kept of it. Callers hold the training's lock.

    Args:
        folder: of this training's.
        key: of the training.
        every: how often; None: what is found is gone on from, nothing is kept.
        surroundings: as of `Facts`.
        notice: told of what is not used, and of what is.
        unfenced: around writing: the model's limit on files does not count there.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        every: Every | None,
        *,
        surroundings: Mapping[str, Any],
        notice: Notice = lambda sentence: None,
        unfenced: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.folder, self.key, self.every = folder, key, every
        self.surroundings, self.notice = dict(surroundings), notice
        self.unfenced = unfenced
        self._last = monotonic()
        self._failed = False
        self._found: Path | None = None

    def due(self, steps: int) -> bool:
        """Whether to keep a training that has made so many steps."""
        return self.every is not None and self.every.due(steps, monotonic() - self._last)

    def found(self) -> Kept | None:
        """The newest that is whole and of this training; those that are not are set aside."""
        for place in reversed(_places(self.folder)):
            self._found = place
            try:
                facts = self._read(place)
            except (OSError, ValueError, UserError) as error:
                self.put_aside(str(error))
                continue
            return Kept(facts, place / TENSORS)
        return None

    def _read(self, place: Path) -> Facts:
        if problem := damage(place, self.key):
            raise Damaged(f"it {problem}")
        told = read_json(place / FACTS)
        if told.get("schema") != SCHEMA:
            raise Damaged(f"it has schema {told.get('schema')}, this version reads {SCHEMA}")
        conform(Facts, told)
        own = {name: told[name] for name in Facts.__slots__}
        if strange := sorted(k for k in {*own["surroundings"], *self.surroundings}
                             if own["surroundings"].get(k) != self.surroundings.get(k)):  # fmt: skip
            name = strange[0]
            raise Damaged(
                f"it was made with {name.replace('_', ' ')} {own['surroundings'].get(name)}, not "
                f"{self.surroundings.get(name)}, so that going on would not end in the same numbers"
            )
        return Facts(**{**own, "usage": Usage(**own["usage"])})

    def taken_up(self, facts: Facts) -> None:
        """Say that a training goes on; the record's provenance has it too."""
        self.notice(f"The training {self.key} goes on after optimiser step {sum(facts.stages):,}.")

    def put_aside(self, why: str) -> None:
        """What was found last is never used; it stays under another name."""
        assert self._found is not None
        place, aside = self._found, self._found.with_name(self._found.name + ASIDE)
        shown = f"unfinished/{self.key}/{place.name}"
        self.notice(f"{shown} is not used and set aside, and the training begins earlier: {why}.")
        with suppress(OSError):
            remove(aside)
            os.replace(place, aside)

    def keep(self, facts: Facts, tensors: Mapping[str, Tensor]) -> None:
        """Write one, and take the older ones away; what the machine refuses is said once."""
        place = self.folder / f"{sum(facts.stages):09d}"
        try:
            with self.unfenced():
                with replacing(place, self.key) as part:
                    part.mkdir()
                    write_tensors(part / TENSORS, tensors)
                    write_json(part / FACTS, {"schema": SCHEMA, **asdict(facts)})
                for other in _places(self.folder):
                    if other != place:
                        remove(other)
        except (OSError, ValueError, TypeError, UserError) as error:
            if not self._failed:
                why = getattr(error, "strerror", None) or str(error).rstrip(".")
                self.notice(f"The training {self.key} could not be kept on its way ({why}); it goes on all the same.")
            self._failed = True
        self._last = monotonic()

    def forget(self) -> None:
        """The training is over: nothing of it is kept any more but what was set aside."""
        with suppress(OSError):
            for entry in self.folder.iterdir():
                if not entry.name.endswith(ASIDE):
                    remove(entry)
            with suppress(OSError):
                self.folder.rmdir()


def digest(lines: Sequence[Line]) -> str:
    """SHA-256 of a batch, as it was drawn."""
    total = hashlib.sha256()
    for line in lines:
        given = b"" if line.given is None else line.given.numpy().tobytes()
        for part in (line.ids.numpy().tobytes(), line.scored.numpy().tobytes(), given, str(line.seed).encode()):
            total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()


def _places(folder: Path) -> list[Path]:
    """Those that were kept whole, by their steps."""
    try:
        return sorted(p for p in folder.iterdir() if p.name.isdigit())
    except OSError:
        return []
