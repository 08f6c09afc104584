"""A backbone's weights all come from its files, and every token has an embedding; else one sentence, before any run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from memory_bench.backbone.tokenizer import train_bpe
from memory_bench.data.library import Library
from memory_bench.errors import DataError
from memory_bench.testing.backbones import tiny_backbone
from memory_bench.zoo.named import Backbones

Weights = dict[str, Tensor]
VOCAB, LAYER = 300, "model.layers.1."


def write(folder: Path, family: str = "llama", **sizes: Any) -> Path:
    """A random model with a tokenizer of as many ids."""
    folder.mkdir(parents=True)
    rng = Random(0)
    text = "".join(rng.choice("abcdefgh ") for _ in range(2000))
    train_bpe([text], sizes.pop("tokens", VOCAB), folder)
    model: Any = tiny_backbone(family, vocab_size=VOCAB, **sizes).model
    model.save_pretrained(folder)
    return folder


def change(folder: Path, how: Callable[[Weights], Weights], **config: Any) -> None:
    """Write the weights again, and change the config."""
    path = folder / "model.safetensors"
    save_file(how(load_file(path)), path, metadata={"format": "pt"})
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | config))


def without(*parts: str) -> Callable[[Weights], Weights]:
    return lambda weights: {k: v for k, v in weights.items() if not any(part in k for part in parts)}


def prefixed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + k: v for k, v in weights.items()}


def pickled(folder: Path, how: Callable[[Weights], Weights]) -> None:
    path = folder / "model.safetensors"
    torch.save(how(load_file(path)), folder / "pytorch_model.bin")
    path.unlink()


def sharded(folder: Path) -> list[Path]:
    """Two files with an index instead of one."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = [{k: v for k, v in weights.items() if (LAYER in k) == later} for later in (False, True)]
    files = [folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for file, part in zip(files, parts, strict=True):
        save_file(part, file, metadata={"format": "pt"})
    listed = {k: file.name for file, part in zip(files, parts, strict=True) for k in part}
    index = {"metadata": {"total_size": 1}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return files


def lose_a_shard(folder: Path, *, listed: bool) -> None:
    last = sharded(folder)[-1]
    last.unlink()
    index = folder / "model.safetensors.index.json"
    if not listed:
        plain = json.loads(index.read_text())
        plain["weight_map"] = {k: f for k, f in plain["weight_map"].items() if f != last.name}
        index.write_text(json.dumps(plain))


def cut(weights: Weights) -> Weights:
    return {k: v[:-1].contiguous() if k.endswith("1.mlp.up_proj.weight") else v for k, v in weights.items()}


def more(**tensors: Tensor) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name.replace("__", "."): t for name, t in tensors.items()}


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., None]:
    """Checks a folder as `plan` does, and then loads it, which must say the same."""

    def run(folder: Path, sentence: str = "") -> None:
        backbones = Backbones(Library(None, tmp_path, hub=False), tmp_path / "cache", hub=False)
        if not sentence:
            backbones.check(str(folder))
            backbones.load(str(folder))
            return
        with pytest.raises(DataError, match=sentence):
            backbones.check(str(folder))
        with pytest.raises(DataError, match=sentence):
            backbones.load(str(folder))

    return run


