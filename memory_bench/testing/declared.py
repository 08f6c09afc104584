"""Promises about what a model declares: that it is built, its class, traits, sizing, parameters. Cheap, so first."""

import dataclasses
import json
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import nn

from memory_bench.axes import Axes
from memory_bench.backbone.model import Backbone
from memory_bench.budget import Budget
from memory_bench.card import HELPERS
from memory_bench.frames import Home, home_of_module
from memory_bench.protocol import MemoryModel, Traits
from memory_bench.testing.backbones import card_of
from memory_bench.testing.measures import Build, require
from memory_bench.testing.sentences import attempt, describe, plain_mapping, require_signature, whole

FAMILIES = ("llama", "gpt2", "opt")
CONSTRUCTOR = "__init__(self, backbone, config, rng)"


def home_of(model: Any) -> Home:
    """Where the code of a model's class is."""
    return home_of_module(type(model).__module__)


def is_built(build: Build) -> None:
    """The constructor makes a `MemoryModel` whose submodule `backbone` is the backbone it was given."""
    built(build)


def built(build: Build) -> MemoryModel[Any]:
    """A model, after what all other checks rely on was found to be so."""
    promise = f"build() must make the model: its class has {CONSTRUCTOR}, open(…), step(…) and flops(…)"
    model: Any = attempt(build, promise)
    name = type(model).__name__
    require(
        isinstance(model, MemoryModel),
        f"build() must return an instance of a subclass of memory_bench.protocol.MemoryModel, not {describe(model)}",
    )
    require_signature(type(model).__init__, CONSTRUCTOR, model, None, None, None)
    own = model._modules.get("backbone")
    found = (
        "there is none" if not hasattr(model, "backbone") else f"it is {describe(model.backbone)} beside the modules"
    )
    require(
        isinstance(own, Backbone),
        f"{name}.backbone must be the Backbone the constructor was given, as a submodule (self.backbone = backbone), "
        f"so that its weights are told apart, but {found if own is None else f'it is {describe(own)}'}",
    )
    second = [n for n, m in model.named_modules(remove_duplicate=False) if n != "backbone" and _has_all(m, own)]
    second = [n for n in second if n and not n.startswith("backbone.")]
    require(
        not second,
        f"the backbone must be registered once, as `backbone`, but {name}.{', '.join(second[:2])} holds it again: its "
        "weights would count and be saved as the method's own",
    )
    _check_traits(model)
    found_model: MemoryModel[Any] = model
    return found_model


def _has_all(module: nn.Module, backbone: Any) -> bool:
    """A module is a backbone, or holds most of this one's weights."""
    if isinstance(module, Backbone):
        return True
    shared = {id(p) for p in module.parameters()} & {id(p) for p in backbone.parameters()}
    return 2 * len(shared) > len(list(backbone.parameters()))


def _check_traits(model: MemoryModel[Any]) -> None:
    traits, name = getattr(model, "traits", None), type(model).__name__
    require(
        isinstance(traits, Traits),
        f"{name}.traits must be a Traits(segment=…), set in the constructor, but it is {describe(traits)}",
    )
    assert isinstance(traits, Traits)
    segment, ahead = traits.segment, traits.look_ahead
    fits = segment is None or (whole(segment) and segment > 0)
    require(fits, f"traits.segment must be a whole number of tokens from 1, or None, not {describe(segment)}")
    fits = whole(ahead) and ahead >= 0
    require(fits, f"traits.look_ahead must be a whole number of tokens from 0, not {describe(ahead)}")
    for field in ("bounded", "chunk_invariant"):
        value = getattr(traits, field)
        require(isinstance(value, bool), f"traits.{field} must be True or False, not {describe(value)}")


def declares_itself(build: Build) -> None:
    """Config, version, families, source and ablations are there and of the right kind."""
    model = built(build)
    kind: Any = type(model)
    name, config = kind.__name__, getattr(kind, "Config", None)
    frozen = isinstance(config, type) and getattr(getattr(config, "__dataclass_params__", None), "frozen", False)
    require(
        frozen,
        f"{name}.Config must be a frozen dataclass, the class of its options (@dataclass(frozen=True)), but it is "
        f"{describe(config)}{', which is not frozen' if dataclasses.is_dataclass(config) else ''}",
    )
    require(
        isinstance(kind.source, str) and bool(kind.source.strip()),
        f"{name}.source must say in a text where the method comes from, but it is {describe(kind.source)}",
    )
    require(
        whole(kind.version) and kind.version >= 1,
        f"{name}.version must be a whole number, at least 1, not {describe(kind.version)}",
    )
    require(
        isinstance(kind.families, tuple) and bool(kind.families) and all(f in FAMILIES for f in kind.families),
        f"{name}.families must be a tuple of names among {', '.join(FAMILIES)}, not {kind.families!r}",
    )
    require(
        model.backbone.family in kind.families,
        f"{name} was built on a {model.backbone.family} backbone, a family it does not declare ({kind.families})",
    )
    require(
        isinstance(kind.frozen_backbone, bool),
        f"{name}.frozen_backbone must be True or False, not {describe(kind.frozen_backbone)}",
    )
    require(
        kind.axes is None or isinstance(kind.axes, Axes),
        f"{name}.axes must be an Axes(unit=…, …) of memory_bench.axes, or left out, not {describe(kind.axes)}",
    )
    unreached = getattr(kind, "unreached", ())
    require(
        isinstance(unreached, tuple) and all(isinstance(prefix, str) for prefix in unreached),
        f"{name}.unreached must be a tuple of beginnings of parameters' names, not {describe(unreached)}",
    )
    _check_ablations(name, kind.ablations, {f.name for f in dataclasses.fields(config)})  # type: ignore[arg-type]
    _check_parameters(model)


