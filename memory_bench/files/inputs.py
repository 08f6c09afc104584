"""JSON, JSON lines and plain lines, read strictly: what does not fit is one sentence with the file and the place in it.

Values are checked against pydantic models and nothing is converted: a text where a list belongs is not taken apart, and
null is no word. Unusual here, on purpose:

- Only a line feed ends a line, with or without a carriage return before it. U+2028, U+0085 and other characters that
  `str.splitlines` cuts at stand unescaped in valid JSON.
- Blank lines are passed over; they count where lines are numbered. A byte order mark at the beginning is no text.
- A key that an object has twice, NaN and Infinity are refused: JSON has no meaning for them, and readers choose one.
- An id may be a number or a text (7 and "7" are the same); nothing else may be either.
- Fields that nobody reads may be there, with any content.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from memory_bench.errors import DataError, unknown
from memory_bench.files.plain import beyond

T = TypeVar("T")
R = TypeVar("R", bound=BaseModel)
BOM = b"\xef\xbb\xbf"
SHOWN = 40  # characters of a wrong value in a message


@dataclass(frozen=True, slots=True)
class Place:
    """Where something stands: a file (or what else is read), and the line or record in it."""

    file: str
    spot: str = ""

    def __str__(self) -> str:
        return f"{self.file}, {self.spot}" if self.spot else self.file

    @classmethod
    def of(cls, file: object, kind: str, name: str) -> "Place":
        """A record that has a name: ``question 56be…``."""
        return cls(str(file), f"{kind} {name if name.isprintable() else shown(name)}")

    def fault(self, problem: str) -> DataError:
        """The error for what is wrong here."""
        return DataError(f"{self}: {problem}.")


def _whole(value: str) -> str:
    """JSON can escape half of a surrogate pair alone, which is no character."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"{ord(value[error.start]):04x}"
        raise PydanticCustomError("half", "holds half of a character (\\u{half} alone)", {"half": half}) from error
    return value


def _some(value: str) -> str:
    if not value.strip():
        raise PydanticCustomError("empty", "is empty")
    return value


def _id(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise PydanticCustomError("id", "must be a number or a text, not {got}", {"got": shown(value)})
    return str(value)


Line = Annotated[str, AfterValidator(_whole)]
"""A text, which may be empty."""
Text = Annotated[Line, AfterValidator(_some)]
"""A text that says something."""
Id = Annotated[Text, BeforeValidator(_id)]
"""A whole number or a text; kept as a text."""
Texts = Annotated[list[Text], Field(min_length=1)]
"""One text or more."""


class Row(BaseModel):
    """One record of a file. Values have the types that fields name; fields that are not named are left alone."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


def text_of(data: bytes, file: object) -> str:
    """A whole text.

    Args:
        data: UTF-8.
        file: where it is from.

    Raises:
        DataError: it is not UTF-8; the line is named.
    """
    data = data.removeprefix(BOM)
    try:
        return data.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise Place(str(file), f"line {line}").fault(f"not UTF-8 (byte 0x{data[error.start]:02x})") from error


def lines_of(data: bytes, file: object) -> Iterator[tuple[Place, str]]:
    """The lines that are not blank, each with its place; see `text_of`."""
    for number, line in enumerate(text_of(data, file).split("\n"), 1):
        if line.strip(" \t\r"):
            yield Place(str(file), f"line {number}"), line.removesuffix("\r")


def parse(text: str, place: Place) -> Any:
    """What a JSON text says.

    Raises:
        DataError: it is none, or is ambiguous.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        where = Place(place.file, place.spot or f"line {error.lineno}")
        raise where.fault(f"no JSON ({error.msg} at character {error.colno})") from error
    except (ValueError, RecursionError) as error:  # of the hooks; whole numbers and nesting beyond all measure
        raise place.fault(beyond(error) if isinstance(error, ValueError) else str(error)) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {shown(twice)} twice")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number in JSON")


def json_lines(data: bytes, file: object, row: type[R]) -> list[tuple[Place, R]]:
    """The rows of a file of JSON lines, each with its place.

    Raises:
        DataError: a line is no JSON, or no such row.
    """
    return [(place, checked(row, parse(line, place), place)) for place, line in lines_of(data, file)]


def json_table(data: bytes, file: object) -> dict[str, Any]:
    """A JSON file that is one object.

    Raises:
        DataError: it is something else.
    """
    found = parse(text_of(data, file), Place(str(file)))
    if not isinstance(found, dict):
        raise Place(str(file)).fault(f"must be an object, not {shown(found)}")
    return found


def checked(row: type[R], value: object, place: Place) -> R:
    """The value as a `row`.

    Raises:
        DataError: it is none; the field is named.
    """
    try:
        return row.model_validate(value)
    except ValidationError as error:
        raise place.fault(_problem(error)) from error


def as_dataclass(cls: type[T], value: object, place: Place) -> T:
    """Plain data (of TOML or JSON) as a dataclass, lists as tuples; whole numbers may stand for others.

    Raises:
        DataError: a field is missing, unknown, or of another type.
    """
    if not isinstance(value, Mapping):
        raise place.fault(f"must be a table, not {shown(value)}")
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for name in value:
        if name not in names:
            raise DataError(f"{place}: {unknown(f'field of a {cls.__name__.lower()}', name, names)}")
    try:
        return TypeAdapter(cls).validate_json(json.dumps(value, allow_nan=False), strict=True)
    except ValidationError as error:
        raise place.fault(_problem(error)) from error
    except (TypeError, ValueError, RecursionError) as error:  # dates; numbers that are not finite; deep nesting
        raise place.fault(str(error)) from error


def once(found: Iterable[tuple[Place, str]]) -> None:
    """Check that no id is there twice.

    Raises:
        DataError: one is; both places are named.
    """
    seen: dict[str, Place] = {}
    for place, name in found:
        if name in seen:
            raise place.fault(f"has the id {shown(name)} of {seen[name].spot} again")
        seen[name] = place


KINDS = {
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "dataclass_type": "an object",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "finite_number": "a finite number",
}


def _problem(error: ValidationError) -> str:
    """The first thing that does not fit, as the rest of a sentence that begins with the place."""
    first = error.errors()[0]
    loc = first["loc"][:-1] if first["type"] == "missing" else first["loc"]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")
    return f"'{name}' {_said(first)}" if name else _said(first)


def _said(first: ErrorDetails) -> str:
    kind, got = first["type"], shown(first["input"])
    if kind == "missing":
        return f"lacks '{first['loc'][-1]}'"
    if kind == "too_short":
        return "is empty"
    if kind in KINDS:
        return f"must be {KINDS[kind]}, not {got}"
    if kind == "literal_error":
        return f"must be {first['ctx']['expected']}, not {got}"
    if kind in ("id", "empty", "half"):
        return first["msg"]
    return f"{first['msg'][:1].lower()}{first['msg'][1:]} (got {got})"


def shown(value: object) -> str:
    """A value as a message shows it: short, as JSON writes it."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
