"""The trainer: what it changes, when it stops, and that all models see the same."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memory_bench import plugins
from memory_bench.backbone.model import Backbone
from memory_bench.budget import Budget, BudgetExceeded
from memory_bench.corpus import Line, LineCorpus, TextCorpus
from memory_bench.driver.memory import peak_bytes
from memory_bench.driver.meter import TRAIN_PASSES, Meter
from memory_bench.driver.train import Trained, stage_config, train, untrained
from memory_bench.errors import NotFinite
from memory_bench.protocol import MemoryModel, Readout
from memory_bench.recipe import RECIPES, Recipe, Stage
from memory_bench.testing import card_of, tiny_backbone

SMALL = Recipe("small", (Stage(segments=2, rows=4),), lr=3e-3, warmup=2)


def toy_corpus() -> TextCorpus:
    """One phrase of 12 tokens over and over: within reach of a window of 8."""
    phrase = torch.randperm(64, generator=torch.Generator().manual_seed(1))[:12]
    return TextCorpus([phrase.repeat(40)])


class Recorder:
    """A corpus that remembers what it gave."""

    def __init__(self) -> None:
        self.corpus = toy_corpus()
        self.given: list[list[tuple[list[int], int]]] = []

    def batch(self, rows: int, segments: int, segment: int, rng: torch.Generator) -> list[Line]:
        lines = self.corpus.batch(rows, segments, segment, rng)
        self.given.append([(line.ids.tolist(), line.seed) for line in lines])
        return lines


def builder(name: str, backbone: Backbone, built: list[Any] | None = None) -> tuple[Callable[[Any], Any], Any]:
    cls = plugins.load("models", name)

    def build(config: Any) -> MemoryModel[Any]:
        if built is not None:
            built.append(config)
        model: MemoryModel[Any] = cls(backbone, config, torch.Generator().manual_seed(5))
        return model

    return build, cls.fit(card_of(backbone), Budget("test"))


def fit(
    name: str = "rmt",
    recipe: Recipe = SMALL,
    corpus: Any = None,
    seed: int = 0,
    backbone: Backbone | None = None,
    built: list[Any] | None = None,
    **limits: Any,
) -> tuple[Trained, Meter]:
    build, config = builder(name, backbone or tiny_backbone("llama"), built)
    meter = Meter(Budget("test", **limits), torch.device("cpu"))
    with meter.phase("train"):
        done = train(build, config, recipe, corpus or toy_corpus(), meter, seed=seed)
    return done, meter


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_loss_falls_on_a_toy_corpus() -> None:
    done, _ = fit(train_tokens=64 * 60)
    losses = [loss for _, loss in done.curve]
    assert losses[0] > 4
    assert sum(losses[-5:]) / 5 < losses[0] / 2


@pytest.mark.parametrize("name", ["hmt", "memoryllm", "mplus"])
def test_the_same_seed_gives_the_same_weights(name: str) -> None:
    one, again, other = (weights(fit(name, train_tokens=64 * 4, seed=s)[0].model) for s in (0, 0, 1))
    assert all(torch.equal(again[key], tensor) for key, tensor in one.items())
    assert any(not torch.equal(other[key], tensor) for key, tensor in one.items())


def test_the_global_random_state_does_not_matter() -> None:
    torch.manual_seed(1)
    one = weights(fit("mplus", train_tokens=64 * 3)[0].model)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = weights(fit("mplus", train_tokens=64 * 3, backbone=None)[0].model)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(again[key], tensor) for key, tensor in one.items())


def test_all_models_see_the_same_batches() -> None:
    given = []
    for name in ("rmt", "hmt", "truncation", "mplus"):
        corpus = Recorder()
        fit(name, corpus=corpus, train_tokens=64 * 3)
        given.append(corpus.given)
    assert given[0] == given[1] == given[2] == given[3]
    assert len(given[0]) == 3


def test_it_stops_at_the_limit_and_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    done, meter = fit(train_tokens=200, train_flops=1e15, train_seconds=1e6)
    assert (done.ended_by, meter.usage.training_ended_by) == ("train_tokens", "train_tokens")
    assert (meter.usage.train_tokens, meter.usage.train_steps) == (256, 4)  # batches of 4 rows of 16 tokens
    per_token = meter.usage.train_flops / 256
    done, meter = fit(train_tokens=10**9, train_flops=100 * per_token)
    assert (done.ended_by, meter.usage.train_steps) == ("train_flops", 2)
    clock = iter(range(10_000))
    monkeypatch.setattr("memory_bench.driver.clock.time.process_time", lambda: float(next(clock)))
    done, meter = fit(train_seconds=80)
    assert done.ended_by == "train_seconds"
    assert 0 < meter.usage.train_steps < 40
    assert meter.usage.train_seconds <= 1.2 * 80


def test_flops_are_three_forward_passes() -> None:
    build, config = builder("rmt", tiny_backbone("llama"))
    _, meter = fit(train_tokens=64)
    model = build(config)
    assert meter.usage.train_flops == TRAIN_PASSES * 4 * (model.flops(8, 0) + model.flops(8, 8))


def test_what_has_no_backward_pass_is_charged_once() -> None:
    """LongMem's backbone is frozen and runs without gradients: one forward pass, not three."""
    build, config = builder("longmem", tiny_backbone("llama"))
    meter = Meter(Budget("b"), torch.device("cpu"))
    model = build(config)
    with meter.phase("train"):
        meter.stepped(model, 4, 8, 8, 32)
    encoder = model.backbone.flops(8, 8, predicted=0)
    assert meter.usage.train_flops == 4 * (TRAIN_PASSES * (model.flops(8, 8) - encoder) + encoder)


