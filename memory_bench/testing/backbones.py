"""Tiny random backbones for tests: real Hugging Face architectures at width 32, built in milliseconds."""

from typing import Any

import torch

from memory_bench.backbone.model import Backbone
from memory_bench.card import BackboneCard

VOCAB, WIDTH, LAYERS, HEADS, KV_HEADS, MLP, POSITIONS = 64, 32, 2, 4, 2, 48, 192

_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": POSITIONS,
}
WINDOW = 11  # tokens that layers with a window see: more than a segment of the tests, less than two
_STRETCHED = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 32.0,
    "original_max_position_embeddings": 6,
    "llama_4_scaling_beta": 0.5,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": None},
    "qwen3": {**_LLAMA, "head_dim": WIDTH // HEADS, "tie_word_embeddings": True},
    "mistral-window": {**_LLAMA, "sliding_window": WINDOW},
    "smollm3-window": {**_LLAMA, "no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": WINDOW},
    "ministral3": {**_LLAMA, "rope_parameters": _STRETCHED},
    "ministral": {
        **_LLAMA,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "head_dim": WIDTH // HEADS,
    },
    "smollm3": {**_LLAMA, "no_rope_layers": [0, 1]},
    "granite": {
        **_LLAMA,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
    "gpt2": {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS},
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "word_embed_proj_dim": WIDTH,
        "ffn_dim": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
    },
}


def tiny_backbone(kind: str = "llama", *, key_shift: bool | None = None, seed: int = 0, **config: Any) -> Backbone:
    """A random backbone in float32: vocabulary 64, width 32, 2 layers, 4 heads (Llama and Qwen3: 2 kv heads).

    Every parameter, biases and norms included, is drawn at a scale where a forgotten one shows.

    Args:
        kind: ``llama``, ``gpt2``, ``opt``; of the Llama family also ``qwen2``, ``mistral``, ``qwen3`` (q/k norms and,
            by default, the key shift), ``mistral-window`` (a sliding window), ``ministral`` (in every second layer),
            ``smollm3`` (a layer without rotary positions) and ``smollm3-window`` (which sees a window), ``ministral3``
            (queries that grow with their position), ``granite`` (multipliers).
        key_shift: see `Backbone`; default: only with ``qwen3``.
        seed: of the weights; the global random state is left as it was.
        config: fields of the Hugging Face configuration to change.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    build: Any = AutoModelForCausalLM.from_config
    usual = {**_CONFIGS[kind], "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    settings = AutoConfig.for_model(kind.removesuffix("-window"), **{**usual, **config})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build(settings, dtype=torch.float32).eval()
        backbone = Backbone(model, key_shift=kind == "qwen3" if key_shift is None else key_shift)
        with torch.no_grad():
            for parameter in backbone.parameters():
                scale = 0.2 if parameter.dim() > 1 else 0.1
                centre = parameter.mean().round() if parameter.dim() == 1 else 0.0  # 1 for norms, 0 for biases
                parameter.copy_(centre + scale * torch.randn_like(parameter))
    return backbone


def card_of(backbone: Backbone, *, window: int = 8, pretrained: bool = False) -> BackboneCard:
    """The card of a loaded (tiny) backbone."""
    return BackboneCard(
        name=f"tiny-{backbone.family}",
        family=backbone.family,
        width=backbone.width,
        layers=backbone.layers,
        heads=backbone.heads,
        kv_heads=backbone.kv_heads,
        head_width=backbone.head_width,
        mlp_width=4 * backbone.width if backbone.family == "gpt2" else MLP,
        vocab=backbone.vocab,
        window=window,
        pretrained=pretrained,
        parameters=sum(p.numel() for p in backbone.parameters()),
        max_positions=backbone.max_positions,
        rotary=backbone.rotary,
    )
