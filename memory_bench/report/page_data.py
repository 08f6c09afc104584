"""What the script of a page reads: every number with what it rests on, as plain data.

The same boards, rows and estimates that Markdown, CSV and LaTeX are made of; nothing is computed here that they have
not. Numbers have six digits, what many rows share (versions, machines) is said once.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from memory_bench.axes import NAMES, UNSAID
from memory_bench.budget import amount
from memory_bench.cell import digest, limits
from memory_bench.record import Record
from memory_bench.report import words
from memory_bench.report.beside import Beside
from memory_bench.report.board import Board
from memory_bench.report.commands import row_command
from memory_bench.report.costs import cost
from memory_bench.report.documents import extremes
from memory_bench.report.fronts import front
from memory_bench.report.limits import Struck, struck
from memory_bench.report.looks import looks
from memory_bench.report.plots import stem
from memory_bench.report.rows import Row, plain
from memory_bench.report.tables import FINE, PERCENT, notes, short
from memory_bench.report.trade_offs import PRICES, prices

POINTS = 40
"""Of a training's curve: what a picture shows."""


class Source(Protocol):
    """What is needed of a report."""

    @property
    def boards(self) -> Sequence[Board]:
        """In the order they are shown."""

    @property
    def run(self) -> Mapping[str, Any]:
        """``run.json``."""

    @property
    def certificates(self) -> Mapping[str, str]:
        """Model to parity."""

    def beside(self, board: Board) -> Beside:
        """Published numbers beside a board's."""


