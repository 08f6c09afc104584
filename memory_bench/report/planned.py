"""What was planned for a board's cells beside what they spent, where their records have a plan."""

from typing import Any

from memory_bench.report.board import Board
from memory_bench.report.layout import NONE, Table
from memory_bench.report.rows import OVER, Row
from memory_bench.report.tables import size

TITLE = "Planned and spent"
MEANING = (
    "the largest peak and the seconds of the device (training, evaluation and controls) of one cell, as planned before "
    "the run and as measured; the ratio is spent / planned. Cells that ended before their work was done are not in it"
)
COLUMNS = (
    "model", "peak planned", "peak", "peak ratio", "seconds planned", "seconds", "seconds ratio", "plan",
)  # fmt: skip


def table(board: Board) -> Table | None:
    """One line for every row whose finished cells have a plan; None where none has."""
    lines = [line for row in board.everything if (line := _line(row))]
    return Table(COLUMNS, tuple(lines)) if lines else None


def _line(row: Row) -> tuple[str, ...] | None:
    """Peaks are the largest of the seeds, seconds their mean."""
    planned: list[tuple[dict[str, Any], int, float]] = []
    for record in row.records:
        plan, used = record.provenance.get("plan"), record.usage
        if plan and record.status == "ok":
            seconds = used.train_seconds + used.eval_seconds + used.control_seconds
            planned.append((plan, used.peak_device_bytes, seconds))
    if not planned:
        has_plan = any(record.provenance.get("plan") for record in row.records)
        ended = "over budget" if row.status == OVER else row.status
        return (row.label, *(NONE,) * 6, ended) if has_plan else None
    peaks = max(int(plan["peak_bytes"]) for plan, _, _ in planned), max(peak for _, peak, _ in planned)
    times = [sum(values) / len(planned) for values in zip(*((p["seconds"], s) for p, _, s in planned), strict=True)]
    how = ", ".join(dict.fromkeys(str(plan["how"]) for plan, _, _ in planned))
    return (
        row.label, size(peaks[0]), size(peaks[1]), _ratio(peaks[1], peaks[0]),
        f"{times[0]:,.3g}", f"{times[1]:,.3g}", _ratio(times[1], times[0]), how or NONE,
    )  # fmt: skip


def _ratio(spent: float, planned: float) -> str:
    return f"{spent / planned:.2f}" if planned > 0 else NONE
