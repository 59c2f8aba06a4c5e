"""Read questions with several answers to choose from: a JSON object a line.

    {"question": TEXT, "choices": [TEXT, ...], "answer": 2}     a user's message, which the assistant answers
    {"prompt": TEXT, "choices": [TEXT, ...], "answer": "B"}     plain text that goes on with a space and the choice

The answer is the number of the right choice, from 0, or its text, or its letter, from A.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hecate.data.formats import read_lines
from hecate.errors import UserError


@dataclass(frozen=True)
class ChoiceItem:
    """One question."""

    text: str
    is_chat: bool
    """whether the text is a user's message"""
    choices: tuple[str, ...]
    answer: int
    """number of the right choice"""
    place: str
    """file and line"""


def read_choices(path: Path) -> list[ChoiceItem]:
    """Return the questions of a file. Empty lines are passed over.

    Raises:
        UserError: the file cannot be read, has no question, or a line is none; the text names file and line.
    """
    items = [_item(raw, f"{path}:{number}") for number, raw in enumerate(read_lines(path), start=1) if raw.strip()]
    if not items:
        raise UserError(f"{path}: holds no questions")
    return items


def _item(raw: bytes, place: str) -> ChoiceItem:
    try:
        record = json.loads(raw.decode("utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{place}: not valid JSON: {error}") from error
    if not isinstance(record, dict) or ("question" in record) == ("prompt" in record):
        raise UserError(f'{place}: needs an object with "question" or "prompt", "choices" and "answer"')
    text, choices = record.get("question", record.get("prompt")), record.get("choices")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{place}: question or prompt must be a text that is not empty")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
        raise UserError(f"{place}: choices must be a list of two texts or more, none of them empty")
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
