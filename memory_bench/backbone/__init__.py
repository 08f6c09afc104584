"""What a backbone is. `Backbone` and `Past` are the public names, loaded when they are asked for: they load torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memory_bench.backbone.model import Backbone, Past

__all__ = ["Backbone", "Past"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from memory_bench.backbone import model

    return getattr(model, name)
