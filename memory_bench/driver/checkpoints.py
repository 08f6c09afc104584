"""Trained memories on disk: safetensors and the recipe that made them, shared by every task of a training.

A folder whose files are not those that were written together, or are another training's, is never loaded: the model is
trained again, with a notice. A folder of a version that kept no checksums is taken, with a notice too, where it names
the training that is wanted and its weights have the names and shapes of the model's: training may have taken days, and
all that can be told of it fits.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from memory_bench.budget import Spent, Usage
from memory_bench.cell import Training, training_from_json
from memory_bench.driver.tensor_file import write_tensors
from memory_bench.driver.train import Build, Trained
from memory_bench.errors import UserError
from memory_bench.files.artefacts import SUMS, Damaged, Notice, damage, read_json, replacing, write_json
from memory_bench.files.shapes import conform
from memory_bench.protocol import MemoryModel, is_added
from memory_bench.recipe import Recipe
from memory_bench.store import TRAINING

SCHEMA = 1
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True, slots=True)
class Asked:
    """What is looked at of the recipe."""

    trains: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What ``training.json`` must hold."""

    training: dict[str, Any]
    recipe: dict[str, Any]
    curve: list[tuple[int, float | None]]
    ended_by: str
    usage: Spent


def save_checkpoint(
    folder: Path, trained: Trained, recipe: Recipe, training: Training, usage: Usage, *, whole: bool = False
) -> None:
    """Write the trained weights and how they came about: all, or where only those were trained the added ones.

    With `whole` always all: a backbone that starts untrained is nowhere else, also where the method freezes it.

    The folder appears whole or not at all. Callers hold the training's lock.
    """
    state = trained.model.state_dict()
    if not whole and (recipe.trains == "memory" or trained.model.frozen_backbone):
        state = {k: v for k, v in state.items() if is_added(k)}
    spent = Spent(**{name: getattr(usage, name) for name in Spent.__slots__})
    curve = [(tokens, loss if math.isfinite(loss) else None) for tokens, loss in trained.curve]
    facts = Facts(asdict(training), asdict(recipe), curve, trained.ended_by, spent)
    with replacing(folder, training.key) as part:
        part.mkdir()
        write_tensors(part / WEIGHTS, state)
        write_json(part / TRAINING, {"schema": SCHEMA, **asdict(facts)})


def load_checkpoint(
    folder: Path,
    training: Training,
    build: Build,
    config: Any,
    usage: Usage,
    *,
    whole: bool = False,
    notice: Notice = lambda sentence: None,
) -> Trained | None:
    """The model saved in `folder`, with its training's spending in `usage`.

    None where nothing was saved, or (with a notice) what is there is not what was saved of that training: the model is
    trained again then.

    Args:
        folder: of the checkpoint.
        training: that it must be of.
        build: makes the model.
        config: of the model.
        usage: gets what the training spent.
        whole: as of `save_checkpoint`.
        notice: told of what does not fit.
    """
    place = f"checkpoints/{folder.name}"
    if not folder.exists():
        return None
    try:
        facts = _read_facts(folder, training)
        older = "schema" not in facts and not (folder / SUMS).exists()
        if not older and (problem := damage(folder, training.key)):
            raise Damaged(f"it {problem}")
        weights = load_file(folder / WEIGHTS)
        model = build(config)
        alone = facts["recipe"]["trains"] == "memory" or model.frozen_backbone
        _check_weights(weights, model, alone=alone and not whole)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        notice(f"{place} is not used, and its model is to be trained again: {error}.")
        return None
    if older:
        notice(f"{place} has no checksums, as an older version wrote it; it is used as it is.")
    model.load_state_dict(weights, strict=False)
    for name in Spent.__slots__:
        setattr(usage, name, facts["usage"].get(name))
    curve = [(tokens, math.nan if loss is None else float(loss)) for tokens, loss in facts["curve"]]
    return Trained(model.eval().requires_grad_(False), curve, facts["ended_by"])


def _read_facts(folder: Path, training: Training) -> dict[str, Any]:
    """``training.json``.

    Raises:
        Damaged: it holds something else, or tells of another training.
        OSError: there is none.
    """
    facts = read_json(folder / TRAINING)
    conform(Facts, facts)
    conform(Asked, facts["recipe"])
    if facts.get("schema", SCHEMA) != SCHEMA:
        raise Damaged(f"{TRAINING} has schema {facts['schema']}, this version reads {SCHEMA}")
    try:
        of = training_from_json(facts["training"]).key
    except (KeyError, TypeError, ValueError, UserError) as error:  # a budget refuses limits below zero
        raise Damaged(f"{TRAINING} names no training ({error})") from error
    if of != training.key:
        raise Damaged(f"it is of another training ({of})")
    return facts


def _check_weights(weights: dict[str, Tensor], model: MemoryModel[Any], *, alone: bool) -> None:
    """Names and shapes are those of the model's weights, or of what stands beside its backbone `alone`."""
    own = {n: tensor.shape for n, tensor in model.state_dict().items() if not alone or is_added(n)}
    found = {name: tensor.shape for name, tensor in weights.items()}
    if found != own:
        wrong = sorted(name for name in {*found, *own} if found.get(name) != own.get(name))
        raise Damaged(f"its weights are not the model's ({wrong[0]})")
