"""The GPU tier: every installed model in bfloat16 and on CUDA. On a machine without CUDA the CPU's part runs alone."""

from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch

from memory_bench.protocol import MemoryModel, Segment
from memory_bench.testing import Check, model_checks
from tests.test_conformance import KINDS, MODELS, build, load

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
# Of the spread of the logits: bfloat16 keeps 8 bits, and a hard choice of memories may fall differently now and then.
HALF_PRECISION = 0.1


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return str(request.param)


def cases() -> list[Any]:
    """(model, backbone): one backbone a family."""
    found = []
    for name, entry in sorted(MODELS.items()):
        kind = load(entry)
        families = ("llama",) if isinstance(kind, Exception) else kind.families
        found += [pytest.param(entry, KINDS[family][0], id=f"{name}-{family}") for family in families]
    return found


def made(entry: EntryPoint, backbone: str) -> MemoryModel[Any]:
    kind = load(entry)
    if isinstance(kind, Exception):
        pytest.fail(f"{entry.value} cannot be imported: {kind!r}")
    return build(kind, backbone).eval()


@torch.no_grad()
def streamed(model: MemoryModel[Any], device: str, dtype: torch.dtype) -> torch.Tensor:
    """Logits ``[rows, tokens, vocab]`` (float32, CPU) of five segments of two rows."""
    model.to(device=device, dtype=dtype)
    rng = torch.Generator().manual_seed(3)
    state, found = model.open(2, seeds=[1, 2]), []
    for _ in range(5):
        ids = torch.randint(model.backbone.vocab, (2, model.traits.segment or 8), generator=rng)
        readout, state = model.step(state, Segment.full(ids.to(device)))
        found.append(readout.logits().float().cpu())
    return torch.cat(found, dim=1)


@pytest.mark.parametrize(("entry", "backbone"), cases())
def test_bfloat16_reads_as_float32_does(entry: EntryPoint, backbone: str, device: str) -> None:
    exact = streamed(made(entry, backbone), "cpu", torch.float32)
    rounded = streamed(made(entry, backbone), device, torch.bfloat16)
    assert rounded.isfinite().all()
    assert float((rounded - exact).abs().median()) < HALF_PRECISION * float(exact.std())


@pytest.mark.parametrize(("entry", "backbone"), cases())
def test_a_device_computes_as_the_cpu_does(entry: EntryPoint, backbone: str, device: str) -> None:
    if device == "cpu":
        pytest.skip("it is the CPU")
    exact = streamed(made(entry, backbone), "cpu", torch.float32)
    torch.testing.assert_close(streamed(made(entry, backbone), device, torch.float32), exact, atol=2e-3, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("check", model_checks(), ids=lambda check: check.__name__)
@pytest.mark.parametrize(("entry", "backbone"), cases())
def test_promises_hold_on_a_device(entry: EntryPoint, backbone: str, check: Check) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    check(lambda: made(entry, backbone).to("cuda"))
