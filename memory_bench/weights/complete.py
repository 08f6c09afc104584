"""Model folders are loaded whole or not at all: transformers fills whatever a file lacks with random numbers.

Names that transformers itself knows by another form are no gap: a head that is tied, weights without the model's
prefix, buffers that older versions saved. Prefixes of wrappers (``_orig_mod.``, ``module.``) are not stripped, since
whoever reads the folder next would find random weights again; the sentence says where they come from.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from memory_bench.backbone.tokenizer import Tokens
from memory_bench.errors import DataError
from memory_bench.weights.quiet import quietly
from memory_bench.weights.released import few, headers, lost_shards
from memory_bench.weights.transfer import DERIVED

WHOLE = re.compile(r"u?int|bool|[IU]\d", re.IGNORECASE)  # types that hold no fractions
WRAPPERS = {"_orig_mod.": "torch.compile", "module.": "DataParallel", "_fsdp_wrapped_module.": "FSDP"}


def load_whole(name: str, folder: Path, dtype: torch.dtype, *, shapes_only: bool = False, gaps: bool = False) -> Any:
    """The causal language model in a folder, with every weight from its files.

    Args:
        name: of the backbone, for sentences.
        folder: with ``config.json`` and weights.
        dtype: of the weights.
        shapes_only: find out whether that works, from names and shapes alone; the model has no values.
        gaps: let random weights stand for what is missing, since all of them are replaced later.

    Raises:
        DataError: a file, a weight or a shape is missing, or left over, or nothing can be read.
    """
    import transformers

    if lost := lost_shards(folder):
        raise DataError(f"The backbone {name} is incomplete: its index lists {few(lost)}, which the folder lacks.")
    if (folder / "adapter_config.json").is_file():
        raise DataError(f"{name} has an adapter beside its weights (adapter_config.json): merge it, or take it away.")
    with quietly():  # its table of what it filled in is one sentence here
        try:
            build: Any = transformers.AutoModelForCausalLM.from_pretrained
            model, report = build(
                folder,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,  # unset, it asks at the terminal
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **({"device_map": "meta"} if shapes_only else {}),
            )
        except Exception as error:  # of config, weights, quantisers that are not installed: a dozen kinds
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f"Cannot load a causal language model from {name}: {reason}") from error
    if not gaps:
        refuse_gaps(name, report)
        _refuse_whole_numbers(name, folder, model)
    return model


def refuse_gaps(name: str, report: dict[str, Any]) -> None:
    """Refuse what transformers reports of a loading.

    Args:
        name: of the backbone.
        report: names of ``missing_keys`` and ``unexpected_keys``, and ``mismatched_keys`` with the two shapes.

    Raises:
        DataError: naming the first weights that are missing, left over or of another shape.
    """
    missing = sorted(report["missing_keys"])
    left = sorted(key for key in report["unexpected_keys"] if not DERIVED.search(key))
    if wrapped := _wrapper(left):
        raise DataError(
            f"The weights of {name} have names that begin with '{wrapped}', as {WRAPPERS[wrapped]} saves them, and "
            f"would be ignored ({few(left)}): save the model inside it, or take '{wrapped}' off the names."
        )
    if missing or left:
        said = [f"{what} {few(names)}" for what, names in (("it lacks", missing), ("left over:", left)) if names]
        raise DataError(f"The weights of {name} are not those that its config.json describes: {'; '.join(said)}.")
    for key, found, wanted in sorted(report["mismatched_keys"]):
        raise DataError(
            f"The weights of {name} do not fit its config.json: {key} is {list(found)}, not {list(wanted)}."
        )


def _refuse_whole_numbers(name: str, folder: Path, model: Any) -> None:
    """Refuse quantised weights without their quantiser: transformers takes the codes for values.

    Raises:
        DataError: naming the first of them.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        return  # transformers has loaded it with that
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    stored = {weight: dtype for file in files for weight, (_, dtype) in headers(file).items()}
    whole = sorted(w for w, dtype in stored.items() if WHOLE.match(dtype) and not DERIVED.search(w))
    if whole:
        raise DataError(
            f"The weights of {name} are whole numbers ({stored[whole[0]]}: {few(whole)}), and its config.json says "
            "nothing of how they were quantised: use the model in 16 or 32 bits."
        )


def refuse_larger_tokenizer(name: str, tokens: Tokens, rows: int) -> None:
    """Refuse a tokenizer with ids beyond the embedding's `rows`; an embedding with more rows than ids is padded.

    Raises:
        DataError: naming a token that has no embedding.
    """
    last, token = max(((i, t) for t, i in tokens.tokenizer.get_vocab(with_added_tokens=True).items()), default=(-1, ""))
    if last >= rows:
        raise DataError(
            f"The tokenizer of {name} is larger than its embedding: token {last} ('{token}') is beyond the model's "
            f"{rows} rows."
        )
    if beyond := [i for i in tokens.beginning if i >= rows]:
        raise DataError(
            f"The tokenizer of {name} puts token {beyond[0]} before a text, which is beyond the model's {rows} rows."
        )


def _wrapper(names: Collection[str]) -> str:
    """The wrapper's prefix that all of these names have; empty without one."""
    return next((p for p in WRAPPERS if names and all(n.startswith(p) for n in names)), "")
