"""Read prompts for a model: records {"prompt": TEXT} or {"messages": [...]}, with "user" where experts are mixed by users."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from hecate.config.schema import ROLES
from hecate.data.chat.conversations import Message
from hecate.data.files.formats import lone_surrogate
from hecate.data.files.records import json_object, place_of, read_records
from hecate.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """What a model is asked."""

    messages: tuple[Message, ...]
    user: str | None = None
    """The user who asks; None: it is not said."""
    record: dict[str, Any] = field(default_factory=dict)
    """The line from which the prompt came."""


def read_prompts(path: str, piped: Iterable[bytes] = (), *, system: str | None = None, user: str | None = None) -> Iterator[Prompt]:
    """Yield the prompts of a file of any form that data may have (`hecate.data.files.records`).

    Args:
        path: of the file; - : the prompts come in `piped`, as lines of JSON.
        system: the system message of prompts that have none.
        user: who asks where a record does not say it.

    Raises:
        UserError: the file cannot be read, there is no prompt, or a record is none; the text says where it is.
    """
    empty = True
    for place, record, reason in _piped(piped) if path == "-" else _of_file(path):
        empty = False
        if not reason and ("prompt" in record) == ("messages" in record):
            reason = 'needs an object with "prompt" or "messages"'
        if not reason and record.get("tools"):
            reason = "tools are not supported in prompts"
        if reason:
            raise UserError(f"{place}: {reason}")
        said, messages = record.get("user", user), _messages(record, place, system)
        if half := next(filter(None, (lone_surrogate(turn["content"]) for turn in messages)), None):
            raise UserError(f"{place}: lone surrogate {half!r} in the text, which no tokenizer accepts\n  correct the prompt")
        yield Prompt(messages, None if said is None else str(said), record)
    if empty:
        raise UserError('standard input holds no prompts\n  it needs an object a line, such as {"prompt": "What is FSSDP?"}')


def _of_file(path: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Place, value, and why it cannot be used."""
    return ((place_of(record.file, record.line), record.value, record.reason) for record in read_records(path))


def _piped(lines: Iterable[bytes]) -> Iterator[tuple[str, dict[str, Any], str]]:
    for number, raw in enumerate(lines, start=1):
        yield f"standard input:{number}", *json_object(raw, first=number == 1)


def asked(text: str, system: str | None, user: str | None = None) -> Prompt:
    """One user's message, with a system message before it if there is one."""
    before = () if system is None else ({"role": "system", "content": system},)
    return Prompt((*before, {"role": "user", "content": text}), user)


def _messages(record: dict[str, Any], place: str, system: str | None) -> tuple[Message, ...]:
    if "prompt" in record:
        if not isinstance(record["prompt"], str):
            raise UserError(f"{place}: prompt must be a text")
        return asked(record["prompt"], system).messages
    turns = record["messages"]
    right = isinstance(turns, list) and all(
        isinstance(turn, dict) and turn.get("role") in ROLES and isinstance(turn.get("content"), str) and not turn.get("tool_calls")
        for turn in turns
    )
    if not right or not turns:
        raise UserError(
            f'{place}: messages must be a list of {{"role", "content"}}, both texts, without tool calls\n  roles: {", ".join(ROLES)}'
        )
    if turns[-1]["role"] == "assistant":
        raise UserError(f"{place}: the last message is the assistant's, so that nothing is left to answer\n  leave it out")
    messages = tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)
    if system is None or messages[0]["role"] == "system":
        return messages
    return ({"role": "system", "content": system}, *messages)
