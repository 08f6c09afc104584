"""Reference files of the regression gate: one JSON line per `memory_bench.gate.lines.Line`, sorted.

They are written from clean working trees only and hold at least three seeds, for a golden number that nobody can make
again, or whose spread nobody knows, is no reference.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from memory_bench.errors import UserError
from memory_bench.files.artefacts import CHECKSUM, checksum_of, write_atomically
from memory_bench.files.inputs import Place, as_dataclass, lines_of, parse
from memory_bench.gate.lines import Line, Setting
from memory_bench.record import Record, changed_files

SCHEMA = 1
SEEDS = 3


def to_json(line: Line) -> dict[str, Any]:
    """The line as plain data: mean, sigma and number of seeds beside the values they come from."""
    plain = {
        "schema": SCHEMA,
        "task": line.task,
        "backbone": line.backbone,
        "budget": line.budget,
        "model": line.model,
        "metric": line.metric,
        "slice": line.slice,
        "mean": _rounded(line.mean),
        "sigma": _rounded(line.sigma),
        "seeds": len(line.values),
        "tolerance": _rounded(line.tolerance),
        "higher_is_better": line.higher_is_better,
        "values": {str(seed): _rounded(value) for seed, value in line.values.items()},
        **asdict(line.setting),
        "version": line.version,
        "commit": line.commit,
        "versions": dict(line.versions),
    }
    return {**plain, CHECKSUM: checksum_of(plain)}


@dataclass(frozen=True, slots=True)
class Summary:
    """What a line says of its own values."""

    mean: float
    sigma: float
    seeds: int


def from_json(data: object, place: Place) -> Line:
    """The line that `to_json` wrote.

    Raises:
        UserError: another schema, fields missing, unknown or of another type, a mean or sigma that are not those of
            the values, or a checksum that is not the line's.
    """
    if not isinstance(data, dict):
        raise place.fault("it is no table")
    if data.get("schema") != SCHEMA:
        raise place.fault(f"it has schema {data.get('schema')}, this version reads {SCHEMA}")
    given = {name: value for name, value in data.items() if name != CHECKSUM}
    parts = {cls: {f.name: given[f.name] for f in fields(cls) if f.name in given} for cls in (Summary, Setting)}
    rest = {name: value for name, value in given.items() if not any(name in part for part in parts.values())}
    del rest["schema"]
    said = as_dataclass(Summary, parts[Summary], place)
    setting = as_dataclass(Setting, parts[Setting], place)
    line = as_dataclass(Line, {**rest, "setting": asdict(setting)}, place)
    same = said.seeds == len(line.values) > 0
    if not same or not _near(line.mean, said.mean, said.mean) or not _near(line.sigma, said.sigma, said.mean):
        raise place.fault("its mean and sigma are not those of its values; it was edited")
    if data.get(CHECKSUM, checksum := checksum_of(given)) != checksum:  # an older version wrote none
        raise place.fault("it is not what was written there (its checksum differs)")
    return line


def read_reference(path: Path) -> list[Line]:
    """The lines of a reference file.

    Raises:
        UserError: it cannot be read, is empty, is of another schema, or has a line twice.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read the reference {path}: {error.strerror or error}.") from error
    found: dict[tuple[str, ...], Line] = {}
    for place, text in lines_of(data, path):
        here = Place(f"Cannot use {place.spot} of the reference {path}")
        line = from_json(parse(text, here), here)
        if line.identity in found:
            raise here.fault(f"{line.metric} of {line.model} on {line.task} is there twice")
        found[line.identity] = line
    if not found:
        raise UserError(f"The reference {path} is empty.")
    return list(found.values())


def write_reference(
    path: Path, lines: Sequence[Line], records: Sequence[Record], places: Iterable[Path] = (Path(),)
) -> None:
    """Write a reference file.

    Args:
        path: of the file.
        lines: of `memory_bench.gate.lines.lines`.
        records: the lines were made of.
        places: folders whose checkouts must be clean now; the file itself does not count.

    Raises:
        UserError: the tree is or was not clean, a cell failed, there are too few seeds, or a line is there twice.
    """
    if problem := _unclean(records, path, places) or _unfit(lines, records):
        raise UserError(f"No reference was written: {problem}.")
    known = [line for line in lines if len(line.values) >= SEEDS]  # seeds that ran over budget have a status only
    write_atomically(path, "".join(json.dumps(to_json(line), ensure_ascii=False) + "\n" for line in known))


def _unclean(records: Sequence[Record], path: Path, places: Iterable[Path]) -> str:
    """Why the records cannot be made again from a commit; empty if they can."""
    dirty = [r for r in records if r.provenance.get("dirty")]
    if dirty:
        return (
            f"{len(dirty)} of {len(records)} cells (first {dirty[0].cell.title}) were measured in a working tree with "
            "uncommitted changes; commit, and run again with --force"
        )
    commits = sorted({str(r.provenance.get("commit"))[:12] for r in records})
    if len(commits) > 1:
        return f"its cells were measured at {len(commits)} commits ({', '.join(commits)}); run again with --force"
    for place in places:
        changed = [Path(name) for name in changed_files(place) if Path(name) != path.resolve()]
        if changed:
            return f"the working tree has uncommitted changes ({changed[0].name}, {len(changed)} in all); commit them"
    return ""


def _unfit(lines: Sequence[Line], records: Sequence[Record]) -> str:
    """Why the numbers are no reference; empty if they are."""
    failed = next((r for r in records if r.status == "failed"), None)
    if failed is not None:
        return f"{failed.cell.title} failed ({failed.detail})"
    few = next((line for line in lines if line.metric == "status" and len(line.values) < SEEDS), None)
    if few is not None:
        return (
            f"{few.model} on {few.task} has {len(few.values)} seed(s), and the spread between runs takes at least "
            f"{SEEDS} (--seeds {SEEDS}; better 10)"
        )
    seen: set[tuple[str, ...]] = set()
    for line in lines:
        if line.identity in seen:
            return f"{line.model} on {line.task} is there twice, with other settings; give the folder of one run"
        seen.add(line.identity)
    return "" if lines else "there is no result to compare with"


def _rounded(value: float) -> float:
    """Ten digits: more than rounding leaves alike between machines, and short to read."""
    return float(f"{value:.10g}")


def _near(found: float, said: float, scale: float) -> bool:
    return math.isclose(found, said, rel_tol=1e-6, abs_tol=1e-8 * max(1.0, abs(scale)))
