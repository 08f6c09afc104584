"""What large runs cost: reports by models of a board and by records of a folder, and the command that waits for cells.

    python benchmarks/scale.py [RECORDS] [CELLS]

Results are made up (`tests/synthetic.py`); seconds are the processor's, plots left out. What is wanted: a board of 40
models in no more than 8 times the time of one of 5, 2,000 records in less than a minute, and less than a second to find
out what is done already. CELLS (0: none) are run on the local executor with workers that compute nothing
(`tests/waiting.py`): the command shall stay below 150 MB and take less than 10 ms for each.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from world import make_world

from memory_bench.report.build import build
from memory_bench.store import Store
from synthetic import TASKS, make_cell, make_record, question_samples, text_samples


def board(folder: Path, task: str, models: int) -> Store:
    """A window and `models` - 1 others on one task, one seed."""
    store = Store.open_or_create(folder)
    for number in range(models):
        cell = make_cell("truncation" if not number else f"model-{number:02}", task)
        share = {16: 0.4 + 0.01 * number, 64: 0.5}
        samples = text_samples(0, 0.002 * number) if task == "pg19" else question_samples(0, share)
        store.write_record(make_record(cell, samples), samples)
    return store


def many(folder: Path, records: int) -> Store:
    """Five models on as many boards as make `records`."""
    store = Store.open_or_create(folder)
    samples = question_samples(0, {16: 0.5, 64: 0.5}, questions=9)
    record = make_record(make_cell("rmt", "pubmedqa"), samples)
    for number in range(records):
        cell = make_cell(f"model-{number % 5}", "pubmedqa", seed=number // 5 % 2)
        task = replace(cell.task, config={"data": f"made {number // 10}"})
        cell = replace(cell, task=task)
        store.write_record(replace(record, cell=cell), samples.assign(seed=cell.training.seed))
    return store


def seconds(work: Callable[[], Any]) -> float:
    """Of the processor."""
    before = time.process_time()
    work()
    return time.process_time() - before


def waiting(folder: Path, cells: int) -> dict[str, Any]:
    """What `tests/waiting.py` says of a run of so many cells (a multiple of 2)."""
    world = make_world(folder)
    asked = ["--executor", "local", "--models", "rmt", "--tasks", "pg19,pubmedqa", "--seeds", str(cells // 2)]
    asked += ["--no-controls", "--quiet", "--out", str(folder / "out")]
    command = [sys.executable, str(Path(__file__).parents[1] / "tests" / "waiting.py"), *world.arguments(*asked)]
    environment = {**os.environ, **world.environment(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(records: int, cells: int) -> None:
    root = Path(tempfile.mkdtemp())
    try:
        for task in ("pg19", "pubmedqa"):
            stores = [board(root / f"{task}-{models}", task, models) for models in (5, 5, 40)]
            _, five, forty = (seconds(lambda s=s: tables(s)) for s in stores)  # the first one loads libraries
            print(f"{task}: 5 models {five:.2f} s, 40 models {forty:.2f} s: {forty / five:.1f} times", flush=True)
        store = many(root / "many", records)
        keys = [folder.name for folder in store.cells.iterdir()]
        time.sleep(3)  # until the files are not of a moment ago
        first, again = (seconds(lambda: Store(store.folder).statuses(keys)) for _ in range(2))
        print(f"{records:,} records: what is done is known after {first:.2f} s, again after {again:.2f} s", flush=True)
        print(f"{records:,} records: report after {seconds(lambda: tables(Store(store.folder))):.1f} s", flush=True)
        if cells:
            few, more = (waiting(root / f"cells-{number}", number) for number in (20, cells))
            each = 1000 * (more["seconds"] - few["seconds"]) / max(1, cells - 20)
            held, loaded = more["bytes"] / 1e6, ", ".join(more["loaded"]) or "nothing big"
            print(f"{cells:,} cells: the command holds {held:.0f} MB at most, {each:.1f} ms for each; loaded: {loaded}")
    finally:
        shutil.rmtree(root)


def tables(store: Store) -> None:
    report = build(store, TASKS)
    report.markdown()
    report.csv()
    report.tex()


if __name__ == "__main__":
    main(*(int(given) for given in (sys.argv[1:] + ["2000", "2000"][len(sys.argv) - 1 :])))
