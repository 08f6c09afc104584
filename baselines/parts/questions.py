"""What a segment is searched for by: its question, or else the text before it. Never text that is being predicted.

What was read last is kept as token ids ``[rows, n]`` int32, last ones right and -1 for none, with whether that is a
question (``[rows]`` bool). A question that began in the segment before is continued.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from memory_bench.protocol import Segment


def asking(asked: Tensor, segment: Segment) -> tuple[Tensor, Tensor]:
    """Which rows ask in a segment, ``[rows]`` bool, and where what was read before it belongs to what is searched for.

    A row that does not ask is searched for by what was read before; one that does only continues a question.
    """
    if segment.given is None:
        return torch.zeros_like(asked), torch.ones_like(asked)
    given = segment.given & segment.mask
    asks = given.any(dim=1)
    begins = given.gather(1, segment.mask.long().argmax(dim=1, keepdim=True))[:, 0]  # the first real token is given
    return asks, ~asks | (asked & begins)


def searched(query: Tensor, asked: Tensor, segment: Segment) -> tuple[Tensor, Tensor]:
    """What a segment is searched for by, ``[rows, tokens]`` int32 (-1: nothing), and which rows ask, ``[rows]``."""
    asks, kept = asking(asked, segment)
    if segment.given is None:
        return query, asks
    own = segment.ids.int().masked_fill(~(segment.given & segment.mask), -1)
    return torch.cat([query.masked_fill(~kept[:, None], -1), own], dim=1), asks


def read_last(query: Tensor, asked: Tensor, segment: Segment) -> tuple[Tensor, Tensor]:
    """`query` and `asked` after a segment: text is searched for by all of it, a question by what is given."""
    found, asks = searched(query, asked, segment)
    own = segment.ids.int().masked_fill(~(segment.mask & ~asks[:, None]), -1)
    some = segment.mask.any(dim=1)
    both = torch.cat([torch.where(asks[:, None], found, -1), own], dim=1)
    return torch.where(some[:, None], last(both, query.shape[1]), query), torch.where(some, asks, asked)


def last(ids: Tensor, count: int) -> Tensor:
    """The last `count` ids of every row that are not negative, right-aligned, ``[rows, count]``."""
    order = (ids >= 0).int().argsort(dim=1, stable=True)
    return F.pad(ids.gather(1, order), (count, 0), value=-1)[:, ids.shape[1] :]


def searched_keys(query: Tensor, asked: Tensor, segment: Segment, keys: Tensor, *, whole: bool) -> Tensor:
    """Sums of keys ``[rows, width]`` float32 that a segment is searched for by.

    Args:
        query: ``[rows, width]``, of what was read before it.
        asked: ``[rows]``.
        segment: the segment.
        keys: of its tokens, ``[rows, kv_heads, tokens, head]``.
        whole: look ahead: all of its text counts, and nothing else.
    """
    if whole:
        return _sum(keys, segment.mask)
    if segment.given is None:
        return query
    return query * asking(asked, segment)[1][:, None] + _sum(keys, segment.given & segment.mask)


def read_keys(query: Tensor, asked: Tensor, segment: Segment, searched: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """As `read_last`, of sums of keys, given those that the segment was `searched` for by."""
    asks, some = asking(asked, segment)[0], segment.mask.any(dim=1)
    found = torch.where(asks[:, None], searched, _sum(keys, segment.mask))
    return torch.where(some[:, None], found, query), torch.where(some, asks, asked)


def _sum(keys: Tensor, counted: Tensor) -> Tensor:
    """``[rows, width]`` float32 of ``[rows, kv_heads, tokens, head]``, over the tokens that are `counted`."""
    return (keys.detach().transpose(1, 2).flatten(2).float() * counted[:, :, None]).sum(dim=1)


def marks(segment: Segment, *, whole: bool) -> Tensor:
    """``[rows, tokens]`` int64 that differ where two segments that begin alike may be searched for by different text.

    So what was computed for one is not taken over for the other (`Backbone.resume`). With `whole`, all of their text
    counts, else what is given.
    """
    decides = segment.mask if whole else segment.given
    if decides is None:
        return torch.zeros_like(segment.ids)
    weight = torch.arange(1, segment.ids.shape[1] + 1, device=decides.device) * 0x2545F4914F6CDD1D
    return ((segment.ids + 1) * weight * decides).sum(dim=1, keepdim=True).expand_as(segment.ids)
