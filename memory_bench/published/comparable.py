"""May one of our numbers be compared with a published one, and if so, does it agree?

Both answers are pure functions of two values. The first reason in the order of `REASONS` that keeps a pair from being
compared is the answer; only where none holds is anything said about agreement. What a source does not say counts as
different: a match must be known, not assumed.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from memory_bench.published.reported import Reported

Kind = Literal["reproduced", "within interval", "differs", "not comparable"]

SAME = 0.1
"""Lengths and tokens of training that differ by at most this share count as the same; cuts are never equal."""

BAND = 0.03
"""Of a published perplexity or bits: two tables of one paper differ by as much for one model on the same data."""

POINTS = 0.02
"""Of a published share: re-runs of one method on the same questions differ by one or two points."""

SHARES = ("accuracy", "raw_hit")

# Our metrics, and the published ones beside which they may stand: by which unit, and how the definitions differ.
METRICS: dict[str, dict[str, str]] = {
    "ppl_token": {"ppl/per token": ""},
    "ppl_word": {"ppl/per word": "theirs counts words of a fixed vocabulary, ours tokens that make up words"},
    "accuracy": {
        "accuracy": "",
        "exact_match": "theirs wants the generated answer to be equal",
        "exact_hit": "theirs looks for the answer letter by letter, ours for its words",
    },
    "raw_hit": {"exact_hit": ""},
}
# Tasks whose accuracy is another than that of the papers, whatever it is called.
ANSWERS = {"babi": "answers are generated there and chosen by likelihood here"}

TOKENIZERS = (
    ("opt", "GPT-2 BPE"), ("gpt2", "GPT-2 BPE"), ("gptj", "GPT-2 BPE"), ("openllama", "OpenLlama SentencePiece"),
    ("llama2", "Llama 2 SentencePiece"), ("llama3", "Llama 3 BPE"), ("mistral", "Mistral SentencePiece"),
    ("yi", "Yi BPE"), ("qwen", "Qwen BPE"), ("smollm2", "SmolLM2 BPE"), ("smollm", "SmolLM BPE"),
)  # fmt: skip
"""Backbones, by how their names begin (see `plain_name`), and their tokenizers as the registry calls them."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A number of ours with what a published one must share with it.

    Attributes:
        label, model: of the row; the plug-in.
        task, data, split: of the board; the label names a stand-in; ``test``, or which part of it.
        metric, slice: of the number.
        value, low, high, spread: the number, its 95 % interval, its standard deviation between seeds.
        backbone: name, folder or hub id.
        contexts: how much text, in every way in which it can be said: ``1024 tokens``, ``2 steps``, ``documents``.
        segment, options: of the model.
        trained_on, train_tokens: corpus, ``nothing``, or ``checkpoint NAME``; tokens read in training.
        status, learned, pretrained: what became of the row; what training taught its memory; the checkpoint it is.
        look_ahead: tokens past the predicting position that a prediction could see.
    """

    label: str
    model: str
    task: str
    data: str
    split: str
    metric: str
    value: float
    low: float | None
    high: float | None
    backbone: str
    slice: str = ""
    spread: float | None = None
    contexts: tuple[str, ...] = ()
    segment: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    trained_on: str = ""
    train_tokens: int | None = None
    status: str = "ok"
    learned: str = "learned"
    pretrained: str = ""
    look_ahead: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a number of ours stands to a published one; `passed` counts the reasons against comparing that do not hold.

    Of several pairs, the one with most `passed` is the nearest to a comparison.
    """

    kind: Kind
    why: str = ""
    passed: int = 0

    def __str__(self) -> str:
        return f"{self.kind} ({self.why})" if self.why else self.kind


