"""README's measured tables, made from the shipped records: `python benchmarks/boards.py --readme` rewrites them.

A table stands between ``<!-- measured: NAME -->`` and ``<!-- /measured -->``; the column *cost* of the table of models
is filled in place. Means are over the seeds of the records; which rows are ties is read from ``leaderboard.md``, since
records hold no samples.
"""

import csv
import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from memory_bench.budget import PRESETS
from memory_bench.episode import Estimate
from memory_bench.record import Record
from memory_bench.report.costs import cost, learned
from memory_bench.report.layout import NONE
from memory_bench.report.rows import Row, make_row
from memory_bench.report.tables import number
from memory_bench.statistics.halflife import half_life_text

ROOT = Path(__file__).resolve().parent.parent
BOARDS = ROOT / "results" / "leaderboards"
WINDOW, RECALL_OFF = "truncation", "hmt (recall off)"
FIRST_COMMAND = tuple(range(PRESETS["cpu-minutes"].seeds))  # the seeds of README's first command
HEADLINES = {"pg19": "bits_per_byte", "pubmedqa": "accuracy", "key-value": "accuracy", "squad-retention": "accuracy"}
SEGMENT = 16  # tokens of key-value
CLAIMS = ("P2", "P4", "P6", "C4", "C5", "O1", "O2")
MODELS = "## What is compared"  # the section with the column of costs
OPEN_ENDED = ("full-context",)  # its cost grows with the text

Lines = list[tuple[str, ...]]


@dataclass(frozen=True)
class Shown:
    """One task of a shipped board: its rows by label, and those no paired test tells from the window."""

    rows: dict[str, Row]
    tied: frozenset[str]

    @property
    def window(self) -> Row:
        """The equally trained window."""
        return self.rows[WINDOW]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of all rows."""
        return tuple(sorted({seed for row in self.rows.values() for seed in row.seeds}))

    def levels(self) -> str:
        """``chance 33.3 %``, of the level that is nearest to knowing nothing."""
        found = {name: value for row in self.rows.values() for r in row.records for name, value in r.levels.items()}
        name = "majority" if "majority" in found else "chance"
        return f"{name} {number(found[name], 'accuracy')}"


def records(board: str) -> list[Record]:
    """The shipped records of a board.

    Raises:
        ValueError: this version of the code cannot read one.
    """
    lines = (BOARDS / board / "records.jsonl").read_text(encoding="utf-8").split("\n")
    return [Record.from_json(json.loads(line)) for line in lines if line]


@cache
def shown(board: str, task: str) -> Shown:
    """A task of a shipped board."""
    groups: dict[str, dict[int, Record]] = {}
    for record in records(board):
        if record.cell.task.name == task:
            groups.setdefault(record.cell.label, {})[record.cell.training.seed] = record
    rows = {}
    for label, found in groups.items():
        ordered = [found[seed] for seed in sorted(found)]
        nothing = {record.key: None for record in ordered}
        rows[label] = make_row(label, ordered, nothing, None, HEADLINES[task], {}, [])
    return Shown(rows, frozenset(_tied((BOARDS / board / "leaderboard.md").read_text(encoding="utf-8"), task)))


def _tied(text: str, task: str) -> Iterable[str]:
    """Labels that share a letter with the window in the quality table of a leaderboard."""
    for part in text.split("\n### ")[1:]:
        head = part.split("\n", 1)[0]
        lines = [[c.strip() for c in line.strip("|").split("|")] for line in part.split("\n") if line[:1] == "|"]
        if re.match(rf"{re.escape(task)}\b(?!-)", head) and lines and "tie" in lines[0]:
            table = lines[: next((i for i, line in enumerate(lines) if i and line[0] == "model"), len(lines))]
            letters = {line[0]: set(line[lines[0].index("tie")]) - set(NONE) for line in table[2:]}
            return [label for label, own in letters.items() if own & letters.get(WINDOW, set())]
    return []


def value(row: Row, slice_: str = "", metric: str = "") -> float:
    """The mean over seeds of the headline, or of another metric."""
    found = row.find(metric or row.metric, slice_)
    if found is None:
        raise ValueError(f"{row.label} has no {metric or row.metric} {slice_}")
    return found.value


def name(label: str) -> str:
    """A label as README shows it."""
    plain, _, off = label.partition(" (")
    return f"`{plain}`" + (f" without {off.removesuffix(' off)')}" if off else "")


def signed(number_: float, digits: int = 3) -> str:
    """With its sign, and a minus that is one."""
    return f"{number_:+.{digits}f}".replace("-", "−")


def percent(share: float) -> str:
    """Without the sign of percent, where the table's head has it."""
    return f"{100 * share:.1f}"


