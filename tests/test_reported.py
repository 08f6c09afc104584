"""Published numbers: the data, what may be compared with them, and what a report says."""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from memory_bench import plugins
from memory_bench.command import listing
from memory_bench.errors import UserError
from memory_bench.published import reported
from memory_bench.published.comparable import (
    REASONS,
    Measured,
    judge,
    plain_name,
    rivals_of,
    same_length,
    scaled,
    tokenizer_of,
)
from memory_bench.published.reported import Reported, find, load
from memory_bench.report.beside import REFUSED, find_beside
from memory_bench.report.board import collect
from memory_bench.report.build import build
from memory_bench.store import Store
from memory_bench.tasks.language_modeling import WikiText103
from synthetic import TASKS, make_cell, make_record, make_store

MATCHED = "hmt.table-4.hmt-opt-350m.wikitext-103.ppl.30k"

# As the papers print them, written down by hand.
KNOWN = {
    "hmt.table-2.hmt-opt-2-7b.wikitext-103.ppl.mean": "8.61",
    "hmt.table-4.hmt-opt-350m.wikitext-103.ppl.30k": "13.67",
    "hmt.table-5.hmt-llama-2-7b.pg-19.ppl.60k": "7.40",
    "hmt.table-9.hmt-opt-2-7b.wikitext-103.ppl.10k.gradients-over-15-segments": "8.20",
    "hmt.figure-16.rmt-opt-2-7b.wikitext-103.ppl.2k.gradients-over-8-segments": "12.05",
    "hmt.figure-6.rmt-llama-2-7b.pubmedqa-short-answers.accuracy.10-contexts": "76",
    "hmt.figure-4.rmt-qwen2-5-14b.pg-19.ppl.100k": "62.8",
    "rmt.table-5.transformer.wikitext-103.ppl.segment-50.none": "39.05",
    "rmt.table-5.rmt-bptt-4.wikitext-103.ppl.segment-50.memory-tokens-10": "26.25",
    "babilong.leaderboard.rmt.babilong-mean.accuracy.128k": "58.52",
    "armt.table-1.armt.babilong-qa1.exact-match.50m": "49.6",
    "memorizing-draft.table-12.memorizing-transformer.pg-19.ppl.segment-512.slots-65536": "11.9",
    "infini.table-2.rmt.pg-19.ppl": "13.27",
    "memoryllm.table-2.memoryllm-llama-2-7b.longbench-narrativeqa.f1.16384": "20.64",
    "memoryllm-readme.squad-plot.memoryllm-llama-3-8b.squad-retention.exact-hit.step-50": "0.223",
    "mplus.table-1.m-plus-llama-3-1-8b.longbook-qa-and-eventqa.gpu-memory.192k": "21177.8",
    "larimar.section-5-4.larimar-gpt-j-6b.counterfact.rewrite-accuracy.1024-edits": "82",
    "autocompressor.table-3.rmt-1-3b.gutenberg.ppl.28672": "13.07",
}
CAUTIONED = {
    "likely nats per token": ("mplus.section-4-6-1.*", 2),
    "RMT alone has 24.85": ("rmt*", 2),
    "F1 in the paper": ("rmt*hyperpartisan*", 2),
    "repeats the mean": ("babilong.leaderboard.armt.babilong-qa5.*", 9),
    "five tasks at this length": ("babilong.leaderboard.armt.babilong-mean.*", 2),
    "1.007e9": ("memoryllm.sections-3-3-and-4.*", 1),
    "Labelled 20k": ("mplus.table-2.memoryllm-llama-2-7b.*", 7),
    "Three protocols": ("m*retention*", 198),
    "two versions of this paper": ("memorizing*", 122),
    "13.13 is RWKV-3B": ("hmt.table-?.*rwkv-3b*", 2),
    "the bars as read": ("mplus.figure-2.*", 2),
    "compare it within its table": ("*.ppl*", 519),
    "give 16.7 and 29.0": ("hmt.table-2.*", 2),
    "each other's number": ("hmt.caption-of-figure-[45].*", 2),
    "do not belong together": ("hmt.*figure-12.*", 12),
    "may have been run with 64": ("hmt.*", 2),
}


