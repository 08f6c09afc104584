"""Execution blocks: the stretches of a segment that are read, and choose from memory, at once. Rows are cut alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from memory_bench.protocol import Segment


@dataclass(frozen=True, slots=True)
class Execution:
    """The n-th stretch of every row, without padding in front; all on the host.

    Attributes:
        columns: ``[rows, tokens]`` int64, places in the segment; 0 where a row has fewer tokens.
        mask: ``[rows, tokens]`` bool, real tokens, first in every row.
        given: ``[rows]`` bool: the row's tokens are a condition, not to be predicted.
    """

    columns: Tensor
    mask: Tensor
    given: Tensor


def executions(segment: Segment, length: int, *, at_conditions: bool) -> list[Execution]:
    """Cut a segment into stretches of `length` tokens, counted from every row's first real token.

    Args:
        segment: with padding on any side, and inside.
        length: tokens at most.
        at_conditions: also cut, and count anew, where given tokens begin and end.
    """
    given = segment.given if at_conditions else None
    if given is None and bool(segment.mask.all()):
        rows, tokens = segment.mask.shape
        pieces = torch.arange(tokens).expand(rows, -1).split(length, dim=1)
        none = torch.zeros(rows, dtype=torch.bool)
        return [Execution(p, torch.ones_like(p, dtype=torch.bool), none) for p in pieces if p.shape[1]]
    mask = segment.mask.cpu()
    asked = torch.zeros_like(mask) if given is None else given.cpu()
    cuts = [_cut(m, g, length) for m, g in zip(mask, asked, strict=True)]
    return [_together([row[n] if n < len(row) else [] for row in cuts], asked) for n in range(max(map(len, cuts)))]


def _cut(mask: Tensor, given: Tensor, length: int) -> list[list[int]]:
    """The places of one row's stretches."""
    asked, found = given.tolist(), list[list[int]]()
    for place in mask.nonzero()[:, 0].tolist():
        if not found or len(found[-1]) == length or asked[place] != asked[found[-1][0]]:
            found.append([])
        found[-1].append(place)
    return found


def _together(places: list[list[int]], asked: Tensor) -> Execution:
    tokens = max(map(len, places))
    columns = torch.tensor([[*row, *[0] * (tokens - len(row))] for row in places])
    mask = torch.arange(tokens) < torch.tensor([len(row) for row in places])[:, None]
    given = torch.tensor([bool(row) and bool(asked[number, row[0]]) for number, row in enumerate(places)])
    return Execution(columns, mask, given)


def scatter(segment: Segment, parts: list[tuple[Execution, Tensor]]) -> Tensor:
    """``[rows, tokens, width]``: hidden states of every stretch at their places; zero at padding.

    Args:
        segment: that was cut.
        parts: the stretches with their states ``[rows, tokens, width]``; at least one.
    """
    if all(bool(part.mask.all()) for part, _ in parts) and bool(segment.mask.all()):
        ordered = all(bool((part.columns[:, 1:] > part.columns[:, :-1]).all()) for part, _ in parts)
        if ordered and all(bool((part.columns == part.columns[:1]).all()) for part, _ in parts):
            return torch.cat([hidden for _, hidden in parts], dim=1)
    first = parts[0][1]
    whole = first.new_zeros(*segment.ids.shape, first.shape[-1])
    for part, hidden in parts:
        row, token = (t.to(first.device) for t in part.mask.nonzero(as_tuple=True))
        column = part.columns.to(first.device)[row, token]
        whole = whole.index_put((row, column), hidden[row, token])
    return whole
