"""What one check of `hecate doctor` finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "problem", "skipped"]
"""problem: training fails, or cannot start. warning: it works, but slower or less safely. skipped: the check means nothing here."""


@dataclass(frozen=True)
class Finding:
    """The state of one thing, the values that show it, and how to mend it ("" where nothing needs mending)."""

    state: State
    what: str
    mend: str = ""


def ok(what: str) -> Finding:
    return Finding("ok", what)


def warning(what: str, mend: str) -> Finding:
    return Finding("warning", what, mend)


def problem(what: str, mend: str) -> Finding:
    return Finding("problem", what, mend)


def skipped(why: str) -> Finding:
    return Finding("skipped", why)


Checks = Mapping[str, Callable[[], Finding]]
"""the checks by their names, in the order in which they are made"""


def by_name(*checks: Callable[[], Finding]) -> Checks:
    """Checks whose names are those of their functions, with spaces."""
    return {check.__name__.replace("_", " "): check for check in checks}
