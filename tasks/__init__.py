"""Tasks, installed as `memory_bench.tasks`."""

if __name__ != "memory_bench.tasks":  # two names would make two copies of every class
    raise ImportError("Import memory_bench.tasks; tasks is only its folder.")