def seeds_of(found: Shown) -> str:
    """``seeds 0 and 1``, ``seeds 0 to 4``."""
    own = found.seeds
    if len(own) == 1:
        return f"seed {own[0]}"
    together = own == tuple(range(own[0], own[-1] + 1)) and len(own) > 2
    return f"seeds {own[0]} to {own[-1]}" if together else f"seeds {' and '.join(map(str, own))}"


def came_out() -> str:
    """The headline command's boards, on stand-ins and on real data."""
    boards = [(board, task) for board in ("tiny-stand-ins", "tiny-real") for task in ("pg19", "pubmedqa")]
    found = {pair: shown(*pair) for pair in boards}
    order = sorted(
        {label: None for pair in boards for label in found[pair].rows},
        key=lambda label: [_place(found[pair], label) for pair in (boards[0], boards[2])],
    )
    head = (
        "model", "`pg19`, Shakespeare and Milton for it: bits/byte against the window",
        "`pubmedqa`, invented studies for it: accuracy", "`pg19`, real books: bits/byte against the window",
        "`pubmedqa`, real",
    )  # fmt: skip
    lines = [(name(label), *(_cell(found[pair], label, pair[1]) for pair in boards)) for label in order]
    said = f"Means over {seeds_of(found[boards[0]])} (stand-ins) and {seeds_of(found[boards[2]])} (real)."
    return f"{said}\n\n{compact(head, lines)}"


def _place(board: Shown, label: str) -> tuple[bool, bool, float]:
    row = board.rows.get(label)
    return (row is None, label == WINDOW and row is not None, 0.0 if row is None else value(row))


def _cell(board: Shown, label: str, task: str) -> str:
    row = board.rows.get(label)
    if row is None:
        return ""
    own = value(row)
    if label == WINDOW:
        return number(own, row.metric) + (f" ({board.levels()})" if task == "pubmedqa" else "")
    if task == "pubmedqa":
        return f"{number(own, row.metric)}, {learned(row)}"
    return f"{signed(own - value(board.window))}, {'a tie with the window' if label in board.tied else learned(row)}"


def by_seed() -> str:
    """Accuracy on the invented studies for every seed, and what recall is worth there."""
    board = shown("tiny-stand-ins", "pubmedqa")
    seeds, far = board.seeds, max(_distances(board))
    two = [i for i, seed in enumerate(seeds) if seed in FIRST_COMMAND]
    more = len(two) < len(seeds)
    head = [
        "accuracy, %",
        *(f"seed {seed}" for seed in seeds),
        *([f"seeds {' and '.join(map(str, FIRST_COMMAND))}"] if more else []),
    ]
    head += [f"all {len(seeds)}", "sd", f"at {far:,} tokens"]

    def line(title: str, values: Sequence[float], there: float, show: Callable[[float], str]) -> tuple[str, ...]:
        means = [statistics.mean(values[i] for i in two)] if more else []
        cells = [*values, *means, statistics.mean(values)]
        return (title, *map(show, cells), percent(statistics.stdev(values)), show(there))

    rows = sorted(board.rows.values(), key=lambda row: -value(row))
    lines = [line(name(r.label), r.seed_values, value(r, f"distance={far}"), percent) for r in rows]
    on, off = board.rows["hmt"], board.rows[RECALL_OFF]
    gains = [a - b for a, b in zip(on.seed_values, off.seed_values, strict=True)]
    there = value(on, f"distance={far}") - value(off, f"distance={far}")
    lines.append(line("recall: the first less the second `hmt`", gains, there, lambda x: signed(100 * x, 1)))
    return compact(head, lines)


def _distances(board: Shown) -> list[int]:
    slices = {e.slice for row in board.rows.values() for e in row.estimates if e.metric == row.metric}
    return sorted(int(s.removeprefix("distance=")) for s in slices if re.fullmatch(r"distance=\d+", s))


def pretrained() -> str:
    """A pretrained backbone, nothing trained."""
    books, questions = shown("smollm2-real", "pg19"), shown("smollm2-real", "pubmedqa")
    rows = sorted(books.rows.values(), key=lambda row: value(row, metric="nll"))
    lines = [
        (name(r.label), number(value(r, metric="nll"), "nll"), number(value(questions.rows[r.label]), "accuracy"))
        for r in rows
    ]
    return compact(("model", "`pg19`: nats per token", "`pubmedqa`: accuracy"), lines)


