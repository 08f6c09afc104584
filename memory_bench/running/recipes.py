"""How a model is trained: the recipe that a task, a backbone or the user chooses, and what its adapters leave."""

from dataclasses import fields, replace
from typing import Any, cast

from memory_bench import plugins
from memory_bench.backbone.lora import adapter_size
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.cell import Choice, Training
from memory_bench.driver.train import untrained
from memory_bench.errors import UserError
from memory_bench.protocol import MemoryModel
from memory_bench.recipe import Recipe, find_recipe, fixed_steps


def make_recipe(choice: Choice) -> Recipe:
    """The recipe of a training.

    Raises:
        UserError: an unknown recipe or field of one.
    """
    return cast(Recipe, plugins.configure(f"recipe {choice.name}", find_recipe(choice.name), choice.config))


def choose_recipe(name: str, changes: dict[str, Any], budget: Budget) -> tuple[Choice, Recipe]:
    """The recipe called `name` with `changes`, as a part of a training's identity and as it is.

    Raises:
        UserError: an unknown recipe or field of one, or nothing would ever end the training.
    """
    recipe = make_recipe(Choice(name, config=changes))
    check_ends(recipe, budget)
    # Where nothing is trained, no version of a recipe can move a number: it is the first, as it always was.
    return Choice(name, 1 if untrained(budget, recipe) else recipe.version, changes), recipe


def trains(training: Training) -> bool:
    """A model is trained, by its recipe under its budget, rather than taken with its authors' weights or as it is."""
    return not training.model.config.get("checkpoint") and not untrained(training.budget, make_recipe(training.recipe))


def together(training: Training, processes: int) -> Training:
    """The training by so many processes, where anything is trained."""
    return replace(training, processes=processes) if processes > 1 and trains(training) else training


def check_ends(recipe: Recipe, budget: Budget) -> None:
    """A recipe without a number of steps of its own trains until a limit is reached: there must be one."""
    limits = (budget.train_tokens, budget.train_flops, budget.train_seconds)
    if not fixed_steps(recipe) and all(limit is None for limit in limits):
        raise UserError(
            f"Budget '{budget.name}' never ends training: set train_tokens, train_flops or train_seconds "
            "(0: no training)."
        )


def beside_adapters(budget: Budget, recipe: Recipe, card: BackboneCard) -> Budget:
    """The limits of a method whose backbone has the recipe's adapters, which are added parameters, too."""
    if budget.added_parameters is None:
        return budget
    taken = adapter_size(card, recipe.lora_rank, recipe.lora_targets)
    return replace(budget, added_parameters=max(0, budget.added_parameters - taken))


def check_adapters(label: str, cls: type[MemoryModel[Any]], config: Any, recipe: Recipe) -> None:
    """No model has adapters twice."""
    if (without := cls.unadapted(config)) != config:
        asked = next(f.name for f in fields(config) if getattr(config, f.name) != getattr(without, f.name))
        raise UserError(
            f"{label} would have adapters twice: the recipe {recipe.name} gives every model the same ones, of rank "
            f"{recipe.lora_rank}. Leave out {asked}, or add train.lora_rank=0 for its own alone."
        )


def usual_recipe(tasks_own: str | None, asked: str, card: BackboneCard) -> str:
    """How models are trained: as the task says, else as was asked, else as is usual on the backbone."""
    if tasks_own and not (asked and fixed_steps(find_recipe(asked))):
        return tasks_own
    return asked or default_recipe(card)


def default_recipe(card: BackboneCard) -> str:
    """How models on this backbone are trained unless the task says otherwise."""
    return "adapt" if card.pretrained else "tiny"
