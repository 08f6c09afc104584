"""What "is a memory model" means, as checks that anybody can run on their own model.

``check_model(build)`` runs them all; `model_checks` gives them one by one, for parametrised tests. A check builds the
model, works on short random text, and raises an `AssertionError` with a sentence that names the broken promise.
`build` takes no arguments, returns the same small model every time (segments of about 8 tokens over a `tiny_backbone`),
and leaves the global random state alone. ``check_task(task, library)`` does the same for a task.

- `backbones.py`: tiny random backbones
- `measures.py`: instruments: look-ahead, FLOPs
- `memory.py`: promises about memory
- `numbers.py`: promises about numbers
- `operations.py`: operations of kernels that PyTorch's counter does not know
- `tasks.py`: promises about tasks
"""

from memory_bench.testing import memory, numbers
from memory_bench.testing.backbones import card_of, tiny_backbone
from memory_bench.testing.measures import Build, Check, measure_look_ahead, measured_flops
from memory_bench.testing.tasks import check_task

__all__ = [
    "Build",
    "Check",
    "card_of",
    "check_model",
    "check_task",
    "measure_look_ahead",
    "measured_flops",
    "model_checks",
    "tiny_backbone",
]


def model_checks() -> list[Check]:
    """Every check, named by its function."""
    return [
        numbers.declares_itself,
        memory.reopening_repeats,
        memory.documents_do_not_leak,
        memory.peeking_is_pure,
        memory.states_are_values,
        memory.nothing_stays_on_the_module,
        memory.random_state_is_untouched,
        memory.rows_are_independent,
        memory.rows_can_be_selected,
        memory.padding_has_no_influence,
        memory.empty_rows_keep_their_memory,
        numbers.any_length_can_be_peeked,
        numbers.look_ahead_is_declared,
        numbers.chunks_do_not_matter_where_promised,
        numbers.absorbing_is_stepping,
        memory.size_is_honest,
        numbers.gradients_reach_the_parameters,
        numbers.weights_are_the_whole_model,
        numbers.flops_are_counted,
        numbers.decoding_is_rereading,
        numbers.bfloat16_works,
    ]


def check_model(build: Build) -> None:
    """Run every check on the model that `build` makes.

    Raises:
        AssertionError: naming the first promise that is broken.
    """
    for check in model_checks():
        check(build)