def passages() -> str:
    """SQuAD passages over distance."""
    board = shown("squad-real", "squad-retention")
    far = _distances(board)
    head = ("accuracy, %", *(f"{d:,}" for d in far[:-1]), f"{far[-1]:,} tokens", "log-probability of the right answers")
    rows = sorted(board.rows.values(), key=lambda row: -value(row, metric="answer_logprob"))
    lines = [
        (name(r.label), *(percent(value(r, f"distance={d}")) for d in far),
         number(value(r, metric="answer_logprob"), "answer_logprob"))
        for r in rows
    ]  # fmt: skip
    return compact(head, lines)


def retention() -> str:
    """Facts over distance, from scratch, with half-lives as the leaderboard has them."""
    board = shown("retention-tiny", "key-value")
    asked = (1, 8, 16, 32)
    fitted = _half_lives(BOARDS / "retention-tiny" / "leaderboard.csv")
    head = ("accuracy, %", *map(str, asked[:-1]), f"{asked[-1]} segments", "fitted half-life, tokens")
    rows = sorted(board.rows.values(), key=lambda row: (-value(row, f"distance={asked[-1] * SEGMENT}"), -value(row)))
    lines = []
    for row in rows:
        curve = [value(row, f"distance={segments * SEGMENT}") for segments in asked]
        life = fitted[row.label.lower()]
        floor = value(row, "control:wiped")
        # Flat for as long as training saw, then gone: no half-life describes that, whatever the fit says.
        fell = curve[-1] - floor < (curve[0] - floor) / 2
        another = fell and life.note.startswith("h > ") and (life.low or 0.0) >= life.value
        text = "another shape" if another else half_life_text(life)
        text = text.replace(f" [{life.value:,.0f}, open)", "")
        lines.append((name(row.label), *map(percent, curve), text))
    return f"{seeds_of(board).capitalize()}.\n\n{compact(head, lines)}"


def _half_lives(path: Path) -> dict[str, Estimate]:
    found = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["metric"] == "half_life" and not row["slice"]:
                ends = [float(row[end]) if row[end] else None for end in ("ci_low", "ci_high")]
                note = row["detail"].split(";")[0]
                note = note if note.startswith("h ") or note == "no memory" else ""
                found[row["model"].lower()] = Estimate(
                    "half_life", float(row["value"] or "nan"), *ends, int(row["n"]), "", "tokens", note=note
                )
    return found


def claims() -> str:
    """Some of the claims that were tested, as `claims.md` has them."""
    text = (ROOT / "results" / "claims" / "reproduced" / "claims.md").read_text(encoding="utf-8")
    lines = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in text.split("\n") if line[:1] == "|"]
    found = {line[0]: (line[0], line[1], line[3].replace("-", "−"), line[4]) for line in lines if len(line) == 5}
    return compact(("claim", "what is said", "measured here", "verdict"), [found[claim] for claim in CLAIMS])


def costs() -> dict[str, str]:
    """Forward operations per token on the real books, in multiples of the window's."""
    board = shown("tiny-real", "pg19")
    per_token = {label: cost(row).eval_flops_per_token or 0.0 for label, row in board.rows.items()}
    return {
        label: "1" if label == WINDOW else f"{flops / per_token[WINDOW]:.2f}" + (", growing" * (label in OPEN_ENDED))
        for label, flops in per_token.items()
    }


def compact(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table without padding."""
    whole = [head, ["---"] * len(head), *lines]
    return "\n".join(f"|{'|'.join(row)}|" if row[0] == "---" else f"| {' | '.join(row)} |" for row in whole)


TABLES: dict[str, Callable[[], str]] = {
    "came-out": came_out,
    "by-seed": by_seed,
    "pretrained": pretrained,
    "passages": passages,
    "retention": retention,
    "claims": claims,
}


def updated(text: str) -> str:
    """README with every measured table and cost as the shipped records give them.

    Raises:
        ValueError: a table has no place in it.
    """
    for title, make in TABLES.items():
        start, end = f"<!-- measured: {title} -->\n", "<!-- /measured -->"
        if text.count(start) != 1:
            raise ValueError(f"README.md has {text.count(start)} places for the table '{title}'; it needs one")
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n{make()}\n\n{rest[rest.index(end) :]}"
    before, head, rest = text.partition(MODELS)
    part, further, rest = rest.partition("\n## ")
    found = costs()
    row = re.compile(r"^(\| `([\w-]+)` \| [^|\n]+ \| )\d[^|\n]*( \|)", flags=re.M)
    part = row.sub(lambda m: f"{m[1]}{found[m[2]]}{m[3]}" if m[2] in found else m[0], part)
    return before + head + part + further + rest
