"""What every budget preset allows every model, as docs/budgets.md has it; `python benchmarks/budgets.py` rewrites it.

The part below ``<!-- generated -->`` is made from the presets, the recipes and the models' own `fit`; nothing is
trained or downloaded. Backbones are built from shapes alone, so bytes and operations are calculated, never measured.
"""

from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from memory_bench import plugins
from memory_bench.backbone.lora import adapter_size
from memory_bench.backbone.model import Backbone
from memory_bench.backbone.small import TINY, small_card, small_model
from memory_bench.budget import PRESETS, Budget, amount, preset_files
from memory_bench.card import BackboneCard
from memory_bench.driver.meter import TRAIN_PASSES
from memory_bench.driver.train import adapts, trained_parameters, untrained
from memory_bench.errors import UserError
from memory_bench.parity.measured import SMOLLM2
from memory_bench.protocol import MemoryModel
from memory_bench.recipe import Recipe, find_recipe
from memory_bench.running.recipes import default_recipe
from memory_bench.weights.transfer import meta_backbone

PAGE = Path(__file__).resolve().parent.parent / "docs" / "budgets.md"
MARK = "<!-- generated -->\n"
LIMITS = ("device_bytes", "host_bytes", "train_tokens", "train_flops", "train_seconds", "eval_seconds",
          "added_parameters", "seeds")  # fmt: skip
HEAD = ("model", "segment", "sized by `fit`", "added parameters", "trained", "weights and optimiser")


def card(name: str, family: str, sizes: dict[str, int], parameters: int) -> BackboneCard:
    """A pretrained backbone that need not be here, from what its configuration says."""
    rotary = family == "llama"
    return BackboneCard(name, family, window=512, pretrained=True, parameters=parameters, rotary=rotary, **sizes)


def sizes(d: int, layers: int, heads: int, kv: int, mlp: int, vocab: int, **more: int) -> dict[str, int]:
    """Of a backbone whose heads are as wide together as it is."""
    shape = {"width": d, "layers": layers, "heads": heads, "kv_heads": kv, "head_width": d // heads}
    return {**shape, "mlp_width": mlp, "vocab": vocab, **more}


TINY_CARD = small_card("tiny", TINY, "")
SMOLLM2_360M = card("SmolLM2-360M", "llama", sizes(960, 32, 15, 5, 2560, 49_152), 361_821_120)
SMOLLM2_1B = card("SmolLM2-1.7B", "llama", sizes(2048, 24, 32, 32, 8192, 49_152), 1_711_376_384)
OPT_350M = card(
    "OPT-350M", "opt", sizes(1024, 24, 16, 16, 4096, 50_272, max_positions=2048) | {"width": 512}, 331_196_416
)
GPT2 = card("GPT-2", "gpt2", sizes(768, 12, 12, 12, 3072, 50_257, max_positions=1024), 124_439_808)
MEANT: dict[str, tuple[BackboneCard, str]] = {
    "cpu-minutes": (TINY_CARD, ""),
    "cpu-minutes-flops": (TINY_CARD, ""),
    "smoke": (TINY_CARD, ""),
    "cpu-smol": (SMOLLM2, ""),
    "gpu-minutes": (SMOLLM2, ""),
    "gpu-24g-hour": (SMOLLM2, "finetune"),
    "gpu-80g-hour": (SMOLLM2_360M, "finetune"),
    "gpu-80g-day": (SMOLLM2_1B, "finetune"),
    "paper-hmt": (OPT_350M, "finetune"),
    "paper-rmt": (OPT_350M, "finetune"),
    "paper-armt": (GPT2, "finetune"),
}
"""The backbone that a preset is meant for, and the recipe where it is not the usual one of the backbone."""


def shapes(of: BackboneCard) -> Backbone:
    """A backbone of the card's shapes without numbers; `tiny` as it is."""
    if of.name == TINY_CARD.name:
        return small_model(TINY, torch.Generator().manual_seed(0))
    hidden = of.heads * of.head_width
    common: dict[str, dict[str, Any]] = {
        "llama": {"hidden_size": hidden, "num_hidden_layers": of.layers, "num_attention_heads": of.heads,
                  "num_key_value_heads": of.kv_heads, "intermediate_size": of.mlp_width, "tie_word_embeddings": True},
        "opt": {"hidden_size": hidden, "num_hidden_layers": of.layers, "num_attention_heads": of.heads,
                "ffn_dim": of.mlp_width, "word_embed_proj_dim": of.width, "do_layer_norm_before": of.width == hidden,
                "max_position_embeddings": of.max_positions},
        "gpt2": {"n_embd": hidden, "n_layer": of.layers, "n_head": of.heads, "n_positions": of.max_positions},
    }  # fmt: skip
    backbone: Any = Backbone(meta_backbone({"model_type": of.family, "vocab_size": of.vocab, **common[of.family]}))
    backbone.embedding_scale = lambda: 1.0  # there are no numbers to take it from
    return backbone  # type: ignore[no-any-return]


def row(name: str, budget: Budget, of: BackboneCard, recipe: Recipe, backbone: Backbone) -> tuple[str, ...]:
    """What one preset allows one model."""
    cls = plugins.load("models", name)
    own = adapts(budget, recipe, cls)
    limit = budget.added_parameters
    taken = adapter_size(of, recipe.lora_rank, recipe.lora_targets) if own else 0
    config = cls.fit(of, budget if limit is None else replace(budget, added_parameters=max(0, limit - taken)))
    rank = recipe.lora_rank if own else 0
    backbone.adapt(rank, recipe.lora_alpha, recipe.lora_targets, torch.Generator())
    config = cls.unadapted(config) if own else config
    try:
        model: MemoryModel[Any] = cls(backbone, config, torch.Generator().manual_seed(0))
    except UserError:
        return (f"`{name}`", f"not on {of.name}", *[""] * 5)
    for part, buffer in model.named_buffers():
        if buffer.is_meta and not buffer.dim():  # MemoryLLM asks whether its pool is filled: from the start it is not
            setattr(model, part, torch.zeros((), dtype=buffer.dtype))
    segment = getattr(config, "segment", of.window)
    free = untrained(budget, recipe)
    trained = 0 if free else sum(p.numel() for p in trained_parameters(model, recipe).values())
    weights = sum(p.numel() for p in model.parameters())
    cost, frozen = (f(segment, 64 * segment) / segment for f in (model.flops, model.detached_flops))
    passes = TRAIN_PASSES + int(recipe.checkpoint)
    spent = 0 if free else passes * cost - (TRAIN_PASSES - 1) * frozen
    return (
        f"`{name}`",
        f"{segment:,}",
        sized(config, cls),
        f"{model.added_parameters():,}",
        _share(trained, weights),
        amount("device_bytes", 4 * weights + 12 * trained),
        _flops(cost, spent),
    )


def _flops(read: float, train: float) -> str:
    return " · ".join(f"{value / 1e9:.3g}" for value in (read, train) if value)


def _share(trained: int, weights: int) -> str:
    return "none" if not trained else "all" if trained == weights else f"{trained:,}"


def sized(config: Any, cls: type[MemoryModel[Any]]) -> str:
    """What `fit` set otherwise than the model's own defaults."""
    usual = asdict(cls.Config())
    changed = {k: v for k, v in asdict(config).items() if v != usual[k] and k != "segment"}
    return ", ".join(f"{k} {_short(v)}" for k, v in changed.items()) or "–"


def _short(value: Any) -> str:
    if isinstance(value, tuple | list) and len(value) > 3:
        return f"{value[0]}–{value[-1]}"
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value).lower()


