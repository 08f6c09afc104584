"""What `adapters.py` times: a memory model and its bare backbone on the same tokens."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from memory_bench.corpus import Line
from memory_bench.driver.stream import score, walk
from memory_bench.protocol import MemoryModel, Segment

QUESTION = 64  # tokens
ASKS = 8  # times a question is read per measurement


@dataclass(frozen=True)
class Search:
    """What a model searches in every segment, in `layers` layers.

    `queries` are multiplied with keys of `width`, and the best `k` keys are found for `ranked` rows (all queries, or
    one where the scores of all queries are averaged). There is a key for every `tokens_per_key` tokens read before,
    beside `loaded` ones; `most` in all.
    """

    queries: int
    width: int
    k: int
    ranked: int
    most: int
    loaded: int = 0
    tokens_per_key: int = 1
    layers: int = 1

    def keys(self, before: int) -> int:
        """Keys after `before` tokens."""
        return min(self.most, self.loaded + before // self.tokens_per_key)

    def flops(self, befores: Sequence[int]) -> int:
        """Operations of the products in segments after so many tokens each."""
        return 2 * self.layers * self.queries * self.width * sum(self.keys(before) for before in befores)

    def call(self, befores: Sequence[int]) -> Callable[[], object]:
        """Plain searches of these shapes, one for each of `befores`."""
        rng = torch.Generator().manual_seed(5)
        queries, keys = (torch.randn(n, self.width, generator=rng) for n in (self.queries, self.most))

        def search() -> None:
            for before in befores:
                for _ in range(self.layers):
                    found = keys[: self.keys(before)]
                    (queries @ found.T)[: self.ranked].topk(min(self.k, len(found)), dim=-1)

        return search


def llama(hidden: int = 256, layers: int = 8, vocab: int = 4096) -> torch.nn.Module:
    """The random backbone of all measurements, seed 0."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=vocab,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


class Bare:
    """The Hugging Face model over independent segments."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model: Any = model

    def loss(self, ids: torch.Tensor, length: int) -> torch.Tensor:
        """Mean loss of all tokens but the first; logits are dropped after each segment."""
        total, carry = torch.zeros(()), None
        for part in ids.split(length, dim=1):
            logits = self.model(part, use_cache=False).logits[0]
            before = logits[:-1] if carry is None else torch.cat([carry, logits[:-1]])
            targets = part[0, 1:] if carry is None else part[0]
            total = total + F.cross_entropy(before, targets, reduction="sum")
            carry = logits[-1:]
        return total / (ids.shape[1] - 1)

    def read(self, ids: torch.Tensor, length: int) -> None:
        """Without the head."""
        for part in ids.split(length, dim=1):
            self.model.model(part, use_cache=False)


def line_of(ids: torch.Tensor) -> Line:
    """All tokens scored but the first."""
    scored = torch.ones(ids.shape[1], dtype=torch.bool)
    scored[0] = False
    return Line(ids[0], scored)


def absorbed(model: MemoryModel[Any], state: Any, ids: torch.Tensor) -> Any:
    """The state after `ids` were written."""
    for part in ids.split(model.traits.segment, dim=1):  # type: ignore[arg-type]
        state = model.absorb(state, Segment.full(part))
    return state


def asked(model: MemoryModel[Any], state: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean loss of a text that is read and not written."""
    segment = Segment.full(ids)
    readout, _ = model.step(state, segment, write=False)
    return score(readout, None, segment, line_of(ids).scored[None]).sum() / (ids.shape[1] - 1)


def walked(model: MemoryModel[Any], ids: torch.Tensor) -> torch.Tensor:
    """Mean loss of a stream through the product's driver."""
    total = torch.zeros(())
    for piece in walk(model, [line_of(ids)]):
        total = total + piece.nll.sum()
    return total / (ids.shape[1] - 1)


