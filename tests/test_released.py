"""Released checkpoints: official files give official numbers, what does not fit is one sentence, rows are marked."""

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from memory_bench import plugins
from memory_bench.backbone.model import Backbone
from memory_bench.command import commands
from memory_bench.data.library import Library
from memory_bench.errors import DataError, UserError
from memory_bench.parity.cases import Case
from memory_bench.parity.replaying import cut, segment_lengths
from memory_bench.protocol import MemoryModel, Segment
from memory_bench.report.board import collect
from memory_bench.report.comparison import compare
from memory_bench.running.grid import make_task
from memory_bench.running.options import Options
from memory_bench.store import Store
from memory_bench.weights.released import find_release
from memory_bench.weights.transfer import backbone_shapes
from memory_bench.zoo.named import Backbones
from memory_bench.zoo.pretrained import match

PARITY = Path(__file__).parents[1] / "results/parity"
POOLS = ("memoryllm-single-inject", "memoryllm-multi-inject", "memoryllm-first-fill", "mplus-pending-retrieval",
         "mplus-merge-decay-prune", "mplus-small-long-term")  # fmt: skip
WRAPPED = ("rmt-llama", "rmt-gpt2-right-mask", "hmt-llama-recall", "hmt-llama-stage1", "hmt-gpt2-recall-generate",
           "hmt-opt-recall-leftpad", "hmt-llama-recall-bf16")  # fmt: skip
WRAPPER = {
    "memory.initial_memory": "memory_cell.memory",
    "memory.summary_prompt": "mem",
    "memory.recall_query.weight": "cross_attn.wq.weight",
    "memory.recall_key.weight": "cross_attn.wk.weight",
}
EMBEDDED = ("memory.summary_embeddings", "embed_summary.weight")
COMPRESSORS = ("autocompressor-llama-accumulate", "autocompressor-opt-substeps")


def official(case: Case) -> dict[str, Tensor]:
    """A case's weights under the names of the official state dict."""
    names = case.info.get("official_key_map")
    weights = case.tensors("weights")
    if names is not None:
        return {names[ours]: tensor for ours, tensor in weights.items()}
    if case.model == "autocompressor":
        return {n.removeprefix("backbone.").replace(*EMBEDDED): t.clone() for n, t in weights.items()}
    return {WRAPPER.get(n, n.replace("backbone.", "memory_cell.model.")): t.clone() for n, t in weights.items()}


def about(case: Case) -> dict[str, Any]:
    """The ``config.json`` of a pool checkpoint, as the official classes read it."""
    memory, found = case.info["memory"], dict(case.info["backbone"])
    lora = memory["lora"]
    found |= {
        "num_tokens": memory["tokens_per_block"],
        "num_blocks": memory.get("blocks", memory.get("pool_blocks", 0) + memory.get("long_term_blocks", 0)),
        "add_bos_embedding": memory["bos_embedding"],
        "drop_memory_per_layer": memory["drop_per_layer"],
        "add_decoder_lora": memory["add_read_lora"],
        "lora_config": lora and {"inference_mode": False, "r": lora["rank"], "lora_alpha": lora["alpha"],
                                 "lora_dropout": 0.1, "target_modules": lora["targets"]},
    }  # fmt: skip
    if case.model == "mplus":
        found |= {
            "num_ltm_blocks": memory["long_term_blocks"],
            "update_ltm_mode": "immediate",
            "update_ltm_frequency": memory["merge_every_injections"],
            "initial_rf_when_moving_stm_to_ltm": memory["initial_recall_frequency"],
            "decay_frequency": memory["decay"],
            "ltm_initial_size": memory["long_term_initial_size"],
            "selector_hidden_dim": memory["retriever_dim"],
        }
    return found


