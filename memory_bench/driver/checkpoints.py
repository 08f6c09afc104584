"""Trained memories on disk: safetensors and the recipe that made them, shared by every task of a training."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from memory_bench.budget import Usage
from memory_bench.cell import Training
from memory_bench.driver.train import Build, Trained
from memory_bench.recipe import Recipe

FROM_TRAINING = ("train_tokens", "train_steps", "train_flops", "train_seconds", "peak_device_bytes", "peak_host_bytes",
                 "training_ended_by")  # fmt: skip


def save_checkpoint(
    folder: Path, trained: Trained, recipe: Recipe, training: Training, usage: Usage, *, whole: bool = False
) -> None:
    """Write the trained weights (all of them, or the memory's alone where only it was trained) and how they came about.

    With `whole` always all: a backbone that starts untrained is nowhere else, also where the method freezes it.

    The folder appears whole or not at all.
    """
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    state = trained.model.state_dict()
    if not whole and (recipe.trains == "memory" or trained.model.frozen_backbone):
        state = {k: v for k, v in state.items() if not k.startswith("backbone.")}
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in state.items()}, part / "weights.safetensors")
    facts = {
        "training": asdict(training),
        "recipe": asdict(recipe),
        "curve": trained.curve,
        "ended_by": trained.ended_by,
        "usage": {name: getattr(usage, name) for name in FROM_TRAINING},
    }
    (part / "training.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def load_checkpoint(folder: Path, build: Build, config: Any, usage: Usage, *, whole: bool = False) -> Trained | None:
    """The model saved in `folder`, with its training's spending in `usage`.

    None where nothing was saved, or not the `whole`, or the files cannot be read: the model is trained again then.
    """
    try:
        facts = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "weights.safetensors")
    except (OSError, ValueError, SafetensorError):
        return None
    model = build(config)
    missing = set(model.state_dict()) - set(weights)
    assert not any(not name.startswith("backbone.") for name in missing), f"checkpoint lacks {sorted(missing)[:3]}"
    if whole and missing:
        return None
    model.load_state_dict(weights, strict=False)
    for name in FROM_TRAINING:
        setattr(usage, name, facts["usage"][name])
    curve = [(int(tokens), float(loss)) for tokens, loss in facts["curve"]]
    return Trained(model.eval().requires_grad_(False), curve, facts["ended_by"])
