"""Remakes the boards under results/leaderboards, and README's tables from them.

    nohup nice python benchmarks/boards.py --data DIR >boards.log 2>&1 &
    python benchmarks/boards.py --only tiny-stand-ins --dry-run     # the exact commands and what they would cost
    python benchmarks/boards.py --readme                            # README's tables from the shipped records
    python benchmarks/boards.py --render DIR --only tiny-real       # draws the finished run DIR/tiny-real again

- Every board is one `memory-bench` command, in the table `BOARDS`. It runs into a folder of its own under --work, which
  is named after the content of the code, the versions of packages and the processor: what was interrupted goes on, and
  what other code or another machine made is never taken over.
- Only finished boards are shipped, and only after the last one ran: records say whether the checkout was changed, and
  a shipped board changes it. For the same reason it starts from a clean checkout only (--dirty allows others).
- The hub is not asked, so that stand-ins stay stand-ins and the backbone is the one the records name.
- Exit codes: 0 all boards were shipped, 1 some were not (the others were), 2 a mistake in the command.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import readme

from memory_bench.cell import digest
from memory_bench.record import changed_files, processor, versions
from memory_bench.running.options import parse_seeds

ROOT = Path(__file__).resolve().parent.parent
LEADERBOARDS, CLAIMS = Path("results/leaderboards"), Path("results/claims")
CODE = ("memory_bench", "hmt", "baselines", "tasks")
SHIPPED = ("leaderboard.md", "leaderboard.csv", "run.json")


@dataclass(frozen=True)
class Board:
    """A shipped board.

    Attributes:
        command: what follows `memory-bench`, without --data and --out.
        real: it takes --data; without it it would be of stand-ins, and another board.
        parent: where its folder is.
        also: run only where it is named with --only.
    """

    command: str
    real: bool = False
    parent: Path = LEADERBOARDS
    also: bool = False


BOARDS: Mapping[str, Board] = {
    # README's first command, with five seeds instead of two: it draws its conclusions here.
    "tiny-stand-ins": Board("run --models hmt,rmt,mplus --tasks pg19,pubmedqa --seeds 5"),
    "retention-tiny": Board("run --suite retention-tiny"),
    "fact-updates": Board("run --suite fact-updates"),
    "tiny-real": Board("run --suite tiny", real=True),
    "squad-real": Board(
        "run --models memorizing,sliding-window,full-context --tasks squad-retention --backbone smollm2-135m-q4 "
        "--budget cpu-smol --limit 6",
        real=True,
    ),
    "smollm2-real": Board(
        "run --suite cpu-smol --no-controls --backbone smollm2-135m-q4 "
        "--models truncation,sliding-window,memorizing,memorizing[top_k=0],retrieval,full-context,xl-cache,"
        "infllm,emllm,extended-mind,sirllm",
        real=True,
    ),
    # Below what a growing cache needs for these books: who ends at the limit, where, and what the others do with it.
    "tiny-limit": Board(
        "run --models full-context,sliding-window,rmt --tasks pg19 --set pg19.extent=bytes:20000-60000 "
        "--budget cpu-minutes[device_bytes=200MB] --seeds 2 --limit 8",
        real=True,
    ),
    "reproduced": Board("reproduce", real=True, parent=CLAIMS, also=True),
}


def arguments(name: str, work: Path, data: Path | None) -> list[str]:
    """What follows `memory-bench` for a board."""
    board = BOARDS[name]
    own = shlex.split(board.command)
    own += ["--data", str(data)] if board.real else []
    own += ["--no-stand-ins"] if board.real and own[0] == "run" else []
    return [*own, "--out", str(work / name)]


def environment() -> dict[str, str]:
    """Of a board's process: no hub, and real data only where --data says so."""
    return {name: value for name, value in os.environ.items() if name != "MEMORY_BENCH_DATA"} | {"HF_HUB_OFFLINE": "1"}


