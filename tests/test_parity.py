"""Verification must be able to fail: every way in which a case can be wrong, every part of a model that it covers."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from memory_bench import plugins
from memory_bench.budget import Budget
from memory_bench.command import commands
from memory_bench.corpus import Line
from memory_bench.driver.stream import line_nll
from memory_bench.errors import UserError
from memory_bench.parity import cases as parity
from memory_bench.parity.cases import Case, Verdict, compare, find_cases, verify
from memory_bench.shipped import parity_folder, parity_text
from memory_bench.testing import card_of, tiny_backbone


def shipped() -> list[Case]:
    return list(find_cases([parity_folder()])) if list(parity_folder().glob("*/case.json")) else []


def smallest(model: str) -> Case:
    found = [case for case in shipped() if case.model == model]
    if not found:
        pytest.skip(f"no shipped case of {model}")
    return min(found, key=lambda case: sum(p.stat().st_size for p in case.folder.iterdir()))


def replay(case: Case) -> Verdict:
    return verify(Case(case.folder), plugins.load("parity", case.model))


@pytest.fixture
def copy(tmp_path: Path) -> Callable[..., Case]:
    """``copy(model, **changes)``: a shipped case with changed tensors in its files; `info` changes case.json."""

    def make(model: str, info: Callable[[dict[str, Any]], Any] | None = None, **changes: Callable[[dict], Any]) -> Case:
        folder = tmp_path / "case"
        named = parity_folder() / model
        shutil.copytree(named if named.is_dir() else smallest(model).folder, folder)
        if info is not None:
            read = json.loads((folder / "case.json").read_text())
            info(read)
            (folder / "case.json").write_text(json.dumps(read))
        for part, change in changes.items():
            tensors = load_file(folder / f"{part}.safetensors")
            change(tensors)
            save_file(tensors, folder / f"{part}.safetensors")
        return Case(folder)

    return make


@pytest.mark.parametrize("case", shipped(), ids=lambda case: case.name)
def test_shipped_cases_agree(case: Case) -> None:
    verdict = replay(case)
    assert verdict.ok, verdict.detail
    assert verdict.compared
    assert all(name.startswith("grad.") for name in verdict.skipped)


def surprisal(model: str) -> list[float]:
    """What `run` would see of the model."""
    backbone = tiny_backbone("llama")
    cls = plugins.load("models", model)
    built = cls(backbone, cls.fit(card_of(backbone), Budget("test")), torch.Generator().manual_seed(0)).eval()
    rng = torch.Generator().manual_seed(1)
    for p in built.memory_parameters().values():  # what starts at zero would hide what comes after it
        p.data += 0.05 * torch.randn(p.shape, generator=rng)
    lines = [Line(torch.randint(64, (60,), generator=rng), torch.arange(60) > 0, seed=n) for n in range(2)]
    with torch.no_grad():
        return line_nll(built, lines)


def spoil_hmt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recalled memory comes back a little too large."""
    from memory_bench.hmt.recall import MemoryCache

    mix = MemoryCache.mix

    def wrong(self: Any, *given: Any) -> Any:
        memory, weights = mix(self, *given)
        return memory * 1.05, weights

    monkeypatch.setattr(MemoryCache, "mix", wrong)


