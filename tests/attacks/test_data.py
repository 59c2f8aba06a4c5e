"""A data file of somebody else is read as what it says, or refused by its name; it runs nothing and takes no endless time or memory."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import pytest

from hecate.data.encode import encode_source
from testing.byte_tokenizer import build_byte_tokenizer
from tests.attacks.watching import HARMLESS, PLACES, REFUSED, outcome
from tests.hecate.data.making import Source

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
GOOD = json.dumps(CHAT).encode() + b"\n"


def record(**values: Any) -> bytes:
    return GOOD + json.dumps(CHAT | values).encode() + b"\n"


def nested(depth: int) -> bytes:
    return b'{"messages": [], "x": ' + b"[" * depth + b"]" * depth + b"}\n"


def tools(depth: int) -> bytes:
    """A description of a tool whose parameters are nested."""
    parameters = '{"a": ' * depth + "1" + "}" * depth
    return json.dumps(CHAT)[:-1].encode() + f', "tools": [{{"name": "f", "parameters": {parameters}}}]}}\n'.encode()


def packed(megabytes: int) -> bytes:
    """A gzip file of one line whose text has so many MiB, a thousandth as long."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    head = packer.compress(b'{"text": "') + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(b" " * 2**20) + packer.flush(zlib.Z_FULL_FLUSH)
    return head + block * megabytes


CONTENTS: dict[str, tuple[str, bytes, str]] = {
    "as it was": ("a.jsonl", GOOD, HARMLESS),
    "empty": ("a.jsonl", b"", REFUSED),
    "blank lines": ("a.jsonl", b"\n\n\n", REFUSED),
    "a zero byte": ("a.jsonl", GOOD + b"\0\n", REFUSED),
    "a zero byte in a text": ("a.jsonl", record(messages=[{"role": "user", "content": "\0"}, *CHAT["messages"][1:]]), HARMLESS),
    "half a character": ("a.jsonl", GOOD + b'{"text": "\xff"}\n', REFUSED),
    "a lone surrogate": ("a.jsonl", record(messages=[{"role": "user", "content": "\ud800"}, *CHAT["messages"][1:]]), REFUSED),
    "UTF-16": ("a.jsonl", json.dumps(CHAT).encode("utf-16"), REFUSED),
    "a mark before the first line": ("a.jsonl", b"\xef\xbb\xbf" + GOOD, HARMLESS),
    "a list of 100,000 levels": ("a.jsonl", b"[" * 100_000, REFUSED),
    "a key of 900 levels": ("a.jsonl", GOOD + nested(900), REFUSED),
    "a key of 100,000 levels": ("a.jsonl", GOOD + nested(100_000), REFUSED),
    "tools of 400 levels": ("a.jsonl", tools(400), REFUSED),
    "tools of 900 levels": ("a.jsonl", tools(900), REFUSED),
    "tools of 50,000 levels": ("a.jsonl", tools(50_000), REFUSED),
    "a number of a million digits": ("a.jsonl", b'{"text": ' + b"9" * 10**6 + b"}\n", REFUSED),
    "a number that is none, in a key that is not read": ("a.jsonl", b'{"text": "a", "x": NaN}\n', HARMLESS),
    "a name given twice, of which JSON takes the last": ("a.jsonl", b'{"text": "a", "text": "b"}\n', HARMLESS),
    "a role that there is not": ("a.jsonl", record(messages=[{"role": "root", "content": "a"}]), REFUSED),
    "a role that is a list": ("a.jsonl", record(messages=[{"role": ["user"], "content": "a"}]), REFUSED),
    "a content that is a number": ("a.jsonl", record(messages=[{"role": "user", "content": 7}]), REFUSED),
    "messages that are text": ("a.jsonl", record(messages="hello"), REFUSED),
    "an image": ("a.jsonl", record(images=["/etc/passwd"]), REFUSED),
    "a key that a terminal obeys": ("a.jsonl", json.dumps({"\x1b]0;owned\x07": 1}).encode() + b"\n", REFUSED),
    "100,000 keys": ("a.jsonl", json.dumps({f"k{n}": n for n in range(10**5)}).encode() + b"\n", REFUSED),
    "a broken packed file": ("a.jsonl.gz", b"\x1f\x8b\x08\x00broken", REFUSED),
    "a packed file that is cut": ("a.jsonl.gz", gzip.compress(GOOD * 99)[:-20], REFUSED),
    "a packed line of 4 GiB": ("a.jsonl.gz", packed(4096), REFUSED),
    "a pickle": ("a.jsonl", b"cposix\nsystem\n(S'touch ran'\ntR.", REFUSED),
    "a table without its end": ("a.csv", b'text\n"' + b"x" * 100, REFUSED),
    "a table of 300,000 columns": ("a.csv", b"a," * 300_000 + b"b\n1\n", REFUSED),
    "a table with semicolons": ("a.csv", b"text;answer\na;b\n", HARMLESS),
    "a Parquet file that is none": ("a.parquet", b"PAR1" + b"\xff" * 100 + b"PAR1", REFUSED),
    "an Arrow file that is none": ("a.arrow", b"ARROW1\0\0" + b"\xff" * 100 + b"ARROW1", REFUSED),
    "a form that there is not": ("a.pickle", b"\x80\x04.", REFUSED),
}
SLOW = ("a packed line of 4 GiB", "a table of 300,000 columns", "tools of 50,000 levels")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_byte_tokenizer()


def take(path: Path, tokenizer: Any) -> object:
    return encode_source(Source(str(path)), tokenizer, seq_len=64, vocab_size=len(tokenizer))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CONTENTS])
def test_a_file(tmp_path: Path, tokenizer: Any, name: str) -> None:
    file, content, wanted = CONTENTS[name]
    (tmp_path / file).write_bytes(content)
    assert outcome(lambda: take(tmp_path / file, tokenizer), tmp_path) == wanted


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "jsonl.gz", "parquet", "arrow", "idx"])
@pytest.mark.parametrize("what", PLACES)
def test_what_stands_in_its_place(tmp_path: Path, tokenizer: Any, what: str, ending: str) -> None:
    file = tmp_path / f"a.{ending}"
    PLACES[what](file)
    assert outcome(lambda: take(file, tokenizer), tmp_path, named=file.name) == REFUSED
