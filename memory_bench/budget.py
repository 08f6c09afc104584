"""Budgets: limits that are the same for every model, and what was spent under them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from memory_bench.errors import UserError, unknown
from memory_bench.files.plain import toml_table


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits of one cell. None does not bind; the first limit that is reached ends training.

    Attributes:
        name: of the preset or file.
        device_bytes: weights, optimiser, activations and memory state; on CPU the process's peak above its start.
        host_bytes: peak main memory of the process and its children, with the files that they keep.
        train_seconds: of training, on the device (of a CPU: those it computes or idles, not those in which others have
            it). They end a training where neither tokens nor FLOPs nor a curriculum do; beside those they end the cell.
        train_tokens: input tokens read in training, padding excluded, repeats counted.
        train_flops: of training, analytic (three forward passes a step).
        eval_seconds: of one cell's evaluation, counted as those of training. Its controls may take as long for each of
            their `CONTROL_PASSES`.
        added_parameters: that a method adds to its backbone.
        own_curriculum: a recipe that brings its own number of steps is trained to its end, whatever `train_tokens` and
            `train_flops` say; else they end it as any other.
        seeds: number of seeds, unless the command says otherwise.
        tasks: per task name, default options of the evaluation (what is scored), for example ``pg19.extent``.
    """

    name: str
    device_bytes: int | None = None
    host_bytes: int | None = None
    train_seconds: float | None = None
    train_tokens: int | None = None
    train_flops: float | None = None
    eval_seconds: float | None = None
    added_parameters: int | None = None
    own_curriculum: bool = False
    seeds: int = 1
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, int | float) and not (1 if f.name == "seeds" else 0) <= value < math.inf:
                raise UserError(
                    f"Budget '{self.name}': {f.name} = {value} is negative or too small, or no number; "
                    "leave it out for no limit."
                )

    @property
    def trains(self) -> bool:
        """There is room for training: no limit on it is zero."""
        return all(limit != 0 for limit in (self.train_tokens, self.train_flops, self.train_seconds))

    @property
    def counts(self) -> bool:
        """Training is limited in tokens or FLOPs, so its seconds are a guard beside what is equal for all."""
        return self.train_tokens is not None or self.train_flops is not None

    def seconds(self, phase: str) -> tuple[str, float] | None:
        """(name, seconds) of the limit on ``train``, ``eval`` or ``control``; None where there is none.

        Controls have no limit of their own: each of their passes may take what the evaluation may.
        """
        limit = self.train_seconds if phase == "train" else self.eval_seconds
        if limit is None or phase not in ("train", "eval", "control"):
            return None
        return f"{phase}_seconds", limit * (CONTROL_PASSES if phase == "control" else 1)


CONTROL_PASSES = 3  # over an evaluation: memory wiped, memory foreign, evidence before the question


def amount(limit: str, value: float) -> str:
    """`value` of the limit (or field of `Usage`) called `limit`, for a person: ``150 MB``, ``1.05 s``, ``49,152``."""
    if limit.endswith("_seconds"):
        return f"{value:.3g} s" if value < 1000 else f"{value:,.0f} s"
    if limit.endswith("_flops"):
        return f"{value:.3g}"
    if not limit.endswith("_bytes"):
        return f"{value:,.0f}"
    size, unit = float(value), 0
    while size >= 999.5 and unit < len(BYTE_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.3g} {BYTE_UNITS[unit]}"


BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")


class BudgetExceeded(Exception):
    """A limit of the budget was passed where passing it ends the work. Caught only by the worker.

    Its text is a cell's `detail`: ``device_bytes 150 MB, 163 MB at segment 37/391``.

    Attributes:
        limit: the budget's field, for example ``device_bytes``.
        allowed: by the budget, in the limit's unit; None where it sets none and the machine refused.
        used: when it struck; None where what asked for more was refused before it had it.
        where: the place in the work, for example ``segment 37/391``.
    """

    def __init__(self, limit: str, allowed: float | None, used: float | None, where: str) -> None:
        spent = "more was asked for" if used is None else amount(limit, used)
        bound = "of this machine" if allowed is None else amount(limit, allowed)
        super().__init__(f"{limit} {bound}, {spent} at {where or 'the start'}")
        self.limit, self.allowed, self.used, self.where = limit, allowed, used, where

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.limit, self.allowed, self.used, self.where)


GB = 10**9
FRACTIONS = ("train_seconds", "train_flops", "eval_seconds")  # limits that need not be whole numbers


