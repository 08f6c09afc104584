"""A frozen sentence encoder that reads token ids of a backbone: text in, one unit vector out.

Memory models see token ids only; this is the one place where a model can have them read as text. The encoder belongs to
no module, so it is never trained, saved or cast; its weights and operations are counted by whoever uses it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

Decode = Callable[[Sequence[int]], str]
"""Token ids of the backbone to text."""

LONGEST = 256  # word pieces the encoder was trained on, [CLS] and [SEP] included
BATCH = 64  # texts encoded at once


class Embedder:
    """Mean of a BERT encoder's last hidden states, at length 1 (as sentence-transformers' all-MiniLM-L6-v2 is used).

    Every text is padded or cut to a number of word pieces that depends on its number of tokens alone, so that what an
    embedding costs is known without the text.

    Args:
        encoder: a ``BertModel`` without pooler; frozen here.
        tokenizer: of the encoder.
        decode: of the backbone's tokenizer.

    Attributes:
        width: of the vectors.
        parameters: number of weights.
    """

    def __init__(self, encoder: nn.Module, tokenizer: Tokenizer, decode: Decode) -> None:
        self._encoder = encoder.float().eval().requires_grad_(False)
        self._decode = decode
        self._tokenizer = tokenizer
        self._tokenizer.no_truncation()  # a tokenizer.json may carry a training run's settings
        self._tokenizer.no_padding()
        self._ends = tuple(tokenizer.token_to_id(piece) for piece in ("[CLS]", "[SEP]"))
        config: Any = encoder.config
        self._layers = int(config.num_hidden_layers)
        self.width = int(config.hidden_size)
        self.parameters = sum(p.numel() for p in encoder.parameters())
        inside = [p for name, p in encoder.named_parameters() if p.dim() == 2 and "embeddings" not in name]
        self._matrices = sum(p.numel() for p in inside)

    @staticmethod
    def pieces(tokens: int) -> int:
        """Word pieces that are encoded for a text of `tokens` tokens; English has about one per token of SmolLM2."""
        return min(LONGEST, 5 * tokens // 4 + 8)

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """Unit vectors ``[texts, width]`` in float32 of `ids` ``[texts, tokens]``; negative ids are no tokens.

        Of a text with more than `pieces` word pieces the last ones are read; a text without any has the vector 0.
        """
        if not len(ids):
            return torch.zeros(0, self.width, device=ids.device)
        room = self.pieces(ids.shape[1])
        texts = [self._decode([i for i in row if i >= 0]) for row in ids.tolist()]
        read = [found.ids[2 - room :] for found in self._tokenizer.encode_batch(texts, add_special_tokens=False)]
        first, last = self._ends
        pieces = torch.zeros(len(read), room, dtype=torch.long)
        for row, found in enumerate(read):
            pieces[row, : len(found) + 2] = torch.tensor([first, *found, last])
        real = torch.tensor([len(found) + 2 for found in read])
        mask = (torch.arange(room) < real[:, None]).to(ids.device)
        batches = zip(pieces.to(ids.device).split(BATCH), mask.split(BATCH), strict=True)
        vectors = [self._encode(p, m) for p, m in batches]
        empty = torch.tensor([not found for found in read], device=ids.device)
        return torch.cat(vectors).masked_fill(empty[:, None], 0.0)

    def _encode(self, pieces: Tensor, mask: Tensor) -> Tensor:
        hidden = self._encoder(input_ids=pieces, attention_mask=mask.long()).last_hidden_state  # [texts, pieces, width]
        return F.normalize((hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True), dim=-1)

    def flops(self, tokens: int) -> int:
        """Operations for one text of `tokens` tokens (multiply-add = 2), padding included as it is computed."""
        pieces = self.pieces(tokens)
        return 2 * pieces * self._matrices + 4 * self._layers * pieces * pieces * self.width