def write(folder: Path, case: Case, *, dtype: torch.dtype | None = None, shards: int = 1) -> Path:
    """A release folder of a case, as its authors would have written it; memory models in one or several files."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.to(dtype) if dtype and t.is_floating_point() else t for n, t in official(case).items()}
    if case.model in ("memoryllm", "mplus"):
        (folder / "config.json").write_text(json.dumps(about(case)))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    where = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        save_file({n: tensors[n] for n in where if where[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def plain_backbone(folder: Path, case: Case) -> Path:
    """A backbone folder of the case's sizes with other weights."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    model: Any = case.backbone().model
    for p in model.parameters():
        p.data.normal_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def released(tmp_path: Path) -> Callable[..., MemoryModel[Any]]:
    """``released(case, folder, **options)``: the model as a run builds it, from the official preset's quirks."""

    def make(case: Case, folder: Path, dtype: str = "float32", **options: Any) -> MemoryModel[Any]:
        backbones = Backbones(Library(None, tmp_path, hub=False), tmp_path, hub=False)
        named = plain_backbone(tmp_path / "named", case)
        cls = plugins.load("models", case.model)
        found = match(case.model, cls, str(folder), str(named), backbones)
        config = found.config(case.model, cls.Config.official(), {"checkpoint": str(folder), **options}, dtype)
        from memory_bench.weights.transfer import unfilled_backbone

        own = found.own
        if own is None:
            from transformers import AutoModelForCausalLM

            backbone = Backbone(AutoModelForCausalLM.from_pretrained(named, dtype=torch.float32))
        else:
            backbone = unfilled_backbone(own, getattr(torch, dtype))
        model: MemoryModel[Any] = cls(backbone, config, torch.Generator().manual_seed(3)).eval()
        found.load_into(model, config)
        return model

    return make


def close(case: Case, ours: Tensor, name: str) -> None:
    allowed = case.info["tolerance"]
    torch.testing.assert_close(ours, case.tensors("expected")[name], atol=allowed["atol"], rtol=allowed["rtol"])


@pytest.mark.parametrize("name", POOLS)
@torch.no_grad()
def test_a_pool_checkpoint_gives_the_official_numbers(name: str, tmp_path: Path, released: Any) -> None:
    case = Case(PARITY / name)
    inputs = case.tensors("inputs")
    longest = max(t.shape[1] for n, t in inputs.items() if n.endswith("input_ids"))
    model = released(case, write(tmp_path / "release", case, shards=3), segment=longest)
    state = model.open(1)
    assert torch.equal(state.pool[0], case.weights("memory.")["pool"])  # the stream starts with the released pool
    text = Segment.full(inputs["score.input_ids"][:1])
    expected = case.tensors("expected")["score.before_any_injection.logits"][:1]
    torch.testing.assert_close(model.step(state, text, write=False)[0].logits(), expected, atol=2e-3, rtol=1e-3)
    draws = inputs.get("inject.0.drop_permutation")
    written = model.write_pass(state, inputs["inject.0.input_ids"][:1])
    state = model.store(state, written, None if draws is None else draws[None])
    close(case, state.pool[0], "inject.0.pool")
    logits = model.step(state, text, write=False)[0].logits()
    expected = case.tensors("expected")["score.after_0.logits"][:1]
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", COMPRESSORS)
@torch.no_grad()
def test_a_compressors_checkpoint_gives_the_official_numbers(name: str, tmp_path: Path, released: Any) -> None:
    case = Case(PARITY / name)
    folder, lengths = write(tmp_path / "release", case), case.info["memory"]["segment_lengths"]
    first, recorded = (lengths[0], "substep.0.logits") if isinstance(lengths[0], list) else (lengths, "logits")
    model = released(case, folder, segment=max(first))
    assert model.config.summary_tokens == case.info["memory"]["summary_tokens"]
    ids = case.tensors("inputs")["input_ids"][:, : sum(first)]
    state, logits = model.open(len(ids)), []
    for piece in ids.split(first, dim=1):
        readout, state = model.step(state, Segment.full(piece))
        logits.append(readout.logits())
    close(case, torch.cat(logits, dim=1), recorded)


