"""Reads episodes with a model, asks, trains, and meters all of it.

- `accounting.py`: what a cell holds and moves: bytes by kind and place, joules
- `alive.py`: bytes of tensors alive at once
- `asking.py`: questions on forks of a stream
- `backward.py`: gradients of a batch, read here or by several processes
- `beacon.py`: where a cell is, told to its watcher
- `checkpoints.py`: trained memories on disk
- `clock.py`: seconds of a cell
- `encoding.py`: episodes as tokens, with bytes and words
- `energy.py`: joules that the machine counts
- `every.py`: how often a training on its way is kept
- `generating.py`: answers in the model's own words
- `hollow.py`: a model that reads and computes nothing
- `ledger.py`: bytes of tensors, by what they are for
- `memory.py`: what the process holds and held
- `meter.py`: counts and stops
- `observe.py`: episodes through a model: rows of samples
- `others.py`: what the other processes of a training spend and hold
- `peers.py`: processes that train one model together
- `randomness.py`: states of generators, taken and put back
- `standing.py`: where a training stands, as tensors in a file
- `stream.py`: the driver: cuts, scores once, carries over, controls
- `tensor_file.py`: tensors to a file and back, a piece at a time
- `train.py`: one trainer for every model
- `unfinished.py`: a training on its way, on disk
"""
