"""The table of all rows of a report: one line a row of a board, a column for everything a reader may sort or filter by.

It is a plain table, complete without a script. With one it is sorted by ``data-order`` and filtered by what the page's
data say of the row; the number in it opens the row's details.
"""

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from memory_bench.axes import NAMES
from memory_bench.report.board import Board
from memory_bench.report.costs import Cost, cost, learned
from memory_bench.report.layout import NONE
from memory_bench.report.page_data import Source, row_id, short_number
from memory_bench.report.page_sections import KINDS
from memory_bench.report.rows import OVER, Row
from memory_bench.report.tables import delta, interval, notes, number, scaled, short, size, state_text
from memory_bench.statistics.halflife import half_life_of, half_life_text

Cell = tuple[str, float | str | None]
"""What is shown, and what is sorted by (None: stands last)."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its name, whether it is shown at first, whether it holds numbers."""

    name: str
    shown: bool = True
    numeric: bool = True


COLUMNS = (
    Column("model", numeric=False), Column("task", numeric=False), Column("backbone", shown=False, numeric=False),
    Column("budget", numeric=False), Column("score [95 %]"), Column("n", shown=False), Column("seeds", shown=False),
    Column("seed sd", shown=False), Column("tie", numeric=False), Column("vs window [95 %]"),
    Column("memory wiped", shown=False), Column("lift [95 %]"), Column("half-life", shown=False),
    Column("learned?", numeric=False), Column("memory state"), Column("train FLOPs"),
    Column("train tokens", shown=False),
    Column("train s", shown=False), Column("eval FLOPs/token"), Column("s per 1,000 tokens", shown=False),
    Column("peak memory"), Column("added parameters", shown=False),
    *(Column(name, shown=False, numeric=False) for name in KINDS),
    Column("parity", shown=False, numeric=False), Column("role", shown=False, numeric=False),
    Column("status", numeric=False), Column("notes", shown=False, numeric=False),
)  # fmt: skip


def table(report: Source) -> str:
    """The table's element; columns in which nothing is said are not shown at first."""
    cells = [
        (board, row, place, _cells(board, row, report.certificates))
        for place, board in enumerate(report.boards)
        for row in board.everything
    ]
    said = [any(own[i][0] != NONE for *_, own in cells) for i in range(len(COLUMNS))]
    head = "".join(
        f'<th scope="col"{_class(column)} data-shown="{int(column.shown and full)}">{html.escape(column.name)}</th>'
        for column, full in zip(COLUMNS, said, strict=True)
    )
    body = "\n".join(_line(*each) for each in cells)
    return f'<table id="results"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>'


def _line(board: Board, row: Row, place: int, own: Sequence[Cell]) -> str:
    name = row_id(board, row)
    cells = []
    for column, (text, order) in zip(COLUMNS, own, strict=True):
        shown = html.escape(text, quote=True)
        if column.name == "model":
            shown = f'<a class="anchor" href="#{name}" aria-label="link to {shown}">#</a> <span>{shown}</span>'
        elif column.name.startswith("score"):
            crossed = ' class="over"' if row.status == OVER else ""
            shown = f'<button type="button" data-row="{name}"{crossed}>{shown}</button>'
        sort = "" if not column.numeric else f' data-order="{"" if order is None else order}"'
        cells.append(f"<td{_class(column, text)}{sort}>{shown}</td>")
    return f'<tr id="{name}" data-board="{place}">{"".join(cells)}</tr>'


def _class(column: Column, text: str = "") -> str:
    kinds = [*([] if column.numeric else ["text"]), *(["none"] if text == NONE else [])]
    return f' class="{" ".join(kinds)}"' if kinds else ""


def _cells(board: Board, row: Row, certificates: Mapping[str, str]) -> Sequence[Cell]:
    metric, own, spent = board.metric, row.headline, cost(row)
    gap, gain, wiped = board.against_window(row), row.find("memory_lift"), row.find(metric, "control:wiped")
    life = half_life_of(row.estimates)
    status = row.status.replace("_", " ")
    score = status if own is None else f"{interval(own.value, own.low, own.high, metric)} {short(metric)}"
    return (
        (row.label, None), (board.data if board.data.startswith(board.task) else f"{board.task}: {board.data}", None),
        (board.backbone_shown, None), (board.budget_shown, None),
        (score, short_number(own.value) if own else None),
        _count(own.n if own else None), (" ".join(map(str, row.seeds)), len(row.seeds)),
        _plain(row.seed_spread, lambda x: number(x, metric, spread=True)),
        (board.letters.get(row.label, NONE), None), (delta(gap, metric), short_number(gap.value) if gap else None),
        _plain(wiped.value if wiped else None, lambda x: number(x, metric)),
        (NONE, None) if gain is None else (interval(gain.value, gain.low, gain.high, "memory_lift"), gain.value),
        (NONE, None) if life is None else (half_life_text(life), short_number(life.value)),
        (learned(row) or NONE, None),
        (NONE if spent.state_bytes is None else state_text(spent), spent.state_bytes),
        _plain(spent.train_flops, scaled), _count(spent.train_tokens), _plain(spent.train_seconds, "{:,.0f}".format),
        _plain(spent.eval_flops_per_token, scaled), _plain(_seconds(spent), "{:,.3g}".format),
        _plain(spent.peak_device_bytes, size), _count(spent.added_parameters),
        *((row.on_axis(name), None) for name in NAMES),
        (certificates.get(row.model, "none"), None), (row.role, None), (status, None),
        (notes(row, board) or NONE, None),
    )  # fmt: skip


def _seconds(spent: Cost) -> float | None:
    return 1000 / spent.eval_tokens_per_second if spent.eval_tokens_per_second else None


def _plain(value: float | None, said: Callable[[float], str]) -> Cell:
    return (NONE, None) if value is None else (said(value), short_number(value))


def _count(value: int | None) -> Cell:
    return (NONE, None) if value is None else (f"{value:,}", value)
