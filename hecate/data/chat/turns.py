"""Turn the turns of a record, as OpenAI's API, ShareGPT and alpaca have them, into messages as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hecate.config.schema import ROLES
from hecate.data.chat.conversations import Message
from hecate.data.files.records import json_name

SPEAKERS = {role: role for role in ROLES} | {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
"""The names of roles in records, ShareGPT's and LLaMA-Factory's too, whose `function_call` has the call as JSON text."""
ROLE_KEYS, TEXT_KEYS = ("role", "from"), ("content", "value")
"""The keys under which a turn says who speaks, and what; those of OpenAI's API come first, and ShareGPT's then."""
_OF_ANY_TURN, _OF_ANSWERS = ("train", "training"), ("weight", "loss")
"""The keys by which other programs say whether a turn is learned: axolotl's of any turn, OpenAI's and ms-swift's of the assistant's."""
_OF_A_PART = ("train_detail", "training_detail")
"""Keys by which axolotl learns parts of a turn."""
_TEXT_PARTS = ("text", "input_text", "output_text")


class BadRecord(Exception):
    """One record cannot be used; the text says why."""


def take_turns(record: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """Remove the list of turns from the record and return it.

    Raises:
        BadRecord: there is none, or a turn has a key that would change what is to be learned and is not read.
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
        for name in _OF_A_PART:
            if turn.get(name):
                raise BadRecord(f"{key}[{number}].{name} is not supported: a turn is learned as a whole, or not (train: true or false)")
    return turns


def require_key(record: dict[str, Any], key: str) -> None:
    """Raises BadRecord: the record lacks it."""
    if key not in record:
        raise BadRecord(f"no {key!r} in the record (its keys: {', '.join(sorted(record)) or 'none'})")


def marks_of(turns: Sequence[dict[str, Any]], key: str) -> tuple[bool | None, ...]:
    """What each turn says of itself: whether it is learned (`train`, `training`, `weight` or `loss`); None: nothing. Raises BadRecord."""
    return tuple(_mark_of(turn, f"{key}[{number}]") for number, turn in enumerate(turns))


def _mark_of(turn: dict[str, Any], where: str) -> bool | None:
    found = {name: turn[name] for name in (*_OF_ANY_TURN, *_OF_ANSWERS) if turn.get(name) is not None}
    for name, value in found.items():
        if value not in (0, 1):
            wanted = "0 or 1: an answer is learned, or not" if name == "weight" else "true or false"
            raise BadRecord(f"{where}.{name} is {str(value)[:40]!r}: it must be {wanted}")
        if value and name in _OF_ANSWERS and SPEAKERS.get(_of_turn(turn, ROLE_KEYS), "assistant") != "assistant":
            raise BadRecord(f"{where}.{name} is about answers, and this turn is none: to learn it, write train: true")
    if len(set(map(bool, found.values()))) > 1:
        raise BadRecord(f"{where}: {' and '.join(found)} contradict each other about whether the turn is learned")
    return next(map(bool, found.values()), None)


def messages_of(turns: Sequence[dict[str, Any]], key: str) -> tuple[Message, ...]:
    """Turns, with role and content or with from and value, as the chat template gets them, with their other keys. Raises BadRecord."""
    return tuple(_message(turn, f"{key}[{number}]", first=key == "conversations") for number, turn in enumerate(turns))


def _message(turn: dict[str, Any], where: str, *, first: bool) -> Message:
    """A turn as a message. `first` says to ask for ShareGPT's keys where a turn has none."""
    role_key, text_key = (next((name for name in names if name in turn), names[first]) for names in (ROLE_KEYS, TEXT_KEYS))
    speaker = text_of(turn, role_key, where)
    if speaker not in SPEAKERS:
        raise BadRecord(f"{where}.{role_key} is {speaker!r}: it must be one of {', '.join(SPEAKERS)}")
    role, calls = SPEAKERS[speaker], turn.get("tool_calls")
    if calls and role != "assistant":
        raise BadRecord(f"{where}.tool_calls is in a turn of the {role}: only the assistant calls tools")
    message: Message = {"role": role, "content": "" if calls and turn.get(text_key) is None else _content(turn, text_key, where)}
    if calls:
        message["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls")
    elif speaker == "function_call":
        calls = _parsed(message["content"], f"{where}.{text_key} is")
        message |= {"content": "", "tool_calls": _tool_calls(calls if isinstance(calls, list) else [calls], f"{where}.{text_key}")}
    return message | _others(turn, role_key, text_key, *message, *_OF_ANY_TURN, *_OF_ANSWERS)


def _content(turn: dict[str, Any], key: str, where: str) -> str:
    """The text of a turn; of a list of parts that are all text, the parts end to end, as chat templates write them."""
    if not isinstance(turn.get(key), list):
        return text_of(turn, key, where)
    texts = []
    for number, part in enumerate(turn[key]):
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        known = isinstance(part, str) or (isinstance(part, dict) and part.get("type", "text") in _TEXT_PARTS)
        if not known or not isinstance(text, str):
            raise BadRecord(f"{where}.{key} is a list of parts, of which part {number + 1} is no text, and hecate reads text only")
        if others := sorted(_others({} if isinstance(part, str) else part, "type", "text")):
            raise BadRecord(f"{where}.{key}: part {number + 1} has the key {others[0]!r}: of a part, only its text is read")
        texts.append(text)
    return "".join(texts)


def _of_turn(turn: dict[str, Any], names: Sequence[str]) -> Any:
    return next((turn[name] for name in names if name in turn), None)


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
    if any(_of_turn(turn, ROLE_KEYS) in ("system", "developer") for turn in turns):
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
