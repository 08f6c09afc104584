"""The same start for every cell: what a process holds before its model is built is loaded before its meter starts.

Libraries that load late (pandas, pyarrow, a family's modelling code), the kernels of a first forward and backward pass
and of a first AdamW step, and the pools of threads would else be charged to the model that happens to come first.
"""

import ctypes
import gc
import importlib
import sys
from contextlib import suppress

import torch
from torch import nn

LATE = (
    "pandas",
    "pyarrow.parquet",
    "safetensors.torch",
    "torch.utils.checkpoint",
    "transformers.modeling_utils",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
)


def warm_up() -> None:
    """Load what every cell uses sooner or later, by using it once."""
    for name in LATE:
        with suppress(ImportError):
            importlib.import_module(name)
    state = torch.random.get_rng_state()
    try:
        _one_step()
    finally:
        torch.random.set_rng_state(state)


def _one_step() -> None:
    """A step of a tiny network with what the backbones use, on the CPU."""
    with torch.enable_grad():
        embedding, inner, head = nn.Embedding(64, 64), nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
        parameters = [p for layer in (embedding, inner, head) for p in layer.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        ids = torch.arange(64).view(2, 32)
        hidden = nn.functional.silu(inner(nn.functional.rms_norm(embedding(ids), (64,))))
        q = hidden.view(2, 32, 4, 16).transpose(1, 2)
        mask = torch.ones(32, 32, dtype=torch.bool).tril()
        mixed = nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask) + q.softmax(-1)
        logits = head(mixed.transpose(1, 2).reshape(2, 32, 64))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def settle() -> None:
    """Give back what is free: a model finds no memory that was freed before it, which it would be given uncharged."""
    gc.collect()
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
