"""Boards as tables: short columns for a person, the long form of ``leaderboard.csv`` for programs."""

import csv
import io
import math
from collections.abc import Mapping, Sequence

from memory_bench.report.board import Board
from memory_bench.report.costs import Cost, cost, growth_text, learned
from memory_bench.report.layout import NONE, Table
from memory_bench.report.rows import OVER, Row
from memory_bench.statistics import pairing
from memory_bench.statistics.halflife import half_life_text
from memory_bench.statistics.pairing import Difference

COLUMNS = (
    "model", "backbone", "task", "data", "budget", "seeds", "metric", "slice", "value", "ci_low", "ci_high", "n",
    "unit", "higher_is_better", "status", "added_parameters", "added_fraction", "train_tokens", "train_flops",
    "train_seconds", "eval_tokens", "eval_flops_per_token", "eval_tokens_per_second", "peak_device_bytes",
    "peak_host_bytes", "state_bytes", "parity", "role", "detail",
)  # fmt: skip
MEASURED = (
    "weight_bytes", "optimizer_bytes", "activation_bytes", "gradient_bytes", "state_device_bytes", "state_host_bytes",
    "state_disk_bytes", "state_read_bytes", "state_written_bytes", "state_growth", "train_joules", "eval_joules",
)  # fmt: skip
"""Columns behind `COLUMNS`, each only where some row has it: older records and other machines have less."""
SHORT = {"bits_per_byte": "bits/byte", "accuracy": "accuracy", "macro_f1": "macro F1", "ppl_token": "ppl/token",
         "ppl_word": "ppl/word", "nll": "nats/token", "half_life": "half-life"}  # fmt: skip
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""How texts begin that spreadsheets compute."""
FINE = ("bits_per_byte", "nll")
PERCENT = ("accuracy", "macro_f1", "stale_rate", "stale_chance", "alien_rate", "alien_chance",
           "primacy", "recency", "f1")  # fmt: skip


def quality(board: Board, axis: str = "") -> Table:
    """What was achieved: headline with interval, ties, seeds, difference to the window, controls.

    Args:
        board: to show.
        axis: of `memory_bench.axes.Axes`: rows that are alike on it stand together, the group of the best row first.
    """
    metric = board.metric
    extras = list(dict.fromkeys(
        e.metric for row in board.rows for e in row.estimates if not e.slice and e.metric not in (metric, "memory_lift")
    ))  # fmt: skip
    columns = ("model", f"{short(metric)} [95 %]", "tie", "seed sd", "vs window [95 %]", "memory wiped", "lift [95 %]",
               "learned?", *map(short, extras), "notes")  # fmt: skip
    columns = (*columns[:1], *([axis] if axis else []), *columns[1:])
    rows = []
    for row in _grouped(board.rows, axis):
        wiped, own = row.find(metric, "control:wiped"), row.headline
        gain = row.find("memory_lift")
        rows.append((
            row.label,
            *([row.on_axis(axis)] if axis else []),
            NONE if own is None else interval(own.value, own.low, own.high, metric),
            board.letters.get(row.label, NONE),
            NONE if row.seed_spread is None else number(row.seed_spread, metric, spread=True),
            delta(board.against_window(row), metric),
            NONE if wiped is None else number(wiped.value, metric),
            NONE if gain is None else interval(gain.value, gain.low, gain.high, "memory_lift"),
            learned(row) or NONE,
            *(_extra(row, name) for name in extras),
            notes(row, board) or NONE,
        ))  # fmt: skip
    return Table(columns, tuple(rows)).without_empty_columns()


def _grouped(rows: Sequence[Row], axis: str) -> list[Row]:
    """Rows that are alike on an axis together, in the order of their first; as they are without an axis."""
    if not axis:
        return list(rows)
    order = list(dict.fromkeys(row.on_axis(axis) for row in rows))
    return sorted(rows, key=lambda row: order.index(row.on_axis(axis)))


def _extra(row: Row, metric: str) -> str:
    """A number beside the headline; a half-life with its interval, or why there is none."""
    named = [e for e in row.estimates if e.metric == metric and not e.slice]
    if named and metric == "half_life":
        return half_life_text(named[0])
    return number(named[0].value, metric) if named else NONE


def spend(board: Board, certificates: Mapping[str, str]) -> Table:
    """What it cost, and whether the implementation is certified against the official one."""
    columns = ("model", "train tokens", "train FLOPs", "train s", "eval FLOPs/token", "eval tokens/s", "controls s",
               "peak memory", "memory state", "added parameters", "parity")  # fmt: skip
    rows = []
    for row in board.everything:
        c = cost(row)
        added = None if c.added_parameters is None else f"{c.added_parameters:,} (+{c.added_fraction:.1%})"
        rows.append((
            row.label,
            NONE if c.train_tokens is None else f"{c.train_tokens:,}",
            NONE if c.train_flops is None else scaled(c.train_flops),
            NONE if c.train_seconds is None else f"{c.train_seconds:,.0f}",
            NONE if c.eval_flops_per_token is None else scaled(c.eval_flops_per_token),
            NONE if c.eval_tokens_per_second is None else f"{c.eval_tokens_per_second:,.0f}",
            NONE if c.control_seconds is None else f"{c.control_seconds:,.0f}",
            NONE if c.peak_device_bytes is None else size(c.peak_device_bytes),
            NONE if c.state_bytes is None else state_text(c),
            added or NONE,
            certificates.get(row.model, "none"),
        ))  # fmt: skip
    return Table(columns, tuple(rows)).without_empty_columns()


def state_text(c: Cost) -> str:
    """``76.5 kB, constant``: the largest state of a row, and how it grows."""
    return size(c.state_bytes or 0) + ("" if c.growth is None else f", {growth_text(c.growth)}")


def held(board: Board) -> Table:
    """What is in memory, what a segment moves, and energy; with the models alone where nothing was measured."""
    columns = ("model", "weights", "gradients", "optimiser", "activations", "state on host", "state on disk",
               "state read", "state written", "train J", "eval J")  # fmt: skip
    rows = []
    for row in board.everything:
        c = cost(row)
        held = (c.weight_bytes, c.gradient_bytes, c.optimizer_bytes, c.activation_bytes, c.state_host_bytes or None,
                c.state_disk_bytes or None, c.state_read_bytes, c.state_written_bytes)  # fmt: skip
        joules = (NONE if j is None else f"{j:,.0f}" for j in (c.train_joules, c.eval_joules))
        rows.append((row.label, *(NONE if n is None else size(n) for n in held), *joules))
    return Table(columns, tuple(rows)).without_empty_columns()


def look_ahead(board: Board) -> Table:
    """Rows whose predictions could see the text they predict, beside the same model without it."""
    metric = board.metric
    columns = ("model", "sees ahead", f"{short(metric)} [95 %]", "causal", "ahead − causal [95 %]", "notes")
    rows = []
    for row in board.ahead:
        causal = _causal_twin(board, row)
        found = None
        if causal is not None and causal.samples is not None and row.samples is not None:
            found = pairing.difference((row.label, row.samples), (causal.label, causal.samples), metric)
        own = row.headline
        rows.append((
            row.label,
            f"{row.look_ahead} tokens",
            NONE if own is None else interval(own.value, own.low, own.high, metric),
            NONE if causal is None or causal.headline is None else number(causal.headline.value, metric),
            delta(found, metric),
            notes(row, board) or NONE,
        ))  # fmt: skip
    return Table(columns, tuple(rows)).without_empty_columns()


def pretrained(board: Board) -> Table:
    """Rows that were loaded from released weights instead of trained under the budget."""
    metric = board.metric
    columns = ("model", "checkpoint", f"{short(metric)} [95 %]", "memory wiped", "lift [95 %]", "notes")
    rows = []
    for row in board.pretrained:
        own, wiped, gain = row.headline, row.find(metric, "control:wiped"), row.find("memory_lift")
        ahead = f"sees {row.look_ahead} tokens ahead; " if row.look_ahead else ""
        rows.append((
            row.label,
            row.pretrained,
            NONE if own is None else interval(own.value, own.low, own.high, metric),
            NONE if wiped is None else number(wiped.value, metric),
            NONE if gain is None else interval(gain.value, gain.low, gain.high, "memory_lift"),
            (ahead + notes(row, board)).removesuffix("; ") or NONE,
        ))  # fmt: skip
    return Table(columns, tuple(rows)).without_empty_columns()


def _causal_twin(board: Board, row: Row) -> Row | None:
    """The ranked row of the same model whose options differ least: not, for example, an ablation of it."""

    def differing(other: Row) -> int:
        ours, theirs = (r.records[0].cell.training.model.config for r in (row, other))
        return sum(theirs.get(name) != value for name, value in ours.items())

    return min((r for r in board.rows if r.model == row.model and r.headline), key=differing, default=None)


def long_rows(boards: Sequence[Board], certificates: Mapping[str, str]) -> list[dict[str, object]]:
    """One entry per (model, task, metric, slice) with the keys `COLUMNS`; a row without numbers has one entry.

    Values are plain data, None where nothing is known. Behind them stand those of `MEASURED` that some row has.
    """
    everything = [cost(row) for board in boards for row in board.everything]
    columns = COLUMNS + tuple(name for name in MEASURED if any(getattr(c, name) is not None for c in everything))
    result = []
    for board in boards:
        better = board.higher_is_better if any(row.headline for row in board.everything) else None
        for row in board.everything:
            c = cost(row)
            spent = {name: getattr(c, name) for name in columns if hasattr(c, name)}
            told = "; ".join([*filter(None, [board.unequal.get(row.label)]), detail(row)])
            common = {
                "model": row.label, "backbone": board.backbone_shown, "task": board.task, "data": board.data,
                "budget": board.budget_shown, "seeds": len(row.records), "status": row.status, **spent,
                "parity": certificates.get(row.model, "none"), "role": row.role, "detail": told,
            }  # fmt: skip
            lines: list[dict[str, object]] = [
                {"metric": e.metric, "slice": row.marked(e.slice), "value": e.value, "ci_low": e.low,
                 "ci_high": e.high, "n": e.n, "unit": e.unit, "higher_is_better": e.higher_is_better,
                 **({"detail": f"{e.note}; {told}"} if e.note else {})}
                for e in row.estimates
            ]  # fmt: skip
            nothing: dict[str, object] = {"metric": board.metric, "slice": row.marked(""), "n": 0, "unit": "",
                                          "higher_is_better": better}  # fmt: skip
            for line in lines or [nothing]:
                result.append({name: _plain({**common, **line}.get(name)) for name in columns})
    return result


def long_form(rows: Sequence[Mapping[str, object]]) -> str:
    """``leaderboard.csv``: truth values in lower case, empty for what is not known, numbers in full.

    A text that a spreadsheet would take for a formula (a label ``=1+1``) has an apostrophe before it.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = list(rows[0]) if rows else list(COLUMNS)
    writer.writerow(columns)
    for row in rows:
        values = [row[name] for name in columns]
        writer.writerow(
            ["" if v is None else str(v).lower() if isinstance(v, bool) else _no_formula(v) for v in values]
        )
    return out.getvalue()


