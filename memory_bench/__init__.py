"""memory-bench: memory for language models, compared under identical budgets. Start with `memory_bench.protocol`.

- `__main__.py`: `python -m memory_bench`
- `axes.py`: what kind of memory a model has, in words
- `budget.py`: limits, presets, usage
- `card.py`: what is known of a backbone without loading it
- `cell.py`: identity of what was asked
- `choices.py`: options that are one of a few words
- `cli.py`: the command line
- `corpus.py`: lines of tokens and batches of them
- `episode.py`: what a task gives to the driver
- `errors.py`: what can go wrong, as types: `UserError`, `DataError`, `NotFinite`
- `finite.py`: numbers that are none are refused
- `frames.py`: the line of a plug-in that an error came from
- `kinds.py`: what a class must have to be a model or a task
- `plugins.py`: entry points, scratch files, options checked against their types
- `protocol.py`: what a memory model is; start here
- `recipe.py`: how models are trained, as data
- `record.py`: records and provenance
- `samples.py`: a cell's scored events as a file that knows whose they are
- `shipped.py`: where reference cases and certificates are
- `sources.py`: the sources that a plug-in consists of
- `state.py`: states as values: rows, detach, size
- `store.py`: the folder of a run; atomic writes, locks
- `summaries.py`: what a plug-in says of itself, unimported
"""

__version__ = "0.1.0"
