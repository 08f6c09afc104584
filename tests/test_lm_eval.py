"""lm-eval, both ways: its own numbers for the window, streams for memories, its tasks in our grid, its real command."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from conftest import World
from tokenizers_of_kinds import small_tokenizer

from memory_bench import lm_eval as door
from memory_bench.backbone.tokenizer import train_bpe
from memory_bench.cli import main
from memory_bench.corpus import Line
from memory_bench.data import Library
from memory_bench.driver.observe import observe
from memory_bench.driver.stream import line_nll
from memory_bench.episode import Ask, Read
from memory_bench.errors import DataError, UserError
from memory_bench.lm_eval import data as our_data
from memory_bench.lm_eval import writing
from memory_bench.lm_eval.loading import from_run, one_cell
from memory_bench.lm_eval.task import LmEvalConfig, LmEvalTask
from memory_bench.plugins import load
from memory_bench.protocol import DecodePlan, Segment
from memory_bench.testing import check_task, tiny_backbone
from memory_bench.zoo.named import Backbones
from synthetic import make_store

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from memory_bench.lm_eval.model import MemoryLM

WINDOW = 16
WORDS = ["whale", "sea", "captain", "the", "of", "and", "ship", "harpoon", "über", "white", "sail", "storm"]


def prose(words: int, seed: int = 0) -> str:
    rng = Random(f"{seed} {words}")
    return " ".join(rng.choice(WORDS) for _ in range(words))


@pytest.fixture(scope="module", params=["eos", "bos"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose tokenizer has an EOS token, or also puts a BOS token before every text."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    place = tmp_path_factory.mktemp(request.param)
    train_bpe([prose(500)], 300, place)
    tokenizer = Tokenizer.from_file(str(place / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    bos: dict[str, Any] = {}
    if request.param == "bos":
        start = [("<s>", tokenizer.token_to_id("<s>"))]
        template: Any = TemplateProcessing(single="<s> $A", special_tokens=start)
        tokenizer.post_processor = template
        bos = {"bos_token": "<s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **bos).save_pretrained(place)
    model: Any = tiny_backbone("llama", vocab_size=320, max_position_embeddings=256).model
    model.save_pretrained(place)
    return place


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No data, no hub, a cache of its own."""
    monkeypatch.setenv("MEMORY_BENCH_DATA", "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MEMORY_BENCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def ours(folder: Path, model: str = "truncation", **more: Any) -> MemoryLM:
    more = {"segment": WINDOW, "budget": "cpu-smol", "device": "cpu", **more}
    more = {name: value for name, value in more.items() if value is not None}
    return MemoryLM(model=model, backbone=str(folder), **more)


def theirs(folder: Path, length: int = WINDOW, **more: Any) -> Any:
    return HFLM(pretrained=str(folder), max_length=length, device="cpu", dtype="float32", batch_size=3, **more)


def asked(kind: str, *arguments: Sequence[Any]) -> list[Any]:
    return [Instance(kind, {}, tuple(a), 0) for a in arguments]


PAIRS: list[tuple[str, str]] = [(prose(n), f" {prose(m, 1)}") for n in (1, 5, 20, 40) for m in (1, 3)]
PAIRS += [
    ("", " whale sea"),
    (prose(9), " whale"),
    (prose(9), " sea"),
    (f"{prose(9)} ", "sea ship"),
    (prose(9), " storm"),
]
TEXTS = [prose(n) for n in (1, 5, 8, 33, 50)]


@pytest.mark.parametrize(("model", "length"), [("truncation", WINDOW), ("full-context", 4096)])
def test_numbers_are_those_of_hf(folder: Path, model: str, length: int) -> None:
    reference, own = theirs(folder, length), ours(folder, model, batch_size=4)
    wanted = reference.loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True)
    for (likelihood, greedy), (expected, also) in zip(
        own.loglikelihood(asked("loglikelihood", *PAIRS)), wanted, strict=True
    ):
        assert likelihood == pytest.approx(expected, abs=1e-4)
        assert greedy == also
    rolling = asked("loglikelihood_rolling", *((text,) for text in TEXTS))
    expected = reference.loglikelihood_rolling(rolling, disable_tqdm=True)
    assert own.loglikelihood_rolling(rolling) == pytest.approx(expected, abs=1e-4)
    how = {"until": ["storm"], "max_gen_toks": 8}
    writes = asked("generate_until", *((prose(n), how) for n in (1, 4, 9, 30)))
    assert own.generate_until(writes) == reference.generate_until(writes, disable_tqdm=True)


