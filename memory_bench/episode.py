"""What a task gives to the driver: streams of text to read and questions to ask about it.

Language modelling is one scored `Read` per document; question answering is unscored reads and an `Ask`; retention is
the same `Ask` after more and more text. A task is an iterator of episodes and a pure function from what was observed
to metrics, so metrics can be computed again from ``samples.parquet`` without a model.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from memory_bench.data.documents import Document

if TYPE_CHECKING:
    import pandas as pd

    from memory_bench.corpus import Corpus
    from memory_bench.data import Library, Source

__all__ = [
    "Ask", "Decode", "Document", "Encode", "Episode", "Estimate", "Read", "Task", "TrainingPlan"
]  # fmt: skip

Encode = Callable[[str], tuple[list[int], list[int]]]
"""Text to (token ids, UTF-8 bytes each token covers); no special tokens are added."""
Decode = Callable[[list[int]], str]
"""Token ids to text, special tokens left out."""


@dataclass(frozen=True, slots=True)
class Read:
    """Text that goes into memory.

    Attributes:
        text: what is read.
        scored: each of its tokens but the stream's first is predicted and scored.
        tag: a name by which a question says that its answer is here; several texts may share it.
        tokens: how many tokens of `text` are read at most, whatever the tokenizer; 0: all of it.
        lead: where `text` has fewer than `tokens`, the end of this is read before it, so that both have as many. It is
            no evidence.
        anew: a text of its own begins here; otherwise `text` goes on with what was read before, and is encoded so.
    """

    text: str
    scored: bool = False
    tag: str = ""
    tokens: int = 0
    lead: str = ""
    anew: bool = False


@dataclass(frozen=True, slots=True)
class Ask:
    """A question about what was read; it leaves no trace in the stream.

    With choices, the answer is the likeliest of them. Without, the model writes one greedily, and the log-likelihood of
    the right one is measured besides.

    Attributes:
        prompt: text before the answer, given to the model.
        choices: the possible continuations; each is scored by its log-likelihood. Empty: the answer is generated.
        answer: the right one, as it would continue the prompt (with its leading blank).
        evidence: tag of the `Read` that holds the answer (the driver measures the distance to the end of the last one).
        label: anything the metrics want to know, for example a group.
        max_tokens: tokens to generate without choices (more, if the right answer has more).
        accepted: texts that count as the answer where it is generated; empty: only `answer`.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: str
    evidence: str = ""
    label: str = ""
    max_tokens: int = 0
    accepted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Episode:
    """One stream. `cluster` names what its questions share (a document); the bootstrap draws clusters.

    With `begun` it starts with the special tokens that the backbone's tokenizer itself puts before a text (BOS).
    """

    id: str
    events: tuple[Read | Ask, ...]
    cluster: str = ""
    begun: bool = False


@dataclass(frozen=True, slots=True)
class Estimate:
    """One number of a result with its 95 % interval.

    Attributes:
        metric: name, for example ``bits_per_byte``.
        value, low, high: the number and its interval; low and high are None where none can be given.
        n: how many independent units (documents, questions) it rests on.
        slice: empty for the headline, else for example ``position=0-256`` or ``control:wiped``.
        unit: unit of `value`.
        higher_is_better: direction.
        note: what the number is if it is no plain estimate, for example ``h > 32768``.
    """

    metric: str
    value: float
    low: float | None
    high: float | None
    n: int
    slice: str = ""
    unit: str = ""
    higher_is_better: bool = True
    note: str = ""


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """What models are trained on for a task.

    Attributes:
        corpus: name; trainings with the same corpus, recipe and backbone are shared between tasks.
        recipe: name of the recipe (`memory_bench.recipe`); None: the backbone's own.
        backbone: a backbone that belongs to the data and replaces the chosen one (a stand-in's own small model).
    """

    corpus: str
    recipe: str | None = None
    backbone: str | None = None
    version: int = 1


class Task(ABC):
    """A task plug-in: an entry point in ``memory_bench.tasks`` names the class.

    The constructor takes an instance of `Config` (frozen dataclass, plain data). Class attributes:

    Attributes:
        Config: options of the task.
        version: raised when numbers may change.
        headline: the metric of the leaderboard.
        needs: name of the data it is about, for `list tasks` and preflight; empty: `data` says where it has its own.
        beside: names of further data that its texts are made of.
        chance: reference levels printed beside the headline, name to value (for example chance and majority).
    """

    Config: ClassVar[type[Any]]
    version: ClassVar[int] = 1
    headline: ClassVar[str]
    needs: ClassVar[str]
    beside: tuple[str, ...] = ()
    source: ClassVar[str] = ""

    @abstractmethod
    def episodes(self, library: "Library", limit: int | None) -> Iterator[Episode]:
        """The test episodes, the same for every model and seed."""

    @abstractmethod
    def plan(self, library: "Library", *, pretrained: bool) -> TrainingPlan:
        """What to train on; `pretrained` tells that the backbone has seen other data before."""

    @abstractmethod
    def corpus(self, library: "Library", plan: TrainingPlan, encode: Encode) -> "Corpus":
        """The training data of `plan`, encoded."""

    @abstractmethod
    def metrics(self, samples: "pd.DataFrame", seed: int = 0) -> list[Estimate]:
        """All metrics and slices of one or more cells' samples; the headline comes first.

        Args:
            samples: columns as `memory_bench.driver.stream` writes them; several seeds are told apart by ``seed``.
            seed: of the bootstrap.
        """

    def data(self, library: "Library") -> "Source":
        """Where the episodes come from: label and revision enter the cell. Default: the source of `needs`."""
        return library.source(self.needs)

    def correct(self, samples: "pd.DataFrame") -> "pd.Series[float]":
        """1.0 for every question of `samples` that was answered rightly, for pairs, lift and half-life."""
        return (samples["predicted"] == samples["answer"]).astype(float)

    def headline_rows(self, samples: "pd.DataFrame") -> "pd.DataFrame":
        """The rows of `samples` that the headline counts, controls included; pairing and verdicts use the same."""
        return samples

    def levels(self, library: "Library") -> Mapping[str, float]:
        """Reference levels of the headline, for example chance and the majority class."""
        return {}
