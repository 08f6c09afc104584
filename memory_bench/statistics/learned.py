"""Did a trained memory learn anything? It did if it beats itself with the memory wiped, beyond the interval."""

from typing import Any

import pandas as pd

from memory_bench.finite import check_samples
from memory_bench.statistics.pairing import correct
from memory_bench.statistics.stats import mean_interval, ratio_interval, scored_units


def judge(
    samples: pd.DataFrame,
    headline: str,
    *,
    trained: bool,
    has_memory: bool,
    pretrained: bool = False,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Verdict on one cell.

    Args:
        samples: of the cell, those rows that the headline counts, controls included.
        headline: metric name; ``accuracy`` compares answers, anything else nats per token.
        trained: whether anything was trained.
        has_memory: whether the model keeps a state at all.
        pretrained: it was loaded from released weights, so nothing is said of a training.
        seed: of the bootstrap.

    Returns:
        ``verdict`` (``learned``, ``not learned``, ``untrained``, ``pretrained``, ``no memory``), the lift over the
        wiped control (positive is better; accuracy, or nats per token) with its 95 % interval; None without controls.

    Raises:
        NotFinite: see `check_samples`.
    """
    check_samples(samples)
    if not has_memory:
        return {"verdict": "no memory", "lift": None, "low": None, "high": None, "against": "control:wiped"}
    own, wiped = (samples[samples["control"] == c].set_index(["episode", "event", "start"]) for c in ("", "wiped"))
    shared = own.index.intersection(wiped.index)
    if not len(shared):
        return None
    own, wiped = own.loc[shared], wiped.loc[shared]
    if headline == "accuracy":
        gain = correct(own) - correct(wiped)
        value, low, high = mean_interval(gain.to_numpy(), own["cluster"].to_numpy(dtype=str), seed=seed)
    else:
        episodes, starts = (own.index.get_level_values(level).to_numpy() for level in ("episode", "start"))
        tokens = own["tokens"].to_numpy()
        units = scored_units(own["cluster"].to_numpy(dtype=str), episodes.astype(str), starts, tokens)
        sums = pd.DataFrame({"gain": (wiped["nll"] - own["nll"]).to_numpy(), "tokens": tokens}).groupby(units).sum()
        value, low, high = ratio_interval(sums["gain"].to_numpy(), sums["tokens"].to_numpy(), seed=seed)
    verdict = "learned" if low is not None and low > 0 else "not learned"
    verdict = "pretrained" if pretrained else verdict if trained else "untrained"
    return {"verdict": verdict, "lift": value, "low": low, "high": high, "against": "control:wiped"}
