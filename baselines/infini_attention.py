"""Infini-attention: every layer also reads a matrix that all earlier segments were added to, through a gate per head.

Unusual here:

- The authors released no code, so there is no official way; options name what other people's implementations do.
- The memory's keys and queries carry no position: they are the projections before rotary. Learned positions (GPT-2,
  OPT) are in what is projected, so only the Llama family will do.
- Memories are float32 at least, whatever the backbone's type: the normaliser grows with the text, and in bfloat16
  single additions would vanish.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memory_bench.axes import Axes
from memory_bench.backbone.model import Backbone
from memory_bench.budget import Budget
from memory_bench.card import BackboneCard
from memory_bench.choices import check_choices
from memory_bench.errors import UserError
from memory_bench.protocol import MemoryModel, Readout, Segment, State, Traits

CLOSED = -3.0  # initial gate on a pretrained backbone: nearly the plain model, with a gradient


@dataclass(frozen=True, slots=True)
class InfiniAttentionConfig:
    """Hyper-parameters of Infini-attention."""

    segment: int = 512  # text tokens per step; paper: 2048
    # linear: values are added; delta: what is found under their keys is taken off first
    update: Literal["linear", "delta"] = "linear"
    gate_init: float = 0.0  # every head's first gate; paper: beta; sigmoid(gate) weighs the memory
    epsilon: float = 1e-10  # divisions are by no less; 0: no bound, as Beomi/InfiniTransformer
    gate_empty: bool = False  # Beomi/InfiniTransformer: the gate scales local attention while there is no memory, too
    handed_on: bool = False  # MemLong's Gemma baseline: one memory, handed from layer to layer: it looks ahead

    def __post_init__(self) -> None:
        if self.segment < 1 or self.epsilon < 0:
            raise UserError("infini-attention: segment must be at least 1, and epsilon not negative.")
        check_choices("infini-attention", self)


@dataclass(frozen=True, slots=True)
class Memory(State):
    """One layer's memory.

    Attributes:
        matrix: ``[rows, kv_heads, head, head]``, from key to value; paper: M.
        normaliser: ``[rows, kv_heads, head]``; paper: z.
        written: ``[rows]`` bool, something is in it.
    """

    matrix: Tensor
    normaliser: Tensor
    written: Tensor


@dataclass(frozen=True, slots=True)
class InfiniState(State):
    """The memory of every layer; a single one where it is handed on."""

    memories: tuple[Memory, ...]


def feature(x: Tensor) -> Tensor:
    """Positive features of keys and queries; paper: sigma."""
    return F.elu(x) + 1


class CompressiveMemory(nn.Module):
    """What a layer does with its memory. Attribute ``gate`` ``[heads]`` (paper: beta), all the parameters it adds."""

    def __init__(self, backbone: Backbone, config: InfiniAttentionConfig) -> None:
        super().__init__()
        self.delta, self.epsilon, self.gate_empty = config.update == "delta", config.epsilon, config.gate_empty
        self.gate = nn.Parameter(
            torch.full((backbone.heads,), config.gate_init, device=backbone.device, dtype=backbone.dtype)
        )

    def find(self, features: Tensor, memory: Memory) -> Tensor:
        """What is stored under `features` ``[rows, kv_heads, n, head]``, same shape; zero where nothing was written."""
        weight = (features @ memory.normaliser[..., None]).clamp(min=self.epsilon)
        found = features @ memory.matrix / torch.where(weight == 0, 1.0, weight)
        return torch.where(memory.written[:, None, None, None], found, 0.0)

    def read(self, q: Tensor, attended: Tensor, memory: Memory) -> Tensor:
        """Local attention and memory, weighed by the gate ``[rows, tokens, heads * head]``.

        Args:
            q: ``[rows, heads, tokens, head]``, before rotary.
            attended: ``[rows, tokens, heads * head]``, local attention.
            memory: of earlier segments.
        """
        filled = bool(memory.written.any())
        if not (filled or self.gate_empty):
            return attended
        rows, heads, tokens, width = q.shape
        shared = (rows, memory.matrix.shape[1], -1, width)  # the heads of a group read one memory
        found = self.find(feature(q.to(memory.matrix)).reshape(shared), memory).view(q.shape) if filled else 0.0
        share = self.gate.to(memory.matrix).sigmoid()[:, None, None]
        if not self.gate_empty:
            share = share * memory.written[:, None, None, None]
        local = attended.view(rows, tokens, heads, width).transpose(1, 2)
        return (share * found + (1 - share) * local).transpose(1, 2).flatten(2).to(attended)

    def write(self, k: Tensor, v: Tensor, memory: Memory, mask: Tensor) -> Memory:
        """The memory after a segment; all its tokens see the memory before it.

        Args:
            k: ``[rows, kv_heads, tokens, head]``, before rotary.
            v: same shape.
            memory: before.
            mask: ``[rows, tokens]`` bool; padding is not written.
        """
        keys = feature(k.to(memory.matrix)) * mask[:, None, :, None]
        values = v.to(memory.matrix)
        if self.delta and bool(memory.written.any()):
            values = values - self.find(keys, memory)
        matrix = memory.matrix + keys.transpose(2, 3) @ values
        return Memory(matrix, memory.normaliser + keys.sum(dim=2), memory.written | mask.any(dim=1))


class InfiniAttention(MemoryModel[InfiniState]):
    """Munkhdalai et al., *Leave No Context Behind* (2024): Infini-attention.

    Attributes: ``layers``, a `CompressiveMemory` each.
    """

    Config = InfiniAttentionConfig
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("llama",)  # learned positions would be in the memory's keys
    source: ClassVar[str] = (
        "arXiv:2404.07143; no official code. Third party: memory functions of lucidrains/infini-transformer-pytorch@"
        "5774bb3 and Beomi/InfiniTransformer@045f4eb. Where the paper is silent: no gate before anything is written, "
        "local positions from 0 in every segment, the heads of a group share a memory."
    )
    axes = Axes(
        unit="matrix", capacity="fixed", overflow="merge", write="direct", written_with_gradient=True,
        read="by similarity per token", inject="all layers", fusion="gated mix", order="lost", trained="all",
    )  # fmt: skip

    def __init__(self, backbone: Backbone, config: InfiniAttentionConfig, rng: torch.Generator) -> None:
        super().__init__()
        del rng  # gates begin alike
        self.backbone = backbone
        self.config = config
        # A layer that reads what the layer below has written of the same segment sees the segment's last token.
        self.traits = Traits(segment=config.segment, look_ahead=config.segment - 1 if config.handed_on else 0)
        self.layers = nn.ModuleList(CompressiveMemory(backbone, config) for _ in range(backbone.layers))

    @classmethod
    def fit(cls, card: BackboneCard, budget: Budget) -> InfiniAttentionConfig:
        """Segments of the backbone's own window; gates nearly closed where the backbone is pretrained."""
        del budget
        return InfiniAttentionConfig(segment=card.window, gate_init=CLOSED if card.pretrained else 0.0)

    def open(self, rows: int, *, seeds: Sequence[int] | None = None) -> InfiniState:
        """See `MemoryModel.open`; nothing is drawn."""
        del seeds
        backbone = self.backbone
        like: dict[str, Any] = {
            "device": backbone.device,
            "dtype": torch.promote_types(backbone.dtype, torch.float32),
        }
        width = backbone.head_width
        empty = Memory(
            torch.zeros(rows, backbone.kv_heads, width, width, **like),
            torch.zeros(rows, backbone.kv_heads, width, **like),
            torch.zeros(rows, dtype=torch.bool, device=backbone.device),
        )
        return InfiniState((empty,) * (1 if self.config.handed_on else backbone.layers))

    def step(self, state: InfiniState, segment: Segment, *, write: bool = True) -> tuple[Readout, InfiniState]:
        """One pass over the segment; every layer reads its memory, then adds the segment to it."""
        backbone, mask, handed_on = self.backbone, segment.mask, self.config.handed_on
        where, embeds = backbone.positions(mask), backbone.embed(segment.ids)
        # Handed on, a beginning depends on what follows it: nothing of an earlier pass can be taken over.
        resumed = backbone.resume(embeds, (where, mask), (state,), limit=0 if handed_on else None)
        first = resumed.first
        turn, turn_keys = backbone.rotation(where[:, first:], queries=True), backbone.rotation(where)
        visible = backbone.visible(mask, first=first, positions=where)
        hidden = backbone.begin(embeds[:, first:], where[:, first:])
        after: list[Memory] = []
        for layer, memory in enumerate(cast(Iterable[CompressiveMemory], self.layers)):
            before = (after or state.memories)[-1] if handed_on else state.memories[layer]
            q, k, v = backbone.project(layer, backbone.norm_input(layer, hidden), mask[:, first:])
            k, v = resumed.join(k, v)
            local = backbone.attend(
                backbone.rotate(q, turn[layer]), backbone.rotate(k, turn_keys[layer]), v, visible[layer]
            )
            hidden = backbone.close(layer, hidden, memory.read(q, local, before))
            if write or handed_on:
                after.append(memory.write(k, v, before, mask))
        hidden = resumed.finish(backbone.end(hidden))
        if write:
            state = InfiniState((after[-1],) if handed_on else tuple(after))
        return Readout(hidden, backbone.head), state

    def flops(self, tokens: int, remembered: int) -> int:
        """The backbone on the segment, reading (once there is something to read) and writing."""
        backbone, width = self.backbone, self.backbone.head_width
        found = 2 * tokens * width * (width + 1)  # by one head
        reading = backbone.layers if remembered else (backbone.layers - 1 if self.config.handed_on else 0)
        heads = backbone.heads + (backbone.kv_heads if self.config.update == "delta" else 0)
        added = 2 * tokens * width**2 * backbone.kv_heads * backbone.layers
        return backbone.flops(tokens, tokens, predicted=tokens) + reading * heads * found + added
