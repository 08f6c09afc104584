"""Two laws of memories, counted on the models themselves: how pools forget, and what every memory holds.

    python benchmarks/capacity.py [--json OUT]

First table: the share of a block's rows that later writes leave in a pool, beside (1 - K/N)^t (`decay`). Second table:
N random items are written into a memory that has room for `capacity` of them, and each is asked for with its own key.
No training takes place: what is tested is the memory and the search in it, not what a model learns to write.
"""

import argparse
import json
import math
import platform
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import decay
import torch
import torch.nn.functional as F
from decay import Kept, Setting
from torch import Tensor

from memory_bench.baselines.armt import ARMT, ARMTConfig, Association
from memory_bench.baselines.longmem import LongMem, LongMemConfig
from memory_bench.baselines.memorizing import Memorizing, MemorizingConfig
from memory_bench.baselines.mplus import MPlus
from memory_bench.baselines.parts.chunk_reader import ChunkReader
from memory_bench.baselines.parts.knn import retrieve_and_attend
from memory_bench.testing import tiny_backbone

LOADS = (0.5, 1.0, 2.0)  # items written, as a share of the capacity
WRITE = 16  # tokens per write into a store
POOLS = (Setting("small backbone", "memoryllm", 4, 32, 200, 0), Setting("small backbone", "mplus", 4, 24, 20, 0))
Line = dict[str, Any]


def drawn(*shape: int, seed: int) -> Tensor:
    """Random vectors of length 1."""
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def halves(found: Tensor) -> Line:
    """Recall of all items of ``[..., items]`` and of their older and newer half."""
    older, newer = found.double().chunk(2, dim=-1)
    return {"recall": found.double().mean().item(), "older": older.mean().item(), "newer": newer.mean().item()}


def ring(load: float, *, slots: int = 256, unit: bool = True, seed: int = 0) -> Line:
    """Memorizing Transformer's store: the value that the one best entry for a stored key gives is that key's own."""
    model = Memorizing(tiny_backbone("llama"), MemorizingConfig(segment=WRITE, slots=slots), torch.Generator())
    store, items = model.open(8).store, int(load * slots)
    rows, kv_heads, _, width = store.keys[0].shape
    keys, values = (drawn(rows, kv_heads, items, width, seed=2 * seed + i) for i in range(2))
    if not unit:
        keys = torch.randn(keys.shape, generator=torch.Generator().manual_seed(seed))
    for k, v in zip(keys.split(WRITE, dim=2), values.split(WRITE, dim=2), strict=True):
        store = store.write([k], [v], torch.ones(rows, k.shape[2], dtype=torch.bool))
    got = retrieve_and_attend(keys, store.keys[0], store.values[0], 1, valid=store.valid())
    return {"items": items, "capacity": slots, **halves((got - values).abs().amax(dim=-1) < 1e-5)}


def bank(load: float, *, size: int = 256, chunk: int = 1, wanted: int = 1, seed: int = 0) -> Line:
    """LongMem's bank: a stored key's token is in one of the `wanted` chunks that it retrieves."""
    config = LongMemConfig(segment=WRITE, memory_size=size, chunk=chunk, retrieved_tokens=chunk * wanted)
    state, items = LongMem(tiny_backbone("llama"), config, torch.Generator().manual_seed(1)).open(8), int(load * size)
    rows, kv_heads, _, width = state.waiting_keys.shape
    keys, values = (drawn(rows, kv_heads, items, width, seed=2 * seed + i) for i in range(2))
    for k, v in zip(keys.split(WRITE, dim=2), values.split(WRITE, dim=2), strict=True):
        state = state.write(k, v, torch.ones(rows, k.shape[2], dtype=torch.bool))
    reader = ChunkReader.of(state, wanted)
    heads = slice(0, kv_heads)
    found = reader.chunks.values.unflatten(2, (-1, chunk))  # [rows, kv_heads, chunks, chunk, head]
    chosen = reader.retrieve(keys)[:, heads]  # [rows, kv_heads, items, wanted]
    index = chosen.flatten(2)[..., None, None].expand(-1, -1, -1, *found.shape[3:])
    got = found.gather(2, index).view(rows, kv_heads, items, -1, width)
    near = (got - values[..., None, :]).abs().amax(dim=-1).amin(dim=-1)
    return {"items": items, "capacity": size, **halves(near < 1e-5)}


def pool(load: float, *, seed: int = 0, setting: Setting = POOLS[0]) -> Line:
    """MemoryLLM's pool with blocks as items: rows still held; an item counts as `any` while one row is."""
    blocks = setting.pool // setting.block
    items, written, now = int(load * blocks), [], torch.empty(0)
    for number, state in enumerate(decay.states(decay.build(setting), setting.streams, items, seed)):
        now = decay.fingerprints(state.pool)
        written += [now[..., -setting.block :]] if number else []
    held = torch.stack([torch.isin(block, now) for block in written], dim=2)  # [streams, layers, items, K]
    keep = 1 - setting.share
    law = (1 - keep**items) / (items * setting.share)
    whole = {"any": held.any(dim=-1).double().mean().item(), "law": law}
    return {"items": items, "capacity": blocks, **halves(held.double().mean(dim=-1)), **whole}