GAPS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no head": (lambda f: change(f, without("lm_head")), "it lacks lm_head.weight"),
    "no embedding": (
        lambda f: change(f, without("embed", "lm_head"), tie_word_embeddings=True),
        "lacks .*embed_tokens",
    ),
    "a layer": (lambda f: change(f, without(LAYER)), r"it lacks model.layers.1.*and 6 more\.$"),
    "a layer of a pickle": (lambda f: pickled(f, without(LAYER)), "it lacks model.layers.1"),
    "one norm": (lambda f: change(f, without("model.norm")), r"it lacks model.norm.weight\.$"),
    "torch.compile": (lambda f: change(f, prefixed("_orig_mod.")), "'_orig_mod.', as torch.compile saves them"),
    "DataParallel": (lambda f: change(f, prefixed("module.")), "'module.', as DataParallel saves them"),
    "a shard": (
        lambda f: lose_a_shard(f, listed=True),
        "lists model-00002-of-00002.safetensors, which",
    ),
    "a shard and its names": (lambda f: lose_a_shard(f, listed=False), "it lacks model.layers.1"),
    "an index": (lambda f: [sharded(f), (f / "model.safetensors.index.json").unlink()], "Cannot load a causal"),
    "another shape": (lambda f: change(f, cut), r"up_proj.weight is \[\d+, \d+\], not \[\d+, \d+\]"),
    "a smaller vocabulary": (lambda f: change(f, dict, vocab_size=VOCAB - 9), "larger than its embedding"),
    "a larger vocabulary": (lambda f: change(f, dict, vocab_size=VOCAB + 9), r"\[300, \d+\], not \[309, "),
    "fewer layers": (lambda f: change(f, dict, num_hidden_layers=1), "left over: model.layers.1"),
    "biases": (
        lambda f: change(f, more(model__layers__0__self_attn__q_proj__bias=torch.ones(16))),
        "left over: model.layers.0.self_attn.q_proj.bias",
    ),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "has an adapter beside its weights"),
    "codes of a quantiser": (
        lambda f: change(f, lambda w: {k: v.to(torch.int8) if "up_proj" in k else v for k, v in w.items()}),
        r"are whole numbers \(I8: model.layers.0.mlp.up_proj.weight",
    ),
    "codes in a pickle": (
        lambda f: pickled(f, lambda w: {k: v.byte() if k == "lm_head.weight" else v for k, v in w.items()}),
        r"are whole numbers \(uint8: lm_head.weight\)",
    ),
    "half a file": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
        "Cannot read the weights in .*model.safetensors",
    ),
}


@pytest.mark.parametrize("gap", GAPS)
def test_gaps_are_refused_by_name(gap: str, tmp_path: Path, check: Callable[..., None]) -> None:
    folder = write(tmp_path / "model")
    damage, sentence = GAPS[gap]
    damage(folder)
    check(folder, sentence)