def test_a_hard_limit_ends_the_work() -> None:
    with pytest.raises(BudgetExceeded, match=r"host_bytes .* at optimiser step 1, segment 1/2$"):
        fit(train_tokens=10**6, host_bytes=1000)


def test_two_stages_carry_the_weights_over() -> None:
    """Stage 1 trains without recall; the recall parameters join with their initial values, the rest goes on."""
    recipe = replace(RECIPES["hmt-two-stage"], lr=3e-3)
    built: list[Any] = []
    corpus = Recorder()
    done, _ = fit("hmt", recipe, corpus, built=built, train_tokens=16 * 8 * 10)
    assert [config.recall for config in built] == [False, True]
    assert {len(ids) for batch in corpus.given for ids, _ in batch} == {16, 64}
    assert done.ended_by == "train_tokens"
    assert done.model.config.recall  # type: ignore[attr-defined]
    flat = replace(recipe, floor=1.0, decay_from=1.0, stages=(recipe.stages[0], replace(recipe.stages[1], share=1e-9)))
    both, _ = fit("hmt", flat, train_tokens=16 * 8 * 3)
    build, config = builder("hmt", tiny_backbone("llama"))
    fresh = weights(build(config))
    meter = Meter(Budget("test", train_tokens=16 * 8 * 3), torch.device("cpu"))
    only_first, off = replace(flat, stages=(replace(flat.stages[0], model={}),)), replace(config, recall=False)
    with meter.phase("train"):
        first = train(build, off, only_first, toy_corpus(), meter, seed=0)
    got, expected = weights(both.model), weights(first.model)
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    assert not torch.equal(got["initial_memory"], fresh["initial_memory"])
    assert got.keys() - expected.keys() == {"summary_prompt", "recall_query.weight", "recall_key.weight"}


def test_a_limit_in_the_first_stage_still_gives_the_whole_model() -> None:
    done, _ = fit("hmt", RECIPES["hmt-two-stage"], train_tokens=128)
    assert done.ended_by == "train_tokens"
    assert done.model.config.recall  # type: ignore[attr-defined]


