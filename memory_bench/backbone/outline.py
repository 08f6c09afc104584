"""The shape of a backbone without its weights: enough to see whether a model's options fit it, before anything runs."""

from typing import Any

import torch

from memory_bench.backbone.model import Backbone
from memory_bench.card import BackboneCard

HEAD_WIDTH = 4  # channels of a head, whatever the backbone's: options are about layers, heads and positions
VOCAB = 8


def outline(card: BackboneCard, *, full: bool = False) -> Backbone:
    """A random backbone with the card's family, layers, heads and positions; a few channels wide unless it is `full`.

    The 30 layers of SmolLM2 take a tenth of a second; its own weights would take seconds to load, or to be downloaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    width = (card.head_width if full else HEAD_WIDTH) * card.heads
    mlp, vocab = (card.mlp_width, card.vocab) if full else (width, VOCAB)
    embedded = card.width if full else width
    if not full and card.width < card.heads * card.head_width:
        embedded = width // 2  # OPT may embed in fewer channels than its layers have
    positions = card.max_positions or 1 << 20
    fields: dict[str, dict[str, Any]] = {
        "gpt2": {
            "n_embd": width, "n_layer": card.layers, "n_head": card.heads, "n_positions": positions, "n_inner": mlp,
        },
        "opt": {
            "hidden_size": width, "num_hidden_layers": card.layers, "num_attention_heads": card.heads, "ffn_dim": mlp,
            "word_embed_proj_dim": embedded, "max_position_embeddings": positions,
        },
        "llama": {
            "hidden_size": width, "num_hidden_layers": card.layers, "num_attention_heads": card.heads,
            "num_key_value_heads": card.kv_heads, "intermediate_size": mlp, "max_position_embeddings": positions,
        },
    }  # fmt: skip
    config = AutoConfig.for_model(card.family, vocab_size=vocab, **fields[card.family])
    build: Any = AutoModelForCausalLM.from_config
    with torch.random.fork_rng():
        return Backbone(build(config).eval())
