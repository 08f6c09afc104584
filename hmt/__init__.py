"""Hierarchical Memory Transformer, installed as `memory_bench.hmt`.

- `layout.py`: its official checkpoints
- `model.py`: HMT
- `recall.py`: its cache of memories and the attention over it
- `replay.py`: its reference cases
"""

if __name__ != "memory_bench.hmt":  # two names would make two copies of every class
    raise ImportError("Import memory_bench.hmt; hmt is only its folder.")