def test_every_row_says_what_it_is() -> None:
    rows = load()
    assert len(rows) == 2390
    assert Counter(r.confidence for r in rows) == {"verified": 2053, "secondary": 327, "from memory": 10}
    assert len({r.id for r in rows}) == len(rows)
    assert not [r.id for r in rows if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*(\.[a-z0-9]+(-[a-z0-9]+)*){3,}", r.id)]
    assert not [r.id for r in rows if not all((r.source, r.where, r.model, r.metric, r.unit))]
    assert {r.better for r in rows} == {"higher", "lower"}
    assert {r.read for r in rows} == set(reported.READINGS)
    assert {r.confidence for r in rows} == set(reported.CONFIDENCES)
    assert not [r.id for r in rows if (r.read == "plot") != (r.error is not None)]
    assert not [r.id for r in rows if r.metric == "ppl" and not r.tokenizer and "not named" not in r.backbone
                and r.family]  # fmt: skip


def test_values_are_possible() -> None:
    for r in load():
        if r.value is None:
            assert "out of memory" in r.note, r.id
            continue
        assert math.isfinite(r.value)
        if r.unit == "share":
            assert 0 <= r.value <= 1, r.id
        elif r.unit == "percent" and "magnitude" not in r.metric:
            assert (-20 if r.metric == "ppl_reduction" else 0) <= r.value <= 100, r.id
        if r.metric == "ppl":
            assert r.value > 1, r.id
        assert r.sd is None or r.sd >= 0
    assert [r.id for r in load() if r.void and r.metric == "ppl"] == [r.id for r in find("mplus.section-4-6-1")]


def test_names_are_those_of_the_benchmark() -> None:
    models, tasks = plugins.installed("models"), plugins.installed("tasks")
    rows = load()
    assert {r.family for r in rows} - {""} <= set(models)
    assert {r.task for r in rows if not r.task.startswith("lm-eval:")} - {""} <= set(tasks)
    for family in {r.family for r in rows} - {""}:
        known = {f.name for f in fields(plugins.load("models", family).Config)}
        used = {name for r in rows if r.family == family for name in r.options()}
        assert used <= known, f"{family}: {used - known}"


def test_every_source_and_caution_is_used() -> None:
    text = (reported.results_folder() / "reported" / "registry.toml").read_text(encoding="utf-8")
    rows = load()
    for line in text.splitlines():
        name, _, said = line.partition(" = ")
        if said.startswith('"'):
            assert any(said.strip('"') in (r.source, *r.cautions) for r in rows), name


@pytest.mark.parametrize("name", KNOWN)
def test_known_values(name: str) -> None:
    assert [r.shown for r in find(name)] == [KNOWN[name]]


@pytest.mark.parametrize("said", CAUTIONED)
def test_anomalies_are_flagged(said: str) -> None:
    pattern, count = CAUTIONED[said]
    flagged = {r.id for r in load() if said in r.caution}
    assert len(flagged) == count
    assert flagged <= {r.id for r in find(pattern)}


def test_find_takes_names_beginnings_and_globs() -> None:
    assert len(find("hmt.table-4")) == len(find("hmt.table-4.*")) == 11
    assert [r.id for r in find(MATCHED)] == [MATCHED]
    assert {r.id.split(".")[0] for r in find("memoryllm")} == {"memoryllm"}
    with pytest.raises(UserError, match="--grep hmt"):
        find("hmt.table-99")
    with pytest.raises(UserError, match="babilong"):
        find("nothing")


def test_list_shows_all(tmp_path: Path) -> None:
    entries = listing.rows("reported", None, tmp_path)
    assert len(entries) == len(load())
    assert {"id", "model", "task", "data", "metric", "value", "unit", "setting", "source", "confidence"} <= set(
        entries[0]
    )
    lines = listing.text(entries).splitlines()
    assert len(lines) == len(entries)
    line = next(line for line in lines if line.startswith(f"{MATCHED} "))
    assert "13.67 per token" in line
    assert "Table 4; verified" in line
    assert "Beware:" in line


def test_precision_is_half_a_digit_or_the_reading_error() -> None:
    assert find(MATCHED)[0].precision == pytest.approx(0.005)
    assert find("memoryllm-readme.squad-plot.*step-50")[0].precision == 0.004


OURS = Measured(
    label="hmt",
    model="hmt",
    task="wikitext103",
    data="wikitext103",
    split="test",
    metric="ppl_token",
    value=13.6,
    low=13.4,
    high=13.8,
    backbone="facebook/opt-350m",
    contexts=("29500 tokens",),
    segment=1024,
    options={"segment": 1024, "cache": 300, "sensory_tokens": 32, "memory_tokens": 1, "recall": True},
    trained_on="redpajama-v2, then wikitext103",
    train_tokens=16_000_000,
    look_ahead=512,
)


def theirs(**changes: Any) -> Reported:
    return replace(find(MATCHED)[0], **changes)


def test_a_match_is_reproduced() -> None:
    assert str(judge(theirs(), OURS)) == "reproduced"


# In the order in which the reasons are given: (reason, how ours or theirs is changed).
BREAKS: list[tuple[str, Callable[[Reported, Measured], tuple[Reported, Measured]]]] = [
    ("stand-in data", lambda r, m: (r, replace(m, data="wikitext103 (stand-in: x)"))),
    ("secondary source", lambda r, m: (replace(r, confidence="secondary"), m)),
    ("other tokenizer: words", lambda r, m: (replace(r, tokenizer="words"), m)),
    ("other backbone: OPT-2.7B", lambda r, m: (replace(r, backbone="OPT-2.7B"), m)),
    ("other part of the data: test", lambda r, m: (r, replace(m, split="test, limit 3"))),
    ("segment 1,024, not 512", lambda r, m: (r, replace(m, segment=512))),
    ("30k tokens, not 2000 tokens", lambda r, m: (r, replace(m, contexts=("2000 tokens",)))),
    ("cache 300, not 100", lambda r, m: (r, replace(m, options={**m.options, "cache": 100}))),
    ("16,179,200 tokens of training, not 200,000", lambda r, m: (r, replace(m, train_tokens=200_000))),
    ("ours: not learned", lambda r, m: (r, replace(m, learned="not learned"))),
    ("theirs is no measurement of this", lambda r, m: (replace(r, void=True), m)),
    ("theirs looks ahead", lambda r, m: (r, replace(m, look_ahead=0))),
]


def test_every_reason_is_tried() -> None:
    assert len(BREAKS) == len(REASONS)


@pytest.mark.parametrize("place", range(len(BREAKS)), ids=[why.split(":")[0] for why, _ in BREAKS])
def test_the_first_reason_is_said(place: int) -> None:
    why, change = BREAKS[place]
    alone = judge(*change(theirs(), OURS))
    assert (str(alone), alone.passed) == (f"not comparable ({why})", place)
    pair = theirs(), OURS
    for _, later in BREAKS[place + 1 :]:
        pair = later(*pair)
    assert judge(*change(*pair)).passed == place


MORE_BREAKS = {
    "from memory source": (theirs(confidence="from memory"), OURS),
    "other part of the data: not said": (theirs(split=""), OURS),
    "segment not said, not 1024": (theirs(segment=None), OURS),
    "length not said, not 29500 tokens": (theirs(context=""), OURS),
    "memory: 512 slots": (theirs(memory="512 slots"), OURS),
    "memory: not said": (theirs(memory=""), OURS),
    "recall false, not True": (theirs(memory="cache=300 recall=false"), OURS),
    "length of training not said": (theirs(train_tokens=None), OURS),
    "trained on Pile, not redpajama-v2, then wikitext103": (theirs(trained_on="Pile"), OURS),
    "ours: over budget": (theirs(), replace(OURS, status="over_budget")),
    "ours: no interval": (theirs(), replace(OURS, low=None, high=None)),
    "trained on redpajama-v2, then wikitext103, not checkpoint x": (
        theirs(),
        replace(OURS, pretrained="me/x", trained_on="checkpoint x", learned="pretrained"),
    ),
    "ours looks ahead": (theirs(look_ahead=False), OURS),
    "other tokenizer: GPT-2 BPE": (theirs(), replace(OURS, backbone="smollm2-135m")),
}


@pytest.mark.parametrize("why", MORE_BREAKS)
def test_what_is_unsaid_or_unlike_is_not_comparable(why: str) -> None:
    assert str(judge(*MORE_BREAKS[why])) == f"not comparable ({why})"


def test_released_weights_are_what_their_readme_measured() -> None:
    row = find("memoryllm-readme.squad-plot.memoryllm-llama-3-8b.squad-retention.exact-hit.step-2")[0]
    options = {"tokens_per_block": 256, "blocks": 50}
    ours = Measured(
        "memoryllm", "memoryllm", "squad-retention", "squad-retention", row.split, "raw_hit", 0.62, 0.61, 0.63,
        "YuWangX/memoryllm-8b", contexts=("1024 tokens", "2 steps"), segment=512, options=options,
        trained_on="checkpoint memoryllm-8b", pretrained="YuWangX/memoryllm-8b", learned="pretrained",
    )  # fmt: skip
    assert str(judge(row, ours)) == "reproduced"
    assert "letter by letter" in judge(row, replace(ours, metric="accuracy")).why


def test_agreement() -> None:
    backbone = theirs(model="RMT", value=13.9, shown="13.90")
    assert judge(theirs(), replace(OURS, low=13.0, high=13.6, value=13.3)).kind == "differs"
    # What the interval leaves out: noise between trainings, and how exactly the value was read.
    assert judge(theirs(), replace(OURS, low=13.0, high=13.6, value=13.3, spread=0.04)).kind == "reproduced"
    assert judge(theirs(error=0.08), replace(OURS, low=13.0, high=13.6, value=13.3)).kind == "reproduced"
    wide = replace(OURS, low=13.0, high=14.2)
    found = judge(theirs(), wide, [backbone])
    assert (found.kind, found.why) == ("within interval", "the interval also holds RMT, 13.90")
    assert judge(theirs(), OURS, [backbone]).kind == "reproduced"
    assert judge(theirs(), replace(OURS, low=12.0, high=15.0)).why == "the interval is wide"
    assert judge(theirs(), replace(OURS, value=14.2, low=13.6, high=14.4), [theirs(value=20.0)]).kind == (
        "within interval"
    )


def test_rivals_are_other_models_in_the_same_cell() -> None:
    row = find("hmt.table-2.hmt-opt-350m.wikitext-103.ppl.mean")[0]
    assert [r.model for r in rivals_of(row, load())] == ["sliding window"]
    assert rivals_of(row, [replace(row, model="other", value=row.value)]) == ()
    assert rivals_of(row, [replace(row, value=20.0)]) == ()
    assert len(rivals_of(row, [replace(row, model="other", value=20.0)])) == 1


def test_shares_are_compared_in_one_unit() -> None:
    percent = find("hmt.figure-6.hmt-llama-2-7b.pubmedqa-short-answers.accuracy.2-contexts")[0]
    assert scaled(percent, "accuracy") == pytest.approx(0.86)
    share = find("memoryllm-readme.squad-plot.*llama-3-8b*step-50")[0]
    assert scaled(share, "accuracy") == pytest.approx(0.223)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("30k tokens", "29500 tokens", True),
        ("30k tokens", "26000 tokens", False),
        ("2 steps", "2 steps", True),
        ("2 steps", "3 steps", False),
        ("1 step", "1 steps", True),
        ("2 contexts", "2 tokens", False),
        ("documents", "documents", True),
        ("mean over 2k to 100k tokens", "30000 tokens", False),
        ("", "", False),
    ],
)
def test_lengths(a: str, b: str, same: bool) -> None:
    assert same_length(a, b) == same


