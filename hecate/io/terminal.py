"""Prints for hecate: a text out of somebody's file must not move the cursor, clear the screen or set the terminal's title."""

from __future__ import annotations

import logging
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_log = logging.getLogger("hecate")
PROGRESS = logging.getLogger("hecate.progress")
"""The logger of how far a run has come: its steps, evaluations, checkpoints and summary."""

_CONTROLS = [
    *(code for code in range(0x20) if chr(code) not in "\n\t"),
    *range(0x7F, 0xA0),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
]
"""The control characters, and those that reverse the direction of writing."""
_ESCAPED = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _CONTROLS}


def safe(text: str) -> str:
    """The text with its control characters, other than new lines and tabs, as escapes."""
    return text.translate(_ESCAPED)


def safe_line(text: str) -> str:
    """The same without new lines and tabs, for a cell of a table."""
    return safe(text).replace("\n", "\\n").replace("\t", "\\t")


def show_text(text: object = "", *, end: str = "\n") -> None:
    """Print what a command was asked for, at once."""
    print(safe(str(text)), end=end, flush=True)


class _Messages(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        # What a message meets here, such as a closed pipe, reaches whoever logs it, as with `print`.
        text = self.format(record)
        show = sys.stdout if record.name == PROGRESS.name else sys.stderr
        print(text if getattr(record, "styled", False) else safe(text), file=show, flush=True)


def show_messages() -> None:
    """Have what hecate's loggers say, from INFO up, printed as it is: by `PROGRESS` to standard output, by all others to standard error.

    Every program of hecate calls it as it begins. A program that uses hecate as a library does not, and treats the logger "hecate" as it
    does any other.
    """
    if not shows_messages():
        _log.addHandler(_Messages())
    _log.setLevel(logging.INFO)
    _log.propagate = False  # a handler that a library gives to the root logger would print them again


def shows_messages() -> bool:
    """Whether `show_messages` has been called in this process."""
    return any(isinstance(handler, _Messages) for handler in _log.handlers)


def show_progress(*texts: str) -> None:
    """Replace the last line on standard error by another, without a new line at its end."""
    print(f"\r\033[K{safe_line(''.join(texts))}", end="", file=sys.stderr, flush=True)


def new_console(**settings: Any) -> Console:
    """A console of rich's for tables and panels. Raises what its constructor raises."""
    from rich.console import Console

    _have_rich_escape()
    return Console(**settings)


@cache
def _have_rich_escape() -> None:
    """Rich removes five control characters of each text, by a table that is not public, and lets the others pass."""
    from rich import control

    control._CONTROL_STRIP_TRANSLATE.update(_ESCAPED)
