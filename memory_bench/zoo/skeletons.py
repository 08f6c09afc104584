"""A backbone without its weights, in its own size, and its tokenizer: what a plan needs, before anything is trained."""

from collections.abc import Mapping
from typing import Any

import torch

from memory_bench.backbone.model import Backbone
from memory_bench.backbone.small import CLOSED, TINY, small_model
from memory_bench.backbone.tokenizer import Tokens, load_tokens, word_level
from memory_bench.weights.transfer import meta_backbone
from memory_bench.zoo.named import Backbones


def skeleton(
    backbones: Backbones, name: str, dtype: torch.dtype = torch.float32, brought: Mapping[str, Any] | None = None
) -> Backbone:
    """The backbone `name` in full size; with random weights where it is one of the harness's own, else without any.

    Args:
        backbones: where it comes from.
        name: of a resolved backbone.
        dtype: of its weights.
        brought: configuration of a backbone that takes its place (of a released memory model).

    Raises:
        DataError: it cannot be found or is of no supported family.
    """
    if name == "tiny":
        return small_model(TINY, torch.Generator()).to(dtype)
    if name in CLOSED:
        return small_model(CLOSED[name].sizes, torch.Generator(), rotary=False).to(dtype)
    return Backbone(meta_backbone(backbones.config(name) if brought is None else brought, dtype).eval())


def tokens_of(backbones: Backbones, name: str) -> Tokens | None:
    """The tokenizer of a resolved backbone; None: it is made with `tiny`, which is not trained yet."""
    if name in CLOSED:
        return word_level(list(CLOSED[name].words))
    if name == "tiny":
        folder = backbones.folder / f"tiny-{backbones.card('tiny').revision}"
        return load_tokens(folder, backbones.cache / "encoded", backbones.notice) if folder.is_dir() else None
    return load_tokens(backbones.model_folder(name), backbones.cache / "encoded", backbones.notice)
