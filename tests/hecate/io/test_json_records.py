"""Dataclasses as JSON values, and what is refused on the way back."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pytest

from hecate.io.json_records import from_json_values, to_json_values
from hecate.io.strict_json import JsonError


class Colour(Enum):
    RED = "red"


@dataclass(frozen=True)
class Part:
    number: int
    colour: Colour = Colour.RED


@dataclass(frozen=True)
class Whole:
    name: str
    share: float
    parts: tuple[Part, ...]
    best: Part | None
    by_name: dict[str, list[int]]
    ready: bool = False
    notes: tuple[str, ...] = field(default=())


WHOLE = Whole("a", 1.0, (Part(1), Part(2)), None, {"x": [1, 2]}, ready=True, notes=("n",))
VALUES = {"name": "a", "share": 1, "parts": [], "best": None, "by_name": {}, "ready": False, "notes": []}


def test_a_record_comes_back_as_it_was() -> None:
    values = to_json_values(WHOLE)
    assert values["parts"] == [{"number": 1, "colour": "red"}, {"number": 2, "colour": "red"}]
    assert from_json_values(Whole, json.loads(json.dumps(values))) == WHOLE
    assert from_json_values(Whole, VALUES) == Whole("a", 1.0, (), None, {})


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"more": 1}, "Whole: has no field 'more'"),
        ({"name": None}, "Whole.name: 'None' is not of type str"),
        ({"share": True}, "Whole.share"),
        ({"ready": 1}, "Whole.ready"),
        ({"parts": [{"number": 1.5, "colour": "red"}]}, "Part.number"),
        ({"parts": [{"number": 1}]}, "Part: has lost its field 'colour'"),
        ({"best": {"number": 1, "colour": ["red"]}}, "Part.colour"),
        ({"best": [1]}, "Part: must be a JSON object"),
        ({"by_name": {"x": ["1"]}}, "Whole.by_name"),
        ({"notes": "n"}, "Whole.notes"),
    ],
)
def test_what_is_not_of_the_fields_type_is_named(change: dict[str, Any], wanted: str) -> None:
    with pytest.raises(JsonError, match=wanted.replace("'", ".")):
        from_json_values(Whole, {**VALUES, **change})
