"""The budgets of a run: one, or several for the same models, each a preset or file with limits that differ.

``cpu-minutes[device_bytes=100MB],cpu-minutes[device_bytes=1GB]`` asks for two; every budget has its own boards.
"""

import re
from dataclasses import fields, replace
from typing import Any

from memory_bench.budget import BYTE_UNITS, FRACTIONS, Budget, load_budget
from memory_bench.errors import UserError, unknown
from memory_bench.running.grid import BRACKETS, split_names

UNITS = {"": 1} | {unit: 1000**power for power, unit in enumerate(BYTE_UNITS)}
TRUTH = {"true": True, "false": False}


def load_budgets(text: str) -> list[Budget]:
    """The budgets that `text` names, in order; each with the changed limits in its name.

    Raises:
        UserError: an unknown budget or limit, a value that is no number, or the same budget twice.
    """
    found = [_load(name) for name in split_names(text)]
    names = [budget.name for budget in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--budget {text}: '{name}' is there twice; name each budget once.")
    return found


def _load(text: str) -> Budget:
    match = BRACKETS.fullmatch(text)
    if match is None:
        raise UserError(f"Cannot read the budget '{text}'; limits go into brackets: cpu-minutes[device_bytes=100MB].")
    budget = load_budget(match[1])
    if not match[2]:
        return budget
    changes = dict(_limit(part.strip(), match[1]) for part in match[2].split(","))
    given = ",".join(part.strip().replace(" ", "") for part in match[2].split(","))
    return replace(budget, name=f"{budget.name}[{given}]", **changes)


def _limit(part: str, budget: str) -> tuple[str, Any]:
    """``device_bytes=100MB`` as a field and its value; ``none`` takes a limit away."""
    name, sign, value = (p.strip() for p in part.partition("="))
    known = [f.name for f in fields(Budget) if f.name not in ("name", "tasks")]
    if not sign:
        raise UserError(f"Cannot read the limit '{part}' of {budget}; write limit=value.")
    if name not in known:
        raise unknown(f"limit of the budget {budget}", name, known)
    if name == "own_curriculum":
        if value not in TRUTH:
            raise UserError(f"{budget}[{part}]: own_curriculum is true or false.")
        return name, TRUTH[value]
    if value == "none" and name != "seeds":
        return name, None
    match = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*([kMGT]?B?)", value)
    unit = match[2] if match else ""
    if match is None or unit not in UNITS or (unit and not name.endswith("_bytes")):
        raise UserError(f"{budget}[{part}]: give a number" + (", also as 100MB or 1.5GB." if "bytes" in name else "."))
    try:
        number = float(match[1]) * UNITS[unit]
    except ValueError:
        raise UserError(f"{budget}[{part}]: '{match[1]}' is no number.") from None
    if name in FRACTIONS:
        return name, number
    if number != int(number):
        raise UserError(f"{budget}[{part}]: {name} must be a whole number.")
    return name, int(number)