def tokens_of(count: int, seed: int, vocab: int) -> torch.Tensor:
    """Random ids ``[1, count]``."""
    return torch.randint(3, vocab, (1, count), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Timed:
    """Two calls to compare, the tokens and operations of each, and when the first one searches."""

    model: Callable[[], object]
    bare: Callable[[], object]
    tokens: int
    flops: float
    bare_flops: float
    searches: tuple[int, ...] = ()  # tokens before each search


class Tasks:
    """The calls of every task for a model; see `adapters`.

    Args:
        model: in evaluation mode.
        bare: the same backbone alone.
        stream: tokens of a stream.
        train: tokens of a training step.
        passes: forwards that a training step costs: 3, or 2 where the backbone is frozen.
        writes_first: a training step writes all segments but the last, and predicts that one.
    """

    def __init__(
        self,
        model: MemoryModel[Any],
        bare: Bare,
        stream: int,
        train: int,
        *,
        passes: int = 3,
        writes_first: bool = False,
    ) -> None:
        self.model, self.bare, self.passes, self.writes_first = model, bare, passes, writes_first
        self.length = model.traits.segment or 256
        vocab = model.backbone.vocab
        self.stream_ids, self.train_ids = tokens_of(stream, 1, vocab), tokens_of(train, 2, vocab)
        self.question = tokens_of(QUESTION, 3, vocab)
        self.tasks: dict[str, Callable[[], Timed]] = {
            "stream": self.stream,
            "write and ask": self.write_and_ask,
            "write": self.write,
            "ask": self.ask,
            "train": self.train,
        }

    def alone(self, tokens: int, head: bool = True) -> int:
        """Operations of the backbone over independent segments."""
        backbone, parts = self.model.backbone, [self.length] * (tokens // self.length) + [tokens % self.length]
        return sum(backbone.flops(n, keys=n, predicted=n if head else 0) for n in parts)

    def over(self, tokens: int, cost: Callable[[int, int], int]) -> int:
        """Operations of all segments."""
        return sum(cost(min(self.length, tokens - start), start) for start in range(0, tokens, self.length))

    def peek(self, tokens: int, before: int) -> int:
        """Operations of a step that writes nothing, in a model that writes in a pass of its own."""
        return self.model.flops(tokens, before) - self.model.absorb_flops(tokens, before)

    def stream(self) -> Timed:
        """Predict every token and write every segment."""
        ids, model = self.stream_ids, self.model
        count = ids.shape[1]
        return Timed(
            lambda: walked(model, ids),
            lambda: self.bare.loss(ids, self.length),
            count,
            self.over(count, model.flops),
            self.alone(count),
            searches=tuple(range(self.length, count, self.length)),
        )

    def write_and_ask(self) -> Timed:
        """Write a stream, predict a question."""
        ids, model = self.stream_ids, self.model
        count = ids.shape[1]
        return Timed(
            lambda: asked(model, absorbed(model, model.open(1), ids), self.question),
            lambda: self.bare.loss(ids, self.length),
            count,
            self.over(count, model.absorb_flops) + self.peek(QUESTION, count),
            self.alone(count),
            searches=(count,),
        )

    def write(self) -> Timed:
        """Write a stream."""
        ids, model = self.stream_ids, self.model
        count = ids.shape[1]
        return Timed(
            lambda: absorbed(model, model.open(1), ids),
            lambda: self.bare.read(ids, self.length),
            count,
            self.over(count, model.absorb_flops),
            self.alone(count, head=False),
        )

    def ask(self) -> Timed:
        """Predict a question after a stream."""
        model, count = self.model, self.stream_ids.shape[1]
        state = absorbed(model, model.open(1), self.stream_ids)
        return Timed(
            lambda: [asked(model, state, self.question) for _ in range(ASKS)],
            lambda: [self.bare.loss(self.question, self.length) for _ in range(ASKS)],
            ASKS * QUESTION,
            ASKS * self.peek(QUESTION, count),
            ASKS * self.alone(QUESTION),
            searches=(count,) * ASKS,
        )

    def train(self) -> Timed:
        """Forward and one backward."""
        ids, model = self.train_ids, self.model
        count = ids.shape[1]
        first = count - self.length
        if self.writes_first:
            cost = self.over(first, model.absorb_flops) + self.peek(self.length, first)
        else:
            cost = self.over(count, model.flops)
        backward = (self.passes - 1) * (cost - self.over(count, model.detached_flops))

        def loss() -> torch.Tensor:
            if not self.writes_first:
                return walked(model, ids)
            return asked(model, absorbed(model, model.open(1), ids[:, :first]), ids[:, first:])

        return Timed(
            trained(model, loss),
            trained(self.bare.model, lambda: self.bare.loss(ids, self.length)),
            count,
            cost + backward,
            3 * self.alone(count),
            searches=(first,) if self.writes_first else tuple(range(self.length, count, self.length)),
        )


def trained(module: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], object]:
    """A forward and a backward without old gradients."""

    def step() -> None:
        module.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss().backward()

    return step


def paired(calls: Sequence[Callable[[], object]], repeats: int, clock: Callable[[], float]) -> list[list[float]]:
    """Seconds of each call in each round, after a round to warm up."""
    seconds: list[list[float]] = [[] for _ in calls]
    for round_ in range(repeats + 1):
        order = list(enumerate(calls))
        for i, call in reversed(order) if round_ % 2 else order:
            started = clock()
            call()
            if round_:
                seconds[i].append(clock() - started)
    return seconds


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high
