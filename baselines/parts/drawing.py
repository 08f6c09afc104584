"""Random draws that belong to a row: by its seed and by what it has read, whatever rows, padding or text beside it.

A random selection of as many entries as a search would have found is the control that tells what the search is worth:
any text at all, more of it, may be what helps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 1 << 22  # random numbers that exist at once


def row_generator(seed: int, writes: int, purpose: int = 0) -> torch.Generator:
    """A generator that depends on a row's seed and writes alone (mixed, so that neighbours are unrelated)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + writes * 0xD1B54A32D192ED03 + purpose * 0x8CB92BA72F3D8DD7) % 2**64
    mixed = ((mixed ^ (mixed >> 31)) * 0x94D049BB133111EB) % 2**64
    return torch.Generator().manual_seed((mixed ^ (mixed >> 29)) % 2**63)


def row_seeds(rows: int, seeds: Sequence[int] | None) -> Tensor:
    """``[rows]`` int64 on the host, as `MemoryModel.open` is given them: 0 for every row by default."""
    return torch.tensor([0] * rows if seeds is None else list(seeds), dtype=torch.int64)


@torch.no_grad()
def draw_slots(
    valid: Tensor,
    k: int,
    mask: Tensor,
    heads: int,
    seeds: Tensor,
    writes: Tensor,
    purpose: int = 0,
    *,
    allowed: Tensor | None = None,
) -> Tensor:
    """`k` different slots for every token and head, all equally likely: ``[rows, heads, tokens, k]``, -1 for none.

    A token's draw depends on its row's seed and writes, on how many slots of the row are valid and on its rank among
    the row's real tokens; text that follows moves nothing.

    Args:
        valid: ``[rows, slots]`` bool, slots that may be drawn; a row with fewer than `k` gives all of them.
        k: how many.
        mask: ``[rows, tokens]`` bool, real tokens; padding draws nothing.
        heads: how many draw.
        seeds: ``[rows]``.
        writes: ``[rows]``, how much was written before.
        purpose: tells several draws of one step apart (a layer).
        allowed: ``[rows, tokens, slots]`` bool, those of the valid slots that a token may draw; None: all.
    """
    rows, tokens = mask.shape
    drawn = valid.new_full((rows, tokens, heads, min(k, valid.shape[1])), -1, dtype=torch.int64)
    for row, (seed, written) in enumerate(zip(seeds.tolist(), writes.tolist(), strict=True)):
        places, generator = valid[row].nonzero()[:, 0], row_generator(seed, written, purpose)
        real, wanted = mask[row].nonzero()[:, 0], min(k, len(places))
        if not wanted:
            continue
        for part in real.split(max(1, BLOCK // (heads * len(places)))):
            numbers = torch.rand(len(part), heads, len(places), generator=generator)
            if allowed is not None:
                numbers = numbers.masked_fill(~allowed[row, part][:, None, places].cpu(), -1.0)
            top = numbers.topk(wanted, dim=-1)
            chosen = places[top.indices.to(places.device)]
            drawn[row, part, :, :wanted] = chosen.masked_fill((top.values < 0).to(places.device), -1)
    return drawn.transpose(1, 2)
