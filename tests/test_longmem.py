"""LongMem: side network, bank, reading, freezing, and that a broken class fails its reference cases."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from memory_bench import plugins
from memory_bench.backbone.model import Backbone
from memory_bench.baselines import longmem
from memory_bench.baselines.longmem import LongMem, LongMemConfig
from memory_bench.baselines.parts import chunk_bank
from memory_bench.baselines.parts.chunk_bank import ChunkBank, Chunks
from memory_bench.baselines.parts.chunk_reader import ChunkReader
from memory_bench.baselines.parts.side_network import alibi_slopes
from memory_bench.budget import Budget, Usage
from memory_bench.corpus import TextCorpus
from memory_bench.driver.checkpoints import load_checkpoint, save_checkpoint
from memory_bench.driver.meter import Meter
from memory_bench.driver.train import train, trained_parameters
from memory_bench.errors import UserError
from memory_bench.parity.cases import Case, verify
from memory_bench.protocol import Segment
from memory_bench.recipe import Recipe, Stage
from memory_bench.shipped import parity_folder
from memory_bench.testing import card_of, tiny_backbone
from synthetic import make_cell

Make = Callable[..., Backbone]
T = 8  # tokens per segment
RECIPE = Recipe("all", (Stage(segments=3, rows=4),), lr=3e-3, warmup=2)


def build(backbone: Backbone, **options: Any) -> LongMem:
    sizes = {"segment": T, "memory_size": 40, "chunk": 2, "retrieved_tokens": 6, "gate_init": 0.3, **options}
    return LongMem(backbone, LongMemConfig(**sizes), torch.Generator().manual_seed(1)).eval()


def disturb(model: LongMem) -> LongMem:
    """Side weights that are no copies any more, gates that differ."""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.memory_parameters().values():
            p.add_(0.1 * torch.randn(p.shape, generator=rng))
    return model


def ids_of(tokens: int, rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(2, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def read(model: LongMem, ids: Tensor, cut: int = T) -> tuple[Tensor, ChunkBank]:
    state, logits = model.open(len(ids)), []
    for part in ids.split(cut, dim=1):
        readout, state = model.step(state, Segment.full(part))
        logits.append(readout.logits())
    return torch.cat(logits, dim=1), state


@pytest.fixture(params=["llama", "gpt2", "opt", "opt-350m", "qwen3"])
def backbone(request: pytest.FixtureRequest, make_backbone: Make) -> Backbone:
    if request.param == "opt-350m":
        return make_backbone("opt", word_embed_proj_dim=24, do_layer_norm_before=False, num_hidden_layers=4)
    return make_backbone(request.param, **{"n_layer" if request.param == "gpt2" else "num_hidden_layers": 4})


# The side network


@torch.no_grad()
def test_the_backbone_is_read_as_its_own_forward_does(make_backbone: Make) -> None:
    for kind in ("llama", "gpt2", "opt"):
        backbone, ids = make_backbone(kind), ids_of(T)
        expected = backbone.model(ids, output_hidden_states=True).hidden_states
        for ours, theirs in zip(build(backbone).encode(Segment.full(ids)).hidden, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_side_layers_start_as_copies_of_every_second_block(backbone: Backbone) -> None:
    model, segment = build(backbone), Segment.full(ids_of(T))
    hidden = model.encode(segment).hidden
    where = backbone.positions(segment.mask)
    turn, side = backbone.rotation(where)[0], model.side
    for i in range(2):
        x = hidden[2 * i + 1]
        q, k, v = side.project(i, side.norm_input(i, x), segment.mask)
        out = side.close(i, x, side.attend(side.rotate(q, turn), side.rotate(k, turn), v, None))
        out = side.final_norm(out) if i == 1 else out
        torch.testing.assert_close(out, hidden[2 * i + 2])
    assert all(p.data_ptr() != q.data_ptr() for p in side.parameters() for q in backbone.parameters())


@pytest.mark.parametrize(
    ("layers", "reduction", "block", "side"),
    [(2, 2, 1, 0), (4, 2, 3, 1), (12, 2, 9, 4), (24, 2, 17, 8), (32, 2, 23, 11), (5, 2, 3, 1), (3, 1, 2, 2)],
)
def test_the_reader_was_copied_from_the_block_whose_keys_it_reads(
    layers: int, reduction: int, block: int, side: int
) -> None:
    model = build(tiny_backbone("llama", num_hidden_layers=layers), reduction=reduction)
    assert (model.retrieval_layer, model.reading_layer) == (block, side)
    assert model.side_layers == layers // reduction
    own = model.backbone.model.model.layers[block].self_attn.k_proj.weight
    assert torch.equal(model.side.blocks[side].self_attn.k_proj.weight, own)


def official_by_hand(model: LongMem, ids: Tensor) -> Tensor:
    """Logits of the official model in float64, written out from its description, with loops over heads and tokens."""
    config, side, hf = model.config, model.side, model.backbone.model.double()
    side.double()
    layers, heads, c = len(side.blocks), side.heads, config.chunk
    gate, slopes = torch.sigmoid(model.memory_gate.double()), torch.tensor(alibi_slopes(heads)).double()
    bank_k, bank_v, outputs = torch.zeros(heads, 0, c, 8).double(), torch.zeros(heads, 0, c, 8).double(), []

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 8)).transpose(1, 2)

    for part in ids.split(config.segment, dim=1):
        hs = hf(part, output_hidden_states=True).hidden_states
        block = hf.transformer.h[model.retrieval_layer]
        _, keys, values = block.attn.c_attn(block.ln_1(hs[model.retrieval_layer])).chunk(3, dim=-1)
        x, tokens = hs[0], part.shape[1]
        hidden_future = torch.ones(tokens, tokens).triu(1).bool()
        for i, layer in enumerate(side.blocks):
            n = F.layer_norm(x, x.shape[-1:], layer.norm.weight, layer.norm.bias, 1e-5)
            q, k, v = (split(getattr(layer.attention, f"{name}_proj")(n)) for name in "qkv")
            logits = q @ k.transpose(2, 3) / 8**0.5 + slopes[:, None, None] * torch.arange(tokens)
            local = logits.masked_fill(hidden_future, -torch.inf).softmax(-1) @ v
            if i == model.retrieval_layer // config.reduction and bank_k.shape[1]:
                far = torch.zeros_like(local)
                for b, h, t in ((b, h, t) for b in range(len(ids)) for h in range(heads) for t in range(tokens)):
                    scores = bank_k[h].mean(1) @ q[b, h, t]
                    best = scores.argsort(descending=True)[: config.retrieved_tokens // c]
                    missing = torch.zeros((config.retrieved_tokens // c - len(best)) * c, 8).double()
                    some_k, some_v = (torch.cat([s[h][best].flatten(0, 1), missing]) for s in (bank_k, bank_v))
                    far[b, h, t] = (some_k @ q[b, h, t] / 8**0.5).softmax(0) @ some_v
                local = torch.lerp(local, far, gate[:, None, None].expand_as(local))
            mlp = layer.mlp.fc_out(F.gelu(layer.mlp.fc_in(n)))
            end = len(hs) - 1 if i + 1 == layers else config.reduction * (i + 1)
            x = mlp + layer.attention.o_proj(local.transpose(1, 2).flatten(2)) + x + hs[end] - hs[config.reduction * i]
        norm = F.layer_norm(x, x.shape[-1:], side.norm.weight, side.norm.bias, 1e-5)
        outputs.append(hf.lm_head(norm))
        new = part.numel() // c
        if bank_k.shape[1] + new >= config.memory_size // c:
            dropped = 2 * part.numel() // c
            bank_k, bank_v = bank_k[:, dropped:], bank_v[:, dropped:]
        flat_k, flat_v = (split(s).transpose(0, 1).flatten(1, 2)[:, : new * c] for s in (keys, values))
        bank_k = torch.cat([bank_k, flat_k.unflatten(1, (new, c))], dim=1)
        bank_v = torch.cat([bank_v, flat_v.unflatten(1, (new, c))], dim=1)
    return torch.cat(outputs, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("layers", [4, 7])
def test_official_options_agree_with_the_formulas(layers: int) -> None:
    config = LongMemConfig.official()
    options = {name: getattr(config, name) for name in ("side_block", "shared_bank", "zero_chunks", "coarse_eviction")}
    backbone = tiny_backbone("gpt2", n_layer=layers)
    sizes = {"segment": 5, "memory_size": 30, "chunk": 3, "retrieved_tokens": 12, "side_inner": 20}
    model = disturb(build(backbone, reduction=3 if layers == 7 else 2, **sizes, **options))
    ids = ids_of(43)
    ours, bank = read(model, ids, cut=5)
    assert bank.count < 10
    torch.testing.assert_close(ours.double(), official_by_hand(model, ids), atol=2e-4, rtol=1e-4)


# Reading


@torch.no_grad()
def test_retrieval_and_attention_agree_with_a_search_by_hand(make_backbone: Make) -> None:
    model = build(make_backbone("llama", num_hidden_layers=4))
    _, bank = read(model, ids_of(5 * T))
    rng = torch.Generator().manual_seed(5)
    q = torch.randn(2, 4, 3, 8, generator=rng)
    reader = model.reader(bank)
    retrieved = reader.retrieve(q)
    out = reader.attend(q * 8**-0.5, retrieved)
    for row, head, token in ((r, h, t) for r in range(2) for h in range(4) for t in range(3)):
        keys, values = (x[row, head // 2].unflatten(0, (-1, 2)) for x in (bank.joined().keys, bank.joined().values))
        best = (keys.mean(dim=1) @ q[row, head, token]).argsort(descending=True)[:3]
        assert retrieved[row, head, token].tolist() == best.tolist()
        weights = (keys[best].flatten(0, 1) @ q[row, head, token] / 8**0.5).softmax(dim=0)
        torch.testing.assert_close(out[row, head, token], weights @ values[best].flatten(0, 1))


@torch.no_grad()
def test_without_memory_attention_is_local_and_the_gate_not_applied(backbone: Backbone) -> None:
    segment = Segment.full(ids_of(T))
    low, high = (build(backbone, gate_init=g) for g in (-9.0, 9.0))
    empty = [m.step(m.open(2), segment)[0].logits() for m in (low, high)]
    torch.testing.assert_close(empty[0], empty[1])
    full = [m.step(m.absorb(m.open(2), Segment.full(ids_of(T, seed=1))), segment)[0].logits() for m in (low, high)]
    torch.testing.assert_close(full[0], empty[0], atol=5e-3, rtol=5e-3)
    assert (full[1] - empty[1]).abs().max() > 1e-2
    ids = ids_of(T, seed=1)
    half = low.absorb(low.open(2), Segment(ids, torch.tensor([[True], [False]]).expand(2, T)))
    for model in (low, high):  # the second row remembers nothing
        torch.testing.assert_close(model.step(half, segment)[0].logits()[1], empty[0][1])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_memory_positions(kind: str, make_backbone: Make) -> None:
    models = [build(make_backbone(kind), memory_position=p) for p in ("none", "query", "constant")]
    none, query, constant = (read(m, ids_of(2 * T))[0] for m in models)
    assert torch.equal(none[:, :T], query[:, :T])
    same = (torch.equal(none[:, T:], query[:, T:]), torch.equal(query[:, T:], constant[:, T:]))
    assert same == ((False, False) if kind == "llama" else (True, True))


@torch.no_grad()
def test_only_earlier_steps_are_remembered(make_backbone: Make) -> None:
    model = build(make_backbone("llama"))
    _, state = read(model, ids_of(2 * T))
    segment = Segment.full(ids_of(T, seed=7))
    assert torch.equal(model.step(state, segment)[0].hidden, model.step(state, segment, write=False)[0].hidden)
    assert model.step(state, segment, write=False)[1] is state


# The bank


def entries(rows: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, tokens, 4, generator=rng), torch.randn(rows, 2, tokens, 4, generator=rng)


def fill(bank: ChunkBank, keys: Tensor, values: Tensor, lengths: list[int]) -> ChunkBank:
    start = 0
    for n in lengths:
        mask = torch.ones(len(keys), n, dtype=torch.bool)
        bank = bank.write(keys[:, :, start : start + n], values[:, :, start : start + n], mask)
        start += n
    return bank


def empty(rows: int, chunk: int, capacity: int, **options: bool) -> ChunkBank:
    return ChunkBank.empty(torch.zeros(rows, 2, 0, 4), chunk, capacity, **options)


@pytest.mark.parametrize("lengths", [[24], [8, 8, 8], [5, 5, 5, 5, 4], [1] * 24, [2, 0, 3, 7, 1, 11]])
def test_chunks_do_not_depend_on_where_the_text_is_cut(lengths: list[int]) -> None:
    keys, values = entries(2, 26)
    bank = fill(empty(2, 4, 100), keys, values, [*lengths, 2])
    chunks = bank.joined()
    torch.testing.assert_close(chunks.keys, keys[:, :, :24])
    torch.testing.assert_close(chunks.values, values[:, :, :24])
    torch.testing.assert_close(chunks.index, keys[:, :, :24].unflatten(2, (6, 4)).mean(dim=3))
    assert chunks.full
    torch.testing.assert_close(bank.waiting_keys, keys[:, :, 24:])


@pytest.mark.parametrize("capacity", [4, 5, 7])
def test_exactly_the_oldest_chunks_are_dropped(capacity: int) -> None:
    keys, values = entries(2, 64)
    bank = empty(2, 2, capacity)
    for written in range(1, 9):
        bank = fill(bank, keys[:, :, 8 * (written - 1) :], values[:, :, 8 * (written - 1) :], [8])
        held = min(capacity, 4 * written)
        torch.testing.assert_close(bank.joined().keys, keys[:, :, 8 * written - 2 * held : 8 * written])
    long = fill(empty(2, 2, capacity), keys, values, [64])
    torch.testing.assert_close(long.joined().values, values[:, :, 64 - 2 * capacity :])


@pytest.mark.parametrize("capacity", [3, 6, 20])
def test_ragged_rows_hold_what_each_holds_alone(capacity: int) -> None:
    rng = torch.Generator().manual_seed(0)
    bank, alone = empty(3, 2, capacity), [empty(1, 2, capacity) for _ in range(3)]
    for step in range(9):
        keys, values = entries(3, 7, seed=step)
        mask = torch.rand(3, 7, generator=rng) < 0.6
        mask[1] = step % 3 == 0
        bank = bank.write(keys, values, mask)
        for row in range(3):
            if mask[row].any():
                k, v = keys[row : row + 1][:, :, mask[row]], values[row : row + 1][:, :, mask[row]]
                alone[row] = alone[row].write(k, v, torch.ones(1, int(mask[row].sum()), dtype=torch.bool))
        assert bank.count <= max(capacity, max(b.count for b in alone), 1)
    chunks = bank.joined()
    for row in range(3):
        own, slots = alone[row].joined(), chunks.valid[row].repeat_interleave(2)
        torch.testing.assert_close(chunks.keys[row][:, slots], own.keys[0])
        torch.testing.assert_close(chunks.values[row][:, slots], own.values[0])
        torch.testing.assert_close(chunks.index[row][:, chunks.valid[row]], own.index[0])
        torch.testing.assert_close(bank.waiting_keys[row][:, bank.waiting_mask[row]], alone[row].waiting_keys[0])
    assert not chunks.keys.isnan().any()


def test_a_write_shares_what_was_written_before() -> None:
    keys, values = entries(2, 48)
    before = fill(empty(2, 4, 10), keys, values, [8] * 5)
    after = fill(before, keys[:, :, 40:], values[:, :, 40:], [8])
    places = [block.keys.data_ptr() for block in before.blocks]
    assert [block.keys.data_ptr() for block in after.blocks[:-1]] == places[1:]
    assert len({block.keys.untyped_storage().nbytes() for block in after.blocks}) == 1
    assert after.size() == before.size()


def test_a_shared_bank_takes_rows_one_after_the_other_and_drops_the_rest() -> None:
    keys, values = entries(2, 7)
    bank = fill(empty(2, 4, 100, shared=True), keys, values, [7])
    flat = keys.transpose(0, 1).flatten(1, 2)
    torch.testing.assert_close(bank.joined().keys[0], flat[:, :12])
    assert bank.waiting_mask.numel() == 0
    assert bank.rows(torch.tensor([1, 1, 0])) is bank


def test_official_eviction_swings_below_the_size() -> None:
    """65536 tokens, chunks of 4, 8 rows of 1024 tokens: a sixteenth of them here."""
    bank, counts = empty(8, 4, 1024, shared=True, coarse=True), []
    keys, values = entries(8, 64)
    for _ in range(30):
        bank = fill(bank, keys, values, [64])
        counts.append(bank.count * 16)
    assert max(counts) == 14336
    assert set(counts[7:]) == {12288, 14336}


def test_an_empty_bank_can_be_read() -> None:
    reader = ChunkReader.of(fill(empty(1, 4, 9, shared=True), *entries(1, 3), [3]), 2, zero_chunks=True)
    q = torch.ones(1, 2, 3, 4)
    assert reader.retrieve(q).eq(-1).all()
    assert reader.attend(q, reader.retrieve(q)).eq(0).all()


def test_missing_chunks_are_masked_or_zeros() -> None:
    keys, values = entries(1, 4)
    bank = fill(empty(1, 2, 9), keys, values, [4])
    q = torch.randn(1, 2, 1, 4, generator=torch.Generator().manual_seed(2))
    masked, zeros = (ChunkReader.of(bank, 3, zero_chunks=z) for z in (False, True))
    assert masked.retrieve(q).shape[-1] == 2
    assert zeros.retrieve(q)[..., 2].eq(-1).all()
    a, b = (r.attend(q, r.retrieve(q)) for r in (masked, zeros))
    total = torch.einsum("bhtd,bhkd->bhtk", q, keys).exp().sum(dim=-1, keepdim=True)
    torch.testing.assert_close(b, a * total / (total + 2))


# Training


def toy() -> TextCorpus:
    phrase = torch.randperm(64, generator=torch.Generator().manual_seed(1))[:12]
    return TextCorpus([phrase.repeat(40)])


def test_training_lowers_the_loss_and_leaves_the_backbone_as_it_was(tmp_path: Path) -> None:
    backbone = tiny_backbone("qwen3")
    before = {n: p.detach().clone() for n, p in backbone.named_parameters()}
    config = LongMem.fit(card_of(backbone), Budget("test"))

    def make(config: Any) -> LongMem:
        return LongMem(backbone, config, torch.Generator().manual_seed(5))

    start = {n: p.detach().clone() for n, p in make(config).memory_parameters().items()}
    meter = Meter(Budget("test", train_tokens=4 * 3 * T * 25), torch.device("cpu"))
    with meter.phase("train"):
        done = train(make, config, RECIPE, toy(), meter, seed=0)
    losses = [loss for _, loss in done.curve]
    assert losses[-1] < 0.6 * losses[0]
    assert all(torch.equal(p, before[n]) for n, p in backbone.named_parameters())
    trained = done.model.memory_parameters()
    assert all(not torch.equal(p, start[n]) for n, p in trained.items())
    assert trained_parameters(done.model, RECIPE).keys() == trained.keys()

    save_checkpoint(tmp_path / "kept", done, RECIPE, make_cell("longmem").training, meter.usage)
    assert load_file(tmp_path / "kept" / "weights.safetensors").keys() == trained.keys()
    again = load_checkpoint(tmp_path / "kept", make_cell("longmem").training, make, config, Usage())
    assert again is not None
    with torch.no_grad():
        assert torch.equal(read(again.model, ids_of(3 * T))[0], read(done.model, ids_of(3 * T))[0])


def test_gradients_reach_the_gate_and_never_the_bank(make_backbone: Make) -> None:
    model = build(make_backbone("llama"))
    state = model.absorb(model.open(1), Segment.full(ids_of(T, rows=1)))
    readout, after = model.step(state, Segment.full(ids_of(T, rows=1, seed=1)))
    readout.logits().square().sum().backward()
    assert model.memory_gate.grad is not None
    assert bool(model.memory_gate.grad.ne(0).all())
    assert not any(t.requires_grad for _, t in after.tensors())
    inside = dict(model.backbone.model.model.layers.named_parameters())
    assert all(p.grad is None for p in inside.values())


def test_writing_alone_is_cheaper(backbone: Backbone) -> None:
    model = build(backbone)
    assert model.absorb_flops(T, 4 * T) < 0.7 * model.flops(T, 4 * T)


# Refusals


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"retrieved_tokens": 7}, r"no multiple of chunk = 2: use 8"),
        ({"chunk": 0}, "at least 1"),
        ({"memory_size": 1}, "at least one chunk"),
        ({"side_inner": 0}, "side_inner must be at least 1"),
        ({"coarse_eviction": True}, "shared_bank = true"),
        ({"memory_position": "zero"}, "memory_position"),
        ({"side_block": "parralel"}, "parallel"),
        ({"reduction": 3}, "leaves no side layer"),
        ({"retrieval_layer": 2}, "use 0 to 1"),
    ],
)
def test_settings_that_cannot_work_are_sentences(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build(tiny_backbone("llama"), **options)


def test_a_segment_must_fit_the_positions() -> None:
    with pytest.raises(UserError, match="192 positions"):
        build(tiny_backbone("gpt2"), segment=200)


def test_the_size_follows_the_budget() -> None:
    card = card_of(tiny_backbone("llama", num_hidden_layers=8))
    wide = LongMem.fit(card, Budget("test"))
    assert (wide.reduction, wide.memory_size) == (2, 64 * 8)
    small = LongMem.fit(card, Budget("test", added_parameters=20_000, device_bytes=200_000))
    model = LongMem(tiny_backbone("llama", num_hidden_layers=8), small, torch.Generator())
    assert sum(p.numel() for p in model.memory_parameters().values()) <= 20_000
    assert small.memory_size * 2 * 2 * 8 * 4 <= 20_000


# Reference cases


def shipped() -> list[Case]:
    return [Case(f) for f in sorted(parity_folder().glob("longmem-*"))]


def replay(case: Case) -> bool:
    return verify(Case(case.folder), plugins.load("parity", "longmem")).ok


def spoil_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate's sign is wrong."""
    mix = longmem.mix_by_gate
    monkeypatch.setattr(longmem, "mix_by_gate", lambda a, b, gate, known=None: mix(a, b, -gate, known))