def _check_ablations(name: str, ablations: object, options: set[str]) -> None:
    shape = "map a title to changed options, such as {'without recall': {'recall': False}}"
    fits = plain_mapping(ablations) and all(plain_mapping(change) for change in ablations.values())  # type: ignore[attr-defined]
    require(fits, f"{name}.ablations must {shape}, but it is {describe(ablations)}")
    for title, change in ablations.items():  # type: ignore[attr-defined]
        odd = sorted(set(change) - options)
        require(
            not odd,
            f"{name}.ablations['{title}'] changes {', '.join(odd)}, but the options are {', '.join(sorted(options))}",
        )


def _check_parameters(model: MemoryModel[Any]) -> None:
    """What is the method's own is told right, and is as the backbone is."""
    name, backbone = type(model).__name__, model.backbone
    own = {n: p for n, p in model.named_parameters() if not n.startswith("backbone.")}
    said: Any = attempt(model.memory_parameters, f"{name}.memory_parameters() must give names and parameters")
    fits = isinstance(said, dict) and all(isinstance(p, nn.Parameter) for p in said.values())
    require(fits, f"{name}.memory_parameters() must be a dict of names to parameters, not {describe(said)}")
    for what, names in (("leaves out", own.keys() - said.keys()), ("has", said.keys() - own.keys())):
        require(
            not names,
            f"{name}.memory_parameters() must be the parameters that are not the backbone's, but it {what} "
            f"{', '.join(sorted(names)[:3])}",
        )
    added: Any = attempt(model.added_parameters, f"{name}.added_parameters() must be a whole number")
    count = sum(p.numel() for p in own.values())
    fits = whole(added) and added >= count
    require(fits, f"{name}.added_parameters() must be a whole number, {count} or more, not {describe(added)}")
    for parameter, p in own.items():
        require(
            not p.is_floating_point() or (p.dtype == backbone.dtype and p.device.type == backbone.device.type),
            f"{name}.{parameter} must be on the backbone's device and of its type ({backbone.device.type}, "
            f"{backbone.dtype}), but it is {describe(p)}: create it with device=… and dtype=… of the backbone",
        )


def sizes_itself(build: Build) -> None:
    """``fit`` gives a `Config` for a backbone and a budget that builds the model; ``helpers`` names known ones."""
    model = built(build)
    kind: Any = type(model)
    name, home = kind.__name__, home_of(model)
    config: Any = getattr(kind, "Config", None)
    card, budget = card_of(model.backbone, window=8), Budget("tests")
    shape = "fit(card, budget), a class method"
    require_signature(kind.fit, shape, card, budget)
    fitted = attempt(lambda: kind.fit(card, budget), f"{name}.{shape}, must return a {name}.Config", home)
    right = isinstance(config, type) and isinstance(fitted, config)
    require(right, f"{name}.fit(card, budget) must return an instance of {name}.Config, not {describe(fitted)}")
    attempt(
        lambda: json.dumps(dataclasses.asdict(TypeAdapter(config).validate_python(dataclasses.asdict(fitted)))),
        f"options of {name}.Config must be plain data (numbers, text, flags, tuples), which is said on a command line "
        "and written into records",
    )
    require_signature(kind.helpers, "helpers(config), a class method", fitted)
    helpers = attempt(lambda: kind.helpers(fitted), f"{name}.helpers(config) must return a mapping", home)
    fits = plain_mapping(helpers) and set(helpers) <= set(HELPERS)
    known = ", ".join(HELPERS)
    require(
        fits,
        f"{name}.helpers(config) must map names of helpers ({known}) to what to choose instead, not {helpers!r}",
    )
    if not helpers:
        promise = f"{name}(backbone, config, rng) must build the model with what fit returns"
        before = {n: p.detach().clone() for n, p in model.backbone.named_parameters()}
        attempt(lambda: kind(model.backbone, fitted, torch.Generator().manual_seed(1)), promise, home)
        changed = [n for n, p in model.backbone.named_parameters() if n not in before or not torch.equal(p, before[n])]
        require(
            not changed,
            f"the constructor of {name} must leave the backbone as it is, which other models start from too, but "
            f"{', '.join(changed[:3])} changed",
        )


def builds_repeat(build: Build) -> None:
    """The model is the same every time it is built: its weights are drawn from the constructor's generator alone."""
    first, again = built(build), built(build)
    ours, theirs = (dict(m.named_parameters()) for m in (first, again))
    require(ours.keys() == theirs.keys(), "building a model twice must give the same parameters")
    for name, parameter in ours.items():
        require(
            parameter.shape == theirs[name].shape and torch.equal(parameter, theirs[name]),
            f"building a model twice must give the same weights, but {name} differs: draw from the constructor's "
            "generator (or a backbone's weights were changed)",
        )
