#!/bin/sh
# transformers reads a GGUF file's tokenizer without its pre-tokenizer where it does not know the name, and says nothing.
#
# A GGUF file names how text is split before merging (tokenizer.ggml.pre). "smollm", which SmolLM2's files name, splits
# every digit off first; llama.cpp does so. AutoTokenizer makes the same plain GPT-2 tokenizer of a file that says
# "smollm" and of one that says "gpt-2", so that "12" becomes one token that the model was hardly trained on. Decoding
# gives the text back, so nothing shows it but other ids and a worse perplexity.
#
# Needs a network for pip. Exit code 0: as described; 1: another behaviour; 2: pip failed.
set -u
place=$(mktemp -d) && trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv" || exit 2
"$place/venv/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3 gguf==0.19.0 numpy==2.4.6 torch==2.13.0 || exit 2
export HF_HUB_OFFLINE=1 HF_HOME="$place/home"
cat > "$place/try.py" <<'PY'
import logging
import sys
from importlib.metadata import version
from pathlib import Path

logging.disable(logging.WARNING)
import gguf
import numpy
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

place = Path(sys.argv[1])
TEXT = "The end.\n\n12 men came."


def pieces(pre):
    """The tokens that transformers makes of the text with a file that names this pre-tokenizer."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer = gguf.GGUFWriter(place / f"{pre}.gguf", "llama")
    for name, value in (("context_length", 64), ("embedding_length", 8), ("block_count", 1),
                        ("feed_forward_length", 16), ("head_count", 2)):
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*letters, "12", "<s>", "</s>"])
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(letters) + 1) + [gguf.TokenType.CONTROL] * 2)
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(len(letters) + 1)
    writer.add_eos_token_id(len(letters) + 2)
    writer.add_tensor("token_embd.weight", numpy.zeros((len(letters) + 3, 8), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=f"{pre}.gguf")
    found = tokenizer.convert_ids_to_tokens(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    print(f"{pre}: {' '.join(found)}")
    return found


print(*(f"{name} {version(name)}" for name in ("transformers", "tokenizers", "gguf")), sep=", ")
gpt2, smollm = pieces("gpt-2"), pieces("smollm")
same = smollm == gpt2 and "12" in smollm
print("as described" if same else "the behaviour has changed")
sys.exit(not same)
PY
"$place/venv/bin/python" -W ignore "$place/try.py" "$place"
