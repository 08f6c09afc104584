"""Limits as a cell itself keeps them: toy models that overspend, where they are stopped, and what is left of them."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_observe import CHOICES, asked, encode, words
from test_train import SMALL, fit, toy_corpus
from torch import Tensor

from memory_bench.budget import CONTROL_PASSES, PRESETS, Budget, BudgetExceeded, load_budget
from memory_bench.cell import Cell, Choice, Training, training_from_json
from memory_bench.corpus import Line
from memory_bench.driver.asking import Row
from memory_bench.driver.beacon import Beacon
from memory_bench.driver.clock import Clock
from memory_bench.driver.ledger import Ledger
from memory_bench.driver.memory import resident
from memory_bench.driver.meter import Meter
from memory_bench.driver.observe import observe
from memory_bench.driver.train import train
from memory_bench.episode import Ask, Episode, Read
from memory_bench.errors import UserError
from memory_bench.protocol import Readout, Segment
from memory_bench.recipe import RECIPES, Recipe, Stage
from memory_bench.running.firststep import needs
from memory_bench.state import State
from memory_bench.testing import tiny_backbone
from memory_bench.zoo.pretrain import Window, WindowConfig

CPU = torch.device("cpu")
MB = 10**6


@dataclass(frozen=True, slots=True)
class Pile(State):
    """One tensor, ``[rows, floats]``."""

    kept: Tensor


class Toy(Window):
    """The window with a memory of its own that nobody reads; it may grow, sleep or add parameters."""

    grow, nap, naps_from, control_nap = 0, 0.0, 0, 0.0

    def __init__(self, **how: float) -> None:
        super().__init__(tiny_backbone("llama"), WindowConfig(8))
        self.steps = 0
        for name, value in how.items():
            setattr(self, name, value)

    def open(self, rows: int, *, seeds: Sequence[int] | None = None) -> Any:
        return Pile(torch.zeros(rows, 1))

    def step(self, state: Any, segment: Segment, *, write: bool = True) -> tuple[Readout, Any]:
        self.steps += 1
        if self.steps > self.naps_from:
            time.sleep(self.nap)
        readout, _ = super().step(state, segment, write=write)
        if write and self.grow:
            state = Pile(torch.cat([state.kept, torch.ones(len(state.kept), self.grow // 4)], dim=1))
        return readout, state


def looked(
    model: Any, episodes: Sequence[Episode], limits: dict[str, Any], **more: Any
) -> tuple[Meter, list[Row], str]:
    """The meter, the rows that there are, and the detail of what was passed."""
    meter, rows = Meter(Budget("b", **limits), CPU), list[Row]()
    try:
        with meter.phase("eval"):
            observe(model.eval(), episodes, encode, seed=0, watcher=meter, sink=rows, **more)
    except BudgetExceeded as error:
        return meter, rows, str(error)
    return meter, rows, ""


def texts(count: int, segments: int) -> list[Episode]:
    return [Episode(f"e{n}", (Read(words(n, 2 * segments), scored=True),)) for n in range(count)]


def questions(count: int) -> list[Episode]:
    ask = Ask("?", CHOICES, " c", "fact")
    return [Episode(f"q{n}", (Read(words(n, 1), scored=False, tag="fact"), ask, ask)) for n in range(count)]


# Memory


def test_a_state_that_grows_is_stopped_at_the_step_in_which_it_does() -> None:
    """4 MB a step under 60 MB: within one step of the limit, and what was read until then is kept."""
    meter, rows, detail = looked(Toy(grow=4 * MB), texts(1, 40), {"device_bytes": 60 * MB})
    assert detail.startswith("device_bytes 60 MB, ")
    number, total = map(int, detail.split("segment ")[1].split(" of ")[0].split("/"))
    assert (total, detail.split(" of ")[1]) == (40, "e0")
    assert meter.usage.peak_device_bytes > 60 * MB
    assert number < 40
    assert len(rows) == number - 1


def test_the_first_batch_has_one_row() -> None:
    """30 streams at once are too much for it; of the first there is everything, in the main pass."""
    meter, rows, detail = looked(Toy(grow=MB // 2), texts(30, 10), {"device_bytes": 100 * MB}, controls=False)
    assert detail.startswith("device_bytes 100 MB, ")
    first = [row for row in rows if row["episode"] == rows[0]["episode"]]
    assert len(first) == 10
    assert meter.usage.eval_tokens > sum(row["tokens"] for row in first)


def test_one_row_first_changes_no_number_and_charges_nothing_twice() -> None:
    episodes = [
        asked(f"e{n}", words(n, 9), Ask("?", CHOICES, " c", "part0"), words(50 + n, 4 + n), scored=True)
        for n in range(4)
    ]
    meter, rows, detail = looked(Toy(), episodes, {})
    assert detail == ""
    plain = observe(Toy().eval(), episodes, encode, seed=0)
    key = [(r["control"], r["episode"], r["event"], r["start"]) for r in plain]
    by_place = {(r["control"], r["episode"], r["event"], r["start"]): r["nll"] for r in rows}
    assert sorted(by_place) == sorted(key)
    assert len(rows) == len(plain)
    assert [by_place[k] for k in key] == pytest.approx([r["nll"] for r in plain], abs=1e-4)
    alone = [looked(Toy(), [e], {}, controls=False)[0].usage.eval_tokens for e in episodes]
    assert meter.usage.eval_tokens == sum(alone)


def test_the_ledger_counts_every_kind_of_tensor_once() -> None:
    model, ledger = Toy(), Ledger()
    ledger.hold(model)
    weights = sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())
    buffers = sum(b.nbytes for b in model.buffers())
    assert ledger.weights == weights + buffers
    a = torch.ones(1000, requires_grad=True)
    with ledger.saving():
        b = a.exp()  # keeps its result
        c = (b * b).sum()  # keeps it again
    assert ledger.saved == b.nbytes
    c.backward()
    ledger.train([torch.nn.Parameter(torch.ones(10))])
    assert (ledger.gradients, ledger.optimiser) == (40, 80)
    assert ledger.total == ledger.weights + 120 + ledger.saved
    ledger.rest()
    assert ledger.total == ledger.weights


def test_tensors_count_where_the_process_does_not_grow() -> None:
    """What was freed while things were loaded is filled again: no page is new, and yet it is memory."""
    meter = Meter(Budget("b", device_bytes=MB), CPU)
    meter.held = resident().now + 1000 * MB
    with meter.phase("eval"):
        meter.state(Pile(torch.zeros(1, MB // 2)), 1)
        with pytest.raises(BudgetExceeded, match=r"device_bytes 1 MB, 2\.\d+ MB"):
            meter.stepped(Toy(), 1, 8, 0, 8)
        meter.budget = Budget("b")


def test_a_trainings_tensors_are_in_its_peak() -> None:
    done, meter = fit(train_tokens=64)
    weights = sum(p.nbytes for p in done.model.parameters())
    assert meter.usage.peak_device_bytes > 4 * weights  # with gradients and two moments
    assert meter.ledger.total <= weights + sum(b.nbytes for b in done.model.buffers())


@pytest.mark.parametrize(("allocated", "reserved", "over"), [(50, 90, ""), (50, 130, "130 MB"), (110, 110, "110 MB")])
def test_what_an_accelerator_reserved_counts(
    allocated: int, reserved: int, over: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = []
    for name, result in {
        "reset_peak_memory_stats": lambda device: None,
        "get_device_properties": lambda device: SimpleNamespace(total_memory=1000 * MB),
        "set_per_process_memory_fraction": lambda share, device: shares.append(share),
        "max_memory_allocated": lambda device: allocated * MB,
        "max_memory_reserved": lambda device: reserved * MB,
        "synchronize": lambda device: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, result)
    meter = Meter(Budget("b", device_bytes=100 * MB), torch.device("cuda"))
    detail = ""
    try:
        with meter.phase("eval"):
            pass
    except BudgetExceeded as error:
        detail = str(error)
    assert shares == [0.1]
    assert detail == (f"device_bytes 100 MB, {over} at the start" if over else "")
    assert (meter.usage.peak_device_bytes, meter.usage.peak_reserved_bytes) == (allocated * MB, reserved * MB)


# Time


def test_a_sleeping_step_costs_what_it_takes() -> None:
    meter, _, detail = looked(Toy(nap=0.1), texts(1, 30), {"eval_seconds": 0.5}, controls=False)
    assert detail.startswith("eval_seconds 0.5 s, ")
    assert 0.5 < meter.usage.eval_seconds < 0.5 * 1.2 + 0.1


def test_controls_have_seconds_of_their_own_and_are_bounded() -> None:
    """The main pass sleeps not at all, its controls do."""
    model = Toy(nap=0.2, naps_from=20)
    meter, rows, detail = looked(model, texts(1, 20), {"eval_seconds": 0.4})
    assert detail.startswith(f"control_seconds {0.4 * CONTROL_PASSES:.3g} s, ")
    assert detail.endswith("of e0 (control wiped)")
    assert meter.usage.eval_seconds < 0.4
    assert 1.2 < meter.usage.control_seconds < 1.2 * 1.2 + 0.1
    assert len([row for row in rows if row["control"] == ""]) == 20
    assert Budget("b", eval_seconds=2).seconds("control") == ("control_seconds", 6)
    assert Budget("b").seconds("control") is None


@pytest.mark.parametrize("generated", [False, True])
def test_a_sleeping_question_is_stopped_where_it_is(generated: bool) -> None:
    model, episodes = Toy(nap=0.15), questions(3)
    if generated:
        free = Ask("?", (), " c", "fact", max_tokens=2)
        episodes = [Episode(e.id, (e.events[0], free, free)) for e in episodes]
    meter, rows, detail = looked(model, episodes, {"eval_seconds": 0.5}, controls=False, decode=str)
    assert detail.startswith("eval_seconds 0.5 s, ")
    found = re.search(r" at question (\d)/6(, segment 2/2)?$", detail)
    assert found is not None, detail
    assert len(rows) == int(found[1]) - 1 == 2
    assert meter.usage.eval_seconds < 0.5 + 0.15 + 0.1


def test_a_generation_is_stopped_between_two_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    episodes = [Episode("e", (Read(words(1, 3), tag="fact"), Ask("?", (), " c", "fact", max_tokens=60)))]
    meter, _, detail = looked(Toy(nap=0.1), episodes, {"eval_seconds": 0.8}, controls=False, decode=str)
    assert detail.endswith("at question 1/1")
    assert meter.usage.eval_seconds < 0.8 * 1.2 + 0.1


def test_idle_seconds_after_busy_ones_count() -> None:
    """Many threads compute more seconds than pass; what is ahead by that is no credit for later sleep."""
    clock = Clock()
    began = clock.reading()
    ahead = began._replace(computed=began.computed - 100)
    assert clock.between(ahead, began) == 100
    time.sleep(0.1)
    assert 0.1 <= clock.since(began) < 1


def test_others_read_the_same_clock() -> None:
    """A watcher counts from what the process told it."""
    import subprocess
    import sys

    code = (
        "import time\nfrom memory_bench.driver.clock import Clock\nprint(*Clock().reading(), flush=True)\ntime.sleep(9)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = type(Clock().reading())(*map(float, process.stdout.readline().split()))
        seen = Clock(process.pid)
        time.sleep(0.5)
        assert 0.5 <= seen.since(told) < 0.9
        process.kill()


def test_time_alone_ends_training_before_the_step_that_would_pass_it() -> None:
    done, meter = sleepy(train_seconds=2.0)
    assert (done.ended_by, meter.usage.training_ended_by) == ("train_seconds", "train_seconds")
    assert 2 <= meter.usage.train_steps == len(done.curve) <= 4
    assert meter.usage.train_seconds <= 2.0 * 1.2


def test_a_step_that_no_time_is_left_for_is_over_budget() -> None:
    with pytest.raises(BudgetExceeded, match=r"train_seconds 0\.3 s, .* at optimiser step 1, segment"):
        sleepy(train_seconds=0.3)


def test_a_step_longer_than_those_before_is_left_out() -> None:
    done, meter = sleepy(train_seconds=1.5, nap=0.5, naps_from=8)
    assert (done.ended_by, meter.usage.train_steps) == ("train_seconds", 5)  # four without sleep, one with
    assert meter.usage.train_seconds <= 1.5 * 1.2 + 0.5


@pytest.mark.parametrize(
    "more",
    [{"train_tokens": 10**6}, {"train_flops": 1e15}, {"recipe": replace(SMALL, stages=(Stage(2, 4, steps=99),))}],
)
def test_time_beside_equal_tokens_ends_no_training_early(more: dict[str, Any]) -> None:
    """It would be a shorter training than others had."""
    with pytest.raises(BudgetExceeded, match=r"train_seconds 1 s, .* at optimiser step \d") as caught:
        sleepy(train_seconds=1.0, **more)
    assert caught.value.used is not None
    assert caught.value.used <= 1.2


def test_the_guards_seconds_do_not_bend_the_schedule() -> None:
    meter = Meter(Budget("b", train_tokens=1000, train_seconds=1), CPU)
    meter.usage.train_tokens, meter.usage.train_seconds = 100, 0.9
    assert meter.spent_share() == (0.1, "train_tokens")


def sleepy(recipe: Recipe = SMALL, nap: float = 0.25, naps_from: int = 0, **limits: Any) -> Any:
    """A training whose steps of two segments sleep `nap` each."""
    meter = Meter(Budget("test", **limits), CPU)
    with meter.phase("train"):
        done = train(lambda c: Toy(nap=nap, naps_from=naps_from), WindowConfig(8), recipe, toy_corpus(), meter, seed=0)
    return done, meter


# Tokens, FLOPs, curricula


def test_tokens_and_flops_are_passed_by_one_step_at_most() -> None:
    for tokens in (64, 65, 200, 256):
        done, meter = fit(train_tokens=tokens)
        assert tokens <= meter.usage.train_tokens < tokens + 64
        assert done.ended_by == "train_tokens"
    step = fit(train_tokens=64)[1].usage.train_flops
    for flops in (step, 2.5 * step):
        assert flops <= fit(train_flops=flops)[1].usage.train_flops < flops + step


def test_a_first_step_above_the_tokens_is_not_made() -> None:
    with pytest.raises(BudgetExceeded, match=r"^train_tokens 63, 64 at optimiser step 1$"):
        fit(train_tokens=63)


CURRICULUM = replace(SMALL, stages=(Stage(1, 4, steps=3), Stage(2, 4, steps=3)))  # 32 tokens a step, then 64


def test_a_curriculum_obeys_the_budget_unless_it_is_the_limit() -> None:
    done, meter = fit(recipe=CURRICULUM, train_tokens=130)
    assert (done.ended_by, meter.usage.train_tokens, meter.usage.train_steps) == ("train_tokens", 160, 4)
    done, meter = fit(recipe=CURRICULUM, train_tokens=130, own_curriculum=True)
    assert (done.ended_by, meter.usage.train_tokens, meter.usage.train_steps) == ("steps", 288, 6)
    whole, _ = fit(recipe=CURRICULUM, train_tokens=288)
    assert whole.ended_by == "steps"
    for own in (True, False):
        assert fit(recipe=CURRICULUM, train_tokens=10**6, own_curriculum=own)[0].curve == done.curve
    done, meter = fit(recipe=CURRICULUM, train_flops=meter.usage.train_flops / 2)
    assert done.ended_by == "train_flops"
    assert fit(recipe=CURRICULUM, train_tokens=0)[0].ended_by == "none"


def training(recipe: str, budget: Budget) -> Training:
    return Training(Choice("rmt"), Choice("b", config={}), Choice("c"), Choice(recipe), budget, 0)


def test_keys_name_a_curriculum_that_obeys_and_nothing_else() -> None:
    limited = Budget("b", train_tokens=100_000)
    own = replace(limited, own_curriculum=True)
    assert training("key-value", limited).key != training("key-value", own).key
    assert training("tiny", limited).key == training("tiny", own).key
    timed = Budget("b", train_seconds=60)
    assert training("key-value", timed).key == training("key-value", replace(timed, own_curriculum=True)).key
    cells = [Cell(training("key-value", b), Choice("t")).key for b in (limited, own)]
    assert cells[0] != cells[1]
    assert all(b.own_curriculum for b in PRESETS.values())


def test_keys_of_before_stay() -> None:
    """As computed before a budget could say whether a curriculum is the limit; its records were trained by it."""
    cell = Cell(training("key-value", PRESETS["cpu-minutes"]), Choice("t"))
    assert (cell.training.key, cell.key) == KEYS["key-value"]
    cell = Cell(training("tiny", PRESETS["smoke"]), Choice("t"))
    assert (cell.training.key, cell.key) == KEYS["tiny"]
    plain: dict[str, Any] = {"seed": 0, "budget": {"name": "b", "train_tokens": 5}}
    for part in ("model", "backbone", "corpus", "recipe"):
        plain[part] = {"name": "key-value"}
    assert training_from_json(plain).budget.own_curriculum


KEYS = {
    "key-value": ("2d7daf556fa3ea01", "b1a77a0812cba5a6"),
    "tiny": ("c86a024f354933fc", "10b8326022c74671"),
}


def test_a_budget_file_may_say_so(tmp_path: Path) -> None:
    path = tmp_path / "b.toml"
    path.write_text("train_tokens = 5000\nown_curriculum = true")
    assert load_budget(str(path)).own_curriculum
    path.write_text("own_curriculum = 1")
    with pytest.raises(UserError, match="own_curriculum must be true or false, not 1"):
        load_budget(str(path))


def test_one_step_is_what_training_then_reads() -> None:
    done, meter = fit("longmem", train_tokens=64)
    assert needs(done.model, [16] * 4, 3) == {"train_tokens": 64, "train_flops": meter.usage.train_flops}
    uneven = [Line(torch.arange(n), torch.ones(n, dtype=torch.bool)) for n in (3, 8, 11, 19)]
    corpus = SimpleNamespace(batch=lambda *_: uneven)
    done, meter = fit("rmt", corpus=corpus, train_tokens=41)
    assert needs(done.model, [3, 8, 11, 19], 3) == {"train_tokens": 41, "train_flops": meter.usage.train_flops}


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ("train_tokens = 100", r"train_tokens = 100 is below one optimiser step of rmt on key-value .*needs [\d,]+"),
        ("train_flops = 1e6", r"train_flops = 1e\+06 is below one optimiser step of rmt on key-value .*needs [\d.e+]+"),
    ],
)
def test_a_limit_below_one_step_is_refused_beforehand(limits: str, said: str, invoke: Any, tmp_path: Path) -> None:
    (tmp_path / "b.toml").write_text(limits)
    arguments = ("--models", "rmt", "--tasks", "key-value", "--budget", str(tmp_path / "b.toml"), "--no-controls")
    code, _, error = invoke("run", *arguments, "--out", str(tmp_path / "out"))
    assert code == 2
    assert re.search(said, error), error
    assert "own_curriculum = true" in error
    (tmp_path / "b.toml").write_text(limits + "\nown_curriculum = true")
    assert invoke("plan", *arguments)[0] == 0


# Places


def test_whoever_watches_is_told_of_every_step(tmp_path: Path) -> None:
    beacon = Beacon(tmp_path / "beacon")
    meter = Meter(Budget("b"), CPU, beacon)
    assert meter.beacon is not None
    told = []

    class Telling(Toy):
        def step(self, state: Any, segment: Segment, *, write: bool = True) -> tuple[Readout, Any]:
            told.append(beacon.read())
            return super().step(state, segment, write=write)

    start = beacon.read()
    assert start is not None
    assert (start.phase, start.where) == ("start", "")
    assert start.held > 10 * MB
    with meter.phase("train"):
        train(lambda c: Telling(), WindowConfig(8), CURRICULUM, toy_corpus(), meter, seed=0)
    with meter.phase("eval"), torch.no_grad():
        observe(Telling().eval(), [*texts(1, 2), *questions(1)], encode, seed=0, watcher=meter)
    said = [f"{place.phase}: {place.where}" for place in told if place is not None]
    assert len(said) == len(told)
    assert said[:5] == [
        "train: optimiser step 1, segment 1/1",
        "train: optimiser step 2, segment 1/1",
        "train: optimiser step 3, segment 1/1",
        "train: optimiser step 4, segment 1/2",
        "train: optimiser step 4, segment 2/2",
    ]
    for place in (
        "eval: segment 1/2 of e0", "control: segment 2/2 of e0 (control wiped)", "eval: question 1/2, segment 1/2",
        "control: question 1/2, segment 2/2 (control wiped)", "control: question 1/2 (control ceiling)",
    ):  # fmt: skip
        assert place in said, said
    assert meter.usage.control_seconds > 0
    after = beacon.read()
    assert after is not None
    assert after.phase == "start"


def test_a_phases_seconds_can_be_counted_from_outside(tmp_path: Path) -> None:
    beacon = Beacon(tmp_path / "beacon")
    meter, clock = Meter(Budget("b"), CPU, beacon), Clock()
    for _ in range(2):
        with meter.phase("eval"):
            time.sleep(0.1)
            meter.at(1, 2)
            place = beacon.read()
            assert place is not None
            assert clock.since(place.began) == pytest.approx(meter.elapsed(), abs=0.02)
    assert 0.2 <= meter.usage.eval_seconds < 0.4


# Added parameters


@pytest.mark.parametrize("how", ["untrained", "trained", "reused"])
def test_added_parameters_are_checked_whatever_becomes_of_them(how: str, world: Any, tmp_path: Path) -> None:
    from memory_bench.command import commands
    from memory_bench.running.job import Job
    from memory_bench.running.options import Options
    from memory_bench.running.worker import run_cell
    from memory_bench.store import Store

    options = Options(
        "rmt", "pg19", str(world.backbone), str(world.budget), "1", "", world.data, True, tmp_path / "out", "2",
        (), False, "inline", "", False, True, False, world.cache, False,
    )  # fmt: skip
    (cell,) = (c for c in commands.prepare(options).grid.cells if c.label == "rmt")
    Store.open_or_create(tmp_path / "out")

    def run(**limits: Any) -> Any:
        budget = replace(cell.training.budget, **limits)
        mine = replace(cell, training=replace(cell.training, budget=budget))
        job = Job(mine, tmp_path / "out", world.data, world.cache, True, False, "cpu", 1)
        return run_cell(job, lambda *_: None)

    if how == "reused":
        assert run().status == "ok"
        assert any((tmp_path / "out" / "checkpoints").iterdir())
    record = run(added_parameters=5, **({"train_tokens": 0} if how == "untrained" else {}))
    assert record.status == "over_budget"
    assert record.detail == f"added_parameters 5, {record.usage.added_parameters:,} at the start"
    assert record.usage.added_parameters > 5
    assert (record.usage.train_tokens > 0) == (how == "reused")


def test_metering_is_cheap() -> None:
    """Under a hundredth of a step of `tiny`; far below a millisecond, so that a busy machine passes, too."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder, Beacon(Path(folder) / "b") as beacon:
        meter, model = Meter(PRESETS["cpu-minutes"], CPU, beacon), Toy()
        with meter.phase("eval"):
            began = time.process_time()
            for n in range(500):
                meter.at(n + 1, 500)
                meter.stepped(model, 1, 8, 8 * n, 8)
            assert (time.process_time() - began) / 500 < 1e-3


