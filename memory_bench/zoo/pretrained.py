"""Models that come with released weights: matched with a backbone before anything runs, loaded instead of trained.

The backbone that `--backbone` names gives the board, the tokenizer and the sizes. A checkpoint brings its own weights
for it, and where it has a ``config.json`` (MemoryLLM, M+) its own rotary positions too; sizes and vocabulary must
agree.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memory_bench import plugins
from memory_bench.cell import Training
from memory_bench.errors import UserError
from memory_bench.protocol import MemoryModel
from memory_bench.weights.released import Release, Shape, find_release
from memory_bench.weights.transfer import Layout, backbone_shapes, check, load
from memory_bench.zoo.named import Backbones

SIZES = {
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "intermediate_size": "mlp_width",
    "num_attention_heads": "heads",
    "vocab_size": "vocab",
}


@dataclass(frozen=True, slots=True)
class Pretrained:
    """A checkpoint beside the backbone it will run on.

    Attributes:
        release: its files.
        layout: of the model's authors.
        own: configuration of the backbone that it brings; None: that of the named one.
        shapes: of the backbone's weights, by name.
    """

    release: Release
    layout: Layout
    own: Mapping[str, Any] | None
    shapes: Mapping[str, Shape]

    def config(self, label: str, fitted: Any, options: Mapping[str, Any], dtype: str) -> Any:
        """The model's config: what the files decide over `fitted`, what the user says over both; checked.

        Raises:
            UserError: the files and the config do not fit.
        """
        sized = plugins.configure(label, fitted, {**self.layout.options(self.release, dtype), **options})
        check(self.release, self.layout.places(sized, self.shapes))
        return sized

    def load_into(self, model: MemoryModel[Any], config: Any) -> None:
        """Put the released weights into `model`, its backbone included.

        Raises:
            UserError: they do not fit.
        """
        load(model, self.release, self.layout.places(config, self.shapes))
        self.layout.settle(model)


def match(label: str, cls: type[MemoryModel[Any]], checkpoint: str, backbone: str, backbones: Backbones) -> Pretrained:
    """The checkpoint of a model on a backbone; headers and sizes are read, no weights.

    Raises:
        UserError: it cannot be had or read, is of no model with a known layout, or is of another size.
    """
    if cls.released is None:
        raise UserError(f"{label} has no released layout: it cannot be loaded from a checkpoint.")
    release = find_release(checkpoint, hub=backbones.hub, hashes=backbones.hashes)
    own, named = cls.released.backbone(release), backbones.config(backbone)
    if own is not None:
        card = backbones.card(backbone)
        for theirs, ours in SIZES.items():
            if own.get(theirs) != (size := getattr(card, ours)):
                raise UserError(
                    f"The checkpoint {checkpoint} brings its own backbone with {theirs} {own.get(theirs)}, but "
                    f"{backbone} has {size}: give --backbone the model it was made from, or --backbone {checkpoint}."
                )
    return Pretrained(release, cls.released, own, backbone_shapes(named if own is None else own))


def rematch(training: Training, backbones: Backbones) -> Pretrained | None:
    """The checkpoint that a planned training names; None for what is trained here.

    Raises:
        UserError: as `match`, or its files are no longer those that were planned with.
    """
    checkpoint = training.model.config.get("checkpoint")
    if not checkpoint:
        return None
    name = training.model.name
    found = match(name, plugins.load("models", name), checkpoint, training.backbone.name, backbones)
    if not training.model.revision.endswith(found.release.revision):
        raise UserError(f"The files of the checkpoint {checkpoint} have changed since the run was planned.")
    return found
