"""The sentences around the tables: titles, what was scored, reference levels, the legend."""

from collections.abc import Iterable, Sequence

from memory_bench.budget import PRESETS, Budget
from memory_bench.report.board import Board
from memory_bench.report.costs import cost
from memory_bench.report.cuts import numbers
from memory_bench.report.tables import PERCENT, held, number, scaled, short
from memory_bench.statistics.retention import HALF_LIFE, KNOWN, known_without_memory

KINDS = {
    "train_tokens": "At equal training tokens",
    "train_flops": "At equal training FLOPs",
    "train_seconds": "At equal training time",
    "none": "Without training",
}
PRETRAINED = (
    "Pretrained: loaded from released weights instead of trained under this budget, so they are not ranked and not "
    "compared."
)
HELD = "Memory and energy"
LEGEND = (
    ("[95 %]", "95 % bootstrap interval over documents (blocks of a document below 20 documents) or over the documents "
     "that questions share"),
    ("tie", "rows that share a letter cannot be told apart: paired on identical documents or questions, Holm-corrected "
     "within the table; what is no larger than the noise between training seeds is a tie"),
    ("seed sd", "standard deviation of the headline between training seeds, a second source of variance that the "
     "intervals leave out"),
    (
        "vs window",
        "paired difference to `truncation`, the same backbone trained as long without memory, with the same adapters "
        "(untrained where only what a method adds is trained)",
    ),
    ("memory wiped", "the same model with its memory emptied: before every segment for text, before the question for "
     "questions"),
    ("lift", "(score − wiped) / (ceiling − wiped); the ceiling has the evidence in the prompt. 0: memory gave nothing; "
     "1: as good as reading it again"),
    (
        "learned?",
        "whether training taught the model to use its memory: it beats itself with the memory wiped, on what the "
        "headline counts",
    ),
    ("over budget", "the run hit a limit of the budget; what it reached is shown below the rows that finished and "
     "stays in every plot; unanswered questions count as wrong"),
    ("pretrained", "the authors' released weights, trained with other data and another effort than any row above"),
    ("control", "not asked for; run because the comparison needs it"),
    ("parity", "`exact` or the largest deviation from the official implementation on its reference vectors; `none`: no "
     "certificate; `third party`: the authors released no code, the vectors are of other people's implementations"),
)  # fmt: skip


RETENTION = (
    ("half-life", "tokens after which the accuracy above the floor has halved, from acc(d) = c + (a − c) · 2^(−d/h) "
     "fitted to the hits; c is the memory-wiped control, else chance. `> 32,768`: the fitted curve does not fall by "
     "half within the longest distance asked; `open)`: the interval's upper end lies beyond it; `no memory`: not above "
     "the floor. A curve that is flat and then drops has another shape, and is read from the plot"),
)  # fmt: skip


KINDS_OF_WRONG = (
    ("stale rate", "answers that are an older value of the same key, and `alien rate`, those that are a value of "
     "another key or one that was never stated: with the accuracy they add up to one; `stale chance` and "
     "`alien chance` are what a guess among the choices has"),
)  # fmt: skip


GROWTH = ("memory state", "bytes of one stream's state, the largest in evaluation; `constant`: it has stopped growing "
          "with the text, else the slope of what fits its sizes better, a line over the tokens or over their logarithm "
          "(`/doubling`)")  # fmt: skip
MEASURED = (
    ("weights", "parameters, those of frozen helpers too"),
    ("gradients", "of the parameters that are trained, and `optimiser`, what it keeps of them, after a step"),
    ("activations", "tensors alive at once beside weights, gradients, optimiser and memory state, in the first step of "
     "each stage of training (states in between count: gradients flow through them) and in evaluation, in the first "
     "step and whenever the batch or its state has doubled"),
    ("state written", "bytes of the tensors that reading a segment made anew in one stream's state, and `state read`, "
     "of those that it was given: means over the evaluation"),
    ("eval J", "joules of the device while the model was evaluated (`train J`: trained): the GPU's counter, or those "
     "of all processors and their memory, whoever used them, so they mean most when nothing else runs"),
)  # fmt: skip


def legend(boards: Sequence[Board]) -> tuple[tuple[str, str], ...]:
    """What the columns of `boards` mean; those of `held` only where a board has them."""
    shown = {column for board in boards for column in held(board).columns}
    grown = any(cost(row).growth is not None for board in boards for row in board.everything)
    return (
        LEGEND
        + (RETENTION if any(is_retention(board) for board in boards) else ())
        + (KINDS_OF_WRONG if any(numbers(board, "updates", "stale_rate") for board in boards) else ())
        + ((GROWTH,) if grown else ())
        + tuple((term, meaning) for term, meaning in MEASURED if term in shown)
    )


