"""Baselines and memory models, installed as `memory_bench.baselines`: one file is one method.

- `armt.py`: ARMT
- `autocompressor.py`: AutoCompressors
- `emllm.py`: EM-LLM
- `extended_mind.py`: Extended Mind Transformers
- `full_context.py`: everything
- `infini_attention.py`: Infini-attention
- `infllm.py`: InfLLM
- `longmem.py`: LongMem
- `memlong.py`: MemLong
- `memorizing.py`: Memorizing Transformer
- `memoryllm.py`: MemoryLLM
- `memoryprompt.py`: MemoryPrompt
- `mplus.py`: M+
- `retrieval.py`: the chunks of earlier text that match best
- `rmt.py`: RMT
- `sirllm.py`: SirLLM
- `sliding_window.py`: recent tokens and sinks
- `truncation.py`: the window
- `ttt.py`: dynamic evaluation: weights that learn what was read
- `unimix.py`: UniMix: recurrent tokens, a window and search in one model
- `xl_cache.py`: the previous segment
"""

if __name__ != "memory_bench.baselines":  # two names would make two copies of every class
    raise ImportError("Import memory_bench.baselines; baselines is only its folder.")
