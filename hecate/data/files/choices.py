"""Read questions with several answers to choose from: a record each.

    {"question": TEXT, "choices": [TEXT, ...], "answer": 2}     a user's message, which the assistant answers
    {"prompt": TEXT, "choices": [TEXT, ...], "answer": "B"}     plain text that goes on with a space and the choice

The answer is the number of the right choice, from 0, or its text, or its letter, from A.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hecate.data.files.formats import lone_surrogate
from hecate.data.files.records import Record, place_of, read_records
from hecate.errors import UserError


@dataclass(frozen=True)
class ChoiceItem:
    """One question."""

    text: str
    is_chat: bool
    """Whether the text is a user's message."""
    choices: tuple[str, ...]
    answer: int
    """The number of the right choice."""
    place: str
    """The file and the line of the question."""


def read_choices(path: Path) -> list[ChoiceItem]:
    """Return the questions of a file of any form that data may have (`hecate.data.files.records`).

    Raises:
        UserError: the file cannot be read, or a record is no question; the text says where it is.
    """
    return [_item(record) for record in read_records(str(path))]


def _item(read: Record) -> ChoiceItem:
    place, record = place_of(read.file, read.line), read.value
    if read.reason:
        raise UserError(f"{place}: {read.reason}")
    if ("question" in record) == ("prompt" in record):
        raise UserError(f'{place}: needs an object with "question" or "prompt", "choices" and "answer"')
    text, choices = record.get("question", record.get("prompt")), record.get("choices")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{place}: question or prompt must be a text that is not empty")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
        raise UserError(f"{place}: choices must be a list of two texts or more, none of them empty")
    for shown in (text, *choices):
        if half := lone_surrogate(shown):
            raise UserError(f"{place}: lone surrogate {half!r} in the text, which no tokenizer accepts")
    return ChoiceItem(text, "question" in record, tuple(choices), _answer(record.get("answer"), choices, place), place)


def _answer(given: Any, choices: list[str], place: str) -> int:
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < len(choices):
        return given
    if isinstance(given, str):
        if given in choices:
            return choices.index(given)
        if len(given) == 1 and 0 <= ord(given) - ord("A") < len(choices):
            return ord(given) - ord("A")
    raise UserError(f"{place}: answer is {str(given)[:40]!r}: it must be the number of a choice, from 0, its text, or its letter, from A")