@pytest.mark.parametrize("name", WRAPPED)
@torch.no_grad()
def test_a_wrapper_checkpoint_gives_the_official_numbers(name: str, tmp_path: Path, released: Any) -> None:
    case = Case(PARITY / name)
    folder = tmp_path / "release"
    folder.mkdir()
    tensors = official(case)
    if case.model == "hmt":  # in the official class, used by nothing
        width = case.weights("memory.")["initial_memory"].shape[1]
        tensors["memory_cell.mem_map.linear.weight"] = torch.ones(width, width)
        tensors["memory_cell.mem_map.inv_linear.weight"] = torch.ones(width, width)
    torch.save({"model_state_dict": tensors, "iteration": 7}, folder / "model_best.pth")
    memory = case.info["memory"]
    options = {"segment": memory["segment_length"]}
    if case.model == "hmt":
        options |= {"sensory_tokens": memory["sensory_tokens"]}
    if memory.get("recall"):
        options |= {"cache": memory["recall_cache_length"], "recall_dtype": memory["recall_dtype"]}
    model = released(case, folder, **options)
    ids = case.tensors("inputs")["input_ids"]
    mask = case.tensors("inputs").get("attention_mask", torch.ones_like(ids)).bool()
    state, logits = model.open(len(ids)), []
    lengths = segment_lengths(ids.shape[1], options["segment"], memory.get("segment_alignment") or "left")
    for segment in cut(ids, mask, lengths):
        readout, state = model.step(state, segment)
        logits.append(readout.logits())
    close(case, torch.cat(logits, dim=1), "logits")


def changed(folder: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Path:
    """The release with other tensors."""
    save_file(dict(change(load_file(folder / "model.safetensors"))), folder / "model.safetensors")
    return folder


def without(tensors: dict[str, Tensor], *parts: str) -> dict[str, Tensor]:
    return {n: t for n, t in tensors.items() if not any(part in n for part in parts)}


TROUBLE: dict[str, tuple[Callable[[dict[str, Tensor]], Mapping[str, Tensor]], str]] = {
    "no read adapter": (lambda t: without(t, "decoder_adapter"), "LoRA adapters are not there"),
    "no adapters": (lambda t: without(t, ".lora_"), "LoRA adapters are not there"),
    "adapters and their names lost": (
        lambda t: {n.replace(".base_layer", ""): x for n, x in without(t, ".lora_").items()},
        "LoRA adapters are not there",
    ),
    "one adapter matrix lost": (lambda t: without(t, "layers.1.mlp.up_proj.lora_B.default"), "LoRA adapters"),
    "no pool": (lambda t: {n: x for n, x in t.items() if n != "memory"}, "it lacks memory"),
    "no key projection": (lambda t: without(t, "layers.1.self_attn.key_proj"), "it lacks model.layers.1"),
    "an extra tensor": (lambda t: {**t, "memory_keys": torch.ones(2)}, "left over: memory_keys"),
    "a smaller pool": (lambda t: {**t, "memory": t["memory"][:, :-1].contiguous()}, "memory is"),
    "another width": (lambda t: {**t, "bos_embedding": torch.ones(2, 1, 5)}, "bos_embedding is [2, 1, 5]"),
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_what_does_not_fit_is_one_sentence(trouble: str, tmp_path: Path, released: Any) -> None:
    case = Case(PARITY / "mplus-pending-retrieval")
    change, sentence = TROUBLE[trouble]
    folder = changed(write(tmp_path / "release", case), change)
    with pytest.raises(UserError, match=sentence.replace("[", r"\[")) as found:
        released(case, folder)
    assert str(found.value).count("\n") == 0
    assert str(folder) in str(found.value)


def test_a_backbone_of_another_size_is_refused(tmp_path: Path, released: Any) -> None:
    case = Case(PARITY / "mplus-pending-retrieval")
    folder = write(tmp_path / "release", case)
    about_ = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about_, "vocab_size": 97}))
    with pytest.raises(UserError, match=r"vocab_size 97, but .* has 96"):
        released(case, folder)


