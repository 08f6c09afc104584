"""A view of a run in MLflow; records stay the truth."""
