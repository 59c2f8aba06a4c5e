"""What is wrong with a configuration, and the one error that reports all of it."""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hecate.errors import UserError

MAX_PRINTED = 20
MAX_SHOWN = 60
Add = Callable[[str, str, str], None]
"""Notes a problem: key, what is wrong, hint."""


@dataclass(frozen=True)
class Problem:
    source: str
    """The config file's path, or "command line"."""
    key: str
    """Dotted key, with [i] for an item of a list. Empty where the file as a whole is meant."""
    what: str
    """What is wrong, with the allowed range."""
    hint: str = ""
    """How to mend it."""
    line: int | None = None
    """Line in the file, from 1; None on the command line and for what is missing."""

    def __str__(self) -> str:
        place = self.source if self.line is None else f"{self.source}:{self.line}"
        text = f"{place}: {shorten(self.key)}: {self.what}" if self.key else f"{place}: {self.what}"
        return f"{text}\n    hint: {self.hint}" if self.hint else text


class ConfigError(UserError):
    """All that is wrong with a configuration: `problems`, sorted by key. The text prints the first 20."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda p: (p.key, p.line or 0, p.what)))
        lines = [str(problem) for problem in self.problems[:MAX_PRINTED]]
        if len(self.problems) > MAX_PRINTED:
            lines.append(f"... and {len(self.problems) - MAX_PRINTED} more")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Callable[..., "ConfigError"], tuple[tuple[Problem, ...]]]:
        return ConfigError, (self.problems,)


class Refused(Exception):
    """A value that cannot be taken. Caught where its key and line are known, and made a Problem there."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


def shorten(text: str) -> str:
    """The text on one line of at most 60 characters, unprintable characters escaped, the middle left out."""
    safe = text if text.isprintable() else repr(text)[1:-1]
    return safe if len(safe) <= MAX_SHOWN else f"{safe[:40]}...{safe[-17:]}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint that names the nearest of `known`, also by the last part of a dotted key; "" where nothing is near."""
    known = list(known)
    found = difflib.get_close_matches(word[:MAX_SHOWN], known, n=1, cutoff=0.6)
    if not found:
        by_last = {key.rpartition(".")[2]: key for key in known}
        found = [by_last[last] for last in difflib.get_close_matches(word.rpartition(".")[2][:MAX_SHOWN], list(by_last), n=1, cutoff=0.6)]
    return f"did you mean {found[0]}?" if found else ""
