"""One process of trainings that several share, for `test_processes.py`: ``RANK SIZE PORT OUT`` and a JSON of them."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import TCPStore

from memory_bench import plugins
from memory_bench.budget import Budget
from memory_bench.corpus import Line, LineCorpus, TextCorpus
from memory_bench.driver import backward
from memory_bench.driver.meter import Following, Meter
from memory_bench.driver.peers import Peers
from memory_bench.driver.train import train
from memory_bench.protocol import Readout
from memory_bench.recipe import Recipe, Stage
from memory_bench.testing import card_of, tiny_backbone

CPU = torch.device("cpu")


def corpus(kind: str) -> Any:
    """Running text, or lines of five lengths, one of them within a segment."""
    drawn = torch.Generator().manual_seed(2)
    if kind == "text":
        return TextCorpus([torch.randint(64, (12,), generator=drawn).repeat(40)])
    made = [torch.randint(64, (n,), generator=drawn) for n in (24, 5, 16, 13, 20, 24, 9)]
    return LineCorpus([Line(ids, torch.arange(len(ids)) > 0, seed=i) for i, ids in enumerate(made)])


def recipe(what: dict[str, Any]) -> Recipe:
    """Of ``rows``, ``steps`` and more."""
    stage = Stage(what.get("segments", 3), what["rows"], steps=what["steps"])
    return Recipe("shared", (stage,), lr=3e-3, warmup=2, aux_from=0.0, **what.get("recipe", {}))


def trained(what: dict[str, Any], peers: Peers | None, spoil: Any = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights, and gradients of the first step (``grad.…``); and facts."""
    backbone = tiny_backbone("llama")
    cls = plugins.load("models", what["model"])
    config = cls.fit(card_of(backbone), Budget("test"))
    first: dict[str, Tensor] = {}

    def build(config: Any) -> Any:
        model = cls(backbone, config, torch.Generator().manual_seed(5 + (0 if peers is None else peers.rank)))
        if spoil is not None:
            spoil(model)
        return model

    def noted(kind: Any) -> Any:
        def of(batch: Any, worked: Any, *more: Any) -> float:
            value: float = kind(batch, worked, *more)
            if not first:
                named = dict(batch.model.named_parameters())
                first.update({f"grad.{n}": p.grad.clone() for n, p in named.items() if p.grad is not None})
            return value

        return of

    meter = (Meter if peers is None or peers.rank == 0 else Following)(Budget("test", **what.get("limits", {})), CPU)
    before = backward.alone, backward.shared
    backward.alone, backward.shared = noted(before[0]), noted(before[1])
    try:
        with meter.phase("train"):
            done = train(build, config, recipe(what), corpus(what.get("corpus", "text")), meter, seed=0, peers=peers)
    finally:
        backward.alone, backward.shared = before
    tensors = {n: t.detach().clone().contiguous() for n, t in done.model.state_dict().items()}
    u = meter.usage
    facts = {"curve": done.curve, "tokens": u.train_tokens, "flops": u.train_flops, "seconds": u.train_seconds,
             "steps": u.train_steps, "others": meter.others.seconds, "ended_by": done.ended_by}  # fmt: skip
    return {**tensors, **first}, facts


def spoiling(how: str, rank: int) -> Any:
    """Makes a model fail in process 1: ``error``, ``hang``, ``exit``; or draw in all: ``dropout``."""

    def spoil(model: Any) -> None:
        real, calls = model.step, [0]

        def step(state: Any, segment: Any, *, write: bool = True) -> Any:
            calls[0] += 1
            if rank == 1 and calls[0] == 5:
                if how == "error":
                    raise ValueError("the model is broken there")
                if how == "hang":
                    time.sleep(600)
                if how == "exit":
                    raise SystemExit(3)
            readout, state = real(state, segment, write=write)
            if how == "dropout":
                hidden = nn.functional.dropout(readout.hidden, 0.1)
                readout = Readout(hidden, readout.head, readout.aux_loss)
            return readout, state

        model.step = step

    return spoil if how else None


def main(rank: int, size: int, port: int, out: Path, whats: list[dict[str, Any]]) -> None:
    """Train one after the other, and write what came of each."""
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, size, is_master=False)
    peers = Peers(store, rank, size, CPU, patience=whats[0].get("patience", 120.0))
    for number, what in enumerate(whats):
        try:
            tensors, facts = trained(what, peers, spoiling(what.get("spoil", ""), rank))
            save_file(tensors, out / f"{number}-{rank}.safetensors")
        except Exception as error:
            facts = {"error": f"{type(error).__name__}: {error}"}
        (out / f"{number}-{rank}.json").write_text(json.dumps(facts))
    peers.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), json.loads(sys.argv[5]))
