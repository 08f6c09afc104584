"""What can be known of a backbone without loading it: enough to size a model to it and to plan a run."""

from dataclasses import dataclass

NAMED = {
    "tiny": "0.5M parameters, trained by the harness on the training books; the default without a GPU",
    "smollm2-135m": "SmolLM2-135M-Instruct from the hub, full precision",
    "smollm2-135m-q4": "the same model from a 4-bit GGUF file in a Python wheel, converted once",
}
"""Backbones that have a name, with what they are in a sentence."""

HELPERS = {"minilm": "sentence embeddings, all-MiniLM-L6-v2 from a Python wheel, for models that search by them"}
"""Frozen models beside a backbone, with what they are in a sentence."""

ADAPTED = ("q", "k", "v", "o", "gate", "up", "down")
"""What an adapter can be beside: the projections of attention and feed-forward. GPT-2 and OPT have no gate, and GPT-2
makes q, k and v by one projection, which has one adapter if any of the three is named."""


@dataclass(frozen=True, slots=True)
class BackboneCard:
    """Facts about a backbone.

    Attributes:
        name: as the user gave it.
        family: ``llama``, ``gpt2`` or ``opt``.
        width: embedding width d.
        layers, heads, kv_heads, head_width, mlp_width, vocab: sizes.
        window: tokens of text a model reads per step by default.
        pretrained: it has been trained on other data before, so it can be asked zero-shot.
        parameters: number of weights.
        max_positions: longest sequence; None where no learned positions set a hard limit.
        rotary: keys and queries are rotated to their positions; without either kind it has no positions at all.
        revision: content hash of its files, or of the recipe that makes it.
    """

    name: str
    family: str
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    vocab: int
    window: int
    pretrained: bool
    parameters: int
    max_positions: int | None = None
    rotary: bool = True
    revision: str = ""

    @property
    def small(self) -> bool:
        """Whether methods take the sizes that suit the `tiny` backbone and its like."""
        return self.width <= 256
