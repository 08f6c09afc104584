"""Which family a Hugging Face model is of, by the modules of its layers, and what its layers see.

Unusual here: a module or a weight that a pass would not use is enough to refuse a model, whatever it is called; what
has the same modules and still computes otherwise is found by `memory_bench.backbone.agreement`.
"""

from typing import Any

from torch import nn

from memory_bench.errors import DataError

PARTS = {
    "gpt2": {"ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"},
    "opt": {
        *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
        *("self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"),
    },
    "llama": {
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        *("input_layernorm", "post_attention_layernorm"),
    },
}
"""The modules of a layer, by family."""

OPTIONAL = {"gpt2": set[str](), "opt": set[str](), "llama": {"self_attn.q_norm", "self_attn.k_norm"}}
"""Modules that a layer may have beside them."""

KNOWN = "use a Llama, Mistral, Qwen, SmolLM, Granite, GPT-2 or OPT causal LM"


def find_decoder(model: nn.Module) -> tuple[str, Any]:
    """The family (``llama``, ``gpt2`` or ``opt``) and the decoder stack of a causal language model.

    Raises:
        DataError: it is of none of them.
    """
    inner: Any = getattr(model, "transformer", None) or getattr(model, "model", None)
    family, blocks = "llama", getattr(inner, "layers", ()) if hasattr(inner, "rotary_emb") else ()
    if hasattr(inner, "wpe"):
        family, blocks = "gpt2", getattr(inner, "h", ())
    elif hasattr(inner, "decoder"):
        family, inner = "opt", inner.decoder
        blocks = getattr(inner, "layers", ()) if hasattr(inner, "project_in") else ()
    if not len(blocks) or not all(_known(family, block) for block in blocks):
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise DataError(f"'{kind}' is not a supported backbone: {KNOWN}.")
    return family, inner


def _known(family: str, block: nn.Module) -> bool:
    """A layer has all the modules of its family, and weights nowhere else."""
    modules = {name for name, _ in block.named_modules()}
    weighted = {name.rpartition(".")[0] for name, _ in block.named_parameters()}
    return modules >= PARTS[family] and weighted <= PARTS[family] | OPTIONAL[family]


def declared(config: Any, name: str) -> Any:
    """What a configuration says of `name` if its class knows the word; others keep it too, but nothing reads it."""
    return getattr(config, name, None) if hasattr(type(config), name) else None


def attention_sizes(family: str, config: Any) -> tuple[int, int]:
    """Heads of keys and values, and a head's width. GPT-2 and OPT have one size of each, whatever a file adds to it."""
    heads = int(config.num_attention_heads)
    shared, width = (getattr(config, name, None) for name in ("num_key_value_heads", "head_dim"))
    if family != "llama":
        shared = width = None
    return int(shared or heads), int(width or config.hidden_size // heads)


def windows_of(config: Any, layers: int) -> tuple[int | None, ...]:
    """Per layer, its sliding window; where a class has types of layers, of those that are called sliding."""
    window, types = declared(config, "sliding_window"), declared(config, "layer_types")
    if types is None:
        return (window,) * layers
    return tuple(window if kind == "sliding_attention" else None for kind in types[:layers])
