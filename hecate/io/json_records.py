"""Frozen dataclasses as JSON values, and back: each field becomes a name in a JSON object, and what is read is checked against its type.

JSON has no tuples, no enums and no classes. They are written as arrays, as the enum's value and as objects, and read back as the
annotations of the dataclass say.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from hecate.io.strict_json import JsonError

Record = TypeVar("Record")
_LONGEST = 100
"""The most characters of a wrong value that an error shows."""


def to_json_values(record: Any) -> dict[str, Any]:
    """Return a dataclass instance as JSON values, of which `from_json_values` makes the instance again."""
    return {field.name: _plain(getattr(record, field.name)) for field in fields(record)}


def from_json_values(kind: type[Record], raw: Any) -> Record:
    """Return the instance of the dataclass `kind` whose JSON values these are.

    A field is annotated with one of: bool, int, float, str, an enum, a dataclass, X | None, tuple[X, ...], list[X], dict[str, X].

    Raises:
        JsonError: a field is missing, unknown, or of another type.
    """
    if not isinstance(raw, Mapping):
        raise JsonError(f"{kind.__name__}: must be a JSON object")
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    for problem, names in (("no", set(raw) - known), ("lost its", known - set(raw))):
        if names:
            raise JsonError(f"{kind.__name__}: has {problem} field {min(names)[:_LONGEST]!r}")
    hints = get_type_hints(kind)
    return kind(**{name: _value(hints[name], value, f"{kind.__name__}.{name}") for name, value in raw.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return to_json_values(value) if is_dataclass(value) else value


def _value(kind: Any, raw: Any, where: str) -> Any:
    """The value of type `kind` that `raw` stands for; `where` names the field in an error."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (present,) = (choice for choice in inner if choice is not type(None))
        return None if raw is None else _value(present, raw, where)
    if origin in (tuple, list) and isinstance(raw, list | tuple):
        return origin(_value(inner[0], item, where) for item in raw)
    if origin is dict and isinstance(raw, Mapping):
        return {name: _value(inner[1], item, where) for name, item in raw.items()}
    if isinstance(kind, type) and is_dataclass(kind):
        return from_json_values(kind, raw)
    if origin is None and issubclass(kind, Enum):
        if raw in [member.value for member in kind]:
            return kind(raw)
    elif origin is None and isinstance(raw, (int, float) if kind is float else kind) and (kind is bool) == isinstance(raw, bool):
        with suppress(OverflowError):  # a whole number beyond all floats
            return float(raw) if kind is float else raw
    raise JsonError(f"{where}: {str(raw)[:_LONGEST]!r} is not of type {kind if origin else kind.__name__}")