def trains(budget: Budget, recipe: Recipe) -> str:
    """A sentence about what is trained."""
    if untrained(budget, recipe):
        return "Nothing is trained: the backbone as it is, memories without parameters or with their first ones."
    if recipe.trains == "all":
        return "All weights train; the backbones of LongMem and MemoryPrompt stay frozen."
    return (
        f"The backbone is frozen. What a method adds trains, and adapters of rank {recipe.lora_rank} beside all "
        "projections of every model's backbone but LongMem's and MemoryPrompt's."
    )


def section(name: str, shown: dict[tuple[tuple[str, ...], ...], str]) -> str:
    """One preset; what its models are is not repeated where `shown` has it of another."""
    budget = PRESETS[name]
    of, asked = MEANT[name]
    recipe, backbone = find_recipe(asked or default_recipe(of)), shapes(of)
    comment = [line.lstrip("# ") for line in preset_files()[name].read_text(encoding="utf-8").splitlines()
               if line.startswith("#")]  # fmt: skip
    limits = [(n, getattr(budget, n)) for n in LIMITS if getattr(budget, n) is not None]
    stage = recipe.stages[0]
    way = f" (`--set backbone.recipe={asked}`)" if asked else ""
    scored = "; ".join(f"{task}: {_options(options)}" for task, options in budget.tasks.items())
    free = untrained(budget, recipe)
    rows = tuple(row(model, budget, of, recipe, backbone) for model in plugins.installed("models"))
    first = shown.setdefault(rows, name)
    own = table((*HEAD, "GFLOPs a token: read" if free else "GFLOPs a token: read · train"), rows)
    lines = [
        f"### `{name}`", "", " ".join(comment), "",
        "Limits: " + ", ".join(f"`{n}` {amount(n, v)}" for n, v in limits) + ".", "",
        f"Meant for {of.name} ({of.parameters / 1e6:,.4g}M parameters) with recipe `{recipe.name}`{way}: batches of "
        f"{stage.rows} rows of {stage.segments} segments. {trains(budget, recipe)}"
        + (f" Scored: {scored}." if scored else ""), "",
        *(own if first == name else [f"Each model is as under `{first}`."]),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _options(options: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in options.items())


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Lines of Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows)]


def generated() -> str:
    """All presets, as the page has them."""
    shown: dict[tuple[tuple[str, ...], ...], str] = {}
    return "\n".join(section(name, shown) for name in MEANT)


def renewed(page: str) -> str:
    """The page with what is generated made anew."""
    return page.partition(MARK)[0] + MARK + "\n" + generated()


def main() -> None:
    """Rewrite what is generated of the page."""
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
