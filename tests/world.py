"""A machine without a network, made in a second: a random backbone, a few generated books and studies, a budget."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from memory_bench.testing.backbones import tiny_backbone


@dataclass(frozen=True)
class World:
    """A machine without a network: a backbone folder, a data folder, a budget of a few batches, a cache."""

    backbone: Path
    data: Path
    budget: Path
    cache: Path

    def arguments(self, *more: str) -> list[str]:
        """Of `run` and `plan`; `more` comes last and wins."""
        given = ["--backbone", str(self.backbone), "--data", str(self.data), "--budget", str(self.budget)]
        return [*given, "--executor", "inline", "--limit", "3", *more]

    def environment(self) -> dict[str, str]:
        """For a command in this world."""
        return {"MEMORY_BENCH_CACHE": str(self.cache), "HF_HUB_OFFLINE": "1", "MEMORY_BENCH_DATA": ""}


def _prose(rng: Random, words: int) -> str:
    known = ["whale", "sea", "captain", "the", "of", "and", "ship", "harpoon", "über", "white", "sail", "storm"]
    return " ".join(rng.choice(known) for _ in range(words)) + ".\n"


def make_world(root: Path) -> World:
    """Generated books and studies, and a random Llama of 2 layers with a byte-level BPE, in the folder `root`."""
    from memory_bench.backbone.tokenizer import train_bpe

    rng = Random(0)
    here = World(root / "tiny-llama", root / "data", root / "little.toml", root / "cache")
    for folder in (here.backbone, here.data / "pg19", here.data / "pubmedqa", here.cache):
        folder.mkdir(parents=True)
    for split, words in (("train", 1500), ("validation", 50), ("test", 60)):
        books = [
            {"pg_id": f"{split}{i}", "title": "T", "author": "A", "text": _prose(rng, words + 9 * i)} for i in range(3)
        ]
        with gzip.open(here.data / f"pg19/books_{split}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.write("".join(json.dumps(book) + "\n" for book in books))
    studies = {
        str(i): {
            "QUESTION": _prose(rng, 6),
            "CONTEXTS": [_prose(rng, 20), _prose(rng, 10)],
            "LONG_ANSWER": "So.",
            "final_decision": ("yes", "no", "maybe")[i % 3],
        }
        for i in range(12)
    }
    (here.data / "pubmedqa/ori_pqal.json.gz").write_bytes(gzip.compress(json.dumps(studies).encode()))
    truth = {key: study["final_decision"] for key, study in studies.items() if int(key) < 6}
    (here.data / "pubmedqa/test_ground_truth.json").write_text(json.dumps(truth))
    train_bpe([_prose(rng, 500)], 300, here.backbone)
    backbone: Any = tiny_backbone("llama", vocab_size=300, max_position_embeddings=32)
    backbone.model.save_pretrained(here.backbone)
    here.budget.write_text(
        'train_tokens = 1000\neval_seconds = 60\ntrain_seconds = 60\n[tasks.pg19]\nextent = "full"\n'
    )
    return here
