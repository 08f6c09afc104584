"""Baselines and memory models, installed as `memory_bench.baselines`: one file is one method."""
