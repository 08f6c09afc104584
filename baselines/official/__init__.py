"""Reference cases of the official implementations, replayed through the methods; the decoders some were recorded on.

- `decoder_alibi.py`: the decoder that the official LongMem was built on
- `decoder_lucidrains.py`: another's, with the product's memory
- `decoder_meliad.py`: the authors' decoder, with the product's memory
- `replay_armt.py`: its reference cases
- `replay_autocompressor.py`: reference cases of AutoCompressors
- `replay_blocks.py`: reference cases of InfLLM and EM-LLM
- `replay_extended_mind.py`: its reference cases
- `replay_infini_attention.py`: of Infini-attention, by third parties
- `replay_longmem.py`: LongMem's reference cases
- `replay_memlong.py`: its reference cases
- `replay_memorizing.py`: its reference cases
- `replay_pool.py`: reference cases of both
- `replay_rmt.py`: its reference cases
- `replay_sirllm.py`: its reference cases
"""
