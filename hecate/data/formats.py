"""Read JSONL training files of the formats `messages`, `alpaca`, `sharegpt` and `text`, with one JSON object per line.

A line that cannot be used is returned as a `Fault`, so that the caller can stop at it or skip it. A file that cannot be used as a
whole raises UserError.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hecate.data.user_features import UserFeatures
from hecate.errors import UserError

FORMATS = ("auto", "messages", "alpaca", "sharegpt", "text")

ROLES = ("system", "developer", "user", "assistant", "tool")

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
}


@dataclass(frozen=True)
class Sample:
    """One usable line of a file: a conversation (`messages`, each {"role", "content"}) or a document (`text`), never both."""

    file: str
    line: int  # from 1
    messages: tuple[dict[str, str], ...] | None = None
    text: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # the record's other keys, which are not trained on


@dataclass(frozen=True)
class Fault:
    """One line of a file that cannot be used, and the reason."""

    file: str
    line: int
    reason: str


class _BadRecord(Exception):
    """One record cannot be used; the text says why."""


def read_samples(path: str | Path, format: str = "auto", users: UserFeatures | None = None) -> Iterator[Sample | Fault]:
    """Yield every line of a JSONL file in order, as a `Sample` or a `Fault`.

    With `auto` the first line that is a JSON object decides the format, and a later line of another format is a Fault. With `users` so is a
    line whose user has no features.
    Raises UserError if `format` is unknown, the file cannot be read or is empty, or its first record is of no known format.
    """
    if format not in FORMATS:
        raise UserError(f"data format {format!r} is unknown: it must be one of {', '.join(FORMATS)}")
    parse = None if format == "auto" else _PARSERS[format]
    number = 0
    for number, raw in enumerate(read_lines(path), start=1):
        try:
            record = _json_object(raw, first=number == 1)
            if parse is None:
                parse = _PARSERS[_detect(record, f"{path}:{number}")]
            sample = parse(dict(record))
            _refuse_lone_surrogates(sample)
            if users is not None and (problem := users.problem(sample["extra"])):
                raise _BadRecord(problem)
        except _BadRecord as bad:
            yield Fault(str(path), number, str(bad))
        else:
            yield Sample(str(path), number, **sample)
    if number == 0:
        raise UserError(f"{path} is empty: a data file needs at least one line, with one JSON object per line")


def read_lines(path: str | Path) -> Iterator[bytes]:
    """Yield the file's lines as bytes, line ends included. Raises UserError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            yield from file
    except OSError as error:
        raise UserError(f"data file {path} cannot be read: {error.strerror}") from error


def _json_object(raw: bytes, first: bool) -> dict[str, Any]:
    if first:
        raw = raw.removeprefix(b"\xef\xbb\xbf")
    if not raw.strip():
        raise _BadRecord("the line is empty")
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _BadRecord(f"not UTF-8 at byte {error.start} of the line") from error
    except RecursionError as error:
        raise _BadRecord("JSON nested too deeply") from error
    except ValueError as error:
        torn = "" if raw.endswith(b"\n") else " (the file ends inside this line: it seems cut off)"
        raise _BadRecord(f"not valid JSON: {error}{torn}") from error
    if not isinstance(record, dict):
        raise _BadRecord(f"a JSON {_json_name(record)} where an object is needed")
    return record


def _detect(record: dict[str, Any], place: str) -> str:
    for format, keys in (
        ("messages", {"messages"}),
        ("sharegpt", {"conversations"}),
        ("alpaca", {"instruction", "output"}),
        ("text", {"text"}),
    ):
        if keys <= record.keys():
            return format
    raise UserError(
        f"{place}: no known data format has the keys {', '.join(sorted(record)) or '(none)'}\n"
        'the known ones: messages {"messages"}, sharegpt {"conversations"}, alpaca {"instruction", "output"}, text {"text"}'
    )


