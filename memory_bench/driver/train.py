"""One trainer for every model: the driver's own loop over segments, with gradients.

Unusual here:

- A training example is cut, carried over and scored by the same `walk` as the evaluation, so segment
  borders are trained on and nothing is learned that is not asked.
- Lengths are shares of the budget: the first limit reached ends training, and the schedule follows the
  share that is spent. Seconds end a training only where nothing else does: beside tokens, FLOPs or a number of steps
  that are equal for all they are a guard, and a training that runs into it is over budget, not shorter than others.
- Nothing is passed by more than one optimiser step. A step that would end beyond the time, by the longest of the last
  ones, is not begun.
- Order of data, initial values and a model's own draws come from separate generators, so all models of a comparison
  see the same data in the same order.
"""

import dataclasses
import math
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from memory_bench.budget import Budget, BudgetExceeded
from memory_bench.corpus import Corpus, Line
from memory_bench.driver import backward, randomness
from memory_bench.driver.meter import TRAIN_PASSES, Meter
from memory_bench.driver.peers import Peers
from memory_bench.driver.standing import Standing
from memory_bench.driver.stream import Progress, segment_length
from memory_bench.driver.unfinished import CannotGoOn, Facts, Keeper, Kept, digest
from memory_bench.errors import NotFinite
from memory_bench.files.artefacts import Damaged
from memory_bench.protocol import MemoryModel
from memory_bench.recipe import Recipe, Stage, fixed_steps

LAST = 3  # steps whose longest says how long the next one takes
FAR = 1.2  # times a guard's seconds: what ends beyond is not begun

Found = TypeVar("Found")
Build = Callable[[Any], MemoryModel[Any]]
"""Makes the model of a config over the one backbone of this training."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained model and how it went.

    Attributes:
        model: in evaluation mode.
        curve: (tokens read, mean surprisal of the batch in nats) of every optimiser step.
        ended_by: the limit that ended training, ``steps`` where the recipe's own number of them did, ``none`` without
            training (also where the recipe trains only what is beside the backbone, and there is nothing).
    """

    model: MemoryModel[Any]
    curve: list[tuple[int, float]]
    ended_by: str


def stage_config(config: Any, stage: Stage) -> Any:
    """The model's config in `stage`; fields that the model does not have are ignored."""
    own = {f.name for f in dataclasses.fields(config)}
    return dataclasses.replace(config, **{k: v for k, v in stage.model.items() if k in own})


def trained_parameters(model: MemoryModel[Any], recipe: Recipe) -> dict[str, nn.Parameter]:
    """The parameters that `recipe` trains, by name; never those of a backbone that the method keeps frozen."""
    if recipe.trains == "memory" or model.frozen_backbone:
        return {**model.memory_parameters(), **model.adapter_parameters()}
    return dict(model.named_parameters())


def _optimizer(model: MemoryModel[Any], recipe: Recipe) -> torch.optim.AdamW | None:
    """AdamW with decay on matrices only; ``factor`` of a group multiplies the recipe's rate. None: nothing trains."""
    rates = dict.fromkeys(model.memory_parameters().values(), recipe.memory_lr)
    rates |= dict.fromkeys(model.adapter_parameters().values(), recipe.lora_lr)
    trained = trained_parameters(model, recipe).values()
    kinds = [(recipe.weight_decay, [p for p in trained if p.dim() >= 2]), (0.0, [p for p in trained if p.dim() < 2])]
    groups: list[dict[str, Any]] = []
    for decay, parameters in kinds:
        for factor in dict.fromkeys((1.0, recipe.memory_lr, recipe.lora_lr)):
            chosen = [p for p in parameters if rates.get(p, 1.0) == factor]
            groups += [{"params": chosen, "weight_decay": decay, "factor": factor}] if chosen else []
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas) if groups else None


