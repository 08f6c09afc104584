"""Fixtures shared by the tests: tiny random backbones and their cards."""

from collections.abc import Callable

import pytest
import torch

from memory_bench.backbone import Backbone
from memory_bench.card import BackboneCard
from memory_bench.testing.backbones import card_of, tiny_backbone

torch.set_num_threads(1)  # tiny matrices: threads only wait for each other


@pytest.fixture
def make_backbone() -> Callable[..., Backbone]:
    """``make_backbone(family, **config)``: llama, gpt2, opt, or qwen3 (Llama family with q/k norms and key shift)."""
    return tiny_backbone


@pytest.fixture
def make_card() -> Callable[..., BackboneCard]:
    """``make_card(backbone, window=8)``."""
    return card_of