def of_code() -> str:
    """12 hexadecimal digits of what numbers depend on beside the command: the code's content, packages, processor."""
    files = sorted(p for folder in CODE for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".toml"))
    content = [[str(p.relative_to(ROOT)), hashlib.sha256(p.read_bytes()).hexdigest()] for p in files]
    return digest([content, versions(), processor()])[:12]


def core_minutes(name: str) -> float | None:
    """What the shipped records say a board takes on one core, scaled to the seeds asked for; None: none are shipped."""
    path = ROOT / BOARDS[name].parent / name / "records.jsonl"
    if not path.is_file():
        return None
    plain = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    had = len({record["cell"]["training"]["seed"] for record in plain})
    own = shlex.split(BOARDS[name].command)
    asked = len(parse_seeds(own[own.index("--seeds") + 1], had)) if "--seeds" in own else had
    spent = sum((r["usage"]["train_seconds"] + r["usage"]["eval_seconds"]) * r["provenance"]["threads"] for r in plain)
    return float(spent) / 60 * asked / had


def run(name: str, work: Path, data: Path | None) -> str:
    """Run a board or go on with it; why it is not complete, empty if it is."""
    command = [sys.executable, "-P", "-m", "memory_bench.cli", *arguments(name, work, data)]
    code = subprocess.run(command, cwd=ROOT, env=environment(), check=False).returncode
    if BOARDS[name].parent == CLAIMS:  # 1: some claims do not hold, which is a result
        return "" if code in (0, 1) and (work / name / "claims.json").is_file() else f"exit code {code}"
    return "" if code == 0 else f"exit code {code}"


def shipped_records(folder: Path) -> str:
    """``records.jsonl`` of a run: the cells of its last command, one a line, by key, without training curves.

    Raises:
        ValueError: a cell has no record, or a failed one.
    """
    lines = []
    for key in sorted(json.loads((folder / "run.json").read_text(encoding="utf-8"))["grid"]["cells"]):
        path = folder / "cells" / key / "record.json"
        if not path.is_file():
            raise ValueError(f"cell {key} has no record")
        plain: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if plain["status"] == "failed":
            raise ValueError(f"{plain['title']} failed: {plain['detail']}")
        plain["provenance"].pop("curve", None)
        lines.append(_line(plain))
    return "".join(lines)


def _line(plain: Mapping[str, Any]) -> str:
    return json.dumps(plain, sort_keys=True, ensure_ascii=False) + "\n"


def ship(name: str, folder: Path, root: Path = ROOT) -> None:
    """Copy a finished board to where it is kept, in place of the old one.

    Raises:
        ValueError: it is not complete; nothing was copied.
    """
    board = BOARDS[name]
    target, content = root / board.parent / name, shipped_records(folder)
    claims = board.parent == CLAIMS
    wanted = ("claims.json", "claims.md", "run.json") if claims else SHIPPED
    if missing := [file for file in wanted if not (folder / file).is_file()]:
        raise ValueError(f"{', '.join(missing)} is not there")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    (target / "records.jsonl").write_text(content, encoding="utf-8")
    for file in wanted:
        shutil.copyfile(folder / file, target / file)
    if claims:
        counted = [json.loads(p.read_text(encoding="utf-8")) for p in sorted((folder / "counted").glob("*.json"))]
        (target / "counted.jsonl").write_text("".join(map(_line, counted)), encoding="utf-8")
        return
    (target / "plots").mkdir()
    for plot in sorted((folder / "plots").glob("*.png")):
        shutil.copyfile(plot, target / "plots" / plot.name)


