"""Language modelling on long texts: PG-19's books and WikiText-103's articles.

Unusual here:

- Every token but a document's first is scored once, with whatever the model remembers of the document so far; official
  scripts that score only the last segment of overlapping windows differ.
- The headline is bits per byte, which does not depend on the tokenizer; perplexities stand beside it. Perplexity is
  exp(mean surprisal over all tokens), not the mean of perplexities.
- The training text is the same for both tasks (books), so a model is trained once for both.
"""

import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np
import pandas as pd

from memory_bench.corpus import Corpus, TextCorpus
from memory_bench.data import Library
from memory_bench.episode import Document, Encode, Episode, Estimate, Read, Task, TrainingPlan
from memory_bench.errors import UserError
from memory_bench.finite import check_samples
from memory_bench.statistics.stats import Interval, ratio_interval, scored_units
from memory_bench.zoo.pretrain import encode_documents

CONTROLS = ("wiped", "foreign")
EXCERPTS = 32  # of stand-in works: as many as the data folder has PG-19 test books
FIRST_SLICE = 256  # tokens; slices of the position double from here
LARGEST = math.log(sys.float_info.max)  # of what a float can hold the exponential


def books_corpus(library: Library, encode: Encode) -> Corpus:
    """The training books as running text."""
    return TextCorpus(encode_documents([d.text for d in library.books("train")], encode))


