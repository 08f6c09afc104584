"""Replays reference cases of the official implementations (`memory-bench verify`) against the product's own classes.

A case is a folder: ``case.json`` (model, source, backbone, memory settings, procedure, tolerance),
``weights.safetensors`` (``backbone.*``, ``memory.*``), ``inputs.safetensors`` and ``expected.safetensors``. Every
memory model publishes a replay (entry point group ``memory_bench.parity``): a function from a `Case` to tensors named
as in ``expected``. This file knows no model; it builds the backbone, compares, and says where the first divergence is.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from memory_bench.backbone.model import Backbone
from memory_bench.errors import DataError, UserError
from memory_bench.files.inputs import json_table
from memory_bench.files.plain import odd
from memory_bench.plugins import replayed_model
from memory_bench.shipped import THIRD_PARTY

MOST = 2**17  # of any number in case.json: cases are small, and what they ask for is built
NEEDED = ("model", "source", "backbone", "memory", "tolerance")  # entries of every case.json


class Settings:
    """A case's memory settings, read one by one; what nobody read is an error, never ignored."""

    def __init__(self, values: Mapping[str, Any], case: str) -> None:
        self._left = dict(values)
        self._case = case

    def take(self, name: str, default: Any = None) -> Any:
        """The value of `name` (or `default` where it is absent), now counted as read."""
        return self._left.pop(name, default)

    def finish(self) -> None:
        """Raise for settings that were never taken.

        Raises:
            UserError: naming them.
        """
        if self._left:
            raise UserError(f"Case {self._case}: unknown memory setting(s) {', '.join(sorted(self._left))}.")


