"""Budget presets: TOML files with limits, read like a user's own (`memory_bench/budget.py`)."""
