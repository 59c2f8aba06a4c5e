"""Compare what a chat template writes with what the conversation holds, so that no part of a sample is lost without a word.

What a template never writes (`name`, `reasoning_content`, calls of tools) is found by a rendering with marks in place of all texts, once
for all conversations of the same shape. A part that it drops of a text that it otherwise writes, as DeepSeek-R1's template drops all before
`</think>`, is found in each conversation: words that are missing in the rendering get marks, which tell what is dropped from what is
written in another way, such as with escapes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hecate.data.chat.conversations import Message, Span, TemplateRefusal, rendering

Path = tuple[int | str, ...]
"""The way to a text of a conversation: the message's index, the key, and what lies within."""
Shapes = dict[Hashable, frozenset[Path]]
"""The paths that a template does not write of conversations, by their shapes; to be kept as long as template and tokenizer stay the
same."""

_TOOLS: Path = ("tools",)
_SAID = re.compile(r"(content|reasoning_content|reasoning|thinking|tool_calls\.function)\b")
"""The names that chat templates give to what the assistant says; other keys of its messages describe it."""
_MOST_SHAPES = 10_000
"""The most shapes in memory: conversations that call tools may all be of different ones."""
_WORD = re.compile(r"<[^<>\s]*>|\w+")
_FIRST_MARK, _MARKS = 0xF0000, 0xFFFD
"""The range of Unicode's private use from which marks are taken, so that no text has them; a conversation with more texts repeats them."""


@dataclass(frozen=True)
class Unwritten:
    """A part of a conversation that is not in its rendering."""

    message: int
    """The index of the message; -1: the part belongs to no message."""
    name: str
    """The key of the part, such as `name` or `tool_calls.id`."""
    part: str = ""
    """The beginning of the missing part of a text; empty: nothing of the text is written."""


def unwritten(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any], whole: str, regions: Mapping[int, Span], shapes: Shapes
) -> list[Unwritten]:
    """Return what the rendering does not hold of the conversation.

    Args:
        whole: the rendering.
        regions: the character spans of messages in it, by the messages' indices; others are looked for in all of it.
        shapes: what is known of this tokenizer's template; more is added.
    """
    shape = (bool(tools), *map(_shape, messages))
    if shape not in shapes:
        if len(shapes) == _MOST_SHAPES:
            shapes.clear()
        shapes[shape] = _never_written(tokenizer, messages, tools)
    never = shapes[shape]
    found = [_described(path) for path in sorted(never, key=str)]
    doubtful: dict[Path, list[Span]] = {}
    for index, message in enumerate(messages):
        region = whole[slice(*regions[index])] if index in regions else whole
        for path, text in _texts(message, (index,)):
            if text.strip() not in region and path not in never and (words := _missing(text, region)):
                doubtful[path] = words
    return found + (_dropped(tokenizer, messages, tools, doubtful) if doubtful else [])


def require_learned(turns: Collection[int], lost: Sequence[Unwritten]) -> list[str]:
    """Return the names of what is not written, of which nothing is to be learned.

    Args:
        turns: the indices of the messages that are learned.

    Raises:
        TemplateRefusal: something else is not written: tools, or what is said in a turn that is to be learned.
    """
    for part in lost:
        if part.message < 0:
            raise TemplateRefusal("it writes no tools; use a template that does")
        if part.message not in turns or not _SAID.match(part.name):
            continue
        what = "calls of tools (tool_calls)" if part.name.startswith("tool_calls") else part.name
        if part.part:
            raise TemplateRefusal(
                f"it drops a part of the {what} of message {part.message + 1}, which begins with {part.part!r} and is to be learned; "
                "use a template that keeps it, or leave that part out"
            )
        raise TemplateRefusal(
            f"it writes no {what}, which message {part.message + 1} has and which are to be learned; use a template that does, "
            "or leave that key out"
        )
    return sorted({f"{part.name} of turns" for part in lost})


def _texts(value: Any, path: Path) -> Iterator[tuple[Path, str]]:
    """The texts of a message that are not empty, but those that only say what kind of object it or a call is."""
    if isinstance(value, str):
        if value.strip() and not (len(path) == 2 and path[1] == "role") and not (path[-1] == "type" and value == "function"):
            yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, (*path, str(key)))
    elif isinstance(value, Sequence):
        for number, item in enumerate(value):
            yield from _texts(item, (*path, number))


