"""Published claims as data: what is said, where, what would show it, and what that takes.

A claim is a list of tests that must all hold. A test names two rows of a run (`compared`), or something that is counted
on a model itself (`counted`); nothing here runs anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from memory_bench.errors import UserError, unknown
from memory_bench.files.inputs import Place, as_dataclass, once, shown
from memory_bench.files.plain import toml_table
from memory_bench.shipped import results_folder

COMPARED = ("lower", "no worse", "equal", "measure", "share")
COUNTED = ("parameters", "pool", "recall")
TIERS = ("cpu", "gpu", "cluster")


@dataclass(frozen=True, slots=True)
class Test:
    """One thing that must hold.

    Attributes:
        kind: of `COMPARED`, the token perplexity of `left` against that of `right`: ``lower``; ``no worse`` or
            ``equal`` within `tolerance`; ``measure`` only reports the difference; ``share`` reports how much of what
            `left` gains over `base` is lost with `right`. Of `COUNTED`: ``parameters`` that `left` adds to its
            backbone, as a share between `low` and `high`; rows of a block left in a ``pool`` after later writes, within
            `tolerance` of the law; ``recall`` of filler, below that of text.
        left, right, base: models as in ``--models``, options in brackets.
        task: that both are scored on.
        lengths: tokens from a document's beginning; it must hold at each. Empty: on all that was read.
        tolerance: share of the perplexity, or of rows.
        low, high: of a share.
        backbone: on which parameters are counted.
    """

    kind: str
    left: str
    right: str = ""
    base: str = ""
    task: str = ""
    lengths: tuple[int, ...] = ()
    tolerance: float = 0.0
    low: float = 0.0
    high: float = 1.0
    backbone: str = ""

    @property
    def compared(self) -> bool:
        """It compares two rows of a run."""
        return self.kind in COMPARED

    @property
    def trains(self) -> tuple[str, ...]:
        """The models that must have been trained for it."""
        named = tuple(m for m in (self.left, self.right, self.base) if m)
        return named if self.compared or self.kind == "recall" else ()


@dataclass(frozen=True, slots=True)
class Claim:
    """What a paper says.

    Attributes:
        id: C1–C16 and P1–P22 of two lists of published claims, O for our own.
        says: the claim in a sentence.
        source: paper and place.
        reported: the published numbers, for the reader.
        tier: where it can be tested: ``cpu``, ``gpu`` (one of them) or ``cluster``.
        needs: what it takes where it is not tested here.
        differs: how our test differs from the published set-up.
        evidence: ids of published numbers, their beginnings or patterns (`memory_bench.published.reported.find`).
        test: all must hold; none where it cannot be tested here.
    """

    id: str
    says: str
    source: str
    reported: str
    tier: str
    needs: str = ""
    differs: str = ""
    evidence: tuple[str, ...] = ()
    test: tuple[Test, ...] = ()


@dataclass(frozen=True, slots=True)
class Setup:
    """How the rows are made: backbone, budget, seeds, options and limits of tasks."""

    backbone: str
    budget: str
    seeds: int
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Claims:
    """All claims, in order, and the set-up of their tests."""

    setup: Setup
    claims: tuple[Claim, ...]

    def select(self, names: Sequence[str]) -> tuple[Claim, ...]:
        """The named claims; all that are tested on a CPU where none is named.

        Raises:
            UserError: no such claim.
        """
        known = {claim.id: claim for claim in self.claims}
        for name in names:
            if name not in known:
                raise unknown("claim", name, known)
        return tuple(known[n] for n in dict.fromkeys(names)) if names else self.claims


def claims_file() -> Path:
    """The file of the claims that the product carries."""
    return results_folder() / "claims" / "claims.toml"


def read_claims(path: Path) -> Claims:
    """The claims in a TOML file: a table ``setup`` and tables ``claim`` with tables ``claim.test``.

    Raises:
        UserError: the file cannot be read, or has a name or a value that means nothing, or of another type.
    """
    try:
        data = toml_table(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read the claims in {path}: {error}.") from error
    whole = Place(str(path))
    for name in ("setup", "claim"):
        if name not in data:
            raise whole.fault(f"there is no table '{name}'")
    claims = [
        _claim(c, Place(str(path), f"claim {number}")) for number, c in enumerate(_tables(data, "claim", whole), 1)
    ]
    once((Place.of(path, "claim", claim.id), claim.id) for claim in claims)
    return Claims(as_dataclass(Setup, data["setup"], Place(str(path), "setup")), tuple(claims))


def _tables(data: Mapping[str, Any], name: str, place: Place) -> list[Any]:
    found = data.get(name, [])
    if not isinstance(found, list):
        raise place.fault(f"'{name}' must be tables [[…]], not {shown(found)}")
    return found


def _claim(values: Any, place: Place) -> Claim:
    tests = _tables(values, "test", place) if isinstance(values, dict) else []
    made = replace(
        as_dataclass(Claim, {**values, "test": []} if tests else values, place),
        test=tuple(as_dataclass(Test, test, place) for test in tests),
    )
    for test in made.test:
        if test.kind not in COMPARED + COUNTED:
            raise unknown("kind of test", test.kind, COMPARED + COUNTED)
    if made.tier not in TIERS:
        raise unknown("tier", made.tier, TIERS)
    return made