def long_term(load: float, *, scale: float = 1.0, seed: int = 0, setting: Setting = POOLS[1]) -> Line:
    """M+'s pool and store with rows as items: found in the pool, or among the rows retrieved by its own key.

    Entries get random keys of length `scale` in place of the untrained retriever's; `held` counts rows that are
    anywhere.
    """
    model = decay.build(setting)
    assert isinstance(model, MPlus)
    config, capacity = model.config, store_limit(model) + setting.pool
    writes, written, state = round(load * capacity / setting.block), [], model.open(1)
    for number, after in enumerate(decay.states(model, 1, writes, seed)):
        state = after
        written += [decay.fingerprints(state.pool[..., -setting.block :, :])] if number else []
    items = torch.cat(written, dim=2)[0, 0]
    in_pool, in_store = (decay.fingerprints(state.pool)[0, 0], decay.in_store(state)[0, 0])
    long, pending = state.host_long_term, state.host_pending
    keys = scale * drawn(len(in_store), config.retriever_width, seed=seed)
    split = long.ages[0].shape[1]
    parts = ((long, keys[:split]), (pending, keys[split:]))
    long, pending = (replace(s, keys=(k[None], *s.keys[1:])) for s, k in parts)
    state = replace(state, host_long_term=long, host_pending=pending, host_query_tokens=torch.ones(1, dtype=torch.long))
    hits = []
    for place in range(len(in_store)):
        asked = replace(state, query=keys[None, place, None].expand(1, model.backbone.layers, -1)[:, :, None])
        rows = model.recall(asked, 0, torch.zeros(1, 1, state.pool.shape[-1]), None)
        rows = decay.fingerprints(rows[:, None].expand(-1, model.backbone.layers, -1, -1))
        hits.append(bool((rows[0, 0] == in_store[place]).any()))
    found = torch.isin(items, in_pool) | torch.isin(items, in_store[torch.tensor(hits, dtype=torch.bool)])
    held = torch.isin(items, torch.cat([in_pool, in_store])).double().mean().item()
    return {"items": len(items), "capacity": capacity, **halves(found), "held": held}


def store_limit(model: MPlus) -> int:
    """Rows of a layer that the store holds at least before it loses one: all lives but the last, full."""
    config = model.config
    lives = math.ceil((config.initial_recall_frequency - 0.01) / config.recall_decay)
    return (lives - 1) * config.merge_every * config.tokens_per_block


class Pairs:
    """An ARMT layer set up to store given pairs: keys and values are parts of the hidden state, the gate is open."""

    def __init__(self, size: int, nu: int, rows: int, correction: bool = True) -> None:
        self.size, self.values = size, 64
        width = size + self.values
        backbone = tiny_backbone("llama", hidden_size=width, intermediate_size=16)
        config = ARMTConfig(segment=8, memory_tokens=1, associative_size=size, nu=nu, correction=correction)
        model = ARMT(backbone, config, torch.Generator().manual_seed(1)).eval()
        self.layer: Association = model.layers[0]  # type: ignore[assignment]
        with torch.no_grad():
            for linear in (self.layer.query, self.layer.key):
                linear.weight.copy_(torch.eye(size, width))
            self.layer.value.weight.copy_(torch.diag((torch.arange(width) >= size).float()))
            self.layer.gate.weight.zero_()
            self.layer.gate.bias.fill_(30.0)
        state = model.open(rows)
        self.features, self.state, self.fresh = model.features, (state.matrices[0], state.normalisers[0]), state.written

    @torch.no_grad()
    def write(self, keys: Tensor, values: Tensor) -> None:
        """Pairs ``[rows, n, …]``, one after the other."""
        hidden = torch.cat([keys, values], dim=-1)
        for one in hidden.split(1, dim=1):
            self.state = self.layer.write(one, self.state, ~self.fresh, torch.ones_like(self.fresh))
            self.fresh = torch.ones_like(self.fresh)

    @torch.no_grad()
    def read(self, keys: Tensor) -> Tensor:
        """What is found under `keys`: ``[rows, n, values]``."""
        hidden = F.pad(keys, (0, self.values))
        return (self.layer.read(hidden, *self.state) - hidden)[..., self.size :]


def nearest(got: Tensor, values: Tensor) -> Tensor:
    """``[rows, n]``: which of the `values` of its row is nearest to each."""
    return torch.cdist(got, values).argmin(dim=-1)


