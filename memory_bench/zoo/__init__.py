"""Where backbones come from: named ones, GGUF files, the one that is trained here, released ones.

- `gguf.py`: a GGUF file as a plain model folder
- `minilm.py`: the encoder of sentences: where from, how loaded
- `named.py`: named backbones: where from, how loaded
- `pretrain.py`: trains the tiny backbone
- `pretrained.py`: a checkpoint matched with a backbone, loaded instead of trained
"""
