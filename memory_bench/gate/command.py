"""`memory-bench check`: from the folder of a run to a verdict, or to a reference file."""

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from memory_bench.errors import UserError
from memory_bench.files.artefacts import write_atomically
from memory_bench.files.plain import toml_table
from memory_bench.gate import report as gate_report
from memory_bench.gate.judge import compare
from memory_bench.gate.lines import TOLERANCES, Line, Tolerance, lines
from memory_bench.gate.reference import read_reference, write_reference
from memory_bench.record import Record
from memory_bench.report.grouping import grouped
from memory_bench.running.console import error, show
from memory_bench.shipped import parity_text, read_certificates
from memory_bench.store import Store


def check(
    out: Path,
    *,
    against: Path | None,
    write: Path | None,
    tolerances: Sequence[str] = (),
    markdown: Path | None = None,
    junit: Path | None = None,
    as_json: bool = False,
) -> int:
    """Compare a run with a reference, or make one.

    Args:
        out: folder of the run.
        against: the reference file.
        write: make a reference file instead.
        tolerances: ``metric=number``, or TOML files of such lines.
        markdown: file for a table to be written to.
        junit: file for JUnit XML.
        as_json: print JSON.

    Returns:
        0 the gate holds (or the reference was written), 1 something is worse or missing.

    Raises:
        UserError: the two cannot be compared, or no reference can be made.
    """
    if (against is None) == (write is None):
        raise UserError("Give either --against FILE (compare with a reference) or --write FILE (make one).")
    declared = parse_tolerances(tolerances)
    reference = read_reference(against) if against is not None else []
    store = Store.open(out)
    run, records = _measured(store, declared)
    absent = _absent(store)
    if write is not None and absent:
        raise UserError(
            f"No reference was written: {len(absent)} cells have no result ({absent[0]} …); finish the run."
        )
    if write is not None:
        write_reference(write, run, records, (Path(), Path(__file__).parent))
        show(f"{write}: {len(read_reference(write))} lines of {len(records)} cells.")
        return 0
    found = compare(run, reference, declared, absent)
    if markdown is not None:
        write_atomically(markdown, gate_report.markdown(found, str(against)))
    if junit is not None:
        write_atomically(junit, gate_report.junit(found))
    show(json.dumps(gate_report.to_json(found), indent=1) if as_json else gate_report.text(found))
    return 0 if found.holds else 1


def _absent(store: Store) -> list[str]:
    """Labels of the cells that the folder's last command asked for and that have no result.

    Raises:
        UserError: ``run.json`` is damaged.
    """
    run = store.run()
    if not run and (store.folder / "run.json").exists():
        raise UserError(f"Cannot tell which cells are missing in {store.folder}: {store.warnings[-1]}")
    grid = run.get("grid", {})
    roles = grid.get("roles", {})
    return sorted(roles.get(key, ("", key))[1] for key in grid.get("cells", []) if store.record(key) is None)


def _measured(store: Store, declared: dict[str, float]) -> tuple[list[Line], list[Record]]:
    """The lines of a run and the records they are made of."""
    rows = list(chain.from_iterable(grouped(store)))
    for warning in store.warnings:
        error(f"Warning: {warning}")
    certified = {name: parity_text(certificate) != "none" for name, certificate in read_certificates().items()}
    own = {metric: Tolerance(number, "given with the command") for metric, number in declared.items()}
    found = lines(rows, certified, {**TOLERANCES, **own})
    if not found:
        raise UserError(
            f"{store.folder} holds no result to compare; `memory-bench run --out {store.folder} …` makes some."
        )
    return found, [record for row in rows for record in row if record.status != "skipped"]


def parse_tolerances(texts: Sequence[str]) -> dict[str, float]:
    """``accuracy=0.05`` or the lines of a TOML file, the later ones winning.

    Raises:
        UserError: neither, or a tolerance that is no number from 0.
    """
    found: dict[str, object] = {}
    for text in texts:
        try:
            found |= toml_table(Path(text).read_text(encoding="utf-8") if text.endswith(".toml") else text)
        except (OSError, ValueError) as problem:
            raise UserError(
                f"--tolerance {text}: give metric=number, such as accuracy=0.05, or a TOML file of such lines."
            ) from problem
    for metric, number in found.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < float("inf"):
            raise UserError(f"--tolerance {metric}: {number!r} is no number from 0.")
    return {metric: float(str(number)) for metric, number in found.items()}
