"""Reading LongMem's bank: the chunks that fit a query, and attention to every token in them.

Search and attention are those of `knn`; here are the official quirks of one bank for all rows and of missing chunks.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunk_bank import ChunkBank, Chunks, fold_rows, unfold_rows
from .knn import attend_retrieved, search


@dataclass(frozen=True, slots=True)
class ChunkReader:
    """A bank that is not empty, put together for the reads of one step.

    Attributes:
        chunks: all of them, oldest first.
        size: tokens per chunk.
        wanted: chunks that a query retrieves.
        shared: official: `chunks` has one row, which all rows read.
        zero_chunks: official: chunks that are missing are read as zeros, not masked.
    """

    chunks: Chunks
    size: int
    wanted: int
    shared: bool
    zero_chunks: bool

    @classmethod
    def of(cls, bank: ChunkBank, wanted: int, *, zero_chunks: bool = False) -> "ChunkReader":
        """The reader of a bank."""
        return cls(bank.joined(), bank.chunk, wanted, bank.shared, zero_chunks)

    @property
    def known(self) -> Tensor | None:
        """``[rows]`` bool: rows with at least one chunk; None: all have."""
        return None if self.chunks.full else self.chunks.valid.any(dim=1)

    @torch.no_grad()
    def retrieve(self, q: Tensor) -> Tensor:
        """The chunks whose mean key fits every query best: ``[rows, heads, tokens, n]`` int64, best first.

        Args:
            q: ``[rows, heads, tokens, head]``, before rotary and not scaled.

        Returns:
            Places in `chunks`; n is `wanted`, or all there are. With `zero_chunks` it is always `wanted`, and -1 stands
            for the missing.
        """
        queries = (fold_rows(q) if self.shared else q).to(self.chunks.index.dtype)
        found = search(queries, self.chunks.index, self.wanted, None if self.chunks.full else self.chunks.valid)
        found = unfold_rows(found, len(q)) if self.shared else found
        return F.pad(found, (0, self.wanted - found.shape[-1]), value=-1) if self.zero_chunks else found

    def attend(self, q: Tensor, retrieved: Tensor) -> Tensor:
        """Attention ``[rows, heads, tokens, head]`` to the tokens of the retrieved chunks, with a softmax of its own.

        Args:
            q: ``[rows, heads, tokens, head]``, scaled.
            retrieved: from `retrieve`.
        """
        keys, values, places = self.entries(retrieved)
        valid = None if self.chunks.full or self.zero_chunks else self.chunks.valid
        queries = fold_rows(q) if self.shared else q
        out = attend_retrieved(queries, keys, values, places, chunk=self.size, valid=valid)
        return unfold_rows(out, len(q)) if self.shared else out

    def entries(self, retrieved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values ``[rows, kv_heads, entries, head]`` to read from, and the places of the retrieved chunks.

        Of a shared bank all three have one row: places are ``[1, heads, rows * tokens, n]``.
        """
        keys, values = self.chunks.keys, self.chunks.values
        if self.zero_chunks:  # one more chunk at the end, which -1 means
            keys, values = (F.pad(x, (0, 0, 0, self.size)) for x in (keys, values))
            retrieved = retrieved % (self.chunks.count + 1)
        return keys, values, fold_rows(retrieved) if self.shared else retrieved
