"""A view of a run in MLflow; records stay the truth.

- `pages.py`: links into MLflow's pages
- `place.py`: servers and databases of MLflow: found, reached, silenced
- `sync.py`: `sync mlflow` and `run --mlflow`
- `view.py`: what MLflow shows of a run, from its records; without MLflow
"""
