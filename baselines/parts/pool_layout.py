"""The official layout of MemoryLLM and M+ checkpoints: state-dict names, ``config.json``, and what they decide.

Names as saved by wangyu-ustc/MemoryLLM@5acaf52 (sections by file: `MemoryLLM` in modeling_memoryllm.py, `MPlus` in
modeling_mplus.py): the whole backbone, LoRA inside it (adapter ``default`` writes, ``decoder_adapter`` reads), the
pool, and for M+ the retriever inside the attention and the long-term store. The pool is where a fresh stream starts.
"""

from collections.abc import Mapping
from typing import Any

from memory_bench.errors import UserError
from memory_bench.weights.released import Release, Shape
from memory_bench.weights.transfer import Layout, Place, backbone_places

ADAPTERS = {"write": "default", "read": "decoder_adapter"}
RETRIEVER = {"query": "query_proj", "key": "key_proj", "encoder_query": "encoder_query_proj"}
STORE = {"tokens": "ltm", "keys": "ltm_keys", "ages": "ltm_ages", "recall_frequencies": "ltm_recall_frequencies"}
LLAMA = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
    "rope_parameters", "attention_bias", "mlp_bias", "tie_word_embeddings", "bos_token_id", "eos_token_id",
    "pad_token_id",
)  # fmt: skip