def test_recipes_are_the_ones_meant() -> None:
    assert RECIPES["key-value"].stages[0].steps


def test_a_lift_counts_questions_that_have_their_control() -> None:
    """Of what was cut short, the last answers may have none yet; they say nothing of what memory lifts."""
    import pandas as pd

    from memory_bench.statistics.pairing import lift

    rows = observe(Toy().eval(), questions(6), encode, seed=0)
    found = pd.DataFrame(rows)
    found["predicted"] = ["x" if c == "wiped" else a for c, a in zip(found["control"], found["answer"], strict=True)]
    more = found[found["control"] == ""].assign(episode="late", cluster="late", predicted="x")
    assert lift(found) == lift(pd.concat([found, more], ignore_index=True))
    assert lift(found) is not None


class Late(Toy):
    """Makes parameters in its third step."""

    def step(self, state: Any, segment: Segment, *, write: bool = True) -> tuple[Readout, Any]:
        if self.steps == 3:
            self.late = torch.nn.Linear(10, 10)
        return super().step(state, segment, write=write)


def test_parameters_that_are_made_late_count() -> None:
    meter, rows, detail = looked(Late(), texts(1, 9), {"added_parameters": 100})
    assert detail == "added_parameters 100, 110 at segment 4/9 of e0"
    assert meter.usage.added_parameters == 110
    assert len(rows) == 3
