"""The official LongMem backbone, a decoder of parallel blocks with ALiBi: for reference cases, no model to benchmark.

It has what `LongMem` asks of a backbone. Source: ``modeling_newgpt.py`` of Victorwz/LongMem@b7f3c6b.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memory_bench.backbone.reuse import Pass, Resumed
from memory_bench.errors import UserError
from memory_bench.state import State

from ..parts.side_network import ParallelLayers, Shape, alibi_mask, empty_linear

RENAMED = (
    (r"^transformer\.h\.(\d+)\.", r"blocks.\1."),
    (r"\.attn\.", ".attention."),
    (r"\.out_proj\.", ".o_proj."),
    (r"\.ln_1\.", ".norm."),
    (r"^transformer\.ln_f\.", "norm."),
    (r"^transformer\.wte\.", "wte."),
)
"""Official names of weights and ours."""


class AlibiDecoder(ParallelLayers):
    """Token embedding, parallel blocks, final norm and a head with bias, all values zero until they are loaded.

    Args:
        shape: sizes of the blocks.
        vocab: number of tokens.
        epsilon: of the layer norms.
    """

    def __init__(self, shape: Shape, vocab: int, *, epsilon: float = 1e-6) -> None:
        super().__init__(shape, None, epsilon=epsilon, activation=partial(F.gelu, approximate="tanh"))
        self.layers, self.vocab = shape.layers, vocab
        self.width = self.hidden_width = shape.width
        self.max_positions = None
        self.wte = nn.Embedding.from_pretrained(torch.zeros(vocab, shape.width))
        self.lm_head = empty_linear(shape.width, vocab, bias=True)
        self.device, self.dtype = self.wte.weight.device, self.wte.weight.dtype

    def embed(self, ids: Tensor) -> Tensor:
        """See `Backbone.embed`."""
        return cast(Tensor, self.wte(ids))

    def begin(self, embeds: Tensor, positions: Tensor) -> Tensor:
        """See `Backbone.begin`: there are no position embeddings."""
        del positions
        return embeds

    def project_out(self, hidden: Tensor) -> Tensor:
        """See `Backbone.project_out`: nothing."""
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """See `Backbone.head`."""
        return cast(Tensor, self.lm_head(hidden))

    def positions(self, mask: Tensor) -> Tensor:
        """See `Backbone.positions`."""
        return (mask.long().cumsum(dim=1) - 1).clamp(min=0)

    def rotation(self, positions: Tensor, *, queries: bool = False) -> tuple[None, ...]:
        """See `Backbone.rotation`: nothing is rotated."""
        del positions, queries
        return (None,) * self.layers

    def resume(self, embeds: Tensor, places: tuple[Tensor, ...], context: tuple[State, ...] = ()) -> Resumed:
        """See `Backbone.resume`: every pass begins with the first token."""
        return Resumed(Pass(embeds, places, context), None)

    def visible(self, mask: Tensor, first: int = 0, *, positions: Tensor) -> tuple[Tensor, ...]:
        """See `Backbone.visible`; here with ALiBi, as something to add to the logits."""
        return (alibi_mask(mask, positions, self.heads, self.dtype)[:, :, first:],) * self.layers


def load_decoder(config: Mapping[str, Any], weights: Mapping[str, Tensor], case: str) -> AlibiDecoder:
    """The decoder of a recorded configuration with its weights, loaded strictly.

    Raises:
        UserError: the configuration has another kind of position or activation, or the weights do not fit.
    """
    for name, wanted in (("mode", "alibi"), ("activation_function", "gelu_new")):
        if config.get(name, wanted) != wanted:
            raise UserError(f"Case {case}: {name} = '{config[name]}' of the backbone is not known: use '{wanted}'.")
    width = config["n_embd"]
    shape = Shape(config["n_layer"], width, config.get("n_inner") or 4 * width, config["n_head"])
    decoder = AlibiDecoder(shape, config["vocab_size"], epsilon=config.get("layer_norm_epsilon", 1e-5))
    renamed = {_ours(name): tensor for name, tensor in weights.items()}
    own = decoder.state_dict()
    wrong = sorted(set(own) ^ set(renamed)) or [k for k in own if own[k].shape != renamed[k].shape]
    if wrong:
        raise UserError(f"Case {case}: backbone weights do not fit ({', '.join(wrong[:3])} …).")
    decoder.load_state_dict(renamed)
    return decoder


def _ours(name: str) -> str:
    for official, own in RENAMED:
        name = re.sub(official, own, name)
    return name