@pytest.mark.parametrize("bos", [True, False])
def test_the_beginning_is_chosen_as_in_hf(folder: Path, bos: bool) -> None:
    rolling = asked("loglikelihood_rolling", *((text,) for text in TEXTS))
    expected = theirs(folder, add_bos_token=bos).loglikelihood_rolling(rolling, disable_tqdm=True)
    own = ours(folder, add_bos_token=bos)
    assert own.loglikelihood_rolling(rolling) == pytest.approx(expected, abs=1e-4)
    assert ("adds nothing" in own.reading) == (not bos or "bos" not in folder.name)


TOKENS = 24  # to write: more than a segment
MEMORIES = ["xl-cache", "rmt", "hmt", "memorizing", "memoryllm", "mplus"]


@pytest.mark.parametrize("folder", ["eos"], indirect=True)
@pytest.mark.parametrize("model", MEMORIES)
def test_memories_read_streams(folder: Path, model: str) -> None:
    own = ours(folder, model)
    many = ours(folder, model, batch_size=5)
    rolling = asked("loglikelihood_rolling", *((text,) for text in TEXTS))
    found = own.loglikelihood_rolling(rolling)
    # Other rows, and the padding they bring, change nothing.
    assert many.loglikelihood_rolling(rolling) == pytest.approx(found, abs=1e-4)
    pairs = asked("loglikelihood", *PAIRS)
    alone = own.loglikelihood(pairs)
    assert [p[0] for p in many.loglikelihood(pairs)] == pytest.approx([p[0] for p in alone], abs=1e-4)
    if model in ("xl-cache", "rmt", "memorizing"):  # nothing random, nothing chosen by what is given
        assert found == pytest.approx([-nll for nll in driven(own, TEXTS)], abs=1e-4)
        context, continuation = PAIRS[7]
        assert alone[7][0] == pytest.approx(-driven(own, [continuation], context)[0], abs=1e-4)


def driven(own: MemoryLM, texts: Sequence[str], context: str = "") -> list[float]:
    """Surprisal of texts behind the prefix token or a context, by the benchmark's own driver."""
    lines = []
    for text in texts:
        before = own.tok_encode(context) if context else [own.prefix_token_id]
        ids = torch.tensor(before + own.tok_encode(text))
        lines.append(Line(ids, torch.arange(len(ids)) >= len(before)))
    with torch.no_grad():
        return line_nll(own.chosen.model, lines)


@pytest.mark.parametrize("folder", ["eos"], indirect=True)
def test_a_context_is_read_once(folder: Path) -> None:
    context = prose(40)
    tokens = len(ours(folder).tok_encode(context))
    one, many, apart = (ours(folder, "rmt", batch_size=1) for _ in range(3))
    one.loglikelihood(asked("loglikelihood", (context, " whale")))
    assert one.counts.tokens == tokens
    many.loglikelihood(asked("loglikelihood", *((context, f" {word}") for word in ("whale", "sea", "ship") * 2)))
    assert many.counts.tokens == tokens
    # Contexts that begin alike share their full segments, also in batches of one.
    longer = [f"{context} {prose(3, n)}" for n in range(3)]
    apart.loglikelihood(asked("loglikelihood", *((text, " sea") for text in longer)))
    shared = (tokens - 1) // WINDOW * WINDOW
    lengths = [len(apart.tok_encode(text)) for text in longer]
    assert apart.counts.tokens <= shared + sum(length - shared for length in lengths)
    assert apart.get_model_info()["memory_bench"]["state_bytes"] > 0


