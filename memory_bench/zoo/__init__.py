"""Where backbones come from: named ones, GGUF files, the one that is trained here, released ones.

- `compared.py`: every backbone compared once, and remembered
- `gguf.py`: a GGUF file as a plain model folder
- `gguf_tokenizer.py`: the tokenizer that a GGUF file describes
- `minilm.py`: the encoder of sentences: where from, how loaded
- `named.py`: named backbones: where from, how loaded
- `pretrain.py`: trains the tiny backbone
- `pretrained.py`: a checkpoint matched with a backbone, loaded instead of trained
- `skeletons.py`: backbones without weights, and their tokenizers
"""
