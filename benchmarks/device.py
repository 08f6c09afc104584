"""What is measured when a GPU is at hand: one script that stops by itself, and keeps what it has after each item.

    python benchmarks/device.py --out OUT [--data DIR] [--seconds 540]
    python benchmarks/device.py --out OUT --toy          # the same items on the CPU at the size of a toy: does it run?

In this order, each with its share of the time: the tests' GPU tier (bfloat16 and CUDA conformance, budgets enforced by
the allocator), a board of all models under equal device seconds, streaming speed and peaks from 4k to 1M tokens beside
the bare backbone, and the trained memories, which are small enough to take away. An item that is cut off leaves what
it had: records are files, one a cell, and speed is one JSON line a model and length.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
MODELS = (
    "truncation", "sliding-window", "full-context", "rmt", "hmt", "armt", "memoryllm", "mplus", "memorizing", "longmem",
)  # fmt: skip
TASKS = "pg19,pubmedqa,squad-retention,key-value"
LENGTHS = (4_096, 16_384, 65_536, 262_144, 1_048_576)
TAKEN_AWAY = 40_000_000  # bytes of trained memories, in all
# Equal device seconds for all: what a lent quarter of an hour leaves for ten models.
BUDGET = 'name = "gpu-taste"\ndevice_bytes = 80_000_000_000\ntrain_seconds = 8\neval_seconds = 20\nseeds = 1\n'
TOY = 'name = "toy"\ntrain_seconds = 2\neval_seconds = 60\nseeds = 1\n'


@dataclass(frozen=True)
class Item:
    """A command and the share of the script's time that it may take."""

    name: str
    command: tuple[str, ...]
    share: float


def items(out: Path, data: Path | None, toy: bool) -> list[Item]:
    """What is run, in order."""
    models = MODELS[:3] if toy else MODELS
    board = [
        "run", "--models", ",".join(models), "--tasks", "pg19" if toy else TASKS, "--budget", str(out / "budget.toml"),
        "--backbone", "tiny" if toy else "smollm2-135m-q4", "--no-controls", "--limit", "1" if toy else "4",
        "--out", str(out / "board"), "--quiet",
    ]  # fmt: skip
    board += ["--data", str(data)] if data else []
    tests = ["tests/test_gpu.py", *(["-k", "bfloat16 and rmt"] if toy else ["-m", "gpu"])]
    here = (sys.executable, str(Path(__file__).resolve()), "--out", str(out))
    return [
        Item("tests", (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests), 0.3),
        Item("board", (sys.executable, "-m", "memory_bench", *board), 0.45),
        Item("speed", (*here, "--stream", *(["--toy"] if toy else [])), 0.2),
    ]


def run(chosen: Sequence[Item], out: Path, seconds: float) -> list[dict[str, Any]]:
    """Runs the items, each until its share or what is left is used up; what came of each, also in ``items.json``."""
    end, told = time.monotonic() + seconds, []
    for item in chosen:
        started = time.monotonic()
        allowed = min(item.share * seconds, end - started)
        if allowed <= 1:
            told.append({"item": item.name, "ended": "no time left"})
            continue
        with (out / f"{item.name}.log").open("w", encoding="utf-8") as log:
            process = subprocess.Popen(item.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            try:
                ended = f"exit code {process.wait(timeout=allowed)}"
            except subprocess.TimeoutExpired:
                process.terminate()  # a run takes its workers along
                try:
                    process.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    process.kill()
                ended = f"stopped after {allowed:.0f} s"
        told.append({"item": item.name, "ended": ended, "seconds": round(time.monotonic() - started, 1)})
        (out / "items.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return told


def streams(device: str, lengths: Sequence[int], names: Sequence[str], width: int) -> Iterator[dict[str, Any]]:
    """Tokens per second and peak bytes of streaming random text: one row a model and length, rising lengths.

    The backbone is a random Llama of `width`; "bare" is itself over independent segments.
    """
    from speed import llama

    from memory_bench import plugins
    from memory_bench.backbone.model import Backbone
    from memory_bench.budget import Budget
    from memory_bench.corpus import Line
    from memory_bench.driver.stream import line_nll
    from memory_bench.testing import card_of

    rng = torch.Generator().manual_seed(0)
    for length in lengths:
        for name in names:
            backbone = Backbone(llama(hidden=width, layers=4).to(device))
            cls = plugins.load("models", name)
            config = cls.fit(card_of(backbone, window=512), Budget("device"))
            model = cls(backbone, config, torch.Generator().manual_seed(0)).eval().to(device)
            ids = torch.randint(backbone.vocab, (length,), generator=rng)
            scored = torch.ones(length, dtype=torch.bool)
            scored[0] = False
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            started = time.perf_counter()
            try:
                with torch.no_grad():
                    line_nll(model, [Line(ids, scored)])
            except (torch.OutOfMemoryError, MemoryError) as error:
                yield {"model": name, "tokens": length, "refused": str(error).partition("\n")[0]}
                continue
            if device == "cuda":
                torch.cuda.synchronize()
            row = {"model": name, "tokens": length, "tokens_per_second": length / (time.perf_counter() - started)}
            yield row | ({"peak_bytes": torch.cuda.max_memory_allocated()} if device == "cuda" else {})


def take_away(out: Path) -> list[str]:
    """Copies the board's trained memories, smallest first, as long as they are small enough together."""
    found = sorted((out / "board" / "checkpoints").glob("*/weights.safetensors"), key=lambda path: path.stat().st_size)
    taken, held = [], 0
    for path in found:
        held += path.stat().st_size
        if held > TAKEN_AWAY:
            break
        target = out / "checkpoints" / path.parent.name
        target.mkdir(parents=True, exist_ok=True)
        for file in path.parent.iterdir():
            shutil.copy2(file, target)
        taken.append(path.parent.name)
    return taken


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 also where an item was cut off: ``items.json`` says so."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that comes of it")
    parser.add_argument("--data", type=Path, help="folder of real data")
    parser.add_argument("--seconds", type=float, default=540.0, help="when it stops by itself")
    parser.add_argument("--toy", action="store_true", help="on the CPU, at the size of a toy")
    parser.add_argument("--stream", action="store_true", help="only measure streaming (the item `speed`)")
    chosen = parser.parse_args(arguments)
    device = "cpu" if chosen.toy else "cuda"
    if not chosen.toy and not torch.cuda.is_available():
        sys.stderr.write("There is no CUDA device; --toy tries the script on the CPU.\n")
        return 2
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.stream:
        lengths, width = (LENGTHS[:1], 32) if chosen.toy else (LENGTHS, 576)
        with (chosen.out / "speed.jsonl").open("w", encoding="utf-8") as file:
            for row in streams(device, lengths, MODELS[:3] if chosen.toy else MODELS, width):
                file.write(json.dumps(row) + "\n")
                file.flush()
        return 0
    (chosen.out / "budget.toml").write_text(TOY if chosen.toy else BUDGET, encoding="utf-8")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    told = run(items(chosen.out.resolve(), chosen.data, chosen.toy), chosen.out, chosen.seconds)
    sys.stdout.write(json.dumps({"items": told, "checkpoints": take_away(chosen.out)}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
