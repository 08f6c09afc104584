"""What asking at twelve distances costs against asking at the last one alone: one pass of the text either way.

    python benchmarks/one_pass.py [--rows 8] [--tokens 12288] [--pairs 3] [MODEL …]

Both are timed alternately in one process on a random small Llama; the ratio is the median of pairs. Questions have
about 20 tokens, answers are generated (10 tokens). Texts between questions are chunks of equal length, as in the
retention tasks. Controls are off: they are the harness's own, and no model is charged for them.
"""

import argparse
import statistics
import time

DISTANCES = 12


def ratios(name: str, rows: int, tokens: int, pairs: int) -> list[float]:
    """Seconds with all questions over seconds with the last, for every pair."""
    import torch

    from memory_bench import plugins
    from memory_bench.budget import Budget
    from memory_bench.driver.observe import observe
    from memory_bench.episode import Ask, Episode, Read
    from memory_bench.testing import card_of, tiny_backbone
    from memory_bench.testing.tasks import as_bytes, from_bytes

    torch.set_num_threads(1)
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
    backbone = tiny_backbone("llama", **sizes, intermediate_size=344, vocab_size=256, max_position_embeddings=1 << 20)
    cls = plugins.load("models", name)
    model = cls(backbone, cls.fit(card_of(backbone, window=256), Budget("benchmark")), torch.Generator().manual_seed(0))
    model = model.eval().requires_grad_(False)
    rng = torch.Generator().manual_seed(0)

    def text(length: int) -> str:
        return bytes((97 + torch.randint(26, (length,), generator=rng)).tolist()).decode()

    def episode(number: int) -> Episode:
        fact = Read(text(60 + 7 * number), tag="fact", tokens=tokens // DISTANCES, lead=text(tokens // DISTANCES))
        ask = Ask("\nQuestion: " + text(5 + number % 9) + "?", (), " abcd", "fact", max_tokens=10)
        parts = [(Read(text(tokens // DISTANCES)), ask) for _ in range(DISTANCES)]
        return Episode(str(number), (fact, *(event for part in parts for event in part)))

    every = [episode(number) for number in range(rows)]
    last = [Episode(e.id, (*(x for x in e.events[:-1] if isinstance(x, Read)), e.events[-1])) for e in every]
    found = []
    for pair in range(pairs + 1):
        seconds = []
        for episodes in (last, every):
            started = time.process_time()
            observe(model, episodes, as_bytes, seed=0, controls=False, decode=from_bytes)
            seconds.append(time.process_time() - started)
        found += [seconds[1] / seconds[0]] if pair else []  # the first pair warms up
    return found


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["rmt", "hmt", "memoryllm", "mplus", "xl-cache", "sliding-window"])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=12 * 1024)
    parser.add_argument("--pairs", type=int, default=3)
    asked = parser.parse_args()
    print(
        f"{DISTANCES} distances in one pass of {asked.tokens:,} tokens x {asked.rows} rows; time against the last alone"
    )
    for name in asked.models:
        found = ratios(name, asked.rows, asked.tokens, asked.pairs)
        print(f"{name:<16} {statistics.median(found):.2f}   ({', '.join(f'{r:.2f}' for r in found)})", flush=True)


if __name__ == "__main__":
    main()
