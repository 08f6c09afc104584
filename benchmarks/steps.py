"""What `against.py` has each checkout do: one step of a model, whenever a line comes in; seconds and digest go out.

    python benchmarks/steps.py LINE

It runs under checkouts of any age, so it uses what a plug-in may use, and no more.
"""

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

SHAPE = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
SEGMENT = 512
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {  # a model as it fits itself to SmolLM2, tokens read before
    "window": ("truncation", {}, 0),
    "memorizing": ("memorizing", {"layers": tuple(range(15, 30)), "fusion": "joint", "memory_position": "constant",
                                  "sinks": 4}, 8192),
    "full-context": ("full-context", {}, 9000),
}  # fmt: skip
Told = dict[str, Any]


def digest(*tensors: torch.Tensor) -> str:
    """Of their bits."""
    made = hashlib.sha256()
    for tensor in tensors:
        made.update(tensor.detach().contiguous().numpy().tobytes())
    return made.hexdigest()


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Of the processor, and what `call` returned."""
    before = time.process_time()
    found = call()
    return time.process_time() - before, found


def streaming(line: str) -> Callable[[], Told]:
    """A segment with its loss after what was read before, and the window's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from memory_bench import plugins
    from memory_bench.backbone.model import Backbone
    from memory_bench.protocol import Segment

    torch.manual_seed(0)
    backbone = Backbone(LlamaForCausalLM(LlamaConfig(**SHAPE)).eval())
    name, options, before = MODELS[line]
    made = [(plugins.load("models", n), o) for n, o in (("truncation", {}), (name, options))]
    rng = torch.Generator().manual_seed(1)
    window, model = (cls(backbone, cls.Config(segment=SEGMENT, **o), rng).eval() for cls, o in made)
    ids = torch.randint(3, SHAPE["vocab_size"], (1, before + SEGMENT), generator=rng)
    with torch.no_grad():
        blank, state = window.open(1), model.open(1)
        for part in ids[:, :before].split(SEGMENT, dim=1):
            state = model.absorb(state, Segment.full(part))
    last = ids[:, before:]

    def loss(asked: Any, start: Any) -> torch.Tensor:
        readout, _ = asked.step(start, Segment.full(last))
        logits = readout.head(readout.hidden)
        return torch.nn.functional.cross_entropy(logits[0, :-1], last[0, 1:], reduction="none")

    def step() -> Told:
        with torch.no_grad():
            plain, _ = seconds(lambda: loss(window, blank))
            spent, found = seconds(lambda: loss(model, state))
        return {"seconds": spent, "window": plain, "digest": digest(found), "what": "losses of 511 tokens"}

    def alone() -> Told:
        return {name: value for name, value in step().items() if name != "window"}

    return alone if line == "window" else step


def training() -> Callable[[], Told]:
    """A step of `hmt` on the shape of `tiny`: 8 segments of 8 rows, backward, AdamW."""
    from memory_bench import plugins
    from memory_bench.backbone.small import TINY, small_model
    from memory_bench.corpus import Line
    from memory_bench.driver.stream import walk

    rng = torch.Generator().manual_seed(0)
    backbone = small_model(TINY, rng)
    cls = plugins.load("models", "hmt")
    config = cls.Config(segment=TINY["window"], sensory_tokens=4, recall_width=64, cache=100)
    model = cls(backbone, config, rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scored = torch.ones(8 * TINY["window"], dtype=torch.bool)
    scored[0] = False
    lines = [Line(torch.randint(3, TINY["vocab"], scored.shape, generator=rng), scored) for _ in range(8)]

    def once() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = torch.stack([piece.nll.sum() for piece in walk(model, lines)]).sum() / int(8 * scored.sum())
        loss.backward()
        optimizer.step()
        return loss

    def step() -> Told:
        spent, found = seconds(once)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            once()
        times = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
        products = sum(
            t for key, t in times.items() if key in ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")
        )
        bits = digest(found, *model.parameters())
        return {"seconds": spent, "products": products / sum(times.values()), "digest": bits,
                "what": "loss and parameters"}  # fmt: skip

    return step


def main(line: str) -> None:
    """Steps until nobody asks any more."""
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):
        step = training() if line == "hmt" else streaming(line)
    for _ in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            told = step()
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
