"""M+'s long-term memory: a store of dropped pool rows per layer, kept on the host, and its retriever."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from memory_bench.state import State


@dataclass(frozen=True, slots=True)
class Store(State):
    """Entries of every layer, in the order in which they came; all tensors are on the host.

    Attributes:
        tokens: per layer ``[rows, entries, width]``.
        keys: per layer ``[rows, entries, retriever width]``.
        ages: per layer ``[rows, entries]`` int64, in memory tokens written.
        frequencies: per layer ``[rows, entries]`` float64; an entry dies when decay has used its frequency up.
        counts: ``[rows, layers]`` int64; tensors may be filled up behind them where rows are not in step.
    """

    tokens: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    ages: tuple[Tensor, ...]
    frequencies: tuple[Tensor, ...]
    counts: Tensor

    @classmethod
    def of(cls, parts: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], rows: int) -> "Store":
        """A store of (tokens, keys, ages, frequencies) per layer."""
        tokens, keys, ages, frequencies = (tuple(column) for column in zip(*parts, strict=True))
        counts = torch.tensor([[a.shape[1] for a in ages]], dtype=torch.int64).expand(rows, -1)
        return cls(tokens, keys, ages, frequencies, counts)

    def layer(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(tokens, keys, ages, frequencies) of a layer."""
        return self.tokens[layer], self.keys[layer], self.ages[layer], self.frequencies[layer]

    def in_step(self) -> "Store":
        """The same without filling, for rows with equal counts."""
        counts = self.counts[0].tolist()
        if all(ages.shape[1] == n for ages, n in zip(self.ages, counts, strict=True)):
            return self
        parts = [tuple(t[:, :n] for t in self.layer(layer)) for layer, n in enumerate(counts)]
        return Store.of(cast(list[tuple[Tensor, Tensor, Tensor, Tensor]], parts), len(self.counts))

    def append(self, new: "Store") -> "Store":
        """These entries, then `new`'s."""
        pairs = zip(range(len(self.ages)), range(len(new.ages)), strict=True)
        parts = [
            tuple(torch.cat([a, b], dim=1) for a, b in zip(self.layer(i), new.layer(j), strict=True)) for i, j in pairs
        ]
        return Store.of(cast(list[tuple[Tensor, Tensor, Tensor, Tensor]], parts), len(self.counts))

    def older(self, by: int) -> "Store":
        """Every age grown."""
        return Store(self.tokens, self.keys, tuple(a + by for a in self.ages), self.frequencies, self.counts)

    def decayed(self, decay: float, at_least: int) -> "Store":
        """Frequencies lowered by `decay`, entries at 0.01 or below removed, in layers that keep more than `at_least`.

        In other layers nothing changes. Rows in step have equal frequencies, so the first row decides for all.
        """
        parts = []
        for layer in range(len(self.ages)):
            tokens, keys, ages, frequencies = self.layer(layer)
            lowered = frequencies - decay
            alive = lowered[0] > 0.01
            if int(alive.sum()) > at_least:
                tokens, keys, ages, frequencies = tokens[:, alive], keys[:, alive], ages[:, alive], lowered[:, alive]
            parts.append((tokens, keys, ages, frequencies))
        return Store.of(parts, len(self.counts))


def pick(tokens: Sequence[Tensor], index: Tensor) -> Tensor:
    """Rows `index` ``[rows, n]`` of `tokens` (each ``[rows, entries, width]``) as if concatenated."""
    picked = tokens[0].new_zeros(*index.shape, tokens[0].shape[-1])
    for part in tokens:
        here = (index >= 0) & (index < part.shape[1])
        if part.shape[1]:
            found = part.gather(1, index.clamp(0, part.shape[1] - 1)[..., None].expand(-1, -1, part.shape[2]))
            picked = torch.where(here[..., None], found, picked)
        index = index - part.shape[1]
    return picked


def oldest_first(ages: Tensor) -> Tensor:
    """Order ``[rows, n]`` by age, descending; of equal ages the later one first (a reversed stable ascending sort)."""
    return ages.argsort(dim=1, stable=True).flip(1)


def relevance(queries: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """Mean over the queries of sigmoid(query . key): ``[rows, entries]`` float32.

    Args:
        queries: ``[rows, tokens, retriever width]``.
        weights: ``[rows, tokens]``, 1 for tokens that ask and 0 for others; at least one 1 a row.
        keys: ``[rows, entries, retriever width]``.
    """
    weights = weights.float()
    share = (weights / weights.sum(dim=1, keepdim=True))[:, None]
    # Scores that leave the CPU's cache cost several times what they take to compute.
    at_once = max(1, (1 << (18 if keys.device.type == "cpu" else 24)) // max(1, queries.shape[0] * queries.shape[1]))
    parts = [share @ torch.sigmoid((queries @ k.transpose(1, 2)).float()) for k in keys.split(at_once, dim=1)]
    return torch.cat(parts, dim=2)[:, 0]


class Projection(nn.Sequential):
    """Linear, or Linear - SiLU - Linear with twice the width inside; no biases."""

    def __init__(self, width: int, out: int, layers: int, rng: torch.Generator) -> None:
        inside = [(width, out)] if layers == 1 else [(width, 2 * out), (2 * out, out)]
        modules: list[nn.Module] = []
        for inputs, outputs in inside:
            linear = nn.Linear(inputs, outputs, bias=False, device="meta")  # no draw from the global generator
            weight = (torch.rand(outputs, inputs, generator=rng) * 2 - 1) * inputs**-0.5
            linear.weight = nn.Parameter(weight)
            modules += [nn.SiLU(), linear] if modules else [linear]
        super().__init__(*modules)


class LayerRetriever(nn.Module):
    """Projections of one layer: of text (`query`), of memory rows (`key`), of the newest block (`encoder_query`)."""

    def __init__(self, width: int, out: int, layers: int, rng: torch.Generator) -> None:
        super().__init__()
        self.query = Projection(width, out, layers, rng)
        self.key = Projection(width, out, layers, rng)
        self.encoder_query = Projection(width, out, layers, rng)


class Retriever(nn.Module):
    """One `LayerRetriever` a layer: ``layers.0.query.0.weight`` and so on."""

    def __init__(self, depth: int, width: int, out: int, layers: int, rng: torch.Generator) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LayerRetriever(width, out, layers, rng) for _ in range(depth))

    def at(self, layer: int) -> LayerRetriever:
        """The projections of a layer."""
        return cast(LayerRetriever, self.layers[layer])


class StartingStore(nn.Module):
    """The entries that a loaded model starts with: buffers ``layers.0.tokens`` and so on."""

    def __init__(self, sizes: Sequence[int], width: int, key_width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for size in sizes:
            entries = nn.Module()
            entries.register_buffer("tokens", torch.zeros(size, width, dtype=dtype))
            entries.register_buffer("keys", torch.zeros(size, key_width, dtype=dtype))
            entries.register_buffer("ages", torch.zeros(size, dtype=torch.int64))
            entries.register_buffer("recall_frequencies", torch.zeros(size))
            self.layers.append(entries)

    def open(self, rows: int) -> Store:
        """The entries as a store of `rows` rows, on the host."""
        parts = []
        for entries in self.layers:
            names = ("tokens", "keys", "ages", "recall_frequencies")
            tokens, keys, ages, frequencies = (cast(Tensor, getattr(entries, name)).cpu() for name in names)
            columns = (tokens, keys, ages, frequencies.double())
            parts.append(tuple(t.expand(rows, *t.shape) for t in columns))
        return Store.of(cast(list[tuple[Tensor, Tensor, Tensor, Tensor]], parts), rows)
