"""How the suite speaks: what was given, in words, and every exception of an author's code as a broken promise."""

import functools
import inspect
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from memory_bench.frames import Home, home_of_module, last_foreign, place, summary
from memory_bench.testing.measures import Build, Check, require


def describe(value: object) -> str:
    """A value in words: its kind, and of a tensor shape, type and (unless it is the CPU) device."""
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        where = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}{where}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    kind = type(value).__name__
    if isinstance(value, tuple | list | dict):
        return f"a {kind} of {len(value)}"
    if isinstance(value, bool | int | float | str):
        return f"{value!r} ({kind})"
    return f"{'an' if kind[:1] in 'AEIOUaeiou' else 'a'} {kind}"


def attempt(call: Callable[[], Any], promise: str, *homes: Home) -> Any:
    """What `call` gives.

    Raises:
        AssertionError: it raised something: the promise, and what came instead, with its place in the author's code.
    """
    try:
        return call()
    except (Exception, SystemExit) as error:
        raise AssertionError(f"{promise}, but it raised {located(error, *homes)}") from error


def located(error: BaseException, *homes: Home) -> str:
    """An error with the last line of the author's own code on the way to it."""
    where = place(error, homes) or last_foreign(error)
    text = summary(error).split("\n")[0]
    return f"{text}{f' ({where})' if where else ''}"


def require_signature(function: Any, shape: str, *given: Any, **named: Any) -> None:
    """Raise unless `function` can be called so; `shape` is how it should be written, such as ``open(rows, …)``."""
    owner = getattr(function, "__qualname__", "") or repr(function)
    require(callable(function), f"{owner} must be a method {shape}, not {describe(function)}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of built-in functions none is known
        return
    try:
        signature.bind(*given, **named)
    except TypeError as error:
        raise AssertionError(
            f"{owner} must be callable as {shape}, but it is written {owner.rpartition('.')[2]}{signature}: {error}"
        ) from None


def whole(value: object) -> bool:
    """A whole number: no flag, no float, no tensor."""
    return isinstance(value, int) and not isinstance(value, bool)


def first_sentence(check: Callable[..., Any]) -> str:
    """What a check is about, without its full stop."""
    return (inspect.getdoc(check) or check.__name__).split("\n")[0].rstrip(".")


def in_sentences(check: Check, before: Callable[[Build], None]) -> Check:
    """`check`, of which whatever an author's code raises is an `AssertionError` with a sentence.

    Args:
        check: works on a build and raises where a promise is broken.
        before: the cheap checks, which say it better where the author's code raises for a reason that they know.
    """

    @functools.wraps(check)
    def told(build: Build) -> None:
        homes: list[Home] = []

        def noted() -> Any:
            model = build()
            homes.append(home_of_module(type(model).__module__))
            return model

        try:
            check(noted)
        except (Exception, SystemExit) as error:
            if isinstance(error, AssertionError) and _is_ours(error):
                raise
            before(build)
            raise AssertionError(
                f"The promise '{first_sentence(check)}' cannot be tested: the model raised {located(error, *homes)}"
            ) from error

    return told


def _is_ours(error: AssertionError) -> bool:
    """An assertion is one of the suite, which says what is wrong, and not one of the author's code."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", "")).startswith("memory_bench.testing.")


def plain_mapping(value: object) -> bool:
    """A mapping whose keys are text."""
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
