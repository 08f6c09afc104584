"""The model and the task keep every promise."""

from pathlib import Path

import pytest
import torch
from memory_bench_example.carry import Carry, CarryConfig
from memory_bench_example.colours import Colours

from memory_bench.data import Library
from memory_bench.testing import Check, check_task, model_checks, tiny_backbone


def build() -> Carry:
    """The same small model every time."""
    return Carry(tiny_backbone("llama"), CarryConfig(segment=8), torch.Generator().manual_seed(1))


@pytest.mark.parametrize("check", model_checks(), ids=lambda check: check.__name__)
def test_the_model(check: Check) -> None:
    """One promise after the other; `check_model(build)` would stop at the first that is broken."""
    check(build)


def test_the_task(tmp_path: Path) -> None:
    """The task makes its own data, so the library is asked for nothing."""
    check_task(Colours(), Library(None, tmp_path, hub=False))
