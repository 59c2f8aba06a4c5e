"""How JSON is laid out in files (`hecate.io.strict_json`)."""

from __future__ import annotations

import pytest

from hecate.io.strict_json import dump_json

VALUE = {"none": {}, "list": [{"a": 1}], "out\n": {"in": {"x": {"y": None}, "z": "\u00e4"}}}


@pytest.mark.parametrize(
    ("depth", "lines"),
    [
        (0, ['{"none": {}, "list": [{"a": 1}], "out\\n": {"in": {"x": {"y": null}, "z": "\\u00e4"}}}']),
        (2, ["{", ' "none": {},', ' "list": [{"a": 1}],', ' "out\\n": {', '  "in": {"x": {"y": null}, "z": "\\u00e4"}', " }", "}"]),
    ],
)
def test_objects_below_a_depth_are_on_one_line(depth: int, lines: list[str]) -> None:
    assert dump_json(VALUE, depth=depth).decode().splitlines() == lines


@pytest.mark.parametrize("depth", [None, 1])
@pytest.mark.parametrize("value", [{"a": (1,)}, {1: "a"}, {"a": float("nan")}])
def test_what_would_not_be_read_back_equal_is_refused(value: dict[object, object], depth: int | None) -> None:
    with pytest.raises((AssertionError, ValueError)):
        dump_json(value, depth=depth)
