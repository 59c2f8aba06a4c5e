"""Changed values and changed bytes: what a file may have become that somebody has damaged, or made to do harm.

All functions are pure: the same value and the same random numbers give the same change.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

OUTSIDE = "OUTSIDE"
"""what stands in a changed value for the path of a file that nobody may open"""


class RawText(str):
    """JSON text that stands in a value as it is, such as a number of 5000 digits."""


@dataclass(frozen=True)
class NamePairs:
    """An object whose names may be there several times."""

    items: tuple[tuple[str, Any], ...]


_NUMBERS: tuple[Any, ...] = (
    *(0, -1, 1, 2, 7, 1000, 2**16, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**31), -(2**63), 10**30, 10**400),
    *(0.5, -0.0, 1.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf"), RawText("3" * 5000), RawText("1e999")),
)
_TEXTS: tuple[Any, ...] = (
    *("", " ", "a", "x" * 70_000, "\0", "a\0b", "\ud800", "\u202e\x1b[2J", "\n\r\n", "nan", "1e9", "0x10", "2001-99-99", "9" * 5000),
    *(OUTSIDE, f"../../../../../../../..{OUTSIDE}", "..", ".", "/", "/dev/zero", "~", "${oc.env:HOME}", "${seed}", "%s%n{0.__class__}"),
    *("!!python/object/apply:os.system ['touch ran']", "__import__('os').system('touch ran')", "O", "object", "<U999999999", "F64"),
)
_OTHERS: tuple[Any, ...] = (
    *(None, True, False, [], {}, [[]], [None], [0], ["a"], {"a": 1}, {"": {}}, [[1, 2], [3]], [-1, -5], [2**32, 2**32], [0, 2**61, 2**61]),
    *(RawText("[" * 100_000 + "]" * 100_000), RawText('{"a": ' * 100_000 + "1" + "}" * 100_000), RawText("[" * 40 + "]" * 40)),
    *([0] * 20_000, [[0] * 3] * 3000, {f"k{number}": number for number in range(3000)}, [1] * 70),
)
_EXTREMES = (*_NUMBERS, *_TEXTS, *_OTHERS)


def changed_value(value: Any, draw: random.Random) -> tuple[str, Any]:
    """Return what was changed, in words, and a JSON value that differs from `value`, which stays as it is, at one place.

    The value may hold `RawText` and `NamePairs`: `json_text` writes it.
    """
    root = [copy.deepcopy(value)]
    holder, key = draw.choice(_places(root))
    where = "all" if holder is root else repr(key)[:40]
    change = draw.choice(_CHANGES)
    words = change(holder, key, draw, root)
    return f"{where}: {words}", root[0]


def json_text(value: Any) -> str:
    """Return the JSON text of a value that may hold `RawText`, `NamePairs` and numbers that are not finite."""
    if isinstance(value, RawText):
        return str(value)
    if isinstance(value, NamePairs | dict):
        items = value.items if isinstance(value, NamePairs) else value.items()
        return "{" + ", ".join(f"{json.dumps(str(name))}: {json_text(item)}" for name, item in items) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(json_text, value)) + "]"
    return json.dumps(value)


def changed_bytes(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """Return what was changed, in words, and other bytes: cut, torn, repeated, swapped, or with a number or a text in their midst."""
    at = draw.randrange(len(data) + 1)
    length = draw.choice((1, 2, 4, 8, 64, 1000))
    change = draw.choice(_BYTES)
    words, changed = change(data, at, length, draw)
    return f"{words} at {at}", changed


def _places(root: list[Any]) -> list[tuple[Any, Any]]:
    """Every place of a value as the list or dict that holds it and its key. Of long lists only some."""
    found: list[tuple[Any, Any]] = []
    waiting: list[Any] = [root]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        for key in keys[:40]:
            found.append((holder, key))
            if isinstance(holder[key], dict | list):
                waiting.append(holder[key])
    return found


def _put(holder: Any, key: Any, draw: random.Random, _root: list[Any]) -> str:
    new = draw.choice(_EXTREMES)
    holder[key] = new
    return f"is {str(new)[:30]!r}"


def _same_kind(holder: Any, key: Any, draw: random.Random, root: list[Any]) -> str:
    """Another value of the same kind: checks of types do not see it."""
    old = holder[key]
    if isinstance(old, bool) or not isinstance(old, int | float | str):
        return _put(holder, key, draw, root)
    kind = str if isinstance(old, str) else int if isinstance(old, int) else float
    new = draw.choice([one for one in _EXTREMES if type(one) is kind])
    holder[key] = new
    return f"is {str(new)[:30]!r}"


def _drop(holder: Any, key: Any, draw: random.Random, root: list[Any]) -> str:
    if holder is root:
        return _put(holder, key, draw, root)
    del holder[key]
    return "is missing"


def _twice(holder: Any, key: Any, draw: random.Random, root: list[Any]) -> str:
    if isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key])) if holder is not root else _put(holder, key, draw, root)
        return "is there twice"
    inner = NamePairs((*holder.items(), (key, draw.choice((holder[key], *_EXTREMES)))))
    _replace(root, holder, inner)
    return "is given twice"


def _added(holder: Any, key: Any, draw: random.Random, root: list[Any]) -> str:
    new = draw.choice(_EXTREMES)
    if isinstance(holder, list):
        holder.insert(key, new) if holder is not root else _put(holder, key, draw, root)
    else:
        holder[draw.choice(("code", "__class__", "", f"{key}2", "../x", "\0", "x" * 3000))] = new
    return "has a neighbour"


def _renamed(holder: Any, key: Any, draw: random.Random, root: list[Any]) -> str:
    if not isinstance(holder, dict):
        return _put(holder, key, draw, root)
    holder[str(draw.choice(_TEXTS))] = holder.pop(key)
    return "has another name"


def _swapped(holder: Any, key: Any, draw: random.Random, root: list[Any]) -> str:
    other, at = draw.choice(_places(root))
    holder[key] = copy.deepcopy(other[at])
    return f"is a copy of {at!r}"[:60]


def _longer(holder: Any, key: Any, draw: random.Random, root: list[Any]) -> str:
    old = holder[key]
    if isinstance(old, list | str):
        holder[key] = old * draw.choice((0, 2, 3, 100))
        return "is repeated"
    return _same_kind(holder, key, draw, root)


_CHANGES: tuple[Callable[[Any, Any, random.Random, list[Any]], str], ...] = (
    *(_put, _put, _put, _same_kind, _same_kind, _drop, _drop),
    *(_twice, _added, _renamed, _swapped, _longer),
)


def _replace(holder: Any, old: Any, new: Any) -> bool:
    """Put `new` in the place of the object `old`."""
    for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
        if holder[key] is old:
            holder[key] = new
            return True
        if isinstance(holder[key], dict | list) and _replace(holder[key], old, new):
            return True
    return False


def _cut(data: bytes, at: int, _length: int, _draw: random.Random) -> tuple[str, bytes]:
    return "ends", data[:at]


def _without(data: bytes, at: int, length: int, _draw: random.Random) -> tuple[str, bytes]:
    return f"{length} bytes are missing", data[:at] + data[at + length :]


def _repeated(data: bytes, at: int, length: int, draw: random.Random) -> tuple[str, bytes]:
    return f"{length} bytes are repeated", data[:at] + data[at : at + length] * draw.choice((2, 50)) + data[at + length :]


def _flipped(data: bytes, at: int, _length: int, draw: random.Random) -> tuple[str, bytes]:
    changed = bytearray(data)
    if at < len(changed):
        changed[at] ^= 1 << draw.randrange(8)
    return "a bit is another", bytes(changed)


def _number(data: bytes, at: int, _length: int, draw: random.Random) -> tuple[str, bytes]:
    form = draw.choice(("<Q", "<I", ">I", "<H", "<B"))
    bits = 8 * struct.calcsize(form)
    new = struct.pack(form, draw.choice((0, 1, 2**bits - 1, 2 ** (bits - 1), 2 ** (bits - 1) - 1, 2 ** (bits // 2))))
    at -= at % len(new)
    return f"a number of {bits} bits is another", data[:at] + new + data[at + len(new) :]


def _inserted(data: bytes, at: int, _length: int, draw: random.Random) -> tuple[str, bytes]:
    junk = (
        b"\0",
        b"\0" * 5000,
        b"\xff\xfe",
        b"\xc3\x28",
        b"\n",
        b"\r",
        b'"',
        b"[" * 50_000,
        b"9" * 6000,
        b"&a *a",
        b"\x80\x04\x95",
        b"\xef\xbb\xbf",
    )
    new = draw.choice(junk)
    return f"{new[:8]!r} was put in", data[:at] + new + data[at:]


def _shuffled(data: bytes, at: int, length: int, draw: random.Random) -> tuple[str, bytes]:
    other = draw.randrange(len(data) + 1)
    return f"{length} bytes from {other} stand there, too", data[:at] + data[other : other + length] + data[at + length :]


_BYTES: tuple[Callable[[bytes, int, int, random.Random], tuple[str, bytes]], ...] = (
    *(_cut, _cut, _without, _repeated, _flipped, _flipped, _number, _number, _number, _inserted, _inserted, _shuffled),
)
