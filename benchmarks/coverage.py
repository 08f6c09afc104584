"""Coverage of the half-life's interval: how often the true value lies in it, by simulation.

    python benchmarks/coverage.py [RUNS]

Documents ask one question at every distance. Hits have exactly the curve's probability; within a document they share
a latent difficulty, with the correlation `rho` on the normal scale (so do the answers with memory wiped, from which the
floor is measured where the column says so). A half-life counts as covered by an open interval if it is above the low
end. ``no memory`` has no interval and is counted apart.
"""

import sys
import time

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from memory_bench.statistics.halflife import NO_MEMORY, half_life

DISTANCES = np.array([0, 512, 1024, 2048, 4096, 8192, 16384, 32768])
COLUMNS = ("covered", "high < h", "low > h", "open", "no memory", "octaves")


def hits_of(
    rng: np.random.Generator, probabilities: NDArray[np.float64], documents: int, rho: float
) -> NDArray[np.float64]:
    """One answer a document and probability, ``[documents, probabilities]``, correlated within a document."""
    shared = rng.normal(size=(documents, 1))
    latent = np.sqrt(rho) * shared + np.sqrt(1 - rho) * rng.normal(size=(documents, len(probabilities)))
    return (latent < ndtri(probabilities)).astype(float)


def coverage(
    half: float, documents: int, runs: int, *, rho: float, floor: float = 0.0, measured: bool = False, draws: int = 1000
) -> dict[str, float]:
    """Shares over `runs`, and the median width in octaves."""
    rng = np.random.default_rng([int(half), documents, int(100 * rho), int(100 * floor), measured])
    curve = floor + (0.9 - floor) * 2.0 ** (-DISTANCES / half)
    asked, clusters = np.tile(DISTANCES, documents), np.repeat(np.arange(documents), len(DISTANCES))
    counts, widths = dict.fromkeys(COLUMNS, 0.0), []
    for run in range(runs):
        hits = hits_of(rng, curve, documents, rho).ravel()
        wiped = hits_of(rng, np.full(len(curve), floor), documents, rho).ravel() if measured else None
        known = floor if wiped is None else (wiped, clusters)
        found = half_life(hits, asked, clusters, floor=known, seed=run, draws=draws)
        if found.verdict == NO_MEMORY or found.low is None:
            counts["no memory"] += 1 / runs
            continue
        high = np.inf if found.high is None else found.high
        counts["covered"] += found.low <= half <= high
        counts["high < h"] += high < half
        counts["low > h"] += found.low > half
        counts["open"] += found.high is None
        widths.append(np.log2(high / max(found.low, 1)))
    given = {name: counts[name] / max(1, len(widths)) for name in COLUMNS[:4]}
    return {**given, "no memory": counts["no memory"], "octaves": float(np.median(widths)) if widths else np.nan}


def main() -> None:
    """The table."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    print(f"distances {', '.join(map(str, DISTANCES))}; {runs} runs a row; a = 0.9; nominal 95 %")
    print(f"{'h':>7}{'documents':>11}{'rho':>6}{'floor':>16}" + "".join(f"{n:>11}" for n in COLUMNS) + "   ms a fit")
    settings = [(h, n, 0.5, 0.0, False) for h in (600, 2000, 8000, 24000, 200000) for n in (20, 50, 100)]
    settings += [(2000, 50, 0.0, 0.0, False), (2000, 50, 0.9, 0.0, False)]
    settings += [(h, 50, 0.5, 0.25, measured) for h in (600, 2000, 8000) for measured in (False, True)]
    for half, documents, rho, floor, measured in settings:
        begin = time.perf_counter()
        row = coverage(half, documents, runs, rho=rho, floor=floor, measured=measured)
        ms = 1000 * (time.perf_counter() - begin) / runs
        level = f"{floor:g}{' measured' if measured else ''}"
        shown = "".join(f"{row[name]:>11.3f}" for name in COLUMNS)
        print(f"{half:>7}{documents:>11}{rho:>6}{level:>16}{shown}{ms:>11.0f}", flush=True)


if __name__ == "__main__":
    main()
