"""The written-out pass equals the Hugging Face models' own, cached or not, padded or not."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from memory_bench.backbone.layers import added, itself
from memory_bench.backbone.model import Backbone, Past
from memory_bench.errors import DataError
from memory_bench.testing import measured_flops

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, grouped heads": ("llama", {}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3, q/k norm": ("qwen3", {"key_shift": False}),
    "qwen2, q/k/v biases": ("qwen2", {}),
    "mistral": ("mistral", {}),
    "mistral, window": ("mistral", {"sliding_window": 4}),
    "qwen2, a layer with a window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3, a layer with a window": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "key_shift": False},
    ),
    "ministral, every second layer": (
        "ministral",
        {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "ministral3, longer queries": ("ministral3", {"sliding_window": 5}),
    "smollm3, a layer without rotary": ("smollm3", {}),
    "smollm3, which sees a window": ("smollm3-window", {"sliding_window": 4}),
    "granite, multipliers": ("granite", {}),
    "llama, a window that nothing reads": ("llama", {"sliding_window": 3, "layer_types": ["sliding_attention"] * 2}),
    "gpt2": ("gpt2", {}),
    "gpt2, scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2, unscaled": ("gpt2", {"scale_attn_weights": False}),
    "opt, norm before": ("opt", {}),
    "opt-350m, norm after, projected": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
}
MASKS = {
    "full": [[1] * 9] * 3,
    "right": [[1] * 9, [1] * 5 + [0] * 4, [1] + [0] * 8],
    "left": [[1] * 9, [0] * 4 + [1] * 5, [0] * 8 + [1]],
    "holes": [[1, 0, 1, 1, 0, 0, 1, 1, 1], [0, 0, 1, 0, 1, 1, 1, 1, 0], [1] * 9],
}


def text(backbone: Backbone, rows: int = 3, tokens: int = 9) -> Tensor:
    return torch.randint(backbone.vocab, (rows, tokens), generator=torch.Generator().manual_seed(3))


def official(backbone: Backbone, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of the model's own forward over every row's real tokens alone: padding is not there."""
    logits = torch.zeros(*ids.shape, backbone.vocab)
    with torch.no_grad():
        for row, real in enumerate(mask):
            logits[row, real] = backbone.model(ids[row : row + 1, real], use_cache=False).logits[0]
    return logits


@pytest.fixture(params=KINDS, ids=lambda name: name.replace(", ", "-").replace(" ", "_"))
def backbone(request: pytest.FixtureRequest, make_backbone: Callable[..., Backbone]) -> Backbone:
    kind, options = KINDS[request.param]
    return make_backbone(kind, **options)


@pytest.mark.parametrize("side", MASKS)
def test_run_is_the_models_forward(backbone: Backbone, side: str) -> None:
    ids, mask = text(backbone), torch.tensor(MASKS[side]).bool()
    with torch.no_grad():
        ours = backbone.head(backbone.run(backbone.embed(ids), mask))
    torch.testing.assert_close(ours[mask], official(backbone, ids, mask)[mask], atol=2e-5, rtol=1e-4)


def test_gradients_are_the_models(backbone: Backbone) -> None:
    ids, twin = text(backbone), copy.deepcopy(backbone)
    backbone.head(backbone.run(backbone.embed(ids), torch.ones_like(ids).bool())).square().mean().backward()
    twin.model(ids).logits.square().mean().backward()
    for (name, ours), theirs in zip(backbone.named_parameters(), twin.parameters(), strict=True):
        assert ours.grad is not None, name
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6 + 1e-4 * scale, rtol=1e-4, msg=name)


@pytest.mark.parametrize("joined", [True, False], ids=["one past", "several pasts"])
def test_pieces_with_a_cache_are_one_shot(backbone: Backbone, joined: bool) -> None:
    ids, mask = text(backbone), torch.tensor(MASKS["holes"]).bool()
    past: tuple[Past, ...] = ()
    found = []
    with torch.no_grad():
        whole = backbone.run(backbone.embed(ids), mask)
        for span in (slice(0, 2), slice(2, 3), slice(3, 9)):
            where = backbone.positions(mask)[:, span]
            hidden, own = backbone.run_cached(backbone.embed(ids[:, span]), mask[:, span], past, positions=where)
            assert own is not None
            past = (past[0].extend(own),) if joined and past else (*past, own)
            found.append(hidden)
    torch.testing.assert_close(torch.cat(found, dim=1)[mask], whole[mask], atol=2e-5, rtol=1e-4)


def test_padding_sees_something_and_is_never_nan(backbone: Backbone) -> None:
    ids, mask = text(backbone), torch.tensor([[0] * 9, [0] * 8 + [1], [1] * 9]).bool()
    assert bool(backbone.run(backbone.embed(ids), mask).isfinite().all())


