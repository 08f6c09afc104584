"""The documents on which a row is best and worst, from its samples."""

from typing import TYPE_CHECKING, Any

from memory_bench.report.rows import Row
from memory_bench.statistics.pairing import correct
from memory_bench.statistics.shared import RATIOS

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 10


def extremes(row: Row, *, higher_is_better: bool) -> dict[str, Any]:
    """Ten documents at either end; empty where the row has no samples.

    Returns:
        ``worst`` and ``best``, each (name, value of the headline, tokens or questions scored), the most extreme first;
        a row of less than twenty documents names each once. ``of``: their number; ``unit``: what was counted.
    """
    found = _scores(row)
    if not found:
        return {}
    ordered = sorted(found, key=lambda each: (-each[1] if higher_is_better else each[1], each[0]))
    most = min(SHOWN, (len(ordered) + 1) // 2)
    best, worst = ordered[:most], ordered[most:][::-1][:SHOWN]
    unit = "tokens" if row.metric in RATIOS else "questions"
    return {"best": best, "worst": worst, "of": len(ordered), "unit": unit}


def _scores(row: Row) -> list[tuple[str, float, int]]:
    """(document, headline on it, tokens or questions of all seeds)."""
    frame = row.samples
    if frame is None:
        return []
    main: pd.DataFrame = frame[frame["control"] == ""]
    if row.metric in RATIOS:
        by, constant = RATIOS[row.metric]
        part = main[main["kind"] == "read"].groupby("episode")[list(dict.fromkeys(("nll", by, "tokens")))].sum()
        part = part[part[by] > 0]
        rates = part["nll"] / part[by] / constant
        return [(str(name), float(rates[name]), int(part["tokens"][name])) for name in part.index]
    if row.metric != "accuracy":
        return []
    asked = main[main["kind"] == "ask"]
    rights = asked.assign(right=correct(asked)).groupby("cluster")["right"].agg(["mean", "size"])
    return [(str(name), float(rights["mean"][name]), int(rights["size"][name])) for name in rights.index]
