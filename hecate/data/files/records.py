"""Read the records of data files of any form: JSONL, a JSON list, CSV, plain text, Parquet, Arrow; all but the last two also gzipped.

A file's ending says its form. JSONL and a JSON list are told apart by their first character, except that a .jsonl file is always JSONL.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from hecate.config.files.paths import FORMS, data_files, file_form
from hecate.data.files.json_array import read_array
from hecate.data.files.plain_text import read_text_blocks
from hecate.data.files.tables import Row, bounded_lines, read_arrow, read_csv, read_parquet
from hecate.errors import UserError
from hecate.io.plain_files import open_plain

_GZIP = b"\x1f\x8b"
_TABLES: dict[str, Callable[[str], Iterator[Row]]] = {"parquet": read_parquet, "arrow": read_arrow}
_DELIMITERS = {"csv": None, "tsv": "\t"}
_HEAD = 4096
_PADDING = 1 << 20
"""The number of zero bytes at the end of a packed file that are too many."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a data file; one that cannot be used has a reason."""

    file: str
    line: int
    """The line in which the record begins, from 1; in a Parquet or Arrow file, its row."""
    number: int
    """The number of the record among those of all files of its source, from 1."""
    value: dict[str, Any]
    reason: str = ""
    """Why the record cannot be used; empty: it can."""
    text: bytes | None = None
    """The record as the file has it; None: it is no text."""

    @property
    def raw(self) -> bytes:
        """The record as text."""
        return self.text if self.text is not None else json.dumps(self.value, ensure_ascii=False, default=str).encode("utf-8", "replace")


def place_of(file: str, line: int) -> str:
    """Where a record begins, as errors say it."""
    return f"{file}, row {line}" if file_form(file) in _TABLES else f"{file}:{line}"


def read_records(path: str, *, delimiter: str | None = None, by_paragraph: bool = False) -> Iterator[Record]:
    """Yield the records of a file, of all data files of a folder, or of all files that match a pattern, in the order of their names.

    Args:
        delimiter: between the cells of CSV files; None: it is found out.
        by_paragraph: whether a paragraph of plain text is a record, not a file.

    Raises:
        UserError: a file cannot be read, is empty, or cannot be read to its end.
    """
    number = 0
    for file in data_files(path):
        before = number
        for record in _records_of(file, delimiter, by_paragraph=by_paragraph):
            number += 1
            yield Record(file, record.line, number, record.value, record.reason, record.text)
        if number == before:
            raise UserError(f"{file} is empty: a data file needs at least one sample, such as one JSON object per line")


def places_of_records(path: str, numbers: Iterable[int], *, delimiter: str | None = None, by_paragraph: bool = False) -> dict[int, str]:
    """Where the records of a source with these numbers are, as errors say it; what is not there any more has no place.

    Raises:
        UserError: as `read_records`.
    """
    missing, files = set(numbers), data_files(path)
    if len(files) == 1 and file_form(files[0]) == "jsonl":  # a line for each record, so that nothing need be read
        return {number: place_of(files[0], number) for number in missing}
    found: dict[int, str] = {}
    records = read_records(path, delimiter=delimiter, by_paragraph=by_paragraph)
    while missing and (record := next(records, None)) is not None:
        if record.number in missing:
            missing.remove(record.number)
            found[record.number] = place_of(record.file, record.line)
    return found


def _records_of(file: str, delimiter: str | None, *, by_paragraph: bool) -> Iterator[Record]:
    """The records of one file, not numbered."""
    form = file_form(file)
    if form in _TABLES:
        for line, value, reason in _TABLES[form](file):
            yield Record(file, line, 0, value, reason)
        return
    with _opened(file) as stream:
        if form in _DELIMITERS:
            text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
            for line, value, reason in read_csv(bounded_lines(text, file), file, delimiter or _DELIMITERS[form]):
                yield Record(file, line, 0, value, reason)
        elif form == "text":
            for line, raw in read_text_blocks(bounded_lines(stream, file), file, by_paragraph=by_paragraph):
                try:
                    yield Record(file, line, 0, {"text": raw.decode("utf-8")}, text=raw)
                except UnicodeDecodeError as error:
                    at = line + raw.count(b"\n", 0, error.start)
                    yield Record(file, line, 0, {}, f"not UTF-8 in line {at} of the file", raw)
        elif form != "jsonl" and _first_sign(stream, file) == b"[":
            for element in read_array(stream, file):
                reason = "" if isinstance(element.value, dict) else f"a JSON {json_name(element.value)} where an object is needed"
                yield Record(file, element.line, 0, element.value, reason, element.raw.encode("utf-8", "replace"))
        else:
            yield from _lines(stream, file, form)


