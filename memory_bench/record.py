"""Records: what came of one cell, as one JSON file that is enough to rebuild every table.

The cell in a record is what was asked; `provenance` is what happened (versions, machine, commit, times) and is no part
of the identity. Nothing here imports torch: reports must open in a fraction of a second.
"""

import importlib.metadata
import math
import platform
import subprocess
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from memory_bench import cell as cells
from memory_bench.budget import Usage
from memory_bench.cell import Cell
from memory_bench.episode import Estimate
from memory_bench.errors import UserError
from memory_bench.files.shapes import HappenedShape, LearnedShape, at_least, conform

SCHEMA = 1
STATUSES = ("ok", "over_budget", "failed", "skipped")
VERDICTS = ("learned", "not learned", "no memory", "untrained", "pretrained")
PACKAGES = ("torch", "transformers", "pandas", "memory-bench")
COUNTED = ("parameters", "added_parameters", "trained_parameters", "train_tokens", "train_steps", "train_flops",
           "train_seconds", "eval_tokens", "scored_tokens", "eval_flops", "eval_seconds", "peak_device_bytes",
           "peak_host_bytes", "state_bytes", "state_host_bytes")  # fmt: skip
"""Of what was spent, what cannot be below zero."""
CHANGES = ("status", "--porcelain", "--untracked-files=no", "-z")


@dataclass(frozen=True)
class Record:
    """The result of one cell.

    Attributes:
        cell: what was asked.
        status: ``ok``, ``over_budget``, ``failed`` or ``skipped``; all four are results.
        detail: why, where the status is not ``ok``; for ``over_budget`` the limit, what was
            allowed and used, and where it struck (``device_bytes 150 MB, 163 MB at segment 37/391``).
        metrics: of this cell alone; tables over several seeds are computed from the samples.
        usage: what was spent.
        provenance: of `provenance`; ``look_ahead``: how many tokens past the predicting position the model may see;
            ``state_growth``: how the state of a row grew with the tokens read; ``plan`` where there was one:
            ``peak_bytes``, ``seconds``, and ``how`` they were found; ``processes`` that trained it, where several did.
        learned: whether a trained memory learned anything: ``verdict`` (one of `VERDICTS`), ``lift``, ``low``,
            ``high`` and ``against`` (the control it was measured against).
        levels: reference levels of the headline, for example chance and majority.
        schema: version of this format.
    """

    cell: Cell
    status: str
    detail: str
    metrics: tuple[Estimate, ...]
    usage: Usage
    provenance: dict[str, Any]
    learned: dict[str, Any] | None
    levels: dict[str, float]
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status '{self.status}' is none of {', '.join(STATUSES)}")
        if self.learned is not None and self.learned.get("verdict") not in VERDICTS:
            raise ValueError(f"verdict '{self.learned.get('verdict')}' is none of {', '.join(VERDICTS)}")

    def _check_counts(self) -> None:
        """Raise `ValueError` for what is counted and below zero."""
        at_least("usage", {name: getattr(self.usage, name) for name in COUNTED})
        at_least("metrics", {"n": min((m.n for m in self.metrics), default=0)})
        at_least("cell", {"seed": self.cell.training.seed})
        at_least("cell", {"limit": self.cell.limit, "processes": self.cell.training.processes}, 1)

    @cached_property
    def key(self) -> str:
        """Of the cell: 16 hexadecimal digits."""
        return self.cell.key

    @property
    def look_ahead(self) -> int:
        """How many tokens past the predicting position a prediction could see; such numbers are no headline."""
        return int(self.provenance.get("look_ahead") or 0)

    def to_json(self) -> dict[str, Any]:
        """Plain data, with null for numbers that are not finite."""
        plain = {
            "schema": self.schema,
            "key": self.key,
            "title": self.cell.title,
            "status": self.status,
            "detail": self.detail,
            "metrics": [asdict(m) for m in self.metrics],
            "usage": asdict(self.usage),
            "learned": self.learned,
            "levels": dict(self.levels),
            "cell": cells.to_json(self.cell),
            "provenance": self.provenance,
        }
        return {name: _finite(value) for name, value in plain.items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Record":
        """The record that `to_json` wrote.

        Raises:
            ValueError: another schema, another way of identifying cells, or fields missing, unknown or of another type.
        """
        if data.get("schema") != SCHEMA:
            raise ValueError(f"it has schema {data.get('schema')}, this version reads {SCHEMA}")
        try:
            metrics = [{**m, "value": math.nan if m["value"] is None else m["value"]} for m in data["metrics"]]
            record = cls(
                cell=cells.from_json(data["cell"]),
                status=data["status"],
                detail=data["detail"],
                metrics=tuple(Estimate(**m) for m in metrics),
                usage=_usage(data["usage"]),
                provenance=data["provenance"],
                learned=data["learned"],
                levels={name: math.nan if value is None else value for name, value in data["levels"].items()},
            )
        except (KeyError, TypeError, AttributeError, UserError) as error:  # a budget refuses limits below zero
            raise ValueError(f"a field is missing or unknown ({error})") from error
        conform(cls, record)
        conform(LearnedShape | None, record.learned)
        conform(HappenedShape, record.provenance)
        record._check_counts()
        if record.key != data.get("key"):
            raise ValueError("its key is not that of its cell; another version wrote it, or it was edited")
        return record


def _usage(data: dict[str, Any]) -> Usage:
    """What was spent; NaN for what was not finite and so is not in a file. What need not be measured may be None."""
    optional = {f.name for f in fields(Usage) if f.default is None}
    spent: dict[str, Any] = {
        name: math.nan if value is None and name not in optional else value for name, value in data.items()
    }
    return Usage(**spent)


def _finite(value: Any) -> Any:
    """Plain data without NaN, infinities and numpy scalars."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, str | bytes):
        value = value.item()  # numpy and torch scalars
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def now() -> str:
    """The time in UTC, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Python's and the packages' versions that decide numbers, without importing them."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def provenance(*, device: str, threads: int, started: str, finished: str = "") -> dict[str, Any]:
    """Where and with what a cell was run. Holds no path and no host name.

    Args:
        device: name of the device, for example ``cpu`` or ``NVIDIA H200``.
        threads: CPU threads of torch.
        started: of `now`, before training.
        finished: of `now`; empty: this moment.
    """
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "processor": processor(),
        "device": device,
        "threads": threads,
        **checkout(),
        "started": started,
        "finished": finished or now(),
    }


