"""BM25 over token ids: how well each chunk of a row answers a query, without a tokenizer or an index on disk.

Robertson & Zaragoza, *The Probabilistic Relevance Framework: BM25 and Beyond* (2009), section 3.4, with the documents
of a row its own chunks. Two things differ from the textbook: all chunks have the same length, so the length
normalisation is 1 whatever b is; and a term in more than half of the chunks counts a little, as in Lucene,
``log(1 + (N - n + 0.5) / (n + 0.5))``, where the original weight would be negative.
"""

import torch
from torch import Tensor

K1 = 1.5  # how soon repeating a term stops to count


class BM25:
    """Search by terms. What is kept of a chunk beside its ids is how often each of them occurs in it.

    No matrix product is involved: reading costs additions and comparisons that `flops` of a model does not count, and
    a search looks at every token of the row's chunks once.

    Args:
        vocab: number of token ids.
    """

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def keys(self, ids: Tensor) -> Tensor:
        """Occurrences ``[rows, chunks, chunk]`` int16 of each token in its chunk, at its first place; else 0.

        Args:
            ids: ``[rows, chunks, chunk]``; negative where there is no chunk.
        """
        same = ids[..., :, None] == ids[..., None, :]  # [rows, chunks, chunk, chunk]
        first = ~same.tril(diagonal=-1).any(dim=-1)
        return (same.sum(dim=-1) * (first & (ids >= 0))).to(torch.int16)

    def scores(self, ids: Tensor, keys: Tensor, query: Tensor) -> Tensor:
        """Scores ``[rows, chunks]`` float32 of chunks for `query` ``[rows, tokens]`` (negative ids are no tokens)."""
        rows, chunks, _ = ids.shape
        terms, counts = ids.clamp(min=0).long().flatten(1), keys.flatten(1)  # [rows, chunks * chunk]
        holding = torch.zeros(rows, self.vocab, dtype=torch.int32, device=ids.device)  # n: chunks that hold a term
        holding = holding.scatter_add(1, terms, (counts > 0).int())
        asked = torch.zeros_like(holding).scatter_add(1, query.clamp(min=0).long(), (query >= 0).int())
        total = (ids[:, :, 0] >= 0).sum(dim=1, keepdim=True)  # N
        weight = asked * torch.log1p((total - holding + 0.5).double() / (holding + 0.5))
        often = counts.double()
        found = weight.gather(1, terms) * (often * (K1 + 1) / (often + K1))
        # Rounded: chunks of the same tokens in another order must tie, however their sums were taken.
        return found.view(rows, chunks, -1).sum(dim=-1).float()

    def write_flops(self, chunks: int) -> int:
        """Matrix products of `keys`: none."""
        del chunks
        return 0

    def query_flops(self, chunks: int, tokens: int) -> int:
        """Matrix products of `scores`: none."""
        del chunks, tokens
        return 0
