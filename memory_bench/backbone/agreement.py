"""Does our loop over a backbone's layers compute what the model's own ``forward`` does? Measured, not read off a name.

Unusual here:

- What is right is the model's ``forward`` over a text alone: no padding, no cache, one pass. Ours reads as models here
  do: in pieces over a cache, and among rows of other lengths with padding on either side and inside.
- The long text is longer than every window and every length that the configuration names (`named_lengths`); another one
  jumps to positions far beyond, for rotary frequencies that depend on how far a text goes.
- Logits are compared relatively, so that a random model that predicts almost nothing is judged like a trained one. In
  16 bits ours may be about as far from the model's as rounding takes either from the model in float32.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from memory_bench.backbone.model import Backbone, Past

USUAL, LEAST = 4096, 1024  # tokens of the long text where no length is named: as many as `FLOPS` allow, at least …
FLOPS = 1e12  # of one pass over it (a SmolLM2 of 135M parameters reads 2,048 tokens in it)
PATIENCE = 10  # times `FLOPS` for the inputs that a run asks for
BEYOND = 257  # tokens past the longest length that is named
CHECKED = 512  # positions of the long text whose logits are compared
PIECE = 512
ROWS = 192  # tokens of rows with padding, beside what the narrowest window takes
FAR = 1 << 17  # where the second half of a text stands
EXACT = 1e-3  # relative deviation in float32; rounding makes about 1e-6 to 1e-5
LENGTHS = ("window", "chunk", "original_max")  # in the names of lengths
ROUNDED = 0.1  # in 16 bits where nothing is held in float32 to compare with; rounding makes about 0.05


@dataclass(frozen=True, slots=True)
class Found:
    """What a comparison found.

    Attributes:
        kind: the model's type.
        tokens: length of the longest text.
        deviation: largest relative deviation of a position's logits (both centred over the vocabulary).
        fault: empty, or what is wrong, as the end of a sentence.
    """

    kind: str
    tokens: int
    deviation: float
    fault: str


@dataclass(frozen=True, slots=True)
class _Text:
    """A text and how it is read.

    Attributes:
        name: what is said of a deviation in it.
        ids: ``[1, tokens]``.
        positions: ``[1, tokens]``; None: 0, 1, 2 ….
        chosen: positions whose logits are compared.
    """

    name: str
    ids: Tensor
    chosen: Tensor
    positions: Tensor | None = None


def compare(model: nn.Module, tokens: int, rounded: nn.Module | None = None) -> Found:
    """Read texts with the model's own ``forward`` and with ours.

    Args:
        model: the loaded ``...ForCausalLM``.
        tokens: of the longest text.
        rounded: the same model in 16 bits, which is to be judged, with `model` in float32 as the measure.
    """
    kind = str(cast(Any, model).config.model_type)
    worst = 0.0
    try:
        for name, deviation, allowed in _deviations(model, tokens, rounded):
            worst = max(worst, deviation)
            if not deviation <= allowed:
                said = f"its logits deviate by {deviation:.2g} of their size from its own forward's {name}"
                return Found(kind, tokens, deviation, said)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        said = (str(error).strip().splitlines() or ["no message"])[0][:120]
        return Found(kind, tokens, math.inf, f"its layers cannot be read one by one ({type(error).__name__}: {said})")
    return Found(kind, tokens, worst, "")


@torch.no_grad()
def _deviations(model: nn.Module, tokens: int, rounded: nn.Module | None) -> Iterator[tuple[str, float, float]]:
    """Per text: what it is, how far we are from the model, and how far we may be."""
    backbone = Backbone(model if rounded is None else rounded)
    for text in _texts(backbone, tokens):
        right, ours = _forward(model, text), _in_pieces(backbone, text)
        yield text.name, *_judged(ours, right, None if rounded is None else _forward(rounded, text))
    rng = torch.Generator().manual_seed(1)
    narrow = min((w for w in backbone.windows if w is not None and w <= LEAST), default=0)
    mask = _padding(min(narrow + ROWS, backbone.max_positions or FAR), rng).to(backbone.device)
    ids = torch.randint(backbone.vocab, mask.shape, generator=rng).to(backbone.device)
    read = backbone.head(backbone.run(backbone.embed(ids), mask))
    for row, real in enumerate(mask):
        alone = ids[row : row + 1, real]
        text = _Text("", alone, torch.arange(alone.shape[1], device=ids.device))
        theirs = None if rounded is None else _forward(rounded, text)
        yield "among rows with padding", *_judged(read[row, real], _forward(model, text), theirs)


def _texts(backbone: Backbone, tokens: int) -> Iterator[_Text]:
    rng = torch.Generator().manual_seed(0)
    device = backbone.device
    chosen = torch.linspace(0, tokens - 1, min(tokens, CHECKED)).long().to(device)
    long = torch.randint(backbone.vocab, (1, tokens), generator=rng).to(device)
    yield _Text(f"in a text of {tokens:,} tokens", long, chosen)
    if backbone.max_positions is None:
        # A window counts tokens there and positions here: only where there is none can a text jump inside.
        half = torch.arange(ROWS // 2, device=device) + (FAR if any(backbone.windows) else 0)
        where = torch.cat([half, half + (len(half) if any(backbone.windows) else FAR)])[None]
        ids = torch.randint(backbone.vocab, where.shape, generator=rng).to(device)
        yield _Text(f"at position {FAR:,}", ids, torch.arange(ids.shape[1], device=device), where)


def _padding(tokens: int, rng: torch.Generator) -> Tensor:
    """``[4, tokens]`` bool: a full row, and half as many tokens behind padding, before it, and around it."""
    mask = torch.ones(4, tokens, dtype=torch.bool)
    mask[1, : tokens // 2] = mask[2, -(tokens // 2) :] = False
    mask[3] = torch.rand(tokens, generator=rng) < 0.5
    return mask


def _forward(model: nn.Module, text: _Text) -> Tensor:
    """Logits ``[chosen, vocab]`` of the model's own ``forward``."""
    given: dict[str, Any] = {}
    if text.positions is not None:  # without a mask, a jump would begin another text
        given = {"position_ids": text.positions, "attention_mask": torch.ones_like(text.ids)}
    return cast(Tensor, cast(Any, model)(text.ids, use_cache=False, logits_to_keep=text.chosen, **given).logits[0])


