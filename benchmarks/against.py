"""What a change is worth: this checkout's speed and memory against an older one's, in pairs of alternating order.

    python benchmarks/against.py --against REV [--lines memorizing,hmt] [--repeats 5] [--json results/speed/FILE]

Both checkouts are copied into folders of their own and run by this Python, with this file's measures. A line's ratio is
the median over the pairs of (this / REV), in brackets its quartiles. Seconds are those of the processor, user and
system, of all processes: other work on the machine disturbs them less than the wall's. What both computed is compared
too, and said: nothing is faster that computes something else.

Lines (`--lines`; default: all but `run`):

- window, memorizing, full-context: a segment of 512 tokens with its loss, on SmolLM2-135M's shape with random weights,
  after 8,192 and 9,000 tokens, and the window's; both as they are, and memorizing and full-context over the window;
- hmt: a training step on `tiny`'s shape (8 segments of 8 rows, AdamW), and which share of it is inside matrix products;
- start: one more cell of a run on the local executor (a random backbone, a few steps of training);
- memory: the most that all processes of such a run hold side by side, with pages that several share counted once (sums
  of the proportional set sizes, looked at ten times a second);
- run: the headline command with stand-ins and an empty cache (minutes), seconds and memory.

M+ and LoRA against their prediction are `benchmarks/adapters.py`'s.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from speed import quartiles

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("hmt", "baselines", "tasks", "results")  # that the package has inside it when it is installed
STEPS = ("window", "memorizing", "full-context", "hmt")
COMMANDS = ("start", "memory", "run")
LINES = (*STEPS, *COMMANDS)
CELLS = 6  # in the longer of the runs that `start` compares
LOOK = 0.1  # seconds between two looks at memory


@dataclass(frozen=True, slots=True)
class Side:
    """A checkout: its name and the folder that Python finds its package in."""

    name: str
    folder: Path

    def environment(self, **more: str) -> dict[str, str]:
        """Of a process that runs it."""
        own = {"PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return {**os.environ, **own, **more}


@dataclass(frozen=True, slots=True)
class Line:
    """What came of a line: values of REV and of this checkout by pairs, and what was found equal."""

    line: str
    unit: str
    before: list[float]
    after: list[float]
    equal: str

    @property
    def ratio(self) -> tuple[float, float, float]:
        """This checkout's over REV's: median and quartiles over the pairs."""
        return quartiles([a / b for a, b in zip(self.after, self.before, strict=True)])

    def __str__(self) -> str:
        middle, low, high = self.ratio
        was, now = quartiles(self.before)[0], quartiles(self.after)[0]
        return (
            f"{self.line:<28}{was:>10.3f}{now:>10.3f} {self.unit:<8}{middle:>7.3f} ({low:.3f}-{high:.3f})  {self.equal}"
        )


def checkout(revision: str, folder: Path) -> Side:
    """`revision` (empty: the files as they are here) as a package in `folder`."""
    source = ROOT
    if revision:
        source = folder / "source"
        source.mkdir(parents=True)
        archive = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", str(source)], input=archive, check=True)
    ignored = shutil.ignore_patterns("__pycache__", "runs", "leaderboards")
    shutil.copytree(source / "memory_bench", folder / "memory_bench", ignore=ignored)
    for name in FOLDERS:
        shutil.copytree(source / name, folder / "memory_bench" / name, ignore=ignored)
    return Side(revision or "here", folder)


# Steps: a process per side keeps its model, and both take turns


class Stepper:
    """A process that steps whenever it is asked to, and tells what that took."""

    def __init__(self, side: Side, line: str) -> None:
        command = [sys.executable, str(Path(__file__).with_name("steps.py")), line]
        self._process = subprocess.Popen(
            command, env=side.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        told: dict[str, Any] = json.loads(self._process.stdout.readline())
        return told

    def close(self) -> None:
        self._process.communicate()


def steps(line: str, sides: Sequence[Side], repeats: int) -> list[Line]:
    """Seconds of a step, and over those of the window where the line has one."""
    steppers = [Stepper(side, line) for side in sides]
    told = paired(steppers, repeats, warm=1)
    for stepper in steppers:
        stepper.close()
    before, after = told
    same = all(b["digest"] == a["digest"] for b, a in zip(before, after, strict=True))
    equal = f"{before[0]['what']}: {'equal to the bit' if same else 'NOT EQUAL'}"
    found = [Line(line, "s", *([t["seconds"] for t in side] for side in told), equal)]
    if "window" in before[0]:
        over = ([t["seconds"] / t["window"] for t in side] for side in told)
        found.append(Line(f"{line} over the window", "", *over, equal))
    if "products" in before[0]:
        shares = ([t["products"] for t in side] for side in told)
        found.append(Line(f"{line}: share in products", "", *shares, equal))
    return found


def paired(calls: Sequence[Callable[[], Any]], repeats: int, *, warm: int = 0) -> list[list[Any]]:
    """What each call returned in each round, after `warm` rounds to warm up; every other round is reversed."""
    found: list[list[Any]] = [[] for _ in calls]
    for number in range(repeats + warm):
        order = list(enumerate(calls))
        for place, call in reversed(order) if number % 2 else order:
            told = call()
            if number >= warm:
                found[place].append(told)
    return found


# Commands: everything that they start is counted


@dataclass(frozen=True, slots=True)
class Ran:
    """Seconds of the processor and bytes of a command with all its processes, and the metrics of its cells."""

    seconds: float
    bytes: int
    metrics: dict[str, Any]


def ran(side: Side, arguments: Sequence[str], environment: dict[str, str], folder: Path) -> Ran:
    """`memory-bench run` with `arguments`, into a fresh `folder`."""
    command = [sys.executable, "-m", "memory_bench", "run", *arguments, "--out", str(folder), "--quiet"]
    with (folder.parent / f"{folder.name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, env=side.environment(**environment), stdout=log, stderr=log, cwd=folder.parent
        )
        most, done = [0], threading.Event()
        looking = threading.Thread(target=_look, args=(process.pid, most, done))
        looking.start()
        _, status, usage = os.wait4(process.pid, 0)
        done.set()
        looking.join()
    if status:
        raise SystemExit(f"{side.name}: {' '.join(command)} ended with {status}; see {log.name}")
    records = (json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("cells/*/record.json"))
    metrics = {json.dumps(r["cell"], sort_keys=True): [r["status"], r["metrics"]] for r in records}
    return Ran(usage.ru_utime + usage.ru_stime, most[0], metrics)


def _look(pid: int, most: list[int], done: threading.Event) -> None:
    """The most that a process and its descendants hold, shared pages counted once."""
    while not done.wait(LOOK):
        total = 0
        try:
            root = psutil.Process(pid)
            for process in (root, *root.children(recursive=True)):
                try:
                    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
                    total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
                except (OSError, StopIteration):
                    continue
        except psutil.Error:
            continue
        most[0] = max(most[0], total)


def commands(line: str, sides: Sequence[Side], repeats: int, root: Path) -> list[Line]:
    """A run in the tests' small world, or the headline's."""
    sys.path.insert(0, str(ROOT / "tests"))
    from world import make_world

    (root / line).mkdir()
    numbers = iter(range(1_000_000))
    if line == "run":
        headline = ["--models", "hmt,rmt,mplus", "--tasks", "pg19,pubmedqa", "--stand-ins"]

        def whole(side: Side) -> Ran:
            folder = root / line / f"{next(numbers)}"
            return ran(side, headline, {"MEMORY_BENCH_CACHE": f"{folder}-cache"}, folder)

        told = paired([lambda s=s: whole(s) for s in sides], repeats)
    else:
        world = make_world(root / line / "world")

        def few(side: Side, cells: int) -> Ran:
            asked = ["--executor", "local", "--models", "rmt", "--tasks", "pg19", "--no-controls"]
            asked += ["--seeds", str(cells)]
            return ran(side, world.arguments(*asked), world.environment(), root / line / f"{next(numbers)}")

        def more(side: Side) -> Ran:
            if line == "memory":
                return few(side, CELLS)
            short, long = few(side, 1), few(side, 1 + CELLS)
            return Ran((long.seconds - short.seconds) / CELLS, long.bytes, long.metrics)

        told = paired([lambda s=s: more(s) for s in sides], repeats)
    before, after = told
    same = all(b.metrics == a.metrics for b, a in zip(before, after, strict=True))
    equal = f"metrics of {len(before[0].metrics)} cells: {'equal to the bit' if same else 'NOT EQUAL'}"
    seconds = Line(line, "s", *([r.seconds for r in side] for side in told), equal)
    held = Line(f"{line}: all processes", "GB", *([r.bytes / 1e9 for r in side] for side in told), equal)
    return {"start": [seconds], "memory": [held], "run": [seconds, held]}[line]


def main(arguments: Sequence[str] | None = None) -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, metavar="REV", help="a revision of this repository")
    parser.add_argument("--lines", default=",".join(x for x in LINES if x != "run"), help="separated by commas")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for the lines, the machine and the revisions")
    chosen = parser.parse_args(arguments)
    wanted = chosen.lines.split(",")
    if unknown := [name for name in wanted if name not in LINES]:
        parser.error(f"there is no line {unknown[0]}; lines are {', '.join(LINES)}")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        sides = [checkout(chosen.against, root / "before"), checkout("", root / "after")]
        print(f"{'line':<28}{chosen.against[:9]:>10}{'here':>10} {'':<8}{'ratio':>7} (quartiles)   what was compared")
        found: list[Line] = []
        for line in wanted:
            made = steps(line, sides, chosen.repeats) if line in STEPS else commands(line, sides, chosen.repeats, root)
            for row in made:
                print(row, flush=True)
            found += made
            if chosen.json:
                chosen.json.write_text(json.dumps(told(chosen.against, found), indent=1) + "\n", encoding="utf-8")


def told(against: str, lines: Sequence[Line]) -> dict[str, Any]:
    """What the file holds."""
    from memory_bench.record import processor, versions

    revisions = [against, "HEAD"]
    named = [
        subprocess.run(["git", "rev-parse", "--short", r], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for r in revisions
    ]
    machine = {"processor": processor(), "cores": os.cpu_count(), "system": platform.system(), **versions()}
    rows = [{**asdict(line), "ratio": line.ratio} for line in lines]
    return {"against": named[0].strip(), "here": named[1].strip(), "machine": machine, "lines": rows}


if __name__ == "__main__":
    main()