@pytest.mark.parametrize("folder", ["eos"], indirect=True)
@pytest.mark.parametrize("model", ["truncation", "xl-cache", "rmt"])
def test_writing_in_pieces_is_writing(folder: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ours(folder, model, windows="stream", batch_size=3)
    texts = [prose(n) for n in (2, 30)]
    how = {"until": [], "max_gen_toks": TOKENS}
    writes = asked("generate_until", *((text, how) for text in texts))
    whole = []
    for text in texts:
        ids = own.tok_encode(text)
        read = own.reader.open_from(tuple(ids))
        state = own.chosen.model.open(1)
        for start in range(0, read, WINDOW):
            state = own.chosen.model.absorb(state, Segment.full(torch.tensor([ids[start : start + WINDOW]])))
        plan = DecodePlan(TOKENS, (own.tokenizer.eos_token_id,))
        new = own.chosen.model.decode(state, Segment.full(torch.tensor([ids[read:]])), plan)[0].tolist()
        whole.append(own.tokenizer.decode(new, skip_special_tokens=True))
    assert own.generate_until(writes) == whole
    monkeypatch.setattr(writing, "PIECE", 5)
    assert own.generate_until(writes) == whole
    stop = whole[0][7:9]
    stopped = own.generate_until(asked("generate_until", (texts[0], {"until": [stop], "max_gen_toks": TOKENS})))
    assert stopped == [whole[0].split(stop)[0]]


@pytest.mark.parametrize("folder", ["eos"], indirect=True)
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"batch_size": "auto"}, "give a number"),
        ({"budget": "cpu-minutes", "model": "rmt"}, "memory-bench run --models rmt"),
        ({"model": "rtm"}, "Did you mean rmt"),
        ({"segmnt": 3}, "Did you mean segment"),
        ({"windows": "long"}, "lm-eval"),
        ({"dtype": "int8"}, "dtype"),
        ({"model": ""}, "run=FOLDER"),
        ({"run": "results", "segment": None}, "own backbone"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_refusals_are_sentences(folder: Path, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ours(folder, **{"model": "truncation", **arguments})


@pytest.mark.parametrize("folder", ["eos"], indirect=True)
def test_another_models_answers_are_refused(folder: Path, tmp_path: Path) -> None:
    from lm_eval.api.model import CachingLM

    own = ours(folder)
    with pytest.raises(UserError, match=own.config_hash):
        CachingLM(own, str(tmp_path / "cache.db"))
    cached = CachingLM(own, str(tmp_path / f"{own.config_hash}.db"))
    pairs = asked("loglikelihood", *PAIRS)
    first, read = cached.loglikelihood(pairs), own.counts.tokens
    assert cached.loglikelihood(pairs) == first
    assert own.counts.tokens == read
    assert own.config_hash != ours(folder, segment=8).config_hash
    assert own.config_hash != ours(folder, windows="stream").config_hash
    with pytest.raises(UserError, match="greedily"):
        own.generate_until(asked("generate_until", ("whale", {"do_sample": True, "temperature": 0.7})))


def test_untrained_memories_say_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = ours(folder, "rmt")
    assert "initial weights" in caplog.text
    assert own.get_model_info()["memory_bench"]["trained"] == "untrained"
    assert ours(folder).get_model_info()["memory_bench"]["trained"] == "nothing to train"


def test_a_runs_checkpoint_is_read_with(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    monkeypatch.setenv("MEMORY_BENCH_CACHE", str(world.cache))
    out = str(tmp_path / "run")
    models = "rmt,rmt[test.normalise_memory=true]"
    options = ["--models", models, "--tasks", "pg19", "--no-controls", "--seeds", "1,", "--out", out, "--quiet"]
    with pytest.raises(SystemExit) as ended:
        main(["run", *world.arguments(*options, "--limit", "1")])
    assert ended.value.code == 0
    own = MemoryLM(model="rmt", run=out, device="cpu")
    assert (own.chosen.trained, own.chosen.training.seed) == ("trained", 1)
    file = tmp_path / "run" / "checkpoints" / own.chosen.training.key / "weights.safetensors"
    saved, weights = load_file(file), own.chosen.model.state_dict()
    assert saved
    assert all(torch.equal(weights[name], tensor) for name, tensor in saved.items())
    changed = MemoryLM(model="rmt[test.normalise_memory=true]", run=out, device="cpu")
    assert changed.chosen.model.config.normalise_memory is True
    assert all(torch.equal(changed.chosen.model.state_dict()[name], tensor) for name, tensor in saved.items())
    assert changed.config_hash != own.config_hash
    with pytest.raises(UserError, match="no seed 7"):
        MemoryLM(model="rmt", run=out, task="pg19", seed=7)
    with pytest.raises(UserError, match="Did you mean rmt"):
        MemoryLM(model="rmtt", run=out)
    file.parent.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is not there"):
        MemoryLM(model="rmt", run=out, device="cpu")


def test_a_runs_labels_are_those_of_its_last_command(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    key = next(r.key for r in store.records() if r.cell.training.model.name == "mplus" and r.status == "ok")
    store.write_run({"cells": [key], "roles": {key: ["asked", "mplus@mine"]}})
    backbones = Backbones(Library(None, tmp_path, hub=False), tmp_path, hub=False)
    with pytest.raises(UserError, match="Did you mean mplus@mine"):
        from_run(tmp_path, "mplus@mime", backbones, seed=None, task="", device="cpu")


def test_one_of_several_trainings_must_be_named(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    with pytest.raises(UserError, match="task=pg19 or task=pubmedqa"):
        one_cell(store.records(), tmp_path, "rmt", 0, "")
    assert one_cell(store.records(), tmp_path, "rmt", 1, "pubmedqa").training.corpus.name == "pubmedqa"
    assert one_cell(store.records(), tmp_path, "hmt recall_query=current-half", None, "").training.seed == 0


# --- its tasks in our grid ---


KINDS: dict[str, dict[str, Any]] = {
    "multiple_choice": {
        "doc_to_text": "{{story}}\nQuestion: what was it?\nAnswer:",
        "doc_to_choice": "options",
        "doc_to_target": "label",
        "metric_list": [
            {"metric": name, "aggregation": how, "higher_is_better": name != "brier_score"}
            for name, how in (("acc", "mean"), ("acc_norm", "mean"), ("brier_score", "brier_score"))
        ],
    },
    "loglikelihood": {
        "doc_to_text": "{{story}}",
        "doc_to_target": "{{' ' + options[label]}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    },
    "loglikelihood_rolling": {"doc_to_text": "", "doc_to_target": "{{story}}"},
    "generate_until": {
        "doc_to_text": "{{story}}",
        "doc_to_target": "{{options[label]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "filter_list": [
            {"name": "strict", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]},
            {
                "name": "words",
                "filter": [{"function": "regex", "regex_pattern": r"(\w[\w ]*)"}, {"function": "take_first"}],
            },
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


@pytest.fixture
def make_yaml(tmp_path: Path) -> Callable[..., Path]:
    """``make_yaml(kind)``: a task file with local data."""

    def make(kind: str, **fields: Any) -> Path:
        rng = Random(kind)
        rows = [
            {"story": prose(rng.randrange(3, 8), n), "options": ["a whale", "the white sea", "ship"], "label": n % 3}
            for n in range(9)
        ]
        (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {"data_files": {"test": str(tmp_path / "docs.jsonl")}, "cache_dir": str(tmp_path / "datasets")}
        written = {
            "task": f"local_{kind}", "dataset_path": "json", "dataset_kwargs": files, "test_split": "test",
            "output_type": kind, **KINDS.get(kind, {}), **fields,
        }  # fmt: skip
        path = tmp_path / f"{kind}.yaml"
        path.write_text(yaml.safe_dump(written))
        return path

    return make


@pytest.mark.parametrize(
    ("kind", "field", "value", "said"),
    [
        ("multiple_choice", "options", "a whale", 'its choices must be a list, not "a whale"'),
        ("multiple_choice", "options", ["a", None], "a choice is null, which would be read as the word None"),
        ("multiple_choice", "story", None, "'story' is null, which would be read as the word None"),
        ("loglikelihood_rolling", "story", None, "'story' is null, which would be read as the word None"),
        ("generate_until", "story", None, "'story' is null, which would be read as the word None"),
        (
            "generate_until",
            "story",
            "1969-07-20",
            "'story' is no text but a time, which would be read as '1969-07-20 00:",
        ),
        ("generate_until", "story", ["a", None], "'story' is null, which would be read as the word None"),
    ],
)
def test_nothing_of_a_document_is_read_as_something_else(
    kind: str, field: str, value: Any, said: str, make_yaml: Callable[..., Path], library: Library
) -> None:
    path = make_yaml(kind)
    file = path.parent / "docs.jsonl"
    rows = [json.loads(line) for line in file.read_text().split("\n") if line]
    many = value is not None and not (field == "options" and isinstance(value, list))
    for row in rows if many else rows[4:5]:  # a column has one type
        row[field] = value
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=re.escape(said)) as refused:
        list(lm_eval_task(path).episodes(library, None))
    assert str(refused.value).startswith(f"lm-eval task local_{kind}, document {0 if many else 4}: ")


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(None, tmp_path, hub=False)


def lm_eval_task(name: Path | str, **options: Any) -> LmEvalTask:
    return LmEvalTask.named(str(name))(LmEvalConfig(**options))


@pytest.mark.parametrize("kind", KINDS)
def test_its_tasks_keep_our_promises(kind: str, make_yaml: Callable[..., Path], library: Library) -> None:
    check_task(lm_eval_task(make_yaml(kind)), library)


@pytest.mark.parametrize("folder", ["eos"], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_metrics_are_those_of_lm_eval(
    kind: str, folder: Path, make_yaml: Callable[..., Path], library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_yaml(kind)
    own = ours(folder, "full-context", segment=64)
    # Our episodes of texts begin behind a line break.
    monkeypatch.setattr(MemoryLM, "prefix_token_id", own.tok_encode("\n")[0])
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)  # it asks pip for ten seconds
    manager = TaskManager(include_path=str(path.parent), include_defaults=False)
    told = simple_evaluate(model=own, tasks=[f"local_{kind}"], task_manager=manager, bootstrap_iters=0)
    assert told is not None
    results = {k.split(",")[0]: v for k, v in told["results"][f"local_{kind}"].items() if not k.endswith(",words")}
    task = lm_eval_task(path)
    rows = observed(task, own, library)
    found = {e.metric: e for e in task.metrics(rows) if not e.slice}
    wanted = {n for n in results if n in found}
    assert wanted >= {"acc", "acc_norm", "brier_score", "perplexity", "exact_match", "word_perplexity"} & set(results)
    for name in wanted:
        assert found[name].value == pytest.approx(results[name], rel=1e-4), name
    if kind == "generate_until":
        assert "exact_match@words" in found
    assert told["config"]["memory_bench"]["config_hash"] == own.config_hash
    # From the samples alone, after the data are gone.
    Path(path.parent / "docs.jsonl").unlink()
    assert lm_eval_task(path).metrics(rows) == task.metrics(rows)


# Contexts whose end and continuation share a token with some tokenizers: a line break after a full stop, a bracket.
BORDERS: dict[str, Any] = {
    "plain": {},
    "line break": {"doc_to_text": "{{story}}.\n"},
    "bracket": {"doc_to_text": "{{story}} (", "target_delimiter": ""},
}


@pytest.fixture(scope="module", params=["bytes", "llama3", "prepend", "metaspace", "bos"])
def brought(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer of some kind; ``bos``: one that puts a mark and BOS before a text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    place = tmp_path_factory.mktemp(request.param)
    tokenizer = small_tokenizer("prepend" if request.param == "bos" else request.param)
    bos: dict[str, Any] = {}
    if request.param == "bos":
        template: Any = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
        tokenizer.post_processor = template
        bos = {"bos_token": "<s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **bos).save_pretrained(place)
    model: Any = tiny_backbone("llama", vocab_size=420, max_position_embeddings=256).model
    model.save_pretrained(place)
    return place


@pytest.mark.parametrize(
    ("kind", "border"),
    [*(("multiple_choice", border) for border in BORDERS), ("loglikelihood", "bracket"), ("generate_until", "plain")],
)
def test_the_grids_numbers_are_those_of_hf(
    kind: str,
    border: str,
    brought: Path,
    make_yaml: Callable[..., Path],
    library: Library,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """lm-eval's own model on the same task, whatever the tokenizer does at the beginning and at borders."""
    path = make_yaml(
        kind, **{k: v for k, v in BORDERS[border].items() if k != "doc_to_choice" or kind != "loglikelihood"}
    )
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)  # it asks pip for ten seconds
    manager = TaskManager(include_path=str(path.parent), include_defaults=False)
    told = simple_evaluate(
        model=theirs(brought, 256), tasks=[f"local_{kind}"], task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    assert told is not None
    results = {k.split(",")[0]: v for k, v in told["results"][f"local_{kind}"].items() if not k.endswith(",words")}
    task = lm_eval_task(path)
    rows = observed(task, ours(brought, "full-context", segment=64), library)
    found = {e.metric: e.value for e in task.metrics(rows) if not e.slice}
    assert {n: found[n] for n in results if n in found} == pytest.approx(
        {n: v for n, v in results.items() if n in found}, rel=1e-4
    )
    if kind == "multiple_choice":
        main = rows[rows["control"] == ""].sort_values("cluster", key=lambda c: c.astype(int))
        samples = sorted(told["samples"][f"local_{kind}"], key=lambda sample: sample["doc_id"])
        wanted = [[-float(r[0][0]) for r in sample["resps"]] for sample in samples]
        assert [list(nll) for nll in main["choice_nll"]] == [pytest.approx(nll, abs=1e-3) for nll in wanted]


def observed(task: LmEvalTask, own: MemoryLM, library: Library) -> pd.DataFrame:
    encode = own.chosen.loaded.encode
    rows = observe(own.chosen.model, list(task.episodes(library, None)), encode, seed=0, decode=encode.decode)
    return pd.DataFrame(rows)


def test_questions_without_an_answer_are_wrong(make_yaml: Callable[..., Path], library: Library) -> None:
    task = lm_eval_task(make_yaml("multiple_choice"))
    episodes = list(task.episodes(library, 2))
    ask = episodes[0].events[-1]
    assert isinstance(ask, Ask)
    row = {"seed": 0, "kind": "ask", "control": "", "event": 1, "predicted": ask.answer, "answer": ask.answer}
    right = {"nll": 0.1, "choice_nll": [0.1 if c == ask.answer else 9.0 for c in ask.choices], "generated": ""}
    second = episodes[1].events[-1]
    assert isinstance(second, Ask)
    blank = {"nll": float("nan"), "choice_nll": None, "generated": "", "predicted": ""}
    samples = pd.DataFrame(
        [
            {**row, **right, "episode": "0", "cluster": "0", "label": ask.label},
            {**row, **blank, "episode": "1", "cluster": "1", "label": second.label},
        ]
    )
    assert task.metrics(samples)[0].value == 0.5
    assert list(task.correct(samples)) == [1.0, 0.0]


def test_a_question_can_be_told_from_its_context(make_yaml: Callable[..., Path], library: Library) -> None:
    read, ask = next(lm_eval_task(make_yaml("multiple_choice"), question="\nQuestion:").episodes(library, 1)).events
    assert isinstance(read, Read)
    assert isinstance(ask, Ask)
    assert ask.prompt == "\nQuestion: what was it?\nAnswer:"
    assert ask.choices == (" a whale", " the white sea", " ship")
    assert "Question" not in read.text


def test_the_cell_knows_data_and_file(make_yaml: Callable[..., Path], library: Library) -> None:
    path = make_yaml("loglikelihood")
    first = lm_eval_task(path).data(library)
    assert first.label == "local_loglikelihood (lm-eval: local files)"
    path.write_text(path.read_text().replace("{{story}}", "So: {{story}}"))
    assert lm_eval_task(path).data(library).revision != first.revision


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("lambda_openai", "Nearest: lambada_openai"),
        ("nowhere/task.yaml", "no task file"),
        ("glue", "group|Unknown"),
        ("", "Name a task"),
    ],
)
def test_unknown_tasks_are_named(name: str, sentence: str, library: Library) -> None:
    with pytest.raises(UserError, match=sentence):
        load("tasks", f"lm-eval:{name}")().plan(library, pretrained=True)


def test_data_that_cannot_be_had_are_a_sentence(make_yaml: Callable[..., Path], library: Library) -> None:
    gone = make_yaml("loglikelihood", dataset_kwargs={"data_files": {"test": "nowhere.jsonl"}})
    with pytest.raises(DataError, match="cannot be had"):
        lm_eval_task(gone).plan(library, pretrained=True)
    with pytest.raises(UserError, match="metric of lm-eval task"):
        lm_eval_task(make_yaml("loglikelihood"), metric="f1").plan(library, pretrained=True)


def test_without_lm_eval_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="memory-bench\\[lm-eval\\]"):
        door.require()


# --- our tasks for it ---


OWN = sorted(door.include_path().glob("*.yaml"))


def test_our_tasks_are_there() -> None:
    wanted = {"pg19", "wikitext103", "pubmedqa", "passkey", "key_value", "squad_retention", "nq_retention", "babi"}
    assert {path.stem for path in OWN} == {f"mb_{name}" for name in wanted}


@pytest.mark.parametrize("path", [p for p in OWN if p.stem not in ("mb_wikitext103", "mb_babi")], ids=lambda p: p.stem)
def test_our_tasks_are_documents(path: Path, world: World, tmp_path: Path) -> None:
    library = Library(world.data, tmp_path, hub=False)
    metadata = {"library": library, "options": FEW.get(path.stem, {}), "version": 1.0, "model": "rmt"}
    manager = TaskManager(include_path=str(path.parent), include_defaults=False, metadata=metadata)
    task = manager.load([path.stem])["tasks"][path.stem]
    doc = task.eval_docs[0]
    assert doc["data"]
    assert len(doc["revision"]) == 16
    context = task.fewshot_context(doc, num_fewshot=0)
    made = task.construct_requests(doc=doc, ctx=context, metadata=(path.stem, 0, 1))
    if isinstance(made, list):
        assert made[doc["gold"]].args == (doc["context"] + doc["question"], f" {doc['answer']}")
        best = [(0.0, True) if i == doc["gold"] else (-9.0, False) for i in range(len(made))]
        assert task.process_results(doc, best) == {"acc": 1.0}
    elif made.request_type == "generate_until":
        assert task.process_results(doc, [f" {doc['answers'][0]}."]) == {"accuracy": 1.0}
        assert task.process_results(doc, ["nothing"]) == {"accuracy": 0.0}
    else:
        assert made.args == (doc["text"],)


FEW: dict[str, dict[str, Any]] = {
    "mb_pg19": {"extent": "full"},
    "mb_passkey": {"lengths": [64], "repeats": 1},
    "mb_key_value": {"episodes": 2},
    "mb_squad_retention": {"questions": 2, "steps": [0, 1], "chunk": 64},
    "mb_nq_retention": {"questions": 2, "steps": [0, 1], "chunk": 64},
}


def test_texts_have_the_length_that_was_asked_for() -> None:
    assert our_data._cut(Read("x" * 100, tokens=10)) == "x" * 40
    assert our_data._cut(Read("short", tokens=5, lead="0123456789" * 9)) == "567890123456789"[-15:] + "short"
    assert our_data._cut(Read("ü" * 9, tokens=1)) == "üü"


# --- the real command ---


def command(world: World, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, **world.environment(), "MEMORY_BENCH_DATA": str(world.data), "OMP_NUM_THREADS": "1"}
    code = "import sys; from memory_bench.cli import main; main(sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-c", code, "lm-eval", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("folder", ["eos"], indirect=True)
def test_the_real_command(folder: Path, world: World, tmp_path: Path, make_yaml: Callable[..., Path]) -> None:
    done = command(
        world, "run", "--model", door.NAME, "--model_args", f"model=truncation,backbone={folder},segment={WINDOW}",
        "--tasks", f"mb_pg19,{make_yaml('multiple_choice')}", "--metadata", '{"options": {"extent": "full"}}',
        "--limit", "2", "--output_path", str(tmp_path / "out"), "--log_samples",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    assert set(told["results"]) == {"mb_pg19", "local_multiple_choice"}
    assert told["config"]["memory_bench"]["model"] == "truncation"
    assert told["config"]["memory_bench"]["tokens_read"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (
            ["run", "--model", "memory-bench", "--model_args", "model=rmt,backbone=tiny,budget=smoke"],
            2,
            "run --models rmt",
        ),
        (["run", "--nonsense"], 2, "nonsense"),
    ],
)
def test_exit_codes_are_lm_evals(world: World, arguments: list[str], code: int, sentence: str) -> None:
    done = command(world, *arguments, *(["--tasks", "mb_pubmedqa", "--limit", "1"] if "--model" in arguments else []))
    assert done.returncode == code
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_the_folder_of_our_tasks_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["lm-eval", "--print-include-path"])
    assert ended.value.code == 0
    assert (Path(capsys.readouterr().out.strip()) / "mb_pg19.yaml").is_file()
