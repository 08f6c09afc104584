"""Tasks, installed as `memory_bench.tasks`."""
