"""Data files are read before any process is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from hecate.config.schema import DataSource
from hecate.data.files.syntax import check_answers, check_syntax
from hecate.errors import UserError

GOOD = '{"text": "a"}\n'


def source(folder: Path, text: str) -> DataSource:
    path = folder / "data.jsonl"
    path.write_text(text, encoding="utf-8")
    return DataSource(path=str(path))


def test_a_good_file_passes(tmp_path: Path) -> None:
    check_syntax([source(tmp_path, GOOD * 3)], "error")


@pytest.mark.parametrize("policy", ["error", "truncate"])
def test_a_broken_line_is_named(tmp_path: Path, policy: str) -> None:
    with pytest.raises(UserError, match=r"data.jsonl:3: not valid JSON"):
        check_syntax([source(tmp_path, GOOD * 2 + "{\n" + GOOD)], policy)


def test_a_broken_line_may_be_skipped_but_not_an_empty_file(tmp_path: Path) -> None:
    check_syntax([source(tmp_path, GOOD + "{\n")], "skip")
    with pytest.raises(UserError, match="is empty"):
        check_syntax([source(tmp_path, "")], "skip")


def test_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no known data format has the keys question"):
        check_syntax([source(tmp_path, '{"question": "a"}\n')], "error")


def test_documents_have_no_answers_to_generate(tmp_path: Path) -> None:
    for name, record in (("talk", '{"prompt": "a", "completion": "b"}'), ("text", '{"text": "a"}')):
        (tmp_path / f"{name}.jsonl").write_text(record + "\n", encoding="utf-8")
    talk, text = (DataSource(path=str(tmp_path / f"{name}.jsonl")) for name in ("talk", "text"))
    check_answers([talk])
    for held_out in (text, DataSource(path=f"{tmp_path}/indexed.idx")):
        with pytest.raises(UserError, match=r"holds documents, .* to generate\n  use conversations, or set eval\.generate=false"):
            check_answers([talk, held_out])
