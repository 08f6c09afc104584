"""UniMix: a pass written again by hand, each part and each official quirk switched, sizes, what is counted."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from memory_bench.backbone.model import Backbone
from memory_bench.baselines import unimix
from memory_bench.baselines.truncation import Truncation
from memory_bench.baselines.unimix import UniMix, UniMixConfig
from memory_bench.budget import Budget
from memory_bench.errors import UserError
from memory_bench.protocol import Segment
from memory_bench.testing.measures import measured_flops

Make = Callable[..., Backbone]
L, M, W, K, S = 8, 2, 6, 2, 3
LENGTHS = (8, 8, 8, 8, 5, 8)  # the store wraps; one segment is short


def build(backbone: Backbone, **options: Any) -> UniMix:
    config = UniMixConfig(**{"segment": L, "memory_tokens": M, "window": W, "top_k": K, "store_segments": S, **options})
    model = UniMix(backbone, config, torch.Generator().manual_seed(1)).eval()
    with torch.no_grad():
        model.initial_memory.mul_(50)  # where it does not show, nothing is tested
    return model


def ids_of(tokens: int, rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(2, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def read(model: UniMix, lengths: tuple[int, ...] = LENGTHS, first: int = 0) -> tuple[list[Tensor], Any]:
    state, found = model.open(2), []
    for number, tokens in enumerate(lengths, start=first):
        readout, state = model.step(state, Segment.full(ids_of(tokens, seed=number)))
        found.append(readout.hidden)
    return found, state


def by_hand(model: UniMix, row: int, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """Final hidden states of every segment of one row, entry by entry."""
    backbone, config = model.backbone, model.config
    e, groups = backbone.head_width, backbone.heads // backbone.kv_heads
    memory, m = None, config.memory_tokens
    stores: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in model.layers}
    found = []
    for number, length in enumerate(lengths):
        text = backbone.embed(ids_of(length, seed=number)[row : row + 1])
        learned = model.initial_memory[None]
        behind = learned if memory is None or config.write_from == "learned" else memory
        x = torch.cat([*([] if memory is None else [memory]), text, behind], dim=1)
        front, total = 0 if memory is None else m, x.shape[1]
        where = torch.arange(total)[None]
        is_text = (where >= front) & (where < front + length)
        hidden = backbone.begin(x, where)
        turns = backbone.rotation(where)
        for layer in range(backbone.layers):
            q, k, v = backbone.project(layer, backbone.norm_input(layer, hidden), is_text)
            turned_q, turned_k = backbone.rotate(q, turns[layer]), backbone.rotate(k, turns[layer])
            stored, rows = stores.get(layer, []), torch.zeros(total, backbone.heads, e)
            for h in range(backbone.heads):
                g = h // groups
                for p in range(total):
                    entries = [(turned_k[0, g, j], v[0, g, j]) for j in range(p + 1)]
                    near = min(len(stored), max(0, model.window - p))
                    for age in range(near):
                        key, value = stored[-1 - age]
                        at = torch.tensor([[-1 - age if config.window_position == "kept" else 0]])
                        entries.append(
                            (backbone.rotate(key[None, :, None], backbone.rotation(at)[layer])[0, g, 0], value[g])
                        )
                    rest = stored[: len(stored) - near]
                    rest = sorted(rest, key=lambda pair: -float(turned_q[0, h, p] @ pair[0][g]))
                    if config.retrieve_twice:
                        rest = rest + stored[len(stored) - near :]
                    entries += [(key[g], value[g]) for key, value in rest[: config.top_k]]
                    logits = torch.stack([turned_q[0, h, p] @ key for key, _ in entries]) / e**0.5
                    rows[p, h] = logits.softmax(dim=0) @ torch.stack([value for _, value in entries])
            hidden = backbone.close(layer, hidden, rows.flatten(1)[None])
            if layer in stores:
                start = front + (m if memory is None and config.first_slice == "official" else 0)
                new = [(k[0, :, j], v[0, :, j]) for j in range(start, start + length)]
                if config.overflow == "clear" and len(stored) + length > S * L:
                    stores[layer] = []
                else:
                    stores[layer] = [*stored, *new][-S * L :]
        final = backbone.end(hidden)
        found.append(final[0, front : front + length])
        memory = final[:, front + length :]
    return found


VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "all layers": {"layers": (0, 1)},
    "nothing retrieved": {"top_k": 0},
    "no recurrent tokens": {"memory_tokens": 0},
    "no window": {"window": 0},
    "retrieval alone": {"window": 0, "memory_tokens": 0},
    "the window at zero": {"window_position": "zero"},
    "the official first slice": {"first_slice": "official", "layers": (0, 1)},
    "found twice": {"retrieve_twice": True, "top_k": 24, "layers": (0, 1)},
    "cleared": {"overflow": "clear"},
    "written from the learned": {"write_from": "learned"},
    "as published": {"window_position": "zero", "first_slice": "official", "retrieve_twice": True, "top_k": 24},
}


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_a_stream_is_what_a_loop_over_single_entries_makes_of_it(name: str, make_backbone: Make) -> None:
    model = build(make_backbone("qwen3"), **VARIANTS[name])
    ours, _ = read(model)
    for step, (got, expected) in enumerate(zip(ours, by_hand(model, row=1), strict=True)):
        torch.testing.assert_close(got[1], expected, atol=2e-5, rtol=1e-4, msg=lambda m, s=step: f"segment {s}: {m}")


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "as it is"])
def test_every_switch_changes_numbers(name: str, make_backbone: Make) -> None:
    backbone = make_backbone("qwen3")
    ours, others = read(build(backbone))[0], read(build(backbone, **VARIANTS[name]))[0]
    assert max(float((a - b).abs().max()) for a, b in zip(ours, others, strict=True)) > 1e-3


@torch.no_grad()
def test_with_everything_off_it_is_the_window(make_backbone: Make) -> None:
    backbone = make_backbone()
    model = build(backbone, top_k=0, memory_tokens=0, window=0)
    plain = Truncation(backbone, Truncation.Config(L), torch.Generator())
    for number, hidden in enumerate(read(model)[0]):
        ids = ids_of(LENGTHS[number], seed=number)
        assert torch.equal(hidden, plain.step(plain.open(2), Segment.full(ids))[0].hidden)
        assert model.flops(LENGTHS[number], L * number) == plain.flops(LENGTHS[number], L * number)
    assert model.added_parameters() == 0


@torch.no_grad()
def test_a_window_alone_in_all_layers_is_the_backbone_with_a_sliding_window(make_backbone: Make) -> None:
    model = build(make_backbone("mistral"), layers=(0, 1), top_k=0, memory_tokens=0, window=L)
    own: Any = make_backbone("mistral", sliding_window=L + 1).model  # the same weights; a query sees itself and L more
    lengths = (L,) * 5
    ids = torch.cat([ids_of(L, seed=number) for number in range(5)], dim=1)
    expected = own.model(ids).last_hidden_state
    torch.testing.assert_close(torch.cat(read(model, lengths)[0], dim=1), expected, atol=2e-5, rtol=1e-4)
    assert model.open(1).store.capacity == L  # nothing beyond the window is ever read


# Official quirks


@torch.no_grad()
def test_the_official_first_slice_loses_the_first_tokens_and_stores_memory(make_backbone: Make) -> None:
    backbone = make_backbone()
    clean, official = (read(build(backbone, first_slice=way, layers=(0,)), (L, L)) for way in ("text", "official"))
    torch.testing.assert_close(clean[0][0], official[0][0])  # nothing is read yet
    ours, theirs = clean[1].store.keys[0], official[1].store.keys[0]
    torch.testing.assert_close(theirs[:, :, : L - M], ours[:, :, M:L])
    model = build(backbone)
    embedded = backbone.begin(model.initial_memory.expand(2, -1, -1), torch.arange(L, L + M).expand(2, -1))
    keys = backbone.project(0, backbone.norm_input(0, embedded))[1]
    torch.testing.assert_close(theirs[:, :, L - M : L], keys)
    torch.testing.assert_close(theirs[:, :, L:], ours[:, :, L:], atol=1e-5, rtol=1e-4)  # later segments store text
    ragged = Segment(ids_of(L), torch.tensor([[True] * L, [False] * L]))
    assert build(backbone, first_slice="official").absorb(model.open(2), ragged).store.written.tolist() == [L, 0]


@torch.no_grad()
def test_tokens_are_found_twice_while_the_store_is_not_longer_than_the_window(make_backbone: Make) -> None:
    options = {"window": L, "memory_tokens": 0}  # in the last layer alone: what is stored does not depend on it
    once, twice = (read(build(make_backbone(), retrieve_twice=way, **options))[0] for way in (False, True))
    moved = [float((a - b).abs().max()) for a, b in zip(once, twice, strict=True)]
    assert moved[1] > 1e-3
    assert max([moved[0], *moved[2:]]) == 0.0


# What is chosen, sizes, counts


@torch.no_grad()
def test_as_many_are_drawn_at_random_from_what_the_search_may_find(make_backbone: Make) -> None:
    backbone = make_backbone()
    for seeds in ((0, 0), (3, 4)):
        model, found = build(backbone, selection="random"), []
        state = model.open(2, seeds=seeds)
        for number in range(4):
            readout, state = model.step(state, Segment.full(ids_of(L, seed=number)))
            found.append(readout.hidden)
        again = model.step(state, Segment.full(ids_of(L, seed=5)), write=False)[0].hidden
        assert torch.equal(model.step(state, Segment.full(ids_of(L, seed=5)), write=False)[0].hidden, again)
        assert float((found[3] - read(build(backbone))[0][3]).abs().max()) > 1e-3
    everything = {"top_k": S * L}  # there is nothing to choose
    both = [read(build(backbone, selection=way, **everything))[0] for way in ("best", "random")]
    for best, drawn in zip(*both, strict=True):
        torch.testing.assert_close(best, drawn, atol=1e-5, rtol=1e-4)
    model = build(backbone, selection="random")
    assert model.flops(L, 24) == build(backbone).flops(L, 24) - 2 * 24 * 32 * (L + 2 * M)


@torch.no_grad()
@pytest.mark.parametrize("name", [*VARIANTS, "chance"])
def test_operations_are_counted_exactly(name: str, make_backbone: Make) -> None:
    model = build(make_backbone(), **VARIANTS.get(name, {"selection": "random"}))
    state = model.open(1)
    for number in range(5):
        segment = Segment.full(ids_of(L, rows=1, seed=number))
        counted = measured_flops(lambda s=state, t=segment: model.step(s, t)[0].logits())
        assert counted == model.flops(L, number * L), number
        state = model.absorb(state, segment)


@torch.no_grad()
def test_a_full_store_drops_its_oldest_or_is_cleared(make_backbone: Make) -> None:
    for overflow, written in (("drop oldest", [8, 16, 24, 32, 40]), ("clear", [8, 16, 24, 0, 8])):
        model = build(make_backbone(), overflow=overflow)
        state, sizes = model.open(1), []
        for number in range(5):
            state = model.absorb(state, Segment.full(ids_of(L, rows=1, seed=number)))
            sizes.append(int(state.store.written))
        assert sizes == written
        assert state.store.slots == S * L


def test_gradients_reach_the_first_vectors_through_later_segments(make_backbone: Make) -> None:
    model = build(make_backbone()).train()
    state = model.open(2)
    for number in range(3):
        readout, state = model.step(state, Segment.full(ids_of(L, seed=number)))
        if number == 0:
            first = state.memory
    assert bool(torch.autograd.grad(readout.hidden.sum(), [first])[0].any())
    assert not state.store.keys[0].requires_grad


def test_config_and_fit(make_backbone: Make, make_card: Any) -> None:
    wrong: dict[str, Any]
    for wrong in (
        {"segment": 0}, {"memory_tokens": -1}, {"top_k": -1}, {"window": -1}, {"store_segments": 0},
        {"window": 20, "segment": 8, "store_segments": 2}, {"window_position": "kep"}, {"overflow": "drop"},
        {"first_slice": "txt"}, {"write_from": "memry"}, {"selection": "bst"},
    ):  # fmt: skip
        with pytest.raises(UserError, match="unimix"):
            UniMixConfig(**wrong)
    with pytest.raises(UserError, match="this backbone has layers 0 to 1"):
        build(make_backbone(), layers=(2,))
    small = make_card(make_backbone())
    assert UniMix.fit(small, Budget("x")) == UniMixConfig(8, 4)
    large = replace(small, width=576, window=512, layers=30, kv_heads=3, head_width=64, pretrained=True)
    assert UniMix.fit(large, Budget("x")) == UniMixConfig(256, 16)
    few = UniMix.fit(large, Budget("x", added_parameters=2000, device_bytes=100_000_000))
    assert few.memory_tokens == 3
    assert few.store_segments * 256 * 2 * 4 * 15 * 3 * 64 <= 10_000_000
    official = UniMixConfig.official()
    assert (official.memory_tokens, official.store_segments, official.window, official.top_k) == (40, 20, None, 4)
    assert UniMix(make_backbone("llama", num_hidden_layers=5), UniMixConfig(8), torch.Generator()).layers == (2, 3, 4)


MUTANTS = {
    "memory is never read": ("state.known | real", "state.known & real"),
    "the window does not slide": ("newest(store, self.window, where)", "newest(store, self.window, where * 0)"),
    "what is in the window is found": ("beyond(store, self.window, where)", "beyond(store, 0, where)"),
    "the window a place too far": ("-1 - near.age", "-2 - near.age"),
    "memory before it is read": ("hidden[:, m + tokens :]", "back"),
    "products are not divided": ("own.q * self.backbone.head_width**-0.5", "own.q"),
    "memory is stored": ("columns = m + torch", "columns = 0 * m + torch"),
    "the upper half is all": ("range(layers // 2, layers)", "range(layers)"),
}


@torch.no_grad()
@pytest.mark.parametrize("flaw", MUTANTS)
def test_every_rule_that_is_broken_shows(flaw: str, make_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = MUTANTS[flaw]
    source = inspect.getsource(unimix).replace("from .parts", "from memory_bench.baselines.parts")
    assert source.count(old) == 1, old
    mutant = ModuleType("mutant")
    monkeypatch.setitem(sys.modules, "mutant", mutant)
    exec(compile(source.replace(old, new), "mutant.py", "exec"), mutant.__dict__)
    right = build(make_backbone("qwen3"))
    config = mutant.UniMixConfig(**{f: getattr(right.config, f) for f in UniMixConfig.__slots__})
    wrong = mutant.UniMix(right.backbone, config, torch.Generator().manual_seed(1)).eval()
    wrong.load_state_dict(right.state_dict())
    moved = [float((a - b).abs().max()) for a, b in zip(read(right)[0], read(wrong)[0], strict=True)]
    assert max(moved) > 1e-4
