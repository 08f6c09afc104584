"""What chance has come to: states of every generator that a training draws from, taken and put back.

Those of the process (torch, the accelerator, numpy, Python) and those that the model's own modules keep, with the plain
numbers beside them. A model of the house draws from a row's seed alone and has none; a plug-in with dropout has.
"""

import math
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = (bool, int, float)
LONG = 2**63
TRAINING = "training"  # of every module; whoever trains sets it


def tensors(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """States of torch's generators, ``[bytes]`` uint8, by name."""
    found = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    kept = _kept(model).items()
    return found | {name: value.get_state() for name, value in kept if isinstance(value, torch.Generator)}


def put_back_tensors(states: dict[str, Tensor], model: nn.Module, device: torch.device) -> None:
    """Inverse of `tensors`."""
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    for name, value in _kept(model).items():
        if isinstance(value, torch.Generator):
            value.set_state(states[name])


def plain(model: nn.Module) -> dict[str, Any]:
    """All else, as JSON has it."""
    found: dict[str, Any] = {"python": random.getstate(), "numpy": np.random.get_state(legacy=False)}
    for name, value in _kept(model).items():
        if isinstance(value, random.Random):
            found[name] = value.getstate()
        elif isinstance(value, np.random.Generator):
            found[name] = value.bit_generator.state
        elif not isinstance(value, torch.Generator):
            found[name] = value
    return {name: _listed(value) for name, value in found.items()}


def mark(model: nn.Module, device: torch.device) -> tuple[object, ...]:
    """What is equal before and after a step exactly where chance, buffers and plain numbers are as they were."""
    states = [state.cpu().numpy().tobytes() for state in tensors(model, device).values()]
    buffers = [(id(buffer), buffer._version) for buffer in model.buffers()]
    return states, buffers, repr(plain(model))


def put_back_plain(states: dict[str, Any], model: nn.Module) -> None:
    """Inverse of `plain`."""
    random.setstate(_python(states["python"]))
    np.random.set_state(_numpy(states["numpy"]))
    modules = dict(model.named_modules())
    for name, value in _kept(model).items():
        if isinstance(value, random.Random):
            value.setstate(_python(states[name]))
        elif isinstance(value, np.random.Generator):
            value.bit_generator.state = _numpy(states[name])
        elif not isinstance(value, torch.Generator) and value != states.get(name, value):
            module, _, attribute = name.rpartition(".")
            setattr(modules[module], attribute, states[name])


def _kept(model: nn.Module) -> dict[str, Any]:
    """Generators and plain numbers that modules beside the backbone keep as attributes, by name."""
    kinds = (*PLAIN, torch.Generator, random.Random, np.random.Generator)
    return {
        f"{place}.{name}": value
        for place, module in model.named_modules()
        if place.partition(".")[0] != "backbone"
        for name, value in vars(module).items()
        if isinstance(value, kinds) and name != TRAINING and not (isinstance(value, float) and not math.isfinite(value))
    }


def _listed(value: Any) -> Any:
    """`value` with lists for tuples and arrays, and texts for whole numbers that are too long for a file of ours."""
    if isinstance(value, int) and abs(value) >= LONG:
        return hex(value)
    if isinstance(value, dict):
        return {key: _listed(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return [_listed(entry) for entry in value] if isinstance(value, tuple | list) else value


def _python(listed: Any) -> tuple[Any, ...]:
    version, words, rest = listed
    return version, tuple(words), rest


def _numpy(listed: Any) -> dict[str, Any]:
    state = {k: int(v, 16) if isinstance(v, str) else v for k, v in listed["state"].items()}
    if "key" in state:
        state["key"] = np.array(state["key"], dtype=np.uint32)
    return {**listed, "state": state}
