"""Read a JSON file whose only value is a list, one element at a time, in memory for little more than the largest element."""

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from hecate.errors import UserError

LONGEST_RECORD = 1 << 27
"""The most bytes of the text of one record, in any form of text: a packed file of a megabyte could hold one of a gigabyte."""
_CHUNK = 1 << 20
"""The bytes that are read at once."""
_LONGEST_TOKEN = 16
"""The number of characters before the end of what has been read within which an error of JSON may be due to that end."""
_WHITE = " \t\r\n"
_DECODER = json.JSONDecoder()


class Element(NamedTuple):
    """One element of the list."""

    line: int
    """The line of the file in which the element begins, from 1."""
    value: Any
    raw: str


def read_array(file: BinaryIO, name: str) -> Iterator[Element]:
    """Yield the elements of the list in `file`, in order.

    Raises:
        UserError: the file holds something else than one sound JSON list in UTF-8. Nothing behind that place can be read, so it cannot be
            skipped.
    """
    text = _Text(file, name)
    if text.next_sign() != "[":
        raise text.error("a JSON list must begin with [")
    text.take(1)
    if text.next_sign() != "]":
        while True:
            text.next_sign()
            yield text.element()
            if text.next_sign() == "]":
                break
            if text.next_sign() != ",":
                raise text.error("an element of a JSON list must be followed by , or ]")
            text.take(1)
    text.take(1)
    if text.next_sign():
        raise text.error("there is more behind the end of the JSON list")


class _Text:
    """The part of a file that has been read and not yet been used."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._buffer, self._at, self._line, self._ended = "", 0, 1, False

    def take(self, count: int) -> str:
        """Use up so many characters."""
        taken = self._buffer[self._at : self._at + count]
        self._at += count
        self._line += taken.count("\n")
        return taken

    def next_sign(self) -> str:
        """The next character that is not white space, which is used up; empty at the end of the file."""
        while True:
            rest = len(self._buffer)
            at = self._at
            while at < rest and self._buffer[at] in _WHITE:
                at += 1
            self.take(at - self._at)
            if at < rest:
                return self._buffer[at]
            if not self._more(_CHUNK):
                return ""

    def element(self) -> Element:
        """Use up one JSON value, which begins at the next character."""
        line, size = self._line, _CHUNK
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                behind = error.pos - self._at
                may_go_on = error.msg.startswith("Unterminated string") or error.pos > len(self._buffer) - _LONGEST_TOKEN
                if may_go_on and self._more(size):
                    size *= 2
                    continue
                self.take(behind)
                raise self.error(f"not valid JSON: {error.msg}") from error
            except (RecursionError, ValueError) as error:
                reason = "JSON nested too deeply" if isinstance(error, RecursionError) else f"not valid JSON: {error}"
                raise self.error(reason) from error
            if end == len(self._buffer) and self._more(size):
                continue  # a number may go on
            return Element(line, value, self.take(end - self._at))

    def error(self, reason: str) -> UserError:
        """An error at the next character."""
        torn = " (the file ends at this place: it seems cut off)" if self._ended and self._at >= len(self._buffer) else ""
        return UserError(
            f"{self._name}:{self._line}: {reason}{torn}\n"
            "the file is read as one JSON list of objects; correct it from that line on, or write one object per line into a .jsonl file"
        )

    def _more(self, size: int) -> bool:
        """Read on; False: the file has ended."""
        if self._ended:
            return False
        if len(self._buffer) - self._at > LONGEST_RECORD:
            raise self.error(f"an element has more than {LONGEST_RECORD >> 20} MiB")
        data = self._file.read(size)
        self._ended = not data
        try:
            self._buffer, self._at = self._buffer[self._at :] + self._decode.decode(data, final=self._ended), 0
        except UnicodeDecodeError as error:
            self._line += self._buffer.count("\n", self._at) + data.count(b"\n", 0, error.start)
            raise self.error("not UTF-8") from error
        return not self._ended