@dataclass(frozen=True)
class Case:
    """One reference case, read from its folder."""

    folder: Path

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @cached_property
    def info(self) -> dict[str, Any]:
        """``case.json``."""
        try:
            read = json_table((self.folder / "case.json").read_bytes(), "case.json")
        except (OSError, DataError) as error:
            raise UserError(f"{self.folder} is no reference case: cannot read case.json ({error}).") from error
        if fault := odd(read):
            raise UserError(f"{self.folder} is no reference case: case.json {fault}.")
        absent = [name for name in NEEDED if name not in read]
        if absent:
            raise UserError(f"{self.folder} is no reference case: case.json lacks {', '.join(absent)}.")
        for name in ("source", "backbone", "memory", "tolerance"):
            if not isinstance(read[name], dict):
                raise UserError(f"{self.folder} is no reference case: '{name}' in case.json must be an object.")
            if (largest := _largest(read[name])) > MOST:
                raise UserError(
                    f"{self.folder} is no reference case: '{name}' in case.json has the number {largest:,}; cases have "
                    f"none beyond {MOST:,}."
                )
        return read

    @property
    def model(self) -> str:
        """Name of the model, as installed here."""
        return replayed_model(str(self.info["model"]))

    @property
    def third_party(self) -> bool:
        """It was recorded on code that is not the authors': ``source`` says so in ``what`` or beside the repository."""
        said = (str(self.info["source"].get(name, "")).replace("-", " ") for name in ("what", "repository"))
        return any(THIRD_PARTY in text.lower() for text in said)

    @property
    def source(self) -> str:
        """``repository@commit``, and whether that is a third party's."""
        own = self.info["source"]
        marked = f" ({THIRD_PARTY})" if self.third_party else ""
        return f"{str(own['repository']).split(' (')[0]}@{own['commit'][:7]}{marked}"

    def settings(self) -> Settings:
        """The memory settings, to be read completely."""
        asked = self.info["memory"].get("max_new_tokens")
        most = max((tensor.numel() for tensor in self.tensors("expected").values()), default=0)
        if isinstance(asked, int) and asked > most:
            raise UserError(f"Case {self.name}: {asked:,} new tokens are asked for, and fewer are recorded.")
        return Settings(self.info["memory"], self.name)

    def tensors(self, part: str) -> dict[str, Tensor]:
        """``weights``, ``inputs`` or ``expected``."""
        path = self.folder / f"{part}.safetensors"
        try:
            with safe_open(path, framework="pt") as handle:
                return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (not a dict)
        except Exception as error:
            raise UserError(f"Case {self.name}: cannot read {path.name} ({error}).") from error

    @property
    def tokens(self) -> int:
        """Of the recorded text, padding included."""
        return int(self.tensors("inputs")["input_ids"].shape[1])

    def weights(self, prefix: str) -> dict[str, Tensor]:
        """The weights below `prefix` (``backbone.`` or ``memory.``), without it."""
        return {k.removeprefix(prefix): t for k, t in self.tensors("weights").items() if k.startswith(prefix)}

    def backbone(self) -> Backbone:
        """The recorded backbone in float32, weights loaded strictly (a tied head may be absent from the file).

        Raises:
            UserError: a weight is missing, or the model has none of that name.
            ValueError: two recorded weights that the model ties are not the same.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        config = dict(self.info["backbone"])
        kind = config.pop("model_type")
        _check_size(self, AutoConfig.for_model(kind, **config))
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config), dtype=torch.float32).eval()
        missing, unexpected = model.load_state_dict(self.weights("backbone."), strict=False)
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        wrong = (set(missing) - tied) | set(unexpected)
        if wrong:
            raise UserError(f"Case {self.name}: backbone weights do not fit ({', '.join(sorted(wrong)[:3])} …).")
        loaded = model.state_dict()
        for name, tensor in self.weights("backbone.").items():
            if not torch.equal(loaded[name], tensor.to(loaded[name].dtype)):
                raise ValueError(f"backbone.{name} differs from the recorded weight that the model ties it to")
        return Backbone(model)


def _largest(value: Any) -> int:
    """The largest whole number (by its size) inside plain data; 0 without any."""
    if isinstance(value, dict | list):
        return max(map(_largest, value.values() if isinstance(value, dict) else value), default=0)
    return abs(value) if isinstance(value, int) else 0


def _check_size(case: Case, config: Any) -> None:
    """Refuse a backbone that is another than the weights in the case, before any of it is built.

    Raises:
        UserError: it has more layers than there are weights, or other weights or shapes.
    """
    from transformers import AutoModelForCausalLM

    weights = case.weights("backbone.")
    layers = int(getattr(config, "num_hidden_layers", 0) or 0)
    if layers > len(weights):
        raise UserError(f"Case {case.name}: a backbone of {layers:,} layers does not fit {len(weights)} weights.")
    with torch.device("meta"):  # shapes alone, without memory
        outline = AutoModelForCausalLM.from_config(config).state_dict()
    for name, tensor in outline.items():
        if name in weights and weights[name].shape != tensor.shape:
            shapes = f"{list(tensor.shape)}, recorded is {list(weights[name].shape)}"
            raise UserError(f"Case {case.name}: backbone weights do not fit: {name} would be {shapes}.")


def load_strictly(target: torch.nn.Module, weights: Mapping[str, Tensor], case: str) -> None:
    """Copy `weights` into the parameters and buffers that `target` adds to its backbone, by name.

    An empty tensor (no memory tokens) may be missing from `weights`.

    Raises:
        UserError: a name is missing on either side, or a shape differs.
    """
    state = target.state_dict()
    own = {k: t for k, t in state.items() if not k.startswith("backbone.") and (t.numel() or k in weights)}
    wrong = sorted(set(own) ^ set(weights)) or [k for k in own if own[k].shape != weights[k].shape]
    if wrong:
        raise UserError(f"Case {case}: memory weights do not fit the model ({', '.join(wrong[:3])} …).")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of one case; `detail` is a sentence for a person, `third_party` as in `Case`."""

    case: str
    model: str
    ok: bool
    max_abs: float | None
    compared: tuple[str, ...]
    skipped: tuple[str, ...]
    detail: str
    third_party: bool = False


