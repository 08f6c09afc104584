"""Peak memory of streaming 4k, 16k and 64k tokens: flat for every model whose state is bounded.

    python benchmarks/peak_memory.py [MODEL …]

Each (model, length) runs in a process of its own; a row shows bytes above the same process after 1,024 tokens.
"""

import subprocess
import sys

LENGTHS = (4_096, 16_384, 65_536)
WARM = 1_024


def measure(name: str, tokens: int) -> int:
    """Bytes that `tokens` tokens need beyond `WARM` tokens, in this process."""
    import torch

    from memory_bench import plugins
    from memory_bench.budget import Budget
    from memory_bench.corpus import Line
    from memory_bench.meter import peak_bytes
    from memory_bench.stream import line_nll
    from memory_bench.testing import card_of, tiny_backbone

    torch.set_num_threads(1)
    backbone = tiny_backbone("llama", hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    cls = plugins.load("models", name)
    model = cls(backbone, cls.fit(card_of(backbone, window=256), Budget("benchmark")), torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(0)
    peaks = []
    with torch.no_grad():
        for length in (WARM, tokens):
            ids = torch.randint(64, (length,), generator=rng)
            scored = torch.ones(length, dtype=torch.bool)
            scored[0] = False
            line_nll(model.eval(), [Line(ids, scored)])
            peaks.append(peak_bytes())
    return peaks[1] - peaks[0]


def main() -> None:
    """The table."""
    if len(sys.argv) == 4 and sys.argv[1] == "--one":
        print(measure(sys.argv[2], int(sys.argv[3])))
        return
    from memory_bench import plugins

    print(f"{'model':<16}" + "".join(f"{length:>12,}" for length in LENGTHS) + "   tokens; MB beyond 1,024 tokens")
    for name in sys.argv[1:] or plugins.installed("models"):
        cells = []
        for length in LENGTHS:
            command = [sys.executable, __file__, "--one", name, str(length)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            cells.append(int(done.stdout) / 1e6)
        print(f"{name:<16}" + "".join(f"{mb:>12.1f}" for mb in cells), flush=True)


if __name__ == "__main__":
    main()
