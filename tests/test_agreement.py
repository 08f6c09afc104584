"""A backbone that does not compute here what its own forward computes is refused before anything runs."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import World
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from memory_bench.backbone.agreement import FAR, Found, compare, named_lengths, text_length
from memory_bench.backbone.model import Backbone
from memory_bench.data import Library
from memory_bench.errors import DataError
from memory_bench.testing import tiny_backbone
from memory_bench.weights.transfer import meta_backbone
from memory_bench.zoo import compared
from memory_bench.zoo.compared import check_agreement
from memory_bench.zoo.named import Backbones

TOKENS = 300
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}
LONG = {
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 2.0,
    }
}  # fmt: skip


def drawn(kind: str, **options: Any) -> nn.Module:
    """A random model whose every parameter matters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**SIZES, **options})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_((p.mean().round() if p.dim() == 1 else 0) + (0.2 if p.dim() > 1 else 0.1) * torch.randn_like(p))
    return model


def changed(when: Callable[[Tensor, Any], bool]) -> nn.Module:
    """A Llama whose own forward does something else in its first layer, where `when(hidden, positions)` says so."""
    model = tiny_backbone("llama").model

    def hook(layer: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
        return out.roll(1, -1) if when(args[0] if args else kwargs["hidden_states"], kwargs["position_ids"]) else out

    model.model.layers[0].register_forward_hook(hook, with_kwargs=True)  # type: ignore[union-attr, index]
    return model


@pytest.mark.parametrize(
    "kind", ["llama", "mistral-window", "ministral", "ministral3", "granite", "gpt2", "opt", "qwen3"]
)
def test_what_is_supported_agrees(kind: str) -> None:
    model = tiny_backbone(kind).model
    found = compare(model, min(TOKENS, Backbone(model).max_positions or TOKENS))
    assert not found.fault
    assert found.deviation < 1e-4


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", DYNAMIC),  # rotary frequencies follow the longest position read so far
        ("llama", LONG),  # and switch beyond a length
        ("ernie4_5", {}),  # rotates pairs of neighbours
        ("helium", {}),
        ("olmo", {"clip_qkv": 0.1}),
        ("stablelm", {}),  # rotates a part of a head
        ("gpt_bigcode", {"n_embd": 32, "n_layer": 2, "n_head": 4}),  # one head of keys
        (
            "gpt_bigcode",
            {"n_embd": 32, "n_layer": 2, "n_head": 4, "multi_query": False},
        ),  # queries, keys, values by head
    ],
)
def test_what_only_looks_alike_deviates(kind: str, options: dict[str, Any]) -> None:
    found = compare(drawn(kind, **options), TOKENS if kind != "gpt_bigcode" else 128)
    assert found.kind == kind
    assert found.fault


@pytest.mark.parametrize(
    ("when", "named"),
    [
        (lambda hidden, where: hidden.shape[1] > 512, "in a text of 600 tokens"),
        (lambda hidden, where: int(where.max()) >= FAR, "at position 131,072"),
        (lambda hidden, where: hidden.shape[1] < 100, "among rows with padding"),
    ],
    ids=["long", "far", "short"],
)
def test_a_change_that_begins_somewhere_is_found_there(when: Callable[[Tensor, Any], bool], named: str) -> None:
    assert named in compare(changed(when), 600).fault
    assert not compare(changed(lambda hidden, where: False), 600).fault


def test_hidden_entries_of_the_vocabulary_hide_no_deviation() -> None:
    def hide(head: Any, args: Any, out: Tensor) -> Tensor:
        return out.index_fill(-1, torch.tensor([5, 7]), -torch.inf)

    right, wrong = tiny_backbone("llama").model, changed(lambda hidden, positions: hidden.shape[1] > 64)
    for model in (right, wrong):
        model.get_output_embeddings().register_forward_hook(hide)  # type: ignore[operator]
    assert not compare(right, TOKENS).fault
    assert "deviate" in compare(wrong, TOKENS).fault


def test_padding_that_moves_positions_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Backbone.positions
    monkeypatch.setattr(Backbone, "positions", lambda self, mask: own(self, mask, count_padding=True))
    assert "padding" in compare(tiny_backbone("gpt2").model, 100).fault


def test_a_change_in_16_bits_alone_is_found() -> None:
    half = changed(lambda hidden, where: hidden.dtype == torch.bfloat16).to(torch.bfloat16)
    fine = tiny_backbone("llama").model.to(torch.bfloat16)
    exact = tiny_backbone("llama").model
    assert not compare(changed(lambda hidden, where: hidden.dtype == torch.bfloat16), TOKENS).fault
    assert not compare(exact, TOKENS, fine).fault
    assert compare(exact, TOKENS, half).fault


def test_frequencies_in_32_bits_are_no_obstacle_in_16() -> None:
    """OLMo's."""
    model = drawn("olmo")
    assert not compare(model, 100, copy.deepcopy(model).to(torch.bfloat16)).fault