def spoil_eviction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is ever forgotten."""
    monkeypatch.setattr(ChunkBank, "_drop", lambda self, blocks, chunks: blocks)


def spoil_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk is found by its first key."""
    of = Chunks.of.__func__

    def wrong(cls: type[Chunks], keys: Tensor, values: Tensor, counts: Any, size: int) -> Chunks:
        chunks = of(cls, keys, values, counts, size)
        return Chunks(chunks.keys, chunks.values, chunks.keys[:, :, ::size].float(), chunks.valid, chunks.full)

    monkeypatch.setattr(chunk_bank.Chunks, "of", classmethod(wrong))


def spoil_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last side layer is given a little too much of what the backbone added."""
    encode = LongMem.encode

    def wrong(
        self: LongMem, segment: Segment, upto: int | None = None, bank: ChunkBank | None = None
    ) -> longmem.Encoded:
        encoded = encode(self, segment, upto, bank)
        return replace(encoded, hidden=(*encoded.hidden[:-1], encoded.hidden[-1] * 1.05))

    monkeypatch.setattr(LongMem, "encode", wrong)


@pytest.mark.parametrize(
    ("spoil", "red"),
    [
        (spoil_gate, {"full-alibi", "full-llama-backbone", "joint-attention-unit"}),
        (spoil_eviction, {"full-alibi", "memory-bank-unit"}),
        (spoil_mean, {"full-alibi", "full-llama-backbone", "memory-bank-unit", "memory-bank-unit-underfull"}),
        (spoil_residual, {"full-alibi", "full-llama-backbone"}),
    ],
)
def test_a_broken_class_breaks_verify_and_run(
    spoil: Callable[[pytest.MonkeyPatch], None], red: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = shipped()
    if not cases:
        pytest.skip("no shipped case of longmem")
    model = disturb(build(tiny_backbone("llama", num_hidden_layers=4), memory_size=24))
    before, _ = read(model, ids_of(6 * T))
    spoil(monkeypatch)
    failed = {case.name.removeprefix("longmem-") for case in cases if not replay(case)}
    assert red <= failed
    assert (read(model, ids_of(6 * T))[0] - before).abs().max() > 1e-3


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Case]:
    """``changed(name, info, **parts)``: a shipped case with changes in case.json and in its tensor files."""

    def make(name: str, info: Callable[[dict[str, Any]], Any] | None = None, **parts: Callable[[Any], Any]) -> Case:
        folder = tmp_path / "case"
        shutil.copytree(parity_folder() / name, folder)
        if info is not None:
            said = json.loads((folder / "case.json").read_text())
            info(said)
            (folder / "case.json").write_text(json.dumps(said))
        for part, change in parts.items():
            tensors = load_file(folder / f"{part}.safetensors")
            change(tensors)
            save_file(tensors, folder / f"{part}.safetensors")
        return Case(folder)

    return make


@pytest.mark.parametrize("case", shipped(), ids=lambda case: case.name)
@pytest.mark.parametrize("setting", [{"fancy": 1}, {"fusion": "sum"}, {"bank_scope": "one bank per row"}])
def test_unknown_settings_are_errors(case: Case, setting: dict[str, Any], changed: Callable[..., Case]) -> None:
    with pytest.raises(UserError):
        replay(changed(case.name, lambda info: info["memory"].update(setting)))


@pytest.mark.parametrize("case", shipped(), ids=lambda case: case.name)
def test_weights_are_loaded_strictly(case: Case, changed: Callable[..., Case]) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["memory.of_another_model"] = torch.ones(1)

    with pytest.raises(UserError, match="do not fit"):
        replay(changed(case.name, weights=add))


def test_another_kind_of_official_backbone_is_refused(changed: Callable[..., Case]) -> None:
    with pytest.raises(UserError, match="use 'alibi'"):
        replay(changed("longmem-full-alibi", lambda info: info["backbone"].update(mode="rotary")))


def test_a_retrieved_chunk_with_another_score_is_not_taken(changed: Callable[..., Case]) -> None:
    def swap(tensors: dict[str, Tensor]) -> None:
        index = tensors["step3.retrieved_chunk_index"]
        tensors["step3.retrieved_chunk_index"] = index.flip(-1).contiguous()

    assert not replay(changed("longmem-memory-bank-unit", expected=swap))