def render(name: str, folder: Path) -> None:
    """Make the tables and plots of a finished run again, with today's code and without running a cell.

    Raises:
        ValueError: it is not complete, or lacks samples: shipped records have none, and what is paired needs them.
    """
    if BOARDS[name].parent == CLAIMS:
        raise ValueError("claims have no tables to draw")
    if not (folder / "run.json").is_file():
        raise ValueError(f"{folder} is no run")
    for line in shipped_records(folder).splitlines():
        plain = json.loads(line)
        if plain["metrics"] and not (folder / "cells" / plain["key"] / "samples.parquet").is_file():
            raise ValueError(f"cell {plain['key']} has no samples, without which nothing is paired")
    command = [sys.executable, "-P", "-m", "memory_bench.cli", "report", str(folder), "--quiet"]
    shutil.rmtree(folder / "plots", ignore_errors=True)  # of other code they may have other names
    if code := subprocess.run(command, cwd=ROOT, env=environment(), check=False, stdout=subprocess.DEVNULL).returncode:
        raise ValueError(f"`memory-bench report` ended with exit code {code}")


def rewrite_readme(*, dry_run: bool) -> int:
    """README's tables from the shipped records; prints the lines that change."""
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = readme.updated(before)
    old = set(before.split("\n"))
    for line in after.split("\n"):
        if line not in old:
            print(line)
    if not dry_run:
        path.write_text(after, encoding="utf-8")
    print("README.md agrees with the records." if before == after else "README.md differs." if dry_run else "Written.")
    return 0


def plan(names: Sequence[str], work: Path, data: Path | None) -> int:
    """Print the exact commands, and what the shipped records say they cost."""
    total = 0.0
    for name in names:
        minutes = core_minutes(name)
        total += minutes or 0.0
        cost = "no records to judge by" if minutes is None else f"{minutes:.0f} core minutes"
        print(f"# {name}: {cost}")
        print(f"HF_HUB_OFFLINE=1 memory-bench {shlex.join(arguments(name, work, data))}")
    print(f"# together {total:.0f} core minutes by the seconds in the shipped records, without starts and downloads")
    return 0


def main(words: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Remake the boards under results/leaderboards.")
    parser.add_argument("--only", default="", help=f"comma-separated: {', '.join(BOARDS)}; default: all but reproduced")
    parser.add_argument("--data", type=Path, help="folder of real data")
    parser.add_argument("--work", type=Path, default=Path("results/runs"), help="where runs are made and continued")
    parser.add_argument(
        "--dry-run", action="store_true", help="print commands and cost; with --readme: print, not write"
    )
    parser.add_argument("--dirty", action="store_true", help="also from a checkout with changes; the records say so")
    parser.add_argument(
        "--render", type=Path, metavar="DIR", help="run nothing: draw and ship the finished runs DIR/NAME again"
    )
    parser.add_argument("--readme", action="store_true", help="only rewrite README's tables from the shipped records")
    options = parser.parse_args(words)
    if options.readme:
        return rewrite_readme(dry_run=options.dry_run)
    names = [n for n in options.only.split(",") if n] or [n for n, board in BOARDS.items() if not board.also]
    if unknown := [name for name in names if name not in BOARDS]:
        parser.error(f"no board is called {', '.join(unknown)}; there are {', '.join(BOARDS)}")
    if options.render:
        return finish(names, options.render.resolve(), dict.fromkeys(names, ""), again=True)
    data = options.data.resolve() if options.data else None
    if real := [name for name in names if BOARDS[name].real and data is None and not options.dry_run]:
        parser.error(f"{', '.join(real)} need --data DIR, the folder of real data")
    work = options.work.resolve() / f"boards-{of_code()}"
    if options.dry_run:
        return plan(names, work, data or Path("DIR"))
    if changed_files(ROOT) and not options.dirty:
        parser.error(
            "the checkout has changes that are not committed, which every record would say; commit, or --dirty"
        )
    why = {name: run(name, work, data) for name in names}
    return finish(names, work, why)


def finish(names: Sequence[str], work: Path, why: dict[str, str], *, again: bool = False) -> int:
    """Ship what is complete (drawn `again` first) and say what is not; the exit code."""
    for name in names:
        if not why[name]:
            try:
                if again:
                    render(name, work / name)
                ship(name, work / name)
            except ValueError as error:
                why[name] = str(error)
    for name in names:
        print(f"{name}: {f'not shipped, {why[name]}' if why[name] else 'shipped'}", file=sys.stderr)
    return 1 if any(why.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
