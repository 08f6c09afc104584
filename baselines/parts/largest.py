"""The largest of many scores, as `torch.topk` finds them: the same entries in the same order, ties included.

Of a long row nearly everything can be left out at once. It is cut into groups; where k + 1 groups reach a score, so do
the k largest and the next, and a row has few entries that reach it. What is left is sorted; the order of equal entries
is a matter of `torch.topk` alone, so that rows where it matters are given to it whole.
"""

import numpy as np
import torch
from torch import Tensor

GROUP = 16  # entries; measured on 8,192 with k = 32: 8 and 32 are no faster
LONG = 32  # times k + 1 entries from which a row is long
CROWD = 4  # times k + 1 entries that may reach the score; rows with more (many equal ones) go to `torch.topk`


def largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest along the last axis, best first, and where they are: values and bits of ``scores.topk(k)``.

    A gradient goes into the chosen scores.
    """
    length = scores.shape[-1]
    fit = scores.device.type == "cpu" and scores.dtype == torch.float32 and scores.numel() > 0
    if not fit or not 0 < k < length // LONG:
        return scores.topk(k, dim=-1)
    rows = scores.detach().reshape(-1, length)
    found = _found(rows, k)
    if found is None:
        return scores.topk(k, dim=-1)
    index = found.view(*scores.shape[:-1], k)
    return scores.gather(-1, index), index


def _found(rows: Tensor, k: int) -> Tensor | None:
    """Where the `k` largest of ``[rows, length]`` are, int64; None: too many are equal, or some are no numbers."""
    count, length = rows.shape
    groups = length // GROUP
    inside, rest = rows[:, : groups * GROUP].unflatten(1, (GROUP, groups)), rows[:, groups * GROUP :]
    reached = torch.cat([inside.amax(dim=1), rest], dim=1).numpy()  # by each group, and each entry beside them
    if np.isnan(reached).any():
        return None
    least = np.partition(reached, reached.shape[1] - k - 1, axis=1)[:, [reached.shape[1] - k - 1]]
    scores = rows.numpy()
    reaching = scores >= least
    if np.count_nonzero(reaching) > CROWD * (k + 1) * count:
        return None
    row, place = np.divmod(np.flatnonzero(reaching), length)
    many = np.bincount(row, minlength=count)
    width = min(int(many.max()), CROWD * (k + 1))
    number = np.arange(len(row)) - np.repeat(many.cumsum() - many, many)  # of an entry in its row
    if width < many.max():
        row, place, number = (x[number < width] for x in (row, place, number))
    values = np.full((count, width), -np.inf, np.float32)
    places = np.zeros((count, width), np.int64)
    values[row, number], places[row, number] = scores[row, place], place
    order = np.argsort(-values, axis=1)[:, : k + 1]
    best = np.take_along_axis(values, order, axis=1)
    index = torch.from_numpy(np.take_along_axis(places, order[:, :k], axis=1))
    equal = torch.from_numpy(~(best[:, :-1] > best[:, 1:]).all(axis=1) | (many > width))
    if equal.any():
        index[equal] = rows[equal].topk(k, dim=-1).indices
    return index