def compare(case: Case, got: Mapping[str, Tensor]) -> Verdict:
    """Every expected tensor against `got`, within the case's tolerance.

    ``grad.*`` may be missing from `got`; anything else that is missing is listed as skipped and fails the case.
    Gradients are compared relative to the largest entry where the case says so.
    """
    tolerance = case.info["tolerance"]
    compared: list[str] = []
    skipped: list[str] = []
    worst, first = 0.0, ""
    for name, expected in case.tensors("expected").items():
        if name not in got:
            skipped.append(name)
            continue
        compared.append(name)
        ours, theirs = got[name].detach().double().cpu(), expected.double()
        if ours.shape != theirs.shape:
            first = first or f"{name}: shape {list(ours.shape)} instead of {list(theirs.shape)}"
            continue
        if not theirs.numel():
            continue
        error = torch.where(ours == theirs, 0.0, (ours - theirs).abs())  # equal infinities agree
        relative = tolerance.get("gradients_relative_to_max") if name.startswith("grad.") else None
        allowed = relative * theirs.abs().max() if relative else tolerance["atol"] + tolerance["rtol"] * theirs.abs()
        worst = max(worst, float(error.nan_to_num(torch.inf).max()))
        bad = ~((error <= allowed) | (ours == theirs))  # NaN is bad
        if bad.any() and not first:
            at = tuple(bad.nonzero()[0].tolist())
            first = f"{name}{list(at)}: {float(ours[at]):.6g} instead of {float(theirs[at]):.6g}"
    needed = [name for name in skipped if not name.startswith("grad.")]
    detail = first or (f"not compared: {', '.join(needed[:3])}" if needed else f"largest deviation {worst:.1e}")
    agrees = not first and not needed
    return Verdict(case.name, case.model, agrees, worst, tuple(compared), tuple(skipped), detail, case.third_party)


def find_cases(places: Iterable[Path]) -> Iterator[Case]:
    """The cases in `places`: case folders, or folders of case folders.

    Raises:
        UserError: a place holds no case.
    """
    for place in places:
        if (place / "case.json").is_file():
            yield Case(place)
            continue
        inside = sorted(p.parent for p in place.glob("*/case.json")) if place.is_dir() else []
        if not inside:
            raise UserError(f"{place} is neither a reference case nor a folder of them (no case.json).")
        yield from (Case(folder) for folder in inside)


def verify(case: Case, replay: Callable[[Case], Mapping[str, Tensor]]) -> Verdict:
    """Replay one case. A replay that fails is a verdict, not an exception; a malformed case raises `UserError`."""
    try:
        return compare(case, replay(case))
    except UserError:
        raise
    except Exception as error:
        expected = tuple(sorted(case.tensors("expected")))
        said = f"{type(error).__name__}: {error}"
        return Verdict(case.name, case.model, False, None, (), expected, said, case.third_party)


def certificates(verdicts: Iterable[Verdict], sources: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """One certificate a model: number of cases, how many agree, largest deviation, commit of the official code.

    Args:
        verdicts: of all cases.
        sources: case name to `Case.source`.
    """
    found: dict[str, dict[str, Any]] = {}
    for v in verdicts:
        entry = found.setdefault(v.model, {"cases": 0, "agree": 0, "max_abs": 0.0, "sources": []})
        entry["cases"] += 1
        entry["agree"] += int(v.ok)
        entry["max_abs"] = max(entry["max_abs"], v.max_abs or 0.0)
        entry["sources"] = sorted({*entry["sources"], sources[v.case]})
    return found


def to_json(verdict: Verdict) -> dict[str, Any]:
    """The verdict as ``verify --json`` prints it; a deviation that is not finite is null."""
    plain = asdict(verdict)
    if verdict.max_abs is not None and not math.isfinite(verdict.max_abs):
        plain["max_abs"] = None
    return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}
