"""Ways in which a file comes to grief: bytes and JSON values that are no longer what was written."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from memory_bench.files.artefacts import CHECKSUM, checksum_of

ODD: tuple[Any, ...] = (None, True, -1, 0, 1.5, 10**30, "", "x", [], [1], [[1, 2]], {}, {"a": None}, float("nan"))


def flip(path: Path, place: int = -1) -> None:
    """One bit of one byte; by default in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place < 0 else place] ^= 4
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    """Half of it is left."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    """Nothing is left."""
    path.write_bytes(b"")


def lose(path: Path) -> None:
    """It is gone."""
    path.unlink()


def in_the_way(path: Path) -> None:
    """There is a folder of its name."""
    path.unlink()
    path.mkdir()


KINDS: tuple[Callable[[Path], None], ...] = (flip, truncate, empty, lose, in_the_way)


def mutate(value: Any, rng: Random) -> Any:
    """A copy of JSON data with one entry changed, lost, doubled or added, anywhere in it."""
    whole = json.loads(json.dumps(value))
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                visit(node[key])

    visit(whole)
    node, key = rng.choice(places)
    what = rng.choice(("change", "change", "lose", "add"))
    if what == "lose":
        del node[key]
    elif what == "add" and isinstance(node, list):
        node.insert(key, rng.choice(ODD))
    elif what == "add":
        node["surprise"] = rng.choice(ODD)
    else:
        node[key] = rng.choice(ODD)
    return whole


def resealed(value: dict[str, Any]) -> str:
    """JSON of data with a checksum that fits, as a program with a fault would have written it."""
    plain = {name: entry for name, entry in value.items() if name != CHECKSUM}
    return json.dumps({**plain, CHECKSUM: checksum_of(plain)})
