"""lm-evaluation-harness, both ways: our models in its command (`model`), its tasks in our grid (`task`).

Nothing outside this package imports lm-eval, and nothing in it does before it is used.

- `command.py`: its command with our models and tasks
- `data.py`: our tasks as documents for it
- `documents.py`: its documents as episodes
- `finding.py`: its task files, by name
- `fitting.py`: may a model read this task?
- `judging.py`: its metrics, from our samples
- `loading.py`: which model lm-eval reads with: named, or trained by a run
- `model.py`: our models as an lm-eval model
- `reading.py`: contexts read once, continuations on forks
- `task.py`: its tasks in our grid
- `writing.py`: greedy continuations up to a stop sequence
"""

from importlib.util import find_spec
from pathlib import Path

from memory_bench.errors import UserError

NAME = "memory-bench"
"""What our models are called there: ``--model memory-bench``."""


def require() -> Path:
    """The folder of the installed lm-eval, which is not imported for it.

    Raises:
        UserError: it is not installed.
    """
    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UserError('This needs lm-evaluation-harness: pip install "memory-bench[lm-eval]".')
    return Path(next(iter(spec.submodule_search_locations)))


def include_path() -> Path:
    """The folder of our tasks as lm-eval YAML files, in a checkout or an installed wheel."""
    spec = find_spec("memory_bench.tasks")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return next(Path(place) for place in places) / "lm_eval"