def test_rounded_shares_do_not_end_training_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shares 0.1 / 0.4 and 0.3 / 0.4 add up to a little less than 1; what is spent may lie between."""
    stages = tuple(Stage(segments=2, rows=4, share=share) for share in (0.1, 0.3))

    def spent(meter: Meter, *, tokens: bool = True) -> tuple[float, str]:
        used = meter.usage.train_tokens / 640
        return (used if used > 1 else min(used, 1 - 2**-53)), "train_tokens"

    monkeypatch.setattr(Meter, "spent_share", spent)
    done, _ = fit(recipe=replace(SMALL, stages=stages))
    assert done.ended_by == "train_tokens"


@pytest.mark.parametrize("name", ["hmt", "rmt", "memoryllm", "mplus"])
def test_training_the_memory_leaves_the_backbone_untouched(name: str) -> None:
    backbone = tiny_backbone("llama")
    before = weights(backbone)
    build, config = builder(name, backbone)
    fresh = weights(build(config))
    done, _ = fit(name, replace(SMALL, trains="memory"), backbone=backbone, train_tokens=64 * 4)
    assert all(torch.equal(tensor, before[key]) for key, tensor in backbone.state_dict().items())
    after = done.model.state_dict()
    assert any(not torch.equal(after[key], fresh[key]) for key in fresh if not key.startswith("backbone."))
    assert not done.model.training
    assert not any(p.requires_grad for p in done.model.parameters())


def test_training_all_changes_the_backbone() -> None:
    backbone = tiny_backbone("llama")
    before = weights(backbone)
    fit(backbone=backbone, train_tokens=64)
    assert any(not torch.equal(tensor, before[key]) for key, tensor in backbone.state_dict().items())


@pytest.mark.parametrize("name", ["truncation", "xl-cache", "sliding-window"])
def test_a_model_without_parameters_of_its_own_has_nothing_to_adapt(name: str) -> None:
    done, meter = fit(name, replace(SMALL, trains="memory"), train_tokens=10**6)
    assert (done.ended_by, done.curve, meter.usage.train_tokens) == ("none", [], 0)


def test_recomputing_trains_alike() -> None:
    one, again = (
        weights(fit(recipe=replace(SMALL, checkpoint=c), train_tokens=64 * 3)[0].model) for c in (True, False)
    )
    for key, tensor in one.items():
        torch.testing.assert_close(again[key], tensor, atol=1e-4, rtol=1e-3)


def test_the_rate_warms_up_stays_and_falls() -> None:
    recipe = Recipe("r", SMALL.stages, lr=1.0, warmup=10, decay_from=0.4, floor=0.1)
    assert recipe.rate(0.0, 0) == pytest.approx(0.1)
    assert recipe.rate(0.1, 4) == pytest.approx(0.5)
    assert recipe.rate(0.4, 50) == 1.0
    assert recipe.rate(0.7, 50) == pytest.approx(0.55)
    assert recipe.rate(1.0, 50) == pytest.approx(0.1)
    assert recipe.rate(1.5, 50) == pytest.approx(0.1)


def test_the_rate_is_used() -> None:
    still = replace(SMALL, lr=0.0)
    backbone = tiny_backbone("llama")
    before = weights(backbone)
    fit(recipe=still, backbone=backbone, train_tokens=64 * 2)
    assert all(torch.equal(tensor, before[key]) for key, tensor in backbone.state_dict().items())


@pytest.mark.parametrize("broken", ["loss", "aux", "gradient"])
def test_a_loss_that_is_not_finite_is_an_error(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = plugins.load("models", "rmt")
    step = cls.step

    def spoiled(self: Any, *given: Any, **options: Any) -> Any:
        readout, state = step(self, *given, **options)
        if broken == "loss":
            return Readout(readout.hidden * math.nan, readout.head), state
        if broken == "gradient":  # of a root at 0: the loss stays what it is
            return Readout(readout.hidden + (0 * readout.hidden).sqrt(), readout.head), state
        return Readout(readout.hidden, readout.head, aux_loss=readout.hidden.sum() * math.inf), state

    monkeypatch.setattr(cls, "step", spoiled)
    with pytest.raises(NotFinite, match=r"loss became (nan|inf|-inf) at optimiser step 0"):
        fit(recipe=replace(SMALL, aux_from=0.0), train_tokens=640)


def test_a_recipe_may_bring_its_own_steps() -> None:
    recipe = replace(SMALL, stages=(Stage(1, 4, steps=3), Stage(2, 4, steps=2)))
    done, meter = fit(recipe=recipe, train_tokens=1, train_flops=1, own_curriculum=True)
    assert (done.ended_by, meter.usage.train_steps) == ("steps", 5)
    assert [tokens for tokens, _ in done.curve] == [32, 64, 96, 160, 224]
    done, _ = fit(recipe=replace(SMALL, stages=(Stage(1, 4, steps=0), Stage(2, 4, steps=2))))
    assert len(done.curve) == 2
    done, _ = fit(recipe=recipe, train_seconds=0)
    assert (done.ended_by, done.curve) == ("none", [])


def test_when_nothing_is_trained() -> None:
    assert untrained(Budget("b", train_tokens=0), SMALL)
    assert not untrained(Budget("b", train_tokens=1), SMALL)
    assert untrained(Budget("b", train_tokens=0), RECIPES["invented-studies"])
    assert not untrained(Budget("b", train_tokens=0, own_curriculum=True), RECIPES["invented-studies"])
    assert untrained(Budget("b", train_seconds=0, own_curriculum=True), RECIPES["invented-studies"])


def test_a_stage_changes_only_fields_the_model_has() -> None:
    _, config = builder("rmt", tiny_backbone("llama"))
    assert stage_config(config, Stage(1, 1, model={"recall": False})) == config
    assert stage_config(config, Stage(1, 1, model={"memory_tokens": 2})).memory_tokens == 2


def test_lines_are_drawn_without_replacement() -> None:
    lines: Sequence[Line] = [Line(torch.tensor([i, i]), torch.tensor([False, True])) for i in range(5)]
    corpus, rng = LineCorpus(lines), torch.Generator().manual_seed(0)
    drawn = [int(line.ids[0]) for _ in range(5) for line in corpus.batch(2, 0, 0, rng)]
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == [0, 1, 2, 3, 4]


def test_the_peak_is_this_programs_own() -> None:
    """A program started by a large one begins small (the kernel's ``ru_maxrss`` would say otherwise)."""
    import subprocess
    import sys

    ballast = torch.ones(100_000_000)  # 400 MB
    code = "import sys; sys.path[:0] = []; from memory_bench.driver.memory import peak_bytes; print(peak_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < peak_bytes() - ballast.nbytes / 2
