"""Operations of kernels that PyTorch's counter has no formula for, from their shapes (multiply-add = 2)."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

Shape = Sequence[int]


def _attention(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """The CPU's attention; heads may share keys and values."""
    count: Callable[..., int] = sdpa_flop_count
    return count(q, [*k[:1], q[1], *k[2:]], [*v[:1], q[1], *v[2:]])


def _attention_backward(slope: Shape, q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """Its gradients: the scores once more, and four products."""
    count: Callable[..., int] = sdpa_backward_flop_count
    return count(slope, q, [*k[:1], q[1], *k[2:]], [*v[:1], q[1], *v[2:]])


def _matrix_vector(matrix: Shape, vector: Shape, *_: Any, **__: Any) -> int:
    del vector
    return 2 * math.prod(matrix)


def _sum_and_matrix_vector(added: Shape, matrix: Shape, vector: Shape, *_: Any, **__: Any) -> int:
    del added, vector
    return 2 * math.prod(matrix)


def _dot(left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    del right
    return 2 * math.prod(left)


def _recurrent(x: Shape, inward: Shape, recurrent: Shape, *_: Any, **__: Any) -> int:
    """A layer of an LSTM: ``x`` is ``[steps, rows, inputs]``; every step multiplies both matrices with every row."""
    return 2 * x[0] * x[1] * (math.prod(inward) + math.prod(recurrent))


def _self_attention(tokens: int, rows: int, width: int) -> int:
    """Projections and products of one self-attention over ``[rows, tokens, width]``."""
    return 2 * rows * tokens * 4 * width * width + 4 * rows * tokens * tokens * width


def _encoder_layer(x: Shape, *shapes: Shape, **__: Any) -> int:
    """`torch.nn.TransformerEncoderLayer` in evaluation: its operands 13 and 15 are the weights of the MLP."""
    rows, tokens, width = x
    mlp = 2 * math.prod(shapes[13]) + 2 * math.prod(shapes[15])
    return _self_attention(tokens, rows, width) + rows * tokens * mlp


_ATEN = torch.ops.aten
FORMULAS: Mapping[Any, Callable[..., int]] = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _ATEN.mv: _matrix_vector,
    _ATEN.addmv: _sum_and_matrix_vector,
    _ATEN.dot: _dot,
    _ATEN.mkldnn_rnn_layer: _recurrent,
    _ATEN._transformer_encoder_layer_fwd: _encoder_layer,
}
"""By kernel, for ``FlopCounterMode(custom_mapping=...)``."""
