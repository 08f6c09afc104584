"""`memory-bench compare`: paired, clustered, Holm-corrected differences between models of one run or of several."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from memory_bench.cell import digest
from memory_bench.errors import UserError, unknown
from memory_bench.report import by_distance, words
from memory_bench.report.board import Board, collect, training_goal
from memory_bench.report.layout import NONE, Table, plain_markdown, sentence_markdown, to_markdown
from memory_bench.report.rows import OVER, Row, Scorer
from memory_bench.report.tables import delta, interval, number, short
from memory_bench.statistics import pairing
from memory_bench.statistics.pairing import Difference
from memory_bench.statistics.shared import RATIOS
from memory_bench.store import Store

Entry = tuple[str, Board, Row]
"""Label (with the run where there are several), board, row."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Differences on one task, data, backbone and budget, corrected together.

    Attributes:
        board: what the rows share.
        models: label to row, in the order of the names.
        pairs: every two of them.
        missing: rows without a number or without shared samples, with the reason.
        by_distance: of retention, (slice, difference) at every distance and of half-lives, corrected together.
        unequal: labels of rows whose training was not as long as that of the others on their board.
    """

    board: Board
    models: Mapping[str, Row]
    pairs: tuple[Difference, ...]
    missing: tuple[str, ...] = ()
    by_distance: tuple[tuple[str, Difference], ...] = ()
    unequal: frozenset[str] = frozenset()

    def table(self) -> Table:
        """One line a pair."""
        metric = self.board.metric
        columns = ("A", "B", f"A: {short(metric)} [95 %]", f"B: {short(metric)} [95 %]", "A − B [95 %]", "p (Holm)",
                   "seed noise", "n", "verdict")  # fmt: skip
        lines = []
        for pair in self.pairs:
            lines.append((
                pair.a, pair.b, self._value(pair.a), self._value(pair.b), delta(pair, metric),
                "<0.001" if pair.adjusted < 0.001 else f"{pair.adjusted:.3f}",
                f"±{number(pair.floor, metric, spread=True)}" if pair.floor else NONE,
                f"{pair.n:,}", self.verdict(pair),
            ))  # fmt: skip
        return Table(columns, tuple(lines)).without_empty_columns()

    def markdown(self) -> str:
        """Title, table, and what could not be compared."""
        out = [f"### {plain_markdown(words.title(self.board))}", *filter(None, [words.direction(self.board)])]
        out += [to_markdown(self.table())] if self.pairs else ["Nothing to compare here."]
        if self.by_distance:
            lines = by_distance.table(self.by_distance, self.models, self.board.metric, self.verdict)
            out += ["By distance (tokens), corrected within this table:", to_markdown(lines)]
        return "\n\n".join([*out, *map(sentence_markdown, self.missing)])

    def rows(self) -> list[dict[str, Any]]:
        """One entry a pair, as plain data."""
        same = {"task": self.board.task, "data": self.board.data, "backbone": self.board.backbone_shown,
                "budget": self.board.budget_shown, "metric": self.board.metric}  # fmt: skip
        return [
            {
                **same,
                "a": p.a,
                "b": p.b,
                "a_value": self._number(p.a),
                "b_value": self._number(p.b),
                "difference": p.value,
                "ci_low": p.low,
                "ci_high": p.high,
                "p": p.p,
                "p_holm": p.adjusted,
                "seed_noise": p.floor,
                "n": p.n,
                "verdict": self.verdict(p),
            }
            for p in self.pairs
        ] + [{**same, **entry} for entry in by_distance.rows(self.by_distance, self.board.metric, self.verdict)]

    def verdict(self, pair: Difference) -> str:
        """Which of the two is better, or why that cannot be said."""
        if pair.told_apart:
            first = pair.a if (pair.value > 0) == self.board.higher_is_better else pair.b
            doubt = self._doubt(pair)
            return f"{first} is ahead, no winner: {doubt}" if doubt else f"{first} is better"
        return "within the noise between seeds" if pair.adjusted < pairing.ALPHA else "cannot be told apart"

    def _doubt(self, pair: Difference) -> str:
        """Why a difference makes no winner; empty where it does."""
        both = [self.models[label] for label in (pair.a, pair.b)]
        if {pair.a, pair.b} & self.unequal or len({training_goal(row.records[0]) for row in both}) > 1:
            return "their trainings are not equal"
        if failed := [row.label for row in both if any(record.status == "failed" for record in row.records)]:
            return f"{' and '.join(failed)} failed with other seeds"
        if over := [row.label for row in both if row.status == OVER]:
            return f"{' and '.join(over)} ran over budget"
        return "one seed" if min(len(row.seed_values) for row in both) < 2 else ""

    def _number(self, label: str) -> float | None:
        own = self.models[label].headline
        return None if own is None else own.value

    def _value(self, label: str) -> str:
        own = self.models[label].headline
        return NONE if own is None else interval(own.value, own.low, own.high, self.board.metric)


def compare(
    stores: Store | Sequence[Store] | Mapping[str, Store], names: Sequence[str], tasks: Mapping[str, Scorer]
) -> list[Comparison]:
    """Compare models on every task they share.

    Args:
        stores: one run or several (by name, else by folder); with several, rows are called ``model@run``.
        names: labels of rows, or models for all of their rows (``hmt``, ``hmt@run-1``); none: all rows.
        tasks: by name, for their metrics.

    Raises:
        UserError: a name that no run has, fewer than two rows, or runs that share no task, data, backbone and budget.
    """
    runs = _by_name(stores)
    groups: dict[str, list[Entry]] = {}
    for run, store in runs.items():
        for board in collect(store, tasks):
            for row in board.everything:
                label = f"{row.label}@{run}" if len(runs) > 1 else row.label
                label += f" ({board.apart[1]})" if board.apart[1] else ""  # budgets of one name in one run
                groups.setdefault(_shared(board), []).append((label, board, row))
    everything = [entry for entries in groups.values() for entry in entries]
    for name in names:
        if not _named(name, everything):
            raise unknown("model", name, {label for label, _, _ in everything}, "`memory-bench report` lists the rows.")
    found = []
    for entries in groups.values():
        chosen = [entry for name in names for entry in _named(name, entries)] if names else entries
        chosen = list({entry[0]: entry for entry in chosen}.values())
        if len(chosen) > 1:
            # The noise between seeds is estimated from all rows, as two alone have too few seeds for it.
            own = {label: row.seed_values for label, _, row in entries if not row.pretrained}
            found.append(_compare(chosen, own, [label for label, _, row in entries if not row.trained]))
    if not found:
        raise UserError(
            "There are no two results to compare: they must share task, data, backbone, budget and the number of "
            "documents or questions."
        )
    return found


def _by_name(stores: Store | Sequence[Store] | Mapping[str, Store]) -> dict[str, Store]:
    """Runs by name: the last part of their folder, or all of it where that is not unique."""
    if isinstance(stores, Mapping):
        return dict(stores)
    several = [stores] if isinstance(stores, Store) else list(stores)
    names = [store.folder.resolve().name for store in several]
    return {
        name if names.count(name) == 1 else str(store.folder): store for name, store in zip(names, several, strict=True)
    }


def _compare(
    chosen: Sequence[Entry], seed_values: Mapping[str, Sequence[float]], untrained: Sequence[str]
) -> Comparison:
    board = chosen[0][1]
    usable = {
        label: row
        for label, _, row in chosen
        if row.headline is not None and row.samples is not None and not row.pretrained
    }
    samples = {label: row.samples for label, row in usable.items() if row.samples is not None}
    pairs = pairing.differences(samples, board.metric, seed_values, untrained)
    missing = [
        f"{label}: {row.status.replace('_', ' ')}{f' ({reason})' if (reason := '; '.join(row.reasons)) else ''}, "
        f"{'no number' if row.headline is None else 'no samples'} to compare."
        for label, _, row in chosen
        if label not in usable and not row.pretrained
    ]
    ahead = [
        f"{label} sees {row.look_ahead} tokens ahead: no fair comparison." for label, _, row in chosen if row.look_ahead
    ]
    loaded = [
        f"{label} was loaded from {row.pretrained}, not trained under this budget: no fair comparison."
        for label, _, row in chosen
        if row.pretrained
    ]
    tested = {frozenset((pair.a, pair.b)) for pair in pairs}
    untested = [f"{a} and {b}" for a, b in combinations(usable, 2) if frozenset((a, b)) not in tested]
    if untested and (board.metric in RATIOS or board.metric == "accuracy"):
        ahead.append(f"{'; '.join(untested)}: nothing that both have scored in the same parts, so no paired test.")
    elif untested:
        ahead.append(f"There is no paired test for {short(board.metric)}.")
    far = tuple(by_distance.compared(usable, board))
    models = {label: row for label, _, row in chosen}
    unequal = frozenset(label for label, own, row in chosen if row.label in own.unequal)
    said = (*missing, *ahead, *loaded)
    return Comparison(board, models, tuple(pairs), by_distance=far, missing=said, unequal=unequal)


def _shared(board: Board) -> str:
    """What results must have in common; budgets are told apart by name, so limits that changed between runs show."""
    task, backbone = board.cell.task, board.cell.training.backbone
    return digest(
        [task.name, task.version, task.config, task.revision, board.cell.limit, asdict(backbone), board.budget.name]
    )


def _named(name: str, entries: Sequence[Entry]) -> list[Entry]:
    """The rows with that label (in every run, unless it names one), else the rows of that model."""
    for part in ("label", "model"):
        own = [
            (str(getattr(row, part)), label.removeprefix(row.label), (label, board, row))
            for label, board, row in entries
        ]
        if found := [entry for plain, run, entry in own if name in (plain, plain + run)]:
            return found
    return []
