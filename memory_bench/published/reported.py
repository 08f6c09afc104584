"""Published numbers, as data: what papers and repositories report, where it stands, and how surely it was read.

The registry is the folder ``results/reported``: one table a paper, and ``registry.toml`` with the sources and cautions
that rows name. A row is a number with its setting; what a setting leaves empty is not said by the source. Nothing here
decides whether a run may be compared with a row: that is `memory_bench.report.beside`.
"""

import csv
import io
import math
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

from memory_bench.errors import UserError
from memory_bench.files.inputs import Place, text_of
from memory_bench.shipped import results_folder

CONFIDENCES = ("verified", "secondary", "from memory")
READINGS = ("printed", "plot")


@dataclass(frozen=True, slots=True)
class Reported:
    """One published number.

    Attributes:
        id: readable and stable: paper, place, model and backbone, data, metric, length, and what else tells it apart.
        source: the document; of ``registry.toml``.
        where: in the document: a table, a figure, a section.
        model, family: as the source calls it; the model of the benchmark it belongs to, empty for none.
        backbone: that it works on; empty where it is the model itself or is not said.
        task: of the benchmark, on whose data it was measured; empty for none.
        data, split: as the source names them.
        metric, value, unit, better: what was measured; None where it ran out of memory. `better`: higher or lower.
        shown: the value with the digits of the source.
        read: printed, or taken from a plot; then `error` is how far it may be off.
        error, sd: reading error; standard deviation that the source gives; None where there is none.
        context: how much text comes before the answer or is scored: ``30k tokens``, ``5 steps``, ``documents``.
        segment: tokens a step reads.
        memory: of models of the benchmark as their options (``cache=300 sensory_tokens=32``), otherwise in words.
        tokenizer: of a perplexity.
        trained_on, train_tokens, training: corpus; tokens of it, where steps, batch and length are given; in words.
        look_ahead: whether predictions may depend on the text they predict; None where it is not known.
        confidence: ``verified`` (read in the document), ``secondary`` (quoted or read by others), ``from memory``.
        cautions, note: what is wrong or doubtful about the number; what else belongs to it.
        void: it does not measure what it is called, so nothing may be compared with it.
    """

    id: str
    source: str
    where: str
    model: str
    family: str
    backbone: str
    task: str
    data: str
    split: str
    metric: str
    value: float | None
    shown: str
    unit: str
    better: str
    read: str
    error: float | None
    sd: float | None
    context: str
    segment: int | None
    memory: str
    tokenizer: str
    trained_on: str
    train_tokens: int | None
    training: str
    look_ahead: bool | None
    confidence: str
    cautions: tuple[str, ...]
    note: str
    void: bool = False

    @property
    def caution(self) -> str:
        """All cautions as one text."""
        return " ".join(self.cautions)

    @property
    def setting(self) -> str:
        """What the number depends on, in a line."""
        parts = (
            f"on {self.backbone}" if self.backbone else "",
            self.split,
            self.context,
            f"segment {self.segment:,}" if self.segment else "",
            "" if self.memory == "none" else self.memory,
            self.training,
            self.note,
        )
        return ", ".join(part for part in parts if part)

    @property
    def precision(self) -> float:
        """How far the source's own number may lie from the one here: half of its last digit, or the reading error."""
        digits = re.fullmatch(r"-?\d+\.?(\d*)", self.shown)
        rounding = 0.5 * 10 ** -len(digits.group(1)) if digits else 0.0
        return max(rounding, self.error or 0.0)

    def options(self) -> dict[str, str]:
        """The memory as options of the benchmark's model; empty where it is said in words."""
        pairs = [part.partition("=") for part in self.memory.split()]
        return {name: value for name, _, value in pairs} if all(equal for _, equal, _ in pairs) else {}


@lru_cache(maxsize=1)
def load() -> tuple[Reported, ...]:
    """The registry, paper by paper; read once a process.

    Raises:
        UserError: the installation has none.
    """
    folder = results_folder() / "reported"
    if not (folder / "registry.toml").is_file():
        raise UserError(f"There are no published numbers in {folder}: the installation is incomplete.")
    try:
        names = tomllib.loads((folder / "registry.toml").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"Cannot read {folder / 'registry.toml'}: {error}.") from error
    found: dict[str, Reported] = {}
    for path in sorted(folder.glob("*.csv")):
        for place, row in _rows(path):
            try:
                made = _reported(row, names)
            except (KeyError, ValueError) as error:
                raise place.fault(f"no published number ({type(error).__name__}: {error})") from error
            if made.id in found:
                raise place.fault(f"the id '{made.id}' is there twice")
            found[made.id] = made
    return tuple(found.values())


