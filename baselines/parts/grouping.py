"""Rows of unequal length without padding: rows that can share a pass are grouped, stripped of padding, and rejoined.

A memory prefix in front of padded text would need a mask and a position table per row in every layer. Grouping keeps
the passes free of padding, and a row's numbers are those of the row alone by construction. The common case, all rows
full and in step, is one group and copies nothing.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from memory_bench.protocol import Segment
from memory_bench.state import State

S = TypeVar("S", bound=State)


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of a segment that have equally many real tokens, and their tokens without padding.

    Attributes:
        index: ``[n]`` int64 on the host, the rows; None: all of them, in order.
        ids: ``[n, tokens]`` int64.
        given: ``[n, tokens]`` bool, or None where no token of these rows is given.
    """

    index: Tensor | None
    ids: Tensor
    given: Tensor | None


def alike(keys: Tensor) -> list[Tensor | None]:
    """Row numbers of the rows with equal `keys` ``[rows, n]`` (host), per distinct key; ``[None]`` if all are equal."""
    if bool((keys == keys[:1]).all()):
        return [None]
    _, kind = torch.unique(keys, dim=0, return_inverse=True)
    return [(kind == k).nonzero()[:, 0] for k in range(int(kind.max()) + 1)]


def facts_of(segment: Segment, schedule: Tensor) -> Tensor:
    """``[rows, 3]`` int64 on the host, equal for rows of one group: tokens, having given ones or not, `schedule`."""
    given = _asked(segment).any(dim=1).long()
    return torch.cat([torch.stack([segment.lengths, given], dim=1).cpu(), schedule[:, None]], dim=1)


def _asked(segment: Segment) -> Tensor:
    return segment.given & segment.mask if segment.given is not None else torch.zeros_like(segment.mask)


def group_rows(segment: Segment, schedule: Tensor) -> list[Group]:
    """The segment's rows in groups of equal length, `schedule` ``[rows]`` (host) and having given tokens or not."""
    facts, groups = facts_of(segment, schedule), []
    asked = _asked(segment)
    for index in alike(facts):
        first = 0 if index is None else int(index[0])
        tokens, has_given, _ = facts[first].tolist()
        ids, mask, given = segment.ids, segment.mask, asked
        if index is not None:
            at = index.to(ids.device)
            ids, mask, given = ids[at], mask[at], given[at]
        if tokens < ids.shape[1]:
            ids, given = (t[mask].view(len(mask), tokens) for t in (ids, given))
        groups.append(Group(index, ids, given if has_given else None))
    return groups


def scatter_rows(segment: Segment, groups: Sequence[Group], parts: Sequence[Tensor]) -> Tensor:
    """``[rows, tokens, width]`` from each group's ``[n, real tokens, width]``; zero where there is padding."""
    if len(groups) == 1 and parts[0].shape[:2] == segment.ids.shape:
        return parts[0]
    whole = parts[0].new_zeros(*segment.ids.shape, parts[0].shape[-1])
    for group, part in zip(groups, parts, strict=True):
        where = segment.mask
        if group.index is not None:
            where = torch.zeros_like(segment.mask)
            where[group.index.to(where.device)] = True
            where = where & segment.mask
        whole = whole.index_put((where,), part.reshape(-1, part.shape[-1]))
    return whole


def join_rows(groups: Sequence[Group], states: Sequence[S]) -> S:
    """The state of all rows from the groups' states; tensors of unequal shape are filled up with zeros at the end."""
    if len(groups) == 1:
        return states[0]
    back = torch.cat([cast(Tensor, g.index) for g in groups]).argsort()
    return cast(S, _join(list(states), back))


def _join(values: list[Any], back: Tensor) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return _stack(values)[back.to(first.device)]
    if isinstance(first, tuple):
        return tuple(_join(list(items), back) for items in zip(*values, strict=True))
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [f.name for f in dataclasses.fields(first)]
        return dataclasses.replace(first, **{n: _join([getattr(v, n) for v in values], back) for n in names})
    return first


def _stack(parts: list[Tensor]) -> Tensor:
    shape = [max(sizes) for sizes in zip(*(p.shape[1:] for p in parts), strict=True)]
    filled = []
    for part in parts:
        missing = [pad for have, want in zip(part.shape[:0:-1], shape[::-1], strict=True) for pad in (0, want - have)]
        filled.append(torch.nn.functional.pad(part, missing) if any(missing) else part)
    return torch.cat(filled)
