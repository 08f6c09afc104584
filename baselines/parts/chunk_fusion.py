"""MemLong's attention: one softmax over a window and retrieved chunks, the same chunks for all queries and heads."""

import torch
import torch.nn.functional as F
from torch import Tensor

from memory_bench.backbone.model import Backbone

from .knn import products, weighted
from .text_memory import Found


def chunk_positions(found: Found, way: str, number: int) -> Tensor:
    """``[rows, n]`` positions of retrieved keys, where the first token that may read them is at 0.

    Officially that token is at 1 and they are at 0 (``zero``), or they are at 0, 1, 2 … and it follows them
    (``continual``). In its code every retrieval layer turns the same keys again, the `number`-th from 0 once more than
    that many times (``repeated``).
    """
    if way == "zero":
        return torch.full_like(found.positions, -1)
    times = number + 1 if way == "repeated" else 1
    return times * found.positions - found.mask.sum(dim=1, keepdim=True)


def attend_chunks(
    backbone: Backbone,
    qkv: tuple[Tensor, Tensor, Tensor],
    visible: Tensor | None,
    found: Found,
    far: Tensor,
    gate: Tensor | None,
    way: str,
) -> Tensor:
    """Attention ``[rows, tokens, heads * head]`` to chunks and window.

    Args:
        backbone: whose heads they are.
        qkv: rotated queries, rotated keys and values of the window.
        visible: of the window, as `Backbone.visible` gives it for the layer.
        found: the chunks.
        far: their keys, rotated.
        gate: ``[heads]`` before its sigmoid g; None: there is none. A row that retrieves nothing has none.
        way: ``scale``, official: scores are multiplied by g and 1 - g, which makes all of them smaller; else log g and
            log (1 - g) are added.
    """
    q, k, v = qkv
    tokens = q.shape[2]
    if visible is None:  # plain causal over the segment alone
        visible = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()[None, None]
    seen = found.mask[:, None, None].expand(-1, 1, tokens, -1)
    both = torch.cat([seen, visible.expand(len(q), -1, -1, -1)], dim=3)
    values = torch.cat([found.values, v], dim=2)
    if gate is None:
        return backbone.attend(q, torch.cat([far, k], dim=2), values, both)
    reads = found.mask.any(dim=1)[:, None, None, None]
    gate = gate[:, None, None]
    q = q * backbone.head_width**-0.5
    memory, window = products(q, far), products(q, k)
    if way == "scale":
        memory, window = memory * torch.sigmoid(gate), window * torch.where(reads, torch.sigmoid(-gate), 1.0)
    else:
        memory, window = memory + F.logsigmoid(gate), window + torch.where(reads, F.logsigmoid(-gate), 0.0)
    scores = torch.cat([memory, window], dim=3)
    weights = scores.masked_fill(~both, torch.finfo(scores.dtype).min).softmax(dim=-1).to(v.dtype)
    return weighted(weights, values).transpose(1, 2).flatten(2)
