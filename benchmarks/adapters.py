"""Speed of every model relative to its bare backbone, beside what its arithmetic predicts and what official code takes.

    python benchmarks/adapters.py [--models rmt,hmt] [--repeats 9] [--json OUT]

One process, one thread, float32, one row, a random Llama (8 layers, width 256). "Bare" is the Hugging Face model itself
over independent segments of the same length and the same tokens. Every round times each variant once, in an order
that is reversed every other round; a ratio is the median over rounds of (model / bare) within a round, in brackets its
quartiles. The clock is this process's CPU time, which other processes disturb less than the wall's (``--wall``).

What is timed (`tasks` of a setting):

- stream: 4,096 tokens without gradients, every token predicted and scored, segment by segment (the product's driver);
- write and ask: 4,096 tokens are only written, then 64 tokens are read (the official use of pool models);
- write: the same without the question, against the backbone without its head;
- ask: 64 tokens read with memory full, against 64 tokens of the backbone alone;
- train: forward over 1,024 tokens and one backward; pool models write three segments and predict the fourth.

Predicted is the ratio of `MemoryModel.flops` to `Backbone.flops`; a training step counts three forwards, two where
the backbone below adapters is frozen, and one of what runs without gradients. Where a model searches, the operations
of the search are replaced by the time that a plain matrix product and `topk` of its shapes take in the same rounds.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from speed import Bare, Search, Tasks, llama, paired, quartiles

from memory_bench import plugins
from memory_bench.backbone.model import Backbone
from memory_bench.protocol import MemoryModel

STREAM, TRAIN = 4096, 1024  # tokens


@dataclass(frozen=True)
class Official:
    """Ratio of an official implementation to its bare backbone: median and quartiles of paired repeats.

    Measured with the protocol above on two shared AVX2 cores, torch 2.13, one thread; single ratios scatter by a tenth.
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Setting:
    """A configured model, what is timed of it, and the official code's ratio where there is one."""

    title: str
    model: str
    config: dict[str, Any]
    tasks: dict[str, Official | None]
    frozen: bool = False  # the backbone's weights are not trained
    search: Search | None = None
    prepare: Callable[[MemoryModel[Any]], None] = field(default=lambda model: None)


PLAIN: dict[str, Official | None] = {"stream": None, "train": None}
POOL = {"segment": 256, "tokens_per_block": 32, "blocks": 16, "pool_initialized": True}
LORA = {"lora_rank": 16, "add_read_lora": True}


def fill_store(model: MemoryModel[Any]) -> None:
    """Long-term entries as if written long ago, all of different ages."""
    rng = torch.Generator().manual_seed(4)
    for entries in model.long_term.layers:  # type: ignore[union-attr]
        for name in ("tokens", "keys"):
            rows = getattr(entries, name)
            rows.copy_(torch.randn(rows.shape, generator=rng))
        entries.ages.copy_(torch.arange(len(entries.ages)).flip(0) + 512)
        entries.recall_frequencies.fill_(100.0)


