"""Our models as an lm-eval model: ``--model memory-bench``, or an instance for ``simple_evaluate``.

Unusual here:

- Nothing is truncated and no window is started again: a text is read once, segment by segment, through memory.
- Contexts are read once, whoever asks, and forked for every continuation (`memory_bench.lm_eval.reading`).
- A model that remembers nothing has no stream to keep. It reads the windows that lm-eval's own ``hf`` model would, the
  last `segment` tokens before what is predicted, and gives its numbers (``windows=stream``: it reads as the others do).
- Beginnings are those of ``hf``: a text whose likelihood is asked for stands behind the BOS token (EOS where there is
  none, a line break where there is neither), which is read and not predicted; whatever special tokens the tokenizer
  adds by itself belong to the text (``add_bos_token=false``: none).
- Answers of another model cannot come out of a cache: its path must contain this model's hash.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from memory_bench import plugins
from memory_bench.cell import digest
from memory_bench.data.library import Library
from memory_bench.driver.generating import end_of_text
from memory_bench.errors import UserError, unknown
from memory_bench.lm_eval import require
from memory_bench.lm_eval.fitting import Fit
from memory_bench.lm_eval.loading import Chosen, from_names, from_run
from memory_bench.lm_eval.reading import Counts, Ids, Likelihood, Reader
from memory_bench.lm_eval.writing import write
from memory_bench.protocol import Nothing
from memory_bench.running.environment import cache_folder, data_folder, hub_allowed
from memory_bench.shipped import parity_text, read_certificates
from memory_bench.zoo.named import Backbones

require()
from lm_eval import utils  # noqa: E402  (after the sentence that says how to install it)
from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.models.utils import normalize_gen_kwargs  # noqa: E402

WINDOWS = ("lm-eval", "stream")
LOG = logging.getLogger(__name__)


class MemoryLM(TemplateLM):  # type: ignore[misc]
    """A memory model for lm-eval.

    Args:
        model: its name, with `backbone` and `budget`, or its label in `run`; or a model that is ready (`Chosen`).
        backbone: a name, folder or hub id.
        budget: a preset or TOML file without training; one that trains is refused, unless there is nothing to train.
        run: folder of a finished run, whose trained weights are used.
        task: of the run, where it has trained the model several times.
        seed: of the training and of the model's draws; default 0, or the run's first.
        data: folder of real data (for the backbone `tiny`), else ``MEMORY_BENCH_DATA``.
        dtype: ``float32`` or ``bfloat16``.
        device: ``cpu``, ``cuda`` …; default, and where there is none: a GPU if there is one, else the CPU.
        batch_size: streams side by side; it changes no number.
        max_batch_size: taken from lm-eval and ignored.
        add_bos_token: whether texts begin with the tokenizer's special tokens; None: as the tokenizer does.
        windows: ``lm-eval`` or ``stream``, for models that remember nothing.
        max_gen_toks: tokens to generate where a task does not say.
        options: of the model, for example ``segment=256``.

    Raises:
        UserError: anything that cannot be done as asked, in a sentence.
    """

    def __init__(  # noqa: PLR0913
        self,
        model: str | Chosen = "",
        backbone: str = "",
        budget: str = "",
        *,
        run: str = "",
        task: str = "",
        seed: int | None = None,
        data: str = "",
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        add_bos_token: bool | None = None,
        windows: str = "lm-eval",
        max_gen_toks: int = 256,
        **options: Any,
    ) -> None:
        super().__init__()
        del max_batch_size
        if windows not in WINDOWS:
            raise unknown("value of windows", windows, WINDOWS)
        self.batch_size = _rows(batch_size)
        if isinstance(model, str):
            names = {"model": model, "backbone": backbone, "budget": budget, "run": run, "task": task, "dtype": dtype}
            model = _choose(names, options, seed, data_folder(Path(data) if data else None), device)
        self.chosen = model
        self.tokenizer = _tokenizer(model, add_bos_token)
        self.add_bos_token, self.max_gen_toks = add_bos_token, max_gen_toks
        self._device = model.model.backbone.device
        self.counts = Counts()
        self.fit = Fit(model)
        self.reader = Reader(model.model, rows=self.batch_size, seed=model.training.seed, watcher=self.counts)
        forgets = isinstance(model.model.open(1), Nothing)
        self.window = self.reader.length if forgets and windows == "lm-eval" else None
        if model.trained == "untrained":
            LOG.warning(
                "%s has its initial weights: budget %s trains nothing.",
                model.training.model.name,
                model.training.budget.name,
            )

    @property
    def config_hash(self) -> str:
        """16 hexadecimal digits of everything that determines an answer but the request."""
        reading = [self.add_bos_token, self.window, self.max_gen_toks]
        chosen = self.chosen
        return digest([chosen.training.key, chosen.scored_with, chosen.trained, reading])

    def get_model_info(self) -> dict[str, Any]:
        """For ``results["config"]``: the model, its budget and training, its memory's size, its certificate."""
        training, model = self.chosen.training, self.chosen.model
        budget = {k: v for k, v in asdict(training.budget).items() if v is not None and k not in ("seeds", "tasks")}
        memory = {
            "model": training.model.name,
            "options": {**training.model.config, **self.chosen.scored_with},
            "config_hash": self.config_hash,
            "backbone": training.backbone.name,
            "backbone_revision": training.backbone.revision,
            "budget": budget,
            "trained": self.chosen.trained,
            "training_key": training.key,
            "seed": training.seed,
            "added_parameters": model.added_parameters(),
            "parity": parity_text(read_certificates().get(training.model.name)),
            "look_ahead": model.traits.look_ahead,
            "segment": model.traits.segment,
            "reading": self.reading,
            "state_bytes": self.counts.state_bytes,
            "state_host_bytes": self.counts.state_host_bytes,
            "tokens_read": self.counts.tokens,
            "threads": torch.get_num_threads(),
            "not_the_boards_model": self.fit.misfits,
        }
        return {
            "model_num_parameters": sum(p.numel() for p in model.parameters()),
            "model_dtype": str(model.backbone.dtype),
            "memory_bench": memory,
        }

    @property
    def reading(self) -> str:
        """How texts are read and begun, in a sentence."""
        how = f"streamed in segments of {self.reader.length}" if self.window is None else f"windows of {self.window}"
        begun = self.tok_encode("a", add_special_tokens=None)
        added = len(begun) - len(self.tok_encode("a", add_special_tokens=False))
        own = f"the tokenizer adds {added} special token{'s' * (added > 1)} of its own, which count as text"
        return f"{how}; begun with {self._prefix()[0]}, not scored; {own if added else 'the tokenizer adds nothing'}"

    @property
    def tokenizer_name(self) -> str:
        """See `LM.tokenizer_name`."""
        return f"{self.chosen.training.backbone.name}-{self.chosen.training.backbone.revision}".replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """See `LM.apply_chat_template`."""
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{self.chosen.training.backbone.name} has no chat template: leave out --apply_chat_template."
            )
        text = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip
        return str(text)

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text; None where the backbone has none."""
        found: int | None = self.tokenizer.eos_token_id
        return found

    @property
    def prefix_token_id(self) -> int:
        """The token in front of a text whose likelihood is asked for."""
        return self._prefix()[1]

    def _prefix(self) -> tuple[str, int]:
        for name in ("bos", "eos"):
            found = getattr(self.tokenizer, f"{name}_token_id")
            if found is not None:
                return name.upper(), int(found)
        line_break = self.tok_encode("\n", add_special_tokens=False)
        if not line_break:
            name = self.chosen.training.backbone.name
            raise UserError(
                f"{name} has neither BOS nor EOS nor a line break: it cannot begin a text without a context."
            )
        return "a line break", line_break[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of `string`, as ``hf`` encodes it."""
        del kwargs
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        first = self.tokenizer.bos_token or self.tokenizer.eos_token
        if add_special_tokens is None and first and string.startswith(first):
            special = False
        more = {} if special is None else {"add_special_tokens": special}
        ids: list[int] = self.tokenizer.encode(string, **more)
        return ids

    def set_cache_hook(self, cache_hook: Any) -> None:
        """See `LM.set_cache_hook`.

        Raises:
            UserError: the cache's path does not name this model.
        """
        path = getattr(cache_hook.dbdict, "filename", None)
        if path is not None and self.config_hash not in str(path):
            raise UserError(
                "lm-eval's cache does not tell models apart: put this one's hash into its path "
                f"(--use_cache {self.config_hash}), or leave it out."
            )
        super().set_cache_hook(cache_hook)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Likelihood]:
        """See `LM.loglikelihood`; raises UserError as `Fit.check`."""
        self.fit.check(requests)
        found: list[Likelihood] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Likelihood]:
        """Likelihoods of (request, context ids, continuation ids)."""
        del disable_tqdm, kwargs
        asked: dict[Ids, dict[Ids, None]] = {}
        pairs = [self._in_window(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        for context, continuation in pairs:
            if continuation:
                asked.setdefault(context, {})[continuation] = None
        found: dict[tuple[Ids, Ids], Likelihood] = {}
        for context, continuation, likelihood in self.reader.likelihoods({c: list(a) for c, a in asked.items()}):
            found[context, continuation] = likelihood
        answers = [found[pair] if pair[1] else (0.0, True) for pair in pairs]
        for (request, _, _), answer in zip(requests, answers, strict=True):
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, answer)
        return answers

    def _in_window(self, context: Ids, continuation: Ids) -> tuple[Ids, Ids]:
        """What a model that remembers nothing can see of a context; all of it for the others. Never without a token."""
        context = context or (self.prefix_token_id,)
        if self.window is None or len(continuation) > self.window:
            return context, continuation
        return context[max(0, len(context) + len(continuation) - self.window - 1) :], continuation

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The likelihood of each whole text; raises UserError as `Fit.check`."""
        self.fit.check(requests)
        texts = [tuple(self.tok_encode(request.args[0])) for request in requests]
        if self.window is None:
            begun = [(self.prefix_token_id, *ids) for ids in texts]
            found = iter(self.reader.texts([ids for ids in begun if len(ids) > 1]))
            sums = [next(found)[0] if len(ids) > 1 else 0.0 for ids in begun]
        else:
            sums = [self._windows(ids, disable_tqdm) for ids in texts]
        for request, likelihood in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, likelihood)
        return sums

    def _windows(self, ids: Ids, disable_tqdm: bool) -> float:
        """The likelihood of a text in lm-eval's own windows."""
        windows = utils.get_rolling_token_windows(list(ids), self.prefix_token_id, self.window, 1)
        pairs = [(None, *utils.make_disjoint_window(window)) for window in windows]
        return sum(likelihood for likelihood, _ in self._loglikelihood_tokens(pairs, disable_tqdm))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, cut before the first stop sequence; raises UserError as `Fit.check`."""
        del disable_tqdm
        self.fit.check(requests)
        groups: dict[tuple[tuple[str, ...], int], dict[str, None]] = {}
        wanted = [(request.args[0], self._generation(request.args[1])) for request in requests]
        for context, how in wanted:
            groups.setdefault(how, {})[context] = None
        found = {(c, how): text for how, contexts in groups.items() for c, text in self._written(list(contexts), *how)}
        texts = [found[pair] for pair in wanted]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _generation(self, asked: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
        """Stop sequences and number of tokens."""
        how = normalize_gen_kwargs(dict(asked), self.max_gen_toks)
        if (how["do_sample"] and float(how.get("temperature", 1.0)) > 0) or int(how.get("num_beams", 1)) > 1:
            raise UserError("Memory models write greedily: give --gen_kwargs do_sample=False (and no beams).")
        stops = [stop for stop in how["until"] or () if stop]
        return tuple(dict.fromkeys([*stops, *filter(None, [self.tokenizer.eos_token])])), int(how["max_gen_toks"])

    def _written(self, contexts: Sequence[str], stops: tuple[str, ...], tokens: int) -> list[tuple[str, str]]:
        """(context, text) for each context."""
        encoded = [tuple(self.tok_encode(context)) or (self.prefix_token_id,) for context in contexts]
        if self.window is not None and tokens < self.window:
            encoded = [ids[-(self.window - tokens) :] for ids in encoded]
        ends = end_of_text(self.chosen.model) + (() if self.eot_token_id is None else (self.eot_token_id,))

        def text_of(ids: Sequence[int]) -> str:
            return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

        def ended(ids: list[int]) -> bool:
            text = text_of(ids)
            return any(stop in text for stop in stops)

        found = write(self.reader, encoded, tokens, ended, ends)
        return [(contexts[i], _before(text_of(ids), stops)) for i, ids in found]


def _rows(batch_size: int | str) -> int:
    """Streams side by side.

    Raises:
        UserError: ``auto``, or no number.
    """
    text = str(batch_size)
    if not text.isdecimal() or int(text) < 1:
        raise UserError(
            f"batch_size={text}: give a number; what fits a memory model cannot be tried out on one long window."
        )
    return int(text)


def _before(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first stop sequence."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def _choose(
    names: Mapping[str, str], options: Mapping[str, Any], seed: int | None, data: Path | None, device: str | None
) -> Chosen:
    """The model that lm-eval's arguments name."""
    cuda = torch.cuda.is_available()
    if not device or (device.startswith("cuda") and not cuda):  # lm-eval's own default is a GPU, here or not
        device = "cuda" if cuda else "cpu"
    if not names["model"] or not (names["backbone"] or names["run"]):
        raise UserError("Give model=NAME,backbone=NAME (and budget=NAME), or run=FOLDER,model=NAME, as --model_args.")
    cls = plugins.load("models", names["model"]) if not names["run"] else None
    known = [f.name for f in fields(cls.Config)] if cls is not None else []
    own = (
        "model",
        "backbone",
        "budget",
        "run",
        "task",
        "seed",
        "data",
        "dtype",
        "add_bos_token",
        "windows",
        "max_gen_toks",
    )
    for option in options:
        if option not in known:
            raise unknown("model argument", option, [*known, *own])
    if names["dtype"] not in ("float32", "bfloat16"):
        raise unknown("dtype", names["dtype"], ("float32", "bfloat16"))
    cache, hub = cache_folder(), hub_allowed()
    backbones = Backbones(
        Library(data, cache, hub=hub, notice=LOG.warning), cache, hub=hub, report=LOG.warning, notice=LOG.warning
    )
    if names["run"]:
        if names["backbone"] or names["budget"]:
            raise UserError("A run has its own backbone and budget: leave out backbone= and budget= beside run=.")
        place = Path(names["run"])
        return from_run(place, names["model"], backbones, seed=seed, task=names["task"], device=device)
    return from_names(
        names["model"], names["backbone"], names["budget"], options, backbones,
        seed=seed or 0, dtype=names["dtype"], device=device,
    )  # fmt: skip


def _tokenizer(chosen: Chosen, add_bos_token: bool | None) -> PreTrainedTokenizerBase:
    """The backbone's tokenizer as transformers has it; the harness's own small ones have no special tokens."""
    if chosen.loaded.folder is None:
        return PreTrainedTokenizerFast(tokenizer_object=chosen.loaded.encode.tokenizer)
    more = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(chosen.loaded.folder, local_files_only=True, **more)
    return found
