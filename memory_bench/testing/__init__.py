"""What "is a memory model" means, as checks that anybody can run on their own model.

``check_model(build)`` runs them all; `model_checks` gives them one by one, for parametrised tests. A check builds the
model, works on short random text, and raises an `AssertionError` with a sentence that names the broken promise.
`build` takes no arguments, returns the same small model every time (segments of about 8 tokens over a `tiny_backbone`),
and leaves the global random state alone. ``check_task(task, library)`` does the same for a task.

- `backbones.py`: tiny random backbones
- `declared.py`: promises about what a model declares, first
- `measures.py`: instruments: look-ahead, FLOPs
- `memory.py`: promises about memory
- `numbers.py`: promises about numbers
- `operations.py`: operations of kernels that PyTorch's counter does not know
- `sentences.py`: what an author's code does, in words
- `shapes.py`: promises about types and shapes, before any number
- `task_shapes.py`: promises about types of a task
- `tasks.py`: promises about tasks
"""

from memory_bench.testing import declared, memory, numbers, shapes
from memory_bench.testing.backbones import card_of, tiny_backbone
from memory_bench.testing.measures import Build, Check, measure_look_ahead, measured_flops
from memory_bench.testing.sentences import in_sentences
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


FIRST: tuple[Check, ...] = (
    declared.is_built,
    declared.declares_itself,
    declared.sizes_itself,
    declared.builds_repeat,
    shapes.states_have_rows,
    shapes.steps_have_shapes,
    shapes.counts_are_whole_numbers,
    shapes.continuations_have_shapes,
)
"""What all others rely on: types and shapes, in well under a second."""


def model_checks() -> list[Check]:
    """Every check, named by its function; whatever a model raises in one is an `AssertionError` with a sentence."""
    later: list[Check] = [
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
        numbers.what_follows_has_no_influence,
        numbers.chunks_do_not_matter_where_promised,
        numbers.absorbing_is_stepping,
        memory.size_is_honest,
        numbers.gradients_reach_the_parameters,
        numbers.weights_are_the_whole_model,
        numbers.flops_are_counted,
        numbers.decoding_is_rereading,
        numbers.bfloat16_works,
    ]
    return [in_sentences(check, _nothing) for check in FIRST] + [in_sentences(check, _first) for check in later]


def _first(build: Build) -> None:
    for check in FIRST:
        check(build)


def _nothing(build: Build) -> None:
    del build


def check_model(build: Build) -> None:
    """Run every check on the model that `build` makes, types and shapes first.

    Raises:
        AssertionError: naming the first promise that is broken.
    """
    for check in model_checks():
        check(build)
