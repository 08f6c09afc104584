"""Peak memory of streaming 4k, 16k and 64k tokens: flat for every model whose state is bounded.

    python benchmarks/peak_memory.py [MODEL …]

Each (model, length) runs in a process of its own; a row shows bytes above the same process after 1,024 tokens, and the
state's own bytes after the longest text. The backbone has two layers of width 64 and a window of 32 tokens, which
stores that hold so many segments have filled after 4k to 16k tokens.
"""

import os
import subprocess
import sys

LENGTHS = (4_096, 16_384, 65_536)
WARM = 1_024
WINDOW = 32
SLACK = 2_000_000  # bytes that the allocator may take without being asked


def measure(name: str, tokens: int) -> tuple[int, int, bool]:
    """Bytes that `tokens` tokens need beyond `WARM` tokens, bytes of the state then, and whether it is bounded."""
    import torch

    from memory_bench import plugins
    from memory_bench.budget import Budget
    from memory_bench.corpus import Line
    from memory_bench.driver.meter import peak_bytes
    from memory_bench.driver.stream import Watcher, line_nll
    from memory_bench.protocol import State
    from memory_bench.testing import card_of, tiny_backbone

    class Last(Watcher):
        held = 0

        def state(self, state: State, rows: int) -> None:
            size = state.size()
            self.held = size.device + size.host

    torch.set_num_threads(1)
    backbone = tiny_backbone("llama", hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    cls = plugins.load("models", name)
    config = cls.fit(card_of(backbone, window=WINDOW), Budget("benchmark"))
    model = cls(backbone, config, torch.Generator().manual_seed(0)).eval()
    rng = torch.Generator().manual_seed(0)
    peaks, last = [], Last()
    with torch.no_grad():
        for length in (WARM, tokens):
            ids = torch.randint(64, (length,), generator=rng)
            scored = torch.ones(length, dtype=torch.bool)
            scored[0] = False
            line_nll(model, [Line(ids, scored)], watcher=last)
            peaks.append(peak_bytes())
    return peaks[1] - peaks[0], last.held, model.traits.bounded


def main() -> None:
    """The table; ends with 1 if a bounded model grew."""
    if len(sys.argv) == 4 and sys.argv[1] == "--one":
        print(*(int(value) for value in measure(sys.argv[2], int(sys.argv[3]))))
        return
    from memory_bench import plugins

    # With a threshold that moves, glibc keeps freed blocks of slightly different sizes, and the peak is chance.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
    print(f"{'model':<16}" + "".join(f"{length:>12,}" for length in LENGTHS) + "       state   MB beyond 1,024 tokens")
    grew = False
    for name in sys.argv[1:] or plugins.installed("models"):
        peaks, held, bounded = [], 0, False
        for length in LENGTHS:
            command = [sys.executable, __file__, "--one", name, str(length)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            peak, held, bounded = (int(value) for value in done.stdout.split())
            peaks.append(peak)
        grows = bool(bounded) and peaks[-1] > peaks[1] + SLACK
        grew = grew or grows
        note = "   grows, although its state is bounded" if grows else "" if bounded else "   unbounded"
        print(f"{name:<16}" + "".join(f"{p / 1e6:>12.1f}" for p in peaks) + f"{held / 1e6:>12.2f}{note}", flush=True)
    sys.exit(1 if grew else 0)


if __name__ == "__main__":
    main()
