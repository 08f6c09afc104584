"""Reads episodes with a model, asks, trains, and meters all of it.

- `asking.py`: questions on forks of a stream
- `checkpoints.py`: trained memories on disk
- `encoding.py`: episodes as tokens, with bytes and words
- `generating.py`: answers in the model's own words
- `meter.py`: counts and stops
- `observe.py`: episodes through a model: rows of samples
- `stream.py`: the driver: cuts, scores once, carries over, controls
- `train.py`: one trainer for every model
"""
