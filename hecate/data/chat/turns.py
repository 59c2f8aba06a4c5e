"""Turn the turns of a record, as OpenAI's API, ShareGPT and alpaca have them, into messages as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hecate.data.chat.conversations import Message
from hecate.data.files.records import json_name

ROLES = ("system", "developer", "user", "assistant", "tool")

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
"""The roles of ShareGPT, with those of LLaMA-Factory, whose `function_call` has the call as JSON text."""
_LEARNED = {"weight": 1, "loss": True, "train": True, "training": True}
"""The keys by which other programs say whether a turn is learned, and their values for a turn that is."""


class BadRecord(Exception):
    """One record cannot be used; the text says why."""


def take_turns(record: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """Remove the list of turns from the record and return it.

    Raises:
        BadRecord: there is none, or a turn has a key that would change what is to be learned.
    """
    require_key(record, key)
    turns = record.pop(key)
    if not isinstance(turns, list) or not turns:
        raise BadRecord(f"{key!r} must be a list with at least one turn")
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise BadRecord(f"{key}[{number}] is a JSON {json_name(turn)} where an object is needed")
        if turn.get("function_call"):
            raise BadRecord(f"{key}[{number}].function_call is not supported: write the call into tool_calls")
        if turn.get("role", turn.get("from")) in ("assistant", "gpt", "function_call"):
            for name, learned in _LEARNED.items():
                if turn.get(name) not in (None, learned):
                    raise BadRecord(f"{key}[{number}].{name} is not supported: every assistant turn is trained on alike")
    return turns


def require_key(record: dict[str, Any], key: str) -> None:
    """Raises BadRecord: the record lacks it."""
    if key not in record:
        raise BadRecord(f"no {key!r} in the record (its keys: {', '.join(sorted(record)) or 'none'})")


def messages_of(turns: Sequence[dict[str, Any]], key: str) -> tuple[Message, ...]:
    """Turns with role and content as the chat template gets them, with all of their other keys. Raises BadRecord."""
    return tuple(_message(turn, f"{key}[{number}]") for number, turn in enumerate(turns))


def sharegpt_messages(turns: Sequence[dict[str, Any]], key: str) -> tuple[Message, ...]:
    """The same of turns with from and value. Raises BadRecord."""
    return tuple(_sharegpt_message(turn, f"{key}[{number}]") for number, turn in enumerate(turns))


def _message(turn: dict[str, Any], where: str) -> Message:
    role = text_of(turn, "role", where)
    if role not in ROLES:
        raise BadRecord(f"{where}.role is {role!r}: it must be one of {', '.join(ROLES)}")
    calls = turn.get("tool_calls")
    if not calls:
        if isinstance(turn.get("content"), list):
            raise BadRecord(f"{where}.content is a list of parts, as turns with images have it: hecate reads text, one string")
        return {"role": role, "content": text_of(turn, "content", where)} | _others(turn, "role", "content")
    if role != "assistant":
        raise BadRecord(f"{where}.tool_calls is in a turn of the {role}: only the assistant calls tools")
    content = "" if turn.get("content") is None else text_of(turn, "content", where)
    message = {"role": role, "content": content, "tool_calls": _tool_calls(calls, f"{where}.tool_calls")}
    return message | _others(turn, *message)


def _sharegpt_message(turn: dict[str, Any], where: str) -> Message:
    speaker, value = text_of(turn, "from", where), text_of(turn, "value", where)
    if speaker not in SHAREGPT_ROLES:
        raise BadRecord(f"{where}.from is {speaker!r}: it must be one of {', '.join(SHAREGPT_ROLES)}")
    message: Message = {"role": SHAREGPT_ROLES[speaker], "content": value}
    if speaker == "function_call":
        calls = _parsed(value, f"{where}.value is")
        message |= {"content": "", "tool_calls": _tool_calls(calls if isinstance(calls, list) else [calls], f"{where}.value")}
    return message | _others(turn, "from", "value", *message)


def _others(turn: dict[str, Any], *read: str) -> Message:
    """The keys of a turn beside those that are read, as far as there is anything in them."""
    return {name: value for name, value in turn.items() if name not in read and value is not None and value not in ([], {})}


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """The calls with their arguments as objects, which is what chat templates take; many files have them as JSON text."""
    if not isinstance(calls, list):
        raise BadRecord(f"{where} is a JSON {json_name(calls)} where a list is needed")
    found = []
    for number, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRecord(f'{where}[{number}] is no call: it must be {{"function": {{"name": ..., "arguments": {{...}}}}}}')
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(arguments, f"{where}[{number}]: its arguments are")
        known = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        found.append(known | ({} if function is call else _others(call, *known)))
    return found


def take_tools(record: dict[str, Any]) -> tuple[Any, ...]:
    """Remove the list of tools from the record and return it; it may be given as JSON text. None at all: empty. Raises BadRecord."""
    tools = record.pop("tools", None)
    if isinstance(tools, str):
        tools = _parsed(tools, "tools is text that is") if tools.strip() else None
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRecord("tools must be a list of objects, which describe functions")
    return tuple(tools)


def take_history(record: dict[str, Any]) -> list[Message]:
    """Remove alpaca's `history` from the record, pairs of an instruction and its answer, and return them as messages. Raises BadRecord."""
    history = record.pop("history", None)
    if isinstance(history, str):
        history = _parsed(history, "history is text that is") if history.strip() else None
    pairs = history or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and [type(text) for text in pair] == [str, str] for pair in pairs):
        raise BadRecord("history must be a list of pairs [instruction, answer], both texts")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]


def system_message(record: dict[str, Any], turns: Sequence[dict[str, Any]] = ()) -> tuple[Message, ...]:
    """Remove the key `system` from the record and return it as a message. None at all, or an empty text: no message. Raises BadRecord."""
    if not record.get("system"):
        return ()
    text = text_of(record, "system")
    if any(turn.get("role", turn.get("from")) in ("system", "developer") for turn in turns):
        raise BadRecord("the record has the key 'system', and a system message among its turns, too: keep one of the two")
    del record["system"]
    return ({"role": "system", "content": text},)


def text_of(record: dict[str, Any], key: str, where: str = "") -> str:
    """The text that the record has under a key. Raises BadRecord: there is none."""
    name = f"{where}.{key}" if where else key
    if key not in record:
        raise BadRecord(f"{name} is missing")
    if not isinstance(record[key], str):
        raise BadRecord(f"{name} is a JSON {json_name(record[key])} where a string is needed")
    return record[key]


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{what} not valid JSON: {error}") from error
