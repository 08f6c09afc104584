"""What files of ours must hold, as types: data that are valid JSON and something else are refused in one place.

pydantic does the checking, strictly (a text is no number, a truth value is no count); it is imported when it is needed.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal

from memory_bench.files.artefacts import Damaged
from memory_bench.files.plain import parts

YEARS = (1970, 9998)  # that a clock can show, in every zone


@dataclass(frozen=True, slots=True)
class RequestShape:
    """What was asked for, in ``run.json``."""

    budget: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SkippedShape:
    """A pair that was left out, in ``run.json``."""

    model: str
    task: str
    reason: str

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise ValueError("it names no model")


@dataclass(frozen=True, slots=True)
class SourceShape:
    """Where data came from, in ``run.json``."""

    label: str
    revision: str = ""
    origin: str = ""


@dataclass(frozen=True, slots=True)
class GridShape:
    """The grid in ``run.json``: what readers look at; the rest is what was asked, as it was."""

    request: RequestShape = field(default_factory=RequestShape)
    cells: list[str] = field(default_factory=list)
    roles: dict[str, tuple[Literal["asked", "control"], str]] = field(default_factory=dict)
    skipped: list[SkippedShape] = field(default_factory=list)
    data: dict[str, SourceShape] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunShape:
    """``run.json``."""

    grid: GridShape = field(default_factory=GridShape)
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LearnedShape:
    """A record's verdict on its training."""

    verdict: str
    lift: float | None
    low: float | None
    high: float | None
    against: str


@dataclass(frozen=True, slots=True)
class GrowthShape:
    """How a state grew: by so many bytes a token, or each time the tokens double; tokens and bytes of one row."""

    kind: Literal["constant", "logarithmic", "linear"]
    bytes_per_token: float | None
    bytes_per_doubling: float | None
    points: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class PlanShape:
    """What a cell was planned to spend, before it ran."""

    peak_bytes: int
    seconds: float
    how: str

    def __post_init__(self) -> None:
        if self.peak_bytes < 0 or not 0 <= self.seconds < math.inf:
            raise ValueError("a plan has no negative bytes or seconds")


@dataclass(frozen=True, slots=True)
class HappenedShape:
    """What readers look at of a record's provenance."""

    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    dirty: bool | None = None
    device: str = ""
    threads: int = 1
    started: str = ""
    finished: str = ""
    look_ahead: int | None = None
    segment: int | None = None
    axes: dict[str, str | bool] | None = None
    curve: list[tuple[int, float | None]] | None = None
    expected_retention: list[tuple[float, float]] | None = None
    plan: PlanShape | None = None
    state_growth: GrowthShape | None = None

    def __post_init__(self) -> None:
        for name in ("started", "finished"):
            _check_time(name, getattr(self, name))
        at_least("provenance", {"look_ahead": self.look_ahead, "segment": self.segment, "threads": self.threads})
        at_least("provenance", {"curve": min((tokens for tokens, _ in self.curve or ()), default=0)})


def at_least(where: str, counts: Mapping[str, float | None], low: int = 0) -> None:
    """Refuse counts below `low`; None and NaN are none.

    Raises:
        ValueError: naming the first.
    """
    for name, count in counts.items():
        if count is not None and count < low:
            raise ValueError(f"{where}.{name} is {count}, which is less than {low}")


def _check_time(name: str, text: str) -> None:
    """Times are ISO 8601, as `memory_bench.record.now` writes them."""
    if not text:
        return
    try:
        year = datetime.fromisoformat(text).year
    except ValueError:
        raise ValueError(f"{name} is no time") from None
    if not YEARS[0] <= year <= YEARS[1]:
        raise ValueError(f"{name} is in the year {year}")


@dataclass(frozen=True, slots=True)
class CertificateShape:
    """What readers look at of a certificate."""

    agree: int
    cases: int
    max_abs: float


@dataclass(frozen=True, slots=True)
class CertificatesShape:
    """``certificates.json``."""

    models: dict[str, CertificateShape]
    measured: dict[str, dict[str, Any]]


def conform(kind: Any, plain: Any) -> None:
    """Refuse JSON data, or a dataclass of them, that are not of a type; entries that the type does not name are free.

    Raises:
        Damaged: naming the first entry that is wrong.
    """
    from pydantic import ValidationError

    try:
        _adapter(kind).validate_json(json.dumps(plain, default=parts), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise Damaged(f"{'.'.join(map(str, first['loc'])) or 'it'} is wrong ({first['msg']})") from error


@lru_cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
