"""The official layout of HMT checkpoints: state-dict names of its ``RecurrentWrapper`` (stage 1 without recall)."""

from collections.abc import Mapping
from typing import Any

from memory_bench.weights.released import Release, Shape
from memory_bench.weights.transfer import Layout, Place, backbone_places, embedding_width

RECALL = ("mem", "cross_attn.wq.weight", "cross_attn.wk.weight")


class HMTLayout(Layout):
    """``memory_cell.memory``, the summary prompt ``mem``, ``cross_attn.wq`` and ``.wk``, and ``memory_cell.model``.

    ``memory_cell.mem_map`` is in the official class and used by nothing that is run here.
    """

    def options(self, release: Release, dtype: str) -> dict[str, Any]:
        """Number of memory tokens, whether there is recall, and its width."""
        shapes = release.shapes
        options: dict[str, Any] = {"recall": any(name in shapes for name in RECALL)}
        if "memory_cell.memory" in shapes:
            options["memory_tokens"] = shapes["memory_cell.memory"][0]
        if "cross_attn.wq.weight" in shapes:
            options["recall_width"] = shapes["cross_attn.wq.weight"][0]
        return options

    def places(self, config: Any, backbone: Mapping[str, Shape]) -> dict[str, Place]:
        """See the class."""
        width = embedding_width(backbone)
        places = backbone_places(backbone, "memory_cell.model.")
        places["memory_cell.memory"] = Place("initial_memory", (config.memory_tokens, width))
        for name in ("linear", "inv_linear"):
            places[f"memory_cell.mem_map.{name}.weight"] = Place("", (width, width), optional=True)
        if config.recall:
            places["mem"] = Place("summary_prompt", (1, width))
            for theirs, ours in (("wq", "recall_query"), ("wk", "recall_key")):
                places[f"cross_attn.{theirs}.weight"] = Place(f"{ours}.weight", (config.recall_width, width))
        return places
