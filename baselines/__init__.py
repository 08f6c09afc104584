"""Baselines and memory models, installed as `memory_bench.baselines`: one file is one method."""

if __name__ != "memory_bench.baselines":  # two names would make two copies of every class
    raise ImportError("Import memory_bench.baselines; baselines is only its folder.")