def train(  # noqa: PLR0913
    build: Build,
    config: Any,
    recipe: Recipe,
    corpus: Corpus,
    meter: Meter,
    *,
    seed: int,
    progress: Progress | None = None,
    keeper: Keeper | None = None,
    peers: Peers | None = None,
) -> Trained:
    """Train the model of `config` on `corpus` until the recipe or the budget ends it.

    Args:
        build: makes the model of a config; called once for every stage whose config differs from the one before.
        config: of the evaluated model.
        recipe: stages, optimiser, schedule.
        corpus: of training lines, of which nothing was drawn yet.
        meter: counts and limits; called inside its phase ``train``.
        seed: of the data order.
        progress: told (thousandths done, 1000).
        keeper: of this training on its way; what it finds is gone on from, to the same end.
        peers: processes that do the same, each with some rows of every batch; of them the first has a keeper.

    Raises:
        Gone: one of the peers does not answer; other errors of theirs are raised here too.
        CannotGoOn: what the keeper has found does not lead on; nothing was changed but what the corpus has drawn.
        BudgetExceeded: memory; time, where it is no limit of training but a guard; or whatever leaves no room for the
            first step.
        NotFinite: the loss or its gradient is not finite, with the optimiser step (from 0).
    """
    loop = _Loop(
        recipe, corpus, meter, torch.Generator().manual_seed(seed), progress or (lambda done, total: None), peers
    )
    with nullcontext() if peers is None else peers.together():
        model, current = loop.through(build, config, keeper)
    if current != config:
        model = _next_model(build(config), model)
    if peers is not None:
        model.beside = None
    meter.usage.training_ended_by = loop.ended_by if loop.steps else "none"
    return Trained(model.eval().requires_grad_(False), loop.curve, meter.usage.training_ended_by)


def _next_model(fresh: MemoryModel[Any], old: MemoryModel[Any] | None) -> MemoryModel[Any]:
    """`fresh` with what both have taken over from `old`; the backbone is shared already."""
    if old is not None:
        wanted = fresh.state_dict()
        kept = {k: v for k, v in old.state_dict().items() if k in wanted and wanted[k].shape == v.shape}
        fresh.load_state_dict(kept, strict=False)
    return fresh


