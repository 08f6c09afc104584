"""A cell with everything that its worker needs, as a file between processes. Loads no torch."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from memory_bench.cell import Cell, from_json, to_json


@dataclass(frozen=True, slots=True)
class Job:
    """A cell and where its things are.

    Attributes:
        cell: what to run.
        out: folder of the store.
        data: folder of real data, or None.
        cache: the user's cache folder.
        stand_ins, hub: what the library may use.
        device: ``cpu`` or ``cuda``.
        threads: of torch.
        deadline: seconds of the cell's clock, start-up included, after which it is ended; None: far beyond its limits.
        plan: what was predicted of it (``peak_bytes``, ``seconds``, ``how``), for its record; empty: nothing.
        before: stamp of the record that was there when the run was planned (`Store.stamp`); None: not looked at yet.
        superseded: stamps of checkpoints that do not count any more (``--force``), by training key, and of trainings
            on their way by ``unfinished/`` and it.
        checkpoint_every: how often a training is kept on its way (`memory_bench.driver.every`); empty: never.
        allotted: bytes of main memory that a scheduler gives it, which may be less than its limits; None: no scheduler.
    """

    cell: Cell
    out: Path
    data: Path | None
    cache: Path
    stand_ins: bool
    hub: bool
    device: str
    threads: int
    deadline: float | None = None
    plan: dict[str, Any] = field(default_factory=dict)
    before: str | None = None
    superseded: dict[str, str] = field(default_factory=dict)
    checkpoint_every: str = ""
    allotted: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data for the job file."""
        plain = {**asdict(self), "cell": to_json(self.cell)}
        return {k: str(v) if isinstance(v, Path) else v for k, v in plain.items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Job":
        """The job that `to_json` wrote."""
        folder = Path(data["data"]) if data["data"] else None
        paths = {"out": Path(data["out"]), "data": folder, "cache": Path(data["cache"])}
        return cls(**{**data, **paths, "cell": from_json(data["cell"])})
