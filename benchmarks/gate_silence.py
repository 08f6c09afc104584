"""Is the regression gate silent on a run that did not change? Runs the suite again and again, and draws seeds anew.

    python benchmarks/gate_silence.py OUT --against results/reference/smoke-cpu.jsonl --runs 10 --fresh 7

Every run is checked with `memory-bench check`. Of the runs, `--fresh` have three seeds that the reference does not
know; the others have its own, and must repeat its numbers. Finished cells in OUT are kept. `--resample FOLDER` takes in
addition the folder of a run of many seeds, and checks every three of them against a reference of the others, which
needs no training at all.
"""

import argparse
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import chain, combinations
from pathlib import Path

from memory_bench.gate.judge import compare
from memory_bench.gate.lines import Line, lines
from memory_bench.report.grouping import grouped
from memory_bench.store import Store

COMMAND = (sys.executable, "-P", "-m", "memory_bench.cli")
SEEDS = 3


def rerun(out: Path, reference: Path, seeds: str, executor: str) -> tuple[int, str]:
    """One run of the suite and its check: exit code and last lines."""
    made = ("run", "--suite", "gate", "--seeds", seeds, "--executor", executor, "--out", str(out), "--quiet")
    subprocess.run([*COMMAND, *made], check=True, stdout=subprocess.DEVNULL)
    checked = [*COMMAND, "check", str(out), "--against", str(reference)]
    done = subprocess.run(checked, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.split("\n\n")[-1].strip() or done.stderr.strip()


def only(line: Line, seeds: tuple[int, ...]) -> Line:
    """The line over some of its seeds."""
    return replace(line, values={seed: line.values[seed] for seed in seeds})


def resample(folder: Path) -> tuple[int, int, int, Counter[str]]:
    """(draws, red, improved, which lines) of every three seeds against a reference of the others."""
    known = lines(list(chain.from_iterable(grouped(Store.open(folder)))), {})
    seeds = tuple(known[0].values)
    named: Counter[str] = Counter()
    red = improved = draws = 0
    for some in combinations(seeds, SEEDS):
        others = tuple(seed for seed in seeds if seed not in some)
        found = compare([only(line, some) for line in known], [only(line, others) for line in known])
        draws, red, improved = draws + 1, red + (not found.holds), improved + bool(found.of("improved"))
        named.update(f"{f.line.model} {f.line.metric} {f.line.slice}" for f in found.of("worse", "improved"))
    return draws, red, improved, named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--fresh", type=int, default=7)
    parser.add_argument("--first", type=int, default=100, help="the first of the fresh seeds")
    parser.add_argument("--executor", default="local")
    parser.add_argument("--resample", type=Path)
    given = parser.parse_args()
    if given.resample is not None:
        draws, red, improved, named = resample(given.resample)
        print(f"{draws} draws of {SEEDS} seeds: {red} red, {improved} improved; {dict(named)}")
    silent = 0
    for number in range(given.runs):
        first = given.first + SEEDS * number if number < given.fresh else 0
        seeds = ",".join(str(first + i) for i in range(SEEDS))
        code, said = rerun(given.out / f"run-{number}", given.against, seeds, given.executor)
        silent += code == 0 and "IMPROVED" not in said
        print(f"run {number}, seeds {seeds}: {code}, {said.splitlines()[0]}", flush=True)
    print(f"{silent} of {given.runs} silent")


if __name__ == "__main__":
    main()
