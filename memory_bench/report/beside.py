"""A board's numbers beside published ones: which pairs are shown, and the table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from memory_bench.episode import Estimate
from memory_bench.published import reported
from memory_bench.published.comparable import METRICS, SHARES, Measured, Verdict, beside, judge, parse_length, rivals_of
from memory_bench.published.reported import Reported
from memory_bench.report.board import Board
from memory_bench.report.costs import cost, learned
from memory_bench.report.layout import Table
from memory_bench.report.rows import Row
from memory_bench.report.tables import interval, short

TITLE = "Reported beside reproduced"
COLUMNS = ("model", "reported for", "metric", "reported", "ours [95 %]", "verdict", "where")
MEANING = (
    "The published number of every model that comes nearest to what was run here. `not comparable` names the first "
    "difference; `reproduced`: our interval holds the published value, ours is within 3 % (shares: 2 points) of it, "
    "and the interval tells models apart; `within interval`: it holds it, and other models' too; `differs`: it does "
    "not hold it. `memory-bench list reported` has all of them, with what to beware of"
)
REFUSED = "The data of this board are a stand-in, which is compared with no published number."
PER_ROW, PER_BOARD = 2, 12  # pairs shown that cannot be compared


@dataclass(frozen=True, slots=True)
class Pair:
    """A published number and the one of ours that comes nearest to its setting."""

    published: Reported
    ours: Measured
    verdict: Verdict

    @property
    def key(self) -> tuple[float, ...]:
        """Sorts: what can be compared first, then by how far the reasons went, then by how far the lengths differ."""
        lengths = [(parse_length(self.published.context), parse_length(mine)) for mine in self.ours.contexts]
        ratios = [max(a[0], b[0], 1) / max(1, min(a[0], b[0])) for a, b in lengths if a and b and a[1] == b[1]]
        return (-self.verdict.passed, min(ratios, default=float("inf")))


@dataclass(frozen=True, slots=True)
class Beside:
    """What a report shows: the pairs, or why there are none; and how many published numbers are left out."""

    pairs: tuple[Pair, ...] = ()
    refused: str = ""
    left_out: int = 0
    grep: str = ""

    @property
    def more(self) -> str:
        """Where the rest is."""
        return f"… and {self.left_out:,} more: `memory-bench list reported --grep {self.grep}`" if self.left_out else ""

    def table(self) -> Table:
        """One line a pair."""
        return Table(COLUMNS, tuple(_line(pair) for pair in self.pairs))


def find_beside(board: Board, rows: Sequence[Reported] | None = None) -> Beside:
    """The published numbers of a board's models on its task.

    Args:
        board: of a report.
        rows: the registry, or another.
    """
    same_task = [r for r in (reported.load() if rows is None else rows) if r.task == board.task]
    models = {row.model for row in board.everything}
    published = [r for r in same_task if r.family in models and _same_questions(r, board)]
    if not published:
        return Beside()
    if "(stand-in" in board.data:
        return Beside(refused=REFUSED)
    nearest: dict[tuple[str, str, str], Pair] = {}
    for row in board.everything:
        mine, ablated = list(_measured(board, row)), _ablated(board, row)
        for r in published:
            if r.family != row.model or any(r.options().get(name) != value for name, value in ablated.items()):
                continue
            found = [_pair(r, m, same_task) for m in mine if beside(r, m.metric)]
            if found:
                pair, place = min(found, key=lambda pair: pair.key), (row.label, r.model, r.backbone)
                if place not in nearest or pair.key < nearest[place].key:
                    nearest[place] = pair
    shown = _shown(list(nearest.values()), [row.label for row in board.everything])
    seen = {pair.published.id for pair in shown}
    left = [r for r in published if r.id not in seen]
    return Beside(tuple(shown), "", len(left) if shown else 0, published[0].id.split(".")[3])


def _pair(published: Reported, ours: Measured, rows: Sequence[Reported]) -> Pair:
    verdict = judge(published, ours)
    if verdict.kind != "not comparable":
        verdict = judge(published, ours, rivals_of(published, rows))
    return Pair(published, ours, verdict)


def _shown(pairs: list[Pair], order: list[str]) -> list[Pair]:
    """All that can be compared, and of the others the nearest of every row, in turn until the table is full."""
    compared = [pair for pair in pairs if pair.verdict.kind != "not comparable"]
    chosen = list(compared)
    for place in range(PER_ROW):
        for label in order:
            own = [p for p in pairs if p.ours.label == label and p not in compared]
            own.sort(key=lambda p: (p.key, p.published.id))
            chosen += own[place : place + 1] if len(chosen) - len(compared) < PER_BOARD else []
    return sorted(chosen, key=lambda p: (p not in compared, order.index(p.ours.label), p.key, p.published.id))


def _same_questions(published: Reported, board: Board) -> bool:
    """The tasks of bAbI are reported one by one and as a mean; a board has one of these."""
    if board.task != "babi":
        return True
    asked = list(board.cell.task.config.get("tasks", ()))
    return published.data == (f"BABILong qa{asked[0]}" if len(asked) == 1 else "BABILong mean")


def _ablated(board: Board, row: Row) -> dict[str, str]:
    """Options in which a control differs from the model it is a control of, as the registry writes them.

    Only a published ablation may stand beside an ablation.
    """
    others = [r for r in board.everything if r.model == row.model and r.role != "control"]
    if row.role != "control" or not others:
        return {}
    own, whole = (r.records[0].cell.training.model.config for r in (row, others[0]))
    return {name: str(value).lower() for name, value in own.items() if whole.get(name) != value}


def _measured(board: Board, row: Row) -> Iterator[Measured]:
    """The numbers of a row that may stand beside a published one."""
    for estimate in row.estimates:
        if estimate.metric in METRICS and "control:" not in estimate.slice and "label=" not in estimate.slice:
            yield measured(board, row, estimate)


def measured(board: Board, row: Row, estimate: Estimate) -> Measured:
    """One number of a row with its setting."""
    cell, spent = row.records[0].cell, cost(row)
    options = {**cell.training.model.config, **cell.scored_with}
    trained_on = cell.training.corpus.name if spent.train_tokens else "nothing"
    if row.pretrained:
        trained_on = f"checkpoint {row.pretrained.rstrip('/').split('/')[-1].lower()}"
    headline = estimate.metric == row.metric and not estimate.slice
    return Measured(
        label=row.label,
        model=row.model,
        task=board.task,
        data=board.data,
        split=_split(board),
        metric=estimate.metric,
        slice=estimate.slice,
        value=estimate.value,
        low=estimate.low,
        high=estimate.high,
        # Only of the headline are the seeds' own values at hand.
        spread=row.seed_spread if headline else None,
        backbone=board.backbone,
        contexts=tuple(_contexts(board, row, estimate.slice)),
        segment=options.get("segment"),
        options=options,
        trained_on=trained_on,
        train_tokens=spent.train_tokens,
        status=row.status,
        learned=learned(row),
        pretrained=row.pretrained,
        look_ahead=row.look_ahead,
    )


def _split(board: Board) -> str:
    """``test``, or which part of it was read."""
    config = board.cell.task.config
    cut = [f"{name} {config[name]}" for name in ("extent", "documents", "questions") if config.get(name)]
    cut = [part for part in cut if part != "extent full"]
    cut += [f"limit {board.cell.limit}"] if board.cell.limit is not None else []
    return f"test, {', '.join(cut)}" if cut else "test"


def _contexts(board: Board, row: Row, slice_: str) -> Iterator[str]:
    """How much text a number is about, in all the ways that papers count it."""
    config = board.cell.task.config
    named = dict(part.partition("=")[::2] for part in slice_.split(","))
    for name in ("distance", "length"):
        if named.get(name, "").isdigit():
            tokens, chunk = int(named[name]), config.get("chunk")
            yield f"{tokens} tokens"
            if name == "distance" and chunk:
                yield f"{tokens // chunk} steps"
    if "fused" in config:
        yield f"{config['fused']} contexts"
    if not slice_ and row.samples is not None:
        read = row.samples[(row.samples["kind"] == "read") & (row.samples["control"] == "")]
        if len(read):
            yield f"{round(read.groupby(['seed', 'episode'])['tokens'].sum().mean())} tokens"
            if config.get("extent") == "full" or config.get("words") == 0:
                yield "documents"


def _line(pair: Pair) -> tuple[str, ...]:
    published, ours = pair.published, pair.ours
    setting = ", ".join(part for part in (published.context, published.split) if part)
    name = f"{published.model} on {published.backbone}" if published.backbone else published.model
    at = f" at {ours.slice.partition('=')[2]}" if ours.slice else ""
    return (
        ours.label,
        f"{name} ({setting})" if setting else name,
        short(ours.metric) + at,
        _value(published, ours.metric),
        interval(ours.value, ours.low, ours.high, ours.metric),
        str(pair.verdict),
        published.id,
    )


def _value(published: Reported, metric: str) -> str:
    """The published value in our unit, with the source's digits and its reading error."""
    error = "" if published.error is None else f" ± {published.error:g}"
    if metric not in SHARES:
        return published.shown + error
    if published.unit == "percent":
        return f"{published.shown}{error} %"
    digits = max(0, len(published.shown.partition(".")[2]) - 2)
    assert published.value is not None
    error = "" if published.error is None else f" ± {100 * published.error:g}"
    return f"{100 * published.value:.{digits}f}{error} %"
