"""Plain data as JSON and TOML hold them: read with bounds, so that nothing in a file is a surprise to its reader.

The parsers of the standard library raise other errors than their own for whole numbers of more than 4,300 digits and
for nesting beyond the interpreter's stack; and what they accept may overflow, or fail, wherever it is used first:
numbers beyond 64 bits, ``1e999`` (read as infinite), halves of characters. All of that is refused here, in a sentence.
"""

import json
import tomllib
from collections.abc import Mapping
from typing import Any

DEEPEST = 64  # levels of nesting; our own files have a dozen
LARGEST = 2**63 - 1
INFINITE = float("inf")


def odd(value: Any) -> str:
    """What in plain data no reader can be expected to take, as a clause that goes on with "it"; empty if there is none.

    Numbers that are not finite are odd too; whoever allows them asks `oversized`.
    """
    return _odd(value, finite=True)


def oversized(value: Any) -> str:
    """As `odd`, with numbers that are not finite allowed."""
    return _odd(value, finite=False)


def _odd(value: Any, *, finite: bool) -> str:
    left, depth = [value], 0
    while left:
        inner: list[Any] = []
        for item in left:
            if isinstance(item, str):
                if not item.isascii() and any("\ud800" <= c <= "\udfff" for c in item):
                    return "holds half of a character"
            elif isinstance(item, bool):
                continue
            elif isinstance(item, int):
                if not -LARGEST <= item <= LARGEST:
                    return "holds a whole number of more than 64 bits"
            elif isinstance(item, float):
                if finite and not -INFINITE < item < INFINITE:
                    return "holds a number that is not finite"
            elif isinstance(item, Mapping):
                inner += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple):
                inner += item
        left, depth = inner, depth + 1
        if depth > DEEPEST:
            return f"is nested more than {DEEPEST} levels deep"
    return ""


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
