"""What a backbone is. `Backbone` and `Past` are the public names, loaded when they are asked for: they load torch.

- `agreement.py`: our loop over the layers, compared with the model's own forward
- `embedder.py`: a frozen sentence encoder that reads token ids
- `families.py`: which family a model is of, by the modules of its layers
- `layers.py`: one decoder layer at a time: `project`, `attend`, `close`; copies of layers
- `lora.py`: low-rank adapters beside projections: a recipe's for every model, and a method's own
- `model.py`: Hugging Face models behind `embed`, `run`, `head` and the verbs of their layers
- `outline.py`: a backbone's shape without its weights
- `reuse.py`: passes that begin alike, computed once while a text is continued
- `small.py`: small backbones made here: sizes, fresh weights
- `tokenizer.py`: text to ids and bytes; a small BPE
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memory_bench.backbone.model import Backbone, Past

__all__ = ["Backbone", "Past"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from memory_bench.backbone import model

    return getattr(model, name)
