"""What claims count on a model itself, beside its scores: parameters it adds, rows a pool keeps, where recall goes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from memory_bench import plugins
from memory_bench.backbone.outline import outline
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.episode import Encode
from memory_bench.protocol import MemoryModel, Segment
from memory_bench.testing import tiny_backbone

FILLER = " $"  # as in HMT's diluted books
STREAMS, WRITES, BLOCK, BLOCKS = 400, 24, 4, 8  # a block of 4 rows in a pool of 32


def _card(name: str, family: str, width: int, layers: int, heads: int, mlp: int, parameters: int) -> BackboneCard:
    """A backbone by its published sizes; what the count does not need is left small."""
    return BackboneCard(name, family, width, layers, heads, heads, width // heads, mlp, 64, 512, True, parameters)


# Sizes of the published checkpoints (their config.json); OPT has 2,048 positions.
PUBLISHED = {
    card.name: card
    for card in (
        _card("SmolLM2-135M", "llama", 576, 30, 9, 1536, 134_515_008),
        replace(_card("OPT-350M", "opt", 1024, 24, 16, 4096, 331_196_416), max_positions=2048),
        replace(_card("OPT-2.7B", "opt", 2560, 32, 32, 10240, 2_651_596_800), max_positions=2048),
        _card("Llama-2-7B", "llama", 4096, 32, 32, 11008, 6_738_415_616),
    )
}


def added_share(model: str, backbone: str) -> float:
    """Parameters that a model adds at its default size, as a share of those of a backbone in `PUBLISHED`.

    For methods that add nothing to the layers: one layer stands for all.
    """
    cls, card = plugins.load("models", model), PUBLISHED[backbone]
    config = cls.fit(card, Budget("unlimited"))
    one_layer = outline(replace(card, layers=1, mlp_width=8), full=True)
    built: MemoryModel[Any] = cls(one_layer, config, torch.Generator().manual_seed(0))
    return built.added_parameters() / card.parameters


@torch.no_grad()
def beyond_law(model: str, seeds: Sequence[int]) -> np.ndarray:
    """How much more of a block a pool keeps than its law says: mean over 1 to 24 later writes ``[seeds, streams]``.

    Streams of random text on a tiny random backbone; rows are known by their content, which later writes do not change.
    """
    cls, backbone = plugins.load("models", model), tiny_backbone("llama", max_position_embeddings=1024)
    sizes = {"segment": BLOCK, "tokens_per_block": BLOCK, "blocks": BLOCKS, "pool_initialized": True}
    built: MemoryModel[Any] = cls(backbone, cls.Config(**sizes), torch.Generator().manual_seed(1)).eval()
    found = []
    for seed in seeds:
        rng = torch.Generator().manual_seed(1_000_003 + seed)
        state = built.open(STREAMS, seeds=range(seed * STREAMS, (seed + 1) * STREAMS))
        beyond = torch.zeros(STREAMS, dtype=torch.float64)
        block = torch.empty(0)
        for write in range(1 + WRITES):
            ids = torch.randint(backbone.vocab, (STREAMS, BLOCK), generator=rng)
            state = built.absorb(state, Segment.full(ids))
            pool = state.pool  # [streams, layers, rows, width]
            if not write:
                block = pool[:, :, -BLOCK:]
                continue
            same = (pool[:, :, :, None] == block[:, :, None]).all(dim=-1)  # [streams, layers, rows, block]
            left = same.any(dim=2).double().mean(dim=(1, 2))
            expected = built.expected_retention(write * BLOCK)
            assert expected is not None, f"{model} has no law"
            beyond += (left - expected) / WRITES
        found.append(beyond.numpy())
    return np.stack(found)


@torch.no_grad()
def filler_preference(model: MemoryModel[Any], encode: Encode, texts: Sequence[str], seed: int) -> np.ndarray:
    """Recall's weight on filler minus that on text ``[texts]``; each segment of text is followed by one of filler.

    At every segment of text as many segments of filler as of text can be recalled, so indifference gives 0.
    """
    size = model.traits.segment
    assert size is not None, "recall is of segments"
    coded = [encode(text)[0] for text in texts]
    count = min(len(ids) for ids in coded) // size
    books = torch.tensor([ids[: count * size] for ids in coded]).view(len(texts), count, size)
    filler = torch.tensor(encode(FILLER * size)[0][:size]).expand(len(texts), size)
    state, found = model.open(len(texts), seeds=[seed] * len(texts)), []
    for number in range(count):
        segment = Segment.full(books[:, number])
        weights = model.recall_weights(state, segment)  # [texts, slots]: text, filler, text, filler …
        if weights is not None and weights.shape[1] > 1:
            found.append(weights[:, 1::2].sum(dim=1) - weights[:, ::2].sum(dim=1))
        state = model.absorb(model.absorb(state, segment), Segment.full(filler))
    assert found, "the model recalls nothing"
    return torch.stack(found).double().mean(dim=0).numpy()
