"""The file of samples that were skipped: a user corrects them in it and feeds it in again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hecate.data.files.formats import Fault
from hecate.data.quarantine import write_quarantine
from hecate.errors import UserError

FAULTS = [
    Fault("a.jsonl", 2, "not UTF-8", raw=b'{"text": "\xff\xe2\x82\xac"}\r\n'),
    Fault("a.jsonl", 4, "not valid JSON", raw=b"{oops"),
]


def test_each_bad_line_is_written_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "new" / "quarantine.jsonl"
    for _ in range(2):  # the second replaces the first
        write_quarantine(path, FAULTS)
        assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [
            {"file": "a.jsonl", "line": 2, "reason": "not UTF-8", "raw": '{"text": "\\xff€"}'},
            {"file": "a.jsonl", "line": 4, "reason": "not valid JSON", "raw": "{oops"},
        ]
        assert path.stat().st_mode & 0o777 == 0o600  # it holds what the data hold


def test_a_file_that_cannot_be_written_is_named_with_the_systems_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^quarantine file {tmp_path} cannot be written: Is a directory$"):
        write_quarantine(tmp_path, FAULTS)