def test_files_that_cannot_be_had_or_read(tmp_path: Path) -> None:
    case = Case(PARITY / "rmt-llama")
    for name in ("no/such-model", str(tmp_path / "nowhere"), "plain"):
        with pytest.raises(DataError, match="Unknown checkpoint"):
            find_release(name, hub=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no checkpoint"):
        find_release(str(tmp_path / "empty"), hub=False)
    folder = write(tmp_path / "release", Case(PARITY / "mplus-pending-retrieval"), shards=2)
    next(folder.glob("*-00002-*")).unlink()
    with pytest.raises(DataError, match="lacks model-00002-of-00002"):
        find_release(str(folder), hub=False)
    evil = tmp_path / "evil.bin"
    torch.save({"memory_cell.memory": torch.ones(1), "run": Case}, evil)  # a class is no tensor
    with pytest.raises(DataError, match="tensors alone"):
        find_release(str(evil), hub=False).shapes  # noqa: B018
    torch.save(official(case), tmp_path / "good.bin")
    assert "memory_cell.memory" in find_release(str(tmp_path / "good.bin"), hub=False).shapes


def test_a_hub_id_is_looked_up_in_the_cache_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder, asked = write(tmp_path / "snapshot", Case(PARITY / "rmt-llama")), []
    (tmp_path / "words").mkdir()

    def snapshot(repo: str, *, local_files_only: bool, allow_patterns: list[str], **_: Any) -> str:
        asked.append((repo, local_files_only))
        return str(tmp_path / "words" if local_files_only else folder)  # the cache has no weights yet

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert find_release("authors/model", hub=True).files == (folder / "model.safetensors",)
    assert asked == [("authors/model", True), ("authors/model", False)]
    asked.clear()
    with pytest.raises(DataError, match="no hub model of that name with weights can be reached"):
        find_release("authors/model", hub=False)
    assert all(local for _, local in asked)


def test_the_revision_is_the_content_not_the_place(tmp_path: Path) -> None:
    case = Case(PARITY / "rmt-llama")
    one, other = (find_release(str(write(tmp_path / name, case)), hub=False) for name in ("a", "b"))
    assert one.revision == other.revision
    third = changed(write(tmp_path / "c", case), lambda t: {**t, "memory_cell.memory": t["memory_cell.memory"] + 1e-3})
    assert find_release(str(third), hub=False).revision != one.revision


def frequencies_of(backbone: Backbone) -> Tensor:
    model: Any = backbone.model
    found: Tensor = model.model.rotary_emb.inv_freq
    return found


def test_rotary_frequencies_are_those_the_official_model_has(tmp_path: Path, released: Any) -> None:
    """Casting M+ to bfloat16 rounds them; angles are computed in float32 from what is left."""
    case = Case(PARITY / "mplus-small-long-term")
    exact = frequencies_of(case.backbone())
    rounded = exact.bfloat16().float()
    assert not torch.equal(exact, rounded)

    def frequencies(folder: Path, dtype: str = "float32", **options: Any) -> Tensor:
        return frequencies_of(released(case, folder, dtype, **options).backbone)

    float32, bfloat16 = write(tmp_path / "f", case), write(tmp_path / "b", case, dtype=torch.bfloat16)
    assert torch.equal(frequencies(float32), exact)
    assert torch.equal(frequencies(bfloat16), rounded)
    assert torch.equal(frequencies(float32, "bfloat16"), rounded)
    assert torch.equal(frequencies(bfloat16, rope_frequencies="float32"), exact)
    case = Case(PARITY / "memoryllm-single-inject")  # the official way of loading MemoryLLM leaves them
    assert torch.equal(
        frequencies(write(tmp_path / "m", case, dtype=torch.bfloat16), "bfloat16"), frequencies_of(case.backbone())
    )
    with pytest.raises(UserError, match="needs a checkpoint"):
        replace(plugins.load("models", "mplus").Config(), rope_frequencies="bfloat16")


@torch.no_grad()
def test_weights_in_bfloat16_are_the_rounded_ones(tmp_path: Path, released: Any) -> None:
    case = Case(PARITY / "memoryllm-single-inject")
    model = released(case, write(tmp_path / "release", case, dtype=torch.bfloat16))
    assert torch.equal(model.pool, case.weights("memory.")["pool"].bfloat16().float())
    model = released(case, tmp_path / "release", "bfloat16")
    text = Segment.full(case.tensors("inputs")["score.input_ids"][:1])
    logits = model.step(model.open(1), text, write=False)[0].logits()
    assert logits.dtype == torch.bfloat16
    expected = case.tensors("expected")["score.before_any_injection.logits"][:1]
    assert float((logits.float() - expected).abs().mean() / expected.abs().mean()) < 0.1


def test_positions_of_the_first_release_are_linear_scaling(tmp_path: Path, released: Any) -> None:
    case = Case(PARITY / "memoryllm-multi-inject")
    folder = write(tmp_path / "release", case)
    config = json.loads((folder / "config.json").read_text()) | {"interpolate_position_ids": True}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "memoryllm", "max_position_embeddings": 8}))
    frequencies, exact = frequencies_of(released(case, folder).backbone), frequencies_of(case.backbone())
    torch.testing.assert_close(frequencies, exact * 8 / (5 * 4))  # (blocks + 1) * tokens per block = 20