def _no_formula(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def notes(row: Row, board: Board) -> str:
    """What a reader must know of a row beside its numbers."""
    said = ["control"] if row.role == "control" else []
    said += row.notes
    if row.status != "ok":
        said.append(f"{row.status.replace('_', ' ')}: {'; '.join(row.reasons)}")
        said += partial(row, board)
    said += [f"{board.unequal[row.label]}: not ranked"] if row.label in board.unequal else []
    said += ["one seed"] if row.headline and len(row.seeds) < 2 and not row.pretrained else []
    said += other_threads(row, board) + other_adapters(row, board)
    processes = row.records[0].cell.training.processes  # the same for all of a row
    said += [f"trained by {processes} processes"] if processes > 1 else []
    return "; ".join(said)


def partial(row: Row, board: Board) -> list[str]:
    """A note where the number of a row over budget is of less text than the others': what of it is compared."""

    def scored(some: Row) -> float:
        frame = some.samples
        assert frame is not None
        return float(frame[(frame["control"] == "") & (frame["kind"] == "read")]["nbytes"].sum()) / len(some.seeds)

    whole = [r for r in board.rows if r.status == "ok" and r.samples is not None]
    if row.status != OVER or row.headline is None or row.samples is None or not whole:
        return []
    most = max(map(scored, whole))
    if (row.samples["kind"] == "ask").any() or not scored(row) < most:
        return []
    return [f"scored {scored(row) / most:.0%} of the text: not ranked, and compared only on documents that it finished"]


def other_threads(row: Row, board: Board) -> list[str]:
    """A note where a row was computed on the CPU with another number of threads than most of its board."""

    def threads(some: Row) -> list[int]:
        facts = [r.provenance for r in some.records if r.provenance.get("device") == "cpu"]
        return [int(f["threads"]) for f in facts if f.get("threads")]

    every = [n for other in board.everything for n in threads(other)]
    usual = max(every, key=every.count, default=0)
    odd = sorted({n for n in threads(row) if n != usual})
    return [f"computed with {', '.join(map(str, odd))} threads, others with {usual}"] if odd else []


def other_adapters(row: Row, board: Board) -> list[str]:
    """A note where a backbone was trained with other adapters than most of its board, or with none."""

    def sizes(some: Row) -> list[int]:
        counted = [r.usage for r in some.records if r.usage.train_steps and r.usage.parameters]
        return [usage.adapter_parameters for usage in counted]

    every = [n for other in board.everything for n in sizes(other)]
    usual = max(every, key=every.count, default=0)
    odd = sorted({n for n in sizes(row) if n != usual})
    own = " and ".join(f"{n:,} adapter weights" if n else "no adapters" for n in odd)
    return [f"trained with {own} on its backbone, others with {usual:,}"] if odd else []


def detail(row: Row) -> str:
    """The column of that name: reasons first, then seeds and their spread."""
    loaded = [f"pretrained: {row.pretrained} (not trained under this budget)"] if row.pretrained else []
    said = [*row.reasons, *loaded, *row.notes, f"seeds {' '.join(map(str, row.seeds))}"]
    if row.seed_spread is not None:
        said.append(f"seed sd {row.seed_spread:.6g}")
    return "; ".join(said)


def short(metric: str) -> str:
    """A metric's name as a column."""
    return SHORT.get(metric, metric.replace("_", " "))


def number(value: float, metric: str, *, spread: bool = False) -> str:
    """A value with the digits that matter for its metric; `spread` asks for one more."""
    if not math.isfinite(value):
        return NONE
    if metric in PERCENT:
        return f"{100 * value:.1f} %"
    if metric.startswith("ppl"):
        return f"{value:.3g}" if value >= 1e6 else f"{value:,.1f}" if value >= 10 else f"{value:.2f}"
    digits = (4 if spread else 3) if metric in FINE else 2
    return f"{value:.{digits}f}".replace("-", "−")


def interval(value: float, low: float | None, high: float | None, metric: str) -> str:
    """``value [low, high]``; the unit is said once."""
    if low is None or high is None:
        return number(value, metric)
    ends = ", ".join(number(x, metric).removesuffix(" %") for x in (low, high))
    return f"{number(value, metric)} [{ends}]"


def delta(found: Difference | None, metric: str) -> str:
    """A difference with its sign and interval; percentage points for shares."""
    if found is None:
        return NONE
    points = metric in PERCENT

    def signed(value: float) -> str:
        text = f"{100 * value:+.1f}" if points else f"{value:+.{3 if metric in FINE else 2}f}"
        return text.replace("-", "−")

    ends = "" if found.low is None or found.high is None else f" [{signed(found.low)}, {signed(found.high)}]"
    return f"{signed(found.value)}{' pt' if points else ''}{ends}"


def scaled(value: float) -> str:
    """A large count with a letter: 1.2 G."""
    for power, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g} {letter}"
    return f"{value:.3g}"


def size(value: float) -> str:
    """Bytes, decimal units."""
    return f"{scaled(value)}B" if abs(value) >= 1000 else f"{value:.0f} B"


def _plain(value: object) -> object:
    """A number as Python's own, None where it is not finite."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