def judge(published: Reported, ours: Measured, rivals: Sequence[Reported] = ()) -> Verdict:
    """The verdict on one pair.

    Args:
        published: a number whose metric stands beside ours, see `beside`.
        ours: the number.
        rivals: what the same table gives for other models in the same setting, see `rivals_of`.

    Returns:
        ``differs`` where our interval, widened by what is not in it (how exactly the source was read, and twice the
        standard deviation between trainings), does not hold the published value. ``reproduced`` where it does, where
        our value lies within the tolerance band (`BAND`, `POINTS`) around it, and where the interval also tells models
        apart: it holds no rival's value or, without rivals, reaches no further than the band. Otherwise ``within
        interval``, which is agreement for want of evidence.
    """
    for passed, reason in enumerate(REASONS):
        if why := reason(published, ours):
            return Verdict("not comparable", why, passed)
    assert ours.low is not None
    assert ours.high is not None
    low, high, theirs = ours.low, ours.high, scaled(published, ours.metric)
    slack = scaled_by(published, ours.metric) * published.precision
    slack += 2 * max(ours.spread or 0.0, scaled_by(published, ours.metric) * (published.sd or 0.0))
    band = POINTS if ours.metric in SHARES else BAND * theirs

    def holds(value: float) -> bool:
        return low - slack <= value <= high + slack

    if not holds(theirs):
        return Verdict("differs", "", len(REASONS))
    others = [r for r in rivals if holds(scaled(r, ours.metric))]
    decides = not others if rivals else max(high - ours.value, ours.value - low) <= band
    if decides and abs(ours.value - theirs) <= band:
        return Verdict("reproduced", "", len(REASONS))
    why = f"the interval also holds {others[0].model}, {others[0].shown}" if others else "the interval is wide"
    return Verdict("within interval", why if not decides else "outside the tolerance band", len(REASONS))


def beside(published: Reported, metric: str) -> bool:
    """Whether a published number is of the same quantity as our `metric`, definitions aside."""
    named = METRICS.get(metric, {})
    return published.value is not None and (
        published.metric in named or f"{published.metric}/{published.unit}" in named
    )


def rivals_of(published: Reported, rows: Sequence[Reported]) -> tuple[Reported, ...]:
    """Other models in the same cell of the same table, further away than the source's numbers are exact."""

    def cell(row: Reported) -> tuple[object, ...]:
        return (
            row.source,
            row.where,
            row.data,
            row.metric,
            row.unit,
            row.split,
            row.context,
            row.backbone,
            row.segment,
        )

    assert published.value is not None
    mine = cell(published)
    return tuple(
        r for r in rows
        if r.model != published.model and r.value is not None and cell(r) == mine
        and abs(r.value - published.value) > r.precision + published.precision
    )  # fmt: skip


def scaled_by(published: Reported, metric: str) -> float:
    """What turns the published unit into ours."""
    return 0.01 if metric in SHARES and published.unit == "percent" else 1.0


def scaled(published: Reported, metric: str) -> float:
    """The published value in our unit."""
    assert published.value is not None
    return published.value * scaled_by(published, metric)


def plain_name(backbone: str) -> str:
    """A backbone's name without owner, case, hyphens and the like: ``meta-llama/Llama-2-7b-hf`` is ``llama27b``."""
    name = re.sub(r"[^a-z0-9]", "", backbone.rstrip("/").split("/")[-1].lower().removesuffix("-hf"))
    name = name.removeprefix("meta")
    return {"openllama3bv2": "openllamav23b"}.get(name, name)


def tokenizer_of(backbone: str) -> str:
    """The tokenizer of a backbone of ours; its name where the registry knows none like it."""
    plain = plain_name(backbone)
    return next((tokenizer for start, tokenizer in TOKENIZERS if plain.startswith(start)), plain)


def _stand_in(published: Reported, ours: Measured) -> str:
    return "stand-in data" if "(stand-in" in ours.data else ""


def _second_hand(published: Reported, ours: Measured) -> str:
    return "" if published.confidence == "verified" else f"{published.confidence} source"


def _tokenizer(published: Reported, ours: Measured) -> str:
    if not ours.metric.startswith("ppl"):
        return ""
    mine = "words" if ours.metric == "ppl_word" else tokenizer_of(ours.backbone)
    same = published.tokenizer == mine
    return "" if same else f"other tokenizer: {published.tokenizer or 'not said'}"


