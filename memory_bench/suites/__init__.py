"""Suites: TOML files with the options of `run`."""