def row_id(board: Board, row: Row) -> str:
    """The anchor of a row: it follows from what was asked and the row's label, so links stay good."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", row.label).strip("-")
    return f"{stem(board)}--{name}" + ("" if name == row.label else f"-{digest(row.label)[:4]}")


def content(report: Source) -> dict[str, Any]:
    """Everything, for JSON."""
    facts: dict[str, int] = {}  # what was said before, to its place
    labels = sorted({row.label for board in report.boards for row in board.everything})
    rows, boards = [], []
    for place, board in enumerate(report.boards):
        look = looks(board, labels)
        order = {row.label: i for i, row in enumerate(board.everything)}
        told = _reported(report.beside(board))
        for row in board.everything:
            own = look[row.label]
            hollow = own.fill == "white"
            rows.append({"id": row_id(board, row), "board": place, "look": [own.color, own.marker, hollow],
                         **_row(report, board, row, facts), "reported": told.get(row.label, [])})  # fmt: skip
        boards.append(_board(board, order))
    return {"boards": boards, "rows": rows, "facts": [json.loads(text) for text in facts]}


def _board(board: Board, order: Mapping[str, int]) -> dict[str, Any]:
    pairs = [[order[p.a], order[p.b], short_number(p.value), short_number(p.low), short_number(p.high),
              short_number(p.adjusted), int(p.told_apart), p.n] for p in board.pairs]  # fmt: skip
    fronts = {}
    for kind in PRICES:
        if costs := prices(board, kind):
            found = front(board, costs)
            fronts[kind] = {"steps": [order[label] for label in found.steps],
                            "dominated": {str(order[a]): order[b] for a, b in found.dominated.items()}}  # fmt: skip
    return {
        "title": words.title(board), "task": board.task, "metric": board.metric, "name": short(board.metric),
        "percent": board.metric in PERCENT, "digits": 3 if board.metric in FINE else 2,
        "higher": board.higher_is_better, "window": board.window.label if board.window else None,
        "levels": {name: short_number(value) for name, value in board.levels.items()}, "pairs": pairs,
        "fronts": fronts, "prices": {kind: price.axis for kind, price in PRICES.items() if kind in fronts},
        "budget": {name: amount(name, value) if isinstance(value, int | float) else value
                   for name, value in sorted(limits(board.cell.training).items())
                   if name not in ("name", "seeds", "tasks") and value is not None and not isinstance(value, bool)},
    }  # fmt: skip


def _row(report: Source, board: Board, row: Row, facts: dict[str, int]) -> dict[str, Any]:
    own, spent, cell = row.headline, cost(row), row.records[0].cell
    training = cell.training
    asked = {
        "model": training.model.name, "version": training.model.version, "options": training.model.config,
        "changed after training": cell.scored_with, "package": training.model.package, "code": training.model.code,
        "recipe": training.recipe.name, "recipe options": training.recipe.config,
        "training data": f"{training.corpus.name}, content {training.corpus.revision or 'without a hash'}",
        "task": board.task, "task options": {k: v for k, v in cell.task.config.items() if k != "data"},
        "task data": f"{board.data}, content {cell.task.revision or 'without a hash'}",
        "backbone": f"{board.backbone}, weights {training.backbone.revision or 'without a hash'}",
        "backbone options": training.backbone.config,
    }  # fmt: skip
    paid = {kind: short_number(price.of(spent)) for kind, price in PRICES.items()}
    return {
        "label": row.label, "model": row.model, "role": row.role, "status": row.status, "ahead": row.look_ahead,
        "pretrained": row.pretrained, "parity": report.certificates.get(row.model, "none"),
        "value": None if own is None else short_number(own.value), "low": own and short_number(own.low),
        "high": own and short_number(own.high), "n": 0 if own is None else own.n,
        "spread": short_number(row.seed_spread), "notes": notes(row, board),
        "limits": [_ended(each) for each in struck(row)],
        "numbers": [[e.metric, row.marked(e.slice), short_number(e.value), short_number(e.low), short_number(e.high),
                     e.n, e.unit, e.note] for e in row.estimates],
        "prices": {kind: price for kind, price in paid.items() if price is not None},
        "axes": {name: row.on_axis(name) for name in NAMES if row.on_axis(name) != UNSAID},
        "asked": {name: value for name, value in asked.items() if value not in ("", {}, None)},
        "command": row_command(report.run, board, row),
        "seeds": [_seed(record, row.metric, facts) for record in row.records],
        "documents": _documents(row, higher=board.higher_is_better),
    }  # fmt: skip


def _seed(record: Record, metric: str, facts: dict[str, int]) -> dict[str, Any]:
    """One cell: what it gave, where it was run, where its log and samples are."""
    told = record.provenance
    where = {name: told.get(name) for name in ("device", "processor", "vector_unit", "threads", "platform")}
    made = {**{name: value for name, value in where.items() if value}, **dict(told.get("versions") or {})}
    made["commit"] = f"{told['commit']}{' with changes' if told.get('dirty') else ''}" if told.get("commit") else None
    text = json.dumps(made, sort_keys=True, ensure_ascii=False)
    value = next((m.value for m in record.metrics if m.metric == metric and not plain(m.slice)), None)
    used = record.usage
    return {
        "seed": record.cell.training.seed, "key": record.key, "status": record.status, "detail": record.detail,
        "value": short_number(value), "made": facts.setdefault(text, len(facts)),
        "started": told.get("started"), "finished": told.get("finished"),
        "ended": used.training_ended_by, "steps": used.train_steps,
        "spent": [short_number(s) for s in (used.train_seconds, used.eval_seconds, used.control_seconds)],
        "curve": thinned(told.get("curve") or []),
    }  # fmt: skip


def thinned(curve: Sequence[Sequence[float | None]], points: int = POINTS) -> list[list[float | None]]:
    """(tokens, loss) of at most so many stretches of a training, each the mean over its steps, at its last token."""
    known = [(float(at), float(loss)) for at, loss in curve if at is not None and loss is not None]
    known = [(at, loss) for at, loss in known if math.isfinite(loss)]
    size = max(1, -(-len(known) // points))
    parts = [known[i : i + size] for i in range(0, len(known), size)]
    return [[short_number(part[-1][0]), short_number(sum(loss for _, loss in part) / len(part))] for part in parts]


def _ended(by: Struck) -> str:
    """``device_bytes 200 MB: 210 MB at segment 7/8``, as far as the record says it."""
    said = " at ".join(part for part in (by.used, by.where) if part)
    return f"{by.name}: {said}" if said else by.name


def _documents(row: Row, *, higher: bool) -> dict[str, Any]:
    found = extremes(row, higher_is_better=higher)
    for end in ("best", "worst"):
        if end in found:
            found[end] = [[name, short_number(value), count] for name, value, count in found[end]]
    return found


def _reported(found: Beside) -> dict[str, list[list[str]]]:
    """Label to the lines of the table of published numbers, without the label."""
    result: dict[str, list[list[str]]] = {}
    for label, *line in found.table().rows:
        result.setdefault(label, []).append(line)
    return result


def short_number(value: float | None) -> float | None:
    """Six digits; None for what is no number."""
    if value is None or not math.isfinite(value):
        return None
    short_ = float(f"{value:.6g}")
    return int(short_) if short_ == int(short_) and abs(short_) < 1e15 else short_


def as_json(value: Any) -> str:
    """JSON that stands inside a page: no text of it is markup."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in ("<", ">", "&", "\u2028", "\u2029"):
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
