"""Hugging Face causal language models behind a few plain verbs; with `layers.py`, what knows their modules.

Unusual here:

- A pass is written out layer by layer (`project`, `attend`, `close`) over the loaded modules instead of calling the
  model's own ``forward``: memory inside attention needs no fork of anybody's modelling file, no cache class is
  involved, and Llama, GPT-2 and OPT share one loop. `memory_bench/backbone/agreement.py` compares it with ``forward``,
  for every backbone that is used: what looks like one of these families need not compute like it.
- Keys are handed out *before* rotary and rotated where they are used, so that cached keys can move.
- Dropout of the backbone is never applied (the memory papers' backbones are trained without it here).
- Positions are explicit: by default a row's real tokens count 0, 1, 2 …, so padding moves nothing.
- Layers may differ: some see a sliding window only, some rotate nothing. `rotation` and `visible` therefore answer once
  per layer (layers that are alike share tensors), and a pass takes the entry of its layer.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memory_bench.backbone.embedder import Embedder
from memory_bench.backbone.families import attention_sizes, declared, find_decoder, windows_of
from memory_bench.backbone.layers import Layers, Rotation, added, itself
from memory_bench.backbone.lora import Adapter, kinds_of
from memory_bench.backbone.reuse import Pass, Passes, Resumed
from memory_bench.state import State

NOWHERE = -(1 << 30)  # the position of what has none


@dataclass(frozen=True, slots=True)
class Past(State):
    """Cached keys and values, before rotary.

    Attributes:
        keys: per layer ``[rows, kv_heads, cached, head]``.
        values: per layer, same shape.
        mask: ``[rows, cached]`` bool, real entries.
        positions: ``[rows, cached]`` int64, where the keys are rotated to.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor
    positions: Tensor

    @property
    def length(self) -> int:
        """Number of cached slots."""
        return int(self.mask.shape[1])

    def select(self, slots: Tensor) -> "Past":
        """The entries at `slots` ``[n]`` (the same for all rows), in that order."""
        return Past(
            tuple(k[:, :, slots] for k in self.keys),
            tuple(v[:, :, slots] for v in self.values),
            self.mask[:, slots],
            self.positions[:, slots],
        )

    def extend(self, other: "Past") -> "Past":
        """These entries followed by `other`'s."""
        return Past(
            tuple(torch.cat([a, b], dim=2) for a, b in zip(self.keys, other.keys, strict=True)),
            tuple(torch.cat([a, b], dim=2) for a, b in zip(self.values, other.values, strict=True)),
            torch.cat([self.mask, other.mask], dim=1),
            torch.cat([self.positions, other.positions], dim=1),
        )


