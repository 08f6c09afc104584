"""What an execution block of InfLLM or EM-LLM sees before blocks are chosen: its window, sinks, pending tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from memory_bench.backbone.layers import Rotation, itself
from memory_bench.backbone.model import Backbone

from .block_options import BlockOptions
from .block_store import BlockStore
from .execution import Execution


@dataclass(frozen=True, slots=True)
class Sight:
    """What an execution block may see of the store, the same in all layers but for rotation and windows."""

    mask: Tensor  # [rows, tokens] bool, on the device
    where: Tensor  # [rows, tokens], positions
    past: Tensor  # [rows, past], tokens of the window
    fixed: Tensor  # [rows, sinks + pending], tokens that are far and not chosen
    near_seen: tuple[Tensor | None, ...]  # per layer [rows, 1, tokens, past + tokens]
    fixed_seen: Tensor  # [rows, 1, tokens, sinks + pending]
    starts: Tensor  # [rows, blocks]
    sizes: Tensor  # [rows, blocks]
    turn: tuple[Rotation | None, ...]  # queries that look at the window
    turn_keys: tuple[Rotation | None, ...]
    turn_far: tuple[Rotation | None, ...]  # queries that look further
    turn_zero: tuple[Rotation | None, ...]  # keys there

    @classmethod
    def of(
        cls, backbone: Backbone, options: BlockOptions, store: BlockStore, part: Execution, pending_width: int
    ) -> "Sight":
        """What `part` sees of `store` before it is written; `pending_width`: places for far pending tokens."""
        window, device = options.local_window, backbone.device
        read, tokens = store.host_read[:, None], part.mask.sum(dim=1, keepdim=True)
        new = torch.arange(part.mask.shape[1])
        length = min(window, int(read.max()))
        past = read - length + torch.arange(length)
        where = read.clamp(max=window) + new
        keys_at = torch.cat([(past - (read - window).clamp(min=0)).clamp(min=0), where], dim=1)
        distance = where[:, :, None] - keys_at[:, None, :]
        seen = (distance >= 0) & (distance < window) & torch.cat([past >= 0, part.mask], dim=1)[:, None]
        seen = itself(seen)
        # Far tokens that need no choice: sinks, and pending ones that have left the window of the last token at least.
        first = store.pending_start[:, None]
        left = (read + tokens - window - first).clamp(min=0).minimum(read - first)
        pending = first + torch.arange(pending_width)
        sinks = torch.arange(int(store.host_sinks.max())).expand(len(read), -1)
        fixed_seen = torch.cat([sinks < store.host_sinks[:, None], torch.arange(pending_width) < left], dim=1)[:, None]
        fixed = torch.cat([sinks, pending], dim=1)
        if options.far_mask == "exact":
            apart = (read + new)[:, :, None] - fixed[:, None]
            fixed_seen = fixed_seen & (apart >= window)
        else:
            fixed_seen = fixed_seen.expand(-1, len(new), -1)
        last = max(0, store.keys[0].shape[2] - 1)
        where, keys_at, mask = where.to(device), keys_at.to(device), part.mask.to(device)
        return cls(
            mask=mask,
            where=where,
            past=past.clamp(min=0).to(device),
            fixed=fixed.clamp(max=last).to(device),
            near_seen=backbone.windowed(seen.to(device), where, keys_at),
            fixed_seen=fixed_seen[:, None].to(device),
            starts=store.host_starts.to(device),
            sizes=store.host_sizes.to(device),
            turn=backbone.rotation(where, queries=True),
            turn_keys=backbone.rotation(keys_at),
            turn_far=backbone.rotation(torch.full_like(where[:1, :1], window - 1), queries=True),
            turn_zero=backbone.rotation(torch.zeros_like(where[:1, :1])),
        )
