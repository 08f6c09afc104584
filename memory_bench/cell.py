"""Identity: what was asked for, as frozen values with a content hash. What happened is the record's provenance."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from memory_bench.budget import Budget
from memory_bench.files.plain import parts
from memory_bench.recipe import RECIPES, fixed_steps


@dataclass(frozen=True, slots=True)
class Choice:
    """One named part of a cell.

    Attributes:
        name: of the plug-in, backbone or corpus.
        version: of its numbers.
        config: its options as plain data.
        revision: a content hash or pinned revision, where there is one.
        package: distribution, with its version, of a plug-in that is not ours.
        code: content hash of the sources of a plug-in that is not ours.
    """

    name: str
    version: int = 1
    config: dict[str, Any] = field(default_factory=dict)
    revision: str = ""
    package: str = ""
    code: str = ""

    @property
    def identity(self) -> tuple[str, str]:
        """What the code of a plug-in is, as `memory_bench.plugins.identity` says it."""
        return self.package, self.code


CHOICES = ("model", "backbone", "corpus", "recipe")


@dataclass(frozen=True, slots=True)
class Training:
    """A trained model; every task whose cells name the same training shares it.

    `processes` is how many train it together, with some rows of every batch each.
    """

    model: Choice
    backbone: Choice
    corpus: Choice
    recipe: Choice
    budget: Budget
    seed: int
    processes: int = 1

    @property
    def key(self) -> str:
        """16 hexadecimal digits; budget fields that only concern the evaluation do not count."""
        plain = parts(self)
        for name in ("eval_seconds", "seeds", "tasks", "added_parameters"):
            plain["budget"].pop(name)
        return digest(_without_empty(_ruled(plain)))


@dataclass(frozen=True, slots=True)
class Cell:
    """One result to be had: (model, backbone, task, budget, seed).

    Attributes:
        training: the model and how it is trained.
        task: with its options; its config holds the label of the data.
        limit: documents, questions or episodes; None: all.
        controls: also score with memory wiped, foreign, and with the evidence in the prompt.
        role: ``asked`` or ``control``; not part of the identity.
        label: the name a table shows for the model (options that differ from the default included).
        scored_with: options of the model that are changed after its training: a larger store, another query.
    """

    training: Training
    task: Choice
    limit: int | None = None
    controls: bool = True
    role: str = "asked"
    label: str = ""
    scored_with: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """16 hexadecimal digits of what determines the numbers."""
        return digest(self._plain())

    def _plain(self) -> dict[str, Any]:
        plain = parts(self)
        del plain["role"], plain["label"], plain["training"]["budget"]["seeds"], plain["training"]["budget"]["tasks"]
        if not self.scored_with:  # keys of cells from before there was such a thing stay what they are
            del plain["scored_with"]
        _without_empty(_ruled(plain["training"]), plain["task"])
        return plain

    @property
    def title(self) -> str:
        """For a person: model, task, seed."""
        return f"{self.label or self.training.model.name} · {self.task.name} · seed {self.training.seed}"


def _without_empty(training: dict[str, Any], *more: dict[str, Any]) -> dict[str, Any]:
    """`training`; neither it nor `more` then name the code of plug-ins that are ours, as keys have never done."""
    for choice in (*more, *(training[name] for name in CHOICES)):
        for name in ("package", "code"):
            if not choice[name]:
                del choice[name]
    return training


def limits(training: Training) -> dict[str, Any]:
    """The limits that a training is under, and what else its budget says, as plain data."""
    return _ruled(parts(training))["budget"]  # type: ignore[no-any-return]


def _ruled(training: dict[str, Any]) -> dict[str, Any]:
    """`training`; what does not alter it is left out.

    Whether its curriculum obeys the budget's tokens and FLOPs is left where that may alter it.

    Curricula were always their own limit once, so keys name only those that are not.
    """
    budget, recipe = training["budget"], RECIPES.get(training["recipe"]["name"])
    counted = budget["train_tokens"] is not None or budget["train_flops"] is not None
    if budget["own_curriculum"] or not counted or recipe is None or not fixed_steps(recipe):
        del budget["own_curriculum"]
    if training["processes"] == 1:  # as keys have always been
        del training["processes"]
    return training


def digest(value: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of `value`'s canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def to_json(cell: Cell) -> dict[str, Any]:
    """The cell as plain data."""
    return asdict(cell)


def from_json(data: dict[str, Any]) -> Cell:
    """The cell that `to_json` wrote."""
    rest = {k: data[k] for k in ("limit", "controls", "role", "label")}
    rest["scored_with"] = data.get("scored_with", {})
    return Cell(training=training_from_json(data["training"]), task=Choice(**data["task"]), **rest)


def training_from_json(data: dict[str, Any]) -> Training:
    """The training in a cell that `to_json` wrote."""
    parts = {name: Choice(**data[name]) for name in CHOICES}
    # Where a budget does not say, it is from before one could: a curriculum was its own limit.
    budget, processes = Budget(**{"own_curriculum": True, **data["budget"]}), data.get("processes", 1)
    return Training(**parts, budget=budget, seed=data["seed"], processes=processes)