class Backbone(Layers):
    """A causal language model of the Llama, GPT-2 or OPT family.

    Args:
        model: the loaded ``...ForCausalLM``.
        key_shift: mix every text key with the previous text token's key by a learned share per channel (the `tiny`
            backbone; adds ``layers * kv_heads * head`` parameters). Memory rows are neither shifted nor shifted in.

    Attributes:
        family: ``llama``, ``gpt2`` or ``opt``.
        width: d, the width of embeddings and of the final hidden states.
        layers, heads, kv_heads, head_width, vocab: sizes.
        max_positions: longest sequence, for learned absolute positions; None with rotary ones.
        rotary: keys and queries are rotated; may be switched off for a model that is trained without positions.
        windows: per layer, how many positions back a query sees, its own included; None: all.
        embedder: a sentence encoder for its token ids, set by the harness for models that ask for one; no submodule.

    Raises:
        DataError: the architecture is none of the three families.
    """

    embedder: Embedder | None = None

    def __init__(self, model: nn.Module, *, key_shift: bool = False) -> None:
        super().__init__()
        self.model = model
        config: Any = model.config
        inner = self._inner = find_decoder(model)  # a plain list below keeps it from being registered twice
        self.family = inner[0]
        self.layers = len(self._blocks)
        self.windows = windows_of(config, self.layers)
        self.heads = int(config.num_attention_heads)
        self.kv_heads, self.head_width = attention_sizes(self.family, config)
        hidden = int(config.hidden_size)
        self.hidden_width = hidden
        self.width = int(self._embedding.weight.shape[1])
        self.vocab = int(self._embedding.weight.shape[0])
        learned = self.family != "llama"
        self.max_positions = int(config.max_position_embeddings) if learned else None
        self.rotary = not learned
        size = self.kv_heads * self.head_width
        shifts = [nn.Parameter(torch.zeros(size)) for _ in range(self.layers)] if key_shift else []
        self.key_shift = nn.ParameterList(shifts)
        self._passes: Passes | None = None  # only inside `reusing`
        self._finite: list[Tensor] | None = None  # only inside `watched`
        self._told: Callable[[], None] | None = None  # likewise
        self.model.eval()

    def train(self, mode: bool = True) -> Self:
        """Training mode for what is added here; the loaded model stays in evaluation mode, so nothing is dropped."""
        super().train(mode)
        self.model.eval()
        return self

    @property
    def _decoder(self) -> Any:
        return self._inner[1]

    @property
    def _blocks(self) -> Any:
        return self._decoder.h if self.family == "gpt2" else self._decoder.layers

    @property
    def _last_norm(self) -> Any:
        names = {"gpt2": "ln_f", "opt": "final_layer_norm", "llama": "norm"}
        return getattr(self._decoder, names[self.family])

    @property
    def _embedding(self) -> nn.Embedding:
        return cast(nn.Embedding, cast(Any, self.model).get_input_embeddings())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self._embedding.weight.dtype

    def adapt(self, rank: int, alpha: float, kinds: Iterable[str], rng: torch.Generator) -> None:
        """Put fresh low-rank adapters beside the projections of every layer, in place of those that are there.

        They change nothing until they are trained, and then whatever goes through `project` and `close`.

        Args:
            rank: of the update; 0: there are none from now on.
            alpha: the update is scaled by ``alpha / rank``.
            kinds: which projections, of `memory_bench.card.ADAPTED`; those that the family lacks have none.
            rng: for the initial values.
        """
        self.adapter = None
        if rank:
            wanted = set(kinds)
            chosen = [name for name in self.projections(0) if kinds_of(name) & wanted]
            self.adapter = Adapter(self, rank, alpha, chosen, rng)

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings ``[rows, tokens, width]`` of `ids` ``[rows, tokens]``."""
        return cast(Tensor, self._embedding(ids))

    def embedding_scale(self) -> float:
        """Standard deviation over all entries of the input embedding: the scale of fresh memory tokens."""
        return float(self._embedding.weight.detach().float().std())

    def head(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., vocab]`` of final hidden states ``[..., width]``."""
        logits = cast(Tensor, cast(Any, self.model).get_output_embeddings()(hidden))
        divisor = float(declared(cast(Any, self.model).config, "logits_scaling") or 1.0)  # Granite
        logits = logits if divisor == 1 else logits / divisor
        if self._finite is not None:
            self._finite.append(torch.isfinite(logits.amax(dim=-1)).all())  # −inf hides an entry: no fault
        if self._told is not None:
            self._told()
        return logits

    def begin(self, embeds: Tensor, positions: Tensor) -> Tensor:
        """Input of the first layer ``[rows, tokens, hidden_width]``.

        Learned positions are added (none where a position is `NOWHERE`), OPT is projected in, and Granite's embeddings
        are multiplied: memory in their place, too, as by its own ``forward(inputs_embeds=…)``.
        """
        if self.family == "gpt2":
            return embeds + self._placed(self._decoder.wpe.weight, positions, 0)
        if self.family == "opt":
            table = self._decoder.embed_positions
            inside = embeds if self._decoder.project_in is None else self._decoder.project_in(embeds)
            return cast(Tensor, inside + self._placed(table.weight, positions, table.offset))
        factor = float(getattr(self._decoder, "embedding_multiplier", 1.0))
        return embeds if factor == 1 else embeds * factor

    @staticmethod
    def _placed(table: Tensor, positions: Tensor, offset: int) -> Tensor:
        nowhere = positions == NOWHERE  # -1 is a place: where OPT puts padding
        return F.embedding(positions.masked_fill(nowhere, 0) + offset, table).masked_fill(nowhere[..., None], 0.0)

    def end(self, hidden: Tensor) -> Tensor:
        """Final hidden states ``[rows, tokens, width]``: final norm, OPT projected out."""
        return self.project_out(self.final_norm(hidden))

    def project_out(self, hidden: Tensor) -> Tensor:
        """What the head reads ``[rows, tokens, width]`` of normalised hidden states: OPT may be projected out."""
        out = getattr(self._decoder, "project_out", None)
        return hidden if out is None else cast(Tensor, out(hidden))

    def round_frequencies(self) -> None:
        """Round the rotary frequencies to bfloat16, as casting the whole model does; angles stay float32."""
        rotary = self._decoder.rotary_emb
        rotary.inv_freq = rotary.inv_freq.to(torch.bfloat16).to(rotary.inv_freq)

    def rotation(self, positions: Tensor, *, queries: bool = False) -> tuple[Rotation | None, ...]:
        """Per layer, what `rotate` turns by ``[rows, 1, tokens, head]``; None in layers without rotary positions.

        With `queries`, for queries at these positions, which Ministral 3 makes longer far into a text; else for keys.
        """
        if not self.rotary:
            return (None,) * self.layers
        like = self._embedding.weight
        cos, sin = (part[:, None] for part in self._decoder.rotary_emb(like, positions))
        ropes = declared(cast(Any, self.model).config, "rope_parameters") or {}
        if queries and ropes.get("llama_4_scaling_beta"):
            reached = torch.floor(positions / ropes["original_max_position_embeddings"])
            longer = (1 + ropes["llama_4_scaling_beta"] * torch.log(1 + reached))[:, None, :, None].to(like.dtype)
            cos, sin = cos * longer, sin * longer
        return tuple((cos, sin) if getattr(block.self_attn, "use_rope", True) else None for block in self._blocks)

    def positions(self, mask: Tensor, *, count_padding: bool = False) -> Tensor:
        """``[rows, tokens]``: the real tokens of each row counted from 0; padding takes no position.

        With `count_padding`, what Hugging Face's ``forward`` does when it is given no positions: Llama and GPT-2 count
        every slot, OPT only the real ones (and its padding stands at -1).
        """
        if count_padding and self.family != "opt":
            return torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
        counted = mask.long().cumsum(dim=1)
        return counted * mask - 1 if count_padding else (counted - 1).clamp(min=0)

    def run(
        self, embeds: Tensor, mask: Tensor, *, positions: Tensor | None = None, text: Tensor | None = None
    ) -> Tensor:
        """One causal pass without a cache.

        Args:
            embeds: ``[rows, tokens, width]``.
            mask: ``[rows, tokens]`` bool, real tokens.
            positions: ``[rows, tokens]``; default `positions(mask)`.
            text: ``[rows, tokens]`` bool, where the input is text rather than memory; default everywhere real.

        Returns:
            Final hidden states ``[rows, tokens, width]`` (after the final norm and OPT's output projection).
        """
        return self.run_cached(embeds, mask, positions=positions, text=text, keep=False)[0]

    @contextmanager
    def reusing(self) -> Iterator[None]:
        """Inside, a pass that begins with the inputs of an earlier one computes only the rest. Not for gradients."""
        outer = self._passes
        self._passes = outer or Passes()
        try:
            yield
        finally:
            self._passes = outer

    @contextmanager
    def watched(self, told: Callable[[], None] | None = None) -> Iterator[list[Tensor]]:
        """Inside, every call of `head` adds to the list whether its logits are sound, a bool on the device.

        NaN and +inf are not, nor is nothing but −inf; of a hidden entry of the vocabulary −inf is as it should be.

        Args:
            told: called at every call of `head`, that is for every token that is written.
        """
        outer, told_before = self._finite, self._told
        self._finite, self._told = [], told
        try:
            yield self._finite
        finally:
            self._finite, self._told = outer, told_before

    def resume(
        self, embeds: Tensor, places: tuple[Tensor, ...], context: tuple[State, ...] = (), *, limit: int | None = None
    ) -> Resumed:
        """Begin a causal pass over the layers; inside `reusing`, where an earlier pass with the same inputs ended.

        Args:
            embeds: ``[rows, tokens, width]``.
            places: ``[rows, tokens]`` each: everything else that a token enters with.
            context: everything that all tokens read. The same objects must mean the same loop over the layers.
            limit: compute all tokens from this one on anyway.
        """
        # The key shift looks one token back, so that token runs again.
        overlap = int(bool(self.key_shift))
        return Resumed(Pass(embeds, places, context), self._passes, overlap=overlap, limit=limit)

    def run_cached(
        self,
        embeds: Tensor,
        mask: Tensor,
        past: Past | tuple[Past, ...] | None = None,
        *,
        positions: Tensor | None = None,
        text: Tensor | None = None,
        keep: bool = True,
    ) -> tuple[Tensor, Past | None]:
        """`run` over cached keys and values; also returns this input's own entries (None unless `keep`).

        `positions` must be given with a `past`: keys are rotated to ``past.positions``, queries to `positions`. Several
        pasts are read in order; they are joined one layer at a time, so a long one need not be copied to grow.
        """
        pasts = () if past is None else (past,) if isinstance(past, Past) else past
        where = self.positions(mask) if positions is None else positions
        text = mask if text is None else text & mask
        resumed = self.resume(embeds, (where, mask, text), pasts)
        first = resumed.first
        keys_at = torch.cat([*(p.positions for p in pasts), where], dim=1) if pasts else where
        visible = added(self.visible(mask, pasts, first, positions=where), self.dtype)
        turn, turn_keys = self.rotation(where[:, first:], queries=True), self.rotation(keys_at)
        hidden = self.begin(embeds[:, first:], where[:, first:])
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for layer in range(self.layers):
            q, k, v = self.project(layer, self.norm_input(layer, hidden), text[:, first:])
            k, v = resumed.join(k, v)
            if keep:
                keys.append(k)
                values.append(v)
            if pasts:
                k = torch.cat([*(p.keys[layer] for p in pasts), k], dim=2)
                v = torch.cat([*(p.values[layer] for p in pasts), v], dim=2)
            k = self.rotate(k, turn_keys[layer], spent=bool(pasts))
            attended = self.attend(self.rotate(q, turn[layer]), k, v, visible[layer])
            hidden = self.close(layer, hidden, attended)
        hidden = resumed.finish(self.end(hidden))
        return hidden, Past(tuple(keys), tuple(values), mask, where) if keep else None

    def visible(
        self, mask: Tensor, pasts: tuple[Past, ...] = (), first: int = 0, *, positions: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """Who sees whom, per layer: ``[rows, 1, tokens, cached + tokens]`` bool; None: plain causal attention.

        With `first`, only the tokens from there on look. Sliding windows are measured in `positions` ``[rows, tokens]``
        (default: `positions(mask)`) and those of the past.
        """
        tokens, seen = mask.shape[1], None
        if pasts or first or not bool(mask.all()):
            own = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril() & mask[:, None, :]
            own = itself(own)
            seen = torch.cat([*(p.mask[:, None, :].expand(-1, tokens, -1) for p in pasts), own], dim=2)
        where = self.positions(mask) if positions is None else positions
        return self.windowed(seen, where, torch.cat([*(p.positions for p in pasts), where], dim=1), first)

    def windowed(
        self, seen: Tensor | None, where: Tensor, keys_at: Tensor, first: int = 0
    ) -> tuple[Tensor | None, ...]:
        """What `visible` answers, of a mask `seen` ``[rows, tokens, keys]`` bool (None: plain causal) without windows.

        `where` ``[rows, tokens]`` and `keys_at` ``[rows, keys]`` are positions; the last keys are the queries' own.
        """
        whole = None if seen is None else seen[:, None, first:]
        # Where all positions lie closer together than a window is long, it hides nothing: no mask, no slower kernel.
        span = int(keys_at.max() - keys_at.min()) if any(self.windows) and keys_at.numel() else 0
        made: dict[int | None, Tensor | None] = {None: whole}
        for window in self.windows:
            if window is not None and window not in made:
                near = where[:, :, None] - keys_at[:, None, :] < window
                tokens = near.shape[1]
                near &= near.new_ones(tokens, tokens).tril() if seen is None else seen
                made[window] = itself(near)[:, None, first:] if window <= span else whole
        return tuple(made[window] for window in self.windows)

    def flops(self, tokens: int, keys: int, *, predicted: int | None = None) -> int:
        """Forward operations of `tokens` positions that each attend `keys` keys (multiply-add = 2).

        Attention is counted as executed, without halving for causality. `predicted` positions (default: all) pay for
        the head. Norms, softmax and activations are left out, as in `torch.utils.flop_counter`.
        """
        inside = sum(self.layer_flops(layer, tokens, keys) for layer in range(self.layers))
        outside: int = sum(
            p.numel()
            for name in ("project_in", "project_out")
            for p in (getattr(self._decoder, name, None) or nn.Identity()).parameters()
        )
        scored = tokens if predicted is None else predicted
        return inside + 2 * tokens * outside + 2 * scored * self.width * self.vocab
