"""What a user may ask of `run` and `plan`: options as given, suites, and the small languages inside options."""

import json
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from memory_bench import plugins
from memory_bench.errors import UserError, unknown
from memory_bench.files.plain import shortened, toml_table, whole

MOST_SEEDS, LARGEST_SEED = 1_000, 2**32 - 1  # numpy's generators take no larger ones
MOST_PROCESSES = 64  # of one training; more are on more machines than one
MOST = 10**9  # documents or questions; no data set has as many


@dataclass(frozen=True, slots=True)
class Options:
    """The options of `run` and `plan`, as given."""

    models: str
    tasks: str
    backbone: str
    budget: str
    seeds: str
    suite: str
    data: Path | None
    stand_ins: bool
    out: Path | None
    limit: str
    settings: tuple[str, ...]
    controls: bool
    executor: str
    retry: str
    force: bool
    quiet: bool
    as_json: bool
    cache: Path
    hub: bool
    mlflow: str | None = None
    checkpoint_every: str = ""
    ray_address: str = ""
    processes: str = ""


def with_suite(options: Options) -> Options:
    """The options with a suite's values where the command line is silent."""
    if not options.suite:
        return options
    values = read_suite(options.suite)
    known = {"models", "tasks", "backbone", "budget", "seeds", "limit", "set"}
    for key in values:
        if key not in known:
            raise unknown(f"entry in the suite {options.suite}", key, known)
    changes = values.pop("set", {})
    if not isinstance(changes, dict):
        raise UserError(f"Suite {options.suite}: set must be a table of options, for example [set].")
    settings = tuple(f"{k}={_value(k, v, options.suite)}" for k, v in changes.items())
    listed = {k: _entry(k, v, options.suite) for k, v in values.items()}
    filled: dict[str, Any] = {k: v for k, v in listed.items() if not getattr(options, k)}
    return replace(options, **filled, settings=settings + options.settings)


def _entry(key: str, value: object, suite: str) -> str:
    """A suite's entry as the command line has it: names are texts, counts whole numbers or texts, or lists of those."""
    kinds = (str, int) if key in ("seeds", "limit") else (str,)
    parts = value if isinstance(value, list) and key in ("models", "tasks", "seeds") else [value]
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, kinds):
            wanted = "a text" if kinds == (str,) else "a whole number or a text"
            raise UserError(f"Suite {suite}: {key} must be {wanted}, not {part!r}.")
    # One seed in a list is that seed, as "7," is on the command line; 7 alone would be seven of them.
    return ",".join(map(str, parts)) + ("," if key == "seeds" and isinstance(value, list) else "")


def _value(key: str, value: object, suite: str) -> str:
    """An option's value as ``--set`` reads it."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as problem:
        raise UserError(f"Suite {suite}: {key} = {value} is no value of an option.") from problem


def read_suite(name: str) -> dict[str, Any]:
    """A suite's entries: a TOML file that ships with the package, or one at that path.

    Raises:
        UserError: no such suite, or it cannot be read.
    """
    shipped = {
        f.name.removesuffix(".toml"): f
        for f in resources.files("memory_bench.suites").iterdir()
        if f.name.endswith(".toml")
    }
    try:
        if name in shipped:
            return toml_table(shipped[name].read_text(encoding="utf-8"))
        if name.endswith(".toml"):
            return toml_table(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise UserError(f"Cannot read the suite {name}: {problem}.") from problem
    raise unknown("suite", name, shipped, "Or give a TOML file; `memory-bench list suites` shows the shipped ones.")


def parse_seeds(text: str, default: int) -> tuple[int, ...]:
    """``3`` means seeds 0, 1, 2; ``0,7`` means those."""
    parts = [p for p in text.split(",") if p.strip()]
    if not parts:
        if default > MOST_SEEDS:
            raise UserError(f"{default:,} seeds are asked for: give a number from 1 to {MOST_SEEDS:,}.")
        return tuple(range(default))
    said = f"--seeds {shortened(text)}: give a number of seeds (3) or a list of them (0,1,7); "
    try:
        if "," not in text:
            return tuple(range(whole(text, 1, MOST_SEEDS)))
        numbers = tuple(dict.fromkeys(whole(part, 0, LARGEST_SEED) for part in parts))
    except ValueError:
        raise UserError(
            f"{said}seeds must not be negative, and there must be at least one: 1 to {MOST_SEEDS:,} seeds, each from 0 "
            f"to {LARGEST_SEED:,}."
        ) from None
    if len(numbers) > MOST_SEEDS:
        raise UserError(f"{said}at most {MOST_SEEDS:,} of them.")
    return numbers


def parse_processes(text: str) -> int:
    """How many processes train a model together: 1 where nothing is said.

    Raises:
        UserError: it is no such number.
    """
    try:
        return whole(text, 1, MOST_PROCESSES) if text.strip() else 1
    except ValueError:
        raise UserError(f"--processes {shortened(text)}: give a number from 1 to {MOST_PROCESSES}.") from None


def parse_settings(texts: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """``owner.option=value`` of every ``--set``, by owner."""
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        owner, dot, option = name.rpartition(".")  # a task may be a file: lm-eval:task.yaml
        if not sign or not dot:
            raise UserError(f"--set {text}: write model.option=value, for example --set hmt.segment=64.")
        found.setdefault(owner, {})[option] = plugins.parse_value(value)
    return found


def parse_limits(text: str) -> dict[str, int]:
    """``8`` means eight of every task, under the name ``""``; ``pg19=3,pubmedqa=100`` names tasks.

    Raises:
        UserError: neither, a number below 1, or two for the same task.
    """
    found: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        task, named, number = (p.strip() for p in part.rpartition("="))
        try:
            found_number = whole(number, 1, MOST)
        except ValueError:
            found_number = 0
        if not found_number or (named and not task) or task in found:
            raise UserError(
                f"--limit {shortened(text)}: give a number from 1 (to {MOST:,}), or one for each task "
                "(pg19=3,pubmedqa=100)."
            )
        found[task] = found_number
    return found
