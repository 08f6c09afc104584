"""Published claims as data: what is said, where, what would show it, and what that takes.

A claim is a list of tests that must all hold. A test names two rows of a run (`compared`), or something that is counted
on a model itself (`counted`); nothing here runs anything.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from memory_bench.errors import UserError, unknown
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
        UserError: the file cannot be read, or has a name or a value that means nothing.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        claims = tuple(
            _make(Claim, {**c, "test": tuple(_make(Test, t) for t in c.get("test", ()))}) for c in data["claim"]
        )
        return Claims(_make(Setup, data["setup"]), claims)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise UserError(f"Cannot read the claims in {path}: {error}.") from error


def _make(cls: type[Any], values: dict[str, Any]) -> Any:
    names = {f.name for f in fields(cls)}
    for name in values:
        if name not in names:
            raise unknown(f"field of a {cls.__name__.lower()}", name, names)
    made = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    if isinstance(made, Test) and made.kind not in COMPARED + COUNTED:
        raise unknown("kind of test", made.kind, COMPARED + COUNTED)
    if isinstance(made, Claim) and made.tier not in TIERS:
        raise unknown("tier", made.tier, TIERS)
    return made