def _lines(stream: BinaryIO, file: str, form: str | None) -> Iterator[Record]:
    for line, raw in enumerate(bounded_lines(stream, file), 1):
        value, reason = json_object(raw, first=line == 1)
        if line == 1 and reason:
            _refuse_other_forms(raw, file, form, reason)
        yield Record(file, line, 0, value, reason, raw)


def _refuse_other_forms(raw: bytes, file: str, form: str | None, reason: str) -> None:
    """Refuse a file whose first line shows that it is no JSONL."""
    start = raw.removeprefix(b"\xef\xbb\xbf").lstrip()
    if form == "jsonl" and start.startswith(b"[") and start.rstrip() in (b"[", b"[{"):
        raise UserError(f"{file}:1: the file is one JSON list, not one object per line\nrename it to end in .json, and it is read as that")
    if form == "json" and start.rstrip() == b"{":
        raise UserError(
            f"{file}:1: the file is one JSON object, but samples are read from a list of objects, or from one object per line\n"
            "write the list that the object holds into a file of its own"
        )
    if form is None and not start.startswith((b"{", b"[")):
        raise UserError(
            f"{file}:1: {reason}\n"
            "the file's name does not say its form, so it was read as JSONL; give it the ending of its form: "
            f"{', '.join(FORMS)}, or one with .gz"
        )


def json_object(raw: bytes, *, first: bool) -> tuple[dict[str, Any], str]:
    """The object of one line and ""; or an empty object, and why the line cannot be read. The first line of a file may begin with a BOM."""
    if first:
        raw = raw.removeprefix(b"\xef\xbb\xbf")
    if not raw.strip():
        return {}, "the line is empty"
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return {}, f"not UTF-8 at byte {error.start} of the line"
    except RecursionError:
        return {}, "JSON nested too deeply"
    except ValueError as error:
        torn = "" if raw.endswith(b"\n") else " (the file ends inside this line: it seems cut off)"
        return {}, f"not valid JSON: {error}{torn}"
    return (value, "") if isinstance(value, dict) else ({}, f"a JSON {json_name(value)} where an object is needed")


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed if they are gzip's. Raises UserError if they cannot be read, here or in the block."""
    try:
        with open_plain(path) as file:
            packed = file.read(len(_GZIP)) == _GZIP
            if packed:
                _refuse_padding(file, path)
            file.seek(0)
            with gzip.open(file) if packed else file as stream:
                yield cast(BinaryIO, stream)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"data file {path} cannot be unpacked: {error}\nit is damaged or cut off: make it again") from error
    except OSError as error:
        raise UserError(f"data file {path} cannot be read: {error.strerror or error}") from error


def _refuse_padding(file: BinaryIO, path: str) -> None:
    """Raises UserError: the file ends in a megabyte of zeros or more, which gzip's reader would go through one by one."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - _PADDING))
    if size > _PADDING and not file.read(_PADDING).strip(b"\0"):
        raise UserError(f"data file {path} cannot be unpacked: it ends in zeros\nit is damaged or cut off: make it again")


def _first_sign(stream: BinaryIO, file: str) -> bytes:
    """The first byte that is not white space. Raises UserError if the file is no text."""
    head = stream.read(_HEAD)
    stream.seek(0)
    if b"\0" in head:
        raise UserError(f"{file} is no text, as JSONL, JSON and CSV are\nnames of Parquet and Arrow files must end in .parquet and .arrow")
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def json_name(value: object) -> str:
    """What JSON calls a value's type."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, dict):
        return "object"
    if isinstance(value, list):
        return "list"
    return "string" if isinstance(value, str) else "number"