def _rows(path: Path) -> Iterator[tuple[Place, dict[str, str]]]:
    """The rows of a table, each with the line that it ends at."""
    reader = csv.DictReader(io.StringIO(text_of(path.read_bytes(), path), newline=""), strict=True)
    try:
        for row in reader:
            place = Place(str(path), f"line {reader.line_num}")
            if None in row or None in row.values():
                raise place.fault(f"it has not the {len(reader.fieldnames or ())} columns of the first line")
            yield place, row
    except csv.Error as error:
        raise Place(str(path), f"line {reader.line_num}").fault(str(error)) from error


def _reported(row: dict[str, str], names: dict[str, Any]) -> Reported:
    plain: dict[str, Any] = dict(row)
    columns = {f.name for f in fields(Reported)} - {"shown", "cautions", "void"} | {"caution"}
    if strange := row.keys() ^ columns:
        raise ValueError(f"the columns differ by {', '.join(sorted(strange))}")
    if row["confidence"] not in CONFIDENCES or row["read"] not in READINGS:
        raise ValueError(f"{row['confidence']}, {row['read']}")
    plain["shown"] = row["value"]
    for name in ("value", "error", "sd"):
        plain[name] = float(row[name]) if row[name] else None
        if not math.isfinite(plain[name] or 0.0):
            raise ValueError(f"{name} = {row[name]} is not finite")
    for name in ("segment", "train_tokens"):
        plain[name] = int(row[name]) if row[name] else None
    plain["look_ahead"] = {"yes": True, "no": False, "": None}[row["look_ahead"]]
    plain["source"] = names["sources"][row["source"]]
    cautions = plain.pop("caution").split()
    plain["cautions"] = tuple(names["cautions"][name] for name in cautions)
    plain["void"] = any(name in names["void"] for name in cautions)
    return Reported(**plain)


def find(pattern: str) -> tuple[Reported, ...]:
    """The rows whose id is `pattern`, begins with it at a dot, or matches it as a glob (``hmt.table-4.*``).

    Raises:
        UserError: there is none.
    """
    rows = load()
    named = tuple(r for r in rows if r.id == pattern or r.id.startswith(f"{pattern}."))
    found = named or tuple(r for r in rows if fnmatchcase(r.id, pattern))
    if not found:
        head = pattern.split(".")[0].strip("*")
        near = sorted({r.id.split(".")[0] for r in rows})
        hint = f"`memory-bench list reported --grep {head}`" if head in near else f"the registry has {', '.join(near)}"
        raise UserError(f"No published number is called '{pattern}': {hint}.")
    return found


def listed() -> list[dict[str, Any]]:
    """The rows of ``memory-bench list reported``, as plain data."""
    return [
        {
            "id": r.id,
            "model": r.model,
            "backbone": r.backbone,
            "task": r.task,
            "data": r.data,
            "metric": r.metric,
            "value": r.value,
            "shown": r.shown,
            "unit": r.unit,
            "setting": r.setting,
            "source": f"{r.source}; {r.where}",
            "confidence": r.confidence,
            "read": how_read(r),
            "caution": r.caution,
        }
        for r in load()
    ]


def how_read(row: Reported) -> str:
    """``printed``, or ``plot ±0.02``."""
    return row.read if row.error is None else f"{row.read} ±{row.error:g}"


def text(entries: list[dict[str, Any]]) -> str:
    """One line per entry of `listed`: the number, what it depends on, where it stands, and what to beware of."""
    lines = []
    for e in entries:
        value = f"{e['shown']} {e['unit']}" if e["shown"] else "out of memory"
        sure = e["confidence"] if e["read"] == "printed" else f"{e['confidence']}, {e['read']}"
        caution = f"  Beware: {e['caution']}" if e["caution"] else ""
        lines.append(f"{e['id']}  {value}  {e['model']}: {e['setting'] or '-'}  [{e['source']}; {sure}]{caution}")
    return "\n".join(lines)