def _shape(value: Any) -> Hashable:
    """What all messages have in common that a template treats alike: all but their texts."""
    if isinstance(value, Mapping):
        return tuple((key, item if key == "role" else _shape(item)) for key, item in value.items())
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, Sequence):
        return tuple(map(_shape, value))
    return type(value).__name__


def _never_written(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any]) -> frozenset[Path]:
    """What the template does not write of conversations with other texts, either."""
    texts = dict(pair for index, message in enumerate(messages) for pair in _texts(message, (index,)))
    marks = {path: _mark(number) * len(text) for number, (path, text) in enumerate(texts.items())}
    marked = [_replaced(message, (index,), marks) for index, message in enumerate(messages)]
    try:
        written = rendering(tokenizer, marked, tools)
    except TemplateRefusal:  # it wants texts of a certain form
        marked, written = list(messages), rendering(tokenizer, messages, tools)
        lost: set[Path] = set()
        keys = {(index, key) for index, message in enumerate(messages) for key in message if key != "content"}
    else:
        lost = {path for path, mark in marks.items() if not _holds(written, mark[0])}
        with_text = {path[:2] for path in texts}
        keys = {(index, key) for index, message in enumerate(messages) for key in message} - with_text
    for name in {key for _, key in keys} - {"role"}:
        fewer = [{key: value for key, value in message.items() if key != name} for message in marked]
        if _same(tokenizer, fewer, tools, written):
            lost |= {(index, key) for index, key in keys if key == name and marked[index][key] not in ("", [], {})}
    if tools and _same(tokenizer, marked, (), written):
        lost.add(_TOOLS)
    return frozenset(lost)


def _same(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any], written: str) -> bool:
    try:
        return rendering(tokenizer, messages, tools) == written
    except TemplateRefusal:  # it misses what was left out
        return False


def _missing(text: str, region: str) -> list[Span]:
    """The first word of each part of the text whose words are not in the region, in the text's order; a tag is a word."""
    found: list[Span] = []
    at, within = 0, False
    for word in _WORD.finditer(text):
        place = region.find(word[0], at)
        if place >= 0:
            at, within = place + len(word[0]), False
        elif not within:
            within = True
            found.append(word.span())
    return found


def _dropped(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any], doubtful: Mapping[Path, list[Span]]) -> list[Unwritten]:
    """Return the texts that can be changed behind one of the given words without a change of the rendering."""
    texts = dict(pair for index, message in enumerate(messages) for pair in _texts(message, (index,)))
    words = [(path, word) for path, missing in doubtful.items() for word in missing]
    marks = {word: _mark(number) for number, word in enumerate(words)}
    marked = {}
    for path, missing in doubtful.items():
        cuts = [0, *(end for _, end in missing), len(texts[path])]
        first, *others = (texts[path][start:end] for start, end in pairwise(cuts))
        marked[path] = first + "".join(marks[path, word] + piece for word, piece in zip(missing, others, strict=True))
    try:
        written = rendering(tokenizer, [_replaced(message, (index,), marked) for index, message in enumerate(messages)], tools)
    except TemplateRefusal:  # so it reads them
        return []
    found: dict[Path, Unwritten] = {}
    for (path, (start, _)), mark in marks.items():
        if not _holds(written, mark):
            found.setdefault(path, _described(path, texts[path][start:].strip()[:40]))
    return list(found.values())


def _described(path: Path, part: str = "") -> Unwritten:
    if path == _TOOLS:
        return Unwritten(-1, "tools")
    index, *keys = path
    assert isinstance(index, int)
    return Unwritten(index, ".".join([key for key in keys if isinstance(key, str)][:3]), part)


def _mark(number: int) -> str:
    return chr(_FIRST_MARK + number % _MARKS)


def _holds(text: str, mark: str) -> bool:
    """Whether a text has a mark, as it is or as JSON escapes it."""
    return mark in text or json.dumps(mark)[1:-1] in text


def _replaced(value: Any, path: Path, texts: Mapping[Path, str]) -> Any:
    """The value with other texts."""
    if path in texts:
        return texts[path]
    if isinstance(value, Mapping):
        return {key: _replaced(item, (*path, str(key)), texts) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_replaced(item, (*path, number), texts) for number, item in enumerate(value)]
    return value
