"""Read the rows of a table as objects: CSV by Python's own reader, Parquet and Arrow by the package pyarrow."""

from __future__ import annotations

import csv
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import IO, Any, AnyStr, NamedTuple

from hecate.data.files.json_array import LONGEST_RECORD
from hecate.errors import UserError
from hecate.io.plain_files import require_plain

_DELIMITERS = (",", ";", "\t", "|")
"""The signs that are looked for between cells."""
_ROWS_AT_A_TIME = 64
"""The number of rows that are in memory whole: a table may have a long text once, and name it in every row."""
_OLDEST_PYARROW = "23.0.1"
"""The earliest version that is used: those before it unpickle what a file says."""


class Row(NamedTuple):
    """One row."""

    line: int
    """The line of a CSV file in which the row begins; of other files the row's number, from 1."""
    value: dict[str, Any]
    reason: str = ""
    """Why the row cannot be used; empty: it can."""


def bounded_lines(file: IO[AnyStr], name: str) -> Iterator[AnyStr]:
    """Yield the lines of a file. Raises UserError: one is longer than any record may be."""
    number = 0
    while line := file.readline(LONGEST_RECORD + 1):
        number += 1
        if len(line) > LONGEST_RECORD:
            raise UserError(
                f"{name}:{number}: the line has more than {LONGEST_RECORD >> 20} MiB\nno sample is so long: is this a file of data?"
            )
        yield line


def read_csv(file: Iterable[str], name: str, delimiter: str | None = None) -> Iterator[Row]:
    """Yield the rows of a CSV or TSV file, whose first line names the columns. All values are text.

    Args:
        file: its lines, without translation of line ends. Bytes that are not UTF-8 are surrogate escapes.
        delimiter: between cells; None: a comma, semicolon, tab or bar, whichever parts the first line, and the second into as many.

    Raises:
        UserError: the first line names a column twice or not at all; or the file breaks CSV's rules.
    """
    csv.field_size_limit(LONGEST_RECORD)
    lines = iter(file)
    first = list(islice(lines, 2))
    try:
        rows = csv.reader(chain(first, lines), delimiter=delimiter or _delimiter_of(first), strict=True)
        columns = next(rows, [])
        counts = Counter(columns)
        if bad := [column for column in columns if not column.strip() or counts[column] > 1]:
            what = f"names column {bad[0][:100]!r} twice" if bad[0].strip() else "leaves a column without a name"
            raise UserError(f"{name}:1: the first line {what}; in a CSV file it must name all columns")
        line = rows.line_num + 1
        for cells in rows:
            if cells:  # an empty line is none
                yield _csv_row(line, columns, cells)
            line = rows.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{name}:{rows.line_num}: not valid CSV: {error}\n"
            'a cell with commas, quotes or line breaks must stand in "...", and a quote within it is written ""'
        ) from error


def _delimiter_of(first: list[str]) -> str:
    """The sign between cells, by a table's first two lines. A cell of the second may go on in further lines."""
    try:
        counts = {sign: [len(next(csv.reader([line], delimiter=sign), [])) for line in first] for sign in _DELIMITERS}
    except csv.Error:  # is met again when the rows are read, and said with its line
        return ","
    parting = [sign for sign, cells in counts.items() if cells and cells[0] > 1]
    return next((sign for sign in parting if len(set(counts[sign])) == 1), parting[0] if parting else ",")


def _csv_row(line: int, columns: list[str], cells: list[str]) -> Row:
    value: dict[str, Any] = dict(zip(columns, cells, strict=False))
    if len(cells) != len(columns):
        return Row(line, value, f"the row has {len(cells)} cells, but the first line names {len(columns)} columns")
    try:
        "".join(cells).encode("utf-8")
    except UnicodeEncodeError:
        return Row(line, value, "not UTF-8")
    return Row(line, value)


def read_parquet(path: str) -> Iterator[Row]:
    """Yield the rows of a Parquet file. Raises UserError: pyarrow is too old, or cannot read the file."""
    arrow = _pyarrow(path)
    from pyarrow.parquet import ParquetFile

    try:
        require_plain(path, sys.maxsize)
        with ParquetFile(path, memory_map=True) as file:
            yield from _rows(file.iter_batches(batch_size=_ROWS_AT_A_TIME))
    except UserError:
        raise
    # A damaged file brings texts that are not UTF-8, dates that Python does not have and sizes that no machine has, too.
    except (arrow.ArrowException, OSError, ValueError, OverflowError, MemoryError, KeyError, TypeError) as error:
        raise _unreadable(path, "Parquet", error) from error


def read_arrow(path: str) -> Iterator[Row]:
    """Yield the rows of an Arrow file, of the file form or of the stream form, as the library `datasets` writes it. Raises UserError."""
    arrow = _pyarrow(path)
    try:
        require_plain(path, sys.maxsize)
        with arrow.memory_map(path) as file:
            try:
                reader = arrow.ipc.open_file(file)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            except arrow.ArrowInvalid:
                file.seek(0)
                batches = iter(arrow.ipc.open_stream(file))
            starts = ((batch, start) for batch in batches for start in range(0, batch.num_rows, _ROWS_AT_A_TIME))
            yield from _rows(batch.slice(start, _ROWS_AT_A_TIME) for batch, start in starts)
    except UserError:
        raise
    except (arrow.ArrowException, OSError, ValueError, OverflowError, MemoryError, KeyError, TypeError) as error:
        raise _unreadable(path, "Arrow", error) from error


def _rows(batches: Iterator[Any]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # offsets are not checked otherwise, and lead anywhere
        for value in _without_nanoseconds(batch).to_pylist():
            number += 1
            yield Row(number, _without_nulls(value))


def _without_nanoseconds(batch: Any) -> Any:
    """The batch with times of whole microseconds, as Python has them; no data format reads times."""
    import pyarrow

    for at, column in enumerate(batch.schema):
        if getattr(column.type, "unit", None) == "ns":
            wanted = pyarrow.time64("us")
            if pyarrow.types.is_timestamp(column.type):
                wanted = pyarrow.timestamp("us", column.type.tz)
            elif pyarrow.types.is_duration(column.type):
                wanted = pyarrow.duration("us")
            batch = batch.set_column(at, column.name, batch.column(at).cast(wanted, safe=False))
    return batch


def _without_nulls(value: Any) -> Any:
    """The value without keys that have none: in a table every object of a column has all keys that any of them has."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _pyarrow(path: str) -> Any:
    import pyarrow
    import pyarrow.ipc

    if list(map(int, re.findall("[0-9]+", pyarrow.__version__)[:3])) < list(map(int, _OLDEST_PYARROW.split("."))):
        raise UserError(
            f"{path}: pyarrow {pyarrow.__version__} is not used to read it, because it may run code that a file holds\n"
            f"  update it with: pip install 'pyarrow >= {_OLDEST_PYARROW}'"
        )
    return pyarrow


def _unreadable(path: str, form: str, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0][:200]
    return UserError(f"{path}: cannot be read as {form}: {reason}\nthe file is damaged, cut off or of another form")
