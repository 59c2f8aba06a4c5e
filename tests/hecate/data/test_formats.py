from pathlib import Path
from typing import Any

import pytest

from hecate.data.formats import Fault, Sample, read_samples
from hecate.errors import UserError
from tests.hecate.data.files import write_jsonl

USER, ASSISTANT, SYSTEM = ({"role": role, "content": role[0]} for role in ("user", "assistant", "system"))


def read(tmp_path: Path, records: list[Any], format: str = "auto") -> list[Sample | Fault]:
    return list(read_samples(write_jsonl(tmp_path / "data.jsonl", records), format))


@pytest.mark.parametrize(
    ("record", "messages", "extra"),
    [
        ({"messages": [USER, ASSISTANT], "id": 7}, [USER, ASSISTANT], {"id": 7}),
        ({"messages": [USER, {**ASSISTANT, "name": "x"}]}, [USER, ASSISTANT], {}),
        ({"instruction": "u", "output": "a"}, [USER, ASSISTANT], {}),
        ({"instruction": "u", "input": "", "output": "a"}, [USER, ASSISTANT], {}),
        (
            {"instruction": "Add", "input": "1 2", "output": "3", "system": "s", "answer": 3},
            [SYSTEM, {"role": "user", "content": "Add\n\n1 2"}, {"role": "assistant", "content": "3"}],
            {"answer": 3},
        ),
        (
            {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a", "weight": None}]},
            [USER, ASSISTANT],
            {},
        ),
        (
            {"system": "s", "conversations": [{"from": "user", "value": "u"}, {"from": "assistant", "value": "a"}]},
            [SYSTEM, USER, ASSISTANT],
            {},
        ),
    ],
)
def test_chat_formats_become_messages(tmp_path: Path, record: Any, messages: Any, extra: Any) -> None:
    (sample,) = read(tmp_path, [record])
    assert isinstance(sample, Sample)
    assert sample == Sample(str(tmp_path / "data.jsonl"), 1, messages=tuple(messages), extra=extra)


def test_text(tmp_path: Path) -> None:
    (sample,) = read(tmp_path, [{"text": "Größe\n🙂", "url": "x"}])
    assert sample == Sample(str(tmp_path / "data.jsonl"), 1, text="Größe\n🙂", extra={"url": "x"})


def test_file_may_start_with_a_byte_order_mark_have_crlf_and_lack_the_last_line_end(tmp_path: Path) -> None:
    samples = read(tmp_path, [b'\xef\xbb\xbf{"text": "a"}\r\n', b'{"text": "b"}'])
    assert [sample.text for sample in samples if isinstance(sample, Sample)] == ["a", "b"]


GOOD = b'{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}\n'
TURN = b'{"role": "assistant", "content": "a"%s}'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"\n", "empty"),
        (b"{]\n", "not valid JSON"),
        (b'{"messages": [{"role": "us', "cut off"),
        (b'{"messages": "\xff"}\n', "not UTF-8 at byte 14"),
        (b"[1]\n", "a JSON list where an object is needed"),
        (b"null\n", "a JSON null where an object is needed"),
        (b"[" * 100_000 + b"\n", "nested too deeply"),
        (b'{"messages": [], "n": ' + b"9" * 5000 + b"}\n", "not valid JSON"),
        (b'{"text": "t"}\n', "no 'messages' in the record"),
        (b'{"messages": []}\n', "at least one turn"),
        (b'{"messages": {}}\n', "must be a list"),
        (b'{"messages": ["hello"]}\n', r"messages\[0\] is a JSON string"),
        (b'{"messages": [{"content": "u"}]}\n', r"messages\[0\].role is missing"),
        (b'{"messages": [{"role": "Assistant", "content": "u"}]}\n', "role is 'Assistant'"),
        (b'{"messages": [{"role": "user", "content": null}]}\n', r"messages\[0\].content is a JSON null"),
        (b'{"messages": [{"role": "user", "content": [1]}]}\n', "content is a JSON list where a string"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}\n', "lone surrogate"),
        (b'{"messages": [' + TURN % b', "tool_calls": [1]' + b"]}\n", "tool_calls is not supported"),
        (b'{"messages": [' + TURN % b', "weight": 0' + b"]}\n", "weight is not supported"),
    ],
)
def test_bad_line_is_a_fault_in_its_place(tmp_path: Path, line: bytes, reason: str) -> None:
    first, fault, *rest = read(tmp_path, [GOOD, line] + ([GOOD] if line.endswith(b"\n") else []))
    assert isinstance(first, Sample)
    assert all(isinstance(sample, Sample) and sample.line == 3 for sample in rest)
    assert isinstance(fault, Fault)
    assert (fault.file, fault.line) == (str(tmp_path / "data.jsonl"), 2)
    with pytest.raises(ValueError, match=reason):
        raise ValueError(fault.reason)


@pytest.mark.parametrize(
    ("record", "format", "reason"),
    [
        ({"instruction": "x"}, "alpaca", "output is missing"),
        ({"instruction": "x", "output": 3}, "alpaca", "output is a JSON number"),
        ({"conversations": [{"from": "bing", "value": "x"}]}, "sharegpt", "from is 'bing'"),
        ({"conversations": [{"from": "gpt"}]}, "sharegpt", "value is missing"),
        ({"text": True}, "text", "text is a JSON boolean"),
    ],
)
def test_fault_of_the_other_formats(tmp_path: Path, record: Any, format: str, reason: str) -> None:
    (fault,) = read(tmp_path, [record], format)
    assert isinstance(fault, Fault)
    assert reason in fault.reason


def test_auto_looks_past_broken_lines_and_then_keeps_to_one_format(tmp_path: Path) -> None:
    kinds = [type(item) for item in read(tmp_path, [b"broken\n", {"text": "a"}, {"messages": [USER]}])]
    assert kinds == [Fault, Sample, Fault]


def test_unusable_files_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.jsonl:1: no known data format has the keys body, title"):
        read(tmp_path, [{"title": "t", "body": "b"}])
    with pytest.raises(UserError, match="is empty"):
        read(tmp_path, [])
    with pytest.raises(UserError, match=r"nowhere.jsonl cannot be read: No such file"):
        list(read_samples(tmp_path / "nowhere.jsonl"))
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        list(read_samples(tmp_path))
    with pytest.raises(UserError, match="format 'csv' is unknown"):
        list(read_samples(tmp_path / "data.jsonl", "csv"))
