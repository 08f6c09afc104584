"""memory-bench: memory for language models, compared under identical budgets. Start with `memory_bench.protocol`."""

__version__ = "0.1.0"
