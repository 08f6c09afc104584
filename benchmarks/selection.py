"""What the choice of blocks is worth: InfLLM and EM-LLM with official, causal, per-token, random and no choice.

    nice python benchmarks/selection.py --data DIR --out results/selection [--books 8] [--tokens 3584]
    python benchmarks/selection.py --out results/selection --table

Nats per token of the test books' tokens from 640 on, every variant against the official choice, with the interval of
the paired difference over books. `smollm2-135m-q4`, nothing is trained. A finished (variant, book) is a line of
``scores.jsonl`` in the folder, with options, the model's version, commit, packages and processor; a repeated command
goes on behind those that have its options and version. ``selection.json`` holds the table of what is there. Only books
that all variants of a method have are compared.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memory_bench import plugins
from memory_bench.corpus import Line
from memory_bench.data.library import Library
from memory_bench.driver.stream import line_nll
from memory_bench.record import checkout, processor, versions
from memory_bench.running.environment import cache_folder, data_folder, hub_allowed
from memory_bench.statistics.stats import ratio_interval
from memory_bench.zoo.named import Backbones, Loaded

FIRST = 640  # tokens before it are read, not scored
BACKBONE = "smollm2-135m-q4"
COMMON = {"segment": 128, "execution_block": 128, "local_window": 256, "sink_tokens": 32, "representative_tokens": 4}
BLOCKS = {**COMMON, "block_size": 32, "selected_blocks": 8}
EVENTS = {**COMMON, "min_block_size": 8, "max_block_size": 64, "retrieved_tokens": 256}


@dataclass(frozen=True)
class Variant:
    """A configured model; `method` is what it is compared within."""

    title: str
    method: str
    model: str
    options: Mapping[str, Any]


VARIANTS = (
    Variant("official choice", "infllm", "infllm", {**BLOCKS, "selection": "official"}),
    Variant("causal", "infllm", "infllm", BLOCKS),
    Variant("no blocks", "infllm", "infllm", {**BLOCKS, "selected_blocks": 0}),
    Variant("random blocks", "infllm", "infllm", {**BLOCKS, "selection": "random"}),
    Variant("every token alone", "infllm", "infllm", {**BLOCKS, "selection": "token"}),
    Variant("full attention", "infllm", "full-context", {"segment": 128}),
    Variant(
        "official choice, official far mask",
        "infllm",
        "infllm",
        {**BLOCKS, "selection": "official", "far_mask": "none"},
    ),
    Variant("official choice", "emllm", "emllm", {**EVENTS, "selection": "official"}),
    Variant("causal", "emllm", "emllm", EVENTS),
    Variant("no events", "emllm", "emllm", {**EVENTS, "retrieved_tokens": 0}),
    Variant("random events", "emllm", "emllm", {**EVENTS, "selection": "random"}),
    Variant("every token alone", "emllm", "emllm", {**EVENTS, "selection": "token"}),
)


@torch.no_grad()
def measure(variant: Variant, loaded: Loaded, ids: torch.Tensor, number: int) -> float:
    """Summed surprisal (nats) of the scored tokens of a text."""
    cls = plugins.load("models", variant.model)
    model = cls(loaded.backbone, cls.Config(**variant.options), torch.Generator().manual_seed(0)).eval()
    scored = torch.arange(len(ids)) >= FIRST
    return line_nll(model, [Line(ids, scored, seed=number)])[0]


def known(folder: Path) -> list[dict[str, Any]]:
    """The finished lines that the variants here would give."""
    path = folder / "scores.jsonl"
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    asked = {(v.method, v.title): (dict(v.options), version(v)) for v in VARIANTS}
    return [r for r in lines if asked.get((r["method"], r["title"])) == (r["options"], r["version"])]


def version(variant: Variant) -> int:
    """Of the variant's model."""
    return int(plugins.load("models", variant.model).version)


def missing(folder: Path, books: int, tokens: int) -> Iterator[tuple[int, Variant]]:
    """(book, variant) without a line, book after book, so that an interrupted run has whole books."""
    done = {(r["book"], r["method"], r["title"], r["read"]) for r in known(folder)}
    for number in range(books):
        for variant in VARIANTS:
            if (number, variant.method, variant.title, tokens) not in done:
                yield number, variant


def run(folder: Path, data: Path, books: int, tokens: int) -> None:
    """Add what is missing to ``scores.jsonl``."""
    torch.set_num_threads(1)
    library = Library(data, cache_folder(), stand_ins=False, hub=hub_allowed())
    loaded = Backbones(library, cache_folder(), hub=hub_allowed()).load(BACKBONE)
    texts = {}
    for document in library.books("test"):
        if len(texts) == books:
            break
        ids = torch.tensor(loaded.encode(document.text[: 12 * tokens])[0][:tokens])
        if len(ids) == tokens:
            texts[len(texts)] = (document.id, ids)
    folder.mkdir(parents=True, exist_ok=True)
    for number, variant in missing(folder, len(texts), tokens):
        name, ids = texts[number]
        nats = measure(variant, loaded, ids, number)
        line = {"book": number, "id": name, "method": variant.method, "title": variant.title, "read": tokens}
        line |= {"tokens": tokens - FIRST, "nats": nats, "options": dict(variant.options), "version": version(variant)}
        line |= {**checkout(), "backbone": BACKBONE, "packages": versions(), "processor": processor()}
        with (folder / "scores.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        sys.stderr.write(f"{variant.method} {variant.title}, book {number + 1}: {nats / line['tokens']:.4f}\n")


def table(folder: Path) -> list[dict[str, Any]]:
    """Per variant nats per token, and the difference to its method's official choice with its interval."""
    lines, rows = known(folder), []
    for method in dict.fromkeys(v.method for v in VARIANTS):
        own = [v for v in VARIANTS if v.method == method]
        scores = {v.title: {r["book"]: r for r in lines if (r["method"], r["title"]) == (method, v.title)} for v in own}
        books = sorted(set.intersection(*(set(found) for found in scores.values())))
        if not books:
            continue
        nats = {title: np.array([found[b]["nats"] for b in books]) for title, found in scores.items()}
        tokens = np.array([scores[own[0].title][b]["tokens"] for b in books], dtype=float)
        for variant in own:
            value, low, high = ratio_interval(nats[variant.title] - nats[own[0].title], tokens, seed=0)
            rows.append(
                {
                    "method": method,
                    "variant": variant.title,
                    "books": len(books),
                    "nats_per_token": float(nats[variant.title].sum() / tokens.sum()),
                    "against_official": [value, low, high],
                }
            )
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table for a reader."""
    text = "| method | choice | books | nats per token | against the official choice |\n|---|---|---|---|---|\n"
    for row in rows:
        value, low, high = row["against_official"]
        beside = f"{value:+.4f} [{low:+.4f}, {high:+.4f}]" if value or low or high else "0"
        text += f"| {row['method']} | {row['variant']} | {row['books']} | {row['nats_per_token']:.4f} | {beside} |\n"
    return text


def main() -> int:
    """0 once everything asked for is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--books", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=3584)
    parser.add_argument("--table", action="store_true", help="only make the table of what is there")
    given = parser.parse_args()
    if given.tokens <= FIRST:
        parser.error(f"--tokens must be more than {FIRST}, the first that is scored.")
    if not given.table:
        data = data_folder(given.data)
        if data is None:
            parser.error("name the data folder with --data.")
        run(given.out, data, given.books, given.tokens)
    rows = table(given.out)
    about = {"backbone": BACKBONE, "first_scored": FIRST, "rows": rows}
    (given.out / "selection.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(markdown(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
