"""Read plain text, .txt and .md, as records with the key `text`: a whole file, or a paragraph, each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from hecate.config import DataSource
from hecate.config.files.paths import data_files, file_form, indexed_prefix
from hecate.data.files.json_array import LONGEST_RECORD
from hecate.errors import UserError

_BOM = b"\xef\xbb\xbf"
_SAMPLES = {"file": "a sample for each file", "paragraph": "a sample for each paragraph", "length": "samples of data.seq_len tokens"}


def read_text_blocks(lines: Iterable[bytes], name: str, *, by_paragraph: bool) -> Iterator[tuple[int, bytes]]:
    """Yield the paragraphs of a file, which empty lines part, or the file as one, each with the line in which it begins. A file without
    text is one record without text.

    Raises:
        UserError: a record has more bytes than any may have.
    """
    block: list[bytes] = []
    begin, size, found = 1, 0, False
    for number, line in enumerate(lines, 1):
        if by_paragraph and not line.strip():
            if block:
                yield begin, b"".join(block).rstrip(b"\r\n")
                block, size, found = [], 0, True
            continue
        if not block:
            begin = number
        block.append(line.removeprefix(_BOM) if number == 1 else line)
        size += len(line)
        if size > LONGEST_RECORD:
            mend = "put an empty line between its parts" if by_paragraph else "set sample_by: paragraph for it, or cut the file"
            raise UserError(f"{name}:{begin}: the text has more than {LONGEST_RECORD >> 20} MiB, which are too many for one record\n{mend}")
    if block or not found:
        yield begin, b"".join(block).rstrip(b"\r\n" if by_paragraph else b"")


def plain_text_in_words(source: DataSource) -> str | None:
    """Say what of a source's plain text is one sample, and which key says so; None: it is no plain text."""
    if indexed_prefix(source.path) is not None or {file_form(file) for file in data_files(source.path)} != {"text"}:
        return None
    by = source.sample_by or "file"
    others = " or ".join(name for name in _SAMPLES if name != by)
    return f"{source.path}: plain text, {_SAMPLES[by]} (sample_by: {by}; {others} would cut it otherwise)"
