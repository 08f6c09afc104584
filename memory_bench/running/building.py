"""What a training is made of, and the one way to a model of it: `run` and lm-eval's door build with the same.

Weights come from the authors' release, from a checkpoint of this training, or from its first random draw; who asks
decides which it accepts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from memory_bench import plugins
from memory_bench.backbone.model import Backbone
from memory_bench.backbone.small import CLOSED
from memory_bench.backbone.tokenizer import Tokens
from memory_bench.budget import Usage
from memory_bench.cell import Choice, Training
from memory_bench.driver.checkpoints import load_checkpoint
from memory_bench.driver.train import Trained, adapts
from memory_bench.files.artefacts import Notice
from memory_bench.protocol import MemoryModel
from memory_bench.recipe import Recipe
from memory_bench.running.grid import WINDOW
from memory_bench.running.recipes import make_recipe
from memory_bench.zoo.named import Backbones, Loaded
from memory_bench.zoo.pretrained import Pretrained, rematch


@dataclass(frozen=True, slots=True)
class Parts:
    """What the model of a training is made of.

    Attributes:
        training: what was asked for.
        loaded: its backbone, with the helpers that the model asks for.
        cls: its class.
        config: its options, sized and checked.
        recipe: how it is trained.
        pretrained: its released weights; None for what is trained here.
        device: where it goes.
    """

    training: Training
    loaded: Loaded
    cls: type[MemoryModel[Any]]
    config: Any
    recipe: Recipe
    pretrained: Pretrained | None
    device: str

    @property
    def whole(self) -> bool:
        """The backbone starts untrained, so that it is in no file but this training's checkpoint."""
        return self.loaded.card.name in CLOSED

    def build(self, config: Any) -> MemoryModel[Any]:
        """The model with `config` and its first random weights."""
        rng = torch.Generator().manual_seed(self.training.seed + 1)
        model: MemoryModel[Any] = self.cls(self.loaded.backbone, config, rng)
        return model.to(self.device)

    def begun(self) -> MemoryModel[Any]:
        """The model as it is before any training, to be read with."""
        return self.build(self.config).eval().requires_grad_(False)

    def released(self) -> Trained | None:
        """The model with its authors' weights; None for what is trained here.

        Raises:
            UserError: they do not fit.
        """
        if self.pretrained is None:
            return None
        model = self.build(self.config)
        self.pretrained.load_into(model, self.config)
        return Trained(model.eval().requires_grad_(False), [], "pretrained")

    def kept(self, folder: Path, usage: Usage, notice: Notice) -> Trained | None:
        """The model from the checkpoint in `folder`, with its training's spending in `usage`; None: there is none.

        `notice` is told where one is there that does not fit.
        """
        training = self.training
        return load_checkpoint(folder, training, self.build, self.config, usage, whole=self.whole, notice=notice)

    def scored(self, model: MemoryModel[Any], changes: Mapping[str, Any]) -> MemoryModel[Any]:
        """A trained `model` of these parts with the options that a cell changes after training; the same weights."""
        if not changes:
            return model
        asked = self.training.model
        fitted = self.cls.fit(self.loaded.card, self.training.budget)
        config = plugins.configure(asked.name, fitted, {**asked.config, **changes})
        other: MemoryModel[Any] = self.cls(self.loaded.backbone, config, torch.Generator().manual_seed(0))
        other.to(self.loaded.backbone.device).load_state_dict(model.state_dict())
        return other.eval().requires_grad_(False)


def window_training(training: Training, backbones: Backbones) -> Training | None:
    """The training of the window alone that a method needs first: it freezes a backbone that starts untrained.

    None: there is nothing to train before the method itself.
    """
    if training.backbone.name not in CLOSED or not plugins.load("models", training.model.name).frozen_backbone:
        return None
    window = plugins.load("models", WINDOW)
    config = plugins.plain(window.fit(backbones.card(training.backbone.name), training.budget))
    return replace(training, model=Choice(WINDOW, window.version, config))


def gather(training: Training, backbones: Backbones, device: str, encode: Tokens | None = None) -> Parts:
    """The parts of a training; its backbone is loaded, nothing is built or trained.

    `encode` is the backbone's tokenizer, where that is loaded already.

    Raises:
        UserError: something that it names cannot be had, or is no longer what was planned with.
    """
    pretrained = rematch(training, backbones)
    loaded = backbones.load(
        training.backbone.name,
        seed=training.seed,
        device=device,
        dtype=getattr(torch, training.backbone.config["dtype"]),
        brought=None if pretrained is None else pretrained.own,
        filled=pretrained is None,
        encode=encode,
    )
    return over(training, loaded, backbones, pretrained, device)


def over(training: Training, loaded: Loaded, backbones: Backbones, pretrained: Pretrained | None, device: str) -> Parts:
    """The parts of a training over a backbone that is loaded already."""
    name = training.model.name
    cls = plugins.load("models", name)
    config = plugins.configure(name, cls.fit(loaded.card, training.budget), training.model.config)
    backbones.equip(loaded, cls.helpers(config))
    recipe = make_recipe(training.recipe)
    put_adapters(loaded.backbone, training, cls, recipe)
    return Parts(training, loaded, cls, config, recipe, pretrained, device)


def put_adapters(backbone: Backbone, training: Training, cls: type[MemoryModel[Any]], recipe: Recipe) -> None:
    """The adapters that a training's backbone has, or none: before its model is built, whoever builds it."""
    released = bool(training.model.config.get("checkpoint"))
    rank = recipe.lora_rank if adapts(training.budget, recipe, cls) and not released else 0
    # Draws of their own: every model of a comparison begins with the same adapters, whatever it draws itself.
    rng = torch.Generator().manual_seed(training.seed + 2)
    backbone.adapt(rank, recipe.lora_alpha, recipe.lora_targets, rng)
