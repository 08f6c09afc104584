"""Every installed memory model, on every backbone family it declares, and every task keeps every promise."""

import os
import re
from dataclasses import replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

from memory_bench.budget import Budget
from memory_bench.data import Library
from memory_bench.data.library import MADE
from memory_bench.protocol import MemoryModel, Segment
from memory_bench.testing import Check, card_of, check_task, measure_look_ahead, model_checks, tiny_backbone

KINDS = {"llama": ("llama", "qwen3", "smollm3-window"), "gpt2": ("gpt2",), "opt": ("opt",)}
# Data that are made by a program, at least where nothing else is had.
EMBEDDED = ("pubmedqa", "squad", "nq", "locomo", *MADE)
TASKS = {e.name: e for e in entry_points(group="memory_bench.tasks") if e.value.startswith("memory_bench.")}
MODELS = {e.name: e for e in entry_points(group="memory_bench.models") if e.value.startswith("memory_bench.")}


@cache
def load(entry: EntryPoint) -> type[MemoryModel[Any]] | Exception:
    """The model class, or why it cannot be imported: that is for the model's own tests to report."""
    try:
        kind: type[MemoryModel[Any]] = entry.load()
    except Exception as error:
        return error
    return kind


def build(kind: type[MemoryModel[Any]], backbone: str, **options: Any) -> MemoryModel[Any]:
    """The model as it sizes itself to a tiny backbone with a window of 8 tokens."""
    tiny = tiny_backbone(backbone)
    config = replace(kind.fit(card_of(tiny, window=8), Budget("tests")), **options)  # type: ignore[attr-defined]
    return kind(tiny, config, torch.Generator().manual_seed(1))


def cases() -> list[Any]:
    """(model, backbone) for every family a model declares; a broken import is one case of its own."""
    found = []
    for name, entry in sorted(MODELS.items()):
        kind = load(entry)
        families = ("llama",) if isinstance(kind, Exception) else kind.families
        found += [pytest.param(entry, tiny, id=f"{name}-{tiny}") for family in families for tiny in KINDS[family]]
    return found


@pytest.mark.parametrize("check", model_checks(), ids=lambda check: check.__name__)
@pytest.mark.parametrize(("entry", "backbone"), cases())
def test_installed_models_keep_their_promises(entry: EntryPoint, backbone: str, check: Check) -> None:
    kind = load(entry)
    if isinstance(kind, Exception):
        pytest.fail(f"{entry.value} cannot be imported: {kind!r}")
    check(lambda: build(kind, backbone))


def looks_ahead() -> list[Any]:
    """(model, option, value) of every published way that docs/look-ahead.md says looks ahead."""
    text = (Path(__file__).parents[1] / "docs/look-ahead.md").read_text(encoding="utf-8")
    found = re.findall(r"\| `([\w-]+)\[(\w+)=([\w-]+)\]` \|", text)
    return [pytest.param(*words, id="-".join(words)) for words in found]


@pytest.mark.parametrize(("name", "option", "value"), looks_ahead())
def test_official_look_ahead_is_measured(name: str, option: str, value: str) -> None:
    kind = load(MODELS[name])
    assert not isinstance(kind, Exception), kind
    model = build(kind, "llama", **{option: True if value == "true" else value}).eval()
    assert model.traits.look_ahead > 0
    assert measure_look_ahead(model) == model.traits.look_ahead


def test_the_page_names_every_published_way_that_looks_ahead() -> None:
    named = {p.values[0] for p in looks_ahead()}
    assert named == {"hmt", "mplus", "infllm", "emllm", "memlong", "infini-attention", "ttt"}


@pytest.mark.parametrize("name", sorted(TASKS))
@pytest.mark.parametrize("origin", ["data folder", "stand-in"])
def test_installed_tasks_keep_their_promises(name: str, origin: str, tmp_path: Path) -> None:
    task = TASKS[name].load()()
    folder = os.environ.get("MEMORY_BENCH_DATA")
    if name == "folder":  # any folder of texts, which is made here
        origin, folder = "data folder", str(tmp_path / "data")
        (tmp_path / "data/texts").mkdir(parents=True)
        for number in range(5):
            (tmp_path / f"data/texts/{number}.txt").write_text(f"A text of one's own, number {number}.")
    if origin == "data folder" and not folder:
        pytest.skip("MEMORY_BENCH_DATA names no data folder")
    if origin == "stand-in" and task.needs not in EMBEDDED:
        pytest.skip(f"the stand-in for {task.needs} would have to be downloaded")
    place = Path(str(folder)) if origin == "data folder" else None
    check_task(task, Library(place, tmp_path, stand_ins=place is None, hub=False))


