"""What a class must have to be a model or a task, said before one is made or anything runs."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

NEEDED = {
    "models": ("Config", "fit", "families", "ablations", "open", "step", "flops"),
    "tasks": ("Config", "headline", "needs", "episodes", "plan", "corpus", "metrics"),
}
"""What a class must have, by kind of plug-in."""

BASES = {"models": ("memory_bench.protocol", "MemoryModel"), "tasks": ("memory_bench.episode", "Task")}
CALLED: dict[str, tuple[tuple[str, str, int, tuple[str, ...]], ...]] = {
    "models": (
        ("__init__", "(self, backbone, config, rng)", 4, ()),
        ("open", "(self, rows, *, seeds=None)", 2, ("seeds",)),
        ("step", "(self, state, segment, *, write=True)", 3, ("write",)),
        ("flops", "(self, tokens, remembered)", 3, ()),
    ),
    "tasks": (
        ("__init__", "(self, config)", 2, ()),
        ("episodes", "(self, library, limit)", 3, ()),
        ("plan", "(self, library, *, pretrained)", 2, ("pretrained",)),
        ("corpus", "(self, library, plan, encode)", 4, ()),
        ("metrics", "(self, samples, seed=0)", 2, ("seed",)),
    ),
}
"""Methods, how they are written, and with how many things and which names they are called."""


def fault(found: Any, kind: str) -> str:
    """Why `found` is no plug-in of a kind (``models``, ``tasks``), as the end of a sentence; empty if it is one."""
    if kind not in NEEDED:
        return ""
    if not isinstance(found, type):
        return "it is no class"
    lacking = [n for n in NEEDED[kind] if not hasattr(found, n) or n in getattr(found, "__abstractmethods__", ())]
    if lacking:
        return f"it has no {', '.join(lacking)}"
    if BASES[kind] not in {(base.__module__, base.__name__) for base in found.__mro__}:
        return f"it is no subclass of {'.'.join(BASES[kind])}"
    return _config_fault(found, kind) or _values_fault(found, kind) or _signature_fault(found, kind)


def _config_fault(found: Any, kind: str) -> str:
    config = found.Config
    parameters = getattr(config, "__dataclass_params__", None)
    if not isinstance(config, type) or parameters is None or not parameters.frozen:
        return "its Config is no frozen dataclass (@dataclass(frozen=True))"
    own_fit = kind == "models" and getattr(found.fit, "__module__", "") != BASES["models"][0]
    given = {"segment"} if kind == "models" else set()
    missing = dataclasses.MISSING
    bare = [f.name for f in dataclasses.fields(config) if f.init and f.default is missing is f.default_factory]
    if not own_fit and (bare := [name for name in bare if name not in given]):
        return f"its Config.{bare[0]} has no default"
    return ""


def _values_fault(found: Any, kind: str) -> str:
    version = getattr(found, "version", 1)
    if isinstance(version, bool) or not isinstance(version, int):
        return f"its version is no whole number ({version!r})"
    if kind == "tasks":
        bad = [n for n in ("headline", "needs") if not isinstance(getattr(found, n), str | property)]
        return f"its {bad[0]} is no text ({getattr(found, bad[0])!r})" if bad else ""
    families, ablations = found.families, found.ablations
    if not isinstance(families, tuple) or not all(isinstance(name, str) for name in families):
        return f"its families are no tuple of names ({families!r})"
    if not isinstance(ablations, Mapping) or not all(isinstance(change, Mapping) for change in ablations.values()):
        return f"its ablations are no mapping of titles to changed options ({ablations!r})"
    return ""


def _signature_fault(found: Any, kind: str) -> str:
    for name, shape, places, named in CALLED[kind]:
        function = getattr(found, name)
        if not callable(function):
            return f"its {name} is no method {name}{shape}"
        try:
            signature = inspect.signature(function)
            signature.bind(*[None] * places, **dict.fromkeys(named))
        except TypeError as error:
            return f"its {name} must be callable as {name}{shape}, but is {name}{signature} ({error})"
        except ValueError:  # of what is built in no signature is known
            continue
    return ""
