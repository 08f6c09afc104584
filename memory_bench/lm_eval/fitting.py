"""Is a model what our own board reads a task with? lm-eval's command takes any model for any of our tasks.

A stand-in may have a backbone and a training of its own, and a task may train on other data than books: a run's model
that was trained otherwise is another model than the one on the board, and its number would pass for that one's.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from memory_bench import plugins
from memory_bench.data.library import Library
from memory_bench.episode import Task, TrainingPlan
from memory_bench.errors import UserError
from memory_bench.lm_eval import include_path
from memory_bench.lm_eval.finding import read_fields
from memory_bench.lm_eval.loading import Chosen

STAND_IN = "(stand-in"
LOG = logging.getLogger(__name__)


def misfit(task_name: str, document: Mapping[str, Any], chosen: Chosen) -> str:
    """Why a number on one of our tasks is of another model than the board's, in a sentence; empty where it is not.

    Args:
        task_name: of lm-eval; only those in our folder are judged.
        document: one of the task's, which says where it comes from.
        chosen: what it is read with.
    """
    file = include_path() / f"{task_name}.yaml"
    if not task_name or not file.is_file():
        return ""
    training = chosen.training
    stand_in = STAND_IN in str(document.get("data", ""))
    source, plan = _plan(file, stand_in=stand_in, pretrained=chosen.loaded.card.pretrained)
    if plan.backbone not in (None, training.backbone.name):
        kind = "stand-in" if stand_in else "task"
        return (
            f"{task_name}: this {kind} has a backbone and a training of its own ({plan.backbone}), with which "
            f"`memory-bench run --tasks {source}` trains; {training.model.name} on {training.backbone.name} is another "
            "model than the one on that board."
        )
    theirs, ours = (name.split(",")[0] for name in (plan.corpus, training.corpus.name))
    if chosen.trained == "trained" and theirs != ours:
        return (
            f"{task_name}: {training.model.name} was trained on {ours}, and `memory-bench run --tasks {source}` trains "
            f"it on {theirs}; it is another model than the one on that board."
        )
    return ""


def other_data(task_name: str, document: Mapping[str, Any], chosen: Chosen) -> str:
    """Why a document is not of the data that the model's run has read for the same task; empty where it is.

    Args:
        task_name: of lm-eval; only those in our folder are judged.
        document: one of the task's, which says where it comes from.
        chosen: what it is read with.
    """
    file = include_path() / f"{task_name}.yaml"
    read: Mapping[str, tuple[str, str]] = getattr(chosen, "read", {})  # only of a run
    if not task_name or not read or not file.is_file():
        return ""
    label, revision = read.get(str(read_fields(file)["dataset_kwargs"]["source"]), ("", ""))
    found, version = str(document.get("data", "")), str(document.get("revision", revision))
    several = label.split(" in ")  # questions in passages: the revision is then of both
    if not label or found in several[: len(several) - 1] or (found, version) == (label, revision):
        return ""
    which = f"{found}, where the run read {label}" if found != label else f"another version of {label} than the run's"
    return f"{task_name}: this is {which}. Give the run's data, for example with MEMORY_BENCH_DATA=DIR."


class Fit:
    """What a model is asked, judged by `misfit`.

    Args:
        chosen: the model.
    """

    def __init__(self, chosen: Chosen) -> None:
        self.chosen = chosen
        self._said: dict[str, str] = {}

    @property
    def misfits(self) -> list[str]:
        """What was said so far."""
        return [said for said in self._said.values() if said]

    def check(self, requests: Sequence[Any]) -> None:
        """Look at lm-eval's requests; of a model that no run has trained it is only said that it is not the board's.

        Raises:
            UserError: the model was trained for something else, or its run has read other data for the task.
        """
        for request in requests:
            name, document = getattr(request, "task_name", None), getattr(request, "doc", None)
            if not name or name in self._said or not isinstance(document, dict):
                continue
            if other := other_data(name, document, self.chosen):
                raise UserError(other)
            said = self._said[name] = misfit(name, document, self.chosen)
            if said and self.chosen.trained == "trained":
                raise UserError(f"{said} Give the run (run=FOLDER,task=NAME) in which it was trained for this one.")
            if said:
                LOG.warning("%s", said)


@lru_cache(maxsize=32)
def _plan(file: Path, *, stand_in: bool, pretrained: bool) -> tuple[str, TrainingPlan]:
    """Name and training of our task in an lm-eval file, for data that are or are not a stand-in."""
    settings = read_fields(file)["dataset_kwargs"]
    name = str(settings["source"])
    cls = plugins.load("tasks", name)
    task: Task = cls(plugins.configure(name, cls.Config(), settings.get("settings") or {}))
    says = SimpleNamespace(source=lambda need: SimpleNamespace(stand_in=stand_in))
    return name, task.plan(cast(Library, says), pretrained=pretrained)
