"""The problems of a configuration, and the error that reports all of them at once."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hecate.errors import UserError

MAX_PRINTED = 20
MAX_SHOWN = 60
UNKNOWN = "unknown key"
"""what is wrong with a key that hecate does not have"""
Add = Callable[[str, str, str], None]
"""A function that adds a problem: its key, what is wrong, and a hint."""


def or_default(values: Mapping[str, Any], key: str, default: Any) -> Any:
    """Of values by dotted keys, which lack those that have a problem: the key's, `default` if it is null, None if it has a problem."""
    return default if key in values and values[key] is None else values.get(key)


def serves(key: str, value: Any, needed: Any) -> bool:
    """Whether a key's value is the one that another key needs. `fssdp.plan: auto` is history wherever history is needed."""
    return value == needed or (key, value, needed) == ("fssdp.plan", "auto", "history")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration."""

    source: str
    """The config file's path, or "command line"."""
    key: str
    """The dotted key, with [i] for an item of a list. Empty for a problem of the file as a whole."""
    what: str
    """What is wrong, with the allowed range."""
    hint: str = ""
    """How to correct it."""
    line: int | None = None
    """The line in the file, from 1. None on the command line and for a missing key."""

    def __str__(self) -> str:
        place = self.source if self.line is None else f"{self.source}:{self.line}"
        text = f"{place}: {shorten(self.key)}: {self.what}" if self.key else f"{place}: {self.what}"
        return f"{text}\n    hint: {self.hint}" if self.hint else text


class ConfigError(UserError):
    """The configuration has the `problems`, those of lines in their order before the others, by key. The text shows the first 20, and
    every unknown key on one line."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda p: (p.line is None, p.line or 0, p.key, p.what)))
        many = len(self.problems) > MAX_PRINTED
        unknown = [problem for problem in self.problems if many and problem.what == UNKNOWN]  # a file is mended by its whole list
        others = [problem for problem in self.problems if problem not in unknown]
        shown = {*unknown, *others[:MAX_PRINTED]}
        lines = [str(one).replace("\n    hint: ", "; ") if one in unknown else str(one) for one in self.problems if one in shown]
        if len(others) > MAX_PRINTED:
            lines.append(f"... and {len(others) - MAX_PRINTED} more")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Callable[..., "ConfigError"], tuple[tuple[Problem, ...]]]:
        return ConfigError, (self.problems,)


class Refused(Exception):
    """A value is refused. The caller that has the key and line turns this into a Problem."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


def shorten(text: str) -> str:
    """Return the text on one line of at most 60 characters, with unprintable characters escaped and the middle left out."""
    safe = text if text.isprintable() else repr(text)[1:-1]
    return safe if len(safe) <= MAX_SHOWN else f"{safe[:40]}...{safe[-17:]}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a hint at the name in `known` nearest to `word`, or to its last dotted part. Returns "" if none is near."""
    known = list(known)
    found = difflib.get_close_matches(word[:MAX_SHOWN], known, n=1, cutoff=0.6)
    if not found:
        by_last = {key.rpartition(".")[2]: key for key in known}
        found = [by_last[last] for last in difflib.get_close_matches(word.rpartition(".")[2][:MAX_SHOWN], list(by_last), n=1, cutoff=0.6)]
    return f"did you mean {found[0]}?" if found else ""
