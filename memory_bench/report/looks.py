"""Colours and markers of rows: they follow from a row's label alone, so a model looks the same in every report.

Colours are Okabe and Ito's, told apart with any colour vision, and markers differ too. Where two labels of a report
would look the same, one of them takes the next free marker of its colour, or of the next colour that has one, and no
other row changes for it: never a model that comes with the harness (nor its ablations), of which no two look alike;
among others the later in the alphabet.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from memory_bench import plugins
from memory_bench.report.board import WINDOW, Board

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
MARKERS = "osD^v<>p*dPh"
SALT = "3614"
"""Chosen so that no two of the models, ablations and controls that come with the harness fall on the same look."""


@dataclass(frozen=True, slots=True)
class Look:
    """How a row is drawn, the same in all plots."""

    color: str
    marker: str
    fill: str
    line: str


def looks(board: Board, labels: Sequence[str] = ()) -> dict[str, Look]:
    """Per row of the board; the window is black and round, controls are hollow and dashed.

    Args:
        board: with the rows.
        labels: of all rows of the report, among which no two shall look the same.
    """
    own = {row.label for row in board.everything}
    places = assigned({*labels, *own})
    result = {}
    for row in board.everything:
        color, marker = places[row.label]
        hollow = row.role == "control"
        result[row.label] = Look(color, marker, "white" if hollow else color, "--" if hollow else "-")
    return result


def assigned(labels: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Label to colour and marker."""
    wanted = {label: _place(label) for label in sorted({*labels} - {WINDOW})}
    order = list(wanted)
    if len({*wanted.values()}) < len(wanted):
        ours = plugins.own("models")
        order.sort(key=lambda label: re.split(r"[\[ ]", label, maxsplit=1)[0] not in ours)
    found: dict[str, tuple[int, int]] = {}
    taken: set[tuple[int, int]] = set()
    for label in order:
        color, first = wanted[label]
        places = [
            ((color + further) % len(PALETTE), (first + step) % len(MARKERS))
            for further in range(len(PALETTE))
            for step in range(len(MARKERS))
        ]
        found[label] = next((place for place in places if place not in taken), places[0])
        taken.add(found[label])
    return {**{label: (PALETTE[c], MARKERS[m]) for label, (c, m) in found.items()}, WINDOW: ("#000000", "o")}


def _place(label: str) -> tuple[int, int]:
    """The label's own colour and marker."""
    number = int.from_bytes(hashlib.sha256(f"{SALT}{label}".encode()).digest()[:8], "big")
    return number % len(PALETTE), number // len(PALETTE) % len(MARKERS)
