"""Plan against actual: plans cells, runs them, and prints both as a Markdown table.

`python benchmarks/plan.py --models hmt,rmt --tasks pg19 --budget smoke --out DIR`; data and cache are those of
`memory-bench` (``MEMORY_BENCH_DATA``, ``MEMORY_BENCH_CACHE``).
"""

import argparse
import sys
from pathlib import Path

from memory_bench.command import commands
from memory_bench.command.foretelling import show_plan
from memory_bench.report import planned
from memory_bench.report.board import collect
from memory_bench.report.layout import to_markdown
from memory_bench.report.scorers import scorers
from memory_bench.running.environment import cache_folder, data_folder, hub_allowed
from memory_bench.running.options import Options
from memory_bench.store import Store


def main() -> int:
    """0 where every cell has a result."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("models", "tasks", "backbone", "budget", "seeds", "limit"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--no-controls", action="store_true")
    given = parser.parse_args()
    options = Options(
        models=given.models, tasks=given.tasks, backbone=given.backbone, budget=given.budget, seeds=given.seeds,
        suite="", data=data_folder(None), stand_ins=True, out=given.out, limit=given.limit, settings=(),
        controls=not given.no_controls, executor="local", retry="", force=False, quiet=False, as_json=False,
        cache=cache_folder(), hub=hub_allowed(),
    )  # fmt: skip
    prepared = commands.prepare(options)
    show_plan(prepared.grid, prepared.backbones, options)
    store = Store.open_or_create(prepared.out)
    store.write_run(commands.grid_json(prepared))
    commands.carry_out(prepared, store, options)
    records = [r for cell in prepared.grid.cells if (r := store.record(cell.key)) is not None]
    for board in collect(store, scorers([store])):
        if (table := planned.table(board)) is not None:
            sys.stdout.write(f"{board.task} on {board.backbone}\n\n{to_markdown(table)}\n\n")
    return 0 if all(r.status in ("ok", "over_budget") for r in records) else 1


if __name__ == "__main__":
    raise SystemExit(main())
