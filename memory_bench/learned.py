"""Did a trained memory learn anything? It did if it beats itself with the memory wiped, beyond the interval."""

from typing import Any

import numpy as np
import pandas as pd

from memory_bench.stats import mean_interval


def judge(
    samples: pd.DataFrame, headline: str, *, trained: bool, has_memory: bool, seed: int = 0
) -> dict[str, Any] | None:
    """Verdict on one cell.

    Args:
        samples: of the cell, controls included.
        headline: metric name; ``accuracy`` compares answers, anything else nats per token.
        trained: whether anything was trained.
        has_memory: whether the model keeps a state at all.
        seed: of the bootstrap.

    Returns:
        ``verdict`` (``learned``, ``not learned``, ``untrained``, ``no memory``), the lift over the wiped control
        (positive is better; accuracy, or nats per token) with its 95 % interval; None without controls.
    """
    if not has_memory:
        return {"verdict": "no memory", "lift": None, "low": None, "high": None, "against": "control:wiped"}
    own, wiped = (samples[samples["control"] == c].set_index(["episode", "event", "start"]) for c in ("", "wiped"))
    shared = own.index.intersection(wiped.index)
    if not len(shared):
        return None
    own, wiped = own.loc[shared], wiped.loc[shared]
    if headline == "accuracy":
        lift = (own["predicted"] == own["answer"]).astype(float) - (wiped["predicted"] == wiped["answer"]).astype(float)
        frame = pd.DataFrame({"lift": lift, "cluster": own["cluster"]})
    else:
        per = pd.DataFrame({"gain": wiped["nll"] - own["nll"], "tokens": own["tokens"], "cluster": own["cluster"]})
        sums = per.groupby("cluster").sum()
        frame = pd.DataFrame({"lift": sums["gain"] / sums["tokens"], "cluster": sums.index})
    values, clusters = np.asarray(frame["lift"], dtype=float), np.asarray(frame["cluster"])
    value, low, high = mean_interval(values, clusters, seed=seed)
    verdict = "untrained" if not trained else "learned" if low is not None and low > 0 else "not learned"
    return {"verdict": verdict, "lift": value, "low": low, "high": high, "against": "control:wiped"}