ODD = (
    "mistral-window",
    "ministral",
    "smollm3-window",
    "ministral3",
    "granite",
)  # layers that differ, scales, multipliers
PLAIN = (
    "armt",
    "autocompressor",
    "extended-mind",
    "full-context",
    "infini-attention",
    "memlong",
    "memorizing",
    "memoryllm",
    "memoryprompt",
    "mplus",
    "retrieval",
    "sliding-window",
    "truncation",
    "ttt",
    "xl-cache",
)


@torch.no_grad()
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", PLAIN)
def test_a_first_segment_is_read_as_the_backbone_itself_reads_it(name: str, odd: str) -> None:
    kind = load(MODELS[name])
    assert not isinstance(kind, Exception), kind
    room = {"recent": 24} if name == "sirllm" else {}
    model = build(kind, odd, segment=24, **room).eval()  # longer than the windows
    segment = Segment.full(torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0)))
    readout, _ = model.step(model.open(2), segment)
    expected = model.backbone.model(segment.ids).logits  # type: ignore[operator]
    torch.testing.assert_close(readout.logits(), expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", ["rmt", "hmt"])
def test_memory_enters_as_embeddings_do(name: str, odd: str) -> None:
    kind = load(MODELS[name])
    assert not isinstance(kind, Exception), kind
    model = build(kind, odd, segment=24).eval()
    segment = Segment.full(torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0)))
    readout, _ = model.step(model.open(2), segment, write=False)
    memory = model.initial_memory.expand(2, -1, -1)  # type: ignore[operator]
    inputs = torch.cat([memory, model.backbone.embed(segment.ids)], dim=1)
    expected = model.backbone.model(inputs_embeds=inputs).logits[:, -24:]  # type: ignore[operator]
    torch.testing.assert_close(readout.logits(), expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("odd", ODD)
def test_longmem_reads_as_its_backbone_does(odd: str) -> None:
    kind = load(MODELS["longmem"])
    assert not isinstance(kind, Exception), kind
    model: Any = build(kind, odd, segment=24, reduction=1).eval()
    segment = Segment.full(torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0)))
    own = model.backbone.model(segment.ids, output_hidden_states=True)
    for ours, theirs in zip(model.encode(segment).hidden, own.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    # With as many side layers, copied, every side layer adds what its block does: twice H[i + 1] - H[i] in all.
    x, encoded = own.hidden_states[0], model.encode(segment)
    side = model.side_pass(model.open(2), segment, encoded).hidden
    torch.testing.assert_close(side[1] - x, 2 * (own.hidden_states[1] - x), atol=5e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("types", "sees"), [(("sliding", "full"), True), (("full", "sliding"), False)])
def test_a_side_layer_of_longmem_sees_what_the_block_it_copies_sees(types: tuple[str, str], sees: bool) -> None:
    kind = load(MODELS["longmem"])
    assert not isinstance(kind, Exception), kind
    backbone = tiny_backbone("ministral", layer_types=[f"{name}_attention" for name in types])
    config = replace(kind.fit(card_of(backbone), Budget("tests")), segment=24, reduction=2)  # type: ignore[attr-defined]
    model: Any = kind(backbone, config, torch.Generator()).eval()  # one side layer, a copy of the second block
    ids = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0))
    ids[1] = ids[0].where(torch.arange(24) > 0, (ids[0, 0] + 1) % 64)  # the first tokens differ
    segment = Segment.full(ids)
    encoded = model.encode(segment)
    own = model.side_pass(model.open(2), segment, encoded).hidden[1] - (encoded.hidden[2] - encoded.hidden[0])
    assert (float((own[0, -1] - own[1, -1]).abs().max()) > 1e-4) == sees
