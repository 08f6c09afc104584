"""What several methods are made of: searches, rings, adapters, pools, banks. Parts import parts, never a method.

- `block_attention.py`: one softmax over a window and far tokens
- `block_model.py`: execution blocks that choose blocks of earlier text: what InfLLM and EM-LLM share
- `block_options.py`: their options: who chooses, what is far
- `block_sight.py`: what they see before they choose
- `block_store.py`: all keys and values of a stream, and a table of blocks
- `bm25.py`: BM25 over token ids
- `cache.py`: a cache with a fixed number of slots
- `chunk_bank.py`: LongMem's bank: past keys and values in chunks
- `chunk_fusion.py`: MemLong's attention to chunks and a window
- `chunk_reader.py`: search in it and attention to what is found
- `drawing.py`: random draws that belong to a row
- `events.py`: EM-LLM's rules for the ends of events
- `execution.py`: a segment in execution blocks
- `grouping.py`: rows of unequal length without padding
- `knn.py`: search and attention over stored keys and values: what Memorizing Transformer and LongMem share
- `long_term.py`: M+'s store and retriever
- `lstm.py`: a recurrent cell
- `pool.py`: passes over a pool: what MemoryLLM and M+ share
- `pool_frame.py`: one decoder layer over memory and text rows: positions, masks, keys
- `pool_layout.py`: official checkpoints of MemoryLLM and M+
- `pool_others.py`: rows of a batch that other processes read
- `pool_state.py`: the pool as data: options, dropping, filling
- `questions.py`: what a segment is searched for by
- `ring.py`: a ring buffer of keys and values as a value
- `side_network.py`: its official side block, with ALiBi
- `text_memory.py`: MemLong's memory: chunks of text with keys and values of one layer
- `window_and_beyond.py`: a store read by position and, beyond that, by similarity
"""
