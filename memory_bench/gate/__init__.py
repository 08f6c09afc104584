"""The regression gate: a run as lines, against a reference."""
