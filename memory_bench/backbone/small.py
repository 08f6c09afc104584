"""Small backbones that are made here: their sizes, their fresh weights, and what is known of them.

`tiny` is trained on books (`memory_bench.zoo.pretrain`). The others belong to a task with a closed vocabulary, have one
token per word and no positions, and start untrained in every training.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch

from memory_bench.backbone.model import Backbone
from memory_bench.card import BackboneCard
from memory_bench.data import facts, nouns, studies

# A gated feed-forward of 8/3 the width has the parameters of a plain one of 4 times the width.
TINY = {"vocab": 1024, "width": 128, "layers": 2, "heads": 4, "mlp_width": 344, "window": 32}
SMALLEST = {"vocab": 0, "width": 64, "layers": 2, "heads": 4, "mlp_width": 172}
TINY_VERSION = 1


@dataclass(frozen=True, slots=True)
class Closed:
    """A backbone of a task's own: two layers, 64 wide.

    Attributes:
        words: its vocabulary.
        window: tokens of text per step.
    """

    words: tuple[str, ...]
    window: int

    @property
    def shape(self) -> dict[str, int]:
        """Its sizes but the vocabulary's."""
        return {**SMALLEST, "window": self.window}

    @property
    def sizes(self) -> dict[str, int]:
        """What `small_model` and `small_card` want to know."""
        return {**self.shape, "vocab": len(self.words)}


CLOSED = {
    "invented-studies": Closed(studies.WORDS, studies.SEGMENT),
    "key-value": Closed(facts.WORDS, facts.SEGMENT),
    "noun-recall": Closed(nouns.WORDS, facts.SEGMENT),
}
"""Backbones of closed vocabularies, by the name that a task's `TrainingPlan` gives."""


def small_model(sizes: dict[str, int], rng: torch.Generator, *, rotary: bool = True) -> Backbone:
    """A fresh small backbone: Qwen3 (RMSNorm, rotary positions, q/k-norm, tied embedding) with the key shift.

    Matrices are drawn from `rng` with standard deviation ``width ** -0.5`` (halved for the two projections that write
    to the residual stream, 0.1 for the embedding): the usual 0.02 leaves a model this small 0.2 bits per byte behind
    after 280 steps. Without `rotary` there are no positions at all.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["width"],
        intermediate_size=sizes["mlp_width"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["heads"],
        head_dim=sizes["width"] // sizes["heads"],
        max_position_embeddings=1 << 20,
        tie_word_embeddings=True,
        use_sliding_window=False,
        pad_token_id=None,
    )
    with torch.random.fork_rng():  # the constructor draws from the global generator; its values are overwritten below
        model = Qwen3ForCausalLM(config)
    backbone = Backbone(cast(Any, model), key_shift=True)
    backbone.rotary = rotary
    with torch.no_grad():
        for name, p in backbone.named_parameters():
            if p.dim() == 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = 0.1 if "embed" in name else sizes["width"] ** -0.5 / (2 if writes else 1)
                p.copy_(torch.randn(p.shape, generator=rng) * scale)
    return backbone.float()


def small_card(name: str, sizes: dict[str, int], revision: str, *, rotary: bool = True) -> BackboneCard:
    """The card of a `small_model`."""
    d, mlp, layers, heads, vocab = (sizes[k] for k in ("width", "mlp_width", "layers", "heads", "vocab"))
    # q, k, v, o and three feed-forward matrices, two norms, q/k-norm scales and the key shift in every layer
    per_layer = 4 * d * d + 3 * d * mlp + 2 * d + 2 * (d // heads) + d
    return BackboneCard(
        name=name, family="llama", width=d, layers=layers, heads=heads, kv_heads=heads, head_width=d // heads,
        mlp_width=mlp, vocab=vocab, window=sizes["window"], pretrained=False,
        parameters=vocab * d + layers * per_layer + d, revision=revision, rotary=rotary,
    )  # fmt: skip
