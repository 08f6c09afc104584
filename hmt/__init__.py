"""Hierarchical Memory Transformer, installed as `memory_bench.hmt`."""

if __name__ != "memory_bench.hmt":  # two names would make two copies of every class
    raise ImportError("Import memory_bench.hmt; hmt is only its folder.")