@pytest.fixture
def rmt_release(world: Any, tmp_path: Path) -> Path:
    """A trained RMT of the world's backbone, as its authors would have saved it."""
    weights = load_file(world.backbone / "model.safetensors")
    tensors = {f"memory_cell.model.{name}": t * 1.5 for name, t in weights.items()}
    folder = tmp_path / "rmt-release"
    folder.mkdir()
    width = weights["model.embed_tokens.weight"].shape[1]
    save_file({**tensors, "memory_cell.memory": torch.ones(3, width)}, folder / "model.safetensors")
    return folder


def options(world: Any, out: Path, models: str, *settings: str, **more: Any) -> Options:
    given: dict[str, Any] = {"backbone": str(world.backbone), "controls": True} | more
    return Options(
        models, "pg19", given["backbone"], str(world.budget), "1", "", world.data, True, out, "1", settings,
        given["controls"], "inline", "", False, True, False, world.cache, False,
    )  # fmt: skip


def test_a_released_model_is_run_marked_and_not_ranked(
    world: Any, rmt_release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    asked = replace(options(world, out, "rmt,truncation", f"rmt.checkpoint={rmt_release}"), quiet=False)
    assert commands.run(asked) == 0
    said = capsys.readouterr()
    assert "rmt is loaded from" in said.err
    assert "not ranked" in said.err
    store = Store.open(out)
    records = [r for r in store.records() if r.cell.training.model.name == "rmt"]
    assert [r.status for r in records] == ["ok"]
    for record in records:
        model = record.cell.training.model
        assert model.config["memory_tokens"] == 3  # the files decide
        assert model.revision == find_release(str(rmt_release), hub=False).revision
        assert record.provenance["pretrained"].keys() == {"model.safetensors"}
        assert record.usage.train_tokens == record.usage.trained_parameters == 0
        assert record.learned is not None
        assert record.learned["verdict"] == "pretrained"
        assert all(m.slice.startswith("pretrained") for m in record.metrics)
    trained = [json.loads(f.read_text())["training"]["model"]["name"] for f in out.glob("checkpoints/*/training.json")]
    assert "rmt" not in trained
    (board,) = collect(store, tasks := {"pg19": make_task(records[0].cell.task)})
    assert [row.label for row in board.pretrained] == ["rmt"]
    assert {row.label for row in board.rows} == {"truncation", "xl-cache"}
    assert not any("rmt" in (pair.a, pair.b) for pair in board.pairs)
    assert "rmt" not in board.letters
    for text in ((out / "leaderboard.md").read_text(), (out / "leaderboard.html").read_text()):
        assert "Pretrained: loaded from released weights" in text
        assert str(rmt_release) in text
    lines = list(csv.DictReader((out / "leaderboard.csv").read_text().splitlines()))
    own = [line for line in lines if line["model"] == "rmt"]
    assert own
    assert all(line["slice"].startswith("pretrained") and line["role"] == "asked" for line in own)
    assert all(line["detail"].startswith("pretrained: ") and line["train_tokens"] == "" for line in own)
    assert all("pretrained" not in line["slice"] + line["detail"] for line in lines if line["model"] != "rmt")
    (compared,) = compare(store, [], tasks)
    assert not any("rmt" in (pair.a, pair.b) for pair in compared.pairs)
    assert any("rmt was loaded from" in sentence for sentence in compared.missing)


def test_a_board_may_have_nothing_but_released_models(world: Any, rmt_release: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = options(world, out, "rmt", f"rmt.checkpoint={rmt_release}", controls=False)
    assert commands.run(asked) == 0
    (board,) = collect(Store.open(out), {})
    assert (board.rows, board.ended_by, len(board.pretrained)) == ((), "none", 1)
    assert "Pretrained: loaded" in (out / "leaderboard.html").read_text()
    assert "Best:" not in (out / "leaderboard.md").read_text()


def test_mistakes_are_found_before_anything_runs(world: Any, rmt_release: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for setting, sentence in (
        (f"rmt.checkpoint={tmp_path / 'nowhere'}", "Unknown checkpoint"),
        ("truncation.checkpoint=x", "no released layout"),
        ("mplus.checkpoint=x", "no model or task of this run"),
    ):
        with pytest.raises(UserError, match=sentence):
            commands.prepare(options(world, out, "rmt", setting))
    good = f"rmt.checkpoint={rmt_release}"
    with pytest.raises(UserError, match=r"memory_cell.memory is \[3, 32\]"):
        commands.prepare(options(world, out, "rmt", good, "rmt.memory_tokens=2"))
    with pytest.raises(UserError, match="not with tiny"):
        commands.prepare(options(world, out, "rmt", good, backbone="tiny"))
    with pytest.raises(UserError, match="it lacks"):
        commands.prepare(options(world, out, "hmt", f"hmt.checkpoint={rmt_release / 'model.safetensors'}",
                                 "hmt.recall=true", "hmt.memory_tokens=1"))  # fmt: skip
    assert not out.exists()


def test_a_mistake_is_one_line_and_exit_code_2(
    world: Any, rmt_release: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from memory_bench.cli import main

    for name, value in world.environment().items():
        monkeypatch.setenv(name, value)
    changed(rmt_release, lambda t: {n: x for n, x in t.items() if n != "memory_cell.memory"})
    setting = f"rmt.checkpoint={rmt_release}"
    with pytest.raises(SystemExit) as stopped:
        main(["run", *world.arguments("--models", "rmt", "--tasks", "pg19", "--set", setting)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].endswith("does not fit: it lacks memory_cell.memory.")


def test_files_that_change_after_planning_fail_the_cell(world: Any, rmt_release: Path, tmp_path: Path) -> None:
    from memory_bench.running.job import Job
    from memory_bench.running.worker import run_cell

    asked = options(world, tmp_path / "out", "rmt", f"rmt.checkpoint={rmt_release}", controls=False)
    cell = commands.prepare(asked).grid.cells[0]
    changed(rmt_release, lambda t: {**t, "memory_cell.memory": t["memory_cell.memory"] * 2})
    Store.open_or_create(tmp_path / "out")
    job = Job(cell, tmp_path / "out", world.data, world.cache, True, False, "cpu", 1)
    record = run_cell(job, lambda *_: None)
    assert record.status == "failed"
    assert "have changed" in record.detail


def test_an_ablation_of_a_released_model_is_not_run(world: Any, tmp_path: Path) -> None:
    case_width = backbone_shapes(json.loads((world.backbone / "config.json").read_text()))
    width = case_width["model.embed_tokens.weight"][1]
    tensors = {f"memory_cell.model.{n}": torch.zeros(s) for n, s in case_width.items()}
    tensors |= {"memory_cell.memory": torch.ones(1, width), "mem": torch.ones(1, width)}
    tensors |= {f"cross_attn.{n}.weight": torch.ones(5, width) for n in ("wq", "wk")}
    torch.save(tensors, tmp_path / "hmt.bin")
    prepared = commands.prepare(options(world, tmp_path / "out", "hmt", f"hmt.checkpoint={tmp_path / 'hmt.bin'}"))
    assert {c.label for c in prepared.grid.cells} == {"hmt", "truncation", "xl-cache"}
    config = prepared.grid.cells[0].training.model.config
    assert (config["recall_width"], config["memory_tokens"], config["recall"]) == (5, 1, True)


def test_a_release_is_its_own_backbone_and_nobody_elses(world: Any, tmp_path: Path) -> None:
    """The same folder given twice: tokenizer, sizes and weights of the release; other models skip it."""
    case = Case(PARITY / "mplus-pending-retrieval")
    info = {**case.info, "backbone": {**case.info["backbone"], "vocab_size": 300}}
    grown = Case(case.folder)
    grown.__dict__["info"] = info
    folder = write(tmp_path / "release", grown)
    words = {name: torch.randn(300, 32) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    changed(folder, lambda t: {**t, **words})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (world.backbone / name).is_file():
            (folder / name).write_bytes((world.backbone / name).read_bytes())
    setting = f"mplus.checkpoint={folder}"
    asked = options(world, tmp_path / "out", "mplus", setting, "mplus.segment=8", backbone=str(folder))
    prepared = commands.prepare(asked)
    assert {c.label for c in prepared.grid.cells} == {"mplus"}
    assert {s.model for s in prepared.grid.skipped} == {"truncation", "xl-cache"}
    assert commands.run(asked) == 0
    (record,) = Store.open(tmp_path / "out").records()
    assert record.status == "ok"
    assert record.usage.state_host_bytes > 0