def test_backbones_go_by_many_names() -> None:
    assert plain_name("meta-llama/Llama-2-7b-hf") == plain_name("Llama-2-7B")
    assert plain_name("/models/opt-350m/") == plain_name("OPT-350M")
    assert plain_name("openlm-research/open_llama_3b_v2") == plain_name("OpenLlamaV2-3B")
    assert plain_name("smollm2-135m") != plain_name("SmolLM-135M")
    assert tokenizer_of("facebook/opt-125m") == tokenizer_of("openai-community/gpt2") == "GPT-2 BPE"
    assert tokenizer_of("tiny") == "tiny"


def matching_store(folder: Path, ppl: float, **changes: Any) -> Store:
    """A run whose setting is that of HMT's Table 4 on OPT-350M, with a perplexity of its own."""
    options = {**OURS.options, "recall_query": "current-half"}
    store = Store.open_or_create(folder)
    cell = make_cell("hmt", "wikitext103", **options)
    training = replace(
        cell.training,
        backbone=replace(cell.training.backbone, name="facebook/opt-350m"),
        corpus=replace(cell.training.corpus, name=OURS.trained_on),
    )
    task = replace(cell.task, config={"words": 24_000, "documents": 0, "data": "wikitext103", **changes})
    cell = replace(cell, training=training, task=task)
    rng = np.random.default_rng(3)
    level = math.log(ppl)
    rows = [
        {"seed": 0, "episode": f"text {i}", "cluster": f"text {i}", "event": 0, "kind": "read", "control": control,
         "start": 0, "tokens": 30_000, "nbytes": 120_000, "words": 24_000, "distance_tokens": -1,
         "nll": 30_000 * (level + rng.normal(0, 0.005)), "distance_bytes": -1, "choice_nll": None, "predicted": "",
         "answer": "", "label": ""}
        for i in range(24) for control in ("", "wiped")
    ]  # fmt: skip
    samples = pd.DataFrame(rows)
    plain = make_record(make_cell("hmt"), None)
    learned = {"verdict": "learned", "lift": 0.02, "low": 0.01, "high": 0.03, "against": "control:wiped"}
    usage = replace(plain.usage, train_tokens=16_000_000)
    metrics = tuple(WikiText103().metrics(samples))
    store.write_record(
        replace(plain, cell=cell, usage=usage, metrics=metrics, learned=learned, provenance={"look_ahead": 512}),
        samples,
    )
    return store


