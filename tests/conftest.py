"""Fixtures shared by the tests: tiny random backbones, their cards, and a world to run commands in."""

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from memory_bench.backbone.model import Backbone
from memory_bench.card import BackboneCard
from memory_bench.data import Library
from memory_bench.testing.backbones import card_of, tiny_backbone

torch.set_num_threads(1)  # tiny matrices: threads only wait for each other


@pytest.fixture
def make_backbone() -> Callable[..., Backbone]:
    """``make_backbone(family, **config)``: llama, gpt2, opt, or qwen3 (Llama family with q/k norms and key shift)."""
    return tiny_backbone


@pytest.fixture
def make_card() -> Callable[..., BackboneCard]:
    """``make_card(backbone, window=8)``."""
    return card_of


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


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Generated books and studies, and a random Llama of 2 layers with a byte-level BPE. Read only."""
    from memory_bench.backbone.tokenizer import train_bpe

    root, rng = tmp_path_factory.mktemp("world"), Random(0)
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


@pytest.fixture
def invoke(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """``invoke(*arguments)``: exit code, standard output and standard error of the command in the world."""
    from memory_bench.cli import main

    for name, value in world.environment().items():
        monkeypatch.setenv(name, value)

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def data(tmp_path: Path) -> Library:
    """The real data; tests that need them skip without."""
    folder = os.environ.get("MEMORY_BENCH_DATA")
    if not folder:
        pytest.skip("MEMORY_BENCH_DATA does not name a folder with the real data")
    return Library(Path(folder), tmp_path, stand_ins=False, hub=False)
