"""A memory model and a task for memory-bench.

- `carry.py`: the model
- `colours.py`: the task
"""