TEXT = {"wikitext103": WikiText103()}


@pytest.mark.parametrize(("ppl", "verdict"), [(13.67, "reproduced"), (15.2, "differs")])
def test_a_run_in_the_published_setting_is_compared(tmp_path: Path, ppl: float, verdict: str) -> None:
    report = build(matching_store(tmp_path / "run", ppl), TEXT)
    pairs = report.beside(report.boards[0]).pairs
    assert (pairs[0].published.id, str(pairs[0].verdict)) == (MATCHED, verdict)
    line = next(line for line in report.markdown().splitlines() if MATCHED in line)
    assert f"| {verdict} " in line
    assert "| 13.67 " in line
    page = report.html()
    assert MATCHED in page
    assert "<details open><summary>Reported beside reproduced" in page


@pytest.mark.parametrize(
    ("change", "why"), [({"documents": 8}, "other part of the data: test"), ({"data": "wikitext103 (stand-in: x)"}, "")]
)
def test_a_run_in_another_setting_is_not(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    report = build(matching_store(tmp_path / "run", 13.67, **change), TEXT)
    found = report.beside(report.boards[0])
    assert all(p.verdict.kind == "not comparable" for p in found.pairs)
    if why:
        assert next(p for p in found.pairs if p.published.id == MATCHED).verdict.why == why
    else:
        assert (found.pairs, found.refused) == ((), REFUSED)
        assert REFUSED in report.markdown()
        assert REFUSED in report.html()


def test_the_table_is_short_and_says_how_many_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "run")
    boards = collect(store, TASKS)
    real = [replace(b, cell=replace(b.cell, task=replace(b.cell.task, config={"data": b.task}))) for b in boards]
    for board in real:
        found = find_beside(board)
        assert 0 < len(found.pairs) <= 12
        assert max(Counter(p.ours.label for p in found.pairs).values()) <= 2
        mine = [r for r in load() if r.task == board.task and r.family in {row.model for row in board.everything}]
        assert found.left_out == len(mine) - len({p.published.id for p in found.pairs})
        assert f"{found.left_out:,} more" in found.more
        named = [r for r in listing.rows("reported", None, tmp_path) if found.grep in r["id"]]
        assert {r.id for r in mine} <= {r["id"] for r in named}
        assert all(p.verdict.kind == "not comparable" for p in found.pairs)
        monkeypatch.setattr("memory_bench.report.beside.PER_BOARD", 1)
        assert len(find_beside(board).pairs) == 1
        monkeypatch.undo()


def test_an_ablation_stands_beside_an_ablation(tmp_path: Path) -> None:
    store = Store.open_or_create(tmp_path / "run")
    for role, recall, label in (("asked", True, "hmt"), ("control", False, "hmt (recall off)")):
        cell = make_cell("hmt", "wikitext103", role=role, label=label, recall=recall, segment=1024)
        cell = replace(cell, task=replace(cell.task, config={"data": "wikitext103"}))
        metrics = tuple(WikiText103().metrics(store_samples(matching_store(tmp_path / label, 13.67))))
        plain = make_record(make_cell("hmt"), None)
        store.write_record(replace(plain, cell=cell, metrics=metrics), None)
    found = find_beside(collect(store, TEXT)[0])
    assert {p.published.model for p in found.pairs if p.ours.label == "hmt (recall off)"} == {"HMT, recall off"}
    assert {p.published.model for p in found.pairs if p.ours.label == "hmt"} != {"HMT, recall off"}


def store_samples(store: Store) -> pd.DataFrame:
    found = store.samples(store.records()[0].key)
    assert found is not None
    return found
