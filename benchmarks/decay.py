"""How pools forget, counted: which rows of a block are left after later writes, and what M+'s long-term store adds.

Blocks are written by the models' own write passes over random text on a tiny random backbone. Every later position of
a row is known by its content, which nothing changes once it is written.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import beta, chi2, hypergeom
from torch import Tensor

from memory_bench.baselines.memoryllm import MemoryLLM, MemoryLLMConfig
from memory_bench.baselines.mplus import MPlus, MPlusConfig
from memory_bench.protocol import Segment
from memory_bench.testing import tiny_backbone

TEXT = 1 << 20  # between the seeds of streams and of texts


@dataclass(frozen=True)
class Setting:
    """K = `block` rows of N = `pool` rows are replaced by a write."""

    title: str
    model: str
    block: int
    pool: int
    streams: int
    writes: int
    initialized: bool = True  # False: the first block fills the pool with its copies

    @property
    def share(self) -> float:
        """K / N."""
        return self.block / self.pool


SETTINGS = (
    Setting("small backbone", "memoryllm", 4, 32, 400, 24),
    Setting("pretrained backbone", "memoryllm", 16, 320, 60, 60),
    Setting("official sizes", "memoryllm", 256, 12800, 4, 50),
    Setting("small backbone, first fill", "memoryllm", 4, 32, 400, 24, initialized=False),
    Setting("small backbone", "mplus", 4, 24, 400, 18),
    Setting("pretrained backbone", "mplus", 16, 256, 60, 48),
)


def build(setting: Setting, **options: Any) -> MemoryLLM | MPlus:
    """The model; a segment has as many tokens as a block has rows."""
    sizes = {"segment": setting.block, "tokens_per_block": setting.block, "blocks": setting.pool // setting.block}
    sizes |= {"pool_initialized": setting.initialized, **options}
    backbone, rng = tiny_backbone("llama", max_position_embeddings=1024), torch.Generator().manual_seed(1)
    if setting.model == "memoryllm":
        return MemoryLLM(backbone, MemoryLLMConfig(**sizes), rng).eval()
    return MPlus(backbone, MPlusConfig(retrieved_tokens=8, retriever_width=16, **sizes), rng).eval()


@torch.no_grad()
def states(model: MemoryLLM | MPlus, streams: int, writes: int, seed: int) -> Iterator[Any]:
    """The fresh state, then the state after every write of a random segment; streams draw from seeds of their own."""
    state = model.open(streams, seeds=range(seed, seed + streams))
    rng = torch.Generator().manual_seed(TEXT + seed)
    yield state
    for _ in range(writes):
        ids = torch.randint(model.backbone.vocab, (streams, model.config.segment), generator=rng)
        state = model.absorb(state, Segment.full(ids))
        yield state


def fingerprints(rows: Tensor) -> Tensor:
    """``[streams, layers, n]`` int64 of vectors ``[streams, layers, n, width]``.

    Equal for equal contents in the same stream and layer and, but for 1 in 2^64, only for these: fresh streams share
    their pools, and short texts can be equal.
    """
    words, rng, bound = rows.detach().float().contiguous().view(torch.int64), torch.Generator().manual_seed(0), 1 << 62
    odd = torch.randint(-bound, bound, words.shape[-1:], generator=rng) * 2 + 1
    salt = torch.randint(-bound, bound, (*rows.shape[:2], 1), generator=rng)
    return (words * odd).sum(dim=-1) + salt


@dataclass(frozen=True)
class Forgetting:
    """What was counted: ``left[t, stream, layer]`` rows of the first block after t later writes (copies included).

    Attributes:
        distinct: the same with copies counted once.
        replaced: every write left N - K rows of the pool and put K new ones at its end, in all streams and layers.
        drops: ``[pool]``, how often a write dropped the row at a place.
        merges: writes times streams times layers behind `drops`.
    """

    left: Tensor
    distinct: Tensor
    replaced: bool
    drops: Tensor
    merges: int


def forget(setting: Setting, seed: int = 0, **options: Any) -> Forgetting:
    """Write a block and then others."""
    model = build(setting, **options)
    left, distinct, replaced, merges = [], [], True, 0
    drops = torch.zeros(setting.pool, dtype=torch.int64)
    before, block = torch.empty(0), torch.empty(0)
    for number, state in enumerate(states(model, setting.streams, 1 + setting.writes, seed)):
        now = fingerprints(state.pool)  # [streams, layers, pool]
        if number == 1:
            block = now[..., -setting.block :]
        if number:
            left.append(torch.isin(now, block).sum(dim=-1))
            distinct.append(torch.isin(block, now).sum(dim=-1))
        if number > 1 or (number and setting.initialized):
            gone = ~torch.isin(before, now)
            fresh = ~torch.isin(now, before)
            copies = not setting.initialized  # a copy that is dropped leaves its fingerprint
            replaced &= copies or bool((gone.sum(dim=-1) == setting.block).all())
            replaced &= bool(fresh[..., -setting.block :].all()) and not bool(fresh[..., : -setting.block].any())
            drops += gone.sum(dim=(0, 1))
            merges += gone[..., 0].numel()
        before = now
    return Forgetting(torch.stack(left), torch.stack(distinct), replaced, drops, merges)


def exact(setting: Setting) -> np.ndarray:
    """``[t, rows left]``: the distribution of what is left when every write drops exactly K of N rows at random."""
    start = setting.block if setting.initialized else setting.pool
    counts = np.arange(start + 1)
    # [rows before, rows after]
    step = hypergeom.pmf(counts[:, None] - counts[None], setting.pool, counts[:, None], setting.block)
    found = [np.eye(start + 1)[start]]
    for _ in range(setting.writes):
        found.append(found[-1] @ step)
    return np.stack(found)


def compare(setting: Setting, counted: Forgetting, every: int = 1) -> list[dict[str, Any]]:
    """A line for every `every`-th t: counted and expected shares, their distance, and the fit of the distribution.

    ``z`` uses the exact standard deviation; ``low`` and ``high`` are Clopper and Pearson's for independent rows, and
    therefore a little wide: exactly K go, so that rows of a block do not go independently.
    """
    model, law = build(setting), exact(setting)
    start, lines = law.shape[1] - 1, []
    for t in range(0, setting.writes + 1, every):
        seen = counted.left[t].flatten().numpy()
        mean = law[t] @ np.arange(start + 1)
        spread = math.sqrt(max(0.0, law[t] @ (np.arange(start + 1) - mean) ** 2))
        hits, trials = int(seen.sum()), start * len(seen)
        lines.append(
            {
                "t": t,
                "left": hits / trials,
                "low": float(beta.ppf(0.025, hits, trials - hits + 1)) if hits else 0.0,
                "high": float(beta.ppf(0.975, hits + 1, trials - hits)) if hits < trials else 1.0,
                "law": (1 - setting.share) ** t,
                "expected_retention": model.expected_retention(t * setting.block),
                "z": float((seen.mean() - mean) / spread * math.sqrt(len(seen))) if spread > 1e-9 else 0.0,
                "p_distribution": fit(np.bincount(seen, minlength=start + 1), law[t] * len(seen)),
                "distinct": float(counted.distinct[t].double().mean()) / setting.block,
            }
        )
    return lines


def fit(seen: np.ndarray, expected: np.ndarray) -> float | None:
    """Pearson's p of counts, with neighbouring cells pooled until 5 are expected; None where one cell is left."""
    if len(seen) > len(expected):
        return 0.0  # more rows are left than there were
    cells, open_cell = [], np.zeros(2)
    for pair in zip(seen, expected, strict=True):
        open_cell = open_cell + pair
        if open_cell[1] >= 5:
            cells, open_cell = [*cells, open_cell], np.zeros(2)
    if len(cells) < 2:
        return None
    cells[-1] = cells[-1] + open_cell
    found = np.array(cells)
    return float(chi2.sf(((found[:, 0] - found[:, 1]) ** 2 / found[:, 1]).sum(), len(cells) - 1))


