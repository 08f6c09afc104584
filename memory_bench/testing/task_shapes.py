"""Promises about types of a task: its class, episodes, plan, corpus and numbers. Cheap, so before any model reads."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import pandas as pd
import torch
from pydantic import TypeAdapter

from memory_bench.corpus import Line
from memory_bench.data import Library, Source
from memory_bench.episode import Ask, Episode, Estimate, Read, Task, TrainingPlan
from memory_bench.errors import DataError, UserError
from memory_bench.frames import home_of_module
from memory_bench.recipe import find_recipe
from memory_bench.testing.measures import require
from memory_bench.testing.sentences import attempt, describe, require_signature, whole

EXCERPT = 2000  # characters of a training text that are encoded: enough to see what comes of them
FIELDS: dict[type, dict[str, type]] = {
    Episode: {"id": str, "events": tuple, "cluster": str, "begun": bool},
    Read: {"text": str, "scored": bool, "tag": str, "tokens": int, "lead": str, "anew": bool},
    Ask: {"prompt": str, "choices": tuple, "answer": str, "evidence": str, "label": str, "max_tokens": int,
          "accepted": tuple},
}  # fmt: skip


def asked(task: Any, call: Callable[[], Any], promise: str) -> Any:
    """What a task gives; data that cannot be had here are no fault of its own, whatever else it raises is."""
    try:
        return call()
    except DataError:
        raise
    except (Exception, SystemExit) as error:
        raised = error  # raised again below, where it is put into words
    return attempt(lambda: _again(raised), promise, home_of_module(type(task).__module__))


def _again(error: BaseException) -> Any:
    raise error


def check_class(task: Any) -> None:
    """A task is an instance of a subclass of `Task` with the attributes that tables and commands need."""
    require(
        isinstance(task, Task),
        f"check_task(task, library) must be given an instance of a subclass of memory_bench.episode.Task, not "
        f"{describe(task)}",
    )
    kind: Any = type(task)
    name, config = kind.__name__, getattr(kind, "Config", None)
    frozen = isinstance(config, type) and getattr(getattr(config, "__dataclass_params__", None), "frozen", False)
    require(frozen, f"{name}.Config must be a frozen dataclass of the options, not {describe(config)}")
    assert config is not None
    usual = attempt(config, f"{name}.Config() must give the usual options: every field has a default")
    attempt(
        lambda: json.dumps(dataclasses.asdict(TypeAdapter(config).validate_python(dataclasses.asdict(usual)))),
        f"options of {name}.Config must be plain data (numbers, text, flags, tuples), which is said on a command line "
        "and written into records",
    )
    shape = "__init__(self, config)"
    require_signature(kind.__init__, shape, task, usual)
    asked(task, lambda: kind(usual), f"{name}(config) must make the task: {shape}")
    for field in ("headline", "needs", "source"):
        value = getattr(task, field, None)
        fits = isinstance(value, str) and (field != "headline" or bool(value))
        said = {"headline": "the name of the metric of the leaderboard", "needs": "the name of its data, or ''"}
        require(fits, f"{name}.{field} must be a text, {said.get(field, 'where it comes from')}, not {describe(value)}")
    require(
        whole(task.version) and task.version >= 1,
        f"{name}.version must be a whole number, at least 1, not {describe(task.version)}",
    )
    fits = isinstance(task.beside, tuple) and all(isinstance(need, str) for need in task.beside)
    require(fits, f"{name}.beside must be a tuple of names of data, not {describe(task.beside)}")
    require_signature(task.episodes, "episodes(library, limit)", None, None)
    require_signature(task.plan, "plan(library, *, pretrained)", None, pretrained=False)
    require_signature(task.corpus, "corpus(library, plan, encode)", None, None, None)
    require_signature(task.metrics, "metrics(samples, seed=0)", None)
    require_signature(task.metrics, "metrics(samples, seed=0)", None, seed=1)


def episodes_of(task: Task, library: Library, limit: int) -> list[Episode]:
    """The first episodes, after their types and their number were found to be right.

    Raises:
        AssertionError: naming the promise.
        DataError: there are no data for it here.
    """
    given = f"{type(task).__name__}.episodes(library, {limit})"
    promise = f"{given} must give Episode after Episode"
    found: Any = asked(task, lambda: task.episodes(library, limit), promise)
    require(isinstance(found, Iterable), f"{promise}, but it gave {describe(found)}")
    episodes = asked(task, lambda: list(islice(found, limit + 1)), promise)
    require(len(episodes) <= limit, f"{given} must give {limit} episodes at most, but it gave more: keep to the limit")
    for number, episode in enumerate(episodes):
        require(isinstance(episode, Episode), f"{promise}, but number {number} is {describe(episode)}")
        where = f"episode {episode.id!r}"
        _check_fields(episode, where)
        require(bool(episode.id) and bool(episode.events), f"{where} must have an id and at least one event")
        for index, event in enumerate(episode.events):
            place = f"{where}, event {index}"
            require(isinstance(event, Read | Ask), f"{place} must be a Read or an Ask, not {describe(event)}")
            _check_fields(event, place)
    return list(episodes)


def _check_fields(value: Any, where: str) -> None:
    for field, kind in FIELDS[type(value)].items():
        found = getattr(value, field)
        fits = whole(found) and found >= 0 if kind is int else isinstance(found, kind)
        wanted = {int: "a whole number from 0", str: "a text", bool: "True or False", tuple: "a tuple"}[kind]
        require(fits, f"{where}: {type(value).__name__}.{field} must be {wanted}, not {describe(found)}")
        texts = field not in ("choices", "accepted") or all(isinstance(text, str) for text in found)
        require(texts, f"{where}: {type(value).__name__}.{field} must be a tuple of texts, not {found!r}")


def check_training(task: Task, library: Library, encode: Callable[[str], tuple[list[int], list[int]]]) -> None:
    """The plan names a corpus, and what `corpus` makes gives batches of lines; data that are not here are left out."""
    name = type(task).__name__
    for pretrained in (False, True):
        given = f"{name}.plan(library, pretrained={pretrained})"
        plan: Any = asked(task, lambda: task.plan(library, pretrained=pretrained), f"{given} must give a TrainingPlan")  # noqa: B023
        require(isinstance(plan, TrainingPlan), f"{given} must give a TrainingPlan, not {describe(plan)}")
        fits = isinstance(plan.corpus, str) and bool(plan.corpus) and whole(plan.version)
        require(fits, f"{given} must name its corpus by a text and have a whole version, not {plan!r}")
        if plan.recipe is not None:
            attempt(lambda: find_recipe(plan.recipe), f"{given} must name a recipe that there is, or None")  # noqa: B023
        source: Any = _or_none(task, lambda: task.data(library), f"{name}.data(library) must give a Source")
        fits = source is None or (isinstance(source, Source) and bool(source.label) and bool(source.revision))
        require(fits, f"{name}.data(library) must give a Source with a label and a revision, not {describe(source)}")
        if not plan.backbone:  # a stand-in's own corpus is made for its own tokenizer
            _check_corpus(task, library, plan, lambda text: encode(text[:EXCERPT]))
    levels: Any = _or_none(task, lambda: task.levels(library), f"{name}.levels(library) must give names and numbers")
    fits = levels is None or isinstance(levels, Mapping)
    require(fits, f"{name}.levels(library) must be a mapping of names to numbers, not {describe(levels)}")


def _check_corpus(task: Task, library: Library, plan: TrainingPlan, encode: Any) -> None:
    given = f"{type(task).__name__}.corpus of '{plan.corpus}'"
    promise = f"{given} must give a corpus: something with batch(rows, segments, segment, rng)"
    corpus: Any = _or_none(task, lambda: task.corpus(library, plan, encode), promise, _NOWHERE)
    if corpus is _NOWHERE:
        return
    require(callable(getattr(corpus, "batch", None)), f"{promise}, but it gave {describe(corpus)}")
    promise = f"a batch of 2 rows of {given} must be a list of 2 lines (memory_bench.corpus.Line)"
    lines: Any = asked(task, lambda: corpus.batch(2, 2, 8, torch.Generator().manual_seed(0)), promise)
    fits = isinstance(lines, list | tuple) and len(lines) == 2 and all(isinstance(line, Line) for line in lines)
    require(fits, f"{promise}, but it gave {describe(lines)}")
    for line in lines:
        shaped = isinstance(line.ids, torch.Tensor) and line.ids.dim() == 1 and line.ids.dtype == torch.int64
        require(shaped, f"Line.ids of {given} must be [tokens] int64, not {describe(line.ids)}")
        shaped = isinstance(line.scored, torch.Tensor) and line.scored.shape == line.ids.shape
        shaped = shaped and line.scored.dtype == torch.bool
        wanted = f"Line.scored of {given} must be [tokens] = [{len(line.ids)}] bool"
        require(shaped, f"{wanted}, not {describe(line.scored)}")
        require(bool(line.scored.any()), f"{wanted} with a True in it, or nothing is learned from the line")


_NOWHERE = object()


def _or_none(task: Task, call: Callable[[], Any], promise: str, instead: Any = None) -> Any:
    """As `asked`; `instead` where the data are not here, or where the task says that it has no such thing."""
    try:
        return call()
    except (UserError, NotImplementedError):
        return instead
    except Exception:
        return asked(task, call, promise)


def estimates_of(task: Task, samples: pd.DataFrame) -> list[Estimate]:
    """The metrics of some samples: a list of estimates with numbers, the same again, and the samples as they were."""
    name = type(task).__name__
    before, promise = samples.copy(deep=True), f"{name}.metrics(samples) must give a list of Estimate"
    found: Any = asked(task, lambda: task.metrics(samples), promise)
    fits = isinstance(found, list) and all(isinstance(one, Estimate) for one in found)
    require(fits, f"{promise}, but it gave {describe(found)}")
    require(samples.equals(before), f"{name}.metrics(samples) must leave the samples as they are: copy what it changes")
    for one in found:
        numbers = [one.value] + [side for side in (one.low, one.high) if side is not None]
        fits = all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers) and whole(int(one.n))
        require(fits, f"{one.metric} of {name}.metrics must have plain numbers as value, low and high, not {one!r}")
    again: Any = asked(task, lambda: task.metrics(samples), promise)
    require(repr(again) == repr(found), f"{name}.metrics(samples) must give the same numbers for the same samples")
    return list(found)