def _backbone(published: Reported, ours: Measured) -> str:
    names = {plain_name(published.backbone), plain_name(published.trained_on.removeprefix("checkpoint "))}
    return "" if plain_name(ours.backbone) in names else f"other backbone: {published.backbone or published.model}"


def _split(published: Reported, ours: Measured) -> str:
    return "" if published.split == ours.split else f"other part of the data: {published.split or 'not said'}"


def _segment(published: Reported, ours: Measured) -> str:
    if ours.model == "full-context" or published.segment == ours.segment:
        return ""
    return f"segment {f'{published.segment:,}' if published.segment else 'not said'}, not {ours.segment}"


def _length(published: Reported, ours: Measured) -> str:
    same = any(same_length(published.context, mine) for mine in ours.contexts)
    return "" if same else f"{published.context or 'length not said'}, not {ours.contexts[0] if ours.contexts else '?'}"


def _memory(published: Reported, ours: Measured) -> str:
    if ours.model in ("truncation", "full-context"):
        return ""
    theirs = published.options()
    if not theirs:
        return f"memory: {published.memory or 'not said'}"
    for name, value in theirs.items():
        mine = ours.options.get(name)
        mine = ours.segment if mine is None else mine  # the length of a cache that is not given is that of a segment
        if str(mine).lower() != value:
            return f"{name} {value}, not {mine}"
    return ""


def _training(published: Reported, ours: Measured) -> str:
    if published.trained_on != ours.trained_on:
        return f"trained on {published.trained_on or 'what is not said'}, not {ours.trained_on or '?'}"
    if ours.trained_on == "nothing" or ours.trained_on.startswith("checkpoint "):
        return ""
    if published.train_tokens is None or ours.train_tokens is None:
        return "length of training not said"
    close = abs(published.train_tokens - ours.train_tokens) <= SAME * published.train_tokens
    return "" if close else f"{published.train_tokens:,} tokens of training, not {ours.train_tokens:,}"


def _row(published: Reported, ours: Measured) -> str:
    if ours.status != "ok":
        return f"ours: {ours.status.replace('_', ' ')}"
    if ours.low is None or ours.high is None:
        return "ours: no interval"
    if ours.pretrained and published.trained_on != ours.trained_on:
        return "ours: pretrained"
    return f"ours: {ours.learned}" if ours.learned.startswith("not learned") else ""


def _definition(published: Reported, ours: Measured) -> str:
    if published.void:
        return "theirs is no measurement of this"
    named = METRICS[ours.metric]
    other = named.get(published.metric) or named.get(f"{published.metric}/{published.unit}", "")
    return other or (ANSWERS.get(ours.task, "") if ours.metric == "accuracy" else "")


def _look_ahead(published: Reported, ours: Measured) -> str:
    if published.look_ahead is None or published.look_ahead == bool(ours.look_ahead):
        return ""
    return "theirs looks ahead" if published.look_ahead else "ours looks ahead"


REASONS: tuple[Callable[[Reported, Measured], str], ...] = (
    _stand_in, _second_hand, _tokenizer, _backbone, _split, _segment, _length, _memory, _training, _row, _definition,
    _look_ahead,
)  # fmt: skip
"""Why a pair cannot be compared, in the order in which it is said; each gives a sentence or nothing."""


def same_length(theirs: str, mine: str) -> bool:
    """Two lengths in words: equal, or in the same unit and no further apart than `SAME`."""
    a, b = parse_length(theirs), parse_length(mine)
    if a is None or b is None:
        return bool(theirs) and theirs == mine
    return a[1] == b[1] and abs(a[0] - b[0]) <= (SAME * a[0] if a[1] == "token" else 0)


def parse_length(text: str) -> tuple[float, str] | None:
    """Number and unit of ``30k tokens`` or ``2 steps``; None for anything else."""
    found = re.fullmatch(r"([\d.]+)(k|M|) (token|step|context)s?", text)
    return (float(found[1]) * {"": 1, "k": 1e3, "M": 1e6}[found[2]], found[3]) if found else None
