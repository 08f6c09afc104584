"""Plain data as JSON and TOML hold them: read with bounds, so that nothing in a file is a surprise to its reader.

The parsers of the standard library raise other errors than their own for whole numbers of more than 4,300 digits and
for nesting beyond the interpreter's stack; and what they accept may overflow, or fail, wherever it is used first:
numbers beyond 64 bits, ``1e999`` (read as infinite), halves of characters. All of that is refused here, in a sentence.
"""

import json
import math
import tomllib
from collections.abc import Mapping
from typing import Any

DEEPEST = 64  # levels of nesting; our own files have a dozen
LARGEST = 2**63 - 1
FIELDS = "__dataclass_fields__"  # of a dataclass, in its class
LEAVES = (str, int, float, bool, type(None))


def odd(value: Any) -> str:
    """What in plain data no reader can be expected to take, as a clause that goes on with "it"; empty if there is none.

    Numbers that are not finite are odd too; whoever allows them asks `oversized`.
    """
    return _odd(value, finite=True)


def oversized(value: Any) -> str:
    """As `odd`, with numbers that are not finite allowed."""
    return _odd(value, finite=False)


def _odd(value: Any, *, finite: bool) -> str:
    level, depth = [value], 0
    while level:
        inside: list[Any] = []
        for item in level:
            kind = type(item)
            if kind is dict:  # what a file holds comes first, as every record of a run goes through this loop
                inside += item
                inside += item.values()
            elif kind is list:
                inside += item
            elif fault := _odd_leaf(item, finite=finite):
                return fault
            elif kind not in LEAVES:
                inside += _inside(item)
        level, depth = inside, depth + 1
        if depth > DEEPEST:
            return f"is nested more than {DEEPEST} levels deep"
    return ""


def _inside(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, list | tuple) else []


def _odd_leaf(value: Any, *, finite: bool) -> str:
    if isinstance(value, str):
        half = not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value)
        return "holds half of a character" if half else ""
    if isinstance(value, float):
        return "holds a number that is not finite" if finite and not math.isfinite(value) else ""
    if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
        return "holds a whole number of more than 64 bits"
    return ""


def parts(value: Any) -> dict[str, Any]:
    """The fields of a dataclass by name, those of dataclasses that are fields of it as well; nothing else is copied.

    Raises:
        TypeError: it is no dataclass.
    """
    if (names := getattr(type(value), FIELDS, None)) is None:
        raise TypeError(f"{type(value).__name__} is no plain data")
    found = {}
    for name in names:
        own = getattr(value, name)
        found[name] = parts(own) if hasattr(type(own), FIELDS) else own
    return found


def json_value(text: str) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is none, or `odd`; the message is the end of a sentence.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(beyond(error)) from error
    if fault := odd(value):
        raise ValueError(f"it {fault}")
    return value


def toml_table(text: str) -> dict[str, Any]:
    """What a TOML text says; ``inf`` and ``nan`` are numbers there.

    Raises:
        ValueError: it is none, or `oversized`; the message is the end of a sentence.
    """
    try:
        value = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(beyond(error)) from error
    if fault := oversized(value):
        raise ValueError(f"it {fault}")
    return value


def whole(text: str, low: int, high: int) -> int:
    """A whole number in decimal digits, from `low` to `high`.

    Raises:
        ValueError: it is none, or outside.
    """
    plain = text.strip()
    if not plain.isdecimal() or len(plain) > len(str(high)) + 20 or not low <= int(plain) <= high:
        raise ValueError(f"give a whole number from {low:,} to {high:,}")
    return int(plain)


def beyond(error: Exception) -> str:
    """Of errors that are no syntax errors, which the parsers do not raise as their own."""
    if isinstance(error, RecursionError):
        return f"it is nested more than {DEEPEST} levels deep"
    return "it holds a whole number of more than 64 bits" if "integer string" in str(error) else str(error)


def shortened(text: str, most: int = 40) -> str:
    """The beginning of a long text, for a message."""
    return text if len(text) <= most else f"{text[:most]}…"
