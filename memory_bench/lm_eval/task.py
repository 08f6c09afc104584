"""lm-eval's tasks in our grid: ``--tasks lm-eval:lambada_openai`` or ``lm-eval:path/to/task.yaml``.

Unusual here:

- Contexts go through memory, segment by segment, and the controls are the same as of our own tasks: memory wiped,
  another document's memory, the context in the prompt.
- The metrics are lm-eval's own, computed from our samples (`memory_bench.lm_eval.judging`). ``acc`` and
  ``exact_match`` are also given as ``accuracy``, the name under which models are compared, and texts are ranked by bits
  per byte.
- Contexts and continuations are encoded apart, and texts begin behind a line break: close to, but not always the same
  as, what lm-eval's command gives for the same model.
- Models are trained as language models on books, as for `pg19`, whose trainings are used.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from memory_bench.corpus import Corpus, TextCorpus
from memory_bench.data.library import Library, Source
from memory_bench.episode import Encode, Episode, Estimate, Task, TrainingPlan
from memory_bench.errors import DataError, UserError, unknown
from memory_bench.finite import check_samples
from memory_bench.lm_eval import documents, include_path, judging
from memory_bench.lm_eval.finding import LOCAL, check_reach, no_data, read_fields, task_file, task_sources
from memory_bench.zoo.pretrain import encode_documents

ACCURATE = ("acc", "exact_match", "accuracy")  # shares of documents that are right
CONTROLS = ("wiped", "foreign", "ceiling")
TEST = "test"
# Fields that say where documents come from; those in the samples are what came of them.
NOT_JUDGED = ("process_docs", "training_split", "validation_split", "fewshot_split", "fewshot_config", "dataset_name",
              "dataset_kwargs")  # fmt: skip


@dataclass(frozen=True, slots=True)
class LmEvalConfig:
    """Options of any lm-eval task."""

    # The headline, one of the task's own metrics; empty: accuracy if it has one, bits per byte, or else its first.
    metric: str = ""
    # Examples before each question; -1: the task's own number.
    shots: int = -1
    # Text at which a context's question begins: from its last occurrence on it is asked, not read. Empty: all is read.
    question: str = ""
    # Tokens of a written answer; 0: the task's own number.
    max_tokens: int = 0


class LmEvalTask(Task):
    """A task of lm-evaluation-harness, by its name or YAML file."""

    Config = LmEvalConfig
    version = 2  # a hit is judged token by token
    needs = ""  # its data are its own
    name: ClassVar[str]
    source = "lm-evaluation-harness"

    def __init__(self, config: LmEvalConfig | None = None) -> None:
        self.config = config or self.Config()
        self._loaded: Any = None
        self._judging: Any = None

    @classmethod
    def named(cls, name: str) -> type["LmEvalTask"]:
        """The class of ``lm-eval:<name>``; its file is looked up when it is first needed.

        Raises:
            UserError: no name is given.
        """
        if not name:
            raise UserError("Name a task of lm-eval: lm-eval:lambada_openai, or lm-eval:path/to/task.yaml.")
        return type("LmEvalTask", (cls,), {"name": name, "__doc__": f"lm-eval's {name}."})

    @cached_property
    def file(self) -> Path:
        """The task's YAML file."""
        return task_file(self.name)

    @cached_property
    def fields(self) -> dict[str, Any]:
        """What the file says."""
        return read_fields(self.file)

    @property
    def headline(self) -> str:  # type: ignore[override]
        """See `Task.headline`."""
        return "accuracy" if self._main in ACCURATE else self._main

    @cached_property
    def _main(self) -> str:
        """The headline's own name in lm-eval."""
        names = self._metrics()
        if self.config.metric and self.config.metric not in names:
            raise unknown(f"metric of lm-eval task {self.name}", self.config.metric, names)
        usual = "bits_per_byte" if self._texts else next((name for name in ACCURATE if name in names), names[0])
        return self.config.metric or usual

    @property
    def _texts(self) -> bool:
        return self.fields.get("output_type") == "loglikelihood_rolling"

    def _metrics(self) -> list[str]:
        """Names of the task's metrics, in its order."""
        from lm_eval.api import metrics as _  # registers lm-eval's own  # noqa: F401
        from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY

        listed = self.fields.get("metric_list")
        if listed is None:
            return list(DEFAULT_METRIC_REGISTRY[self.fields.get("output_type", "generate_until")])
        return [getattr(one["metric"], "__name__", one["metric"]) for one in listed]

    def _load(self, library: Library) -> Any:
        """The lm-eval task with its documents.

        Raises:
            DataError: they cannot be had.
        """
        if self._loaded is None:
            check_reach(self.fields, hub=library.hub)
            own = self.file.resolve().is_relative_to(include_path().resolve())
            self._loaded = self._made({"metadata": {**_metadata(self.fields), **({"library": library} if own else {})}})
        return self._loaded

    def _made(self, changes: Mapping[str, Any]) -> Any:
        from lm_eval.api.task import ConfigurableTask

        fields = {k: v for k, v in self.fields.items() if k not in ("tag", "group", "task_list")} | dict(changes)
        if self.config.shots >= 0:
            fields["num_fewshot"] = self.config.shots
        talk = logging.getLogger("lm_eval")
        before = talk.level
        talk.setLevel(logging.ERROR)  # it warns of every default it takes
        try:
            return ConfigurableTask(config=fields)
        except UserError:
            raise
        except Exception as error:  # of datasets, files, networks, templates
            raise DataError(no_data(self.fields, error)) from error
        finally:
            talk.setLevel(before)

    def data(self, library: Library) -> Source:
        """See `Task.data`: lm-eval's own data set, or ours.

        The revision is that of documents, examples before them, lm-eval, and the file with all that it includes and
        the sources of its functions.
        """
        task = self._load(library)
        seen = hashlib.sha256(self.file.read_bytes() + installed_version("lm_eval").encode())
        docs = task.eval_docs
        for doc in docs:
            seen.update(json.dumps(doc, default=str, sort_keys=True).encode())
        for doc in task.fewshot_docs() or () if task.config.num_fewshot else ():
            seen.update(json.dumps(doc, default=str, sort_keys=True).encode())
        sources = task_sources(self.file)
        if len(sources.files) > 1:
            seen.update(sources.revision.encode())
        first = docs[0]
        ours = first.get("data") if callable(self.fields.get("custom_dataset")) else None
        path = str(self.fields.get("dataset_path") or "")
        local = path in LOCAL
        label = f"{self.fields['task']} (lm-eval: {ours or ('local files' if local else path or 'made by a function')})"
        stand_in = bool(ours) and "stand-in" in str(ours)
        return Source(self.name, "folder" if local else "hub", label, seen.hexdigest()[:16], stand_in)

    def episodes(self, library: Library, limit: int | None) -> Iterator[Episode]:
        """See `Task.episodes`; `limit` counts lm-eval's documents."""
        own = self.config
        task = self._load(library)
        return documents.episodes(task, limit=limit, question=own.question, max_tokens=own.max_tokens)

    def plan(self, library: Library, *, pretrained: bool) -> TrainingPlan:
        """Books. Finds out that the task and its data are there."""
        del pretrained
        self._load(library)
        _ = self.headline
        return TrainingPlan("books")

    def corpus(self, library: Library, plan: TrainingPlan, encode: Encode) -> Corpus:
        """See `Task.corpus`."""
        del plan
        return TextCorpus(encode_documents([d.text for d in library.books("train")], encode))

    def levels(self, library: Library) -> Mapping[str, float]:
        """A guess among the choices."""
        if self.fields.get("output_type") != "multiple_choice" or self.headline != "accuracy":
            return {}
        task = self._load(library)
        sizes = [len(task.doc_to_choice(doc)) for doc in task.eval_docs]
        return {"chance": sum(1 / size for size in sizes) / len(sizes)}

    def metrics(self, samples: pd.DataFrame, seed: int = 0) -> list[Estimate]:
        """The headline, lm-eval's metrics under their own names, and the headline of the controls."""
        kind = "read" if self._texts else "ask"
        rows = check_samples(samples)[samples["kind"] == kind]
        if rows[rows["control"] == ""].empty:
            return []
        found = self._estimates(rows[rows["control"] == ""], seed, "")
        for control in CONTROLS:
            part = rows[rows["control"] == control]
            if not part.empty:
                found += [e for e in self._estimates(part, seed, f"control:{control}") if e.metric == self.headline][:1]
        return found

    def _estimates(self, rows: pd.DataFrame, seed: int, name: str) -> list[Estimate]:
        """All numbers of one control, the headline first."""
        task = None if self._texts else self._judge(rows)
        items = judging.text_items(rows) if self._texts else judging.asked_items(task, rows, wrong=self._wrong)
        found = [
            judging.estimate(metric, items, *_aggregation(task, metric), seed, name)
            for metric in dict.fromkeys(item.metric for item in items)
        ]
        if self._texts:
            found = [judging.text_bits(rows, seed, name), *(e for e in found if e.metric != "bits_per_byte")]
        head = [replace(e, metric=self.headline) for e in found if e.metric == self._main]
        return head + [e for e in found if e.metric != self.headline]

    @property
    def _wrong(self) -> str:
        """The metric in which a question without an answer counts as 0."""
        return self._main if self.headline == "accuracy" else ""

    def correct(self, samples: pd.DataFrame) -> "pd.Series[float]":
        """1.0 for questions of a document that lm-eval calls right, where the headline is an accuracy."""
        if self.headline != "accuracy":
            return super().correct(samples)
        right = pd.Series(0.0, index=samples.index)
        asks = samples[samples["kind"] == "ask"]
        task = self._judge(asks)
        for _, rows in asks.groupby(["control", "seed", "cluster"]):
            found = judging.asked_items(task, rows, wrong=self._wrong)
            right[rows.index] = next(float(item.value) for item in found if item.metric == self._main)
        return right

    def _judge(self, rows: pd.DataFrame) -> Any:
        """The lm-eval task; without its data, one whose documents are those of the samples."""
        if self._loaded is None and self._judging is None:
            from datasets import Dataset

            fields = [json.loads(label)["fields"] for label in rows["label"].drop_duplicates()]
            changes = dict.fromkeys(NOT_JUDGED) | {"metadata": {}, "num_fewshot": 0, "test_split": TEST}
            self._judging = self._made({**changes, "custom_dataset": lambda **_: {TEST: Dataset.from_list(fields)}})
        return self._loaded or self._judging


def _metadata(fields: Mapping[str, Any]) -> dict[str, Any]:
    own = fields.get("metadata")
    return dict(own) if isinstance(own, dict) else {}


def _aggregation(task: Any, metric: str) -> tuple[Any, bool]:
    """lm-eval's function from items to the number, and whether higher is better."""
    from lm_eval.api import metrics

    if task is None:
        return (metrics.bits_per_byte if metric == "bits_per_byte" else metrics.weighted_perplexity), False
    plain = metric.split("@")[0]
    return task.aggregation().get(plain, metrics.mean), bool(task.higher_is_better().get(plain, True))
