"""Published claims: what is read, when a test holds, and that a verdict names what it rests on."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from memory_bench import plugins
from memory_bench.cell import Choice
from memory_bench.cli import app
from memory_bench.errors import UserError
from memory_bench.protocol import MemoryModel, Readout, Segment, State, Traits
from memory_bench.published import claims as published
from memory_bench.published import reported
from memory_bench.published.claims import COMPARED, Claim, claims_file, read_claims
from memory_bench.reproduce import command as reproduce
from memory_bench.reproduce import probes
from memory_bench.reproduce.verdicts import Finding, Verdict, markdown
from memory_bench.running.grid import _parse_model
from memory_bench.running.options import Options
from memory_bench.running.recipes import make_recipe
from memory_bench.statistics.effects import (
    FAILS,
    HOLDS,
    MEASURED,
    NOT_RUN,
    OPEN,
    Effect,
    decide,
    mean_effect,
    perplexity_effect,
    seed_interval,
    share_effect,
    together,
)
from memory_bench.store import Store
from synthetic import text_samples

LOWER = published.Test("lower", "a", "b", task="pg19")
SEEDS = range(5)


def rows(gain: float, seeds: range = SEEDS, wobble: float = 0.0) -> dict[int, pd.DataFrame]:
    """Samples by seed; `gain` in bits per byte, `wobble` its alternating change between seeds."""
    return {s: text_samples(s, gain + wobble * (-1) ** s) for s in seeds}


def verdict(left: Mapping[int, pd.DataFrame], right: Mapping[int, pd.DataFrame], test: published.Test = LOWER) -> str:
    return decide(test, perplexity_effect(left, right))


def test_a_gain_that_every_document_and_seed_shows_holds() -> None:
    better, worse = rows(0.05), rows(0.0)
    effect = perplexity_effect(better, worse)
    assert effect is not None
    assert (effect.n, effect.count) == (24, 5)
    assert effect.low <= effect.value <= effect.high < 0
    assert verdict(better, worse) == HOLDS
    assert verdict(worse, better) == FAILS
    assert verdict(better, better) == OPEN


def test_the_effect_is_the_ratio_of_token_perplexities() -> None:
    left, right = rows(0.05), rows(0.0)
    nats = [math.fsum(f["nll"].sum() for f in frames.values()) for frames in _main(left, right)]
    tokens = sum(f[f["control"] == ""]["tokens"].sum() for f in left.values())
    effect = perplexity_effect(left, right)
    assert effect is not None
    assert effect.value == pytest.approx(100 * math.expm1((nats[0] - nats[1]) / tokens), rel=1e-6)


def _main(*frames: Mapping[int, pd.DataFrame]) -> list[dict[int, pd.DataFrame]]:
    return [{s: f[f["control"] == ""] for s, f in by_seed.items()} for by_seed in frames]


def test_the_share_of_a_gain() -> None:
    effect = share_effect(rows(0.08), rows(0.06), rows(0.0))
    assert effect is not None
    assert effect.value == pytest.approx(25, abs=4)
    assert effect.documents[0] < 25 < effect.documents[1]
    assert effect.low > 0
    same = share_effect(rows(0.08), rows(0.08), rows(0.0))
    assert same is not None
    assert same.value == pytest.approx(0, abs=1e-9)
    assert share_effect(rows(0.08), rows(0.06), rows(0.0, range(4))) is None


def test_seeds_that_disagree_leave_it_open_however_sure_the_documents_are() -> None:
    effect = perplexity_effect(rows(0.03, wobble=0.1), rows(0.0))
    assert effect is not None
    assert effect.documents[1] < 0 < effect.seeds[1]
    assert decide(LOWER, effect) == OPEN


def test_documents_that_disagree_leave_it_open_however_sure_the_seeds_are() -> None:
    left, right = rows(0.0), rows(0.0)
    for frame in left.values():
        odd = frame["episode"].str[-2:].astype(int) % 2 == 1
        frame.loc[odd, "nll"] *= 1.3
        frame.loc[~odd, "nll"] *= 0.72
    effect = perplexity_effect(left, right)
    assert effect is not None
    assert effect.documents[0] < 0 < effect.documents[1]
    assert decide(LOWER, effect) == OPEN


def test_fewer_than_five_seeds_decide_nothing() -> None:
    assert verdict(rows(0.05, range(4)), rows(0.0, range(4))) == NOT_RUN


def test_seeds_without_a_partner_are_no_comparison() -> None:
    assert perplexity_effect(rows(0.05), rows(0.0, range(4))) is None


def test_a_length_counts_the_beginnings_of_documents_that_have_it() -> None:
    left, right = rows(0.0), rows(0.0)
    for frame in left.values():
        frame.loc[frame["start"] < 128, "nll"] *= 0.9  # better at the beginning only
        frame.loc[frame["start"] >= 128, "nll"] *= 1.1
    early, late = (perplexity_effect(left, right, n) for n in (128, 256))
    assert early is not None
    assert late is not None
    assert early.value < -5 < late.value
    assert perplexity_effect(left, right, 257) is None


@pytest.mark.parametrize(
    ("kind", "tolerance", "low", "high", "expected"),
    [
        ("no worse", 0.01, -0.5, 0.9, HOLDS),
        ("no worse", 0.01, 0.5, 1.5, OPEN),
        ("no worse", 0.01, 1.1, 1.5, FAILS),
        ("equal", 0.02, -1.9, 1.9, HOLDS),
        ("equal", 0.02, -2.5, -2.1, FAILS),
        ("equal", 0.02, -2.5, 0.0, OPEN),
        ("measure", 0.0, 5.0, 6.0, MEASURED),
        ("recall", 0.0, -6.0, -5.0, HOLDS),
        ("pool", 0.02, 2.1, 2.2, FAILS),
    ],
)
def test_tolerances(kind: str, tolerance: float, low: float, high: float, expected: str) -> None:
    effect = Effect((low + high) / 2, (low, high), (low, high), 24, 5, "perplexity")
    assert decide(published.Test(kind, "a", "b", tolerance=tolerance), effect) == expected


def test_exact_counts_need_no_seeds() -> None:
    inside, outside = (mean_effect(np.array([[share]]), "the backbone") for share in (0.01, 0.03))
    test = published.Test("parameters", "hmt", low=0.005, high=0.02)
    assert (decide(test, inside), decide(test, outside)) == (HOLDS, FAILS)


def test_a_claim_holds_where_all_its_tests_do() -> None:
    assert together([HOLDS, HOLDS]) == HOLDS
    assert together([HOLDS, OPEN]) == OPEN
    assert together([OPEN, FAILS, HOLDS]) == FAILS
    assert together([FAILS, NOT_RUN]) == NOT_RUN
    assert together([MEASURED, HOLDS]) == HOLDS
    assert together([MEASURED]) == MEASURED
    assert together([]) == NOT_RUN


def test_seed_intervals_cover_the_mean() -> None:
    rng = np.random.default_rng(0)
    hits = [low <= 0 <= high for low, high in (seed_interval(rng.normal(size=5).tolist()) for _ in range(2000))]
    assert 0.93 < np.mean(hits) < 0.97


def test_every_published_claim_is_listed_with_a_test_or_a_need() -> None:
    claims = read_claims(claims_file()).claims
    ids = [claim.id for claim in claims]
    assert ids == [*(f"C{i}" for i in range(1, 17)), *(f"P{i}" for i in range(1, 23)), "O1", "O2"]
    assert [c.id for c in claims if not c.test and not c.needs] == []
    on_cpu = {c.id for c in claims if c.test}
    assert {"C1", "P3", "C2", "C4", "C5", "P6", "P8", "C8", "C9", "C10", "P18", "P21"} <= on_cpu


def test_the_claims_name_models_options_and_tasks_that_exist() -> None:
    known = read_claims(claims_file())
    models, tasks = plugins.installed("models"), plugins.installed("tasks")
    for test in (t for claim in known.claims for t in claim.test):
        assert test.task in tasks or not test.trains, test
        for label in filter(None, (test.left, test.right)):
            name, options = _parse_model(label)
            assert name in models, label
            config = plugins.load("models", name).Config
            for option, value in options.items():
                prefix, _, rest = option.rpartition(".")
                if prefix == "train":
                    make_recipe(Choice(value) if rest == "recipe" else Choice("tiny", config={rest: value}))
                else:
                    plugins.configure(label, config(), {rest: value})


def test_evidence_is_among_the_published_numbers() -> None:
    for claim in read_claims(claims_file()).claims:
        for pattern in claim.evidence:
            assert reported.find(pattern), f"{claim.id}: {pattern}"


def test_mistakes_in_a_file_of_claims_are_sentences(tmp_path: Path) -> None:
    text = claims_file().read_text(encoding="utf-8")
    path = tmp_path / "claims.toml"
    for wrong, said in (
        (text.replace('tier = "gpu"', 'tier = "gqu"', 1), "Did you mean gpu"),
        (text.replace('kind = "lower"', 'kind = "lover"', 1), "Did you mean lower"),
        (text.replace("says =", "say =", 1), "Did you mean says"),
        (text + "\n[", "Cannot read"),
    ):
        path.write_text(wrong, encoding="utf-8")
        with pytest.raises(UserError, match=said):
            read_claims(path)


def test_each_task_is_asked_for_once_with_the_models_of_all_its_tests() -> None:
    known = read_claims(claims_file())
    tests = [t for claim in known.claims for t in claim.test]
    requests = reproduce.make_requests(tests, known.setup, (0, 1))
    assert sorted(r.tasks[0] for r in requests) == ["pg19", "pg19-interleaved", "wikitext103"]
    wanted = {m for t in tests for m in t.trains if t.task == "pg19"}
    assert {m for r in requests if r.tasks == ("pg19",) for m in r.models} == wanted
    assert all(not r.controls and r.seeds == (0, 1) for r in requests)


def test_a_pool_that_does_not_drop_at_random_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "STREAMS", 40)
    test = published.Test("pool", "memoryllm", tolerance=0.1)
    assert decide(test, mean_effect(probes.beyond_law("memoryllm", SEEDS), "rows")) == HOLDS
    cls = plugins.load("models", "memoryllm")
    monkeypatch.setattr(cls, "expected_retention", lambda self, tokens: 0.5 ** (tokens / 4))
    assert decide(test, mean_effect(probes.beyond_law("memoryllm", SEEDS), "rows")) == FAILS


class Recaller(MemoryModel[State]):
    """Recalls filler only (`place` 1) or text only (0)."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place, self.read, self.traits = place, 0, Traits(segment=4)

    def open(self, rows: int, *, seeds: Any = None) -> Any:
        return rows

    def step(self, state: Any, segment: Segment, *, write: bool = True) -> tuple[Readout, Any]:
        raise AssertionError("only absorbs")

    def flops(self, tokens: int, remembered: int) -> int:
        return 0

    def absorb(self, state: Any, segment: Segment) -> Any:
        self.read += 1
        return state

    def recall_weights(self, state: Any, segment: Segment) -> torch.Tensor | None:
        weights = torch.zeros(state, self.read)
        if self.read:
            weights[:, self.place] = 1
        return weights if self.read else None