def test_operations_are_counted(backbone: Backbone) -> None:
    ids = text(backbone, rows=1)
    mask = torch.ones_like(ids).bool()
    _, past = backbone.run_cached(backbone.embed(ids), mask)
    with torch.no_grad():
        short = measured_flops(lambda: backbone.head(backbone.run(backbone.embed(ids), mask)))
        after = measured_flops(
            lambda: backbone.head(
                backbone.run_cached(backbone.embed(ids), mask, past, positions=backbone.positions(mask) + 9)[0][:, -2:]
            )
        )
    assert backbone.flops(9, keys=9) == short
    assert backbone.flops(9, keys=18, predicted=2) == after


def test_cached_keys_can_move(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone("llama")
    ids, mask = text(backbone), torch.ones(3, 9).bool()
    _, past = backbone.run_cached(backbone.embed(ids), mask)
    assert past is not None
    moved = Past(past.keys, past.values, past.mask, past.positions + 40)
    with torch.no_grad():
        here, _ = backbone.run_cached(backbone.embed(ids), mask, past, positions=backbone.positions(mask) + 9)
        there, _ = backbone.run_cached(backbone.embed(ids), mask, moved, positions=backbone.positions(mask) + 49)
    torch.testing.assert_close(here, there, atol=2e-5, rtol=1e-4)


def test_key_shift_mixes_neighbouring_text_only(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone("llama", key_shift=True)
    normed = torch.randn(1, 6, backbone.hidden_width, generator=torch.Generator().manual_seed(0))
    is_text = torch.tensor([[False, True, True, True, False, True]])  # memory rows at 0 and 4
    share = torch.sigmoid(backbone.key_shift[0])
    _, shifted, _ = backbone.project(0, normed, is_text)
    plain = backbone._blocks[0].self_attn.k_proj(normed)
    expected = plain.clone()
    for at in (2, 3):  # the only text rows whose neighbour is text
        expected[:, at] = (1 - share) * plain[:, at] + share * plain[:, at - 1]
    torch.testing.assert_close(shifted.transpose(1, 2).flatten(2), expected)


def test_key_shift_never_crosses_memory_rows(make_backbone: Callable[..., Backbone]) -> None:
    shifting, plain = make_backbone("llama", key_shift=True), make_backbone("llama")
    plain.load_state_dict(shifting.state_dict(), strict=False)
    ids, mask = text(shifting, tokens=8), torch.ones(3, 8).bool()
    no_neighbours = torch.tensor([[False, True, False, False, True, False, True, False]]).expand(3, -1)
    with torch.no_grad():
        same = shifting.run(shifting.embed(ids), mask, text=no_neighbours)
        shifted = shifting.run(shifting.embed(ids), mask)
        expected = plain.run(plain.embed(ids), mask)
    torch.testing.assert_close(same, expected, atol=2e-5, rtol=1e-4)
    assert float((shifted - expected).abs().max()) > 0.01


def test_training_mode_drops_nothing(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    ids, mask = text(backbone), torch.ones(3, 9).bool()
    with torch.no_grad():
        calm = backbone.eval().run(backbone.embed(ids), mask)
        busy = backbone.train().run(backbone.embed(ids), mask)
    assert torch.equal(calm, busy)


@pytest.mark.parametrize(
    "kind",
    ["gpt_neox", "bart", "cohere", "cohere2", "olmo2", "starcoder2", "gemma2", "gpt_neo", "lfm2", "bloom", "mixtral"],
)
def test_other_architectures_are_refused_by_name(kind: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind))
    with pytest.raises(DataError, match=f"'{kind}' is not a supported backbone"):
        Backbone(model)


@pytest.mark.parametrize("kinds", [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")])
def test_turning_without_gradients_is_turning(kinds: tuple[str, str]) -> None:
    """To the bit, whether what is turned may be overwritten or not, and for rows that share positions."""
    mine, angles = (getattr(torch, kind) for kind in kinds)
    rng = torch.Generator().manual_seed(0)
    for rows, tokens in ((2, 5), (1, 5), (1, 1)):
        x = torch.randn(2, 3, 5, 8, generator=rng).to(mine)
        cos, sin = (torch.randn(rows, 1, tokens, 8, generator=rng).to(angles) for _ in range(2))
        with torch.enable_grad():
            expected = Backbone.rotate(x, (cos, sin))
        with torch.no_grad():
            before = x.clone()
            assert torch.equal(Backbone.rotate(x, (cos, sin)), expected)
            assert torch.equal(x, before), "what is not spent stays"
            assert torch.equal(Backbone.rotate(x, (cos, sin), spent=True), expected)


def test_a_mask_is_made_once_for_all_layers() -> None:
    """What attention itself makes of a bool, so that nothing changes by a bit; layers that share one share it."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 8, generator=rng) for n in (5, 9, 9))
    mask = itself(torch.rand(2, 5, 9, generator=rng) > 0.5)[:, None]
    one, other, plain, floats = added([mask, mask, None, torch.zeros(5, 9)], torch.float32)
    assert one is other
    assert plain is None
    assert floats is not None
    assert floats.dtype is torch.float32
    expected = F.scaled_dot_product_attention(q, k, v, mask)
    assert torch.equal(F.scaled_dot_product_attention(q, k, v, one), expected)
