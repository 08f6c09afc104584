"""Data about data source kinds: see `memory_bench.data.library`."""
