"""Numbers that are none are refused: a sum that leaves them out would be finite, and wrong.

- The driver refuses scores and memories as they arise, so samples of this version hold none; whoever computes from
  samples refuses them again, as they may be older or made elsewhere.
- A question that a cell did not get to is no such number. It is a row that says so as a whole: a question without
  ``choice_nll``, ``nll`` and prediction (see `unanswered`).
"""

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memory_bench.errors import NotFinite

if TYPE_CHECKING:
    import pandas as pd

    from memory_bench.episode import Estimate

NUMBERS = ("seed", "event", "start", "tokens", "nbytes", "words", "nll", "distance_tokens", "distance_bytes", "correct")
TEXTS = ("episode", "cluster", "kind", "control", "predicted", "answer", "label", "generated")
LISTS = ("choice_nll", "accepted")


def checked(values: ArrayLike, what: str = "values") -> NDArray[np.float64]:
    """`values` as floats.

    Raises:
        NotFinite: one of them is not finite.
    """
    found = np.asarray(values, dtype=np.float64)
    if not np.isfinite(found).all():
        place = int(np.argmin(np.isfinite(found).ravel()))
        raise NotFinite(f"Nothing is computed from {what} of which number {place + 1:,} is not finite.")
    return found


def unanswered(samples: "pd.DataFrame") -> NDArray[np.bool_]:
    """``[rows]``: questions that were asked of other cells and not of this one, which ran out of its budget."""
    blank = np.array([_blank(value) for value in _column(samples, "choice_nll", None)], dtype=bool)
    nothing = samples["predicted"].to_numpy() == "" if "predicted" in samples else np.zeros(len(samples), dtype=bool)
    missing = np.isnan(samples["nll"].to_numpy(dtype=np.float64))
    found: NDArray[np.bool_] = (samples["kind"] == "ask").to_numpy() & blank & nothing & missing
    return found


def check_samples(samples: "pd.DataFrame") -> "pd.DataFrame":
    """`samples` themselves, if nothing in them is missing or not finite.

    Raises:
        NotFinite: something is; it says what and where.
    """
    if not len(samples):
        return samples
    for name in (column for column in (*NUMBERS, *TEXTS, *LISTS) if column in samples):
        bad = _bad(samples, name)
        if bad.any():
            at = samples.iloc[int(bad.argmax())]
            control = f" (control {at['control']})" if at.get("control") else ""
            raise NotFinite(
                f"The samples hold a {name} that is missing or not finite: {at.get('kind')} at token "
                f"{at.get('start')} of {at.get('episode')}{control}."
            )
    return samples


def _bad(samples: "pd.DataFrame", name: str) -> Any:
    """``[rows]`` bool: where a column holds no value."""
    column = samples[name]
    if name in NUMBERS:
        if column.dtype.kind in "iub":
            return np.zeros(len(samples), dtype=bool)
        bad = ~np.isfinite(column.to_numpy(dtype=np.float64, na_value=np.nan))
        return bad & ~unanswered(samples) if name == "nll" and bad.any() else bad
    if name in TEXTS:
        return _no_text(column)
    if column.isna().all():
        return np.array([isinstance(value, float) for value in column], dtype=bool) & _asked(samples)
    lost = _asked(samples) & np.array([isinstance(value, float) for value in column], dtype=bool)
    if name == "accepted" or _all_finite(column):
        return lost
    return lost | np.array([not _blank(v) and not all(_finite(x) for x in v) for v in column], dtype=bool)


def _all_finite(column: "pd.Series[Any]") -> bool:
    """Whether every number in lists is finite, as far as can be told of all at once."""
    try:
        return bool(np.isfinite(np.fromiter(chain.from_iterable(v for v in column if not _blank(v)), float)).all())
    except (TypeError, ValueError):
        return False


def _no_text(column: "pd.Series[Any]") -> Any:
    """``[rows]`` bool: where there is something else than text."""
    import pandas as pd

    if column.dtype != object:
        return np.asarray(column.isna())
    if pd.api.types.infer_dtype(column, skipna=False) == "string":
        return np.zeros(len(column), dtype=bool)
    return np.array([not isinstance(value, str) for value in column], dtype=bool)


def _asked(samples: "pd.DataFrame") -> Any:
    return (samples["kind"] == "ask").to_numpy(dtype=bool)


def unsound(estimates: Iterable["Estimate"]) -> str:
    """What is wrong with a result, in a sentence; empty where nothing is.

    A number that is none by its own note (``no memory``), or of nothing (n = 0), is as it should be.
    """
    for e in estimates:
        if not math.isfinite(e.value) and not e.note and e.n:
            return f"{e.metric}{f' ({e.slice})' if e.slice else ''} is not finite"
    return ""


def unsound_scores(nll: Sequence[float | None], choices: Sequence[float | None]) -> str:
    """What is wrong with a result's scored events; see `unsound`."""
    for what, values in (("score", nll), ("choice's score", choices)):
        missing = sum(not _finite(value) for value in values)
        if missing:
            return f"{missing:,} of {len(values):,} {what}s are not finite"
    return ""


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _blank(value: Any) -> bool:
    """No list at all."""
    return value is None or isinstance(value, float)


def _column(samples: "pd.DataFrame", name: str, default: Any) -> Iterable[Any]:
    return samples[name] if name in samples else [default] * len(samples)