def association(load: float, *, size: int = 16, nu: int = 3, rows: int = 20, seed: int = 0) -> Line:
    """ARMT's matrix with as many random pairs as `load` times its features; then a tenth of the keys is rewritten.

    `rewritten`: the new value is nearest; `forgotten`: the old one still is; `kept`: recall of the others.
    """
    memory = Pairs(size, nu, rows)
    items = max(2, int(load * memory.features))
    keys = torch.randn(rows, items, size, generator=torch.Generator().manual_seed(3 * seed))
    values, other = (drawn(rows, items, memory.values, seed=3 * seed + i) for i in (1, 2))
    memory.write(keys, values)
    found = nearest(memory.read(keys), values) == torch.arange(items)
    some = torch.arange(items) % 10 == 0
    memory.write(keys[:, some], other[:, some])
    candidates = torch.cat([values, other[:, some]], dim=1)
    after = nearest(memory.read(keys), candidates)
    old = after == torch.arange(items)
    new = after[:, some] == items + torch.arange(int(some.sum()))
    kept = old[:, ~some].double().mean().item()
    changed = {"rewritten": new.double().mean().item(), "forgotten": old[:, some].double().mean().item(), "kept": kept}
    return {"items": items, "capacity": memory.features, **halves(found), **changed}


MEMORIES: dict[str, tuple[Callable[..., Line], Line, tuple[float, ...]]] = {
    "memorizing: ring, keys of length 1": (ring, {}, LOADS),
    "memorizing: ring, keys of random length": (ring, {"unit": False}, LOADS),
    "longmem: bank, chunks of 1": (bank, {}, LOADS),
    "longmem: bank, chunks of 4, 1 retrieved": (bank, {"chunk": 4}, LOADS),
    "longmem: bank, chunks of 4, 16 retrieved": (bank, {"chunk": 4, "wanted": 16}, LOADS),
    "memoryllm: pool, blocks": (pool, {}, LOADS),
    "mplus: pool and store, keys of length 1": (long_term, {}, LOADS),
    "mplus: pool and store, keys of length 8": (long_term, {"scale": 8.0}, LOADS),
    "armt: 96 features (16 x 2 x 3)": (association, {}, (0.03, 0.125, 0.25, *LOADS)),
    "armt: 192 features (32 x 2 x 3)": (association, {"size": 32}, (0.03, 0.125, 0.25, *LOADS)),
    "armt: 32 features (16 x 2 x 1)": (association, {"nu": 1}, (0.07, 0.125, 0.25, *LOADS, 4.0)),
}


def pools() -> list[Line]:
    """The first table's data."""
    found = []
    for setting in decay.SETTINGS:
        counted = decay.forget(setting)
        correlation, error = decay.between_layers(counted, max(1, setting.pool // setting.block // 2))
        found.append(
            {
                **{k: getattr(setting, k) for k in ("title", "model", "block", "pool", "streams", "initialized")},
                "exactly_replaced": counted.replaced,
                "p_uniform_places": decay.uniformity(setting, counted) if setting.initialized else None,
                "layer_correlation": correlation,
                "layer_correlation_error": error,
                "lines": decay.compare(setting, counted, every=max(1, setting.writes // 6)),
            }
        )
    return found


def store() -> Line:
    """What M+'s store adds to its pool, write by write."""
    model = decay.build(POOLS[1])
    assert isinstance(model, MPlus)
    kept: Kept = decay.keep(model, POOLS[1].streams, 260)
    later = [0, 1, 8, 32, 64, 126, 127, 128, 135, 143, 159, 191, 259]
    lines = [
        {"t": t, "pool": kept.pool[t], "held": kept.held[t], "law": law, "everything": kept.everything[t]}
        for t, law in zip(later, decay.store_law(model.config, later), strict=True)
    ]
    facts = {"first_loss_at_write": kept.first_loss, "oldest_first": kept.in_order, "most_entries": max(kept.store)}
    return {"limit": store_limit(model), **facts, "lines": lines}


def about() -> Line:
    """What the numbers were made with."""
    import transformers

    folder = Path(__file__).parent
    asked = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or None
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    seeds = {"streams": "0 … streams - 1", "texts": decay.TEXT, "encodings": 0, "weights": 0}
    return {"commit": commit, "versions": versions, "seeds": seeds, "device": "cpu", "dtype": "float32"}


def shown(line: Line) -> str:
    """A line of a table."""
    return "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items())


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write everything there")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {"about": about(), "decay": pools(), "store": store()}
    for entry in report["decay"]:
        print(f"\n{entry['model']}, {entry['title']}: " + shown({k: v for k, v in entry.items() if k != "lines"}))
        print("\n".join("    " + shown(line) for line in entry["lines"]))
    print("\nM+ pool and store: " + shown({k: v for k, v in report["store"].items() if k != "lines"}))
    print("\n".join("    " + shown(line) for line in report["store"]["lines"]))
    report["capacity"] = []
    for title, (measure, options, loads) in MEMORIES.items():
        print(f"\n{title}")
        for load in loads:
            line = {"load": load, **measure(load, **options)}
            print("    " + shown(line), flush=True)
            report["capacity"].append({"memory": title, **line})
    if asked.json:
        asked.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
