"""What becomes of one key of another trainer's file, and the values of hecate's that come of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from hecate.config.schema import LEAF_TYPES, LEAVES, RANGES
from hecate.config.typed import INVALID, Report, read_sources, read_value
from hecate.config.yaml_text import Node, Scalar, parse

Kind = Literal["carried over", "the default already", "left out", "refused"]


@dataclass(frozen=True)
class Answer:
    kind: Kind
    text: str
    """what was written, why nothing is, or what to do"""
    gives: Mapping[str, Any] = field(default_factory=dict)
    """hecate's dotted keys, with plain values"""


@dataclass(frozen=True)
class Theirs:
    """A file of another trainer."""

    trainer: str
    file: Path
    values: Mapping[str, Any]
    """by its keys, with what the trainer takes where a key is not given"""
    given: frozenset[str]
    """the keys in the file"""

    def path(self, name: str) -> Path:
        """A path that the file names: it starts from the working directory, as with the trainers."""
        return Path(name)

    def get(self, *names: str) -> Any:
        """The value of the first of the keys that says anything."""
        return next((self.values[name] for name in names if not off(self.values.get(name))), None)


Convert = Callable[[str, Any, Theirs], Answer]
"""(their key, its value, their file) -> what becomes of it"""


def off(value: Any) -> bool:
    """Whether a value says that a thing is not wanted."""
    return value in (None, False, 0, "", "none", "None", "no", "null", "default") or value == [] or value == {}


def left(why: str) -> Answer:
    return Answer("left out", why)


def refused(what_to_do: str) -> Answer:
    return Answer("refused", what_to_do)


def carry(gives: Mapping[str, Any], note: str = "") -> Answer:
    """Carry values over, unless this version of hecate lacks a key or refuses a value: that is said in hecate's own words."""
    for key, value in gives.items():
        if key not in LEAVES:
            return refused(f"this version of hecate has no {key}")
        if problem := _problem(key, value):
            return refused(f"{key} {problem}")
    shown = ", ".join(f"{key}={_short(value)}" for key, value in gives.items()) + (f"; {note}" if note else "")
    new = {key: value for key, value in gives.items() if _typed(key, value)[0] != LEAVES[key].default}
    return Answer("carried over" if new else "the default already", shown, gives if new else {})


def _problem(key: str, value: Any) -> str:
    typed, report = _typed(key, value)
    if report.problems:
        first = report.problems[0]
        return first.what + (f" ({first.hint})" if first.hint else "")
    fits = value is None or key not in RANGES or isinstance(typed, tuple) or typed in RANGES[key] or typed == LEAVES[key].default
    return "" if fits else f"must be {RANGES[key]}, got {value}"


def _typed(key: str, value: Any) -> tuple[Any, Report]:
    """The value as the configuration would read it."""
    report = Report("their file")
    is_text = LEAF_TYPES[key] in (str, str | None)
    # 2e-5 is text to YAML 1.1, and a number to whoever wrote it.
    node: Node | None = Scalar(value, not is_text, 1) if isinstance(value, str) else parse(yaml.safe_dump(value))
    assert node is not None
    read = read_sources if key in ("data.train", "data.eval") else None
    typed = read(node, key, "", report) if read else read_value(node, LEAF_TYPES[key], key, "", report)
    return (INVALID if report.problems else typed), report


def _short(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
    return text if len(text) <= 80 else text[:77] + "..."