@lru_cache(maxsize=1)
def processor() -> str:
    """The processor's model: another one rounds otherwise, and a training then ends elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].split("\n")
    except OSError:
        lines = []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    return f"{facts['model name']} (family {facts.get('cpu family', '?')}, model {facts.get('model', '?')})"


@lru_cache(maxsize=1)
def checkout() -> dict[str, Any]:
    """Commit and dirty flag of the git checkout this package is run from; None for both where it is installed."""
    folder = Path(__file__).resolve().parent
    nothing: dict[str, Any] = {"commit": None, "dirty": None}
    # A package installed into an environment inside some other repository must not report that repository's commit.
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return nothing
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--untracked-files=no")
    return nothing if commit is None else {"commit": commit.strip(), "dirty": bool(changes and changes.strip())}


def changed_files(folder: Path) -> list[str]:
    """Absolute paths of tracked files around `folder` that differ from the commit; empty where there is no git."""
    top, found = (_git(folder, *arguments) for arguments in (("rev-parse", "--show-toplevel"), CHANGES))
    if top is None or found is None:
        return []
    # "XY path", or "XY new<NUL>old" for what was renamed: the old name alone has no letters before it.
    names = [entry[3:] for entry in found.split("\0") if entry[2:3] == " "]
    return [str(Path(top.strip()) / name) for name in names]


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command in `folder`, None where it fails or there is no git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
