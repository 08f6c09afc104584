"""A text with its identity: what every source of books and articles gives."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Document:
    """A text with its identity."""

    id: str
    text: str
    meta: Mapping[str, str] = field(default_factory=dict)
