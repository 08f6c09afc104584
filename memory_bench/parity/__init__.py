"""Reference cases of the official implementations, replayed."""
