"""What kind of memory a model has, in words that are the same for all models.

The axes of UniMem (arXiv 2402.03009, section 3: management, writing, reading, injection), made finer where they did not
tell methods apart: what is kept, how much of it and what happens when that is full, who writes, what is read by what,
where it enters, how it is mixed in, and whether its order is still known. A class says where it stands
(`memory_bench.protocol.MemoryModel.axes`); lists and records show it, and a board can be ordered by one axis.
"""

from dataclasses import dataclass, fields
from typing import Literal, get_args

Unit = Literal[
    "none",
    "token kv",
    "chunk kv",
    "layer vectors",
    "segment vectors",
    "token kv and segment vectors",
    "matrix",
    "weights",
    "text",
]
Capacity = Literal["none", "fixed", "grows"]
Overflow = Literal[
    "none", "overwrite", "drop oldest", "drop at random", "drop least surprising", "evict least used", "merge", "clear"
]
Write = Literal["none", "direct", "extra tokens", "extra pass", "separate module", "gradient", "generation"]
Read = Literal[
    "none",
    "all",
    "by position",
    "by similarity per token",
    "by similarity per piece",
    "by similarity per segment",
    "all, and by similarity per segment",
    "by position, and by similarity per token",
    "by a question",
]
Inject = Literal[
    "none", "input", "all layers", "some layers", "one layer", "input and some layers", "side network", "text"
]
Fusion = Literal["none", "one softmax", "gated mix", "prefix", "residual add", "weights"]
Order = Literal["none", "kept", "coarse", "lost"]
Trained = Literal["nothing", "added parts", "all"]


@dataclass(frozen=True, slots=True)
class Axes:
    """Where a memory stands on every axis; the default is that of a model without memory.

    Attributes:
        unit: what one remembered thing is; ``kv``: keys and values of attention.
        capacity: whether the number of things grows with the text read.
        overflow: what happens when a fixed capacity is full.
        write: what makes the things that are kept; ``direct``: the backbone's own pass over the text.
        written_with_gradient: training reaches through the write, within what the recipe unrolls.
        read: what is looked at for a prediction, and by what it is chosen.
        inject: where in the backbone memory enters.
        fusion: how it is mixed with the segment's own.
        order: whether the order of what was read is known (``coarse``: between pieces and not inside, or the reverse).
        trained: what the method's authors train.
    """

    unit: Unit = "none"
    capacity: Capacity = "none"
    overflow: Overflow = "none"
    write: Write = "none"
    written_with_gradient: bool = False
    read: Read = "none"
    inject: Inject = "none"
    fusion: Fusion = "none"
    order: Order = "none"
    trained: Trained = "nothing"

    def __post_init__(self) -> None:
        for field in fields(self):
            value, known = getattr(self, field.name), get_args(field.type)
            if known and value not in known:
                raise ValueError(f"axes.{field.name} is {value!r}; it is one of: {'; '.join(known)}")


UNSAID = "not said"
NAMES = tuple(field.name for field in fields(Axes))


def in_words(axes: "dict[str, object] | None") -> str:
    """One line of a list: ``token kv, drop oldest; by position; all layers, one softmax``; empty where nothing is kept.

    Args:
        axes: as plain data; None: the class does not say.
    """
    if axes is None:
        return UNSAID
    parts = [(axes["unit"], axes["overflow"] if axes["capacity"] == "fixed" else axes["capacity"]),
             (axes["read"],), (axes["inject"], axes["fusion"])]  # fmt: skip
    said = [", ".join(str(word) for word in part if word != "none") for part in parts]
    return "; ".join(part for part in said if part) or "no memory"