@pytest.mark.parametrize(("place", "expected"), [(0, -1.0), (1, 1.0)])
def test_where_recall_goes(place: int, expected: float) -> None:
    encode = lambda text: (list(text.encode()), [1] * len(text.encode()))
    found = probes.filler_preference(Recaller(place), encode, ["Call me Ishmael. Some", "years ago - never mi"], 0)
    assert found.tolist() == [expected, expected]


def test_hmts_recall_weighs_all_that_was_read(make_backbone: Any) -> None:
    cls = plugins.load("models", "hmt")
    model = cls(
        make_backbone("llama"), cls.Config(segment=8, sensory_tokens=2, recall_width=8), torch.Generator()
    ).eval()
    ids = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(0))
    state = model.open(2)
    assert model.recall_weights(state, Segment.full(ids)) is None
    for _ in range(3):
        state = model.absorb(state, Segment.full(ids))
    weights = model.recall_weights(state, Segment.full(ids))
    assert weights is not None
    assert weights.shape == (2, 3)
    assert torch.allclose(weights.sum(dim=1), torch.ones(2))


def test_a_verdict_without_records_reads_not_run(tmp_path: Path, world: Any) -> None:
    options = Options(
        "", "", "", "", "5", "", world.data, True, tmp_path, "", (), False, "inline", "", False, True, False,
        world.cache, False,
    )  # fmt: skip
    bench = reproduce._Bench({}, Store.open_or_create(tmp_path), options, None, tuple(SEEDS))  # type: ignore[arg-type]
    [finding] = reproduce.judge(LOWER, bench)
    assert (finding.verdict, finding.keys, finding.effect) == (NOT_RUN, (), None)
    claim = Claim("C0", "it is so", "somewhere", "1", "cpu", test=(LOWER,))
    assert Verdict(claim, (finding,)).word == NOT_RUN