def load_budget(name: str) -> Budget:
    """The preset called `name`, or the limits in the TOML file at that path.

    Raises:
        UserError: unknown name, unreadable file, unknown or negative limit.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if path.suffix != ".toml":
        raise unknown("budget", name, PRESETS, "Or give a TOML file; `memory-bench list budgets` shows the presets.")
    return _read(path)


def _read(path: Path | Traversable) -> Budget:
    """The limits in a TOML file, a preset's or a user's."""
    try:
        values = toml_table(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read the budget file {path}: {error}.") from error
    known = {f.name for f in fields(Budget)}
    for key in values:
        if key not in known:
            raise unknown("limit in the budget file", key, known)
    _check(values, path)
    if math.isfinite(seeds := values.get("seeds", 1)):
        values["seeds"] = int(seeds)  # 2.0 is two of them
    return Budget(**{"name": path.name.removesuffix(".toml"), **values})


def _check(values: dict[str, Any], path: Path | Traversable) -> None:
    """Whether known limits have the type that they need."""
    if not isinstance(values.get("name", ""), str):
        raise UserError(f"Budget file {path}: name must be a text, not {values['name']!r}.")
    if not isinstance(values.get("own_curriculum", False), bool):
        raise UserError(f"Budget file {path}: own_curriculum must be true or false, not {values['own_curriculum']!r}.")
    for key in values.keys() - {"name", "tasks", "own_curriculum"}:
        value = values[key]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"Budget file {path}: {key} must be a number, not {value!r}.")
        if key not in FRACTIONS and math.isfinite(value) and value != int(value):
            raise UserError(f"Budget file {path}: {key} must be a whole number, not {value!r}.")
    tasks = values.get("tasks", {})
    if not isinstance(tasks, dict) or not all(isinstance(options, dict) for options in tasks.values()):
        raise UserError(f"Budget file {path}: tasks must be tables of options, for example [tasks.pg19].")


def preset_files() -> dict[str, Traversable]:
    """The shipped TOML files by the name of their preset."""
    files = {f.name.removesuffix(".toml"): f for f in resources.files("memory_bench.budgets").iterdir()}
    return {name: file for name, file in sorted(files.items()) if file.name.endswith(".toml")}


PRESETS: Mapping[str, Budget] = {name: _read(file) for name, file in preset_files().items()}
"""The presets by name."""


@dataclass(slots=True)
class Usage:
    """What one cell spent; filled by the meter, written even when the cell fails.

    Attributes that are not named by a limit of `Budget`:
        adapter_parameters: of `added_parameters`, those of the recipe, the same for every model that has them.
        control_seconds: of the controls, which are the harness's own and no part of `eval_seconds`.
        peak_reserved_bytes: what an accelerator's allocator had taken at most, used or not; 0 on a CPU.
        training_ended_by: see `memory_bench.driver.train.Trained`.

    None was not measured. Bytes of state are those of one row, the largest in evaluation; read and written are means
    over its segments (see `memory_bench.driver.accounting`). Joules are those of the device, for whomever it worked.
    """

    parameters: int = 0
    added_parameters: int = 0
    trained_parameters: int = 0
    train_tokens: int = 0
    train_steps: int = 0
    train_flops: float = 0.0
    train_seconds: float = 0.0
    eval_tokens: int = 0
    scored_tokens: int = 0
    eval_flops: float = 0.0
    eval_seconds: float = 0.0
    control_seconds: float = 0.0
    peak_device_bytes: int = 0
    peak_reserved_bytes: int = 0
    peak_host_bytes: int = 0
    state_bytes: int = 0
    state_host_bytes: int = 0
    training_ended_by: str = ""
    adapter_parameters: int = 0
    state_disk_bytes: int | None = None
    state_read_bytes: float | None = None
    state_written_bytes: float | None = None
    weight_bytes: int | None = None
    gradient_bytes: int | None = None
    optimizer_bytes: int | None = None
    activation_bytes: int | None = None
    train_joules: float | None = None
    eval_joules: float | None = None


@dataclass(frozen=True, slots=True)
class Spent:
    """What a training spent; its cells' usage repeats it."""

    train_tokens: int
    train_steps: int
    train_flops: float
    train_seconds: float
    peak_device_bytes: int
    peak_host_bytes: int
    training_ended_by: str
    gradient_bytes: int | None = None
    optimizer_bytes: int | None = None
    activation_bytes: int | None = None
    train_joules: float | None = None
