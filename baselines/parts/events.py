"""EM-LLM's events as rules on numbers: where a surprise ends one, how an end is moved, how pieces become blocks."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

TINY = 1e-15  # in place of a conductance's zero denominator (official)


def surprising(values: Tensor, before: Tensor, gamma: float) -> list[int]:
    """Places of `values` ``[n]`` above mean + gamma * std of `before`; fewer than two numbers have no std."""
    if len(before) < 2:
        return []
    threshold = before.mean() + gamma * before.std()
    return (values > threshold).nonzero()[:, 0].tolist()


def surprising_so_far(values: Tensor, gamma: float) -> list[int]:
    """The same, each place beside those before it in `values`."""
    return [n for n in range(2, len(values)) if surprising(values[n : n + 1], values[:n], gamma)]


def modularity(similarity: Tensor) -> Tensor:
    """Modularity ``[n + 1]`` of splitting `similarity` ``[n, n]`` before place t into two parts, for every t."""
    total, first, last, rows, columns = _sums(similarity)
    expected = (rows * columns + (total - rows) * (total - columns)) / total
    return (first + last - expected) / (2 * total)


def conductance(similarity: Tensor) -> Tensor:
    """Conductance ``[n + 1]`` of the same splits: the smaller of the two parts'."""
    total, first, last, rows, columns = _sums(similarity)
    crossing = (rows - first, columns - first)  # a part's ties with the rest
    parts = []
    for inside, cut in ((first, crossing[0]), (last, crossing[1])):
        volume = torch.minimum(inside, total - inside)
        parts.append(cut / torch.where(volume == 0, TINY, volume))
    return torch.minimum(*parts)


def _sums(similarity: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All; for every split: inside the first part, inside the last, the first part's rows, its columns."""
    table = torch.nn.functional.pad(similarity.double().cumsum(0).cumsum(1), (1, 0, 1, 0))
    first, rows, columns, total = table.diagonal(), table[:, -1], table[-1], table[-1, -1]
    return total, first, total - rows - columns + first, rows, columns


MEASURES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "modularity": (modularity, torch.argmax),
    "conductance": (conductance, torch.argmin),
}
"""What a good place for an event's end is by, and which value of it is best."""


def refined(ends: Sequence[int], similarity: Tensor, before: int, shortest: int, metric: str) -> list[int]:
    """Event ends of a call moved to where their neighbourhood splits best.

    A place is searched from `shortest` tokens behind the last end up to the old place, which is no candidate itself.

    Args:
        ends: first tokens of events, ascending, counted from the call's first token.
        similarity: ``[before + n, before + n]`` of the tokens `before` the call and its own.
        before: see above.
        shortest: tokens of an event.
        metric: of `MEASURES`.
    """
    measure, best = MEASURES[metric]
    places = [end + before for end in ends]
    kept = [
        end
        for number, end in enumerate(places)
        if (end - places[number - 1] >= shortest if number else end >= shortest or not before)
    ]
    last, moved = 0, list[int]()
    for end in kept:
        if end - last > shortest and end - before > shortest:
            half = (end - last) // 2
            low, high = max(0, last - half), min(len(similarity), end + half)
            first = max(before, last) - low
            values = measure(similarity[low:high, low:high])[first : end - low]
            last = low + first + shortest + int(best(values[shortest:]))
        elif end - last >= shortest or not before:
            last = end
        else:
            continue
        moved.append(last)
    return [place - before for place in moved]


def blocks_of(ends: Sequence[int], length: int, shortest: int, longest: int) -> list[int]:
    """Sizes of the blocks that the oldest `length` pending tokens become; what follows the last end stays pending.

    Args:
        ends: first tokens of events inside, ascending.
        length: tokens that have left the window.
        shortest: a shorter piece is joined to the next.
        longest: a longer one is cut.
    """
    if not ends:
        ends = range(0, length, longest) if length > longest else ()
    pieces = [b - a for a, b in pairwise([0, *ends, length]) if b > a]
    made, open_piece = list[int](), 0
    for number, piece in enumerate(pieces):
        open_piece += piece
        while open_piece >= longest:
            made.append(longest)
            open_piece -= longest
        if open_piece < min(shortest, length) or number == len(pieces) - 1:
            continue
        made.append(open_piece)
        open_piece = 0
    return made


def taken(sizes: Tensor, room: Tensor) -> Tensor:
    """How many blocks of ``[..., blocks]`` sizes, in this order, are taken: ``[...]``.

    Until they fill the `room` ``[...]``; the last one only if that is nearer to it. All, where they fit.
    """
    sums = sizes.cumsum(dim=-1)
    if not sums.shape[-1]:
        return torch.zeros_like(room)
    reached = (sums >= room[..., None]).long()
    at = reached.argmax(dim=-1)
    after = sums.gather(-1, at[..., None])[..., 0]
    before = after - sizes.gather(-1, at[..., None])[..., 0]
    dropped = ((room - before).abs() <= (after - room).abs()).long()
    count = torch.where(reached.any(dim=-1), at + 1 - dropped, (sizes > 0).sum(dim=-1))
    return torch.where(sums[..., -1] <= room, (sizes > 0).sum(dim=-1), count)


def neighbours(selected: Sequence[int], sizes: Sequence[int], old: Sequence[int], room: int) -> list[int]:
    """The contiguity buffer after a selection: blocks beside the selected ones, newest last.

    Args:
        selected: blocks in the order of selection.
        sizes: of all blocks.
        old: the buffer before.
        room: in tokens.
    """
    chosen, new, full, total = set(selected), list[int](), False, 0
    for block in (b for s in selected for b in (s + 1, s - 1)):
        if full or not 0 <= block < len(sizes) or block in chosen or block in new:
            continue
        full, keeps = _fills(total, sizes[block], room)
        if keeps:
            new.append(block)
            total += sizes[block]
    new.reverse()
    if not new:
        return list(old)
    if not old or full:
        return new
    if total + sum(sizes[block] for block in old) < room:
        return [*old, *new]
    for block in reversed(old):
        if full or block in new or block in chosen:
            continue
        full, keeps = _fills(total, sizes[block], room)
        if keeps:
            new.insert(0, block)
            total += sizes[block]
    return new


def _fills(total: int, size: int, room: int) -> tuple[bool, bool]:
    """Whether a block of `size` tokens fills the room, and whether it is taken."""
    full = total + size >= room
    return full, not full or abs(room - total) > abs(total + size - room)
