"""Options that are one of a few words, as their `Literal` says."""

from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from memory_bench.errors import unknown


def check_choices(name: str, config: Any) -> None:
    """Refuse a value of a dataclass that its field's `Literal` does not have.

    Args:
        name: of the plug-in, for the sentence.
        config: a dataclass instance; call it at the end of its ``__post_init__``.

    Raises:
        UserError: with the nearest word.
    """
    kinds = get_type_hints(type(config))
    for field in fields(config):
        value, kind = getattr(config, field.name), kinds[field.name]
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise unknown(f"{name}.{field.name}", str(value), map(str, get_args(kind)))
