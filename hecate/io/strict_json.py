"""Read and write JSON strictly: text that could be read in more than one way is refused."""

import json
import math
from typing import Any

from hecate.errors import UserError


class JsonError(UserError):
    """The text is not strict JSON: bad UTF-8 or syntax, NaN, a name given twice, nested too deep, or a number too long."""


def parse_json(data: bytes) -> Any:
    """Return the JSON value in `data`. Raises JsonError also where `json.loads` does not: for duplicate names, NaN and Infinity."""
    try:
        text = data.decode("utf-8")
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise JsonError("not sound JSON: nested too deep") from None
    except ValueError as error:
        raise JsonError(f"not sound JSON: {str(error)[:300]}") from error


def dump_json(value: Any, *, depth: int | None = None) -> bytes:
    """Return `value` as indented ASCII JSON. Values that would not be read back equal are refused: tuples, names that are not text, NaN.

    Args:
        depth: of objects that are indented; what is deeper is on one line, which is several times as fast. None: everything is indented.
    """
    text = json.dumps(value, indent=1, allow_nan=False) if depth is None else _shallow(value, depth, "")
    data = text.encode("ascii") + b"\n"
    assert json.loads(data) == value, "a value that JSON would change: tuples must be lists, names must be text"
    return data


def json_line(value: Any) -> str:
    """Return `value` as JSON on one line, for readers of text. What JSON has no form for, such as a date, becomes text. Half a surrogate
    pair, which UTF-8 cannot hold, stays an escape."""
    return json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace").decode("utf-8")


_on_a_line = json.JSONEncoder(allow_nan=False).encode


def _shallow(value: Any, depth: int, margin: str) -> str:
    if depth == 0 or not isinstance(value, dict) or not value:
        return _on_a_line(value)
    lines = (f"{margin} {_on_a_line(name)}: {_shallow(inside, depth - 1, margin + ' ')}" for name, inside in value.items())
    return "{\n" + ",\n".join(lines) + f"\n{margin}}}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in result if names.count(name) > 1)
        raise ValueError(f"the name {twice[:100]!r} is given twice")
    return result


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


def _refuse(text: str) -> Any:
    raise ValueError(f"{text[:100]} is not a finite number")