def is_retention(board: Board) -> bool:
    """The task gives half-lives."""
    return any(e.metric == HALF_LIFE for row in (*board.rows, *board.ahead) for e in row.estimates)


def known_already(board: Board) -> list[str]:
    """A warning for every model that knows answers without its memory, on boards of retention."""
    chance = board.levels.get("chance", 0.0)
    said = []
    for row in board.rows if is_retention(board) else ():
        wiped = row.find(board.metric, "control:wiped")
        if wiped is not None and known_without_memory(wiped.value, chance) > KNOWN:
            said.append(
                f"{row.label} answers {number(wiped.value, board.metric)} with its memory wiped (chance "
                f"{number(chance, board.metric)}): more than {KNOWN:.0%} of what is above chance is known without "
                "reading. Only lift and half-life leave that out."
            )
    return said


def title(board: Board) -> str:
    """Data (a stand-in is named), backbone, budget."""
    name = board.data if board.data.startswith(board.task) else f"{board.task}: {board.data}"
    return f"{name} · backbone {board.backbone_shown} · budget {board.budget_shown}"


def scope(board: Board) -> str:
    """How much was trained on and scored."""
    rows = [row for row in board.rows if row.headline]
    spent = [cost(row) for row in rows]
    parts = [
        _range("tokens trained", [c.train_tokens for c in spent]),
        _range("tokens scored", [c.scored_tokens for c in spent]),
        "seeds " + ", ".join(map(str, sorted({s for row in board.rows for s in row.seeds}))),
    ]
    frame = next((row.samples for row in rows if row.samples is not None and row.status == "ok"), None)
    if frame is not None:
        main = frame[frame["control"] == ""]
        parts.append(f"{main['cluster'].nunique():,} documents")
        asked = main[main["kind"] == "ask"]
        if len(asked):
            parts.append(f"{len(asked) // max(1, asked['seed'].nunique()):,} questions")
    elif rows and rows[0].headline:
        parts.append(f"n = {rows[0].headline.n:,}")
    if extent := board.cell.task.config.get("extent"):
        parts.append(f"extent {extent}")
    if board.ended_by == "steps":
        same = "the same for all" if not board.unequal else "which not all rows have had"
        parts.append(f"the data's own number of training steps, {same}{_instead(board.budget)}")
    if board.ended_by != "none" and not any(len(row.seed_values) > 1 for row in rows):
        parts.append("one seed, so the noise between trainings is unknown")
    if board.cell.limit is not None:
        parts.append(f"limited to {board.cell.limit}")
    if not board.cell.controls:
        parts.append("without controls (--no-controls)")
    return " · ".join(part for part in parts if part)


def _instead(budget: Budget) -> str:
    """What a curriculum that ran to its end took the place of, where the budget lets it; else it ended within that."""
    counts = {"tokens": budget.train_tokens, "FLOPs": budget.train_flops}
    named = " and ".join(name for name, limit in counts.items() if limit is not None)
    if not named:
        return ""
    return f", instead of the budget's {named}" if budget.own_curriculum else f", within the budget's {named}"


def equal(board: Board) -> str:
    """What is the same for every row of a board, and what is not, with the numbers."""
    rows = [row for row in board.rows if row.label not in board.unequal and row.trained]
    if board.kind == "none" or not rows:
        return ""
    spent = [cost(row) for row in rows]
    tokens = _range("training tokens", [c.train_tokens for c in spent])
    flops = [c.train_flops for c in spent if c.train_flops]
    low, high = (scaled(f(flops)) for f in (min, max)) if flops else ("", "")
    computed = f"{low} training FLOPs" if low == high else f"{low}–{high} training FLOPs"
    seconds = [c.train_seconds for c in spent if c.train_seconds]
    took = f"{min(seconds):,.0f}–{max(seconds):,.0f} s of training" if seconds else ""
    if board.ended_by == "steps":
        same, other = f"the data's own training steps ({tokens})", [computed]
    elif board.kind == "train_flops":
        same, other = f"training FLOPs, at most {scaled(board.budget.train_flops or 0)} (used: {low}–{high})", [tokens]
    elif board.kind == "train_seconds":
        limit = board.budget.train_seconds or 0
        same, other = f"training time, at most {limit:,.0f} s", [tokens, computed]
    else:
        same, other = tokens, [computed]
    other += [took] if board.kind != "train_seconds" else []
    rest = f" All but {', '.join(board.unequal)}, whose notes say why." if board.unequal else ""
    return f"Equal for all: {same}. Not equal: {', '.join(filter(None, other))}.{rest}"


