"""The part of a page that needs no script: every board with its sentences and tables, as Markdown has them."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from memory_bench.axes import NAMES
from memory_bench.report import cuts, distances, planned, sweeps, words
from memory_bench.report.beside import TITLE, Beside
from memory_bench.report.board import Board
from memory_bench.report.layout import NONE, Table
from memory_bench.report.tables import held, look_ahead, pretrained, quality, spend

KINDS = tuple(f"memory: {name.replace('_', ' ')}" for name in NAMES)
TEXT = ("checkpoint", "tie", "learned?", "notes", "parity", "reported for", "verdict", "where", "plan", *KINDS)


class Shown(Protocol):
    """What the sections need of a report."""

    @property
    def boards(self) -> Sequence[Board]:
        """In the order they are shown."""

    @property
    def certificates(self) -> Mapping[str, str]:
        """Model to parity."""

    @property
    def axis(self) -> str:
        """By which rows are put together; empty: by their numbers alone."""

    @property
    def sweeps(self) -> "Sequence[sweeps.Sweep]":
        """Boards that differ in one limit of their budgets."""

    def sections(self) -> list[tuple[str, list[Board], str]]:
        """(heading, boards, sentence where there is none)."""

    def beside(self, board: Board) -> Beside:
        """Published numbers beside a board's."""

    def legend(self) -> list[tuple[str, str]]:
        """What the columns mean."""


def boards(report: Shown) -> list[str]:
    """Every board under the heading of what is equal in it, then the sweeps."""
    places = {id(board): i for i, board in enumerate(report.boards)}
    out = []
    for heading, found, sentence in report.sections():
        out.append(f"<h2>{text(heading)}</h2>")
        out += [f"<p>{code(sentence)}</p>"] if sentence else []
        for board in found:
            out += _board(board, places[id(board)], report.certificates, report.axis)
            out += _beside(report.beside(board))
    for sweep in report.sweeps:
        out += [f"<h2>{sweeps.TITLE}</h2><p>{text(sweep.heading)}. Budgets are not paired.</p>", _table(sweep.table())]
    return out


def legend(report: Shown) -> list[str]:
    """How to read the columns."""
    if not report.boards:
        return []
    terms = [f"<dt>{text(term)}</dt><dd>{code(meaning)}.</dd>" for term, meaning in report.legend()]
    note = words.percent_note(report.boards)
    return [
        f'<h2 id="legend">How to read this</h2><dl>{"".join(terms)}</dl>',
        *([f"<p>{text(note)}</p>"] if note else []),
    ]


def _board(board: Board, place: int, certificates: Mapping[str, str], axis: str) -> list[str]:
    said = " ".join(s for s in (words.direction(board), words.levels(board), words.winners(board)) if s)
    out = [
        f'<h3 id="board-{place}">{text(words.title(board))}</h3>',
        f'<p class="scope">{text(words.scope(board))}</p>',
        *([f"<p>{text(equal)}</p>"] if (equal := words.equal(board)) else []),
        *([f"<p>{text(said)}</p>"] if said else []),
        *(f'<p class="warning">{text(warning)}</p>' for warning in words.known_already(board)),
        _table(quality(board, axis)),
    ]
    if far := distances.table(board):
        said = distances.other_order(board)
        out += [f"<p>{text(distances.heading(board))}</p>", _table(far), *([f"<p>{text(said)}</p>"] if said else [])]
    for heading, cut in cuts.tables(board):
        out += [f"<p>{text(heading)}</p>", _table(cut)]
    if board.ahead:
        out += ["<p>Look-ahead: these predictions could see text they predict, so they are not ranked.</p>"]
        out += [_table(look_ahead(board))]
    if board.pretrained:
        out += [f"<p>{text(words.PRETRAINED)}</p>", _table(pretrained(board))]
    more = held(board)
    memory = f"<p>{words.HELD}</p>{_table(more)}" if len(more.columns) > 1 else ""
    out += [_folded("Cost", _table(spend(board, certificates)) + memory)]
    if len((kinds := _kinds(board)).columns) > 1:
        out.append(_folded("What kind of memory", _table(kinds)))
    if plan := planned.table(board):
        out.append(_folded(planned.TITLE, _table(plan)))
    return out


def _kinds(board: Board) -> Table:
    """Where the memories of a board stand on every axis."""
    lines = [(row.label, *(row.on_axis(name) for name in NAMES)) for row in board.everything]
    if not any(record.provenance.get("axes") for row in board.everything for record in row.records):
        return Table(("model",), ())
    return Table(("model", *KINDS), tuple(lines))


def _beside(found: Beside) -> list[str]:
    """Published numbers, folded away like the costs; why there are none is said openly."""
    if found.refused:
        return [f"<p>{TITLE}: {text(found.refused)}</p>"]
    more = f"<p>{code(found.more)}</p>" if found.more else ""
    opened = any(pair.verdict.kind != "not comparable" for pair in found.pairs)
    return [_folded(TITLE, _table(found.table()) + more, opened=opened)] if found.pairs else []


def _folded(title: str, content: str, *, opened: bool = False) -> str:
    return f"<details{' open' if opened else ''}><summary>{title}</summary>{content}</details>"


def _table(table: Table) -> str:
    def cell(tag: str, column: str, said: str) -> str:
        kinds = [kind for kind, holds in (("text", column in TEXT), ("none", said == NONE)) if holds]
        mark = f' class="{" ".join(kinds)}"' if kinds else ""
        return f"<{tag}{mark}>{text(said)}</{tag}>"

    head = "".join(cell("th", column, column) for column in table.columns)
    rows = ["".join(cell("td", c, t) for c, t in zip(table.columns, row, strict=True)) for row in table.rows]
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def text(value: str) -> str:
    """A text that no part of is markup."""
    return html.escape(value, quote=True)


def code(value: str) -> str:
    """A sentence of ours, whose parts in backticks are code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text(value))