class _Loop:
    """Optimiser steps, one stage after the other; one schedule spans them all."""

    def __init__(
        self, recipe: Recipe, corpus: Corpus, meter: Meter, rng: torch.Generator, progress: Progress,
        peers: Peers | None = None,
    ) -> None:  # fmt: skip
        self.recipe, self.corpus, self.meter, self.rng, self.progress = recipe, corpus, meter, rng, progress
        self.peers = peers
        self.fixed = fixed_steps(recipe)
        self.none = untrained(meter.budget, recipe)
        budget = meter.budget
        self.counted = not self.fixed or (budget.counts and not budget.own_curriculum)  # the budget ends training
        self.timed = not self.fixed and not budget.counts  # nothing but seconds does
        meter.train_passes = TRAIN_PASSES + int(recipe.checkpoint)
        self.steps, self.ended_by = 0, ""
        self.curve: list[tuple[int, float]] = []
        self._stage_end = 0.0  # share of the training at which the current stage ends
        self._parameters: list[nn.Parameter] = []
        self._optimizer: torch.optim.AdamW | None = None
        self._took: deque[float] = deque(maxlen=LAST)  # seconds of the last steps
        self._seen: Stage | None = None  # the stage whose activations are counted
        self._made = [0] * len(recipe.stages)  # optimiser steps of each stage
        self._lines: list[Line] = []  # of the last batch
        self._keeper: Keeper | None = None
        self._kept: Kept | None = None  # what is gone on from, until it has been

    def through(self, build: Build, config: Any, keeper: Keeper | None) -> tuple[MemoryModel[Any], Any]:
        """All stages; the last one's model and its config. Arguments and errors as of `train`."""
        if keeper is not None or self.peers is not None:
            self.find(keeper)
        model, current = None, None
        for number, stage in enumerate(self.recipe.stages):
            wanted = stage_config(config, stage)
            if model is None or wanted != current:
                model, current = _next_model(build(wanted), model), wanted
                self.optimise(model)
            if self.idle or self.behind(model, number):
                continue
            self.run(model, number)
            if self.ended_by not in ("", "steps"):
                break
        assert model is not None, "a recipe has at least one stage"
        return model, current

    def _decided(self, decide: Callable[[], Found]) -> Found:
        """What is decided here, or by the first of the peers."""
        if self.peers is None or self.peers.rank == 0:
            return decide() if self.peers is None else self.peers.decided(decide)
        with self.meter.aside():  # the first one may be at work for the harness
            return self.peers.decided(decide)

    def optimise(self, model: MemoryModel[Any]) -> None:
        """Make ready to train `model`."""
        if self.peers is not None and not self.none:
            model.beside = self.peers
            self.peers.same(model)
        chosen = trained_parameters(model, self.recipe)
        for name, p in model.named_parameters():
            p.requires_grad_(name in chosen)
        self._parameters = list(chosen.values())
        self._optimizer = _optimizer(model, self.recipe)

    @property
    def idle(self) -> bool:
        """The budget leaves no room for training, or the model has nothing that the recipe trains."""
        return self.none or self._optimizer is None

    def find(self, keeper: Keeper | None) -> None:
        """Keep this training with `keeper`, and go on from what it, or the first peer's, finds.

        Raises:
            CannotGoOn: it is not of such a recipe.
        """
        with self.meter.aside():
            self._keeper = keeper
            self._kept = self._decided(lambda: None if keeper is None else keeper.found())
        if self._kept is None:
            return
        facts, made = self._kept.facts, self._kept.facts.stages
        fits = len(made) == len(self._made) and 0 <= facts.stage < len(made) and min(made) >= 0
        if not fits or not 0 < sum(made) == sum(made[: facts.stage + 1]) == len(facts.curve):
            raise CannotGoOn("it is of other stages")

    def behind(self, model: MemoryModel[Any], number: int) -> bool:
        """Whether stage `number` was over in what is gone on from; the one that was not is taken up.

        Raises:
            CannotGoOn: it does not fit the model, or the corpus draws something else.
        """
        if self._kept is None:
            return False
        facts, stage = self._kept.facts, self.recipe.stages[number]
        with self.meter.aside():
            for _ in range(facts.stages[number]):
                self._lines = self.corpus.batch(stage.rows, stage.segments, segment_length(model), self.rng)
            if number == facts.stage:
                self._take_up(model, self._kept)
                return False
        self._stage_end += stage.share / sum(s.share for s in self.recipe.stages)
        return True

    def _take_up(self, model: MemoryModel[Any], kept: Kept) -> None:
        """Be where an earlier attempt was."""
        facts = kept.facts
        if digest(self._lines) != facts.drawn:
            raise CannotGoOn("the corpus does not draw again what it drew before")
        try:
            self._standing(model).put_back(kept.tensors)
            randomness.put_back_plain(facts.chance, model)
        except Damaged as error:
            raise CannotGoOn(str(error)) from error
        self._made, self.steps, self._kept = list(facts.stages), sum(facts.stages), None
        self.curve = [(tokens, loss) for tokens, loss in facts.curve]
        self._took.extend(facts.took)
        self._seen = self.recipe.stages[facts.stage] if facts.stages[facts.stage] else None
        self.meter.take_up(facts.usage)
        self.meter.ledger.hold(model)
        self.meter.ledger.saved = facts.saved
        self.meter.ledger.train(self._parameters)
        if self._keeper is not None:
            self._keeper.taken_up(facts)

    def _standing(self, model: MemoryModel[Any]) -> Standing:
        assert self._optimizer is not None
        return Standing(model, trained_parameters(model, self.recipe), self._optimizer, self.rng)

    def _keep(self, model: MemoryModel[Any], number: int) -> None:
        """Write down where the training stands, if that is due."""
        if self._keeper is None or not self._keeper.due(self.steps):
            return
        with self.meter.aside():
            facts = Facts(
                self._keeper.surroundings, self._made, number, self.curve, list(self._took), self.meter.ledger.saved,
                self.meter.usage, digest(self._lines), randomness.plain(model),
            )  # fmt: skip
            self._keeper.keep(facts, self._standing(model).tensors())

    def run(self, model: MemoryModel[Any], number: int) -> None:
        """Train stage `number` until its share or steps, or a limit of the budget, is used up."""
        stage = self.recipe.stages[number]
        model.train()
        self._stage_end += stage.share / sum(s.share for s in self.recipe.stages)
        final = number == len(self.recipe.stages) - 1  # ends with the limit, not with a sum of rounded shares
        last = sum(self._made[:number]) + stage.steps if self.fixed and stage.steps is not None else None
        while True:
            share, limit = self._decided(lambda: self.meter.spent_share(tokens=self.counted))
            if self.steps == last:
                self.ended_by = "steps"
                return
            if share >= 1:
                self.ended_by = self._spent(limit)
                return
            if not self.fixed and not final and share >= self._stage_end:
                self.ended_by = ""
                return
            if not self._begun(model, stage, max(share, self.steps / self.fixed if self.fixed else 0.0)):
                return
            self._made[number] += 1
            self._keep(model, number)

    def _spent(self, limit: str) -> str:
        """`limit`, at which training ends.

        Raises:
            BudgetExceeded: it ends before it has begun.
        """
        if not self.steps:
            allowed, used = getattr(self.meter.budget, limit), getattr(self.meter.usage, limit)
            raise BudgetExceeded(limit, allowed, used, "the first optimiser step")
        return limit

    def _begun(self, model: MemoryModel[Any], stage: Stage, done: float) -> bool:
        """Make one optimiser step at the share `done` of the training; False where time has ended training instead."""
        before, started = self.steps, self.meter.elapsed()
        place = f"optimiser step {before + 1}"
        if self._decided(lambda: self._late(started, place)):
            return False
        try:
            with self.meter.within(place), nullcontext() if self.peers is None else self.peers.together():
                lines = self._lines = self.corpus.batch(stage.rows, stage.segments, segment_length(model), self.rng)
                self._check_room(lines, place)
                assert self._optimizer is not None
                with self.meter.accounting.training(self._optimizer, first=stage is not self._seen):
                    loss = self._step(model, lines, done, stage)
                self.curve.append((self.meter.usage.train_tokens, loss))
                self.steps += 1
                self.meter.usage.train_steps = self.steps
                self.meter.ticked()
        except BudgetExceeded as error:
            if error.limit != "train_seconds" or not self.timed or not before:
                raise
            self.ended_by = "train_seconds"  # a step that was cut off is left out
            return False
        self._took.append(self.meter.elapsed() - started)
        self.progress(int(1000 * done), 1000)
        return True

    def _late(self, elapsed: float, place: str) -> bool:
        """Whether the next step would end beyond the time, which then ends training.

        Raises:
            BudgetExceeded: the time is a guard, and the step would end far beyond it.
        """
        limit, longest = self.meter.budget.train_seconds, max(self._took, default=0.0)
        if not limit or not longest or elapsed + longest <= limit * (1 if self.timed else FAR):
            return False
        if not self.timed:
            raise BudgetExceeded("train_seconds", limit, elapsed, f"{place}, which takes about {longest:.3g} s")
        self.ended_by = "train_seconds"
        return True

    def _check_room(self, lines: list[Line], place: str) -> None:
        """Refuse a first step that reads more tokens than the budget allows for all; FLOPs are refused beforehand.

        Raises:
            BudgetExceeded: naming what the step would read.
        """
        limit = self.meter.budget.train_tokens if self.counted else None
        need = self.meter.usage.train_tokens + sum(map(len, lines))
        if limit is not None and not self.steps and need > limit:
            raise BudgetExceeded("train_tokens", limit, need, place)

    def _step(self, model: MemoryModel[Any], lines: list[Line], done: float, stage: Stage) -> float:
        """One optimiser step; returns the mean surprisal of the batch's scored tokens (nats)."""
        assert self._optimizer is not None
        recipe = self.recipe
        for group in self._optimizer.param_groups:
            group["lr"] = group["factor"] * recipe.rate(done, self.steps)
        ledger = self.meter.ledger
        ledger.hold(model)
        batch = backward.Batch(model, lines, recipe, self.rng.initial_seed(), self.steps, done >= recipe.aux_from)
        worked = backward.Worked(self.meter, self._optimizer, first=stage is not self._seen)
        self._seen = stage
        value = backward.alone(batch, worked) if self.peers is None else backward.shared(batch, worked, self.peers)
        norm = float(nn.utils.clip_grad_norm_([p for p in self._parameters if p.grad is not None], recipe.clip))
        if not math.isfinite(norm):  # clipping by it would make every weight NaN
            raise NotFinite(
                f"non-finite: the gradient of the training loss became {norm} at optimiser step {self.steps}"
            )
        self._optimizer.step()
        ledger.train(self._parameters)
        return value


def adapts(budget: Budget, recipe: Recipe, kind: type[MemoryModel[Any]]) -> bool:
    """The backbone of a model of this kind gets the recipe's adapters.

    A method that freezes its backbone has none: it is not trained through it, and adapts by what it adds.
    """
    return recipe.lora_rank > 0 and not kind.frozen_backbone and not untrained(budget, recipe)


def untrained(budget: Budget, recipe: Recipe) -> bool:
    """The budget leaves no room for training: a limit on it is zero, and not one that a curriculum stands in for."""
    return budget.train_seconds == 0 if fixed_steps(recipe) and budget.own_curriculum else not budget.trains