def equal_short(board: Board) -> str:
    """What is equal, for a plot's title: `` · at equal training tokens``."""
    return "" if board.kind == "none" else f" · {KINDS[board.kind][0].lower()}{KINDS[board.kind][1:]}"


def direction(board: Board) -> str:
    """What the table is ranked by; empty where it has no numbers."""
    if not any(row.headline for row in board.everything):
        return ""
    return f"Ranked by {short(board.metric)}, {'higher' if board.higher_is_better else 'lower'} is better."


def levels(board: Board) -> str:
    """Reference levels of the headline; empty where there are none."""
    named = [f"{name} {number(value, board.metric)}" for name, value in board.levels.items()]
    return f"Reference levels: {', '.join(named)}." if named else ""


def winners(board: Board) -> str:
    """The board in a sentence: who is best, and who cannot be told apart from it.

    No winner is named where a training was not equal, where a row has one seed, as the noise between trainings is
    unknown then, or without a paired test. Rows that did not finish are named beside it: they may be better.
    """
    unequal = [row.label for row in board.rows if row.headline and row.label in board.unequal]
    if unequal:
        return f"No winner is named, as the trainings are not equal (see the notes of {', '.join(unequal)})."
    ranked = [row for row in board.rows if row.headline and row.status == "ok"]
    if len(ranked) < 2:
        return ""
    first = ranked[0]
    mine = set(board.letters.get(first.label, ""))
    tied = [row.label for row in ranked[1:] if mine & set(board.letters.get(row.label, ""))]
    if len(tied) < len(ranked) - 1 and (few := [row.label for row in ranked if len(row.seed_values) < 2]):
        whose = "" if len(few) == len(ranked) else f" for {', '.join(few)}"
        return f"No winner is named from one seed{whose}: the noise between seeds is unknown. First: {first.label}."
    if not mine:
        return f"No winner is named, as there is no paired test for {short(board.metric)}. First: {first.label}."
    if len(tied) == len(ranked) - 1:
        return f"No row can be told apart from the first, {first.label}."
    lost = [row.label for row in board.rows if row.status in ("over_budget", "failed")]
    finished = f" that finished ({', '.join(lost)} did not)" if lost else ""
    if tied:
        return f"Best{finished}: {first.label}, not told apart from {', '.join(tied)}."
    return f"Best: {first.label}, ahead of all others{finished}."


def missing_boards(boards: Sequence[Board]) -> list[tuple[str, str]]:
    """(heading, sentence) for the board at equal tokens or FLOPs that this run does not have, and how to get it."""
    kinds = {board.kind for board in boards}
    trained = [board for board in boards if board.kind != "none"]
    if not trained:
        return []
    free = [board for board in trained if board.ended_by != "steps"]
    if not free:
        reason = "Not in this run: the training of these tasks is a fixed number of steps, the same for every model."
        return [(KINDS[kind], reason) for kind in ("train_tokens", "train_flops") if kind not in kinds]
    result = []
    for limit in ("train_tokens", "train_flops"):
        if limit in kinds:
            continue
        names = {board.budget.name for board in free}
        other = sorted(
            twin for name in names for twin in (f"{name}-flops", name.removesuffix("-flops"))
            if twin in PRESETS and twin != name and getattr(PRESETS[twin], limit) is not None
        )  # fmt: skip
        way = f"`--budget {other[0]}`" if other else f"a budget file that sets `{limit}`"
        result.append(
            (KINDS[limit], f"Not in this run: its training was ended by another limit. Run it again with {way}.")
        )
    return result


def percent_note(boards: Iterable[Board]) -> str:
    """Said where shares are shown."""
    shares = any(board.metric in PERCENT for board in boards)
    return "Differences of shares are in percentage points (pt)." if shares else ""


def _range(what: str, values: Sequence[int | None]) -> str:
    """``204,800 tokens trained``, or from–to where the rows differ."""
    known = [v for v in values if v is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    return f"{low:,} {what}" if low == high else f"{low:,}–{high:,} {what}"