def _parse_messages(record: dict[str, Any]) -> dict[str, Any]:
    turns = _turns(record, "messages")
    messages = []
    for number, turn in enumerate(turns):
        role = _string(turn, "role", f"messages[{number}]")
        if role not in ROLES:
            raise _BadRecord(f"messages[{number}].role is {role!r}: it must be one of {', '.join(ROLES)}")
        messages.append({"role": role, "content": _string(turn, "content", f"messages[{number}]")})
    return {"messages": tuple(messages), "extra": record}


def _parse_sharegpt(record: dict[str, Any]) -> dict[str, Any]:
    turns = _turns(record, "conversations")
    messages = _system_message(record)
    for number, turn in enumerate(turns):
        speaker = _string(turn, "from", f"conversations[{number}]")
        if speaker not in _SHAREGPT_ROLES:
            known = ", ".join(_SHAREGPT_ROLES)
            raise _BadRecord(f"conversations[{number}].from is {speaker!r}: it must be one of {known}")
        value = _string(turn, "value", f"conversations[{number}]")
        messages.append({"role": _SHAREGPT_ROLES[speaker], "content": value})
    return {"messages": tuple(messages), "extra": record}


def _parse_alpaca(record: dict[str, Any]) -> dict[str, Any]:
    instruction, output = _string(record, "instruction"), _string(record, "output")
    further = "" if record.get("input") is None else _string(record, "input")
    messages = _system_message(record)
    messages.append({"role": "user", "content": f"{instruction}\n\n{further}" if further else instruction})
    messages.append({"role": "assistant", "content": output})
    for key in ("instruction", "output", "input"):
        record.pop(key, None)
    return {"messages": tuple(messages), "extra": record}


def _parse_text(record: dict[str, Any]) -> dict[str, Any]:
    text = _string(record, "text")
    del record["text"]
    return {"text": text, "extra": record}


_PARSERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "messages": _parse_messages,
    "alpaca": _parse_alpaca,
    "sharegpt": _parse_sharegpt,
    "text": _parse_text,
}


def _turns(record: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """Remove the list of turns from the record and return it. Refuse turns with keys that would change what is to be learned."""
    if key not in record:
        raise _BadRecord(f"no {key!r} in the record (its keys: {', '.join(sorted(record)) or 'none'})")
    turns = record.pop(key)
    if not isinstance(turns, list) or not turns:
        raise _BadRecord(f"{key!r} must be a list with at least one turn")
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise _BadRecord(f"{key}[{number}] is a JSON {_json_name(turn)} where an object is needed")
        for unsupported in ("tool_calls", "function_call"):
            if turn.get(unsupported):
                raise _BadRecord(f"{key}[{number}].{unsupported} is not supported: only text content is trained on")
        if turn.get("weight") not in (None, 1):
            raise _BadRecord(f"{key}[{number}].weight is not supported: every assistant turn is trained on alike")
    return turns


def _system_message(record: dict[str, Any]) -> list[dict[str, str]]:
    if not record.get("system"):
        return []
    text = _string(record, "system")
    del record["system"]
    return [{"role": "system", "content": text}]


def _string(record: dict[str, Any], key: str, where: str = "") -> str:
    name = f"{where}.{key}" if where else key
    if key not in record:
        raise _BadRecord(f"{name} is missing")
    if not isinstance(record[key], str):
        raise _BadRecord(f"{name} is a JSON {_json_name(record[key])} where a string is needed")
    return record[key]


def _refuse_lone_surrogates(sample: dict[str, Any]) -> None:
    """Refuse half a surrogate pair (`\\ud800`), which JSON can spell but no tokenizer accepts."""
    texts = [message["content"] for message in sample.get("messages", ())] + [sample.get("text", "")]
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _BadRecord(f"lone surrogate {text[error.start]!r} in the text") from error


def _json_name(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, dict):
        return "object"
    if isinstance(value, list):
        return "list"
    return "string" if isinstance(value, str) else "number"