WHOLE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "as it is": ("llama", lambda f: None),
    "a tied head": ("llama", lambda f: change(f, without("lm_head"), tie_word_embeddings=True)),
    "frequencies": (
        "llama",
        lambda f: change(f, more(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(2))),
    ),
    "the inner model's names": (
        "llama",
        lambda f: change(f, lambda w: {k.removeprefix("model."): v for k, v in w.items()}),
    ),
    "shards": ("llama", sharded),
    "a pickle": ("llama", lambda f: pickled(f, dict)),
    "an old GPT-2": (
        "gpt2",
        lambda f: change(f, lambda w: {k.removeprefix("transformer."): v for k, v in w.items()}
                         | {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.0.attn.masked_bias": torch.tensor(-1e4)}),
    ),
    "OPT": ("opt", lambda f: None),
}  # fmt: skip


@pytest.mark.parametrize("kind", WHOLE)
def test_harmless_differences_are_loaded(kind: str, tmp_path: Path, check: Callable[..., None]) -> None:
    family, make = WHOLE[kind]
    folder = write(tmp_path / "model", family)
    make(folder)
    check(folder)


@pytest.mark.parametrize(("tokens", "sentence"), [(VOCAB + 4, r"token 303 .*beyond the model's 300 rows"), (280, "")])
def test_every_token_has_an_embedding(tokens: int, sentence: str, tmp_path: Path, check: Callable[..., None]) -> None:
    """The other way round an embedding is padded, which is common."""
    check(write(tmp_path / "model", tokens=tokens), sentence)


def test_an_added_token_without_an_embedding_counts(tmp_path: Path, check: Callable[..., None]) -> None:
    folder = write(tmp_path / "model")
    plain = json.loads((folder / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    plain["added_tokens"] = [{"id": VOCAB, "content": "<pad>", **flags}]
    (folder / "tokenizer.json").write_text(json.dumps(plain))
    check(folder, r"token 300 \('<pad>'\)")


def test_a_token_that_begins_a_text_has_an_embedding(tmp_path: Path, check: Callable[..., None]) -> None:
    """As after a vocabulary was pruned: the template still names the old id."""
    folder = write(tmp_path / "model")
    plain = json.loads((folder / "tokenizer.json").read_text())
    start = {"id": "<s>", "ids": [900], "tokens": ["<s>"]}
    text = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*text, {"Sequence": {"id": "B", "type_id": 1}}]
    plain["post_processor"] = {
        "type": "TemplateProcessing", "single": text, "pair": pair, "special_tokens": {"<s>": start},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(plain))
    check(folder, "puts token 900 before a text")


def test_a_missing_tokenizer_is_one_line(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="has no tokenizer that can be loaded") as caught:
        Backbones(Library(None, tmp_path, hub=False), tmp_path / "cache", hub=False).check(str(folder))
    assert "\n" not in str(caught.value)


def test_code_that_is_not_run_is_said(tmp_path: Path) -> None:
    folder, said = write(tmp_path / "model"), list[str]()
    change(folder, dict, auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    backbones = Backbones(Library(None, tmp_path, hub=False), tmp_path / "cache", hub=False, report=said.append)
    backbones.check(str(folder))
    backbones.check(str(folder))
    assert said == [f"{folder} comes with code of its own, which is not run: transformers' llama is."]


def test_a_config_is_an_object_and_no_more_than_its_class_knows(tmp_path: Path) -> None:
    """GPT-2 has as many heads of keys as of queries, whatever another program wrote beside them."""
    folder = write(tmp_path / "model", "gpt2")
    change(folder, dict, num_key_value_heads=1, head_dim=2)
    backbones = Backbones(Library(None, tmp_path, hub=False), tmp_path / "cache", hub=False)
    loaded = backbones.load(str(folder))
    sizes = loaded.backbone.kv_heads, loaded.backbone.head_width
    assert sizes == (loaded.backbone.heads, loaded.backbone.width // loaded.backbone.heads)
    assert sizes == (loaded.card.kv_heads, loaded.card.head_width)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(DataError, match=r"its config.json holds no object"):
        Backbones(Library(None, tmp_path, hub=False), tmp_path / "cache", hub=False).card(str(folder))


def test_results_have_a_folder_of_their_own(world: Any, invoke: Any) -> None:
    arguments = world.arguments("--models", "truncation", "--tasks", "pg19", "--backbone", str(world.backbone))
    code, _, err = invoke("run", *arguments, "--out", str(world.backbone))
    assert code == 2
    assert "is the folder of a model" in err
    assert not (world.backbone / "run.json").exists()


def test_commands_refuse_before_anything_runs(world: Any, invoke: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(world.backbone, folder)
    change(folder, without("lm_head"))
    options = ["--models", "truncation", "--tasks", "pg19", "--backbone", str(folder), "--data", str(world.data)]
    options += ["--budget", str(world.budget)]
    for command in (["plan", *options], ["run", *options, "--out", str(tmp_path / "out")], ["fetch", str(folder)]):
        code, out, err = invoke(*command)
        assert code == (1 if command[0] == "fetch" else 2)
        assert "it lacks lm_head.weight" in err
        assert "Traceback" not in out + err
        assert "LOAD REPORT" not in out + err
    assert not (tmp_path / "out").exists()


def test_an_interrupted_download_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot without weights, or without one of its files, is not taken while the hub can be reached."""
    snapshot = write(tmp_path / "model")
    files = sharded(snapshot)
    kept = files[1].read_bytes()
    files[1].unlink()
    asked: list[bool] = []

    def download(*_: Any, local_files_only: bool, **__: Any) -> str:
        asked.append(local_files_only)
        if not local_files_only:
            files[1].write_bytes(kept)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    Backbones(Library(None, tmp_path, hub=False), tmp_path / "cache", hub=True).check("somebody/model")
    assert asked[:2] == [True, False]
    for file in files:
        file.unlink()
    with pytest.raises(DataError, match="no hub model of that name can be reached"):
        Backbones(Library(None, tmp_path, hub=False), tmp_path / "cache", hub=False).check("somebody/model")