def test_the_page_names_effect_intervals_seeds_and_records() -> None:
    setup = read_claims(claims_file()).setup
    effect = Effect(-1.5, (-2.0, -1.0), (-2.5, -0.5), 24, 5, "perplexity")
    finding = Finding(replace(LOWER, lengths=(512,)), 512, effect, HOLDS, (0, 1, 2, 3, 4), ("abcd", "ef01"))
    done = Verdict(Claim("C0", "it is so", "somewhere", "2 %", "cpu", differs="it is small"), (finding,))
    left = Verdict(Claim("C9", "it is big", "elsewhere", "3", "gpu", needs="a GPU"), ())
    text = markdown([done, left], setup, {"data": "pg19"})
    for part in ("-1.50 %", "-2.00 to -1.00", "-2.50 to -0.50", "Seeds 0, 1, 2, 3, 4", "`abcd`, `ef01`", "holds",
                 "first 512 tokens", "2 %", "it is small", "a GPU", "budget cpu-minutes"):  # fmt: skip
        assert part in text, part


def test_reproduce_runs_counts_and_writes(tmp_path: Path, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim that is counted, one that needs a GPU, and the files they leave."""
    monkeypatch.setattr(probes, "STREAMS", 200)
    result = CliRunner().invoke(app, ["reproduce", "C10", "C11", "--out", str(tmp_path)], env=world.environment())
    assert result.exit_code == 0, result.output
    found = {c["claim"]["id"]: c for c in json.loads((tmp_path / "claims.json").read_text())["claims"]}
    assert {k: v["verdict"] for k, v in found.items()} == {"C10": HOLDS, "C11": NOT_RUN}
    [key] = found["C10"]["findings"][0]["keys"]
    kept = json.loads((tmp_path / "counted" / f"{key}.json").read_text())
    assert np.shape(kept["values"]) == (5, probes.STREAMS)
    assert "one 80 GB GPU" in (tmp_path / "claims.md").read_text()


def test_reproduce_refuses_stand_ins_and_unknown_claims(tmp_path: Path, world: Any) -> None:
    runner, environment = CliRunner(), world.environment()
    with pytest.raises(UserError, match="books"):
        runner.invoke(app, ["reproduce", "C5", "--out", str(tmp_path)], env=environment, catch_exceptions=False)
    with pytest.raises(UserError, match="Did you mean"):
        runner.invoke(app, ["reproduce", "C55"], env=environment, catch_exceptions=False)


def test_kinds_of_tests_are_drawn_apart() -> None:
    assert all(published.Test(kind, "a", "b").trains == ("a", "b") for kind in COMPARED)
    assert published.Test("share", "a", "b", "c").trains == ("a", "b", "c")
    assert published.Test("recall", "a").trains == ("a",)
    assert published.Test("pool", "a").trains == ()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("rmt[train.bptt=2,train.lr=0.001]", ""),
        ("rmt[train.bptd=2]", "Did you mean bptt"),
        ("rmt[train.recipe=tini]", "Did you mean tiny"),
        ("rmt[test.memory_tokens=7]", "changes the weights"),
        ("rmt[test.memory_token=7]", "Did you mean memory_tokens"),
    ],
)
def test_options_of_training_and_of_what_comes_after(world: Any, model: str, said: str) -> None:
    from memory_bench.command import commands

    options = Options(
        model, "pg19", str(world.backbone), str(world.budget), "1", "", world.data, True, None, "2", (), False,
        "inline", "", False, True, False, world.cache, False,
    )  # fmt: skip
    if said:
        with pytest.raises(UserError, match=said):
            commands.prepare(options)
        return
    [cell] = commands.prepare(options).grid.cells
    assert cell.training.recipe.config == {"bptt": 2, "lr": 0.001}
    recipe = make_recipe(cell.training.recipe)
    assert (recipe.bptt, recipe.lr) == (2, 0.001)
    [plain] = commands.prepare(replace(options, models="rmt")).grid.cells
    assert plain.training.key != cell.training.key