def spoil_rmt(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written is forgotten."""
    cls = plugins.load("models", "rmt")
    monkeypatch.setattr(cls, "remember", lambda self, state, segment, written: state)


def spoil_armt(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read is a little too large."""
    from memory_bench.baselines.armt import Association

    read = Association.read
    monkeypatch.setattr(Association, "read", lambda self, h, *of: h + 1.05 * (read(self, h, *of) - h))


def spoil_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """New rows go to the wrong end of the pool."""
    from memory_bench.baselines import memoryllm, mplus

    merge = memoryllm.merge_pool

    def wrong(*given: Any, **options: Any) -> Any:
        merged = merge(*given, **options)
        return merged.flip(-2) if isinstance(merged, Tensor) else merged

    for module in (memoryllm, mplus):
        monkeypatch.setattr(module, "merge_pool", wrong)


def spoil_autocompressor(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written is forgotten."""
    cls = plugins.load("models", "autocompressor")
    monkeypatch.setattr(cls, "_remember", lambda self, state, written, real: state)


def spoil_infini_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found is a little too large."""
    from memory_bench.baselines.infini_attention import CompressiveMemory

    find = CompressiveMemory.find
    monkeypatch.setattr(CompressiveMemory, "find", lambda self, *given: 1.05 * find(self, *given))


def spoil_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are found by the opposite of their keys: the worst are chosen."""
    from memory_bench.baselines.parts.block_store import BlockStore

    represent = BlockStore._representatives
    monkeypatch.setattr(BlockStore, "_representatives", lambda *given: -represent(*given))


@pytest.mark.parametrize(
    ("model", "spoil"),
    [
        ("autocompressor", spoil_autocompressor),
        ("infini-attention", spoil_infini_attention),
        ("infllm", spoil_blocks),
        ("emllm", spoil_blocks),
        ("hmt", spoil_hmt),
        ("rmt", spoil_rmt),
        ("armt", spoil_armt),
        ("memoryllm", spoil_pool),
        ("mplus", spoil_pool),
    ],
)
def test_breaking_the_class_breaks_verify_and_run(
    model: str, spoil: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [case for case in shipped() if case.model == model]
    if not cases:
        pytest.skip(f"no shipped case of {model}")
    before = surprisal(model)
    assert all(replay(case).ok for case in cases)
    spoil(monkeypatch)
    assert not all(replay(case).ok for case in cases)
    assert surprisal(model) != pytest.approx(before, abs=1e-3)


@pytest.mark.parametrize(
    "model",
    ["hmt", "rmt", "armt", "autocompressor", "infini-attention", "memoryllm", "mplus", "infllm", "emllm"],
)
def test_an_unknown_setting_is_an_error(model: str, copy: Callable[..., Case]) -> None:
    case = copy(model, lambda info: info["memory"].update(fancy_setting=3))
    with pytest.raises(UserError, match=r"unknown memory setting.*fancy_setting"):
        replay(case)


@pytest.mark.parametrize("model", ["hmt", "rmt", "armt", "autocompressor", "infini-attention", "memoryllm"])
def test_a_tensor_that_cannot_be_compared_fails_the_case(model: str, copy: Callable[..., Case]) -> None:
    case = copy(model, expected=lambda tensors: tensors.update({"new.kind.of.output": torch.ones(2)}))
    verdict = replay(case)
    assert not verdict.ok
    assert "new.kind.of.output" in verdict.skipped
    assert "new.kind.of.output" in verdict.detail


@pytest.mark.parametrize("model", ["hmt", "rmt", "armt", "autocompressor", "infini-attention", "memoryllm", "mplus"])
def test_altered_weights_name_the_first_tensor_that_diverges(model: str, copy: Callable[..., Case]) -> None:
    def alter(tensors: dict[str, Tensor]) -> None:
        name = next(k for k in sorted(tensors) if re.search(r"^backbone.*(mlp|fc1)", k) and tensors[k].dim() == 2)
        tensors[name] = tensors[name] + 0.1 * torch.randn(
            tensors[name].shape, generator=torch.Generator().manual_seed(0)
        )

    case = copy(model, weights=alter)
    verdict = replay(case)
    names = list(case.tensors("expected"))
    assert not verdict.ok
    named = verdict.detail.split("[")[0].split(":")[0]
    assert named in names
    assert "instead of" in verdict.detail


@pytest.mark.parametrize("model", ["hmt", "rmt", "armt", "autocompressor", "infini-attention", "memoryllm", "mplus"])
def test_weights_are_loaded_strictly(model: str, copy: Callable[..., Case]) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["memory.of_another_model"] = torch.ones(1)

    with pytest.raises(UserError, match="weights do not fit"):
        replay(copy(model, weights=add))


def test_a_missing_backbone_weight_is_an_error(copy: Callable[..., Case]) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        del tensors[next(k for k in sorted(tensors) if "norm" in k or ".ln_" in k)]

    with pytest.raises(UserError, match="backbone weights do not fit"):
        replay(copy("rmt", weights=drop))


def test_tied_weights_that_differ_fail_the_case(copy: Callable[..., Case]) -> None:
    def untie(tensors: dict[str, Tensor]) -> None:
        tensors["backbone.transformer.wte.weight"] = tensors["backbone.transformer.wte.weight"] + 0.1

    folder = parity_folder() / "rmt-gpt2-right-mask"
    if not folder.is_dir() or "backbone.lm_head.weight" not in load_file(folder / "weights.safetensors"):
        pytest.skip("no shipped case with both tied weights")
    case = copy(folder.name, weights=untie)
    verdict = replay(case)
    assert not verdict.ok
    assert "lm_head.weight" in verdict.detail or "wte.weight" in verdict.detail


# The comparison itself, on tensors made up.


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Case]:
    """``made(expected, **tolerance)``."""

    def make(expected: Mapping[str, Tensor], **tolerance: float) -> Case:
        info = {
            "model": "m",
            "source": {},
            "backbone": {},
            "memory": {},
            "tolerance": {"atol": 1e-4, "rtol": 0.0, **tolerance},
        }
        (tmp_path / "case.json").write_text(json.dumps(info))
        save_file(dict(expected), tmp_path / "expected.safetensors")
        return Case(tmp_path)

    return make


def test_equal_tensors_agree(made: Callable[..., Case]) -> None:
    case = made({"logits": torch.ones(2, 3), "ids": torch.arange(4)})
    verdict = compare(case, {"logits": torch.ones(2, 3) + 5e-5, "ids": torch.arange(4)})
    assert verdict.ok
    assert verdict.max_abs == pytest.approx(5e-5, rel=0.01)
    assert sorted(verdict.compared) == ["ids", "logits"]


@pytest.mark.parametrize("name", ["grad.memory.x", "logits"])
@pytest.mark.parametrize("relative", [{}, {"gradients_relative_to_max": 1e-3}])
def test_empty_tensors_agree(name: str, relative: dict[str, float], made: Callable[..., Case]) -> None:
    case = made({name: torch.zeros(0, 3)}, **relative)
    assert compare(case, {name: torch.zeros(0, 3)}).ok
    assert not compare(case, {name: torch.zeros(1, 3)}).ok


@pytest.mark.parametrize(
    ("got", "detail"),
    [
        (torch.tensor([[1.0, 1.0], [1.0, 2.0]]), r"logits\[1, 1\]: 2 instead of 1"),
        (torch.full((2, 2), float("nan")), r"logits\[0, 0\]: nan instead of 1"),
        (torch.ones(2, 3), r"shape \[2, 3\] instead of \[2, 2\]"),
    ],
)
def test_the_first_divergence_is_named(got: Tensor, detail: str, made: Callable[..., Case]) -> None:
    verdict = compare(made({"logits": torch.ones(2, 2)}), {"logits": got})
    assert not verdict.ok
    assert re.search(detail, verdict.detail)
    json.dumps(parity.to_json(verdict), allow_nan=False)


def test_equal_infinities_agree(made: Callable[..., Case]) -> None:
    case = made({"scores": torch.tensor([-torch.inf, 1.0])})
    assert compare(case, {"scores": torch.tensor([-torch.inf, 1.0])}).ok
    assert not compare(case, {"scores": torch.tensor([torch.inf, 1.0])}).ok


def test_gradients_may_be_left_out_and_are_relative_to_the_largest(made: Callable[..., Case]) -> None:
    case = made({"loss": torch.ones(1), "grad.w": torch.tensor([100.0, 0.0])}, gradients_relative_to_max=1e-2)
    left_out = compare(case, {"loss": torch.ones(1)})
    assert left_out.ok
    assert left_out.skipped == ("grad.w",)
    assert compare(case, {"loss": torch.ones(1), "grad.w": torch.tensor([100.0, 0.9])}).ok
    assert not compare(case, {"loss": torch.ones(1), "grad.w": torch.tensor([100.0, 1.1])}).ok


def test_a_replay_that_fails_is_a_verdict(made: Callable[..., Case]) -> None:
    def broken(case: Case) -> dict[str, Tensor]:
        raise RuntimeError("shapes")

    verdict = verify(made({"loss": torch.ones(1)}), broken)
    assert (verdict.ok, verdict.detail, verdict.skipped) == (False, "RuntimeError: shapes", ("loss",))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": "rmt"}'])
def test_a_malformed_case_is_a_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "case.json").write_text(content)
    with pytest.raises(UserError, match="is no reference case"):
        commands.verify([tmp_path], write=False, as_json=False)


def test_a_place_without_cases_is_a_sentence(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="neither a reference case nor a folder"):
            commands.verify([place], write=False, as_json=False)


def test_the_command_prints_json_and_says_who_failed(
    copy: Callable[..., Case], capsys: pytest.CaptureFixture[str]
) -> None:
    good = smallest("rmt")
    assert commands.verify([good.folder], write=False, as_json=True) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert (shown["case"], shown["model"], shown["ok"], shown["skipped"]) == (good.name, "rmt", True, [])
    bad = copy("rmt", lambda info: info.update(model="nobody"))
    assert commands.verify([bad.folder], write=False, as_json=False) == 1
    assert "FAIL case (nobody): no replay for 'nobody' is installed" in capsys.readouterr().out


def test_certificates_count_what_agrees() -> None:
    verdicts = [
        Verdict("a", "m", True, 1e-6, ("x",), (), ""),
        Verdict("b", "m", False, None, (), ("x",), ""),
        Verdict("c", "n", True, 0.0, ("x",), (), ""),
    ]
    found = parity.certificates(verdicts, {"a": "r@1", "b": "r@2", "c": "s@3"})
    assert found["m"] == {"cases": 2, "agree": 1, "max_abs": 1e-6, "sources": ["r@1", "r@2"]}
    assert [parity_text(found[name]) for name in ("m", "n")] == ["none", "exact"]
    assert parity_text({"cases": 1, "agree": 1, "max_abs": 2e-6}) == "max|Δ|=2e-06"
