"""Bad records and files of data: file and line are named, or the sample is skipped and quarantined, and the others are as they were."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from hecate.config.schema import DataSource
from hecate.data.encode import BadSamples, EncodedSource
from hecate.data.files.formats import Fault
from hecate.data.sources import read_source
from hecate.errors import UserError
from testing.byte_tokenizer import build_byte_tokenizer


def chat(*contents: Any) -> bytes:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return json.dumps({"messages": turns}).encode() + b"\n"


def called(role: bytes, calls: bytes) -> bytes:
    """A conversation whose second turn calls tools."""
    turn = b'{"role": "%s", "content": "a", "tool_calls": %s}' % (role, calls)
    return b'{"messages": [{"role": "user", "content": "q"}, %s]}\n' % turn


LENGTH = 256
GOOD = [chat("q", letter) for letter in "abcd"]
LINES: dict[str, tuple[bytes, str]] = {
    "torn JSON": (b'{"messages": [{"role": "user"\n', "not valid JSON"),
    "no JSON": (b"once upon a time\n", "not valid JSON"),
    "bad UTF-8": (b'{"messages": "\xff\xfe"}\n', "not UTF-8"),
    "a number": (b"12\n", "JSON number"),
    "a list": (b"[1]\n", "JSON list"),
    "null": (b"null\n", ""),
    "no messages": (b"{}\n", "no 'messages'"),
    "messages are text": (b'{"messages": "hello"}\n', ""),
    "messages are empty": (b'{"messages": []}\n', ""),
    "a role that nobody has": (b'{"messages": [{"role": "robot", "content": "q"}, {"role": "assistant", "content": "a"}]}\n', ""),
    "content is a number": (b'{"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": "a"}]}\n', ""),
    "no answer": (chat("q"), "no assistant turn"),
    "an empty answer": (chat("q", " \n"), "an assistant turn is empty"),
    "an answer without a question": (b'{"messages": [{"role": "assistant", "content": "a"}]}\n', "begins with an assistant turn"),
    "nothing to learn": (chat("q", ""), ""),
    "too long": (chat("q", "a" * 400), "more than data.seq_len"),
    "nested 100,000 times": (b'{"messages": ' + b"[" * 100_000 + b"\n", ""),
    "NaN in it": (b'{"messages": NaN}\n', ""),
    "infinity": (b"-Infinity\n", ""),
    "true": (b"true\n", "JSON boolean"),
    "text": (b'"once upon a time"\n', "JSON string"),
    "two objects": (GOOD[0][:-1] + b" " + GOOD[1], "not valid JSON"),
    "a comma at the end": (GOOD[0][:-1] + b",\n", "not valid JSON"),
    "a zero byte": (b'{"messages": "\0"}\n', "not valid JSON"),
    "single quotes": (b"{'messages': []}\n", "not valid JSON"),
    "a mark of byte order": (b"\xef\xbb\xbf" + GOOD[0], "not valid JSON"),
    "a turn that is text": (b'{"messages": ["hello"]}\n', ""),
    "a turn without content": (b'{"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}\n', ""),
    "a role that is a list": (b'{"messages": [{"role": ["user"], "content": "q"}]}\n', ""),
    "an answer that is null": (b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": null}]}\n', ""),
    "a call of the user's": (called(b"user", b'[{"function": {"name": "f", "arguments": {}}}]'), "only the assistant calls tools"),
    "a call without a name": (called(b"assistant", b'[{"function": {}}]'), "is no call"),
    "a call whose arguments are cut": (called(b"assistant", b'[{"function": {"name": "f", "arguments": "{"}}]'), "not valid JSON"),
    "calls that are a number": (called(b"assistant", b"3"), "JSON number"),
    "another format": (b'{"text": "once upon a time"}\n', ""),
    "half of a surrogate": (b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "a"}]}\n', ""),
}
"""a bad line among good ones, and words that its error has"""
FILES: dict[str, tuple[str, bytes]] = {
    "an empty file": ("a.jsonl", b""),
    "blank lines only": ("a.jsonl", b"\n\n \n"),
    "a JSON list that ends early": ("a.json", b'[{"text": "a"},\n {"text": "b"\n'),
    "a list in a file of lines": ("a.jsonl", b'[\n{"text": "a"}\n]\n'),
    "zero bytes": ("a.json", b"[\0"),
    "a table that names a column twice": ("a.csv", b"text,text\na,b\n"),
    "a table with an open quote": ("a.csv", b'text\n"a\n'),
    "a packed file that is cut": ("a.jsonl.gz", gzip.compress(GOOD[0] * 99, mtime=0)[:-9]),
    "no tensors but a picture": ("a.parquet", b"\x89PNG\r\n"),
    "a table without names": ("a.csv", b",\na,b\n"),
    "a file in UTF-16": ("a.json", '[{"text": "a"}]'.encode("utf-16")),
    "an object that holds the list": ("a.json", b'{\n"data": [{"text": "a"}]\n}\n'),
    "more behind the list": ("a.json", b'[{"text": "a"}]\n[{"text": "b"}]\n'),
    "a list without commas": ("a.json", b'[{"text": "a"}\n{"text": "b"}]\n'),
    "a packed file of another program": ("a.jsonl.gz", b"\x1f\x8b\x09" + bytes(40)),
    "a table's file that is empty": ("a.arrow", b""),
    "a text that is named Parquet": ("a.parquet", b'{"text": "a"}\n'),
    "an index of nothing": ("a.idx", b"MMIDIDX\0\0" + bytes(25)),
    "tokens without an index": ("a.bin", bytes(40)),
    "keys of no format": ("a.jsonl", b'{"question": "a", "reply": "b"}\n'),
}
"""a file that cannot be read at all"""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_byte_tokenizer()


def encode(path: Path, tokenizer: PreTrainedTokenizerFast, policy: str) -> EncodedSource:
    bad = BadSamples(policy, path.parent / "quarantine.jsonl", speaks=False)
    source = DataSource(path=str(path), name="bad")
    found = read_source(source, tokenizer, seq_len=LENGTH, vocab_size=len(tokenizer), bad=bad)
    assert isinstance(found, EncodedSource)
    return found


def with_line(folder: Path, *lines: bytes) -> Path:
    """A file of good records, with these in the third line and after it."""
    path = folder / "data.jsonl"
    path.write_bytes(b"".join([*GOOD[:2], *lines, *GOOD[2:]]))
    return path


@pytest.mark.parametrize("name", LINES)
def test_a_bad_record_is_refused_by_its_file_and_line(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    line, words = LINES[name]
    path = with_line(tmp_path, line)
    with pytest.raises(UserError) as refusal:
        encode(path, tokenizer, "error")
    assert f"{path}:3" in str(refusal.value)
    assert words in str(refusal.value)


@pytest.mark.parametrize("name", LINES)
def test_a_bad_record_is_quarantined_and_the_others_are_as_they_were(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    wanted = [sample.input_ids.tolist() for sample in encode(with_line(tmp_path), tokenizer, "error")]
    found = encode(with_line(tmp_path, LINES[name][0]), tokenizer, "skip")
    assert [sample.input_ids.tolist() for sample in found] == wanted
    lines = (tmp_path / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(one)["line"] for one in lines] == [3]


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_refused_by_its_name(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    file, content = FILES[name]
    path = tmp_path / file
    path.write_bytes(content)
    with pytest.raises(UserError) as refusal:
        encode(path, tokenizer, "error")
    assert str(path.with_suffix("")) in str(refusal.value)


def test_without_the_line_in_its_place_these_tests_would_fail(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fault, "place", property(lambda fault: fault.file))
    with pytest.raises(AssertionError):
        test_a_bad_record_is_refused_by_its_file_and_line(tmp_path, tokenizer, "no JSON")
