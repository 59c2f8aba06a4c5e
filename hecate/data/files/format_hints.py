"""What to write into `fields` for records whose keys no data format has, found in a record; obeying it leads to no other such hint."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from hecate.config.scalars import not_text
from hecate.config.schema import FieldNames
from hecate.data.chat.turns import SPEAKERS

_PLAIN = re.compile(r"\w(?:[\w ()./-]*[\w)])?")
"""The pattern of a text that YAML reads as itself in {...}."""
_TURNS = {"messages": ("role", "content"), "conversations": ("from", "value")}
_ANSWERS_TO_CHOOSE = ("chosen", "rejected")
"""The keys of preference data, which no hint takes for another key: half of these answers are bad."""
_ORDER = ("messages", "sharegpt", "tokens", "prompt_completion", "alpaca", "text")
_NAMED = {name.name for name in fields(FieldNames)}
"""The names that formats give to keys; what has such a name in a record seldom means another key."""
_LONGEST = 500
"""The most characters of a hint."""
_FORMS = '{"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [...]}'


def hint_for(record: Mapping[str, Any], names: Mapping[str, str], needed: Mapping[str, Sequence[str]]) -> str:
    """Return how to say which keys of a record are those of a data format, or what else to do.

    Args:
        record: with its own keys.
        names: what `fields` says already: the record's names of formats' keys.
        needed: the keys that each format needs, of the formats that read all keys that `fields` names.
    """
    fitting = [(format, found) for format in _ORDER if format in needed and (found := _filled(record, names, needed[format]))]
    if fitting:  # the one that knows most of the record's own names; documents have no question, and numbers may mean anything
        _, found = min(fitting, key=lambda fit: (_doubt(*fit), len(fit[1])))
        said = f"or say which keys they are: {in_words(found)}"
        if len(said) <= _LONGEST:
            return said
    return f"none of its keys has a text for what is missing: write records such as {_FORMS}"


def answers_of_preference(record: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the `fields` with which the chosen answers of preference data are trained on; None: there are none."""
    chosen: Any = record.get("chosen")
    prompt: Any = record.get("prompt")
    for key, (role, _) in _TURNS.items():
        if _are_turns(chosen, key) and any(turn[role] in ("user", "human") for turn in chosen):
            return {key: "chosen"}
    if not isinstance(chosen, str) and not _are_turns(chosen, "messages"):
        return None
    if isinstance(prompt, str) or _are_turns(prompt, "messages"):
        return {"completion": "chosen"}
    if isinstance(record.get("instruction"), str) and isinstance(chosen, str):
        return {"output": "chosen"}
    asked = [key for key, value in record.items() if isinstance(value, str) and value and key not in ("chosen", "rejected", "completion")]
    return {"prompt": asked[0], "completion": "chosen"} if len(asked) == 1 else None


def in_words(names: Mapping[str, str]) -> str:
    """Return how a source with such `fields` is written in a configuration."""
    return f"{{path: ..., fields: {{{', '.join(f'{name}: {_spelled(theirs)}' for name, theirs in names.items())}}}}}"


def _doubt(format: str, found: Mapping[str, str]) -> int:
    if format == "tokens":
        return 0 if re.search("id|tok", found.get("input_ids", "input_ids"), re.IGNORECASE) else 2
    return int(format == "text")


def _filled(record: Mapping[str, Any], names: Mapping[str, str], keys: Sequence[str]) -> dict[str, str] | None:
    """The names with those of further keys of the record, so that a format has all keys that it needs; None: the record lacks some."""
    free = [key for key in record if key not in names.values() and key not in _ANSWERS_TO_CHOOSE]
    found = dict(names)
    for key in (key for key in keys if key not in names):
        if key in free and _fits(record[key], key):
            free.remove(key)
            continue
        fitting = [name for name in free if name not in keys and _fits(record[name], key)]
        theirs = _best([name for name in fitting if name not in _NAMED], record) or _best(fitting, record)
        if theirs is None:
            return None
        free.remove(theirs)
        found[key] = theirs
    return found


def _best(keys: Sequence[str], record: Mapping[str, Any]) -> str | None:
    """The first, but one whose text has several words before others, which may be the record's number or its source."""
    return next((key for key in keys if not isinstance(record[key], str) or len(record[key].split()) > 1), keys[0] if keys else None)


def _fits(value: Any, key: str) -> bool:
    if key in _TURNS:
        return _are_turns(value, key)
    if key == "input_ids":
        return isinstance(value, list) and bool(value) and all(type(item) is int and 0 <= item < 1 << 31 for item in value)
    return isinstance(value, str) and bool(value.strip())


def _are_turns(value: Any, key: str) -> bool:
    role, content = _TURNS[key]
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and turn.get(role) in SPEAKERS and isinstance(turn.get(content), str) for turn in value)
    )


def _spelled(name: str) -> str:
    return name if _PLAIN.fullmatch(name) and not not_text(name) else json.dumps(name, ensure_ascii=False)
