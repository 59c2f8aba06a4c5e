"""Turns whatever a library raises about a file of the user's into one sentence with the file's name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hecate.errors import UserError

_PLAIN = ("RuntimeError", "SafetensorError", "TemplateError")
"""The errors, beside OSError and ValueError, whose texts need no name before them."""
_LONGEST = 300
"""The most characters of a library's text that are shown."""


@contextmanager
def reading(file: Path | str, what: str) -> Iterator[None]:
    """Within the block a library reads, or builds from, a file of the user's: what it raises is about that file.

    Args:
        what: what fails if it fails, as in "transformers cannot build the model".

    Raises:
        UserError: the library has raised an error. That memory has run out stays what it was.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's
            raise
        raise UserError(f"{file}: {what}: {in_a_line(error)}") from error


def in_a_line(error: BaseException) -> str:
    """What an error says, in one line."""
    if "trust_remote_code" in str(error):
        return "it is made by code of its own (auto_map), which hecate does not run"
    said = " ".join(str(error).split())[:_LONGEST]
    name = type(error).__name__
    if not said:
        return name
    return said if name in _PLAIN or isinstance(error, OSError | ValueError) else f"{name}: {said}"
