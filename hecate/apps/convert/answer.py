"""What becomes of one key of another trainer's file, and the values of hecate's that come of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from hecate.config.schema import LEAF_TYPES, LEAVES, RANGES
from hecate.config.typed import Report, read_sources, read_value
from hecate.config.yaml_text import Scalar, parse


@dataclass(frozen=True)
class KeyAnswer:
    kind: Literal["carried over", "to be checked", "the default already", "left out", "refused"]
    text: str
    """what was written, why nothing is, or what to do"""
    gives: Mapping[str, Any] = field(default_factory=dict)
    """hecate's dotted keys, with plain values"""


@dataclass(frozen=True)
class Theirs:
    """A file of another trainer: the values of its keys, and of those that are not given but that the trainer takes otherwise."""

    trainer: str
    values: Mapping[str, Any]

    def get(self, *names: str) -> Any:
        """The value of the first of the keys that says anything."""
        return next((self.values[name] for name in names if not off(self.values.get(name))), None)


def off(value: Any) -> bool:
    """Whether a value says that a thing is not wanted."""
    return value in (None, False, 0, "", "none", "None", "no", "null", "default", ["none"], [], {})


def default(text: str) -> KeyAnswer:
    return KeyAnswer("the default already", text)


def left(why: str) -> KeyAnswer:
    return KeyAnswer("left out", why)


def cannot(what_to_do: str) -> KeyAnswer:
    return KeyAnswer("refused", what_to_do)


def to_check(gives: Mapping[str, Any], note: str) -> KeyAnswer:
    """Carry over values that stand in the place of what theirs mean, and may not fit."""
    answer = carry(gives, note)
    return answer if answer.kind == "refused" else KeyAnswer("to be checked", answer.text, gives)


def carry(gives: Mapping[str, Any], note: str = "") -> KeyAnswer:
    """Carry values over, unless this version of hecate lacks a key or refuses a value: that is said in hecate's own words."""
    new = {}
    for key, value in gives.items():
        if key not in LEAVES:
            return cannot(f"this version of hecate has no {key}")
        # 2e-5 is text to YAML 1.1, and a number to whoever wrote it.
        plain = LEAF_TYPES[key] not in (str, str | None)
        node, report = Scalar(value, plain, 1) if isinstance(value, str) else parse(yaml.safe_dump(value)), Report("")
        assert node is not None
        sources = key in ("data.train", "data.eval")
        typed = read_sources(node, key, "", report) if sources else read_value(node, LEAF_TYPES[key], key, "", report)
        if report.problems:
            return cannot(f"{report.problems[0].key} {report.problems[0].what}")
        if typed == LEAVES[key].default:
            continue
        if key in RANGES and isinstance(typed, int | float) and typed not in RANGES[key]:
            return cannot(f"{key} must be {RANGES[key]}, got {typed}")
        new[key] = value
    words = ", ".join(
        f"{key}={yaml.safe_dump(value, default_flow_style=True, width=10**6).splitlines()[0]}" for key, value in gives.items()
    )
    text = words + (f"; {note}" if note else "")
    return KeyAnswer("carried over", text, new) if new else default(text)
