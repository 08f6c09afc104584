"""Hierarchical Memory Transformer, installed as `memory_bench.hmt`."""