def uniformity(setting: Setting, counted: Forgetting) -> float:
    """p of the places of dropped rows being equally likely (K of N without replacement)."""
    wanted = counted.merges * setting.share
    deviation = ((counted.drops.double() - wanted) ** 2).sum().item() / (wanted * (1 - setting.share))
    return float(chi2.sf(deviation * (setting.pool - 1) / setting.pool, setting.pool - 1))


def between_layers(counted: Forgetting, t: int) -> tuple[float, float]:
    """Correlation over the streams of what two layers have left after t writes, and its standard error if they are
    independent."""
    left = counted.left[t].double()
    return torch.corrcoef(left.T)[0, 1].item(), 1 / math.sqrt(len(left))


@dataclass(frozen=True)
class Kept:
    """M+ write by write: shares of all rows written so far, over streams and layers.

    Attributes:
        pool: the first block's rows in the pool.
        held: the first block's rows in pool or store.
        everything: all written rows in pool or store.
        store: entries of a layer.
        first_loss: the first write after which a row is nowhere.
        in_order: at any time the store is the newest of what was dropped, in the order in which it was dropped.
    """

    pool: list[float]
    held: list[float]
    everything: list[float]
    store: list[int]
    first_loss: int | None
    in_order: bool


def keep(model: MPlus, streams: int, writes: int, seed: int = 0) -> Kept:
    """Follow every row of every stream and layer."""
    found = Kept([], [], [], [], None, True)
    first_loss, in_order, size = None, True, model.config.tokens_per_block
    before, block, written, dropped = (torch.empty(0),) * 4
    for number, state in enumerate(states(model, streams, writes, seed)):
        now, stored = fingerprints(state.pool), in_store(state)
        if number == 0:
            before, written, dropped = now, now, now[..., :0]
            continue
        block = now[..., -size:] if number == 1 else block
        gone = before[~torch.isin(before, now)].view(*now.shape[:2], -1)
        dropped = torch.cat([dropped, gone], dim=-1)
        written = torch.cat([written, now[..., -size:]], dim=-1)
        count = stored.shape[-1]
        in_order &= stored.equal(dropped[..., dropped.shape[-1] - count :])
        held = torch.cat([now, stored], dim=-1)
        missing = ~torch.isin(written, held)
        first_loss = number if first_loss is None and bool(missing.any()) else first_loss
        found.pool.append(torch.isin(block, now).double().mean().item())
        found.held.append(torch.isin(block, held).double().mean().item())
        found.everything.append(1 - missing.double().mean().item())
        found.store.append(count)
        before = now
    return Kept(found.pool, found.held, found.everything, found.store, first_loss, in_order)


def in_store(state: Any) -> Tensor:
    """Fingerprints ``[streams, layers, entries]`` of merged and pending entries, in order."""
    layers = zip(state.host_long_term.tokens, state.host_pending.tokens, strict=True)
    return fingerprints(torch.stack([torch.cat(pair, dim=1) for pair in layers], dim=1))


def store_law(config: MPlusConfig, later: Sequence[int]) -> list[float]:
    """The expected share of a first block that pool or store hold after so many later writes.

    A row that is dropped at write w enters at the next multiple of `merge_every` and lives for as many merges, that one
    included, as decay takes to use its frequency up.
    """
    share, every = config.tokens_per_block / config.pool_tokens, config.merge_every
    lives = math.ceil((config.initial_recall_frequency - 0.01) / config.recall_decay)

    def dies(write: int) -> int:
        return every * (math.ceil(write / every) + lives - 1)

    return [
        (1 - share) ** t + sum(share * (1 - share) ** (w - 2) for w in range(2, t + 2) if t + 1 < dies(w))
        for t in later
    ]
