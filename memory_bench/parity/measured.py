"""Facts about the installed models that are measured rather than declared: look-ahead and parameters added."""

from typing import Any

import torch

from memory_bench import plugins
from memory_bench.backbone.outline import outline
from memory_bench.backbone.small import TINY, small_card, small_model
from memory_bench.budget import PRESETS
from memory_bench.card import BackboneCard
from memory_bench.testing import measure_look_ahead

SMOLLM2 = BackboneCard(
    name="smollm2-135m", family="llama", width=576, layers=30, heads=9, kv_heads=3, head_width=64, mlp_width=1536,
    vocab=49_152, window=512, pretrained=True, parameters=134_515_008,
)  # fmt: skip


def measure_models() -> dict[str, dict[str, Any]]:
    """Per model: measured look-ahead at the tiny size, parameters added to `tiny` and to SmolLM2-135M."""
    budget = PRESETS["cpu-minutes"]
    tiny = small_model(TINY, torch.Generator().manual_seed(0))
    large = outline(SMOLLM2, full=True)
    found: dict[str, dict[str, Any]] = {}
    for name in plugins.installed("models"):
        cls = plugins.load("models", name)
        entry: dict[str, Any] = {"added_parameters": {}}
        for card, backbone in ((small_card("tiny", TINY, ""), tiny), (SMOLLM2, large)):
            if card.family not in cls.families:
                continue
            model = cls(backbone, cls.fit(card, budget), torch.Generator().manual_seed(0)).eval()
            entry["added_parameters"][card.name] = model.added_parameters()
            if card.name == "tiny":
                entry["look_ahead"] = measure_look_ahead(model)
        found[name] = entry
    return found