class PoolLayout(Layout):
    """MemoryLLM's."""

    def backbone(self, release: Release) -> dict[str, Any]:
        """The checkpoint's own Llama: it has been trained with its own rotary scaling.

        The first release (7B) multiplies positions instead (``interpolate_position_ids``), which is linear scaling by
        (blocks + 1) * tokens per block / longest position.
        """
        about = release.about
        if "hidden_size" not in about:
            raise UserError(f"The checkpoint {release.name} has no config.json with the sizes of its backbone.")
        config = {name: about[name] for name in LLAMA if name in about} | {"model_type": "llama"}
        if about.get("interpolate_position_ids"):
            longest = config["max_position_embeddings"]
            factor = (_said(release, "num_blocks") + 1) * _said(release, "num_tokens") / longest
            config["rope_scaling"] = {"type": "linear", "rope_type": "linear", "factor": factor}
        return config

    def options(self, release: Release, dtype: str) -> dict[str, Any]:
        """Sizes of the pool, adapters, and rules, as ``config.json`` has them."""
        about, shapes = release.about, release.shapes
        block = _said(release, "num_tokens")
        pool = shapes.get("memory", (0, block, 0))[1]
        options: dict[str, Any] = {
            "tokens_per_block": block,
            "blocks": max(1, pool // block),
            "bos_embedding": bool(about.get("add_bos_embedding", "bos_embedding" in shapes)),
            "drop_per_layer": bool(about.get("drop_memory_per_layer", False)),
            "pool_initialized": True,  # MemoryLLM's own flag is a tensor and wins
            "add_read_lora": bool(about.get("add_decoder_lora", False)),
            "lora_rank": 0,
        }
        lora = about.get("lora_config")
        if lora is None and any(".lora_" in name for name in shapes):
            raise UserError(f"The checkpoint {release.name} has LoRA adapters, but its config.json has no lora_config.")
        if lora is not None:
            options |= {"lora_rank": int(lora["r"]), "lora_alpha": float(lora["lora_alpha"])}
            options |= {"lora_targets": tuple(lora["target_modules"])} if lora.get("target_modules") else {}
        return options

    def places(self, config: Any, backbone: Mapping[str, Shape]) -> dict[str, Place]:
        """See the module."""
        places = self._memory(config, backbone)
        places["initialized"] = Place("initialized", ())
        return places

    def _memory(self, config: Any, backbone: Mapping[str, Shape]) -> dict[str, Place]:
        """The backbone with its adapters, pool, offset and bos."""
        layers, width = _depth(backbone), backbone["model.embed_tokens.weight"][1]
        places: dict[str, Place] = {}
        for name, place in backbone_places(backbone).items():
            parts = name.split(".")
            if not config.lora_rank or parts[-1] != "weight" or parts[-2] not in config.lora_targets:
                places[name] = place
                continue
            module, (outputs, inputs) = name.removesuffix(".weight"), place.shape
            places[f"{module}.base_layer.weight"] = place
            for ours, theirs in ADAPTERS.items():
                if ours == "read" and not config.add_read_lora:
                    continue
                pair = f"lora.{ours}.{module.removeprefix('model.')}"
                places[f"{module}.lora_A.{theirs}.weight"] = Place(f"{pair}.A", (config.lora_rank, inputs))
                places[f"{module}.lora_B.{theirs}.weight"] = Place(f"{pair}.B", (outputs, config.lora_rank))
        places["memory"] = Place("pool", (layers, config.pool_tokens, width))
        places["new_memory_positional_emb"] = Place("new_memory_positional_embedding", (1, 1, width))
        if config.bos_embedding:
            places["bos_embedding"] = Place("bos_embedding", (layers, 1, width))
        return places

    def settle(self, model: Any) -> None:
        """Rotary frequencies as they were when the model was trained."""
        if model.config.rope_frequencies == "bfloat16":
            model.backbone.round_frequencies()


class MPlusLayout(PoolLayout):
    """M+'s: no flag, retriever and long-term store; in bfloat16 its rotary frequencies are rounded to bfloat16 too."""

    def options(self, release: Release, dtype: str) -> dict[str, Any]:
        """As MemoryLLM's, with the store's; its sizes are those of the tensors, as layers may differ."""
        about, shapes = release.about, release.shapes
        mode = about.get("update_ltm_mode", "immediate")
        if mode != "immediate":
            raise UserError(f"The checkpoint {release.name} updates its long-term memory in mode '{mode}', which the "
                            "released code does not run; only 'immediate' is supported.")  # fmt: skip
        options = super().options(release, dtype)
        layers = len([name for name in shapes if name.startswith("ltm.")])
        query = "model.layers.0.self_attn.query_proj"
        stored = {release.dtype("memory"), about.get("torch_dtype"), about.get("dtype"), dtype}
        options |= {
            "retrieved_tokens": _said(release, "num_ltm_blocks") * options["tokens_per_block"],
            "retriever_width": shapes.get("ltm_keys.0", (0, 1))[1],
            "retriever_layers": 2 if f"{query}.2.weight" in shapes else 1,
            "merge_every": _said(release, "update_ltm_frequency"),
            "initial_recall_frequency": float(_said(release, "initial_rf_when_moving_stm_to_ltm")),
            "recall_decay": float(_said(release, "decay_frequency")),
            "long_term_sizes": tuple(shapes.get(f"ltm.{i}", (0,))[0] for i in range(layers)),
            "rope_frequencies": "bfloat16" if "bfloat16" in stored else "float32",
        }
        return options

    def places(self, config: Any, backbone: Mapping[str, Shape]) -> dict[str, Place]:
        """See the module."""
        layers, width, keys = _depth(backbone), backbone["model.embed_tokens.weight"][1], config.retriever_width
        places = self._memory(config, backbone)
        steps = (
            {"0": (keys, width)} if config.retriever_layers == 1 else {"0": (2 * keys, width), "2": (keys, 2 * keys)}
        )
        sizes = config.long_term_sizes or (0,) * layers
        for i in range(layers):
            for ours, theirs in RETRIEVER.items():
                for step, shape in steps.items():
                    middle = "" if config.retriever_layers == 1 else f".{step}"  # a lone Linear is not in a Sequential
                    official = f"model.layers.{i}.self_attn.{theirs}{middle}.weight"
                    places[official] = Place(f"retriever.layers.{i}.{ours}.{step}.weight", shape)
            tails: dict[str, Shape] = {"tokens": (width,), "keys": (keys,), "ages": (), "recall_frequencies": ()}
            for ours, theirs in STORE.items():
                places[f"{theirs}.{i}"] = Place(f"long_term.layers.{i}.{ours}", (sizes[i], *tails[ours]))
        return places


def _said(release: Release, name: str) -> Any:
    """An entry of the checkpoint's ``config.json`` that nothing else tells."""
    if release.about.get(name) is None:
        raise UserError(f"The config.json of the checkpoint {release.name} has no '{name}'.")
    return release.about[name]


def _depth(backbone: Mapping[str, Shape]) -> int:
    return 1 + max(int(name.split(".")[2]) for name in backbone if name.startswith("model.layers."))
