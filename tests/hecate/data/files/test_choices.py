from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hecate.data.files.choices import ChoiceItem, read_choices
from hecate.errors import UserError

CHOICES = ["red", "blue", "A"]


@pytest.mark.parametrize(("answer", "number"), [(1, 1), ("blue", 1), ("B", 1), ("A", 2), ("C", 2)])
def test_an_answer_is_a_number_a_text_or_a_letter(tmp_path: Path, answer: Any, number: int) -> None:
    """In this order: a choice that is a letter is meant by it."""
    path = tmp_path / "asked.jsonl"
    path.write_text(json.dumps({"question": "which?", "choices": CHOICES, "answer": answer}))
    assert read_choices(path) == [ChoiceItem("which?", True, tuple(CHOICES), number, f"{path}:1")]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("{", "asked.jsonl:1: not valid JSON"),
        ({"choices": CHOICES, "answer": 0}, 'needs an object with "question" or "prompt"'),
        ({"question": "a", "prompt": "b", "choices": CHOICES, "answer": 0}, 'needs an object with "question" or "prompt"'),
        ({"prompt": " ", "choices": CHOICES, "answer": 0}, "must be a text that is not empty"),
        ({"prompt": "a", "choices": ["a", "b\ud800"], "answer": 0}, "lone surrogate"),
        ({"prompt": "a", "choices": ["a"], "answer": 0}, "choices must be a list of two texts or more"),
        ({"prompt": "a", "choices": CHOICES, "answer": 3}, "answer is '3': it must be the number of a choice"),
        ({"prompt": "a", "choices": CHOICES, "answer": True}, "answer is 'True'"),
        ({"prompt": "a", "choices": CHOICES}, "answer is 'None'"),
    ],
)
def test_what_is_no_question_is_refused(tmp_path: Path, record: Any, reason: str) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    with pytest.raises(UserError, match=reason):
        read_choices(path)