def settings(layers: int) -> list[Setting]:
    """The table: sizes as in the official measurements."""
    return [
        Setting("truncation", "truncation", {"segment": 256}, PLAIN),
        Setting("xl-cache", "xl-cache", {"segment": 256}, PLAIN),
        Setting("sliding-window", "sliding-window", {"segment": 256}, PLAIN),
        Setting(
            "rmt",
            "rmt",
            {"segment": 256, "memory_tokens": 16},
            {"stream": Official(1.31, 1.30, 1.31), "train": Official(1.07, 1.07, 1.15)},
        ),
        Setting(
            "hmt",
            "hmt",
            {"segment": 224, "sensory_tokens": 32, "recall_width": 512, "cache": 100},
            {"stream": Official(1.91, 1.89, 1.96), "train": Official(1.65, 1.60, 1.71)},
        ),
        Setting(
            "armt",
            "armt",
            {"segment": 256, "memory_tokens": 16, "associative_size": 64},
            {"stream": Official(1.57, 1.39, 1.59), "train": Official(1.58, 1.31, 1.63)},
        ),
        Setting(  # official: lucidrains with an exact index, relative to its own attention without memory
            "memorizing",
            "memorizing",
            {"segment": 256, "layers": (3 * layers // 8,), "slots": 4096, "top_k": 32},
            {"stream": Official(1.54, 1.53, 1.58), "train": Official(1.15, 1.12, 1.32)},
            search=Search(8 * 256, 32, k=32, ranked=8 * 256, most=4096),
        ),
        Setting(
            "longmem",
            "longmem",
            {"segment": 256, "memory_size": 4096},
            PLAIN,
            search=Search(8 * 256, 32, k=16, ranked=8 * 256, most=1024, tokens_per_key=4),
        ),
        Setting("retrieval", "retrieval", {"segment": 256}, PLAIN),
        Setting(
            "memoryllm",
            "memoryllm",
            POOL,
            {
                "write and ask": Official(1.31, 1.13, 1.34),
                "write": Official(1.34, 1.34, 1.41),
                "ask": Official(2.21, 1.60, 2.26),
                "train": Official(1.21, 1.15, 1.22),
                "stream": None,
            },
        ),
        Setting(
            "memoryllm + LoRA",
            "memoryllm",
            POOL | LORA,
            {"write and ask": Official(1.23, 1.16, 1.24), "train": Official(1.09, 1.09, 1.19)},
            frozen=True,
        ),
        Setting(
            "mplus + LoRA",
            "mplus",
            {**POOL, **LORA, "retrieved_tokens": 128, "retriever_width": 16, "long_term_sizes": (4096,) * layers},
            {
                "write and ask": Official(1.50, 1.44, 1.50),
                "ask": Official(3.51, 3.42, 3.91),
                "train": Official(1.13, 1.12, 1.22),
                "stream": None,
            },
            frozen=True,
            search=Search(256, 16, k=128, ranked=1, most=4608, loaded=4096, tokens_per_key=8, layers=layers),
            prepare=fill_store,
        ),
    ]


@dataclass(frozen=True)
class Row:
    """A measured task of a model; ratios are to the bare backbone."""

    title: str
    task: str
    model_tokens_per_second: float
    bare_tokens_per_second: float
    ratio: float
    low: float
    high: float
    predicted: float
    official: Official | None


def measure(
    setting: Setting,
    backbone: torch.nn.Module,
    repeats: int,
    clock: Callable[[], float] = time.process_time,
    sizes: tuple[int, int] = (STREAM, TRAIN),
    tasks: Sequence[str] = (),
) -> list[Row]:
    """All rows of a setting; each side has its own copy of the backbone."""
    cls = plugins.load("models", setting.model)
    bare = Bare(copy.deepcopy(backbone))
    model = cls(Backbone(copy.deepcopy(backbone)), cls.Config(**setting.config), torch.Generator().manual_seed(0))
    model.eval()
    with torch.no_grad():
        setting.prepare(model)
    model.backbone.requires_grad_(not (setting.frozen or model.frozen_backbone))
    calls_of = Tasks(
        model, bare, *sizes, passes=2 if setting.frozen else 3, writes_first=setting.model in ("memoryllm", "mplus")
    ).tasks
    rows = []
    for task, official in setting.tasks.items():
        if tasks and task not in tasks:
            continue
        with torch.no_grad():
            timed = calls_of[task]()
            calls = [timed.bare, timed.model, *([setting.search.call(timed.searches)] if setting.search else [])]
            base, ours, *search = paired(calls, repeats, clock)
        predicted = timed.flops / timed.bare_flops
        if setting.search:
            predicted -= setting.search.flops(timed.searches) / timed.bare_flops
            predicted += quartiles([s / b for s, b in zip(search[0], base, strict=True)])[0]
        ratio, low, high = quartiles([o / b for o, b in zip(ours, base, strict=True)])
        speeds = (timed.tokens / statistics.median(s) for s in (ours, base))
        rows.append(Row(setting.title, task, *speeds, ratio, low, high, predicted, official))
    return rows


def shown(row: Row) -> str:
    """A line of the table."""
    official = f"{row.official.median:.2f} ({row.official.low:.2f}-{row.official.high:.2f})" if row.official else "-"
    return (
        f"{row.title:<18}{row.task:<15}{row.model_tokens_per_second:>9,.0f}{row.bare_tokens_per_second:>9,.0f}"
        f"{row.ratio:>8.2f} ({row.low:.2f}-{row.high:.2f}){row.predicted:>11.2f}{row.ratio / row.predicted:>7.2f}"
        f"   {official}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="", help="names separated by commas; default: all")
    parser.add_argument("--tasks", default="", help="tasks separated by commas; default: all")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--wall", action="store_true", help="the wall's clock instead of the process's CPU time")
    parser.add_argument("--json", help="file for the rows")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    backbone = llama()
    wanted, tasks = ([x for x in text.split(",") if x] for text in (chosen.models, chosen.tasks))
    clock = time.perf_counter if chosen.wall else time.process_time
    rows: list[Row] = []
    print(f"{'model':<18}{'task':<15}{'tok/s':>9}{'bare':>9}{'ratio':>8} (quartiles)   predicted  /pred   official")
    for setting in settings(backbone.config.num_hidden_layers):  # type: ignore[union-attr]
        if wanted and setting.model not in wanted:
            continue
        if setting.model not in plugins.installed("models"):
            print(f"{setting.title:<18}left out: no model '{setting.model}' is installed")
            continue
        for row in measure(setting, backbone, chosen.repeats, clock, tasks=tasks):
            rows.append(row)
            print(shown(row), flush=True)
    if chosen.json:
        with open(chosen.json, "w", encoding="utf-8") as file:
            json.dump([asdict(row) for row in rows], file, indent=1)


if __name__ == "__main__":
    main()