class LanguageModeling(Task):
    """What the language-modelling tasks share: training on books, and the metrics."""

    headline = "bits_per_byte"

    def plan(self, library: Library, *, pretrained: bool) -> TrainingPlan:
        """Books, whatever the backbone has seen."""
        del library, pretrained
        return TrainingPlan("books")

    def corpus(self, library: Library, plan: TrainingPlan, encode: Encode) -> Corpus:
        """See `Task.corpus`."""
        del plan
        return books_corpus(library, encode)

    def metrics(self, samples: pd.DataFrame, seed: int = 0) -> list[Estimate]:
        """Bits per byte, nats per token, perplexities; bits per byte by position and for the controls.

        A scored stretch (a segment) belongs to the position slice its first token is in. Intervals are over documents,
        or over blocks of them where there are fewer than 20; the seeds of a unit are averaged first.
        """
        reads = check_samples(samples)[samples["kind"] == "read"]
        main = reads[reads["control"] == ""]
        if main.empty:
            return []
        parts = [("", main), *self._by_position(main)]
        parts += [(f"control:{c}", reads[reads["control"] == c]) for c in CONTROLS]
        sums = {name: sums_by_unit(part) for name, part in parts if not part.empty}
        found = [_estimate("bits_per_byte", sums[""], "nbytes", seed, "", "bits/byte")]
        found.append(_estimate("nll", sums[""], "tokens", seed, "", "nats/token"))
        found.append(_estimate("ppl_token", sums[""], "tokens", seed, "", "1"))
        if sums[""]["words"].sum() > 0:
            found.append(_estimate("ppl_word", sums[""], "words", seed, "", "1"))
        return found + [
            _estimate("bits_per_byte", part, "nbytes", seed, name, "bits/byte") for name, part in sums.items() if name
        ]

    def _by_position(self, reads: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
        """Slices 0-256, 256-512, 512-1024, … of the token offset, as far as the texts go."""
        slices, low, high = [], 0, FIRST_SLICE
        last = int(reads["start"].max())
        while low <= last:
            inside = reads[(reads["start"] >= low) & (reads["start"] < high)]
            slices.append((f"position={low}-{high}", inside))
            low, high = high, 2 * high
        return slices


def sums_by_unit(reads: pd.DataFrame) -> pd.DataFrame:
    """Sums of surprisal, bytes, tokens and words of every independent unit, averaged over seeds.

    Units are clusters; with fewer than 20 of them episodes (excerpts of a work); with fewer than 20 of those, blocks.

    Raises:
        NotFinite: see `check_samples`.
    """
    check_samples(reads)
    clusters, episodes = reads["cluster"].to_numpy(dtype=str), reads["episode"].to_numpy(dtype=str)
    units = scored_units(clusters, episodes, reads["start"].to_numpy(), reads["tokens"].to_numpy())
    keys = [units, reads["seed"].to_numpy()]
    by_seed = reads[["nll", "nbytes", "tokens", "words"]].groupby(keys).sum()
    return by_seed.groupby(level=0).mean()


def _estimate(metric: str, sums: pd.DataFrame, per: str, seed: int, name: str, unit: str) -> Estimate:
    """Surprisal per byte, token or word with its interval; a perplexity is the exponential of both.

    Where that is larger than a float can be it is no number, and says so: of text without blanks a word is a paragraph.
    """
    interval: Interval = ratio_interval(sums["nll"].to_numpy(), sums[per].to_numpy(), seed=seed)
    value, low, high = (None if v is None else _convert(metric, v) for v in interval)
    assert value is not None
    if math.inf in (low, high):
        low = high = None
    note = f"exp({interval[0]:.1f}), beyond the largest float" if value == math.inf else ""
    return Estimate(metric, math.nan if note else value, low, high, len(sums), name, unit, False, note)


def _convert(metric: str, nats: float) -> float:
    if metric == "bits_per_byte":
        return nats / math.log(2)
    if metric.startswith("ppl"):
        return float(np.exp(nats)) if nats < LARGEST else math.inf
    return nats


class PG19(LanguageModeling):
    """The test books of PG-19, or the stand-in's three test works cut into excerpts."""

    @dataclass(frozen=True, slots=True)
    class Config:
        """Options of the task."""

        # Which part of every book is read: "full", or "bytes:FIRST-LAST" (cut at word borders). A stand-in has three
        # works only: of those, consecutive excerpts of the same length are taken from FIRST on, 32 in all.
        extent: str = "bytes:20000-25100"

        def __post_init__(self) -> None:
            parse_extent(self.extent)

    version = 1
    needs = "books"
    source = "Rae et al. 2020 (arXiv:1911.05507); scored whole, not in windows"

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()

    def episodes(self, library: Library, limit: int | None) -> Iterator[Episode]:
        """One scored document per episode; `limit` counts them. Books that end before the extent are left out."""
        documents = library.books("test")
        extent = parse_extent(self.config.extent)
        if extent is not None:
            first, last = extent
            if library.source("books").stand_in:
                documents = consecutive(documents, first, last, EXCERPTS)
            else:
                documents = [excerpt(d, first, last) for d in documents]
        documents = [d for d in documents if d.text]
        if not documents:
            raise UserError(f"pg19: no book is long enough for extent '{self.config.extent}'.")
        for document in documents[:limit]:
            cluster = document.meta.get("work", document.id)
            yield Episode(document.id, (Read(document.text, scored=True, tag="text"),), cluster)


class WikiText103(LanguageModeling):
    """The test articles of WikiText-103, joined in order and cut into documents of equal length.

    The texts are the official word-level tokens with ``<unk>``; `ppl_word` counts runs of non-blanks and no line ends,
    so it is close to, but not the same as, the word-level perplexity of papers that train on that vocabulary.
    """

    @dataclass(frozen=True, slots=True)
    class Config:
        """Options of the task."""

        # Words in a document; articles are joined and cut to it, as in HMT (2k to 100k tokens). 0: uncut articles.
        words: int = 2000
        # How many documents are taken, spread evenly over the test set; 0: all of them.
        documents: int = 32

        def __post_init__(self) -> None:
            if self.words < 0 or self.documents < 0:
                raise UserError("wikitext103: words and documents must not be negative (0 means no limit).")

    version = 1
    needs = "wikitext103"
    source = "Merity et al. 2017 (arXiv:1609.07843); lengths as in HMT (arXiv:2405.06067)"

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()

    def episodes(self, library: Library, limit: int | None) -> Iterator[Episode]:
        """One scored document per episode; `limit` counts them."""
        documents = library.wikitext("test")
        if self.config.words:
            documents = joined(documents, self.config.words)
        wanted = self.config.documents
        if wanted and wanted < len(documents):
            documents = [documents[i * len(documents) // wanted] for i in range(wanted)]
        for document in documents[:limit]:
            cluster = document.meta.get("work", document.id)
            yield Episode(document.id, (Read(document.text, scored=True, tag="text"),), cluster)


_EXTENT: re.Pattern[str] = re.compile(r"bytes:(\d+)-(\d+)")


def parse_extent(extent: str, task: str = "pg19") -> tuple[int, int] | None:
    """(first, last) byte of ``bytes:FIRST-LAST``; None for ``full``; `task` is named where it is neither.

    Raises:
        UserError: it is neither.
    """
    if extent == "full":
        return None
    match = _EXTENT.fullmatch(extent)
    if match is None or int(match[1]) >= int(match[2]):
        raise UserError(f"{task}: extent is 'full' or 'bytes:FIRST-LAST' with FIRST below LAST, not '{extent}'.")
    return int(match[1]), int(match[2])


def excerpt(document: Document, first: int, last: int) -> Document:
    """The words that lie within bytes `first` to `last` (UTF-8) of a document; empty if it is shorter than `first`."""
    data = document.text.encode()
    last = min(last, len(data))
    if first > 0:  # a word that has begun before is left out
        first = next((m.start() for m in re.finditer(rb"(?<=\s)\S", data[first - 1 :])), len(data)) + first - 1
    if last < len(data):  # as is a word that does not end before
        last = max((m.end() for m in re.finditer(rb"\S+(?=\s)", data[first : last + 1])), default=0) + first
    return Document(document.id, data[first:last].decode() if first < last else "", document.meta)


def consecutive(works: list[Document], first: int, last: int, count: int) -> list[Document]:
    """Excerpts of ``last - first`` bytes, one after another from byte `first` on, taken in turn from every work.

    Each work gives an equal share of `count` as far as it is long enough; ``meta["work"]`` names it.
    """
    length = last - first
    per_work = []
    for work in works:
        size = len(work.text.encode())
        starts = range(first, max(size - length, first) + 1, length)[: -(-count // len(works))]
        cuts = [excerpt(work, start, start + length) for start in starts]
        meta = {**work.meta, "work": work.id}
        per_work.append(
            [Document(f"{work.id}:{start}", cut.text, meta) for start, cut in zip(starts, cuts, strict=True)]
        )
    in_turn = chain.from_iterable(zip_longest(*per_work))
    return [d for d in in_turn if d is not None and d.text][:count]


def joined(articles: list[Document], words: int) -> list[Document]:
    """The articles end to end, cut into documents of `words` words; the rest at the end is left out.

    ``meta["work"]`` names the article a document begins in: documents of one long article share it.
    """
    documents = []
    text = "".join(a.text for a in articles)
    owners = [a.id for a in articles for _ in a.text.split()]
    borders = [m.start() for m in re.finditer(r"\S+", text)]
    for number in range(len(owners) // words):
        start, stop = number * words, (number + 1) * words
        end = borders[stop] if stop < len(borders) else len(text)
        documents.append(Document(f"{number:04d}", text[borders[start] : end].rstrip(" \n"), {"work": owners[start]}))
    return documents
