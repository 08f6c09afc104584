"""Which limit ended a cell, read from its record's detail.

Today's details name what was allowed and used (``device_bytes 150 MB, 163 MB at segment 37/391``); older records name
the limit and the place alone (``device_bytes@segment 37/391``).
"""

import re
from dataclasses import dataclass

from memory_bench.report.rows import OVER, Row

_NEW = re.compile(r"(?P<limit>[a-z_]+) (?P<allowed>[^,]+(?:,\d{3})*), (?P<used>.+?) at (?P<where>.+)", re.S)
_OLD = re.compile(r"(?P<limit>[a-z_]+)@(?P<where>.+)", re.S)


@dataclass(frozen=True, slots=True)
class Struck:
    """A limit that ended a cell; texts for a person, empty where the record does not say.

    Attributes:
        limit: the budget's field.
        allowed: by the budget, with its unit.
        used: when it struck.
        where: the place in the work.
    """

    limit: str
    allowed: str = ""
    used: str = ""
    where: str = ""

    @property
    def name(self) -> str:
        """The limit as plots name it: ``device_bytes 150 MB``."""
        return f"{self.limit} {self.allowed}".strip()


def read_detail(detail: str) -> Struck:
    """The limit that the detail of a cell over budget names; a detail of another form is kept whole as its name."""
    if match := _NEW.fullmatch(detail.strip()) or _OLD.fullmatch(detail.strip()):
        return Struck(**match.groupdict())
    return Struck(detail.strip() or "a limit")


def struck(row: Row) -> list[Struck]:
    """The limits that ended seeds of a row, each once."""
    return list(dict.fromkeys(read_detail(r.detail) for r in row.records if r.status == OVER))


def limit_names(row: Row) -> str:
    """What plots write beside a row over budget: ``device_bytes 150 MB``; empty for other rows."""
    return ", ".join(dict.fromkeys(each.name for each in struck(row)))
