"""Official weights into our models: every released tensor has a place, every weight a tensor, or one sentence says why.

A model whose authors released weights has a `Layout`: which options the files decide, and where every tensor goes.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from memory_bench.backbone.families import KNOWN
from memory_bench.backbone.model import Backbone
from memory_bench.errors import DataError, UserError
from memory_bench.weights.quiet import quietly
from memory_bench.weights.released import Release, Shape, few

# Buffers that older transformers saved.
DERIVED = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a released tensor goes.

    Attributes:
        ours: name in the model's ``state_dict``; empty: the tensor is known and has no use here.
        shape: it must have.
        optional: it may be absent (a tied head, which must then equal what it is tied to).
    """

    ours: str
    shape: Shape
    optional: bool = False


class Layout(ABC):
    """How a method's authors laid out what they released. Class attribute ``released`` of a `MemoryModel`."""

    @abstractmethod
    def options(self, release: Release, dtype: str) -> dict[str, Any]:
        """Config fields that the files decide, for a model that is run in `dtype`; what the user sets wins."""

    @abstractmethod
    def places(self, config: Any, backbone: Mapping[str, Shape]) -> dict[str, Place]:
        """Where every released tensor goes, for a config and the shapes of the backbone's weights by name."""

    def backbone(self, release: Release) -> dict[str, Any] | None:
        """Configuration of the backbone that the release brings; None: it is that of the named backbone."""
        return None

    def settle(self, model: Any) -> None:
        """Called once the weights are in place, for what is no tensor."""
        return None


def backbone_places(backbone: Mapping[str, Shape], prefix: str = "") -> dict[str, Place]:
    """The backbone's own weights under `prefix`; the output matrix may be absent where it is the embedding."""
    return {
        prefix + name: Place(f"backbone.model.{name}", shape, optional=name == "lm_head.weight")
        for name, shape in backbone.items()
    }


def embedding_width(backbone: Mapping[str, Shape]) -> int:
    """Width of the backbone's token embedding, from the shapes of its weights by name."""
    names = ("embed_tokens.weight", "wte.weight")
    return next(shape[1] for name, shape in backbone.items() if name.endswith(names))


def meta_backbone(config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A causal language model of shapes alone.

    Raises:
        DataError: the configuration is of no known kind.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = dict(config)
    kind = plain.pop("model_type", "")
    try:
        with quietly(), torch.device("meta"):
            known = AutoConfig.for_model(kind, **plain)
            return cast(nn.Module, AutoModelForCausalLM.from_config(known, dtype=dtype))
    except Exception as error:  # whatever a model's own code raises on a configuration that it cannot take
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise DataError(f"'{kind}' is not a supported backbone ({said}): {KNOWN}.") from error


def backbone_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Shapes of a backbone's weights, by name."""
    return {name: tuple(t.shape) for name, t in meta_backbone(config).state_dict().items()}


def unfilled_backbone(config: Mapping[str, Any], dtype: torch.dtype) -> Backbone:
    """A Llama backbone whose weights are yet to be loaded; only its rotary frequencies have values."""
    model: Any = meta_backbone(config, dtype).to_empty(device="cpu")
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return Backbone(model.eval())


def check(release: Release, places: Mapping[str, Place]) -> None:
    """Every tensor has a place, every place a tensor, and the shapes agree.

    Raises:
        UserError: naming what does not fit.
    """
    shapes = {name: shape for name, shape in release.shapes.items() if name in places or not DERIVED.search(name)}
    start = f"The checkpoint {release.name} does not fit:"
    missing = [name for name, place in places.items() if name not in shapes and not place.optional]
    if adapters := [name for name in missing if ".lora_" in name]:
        raise UserError(
            f"{start} its LoRA adapters are not there ({few(adapters)}). Files that were loaded and saved again with "
            "another version of peft lose them: use the files as released (lora_rank = 0 says that they were merged)."
        )
    left = [name for name in shapes if name not in places]
    if merged := [name for name in left if ".lora_" in name]:
        raise UserError(f"{start} it has LoRA adapters that no option accounts for ({few(merged)}); merge them first.")
    if missing or left:
        said = [f"{what} {few(names)}" for what, names in (("it lacks", missing), ("left over:", left)) if names]
        raise UserError(f"{start} {'; '.join(said)}.")
    for name, place in places.items():
        if name in shapes and shapes[name] != place.shape:
            raise UserError(
                f"{start} {name} is {list(shapes[name])} where the backbone and the options ask for "
                f"{list(place.shape)}."
            )


@torch.no_grad()
def load(model: nn.Module, release: Release, places: Mapping[str, Place]) -> None:
    """Copy the release's tensors into the model, backbone included, one at a time.

    Raises:
        UserError: `check` fails, the files leave a weight of the model unset, or untie what the backbone ties.
    """
    check(release, places)
    own = model.state_dict()
    filled: set[int] = set()
    later: dict[str, Tensor] = {}
    for name, tensor in release.tensors():
        place = places.get(name)
        if place is None or not place.ours:
            continue
        if place.optional:
            later[place.ours] = tensor
            continue
        own[place.ours].copy_(tensor)
        filled.add(own[place.ours].data_ptr())
    for ours, tensor in later.items():
        if own[ours].data_ptr() not in filled:
            own[ours].copy_(tensor)
            filled.add(own[ours].data_ptr())
        elif not torch.equal(own[ours].cpu(), tensor.to(own[ours].dtype)):
            raise UserError(f"The checkpoint {release.name} does not fit: the backbone ties {ours}, the files do not.")
    if unset := [name for name, tensor in own.items() if tensor.numel() and tensor.data_ptr() not in filled]:
        raise UserError(f"The checkpoint {release.name} does not fit: it says nothing of {few(unset)}.")