def test_texts_are_longer_than_what_a_configuration_names() -> None:
    nested = {
        "a": {"attention_chunk_size": 70},
        "sliding_window": 9,
        "max_window_layers": 5000,
        "use_sliding_window": True,
    }
    assert sorted(named_lengths(nested)) == [9, 70]
    for options in (DYNAMIC, LONG, {"sliding_window": 5000}):
        model = drawn("mistral" if "sliding_window" in options else "llama", **options)
        assert text_length(Backbone(model), 0, 1 << 34) > max(4000, *named_lengths(model.config.to_dict()))
    assert text_length(tiny_backbone("gpt2"), 0, 1 << 34) == 192  # it has no further positions
    assert text_length(tiny_backbone("llama"), 7000, 1 << 34) == 7000  # inputs of the run
    assert text_length(tiny_backbone("mistral-window"), 1 << 20, 1 << 28) < 8000  # what memory allows
    assert 1e5 < text_length(tiny_backbone("llama"), 10**23, 1 << 40) < 1e6  # what patience allows


def test_smollm2_is_compared_within_seconds() -> None:
    sizes = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    model = meta_backbone({"model_type": "llama", **sizes, "intermediate_size": 1536, "vocab_size": 49152})
    backbone = Backbone(model)
    backbone.to("meta")
    assert text_length(backbone, 0, 1 << 34) == 4096  # not on a CPU
    assert backbone.flops(2048, 1024, predicted=512) < 1e12 < backbone.flops(4096, 2048, predicted=512)


@pytest.fixture
def folder(tmp_path: Path, world: World) -> Callable[[nn.Module], Path]:
    """Saves a model with the world's tokenizer beside it."""

    def save(model: nn.Module) -> Path:
        path = tmp_path / "backbone"
        model.save_pretrained(path)  # type: ignore[operator]
        for file in world.backbone.glob("*token*"):
            (path / file.name).write_bytes(file.read_bytes())
        return path

    return save


def test_a_comparison_is_made_once_per_content(
    tmp_path: Path, folder: Callable[[nn.Module], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def counted(model: nn.Module, tokens: int, rounded: nn.Module | None = None) -> Found:
        made.append(tokens)
        return Found("llama", tokens, 0.0, "")

    monkeypatch.setattr(compared, "compare", counted)
    path = folder(drawn("llama", vocab_size=400))
    backbones = Backbones(Library(None, tmp_path, hub=False), tmp_path, hub=False)
    for asked in (0, 0, 16, 5000, 5000, 64):
        check_agreement(backbones, str(path), asked=asked)
    assert made == [4096, 4096, 5000]
    check_agreement(backbones, str(path), "bfloat16")
    assert len(made) == 5  # in float32, and in 16 bits beside it
    folder(drawn("llama", vocab_size=400, num_hidden_layers=3))
    check_agreement(Backbones(Library(None, tmp_path, hub=False), tmp_path, hub=False), str(path))
    assert len(made) == 6


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("ernie4_5", "'ernie4_5') is not a supported backbone in float32: its logits deviate by"),
        ("stablelm", "its layers cannot be read one by one"),
        ("olmo2", "'olmo2' is not a supported backbone: use a Llama"),
        ("bart", "'bart' is not a supported backbone: use a Llama"),
        ("lfm2", "'lfm2' is not a supported backbone: use a Llama"),
    ],
)
def test_every_command_refuses_it_in_a_sentence(
    kind: str,
    said: str,
    world: World,
    tmp_path: Path,
    folder: Callable[[nn.Module], Path],
    invoke: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MEMORY_BENCH_CACHE", str(tmp_path / "cache"))
    sizes = {} if kind != "bart" else {"d_model": 32, "decoder_layers": 1, "encoder_layers": 1, "decoder_ffn_dim": 48}
    path, out = folder(drawn(kind, vocab_size=400, **sizes)), tmp_path / "out"
    asked = ["--models", "truncation", "--tasks", "pg19", "--backbone", str(path), "--data", str(world.data)]
    for command, expected in (("plan", 2), ("run", 2), ("fetch", 1)):
        more = {"plan": asked, "run": [*asked, "--executor", "inline", "--out", str(out)], "fetch": [str(path)]}
        code, _, errors = invoke(command, *more[command])
        assert code == expected, errors
        assert said in " ".join(errors.split())
        assert "Traceback" not in errors
    assert not out.exists()
    listed = json.loads(invoke("list", "backbones", "--json")[1])
    shown = [entry["status"] for entry in listed if entry["name"] == str(path)]
    assert [status.startswith("refused in float32") for status in shown] == [True] * (
        "float32" in said or "one by" in said
    )


def test_a_refusal_names_the_model_and_is_remembered(tmp_path: Path, folder: Callable[[nn.Module], Path]) -> None:
    path = folder(drawn("ernie4_5", vocab_size=400))
    backbones = Backbones(Library(None, tmp_path, hub=False), tmp_path, hub=False)
    for _ in range(2):
        with pytest.raises(
            DataError, match=rf"{path.name} \('ernie4_5'\) is not a supported backbone in float32: its logits"
        ):
            check_agreement(backbones, str(path))
    assert len(list((tmp_path / "agreement").glob("*.json"))) == 1
