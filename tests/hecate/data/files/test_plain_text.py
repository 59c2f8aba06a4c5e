"""Plain text becomes documents: of whole files, of paragraphs, or of pieces of one length."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hecate.data.encode import encode_source
from hecate.data.files import plain_text
from hecate.data.files.formats import Fault, Sample, read_samples
from hecate.data.files.plain_text import plain_text_in_words
from hecate.data.files.records import places_of_records
from hecate.errors import UserError
from tests.hecate.data.making import Source

FILES = {"a.txt": b"\xef\xbb\xbfone\ntwo\n\n\n \nthree \xc3\xbc\n", "b.md": b"# four\r\n\r\nfive\r\n", "c.txt": b"\n\n"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def found(path: Path, **reading: Any) -> list[tuple[str, str]]:
    items = list(read_samples(path, **reading))
    return [(item.place.rpartition("/")[2], (item.text or "") if isinstance(item, Sample) else item.reason) for item in items]


def test_a_file_is_one_document_as_it_is(folder: Path) -> None:
    assert found(folder) == [("a.txt:1", "one\ntwo\n\n\n \nthree ü\n"), ("b.md:1", "# four\r\n\r\nfive\r\n"), ("c.txt:1", "\n\n")]
    (folder / "d.txt.gz").write_bytes(gzip.compress(b"packed"))
    assert found(folder / "d.txt.gz") == [("d.txt.gz:1", "packed")]


def test_paragraphs_are_documents_in_their_lines(folder: Path) -> None:
    wanted = [("a.txt:1", "one\ntwo"), ("a.txt:6", "three ü"), ("b.md:1", "# four"), ("b.md:3", "five"), ("c.txt:1", "")]
    assert found(folder, by_paragraph=True) == wanted
    assert places_of_records(str(folder), {2, 4}, by_paragraph=True) == {2: f"{folder}/a.txt:6", 4: f"{folder}/b.md:3"}


def test_what_is_not_utf8_or_too_long_is_named_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\ntwo\nthr\xffee\n\nfour\n")
    _, fault, last = read_samples(path, by_paragraph=True)
    assert isinstance(fault, Fault)
    assert (fault.place, fault.reason) == (f"{path}:3", "not UTF-8 in line 4 of the file")
    assert isinstance(last, Sample)
    monkeypatch.setattr(plain_text, "LONGEST_RECORD", 10)
    with pytest.raises(UserError, match=r"a\.txt:1: the text has more than .*\nset sample_by: paragraph"):
        found(path)


def test_text_beside_records_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "a.jsonl").write_text('{"text": "t"}\n')
    assert found(tmp_path) == [("a.jsonl:1", "t")]


@pytest.mark.parametrize("seq_len", [2, 3, 4, 7, 8, 16, 100])
def test_pieces_of_one_length_are_windows_of_all_text(tmp_path: Path, byte_tokenizer: Any, seq_len: int) -> None:
    texts = ["abcdefg", "hi", "jklmnopqrstu", "v"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    source = encode_source(Source(str(tmp_path), sample_by="length"), byte_tokenizer, seq_len=seq_len, vocab_size=300)
    end = byte_tokenizer.eos_token_id
    stream = [token for text in texts for token in (*byte_tokenizer(text)["input_ids"], end)]
    starts = range(0, len(stream) - 1, seq_len)
    assert [piece.input_ids.tolist() for piece in source] == [stream[at : at + seq_len][: len(stream) - 1 - at] for at in starts]
    assert [piece.targets.tolist() for piece in source] == [stream[at + 1 : at + 1 + seq_len] for at in starts]
    file_of = np.repeat(np.arange(1, 5), [len(text) + 1 for text in texts])
    assert source.lines.tolist() == [file_of[at] for at in starts]


def test_the_run_says_what_is_a_sample(folder: Path) -> None:
    said = plain_text_in_words(Source(str(folder)))
    assert said == f"{folder}: plain text, a sample for each file (sample_by: file; paragraph or length would cut it otherwise)"
    (folder / "a.jsonl").write_text("{}")
    assert plain_text_in_words(Source(str(folder / "a.jsonl"))) is None