def _in_pieces(backbone: Backbone, text: _Text) -> Tensor:
    """Ours: in pieces, each over the cache of those before it.

    The first are short: rotary frequencies may depend on how far a text has come.
    """
    tokens = text.ids.shape[1]
    where = torch.arange(tokens, device=text.ids.device)[None] if text.positions is None else text.positions
    mask = torch.ones_like(text.ids, dtype=torch.bool)
    half = tokens // 2
    cuts = sorted({0, 5, 37, half, half + 1, *range(half + 1 + PIECE, tokens, PIECE), tokens})
    pasts: tuple[Past, ...] = ()
    hidden: list[Tensor] = []
    for span in (slice(start, end) for start, end in pairwise(cuts)):
        embeds = backbone.embed(text.ids[:, span])
        part, own = backbone.run_cached(embeds, mask[:, span], pasts, positions=where[:, span])
        pasts = (*pasts, cast(Past, own))
        hidden.append(part)
    return backbone.head(torch.cat(hidden, dim=1)[0, text.chosen])


def _judged(ours: Tensor, right: Tensor, theirs: Tensor | None) -> tuple[float, float]:
    """Our largest deviation, and the largest allowed. `theirs` are the rounded model's own logits, `right` the exact.

    Rounding alone takes either of them about as far from the exact ones as from one another.
    """
    if theirs is None:
        return float(_relative(ours, right).max()), EXACT if right.dtype == torch.float32 else ROUNDED
    apart, rounding = _relative(ours, theirs), (_relative(ours, right), _relative(theirs, right))
    if apart.mean() > 2 * min(float(r.mean()) for r in rounding) + EXACT:
        return float(apart.max()), 0.0
    return float(apart.max()), 3 * min(float(r.max()) for r in rounding) + EXACT


def _relative(logits: Tensor, right: Tensor) -> Tensor:
    """``|logits - right| / |right|`` per position, both centred over the vocabulary.

    Entries of the vocabulary that a model hides (infinities in `right`) must be the same in ours, and the others are
    compared. Not-a-number in `right` is the model's own affair and counts as agreement, whatever ours is there.
    """
    hidden = right.isinf()
    counted = (~hidden).sum(dim=-1, keepdim=True).clamp(min=1)
    plain = [x.float().masked_fill(hidden, 0.0) for x in (logits, right)]
    ours, theirs = ((x - x.sum(dim=-1, keepdim=True) / counted).masked_fill(hidden, 0.0) for x in plain)
    found = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=1e-6)
    found = found.masked_fill(((logits != right) & hidden).any(dim=-1), math.inf)
    found = found.masked_fill(right.isnan().any(dim=-1), 0.0)
    return torch.where(found.isfinite(), found, math.inf)


def named_lengths(config: Mapping[str, Any]) -> list[int]:
    """Lengths in a configuration at which arithmetic may change: windows, chunks, what rotary positions began with."""
    found: list[int] = []
    for name, value in config.items():
        if isinstance(value, Mapping):
            found += named_lengths(value)
        elif type(value) is int and any(word in name for word in LENGTHS) and "layers" not in name:
            found.append(value)
    ropes = config.get("rope_parameters") or {}
    parts = [ropes, *(part for part in ropes.values() if isinstance(part, Mapping))]  # one for all layers, or by type
    if any(word in str(part.get("rope_type")) for part in parts for word in ("dynamic", "long")):
        found += [int(config["max_position_embeddings"])] if config.get("max_position_embeddings") else []
    return found


def text_length(backbone: Backbone, asked: int, memory: int) -> int:
    """Tokens of the long text: past every length that is named, as many as were asked for, in `memory` bytes.

    What is asked for is cut where a pass would take `PATIENCE` times as long as the usual one may.
    """
    config = cast(Any, backbone.model).config
    flops = FLOPS if backbone.device.type == "cpu" else 1000 * FLOPS
    usual = USUAL
    while usual > LEAST and backbone.flops(usual, usual // 2, predicted=CHECKED) > flops:
        usual //= 2
    while asked > usual and backbone.flops(asked, asked // 2, predicted=CHECKED) > PATIENCE * flops:
        asked = asked * 3 // 4
    tokens = max(usual, asked, *(length + BEYOND for length in named_lengths(config.to_dict())))
    square = 6 * any(backbone.windows)  # bytes of masks, and of scores where they are held at once
    square += 0 if getattr(config, "_attn_implementation", "") == "sdpa" else 8 * backbone.heads
    line = 4 * (20 * backbone.hidden_width + 4 * backbone.layers * backbone.kv_heads * backbone.head_width)
    while tokens > LEAST and tokens * (tokens * square + line) > memory:
        tokens = tokens * 3 // 4
    return min(tokens, backbone.max_positions or tokens)
