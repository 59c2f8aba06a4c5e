"""Read prompts for a model: a JSON object a line, {"prompt": TEXT} or {"messages": [...]}, with "user" where experts are mixed by users."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from hecate.data.chat import Message
from hecate.data.formats import ROLES
from hecate.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """What a model is asked."""

    messages: tuple[Message, ...]
    user: str | None = None
    """who asks; None: it is not said"""
    record: dict[str, Any] = field(default_factory=dict)
    """the line that it came from"""


def read_prompts(lines: Iterable[bytes], name: str, system: str | None = None, user: str | None = None) -> Iterator[Prompt]:
    """Yield the prompts of a file's lines. Empty lines are passed over.

    Args:
        name: of the file, for errors.
        system: the system message of prompts that have none.
        user: who asks where a line does not say it.

    Raises:
        UserError: a line is no such object, or there is no prompt; the text names file and line.
    """
    number = found = 0
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        found += 1
        place = f"{name}:{number}"
        try:
            record = json.loads(raw.decode("utf-8-sig"))
        except ValueError as error:
            raise UserError(f"{place}: not valid JSON: {error}") from error
        if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
            raise UserError(f'{place}: needs an object with "prompt" or "messages"')
        said = record.get("user", user)
        yield Prompt(_messages(record, place, system), None if said is None else str(said), record)
    if not found:
        raise UserError(f'{name}: holds no prompts\n  it needs an object a line, such as {{"prompt": "What is FSSDP?"}}')


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
        isinstance(turn, dict) and turn.get("role") in ROLES and isinstance(turn.get("content"), str) for turn in turns
    )
    if not right or not turns:
        raise UserError(f'{place}: messages must be a list of {{"role", "content"}}, both texts; the roles are {", ".join(ROLES)}')
    if turns[-1]["role"] == "assistant":
        raise UserError(f"{place}: the last message is the assistant's, so that nothing is left to answer\n  leave it out")
    messages = tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)
    if system is None or messages[0]["role"] == "system":
        return messages
    return ({"role": "system", "content": system}, *messages)
